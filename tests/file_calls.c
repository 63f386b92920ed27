/* Counts the calls of this process that change files below one folder, and stands in the way of one of them.
 *
 * Loaded with LD_PRELOAD, so that what native code writes is seen too. It does nothing until file_calls_begin() is called.
 * Each counted call is written as a line "KIND<tab>PATH" to a log, before the call is made; the n-th of the wanted kinds
 * ends the process (SIGKILL) or fails with an errno. Or the process stops before each of them, until SIGCONT.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, RENAME = 2, SYNC = 4, UNLINK = 8, MKDIR = 16, LINK = 32, TRUNCATE = 64, WRITE = 128 };
static const char *const names[] = {"open", "rename", "sync", "unlink", "mkdir", "link", "truncate", "write"};

static char prefix[PATH_MAX];
static size_t prefix_length;
static int active, log_fd = -1, kinds, error_number, sticky;
static long wanted;
static atomic_long counted;

/* folder: what counts; log: a file that is appended to; mask: kinds that count; n: which of them, from 1 on (0 = none, -1 =
 * all, and the process only stops);
 * error: the errno that it fails with, 0 = SIGKILL; stays: all later ones fail too. */
void file_calls_begin(const char *folder, const char *log, int mask, long n, int error, int stays) {
    snprintf(prefix, sizeof prefix, "%s/", folder);
    prefix_length = strlen(prefix);
    log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    kinds = mask, wanted = n, error_number = error, sticky = stays;
    atomic_store(&counted, 0);
    active = 1;
}

void file_calls_end(void) { active = 0; }

/* Whether the call must fail; errno is set then. */
static int stopped(int kind, const char *path) {
    if (!active || strncmp(path, prefix, prefix_length) != 0) return 0;
    if (!(kind & kinds)) return 0;
    long number = atomic_fetch_add(&counted, 1) + 1;
    char line[PATH_MAX + 16];
    int length = snprintf(line, sizeof line, "%s\t%s\n", names[__builtin_ctz(kind)], path + prefix_length);
    syscall(SYS_write, log_fd, line, length);
    if (wanted < 0) syscall(SYS_tgkill, getpid(), (pid_t)syscall(SYS_gettid), SIGSTOP);
    if (wanted <= 0 || number < wanted || (number > wanted && !sticky)) return 0;
    if (error_number == 0) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    errno = error_number;
    return 1;
}

static int fd_path(int fd, char *path) {
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (length < 0) return -1;
    path[length] = 0;
    return 0;
}

static int at_path(int folder, const char *name, char *path) {
    char base[PATH_MAX];
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return 0;
    }
    if (folder == AT_FDCWD) {
        if (getcwd(base, sizeof base) == NULL) return -1;
    } else if (fd_path(folder, base) != 0) {
        return -1;
    }
    return snprintf(path, PATH_MAX, "%s/%s", base, name) < PATH_MAX ? 0 : -1;
}

static int named_stopped(int kind, int folder, const char *name) {
    if (!active || name == NULL) return 0;
    int before = errno;
    char path[PATH_MAX];
    if (at_path(folder, name, path) == 0 && stopped(kind, path)) return 1;
    errno = before;
    return 0;
}

static int fd_stopped(int kind, int fd) {
    if (!active) return 0;
    int before = errno;
    char path[PATH_MAX];
    if (fd_path(fd, path) == 0 && stopped(kind, path)) return 1;
    errno = before;
    return 0;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (real == NULL) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static mode_t mode_of(int flags, va_list rest) {
    return flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}

#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & O_CREAT))

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = mode_of(flags, rest); \
        va_end(rest); \
        REAL(int, #name, const char *, int, ...); \
        if (WRITES(flags) && named_stopped(OPEN, AT_FDCWD, path)) return -1; \
        return real(path, flags, mode); \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = mode_of(flags, rest); \
        va_end(rest); \
        REAL(int, #name, int, const char *, int, ...); \
        if (WRITES(flags) && named_stopped(OPEN, folder, path)) return -1; \
        return real(folder, path, flags, mode); \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

#define FOPENS(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(FILE *, #name, const char *, const char *); \
        if (strpbrk(mode, "wa+") && named_stopped(OPEN, AT_FDCWD, path)) return NULL; \
        return real(path, mode); \
    }
FOPENS(fopen)
FOPENS(fopen64)

int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open64(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return named_stopped(RENAME, AT_FDCWD, to) ? -1 : real(from, to);
}
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    return named_stopped(RENAME, to_folder, to) ? -1 : real(from_folder, from, to_folder, to);
}
int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    return named_stopped(RENAME, to_folder, to) ? -1 : real(from_folder, from, to_folder, to, flags);
}
int link(const char *from, const char *to) {
    REAL(int, "link", const char *, const char *);
    return named_stopped(LINK, AT_FDCWD, to) ? -1 : real(from, to);
}
int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    REAL(int, "linkat", int, const char *, int, const char *, int);
    return named_stopped(LINK, to_folder, to) ? -1 : real(from_folder, from, to_folder, to, flags);
}
int symlink(const char *target, const char *path) {
    REAL(int, "symlink", const char *, const char *);
    return named_stopped(LINK, AT_FDCWD, path) ? -1 : real(target, path);
}
int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    return named_stopped(UNLINK, AT_FDCWD, path) ? -1 : real(path);
}
int unlinkat(int folder, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    return named_stopped(UNLINK, folder, path) ? -1 : real(folder, path, flags);
}
int remove(const char *path) {
    REAL(int, "remove", const char *);
    return named_stopped(UNLINK, AT_FDCWD, path) ? -1 : real(path);
}
int rmdir(const char *path) {
    REAL(int, "rmdir", const char *);
    return named_stopped(UNLINK, AT_FDCWD, path) ? -1 : real(path);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    return named_stopped(MKDIR, AT_FDCWD, path) ? -1 : real(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(int, "mkdirat", int, const char *, mode_t);
    return named_stopped(MKDIR, folder, path) ? -1 : real(folder, path, mode);
}
int fsync(int fd) {
    REAL(int, "fsync", int);
    return fd_stopped(SYNC, fd) ? -1 : real(fd);
}
int fdatasync(int fd) {
    REAL(int, "fdatasync", int);
    return fd_stopped(SYNC, fd) ? -1 : real(fd);
}

#define TRUNCATES(name) \
    int name(int fd, off_t size) { \
        REAL(int, #name, int, off_t); \
        return fd_stopped(TRUNCATE, fd) ? -1 : real(fd, size); \
    }
TRUNCATES(ftruncate)
TRUNCATES(ftruncate64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    return fd_stopped(WRITE, fd) ? -1 : real(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    return fd_stopped(WRITE, fd) ? -1 : real(fd, parts, count);
}

#define PWRITES(name) \
    ssize_t name(int fd, const void *data, size_t size, off_t offset) { \
        REAL(ssize_t, #name, int, const void *, size_t, off_t); \
        return fd_stopped(WRITE, fd) ? -1 : real(fd, data, size, offset); \
    }
PWRITES(pwrite)
PWRITES(pwrite64)

#define SENDS(name) \
    ssize_t name(int to, int from, off_t *offset, size_t size) { \
        REAL(ssize_t, #name, int, int, off_t *, size_t); \
        return fd_stopped(WRITE, to) ? -1 : real(to, from, offset, size); \
    }
SENDS(sendfile)
SENDS(sendfile64)

ssize_t copy_file_range(int from, off_t *from_offset, int to, off_t *to_offset, size_t size, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off_t *, int, off_t *, size_t, unsigned);
    return fd_stopped(WRITE, to) ? -1 : real(from, from_offset, to, to_offset, size, flags);
}
