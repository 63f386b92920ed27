# Common functions and settings of the batch scripts in this folder, which source this file on the first node of a job.
#
# Variables that sbatch itself reads (or options of sbatch): SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS, SBATCH_TIMELIMIT,
# SBATCH_GPUS_PER_NODE. Without them the cluster's defaults hold. A job has exclusive use of its nodes, with all their GPUs.
#
# Variables that are read here, all of them optional:
#   REAR_PROJECT         the checkout, seen by all nodes             default: the folder where sbatch was called
#   REAR_SETUP           a file to source first (module load ...)    default: none
#   REAR_PYTHON          the interpreter                             default: .venv/bin/python of the project, else python
#   REAR_CONTAINER       words before the interpreter                default: none; "apptainer exec --nv image.sif"
#   REAR_SRUN_OPTIONS    more words for srun                         default: none; "--container-image=... --container-mounts=..."
#   REAR_TASKS_PER_NODE  processes per node                          default: one per GPU; 1 without GPUs
#   REAR_LOGS            folder for job.out and one log per node     default: runs/slurm/JOBNAME-JOBID
#   WANDB_MODE           for runs with wandb                         default: offline, as compute nodes have no network
#   MASTER_PORT          where ranks meet on the first node          default: a number made of the job's that is free there
#   NCCL_*, GLOO_*       as the cluster needs them, for instance NCCL_SOCKET_IFNAME

if [[ -n "${REAR_SETUP:-}" ]]; then
    set +u # such files often read variables that are not set
    source "$REAR_SETUP"
    set -u
fi
if [[ -z "${REAR_PYTHON:-}" ]]; then
    REAR_PYTHON=python
    if [[ -x .venv/bin/python ]]; then REAR_PYTHON=$PWD/.venv/bin/python; fi
fi

GPUS=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}} # "a100:8" or "8"
GPUS=${GPUS##*:}
REAR_TASKS_PER_NODE=${REAR_TASKS_PER_NODE:-$((GPUS > 0 ? GPUS : 1))}
NODES=${SLURM_JOB_NUM_NODES:-1}
# Since SLURM 22.05, srun does not inherit --cpus-per-task from the job; without it a task would be bound to one core.
CPUS_PER_TASK=$((${SLURM_CPUS_ON_NODE:-1} / REAR_TASKS_PER_NODE))
CPUS_PER_TASK=$((CPUS_PER_TASK > 0 ? CPUS_PER_TASK : 1))

# More threads than cores per task would slow down all ranks.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS_PER_TASK}
# Number GPUs as nvidia-smi and task.sh do.
export CUDA_DEVICE_ORDER=${CUDA_DEVICE_ORDER:-PCI_BUS_ID}
# Exported for task.sh, which binds each task to the cores close to its GPU.
export REAR_SRUN_OPTIONS=${REAR_SRUN_OPTIONS:-}
# NCCL then reports which link or library failed, and nothing otherwise.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Records the last collectives of every rank; dumped after a hang, they show which rank is late.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# A node-local cache, because hundreds of ranks that compile into one home folder wait for each other's locks.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$UID}
export WANDB_MODE=${WANDB_MODE:-offline}

# Prints a port on which no process listens, and none on the next port. This script runs on the first node, where rank 0 runs.
free_port() {
    local port listening
    listening=" $(cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | awk '$4 == "0A" { n = split($2, at, ":"); print at[n] }' | tr '\n' ' ')"
    for ((port = 10000 + ${SLURM_JOB_ID:-0} * 31 % 5983; port < 16000; port++)); do
        if [[ $listening != *" $(printf %04X "$port") "* && $listening != *" $(printf %04X $((port + 1))) "* ]]; then
            echo "$port"
            return
        fi
    done
    echo 10000
}
export MASTER_PORT=${MASTER_PORT:-$(free_port)}

# As --output names it (%x-%j); a task of an array has a number of its own.
JOB=${SLURM_JOB_NAME:-job}-${SLURM_JOB_ID:-0}
export REAR_LOGS=${REAR_LOGS:-runs/slurm/$JOB}
mkdir -p "$REAR_LOGS"

# This job's own output goes where the logs are, unless sbatch was given another --output. SLURM makes no folders, so it begins
# in the folder of sbatch; what SLURM itself adds to the open file follows it.
OUTPUT=$(readlink "/proc/$$/fd/1" || true)
if [[ "$OUTPUT" == */slurm-"$JOB".out && $(stat -c %d "$OUTPUT") == $(stat -c %d "$REAR_LOGS") ]]; then
    mv "$OUTPUT" "$REAR_LOGS/job${SLURM_RESTART_COUNT:+.$SLURM_RESTART_COUNT}.out"
fi
echo "logs: $REAR_LOGS" >&2

LOG=(--output="$REAR_LOGS/node%n-%N.log" --open-mode=append)

step=  # the id of the process of srun or deepspeed while it runs; it leads its own process group
asked= # set when the time limit is near and the ranks have been asked to save
ended= # set when SLURM ends this job (SIGTERM); SLURM then decides itself whether to requeue it
trap 'ended=1' TERM

# tasks ARGUMENTS...: runs python with these arguments, one process per GPU of the job. Ranks find each other by SLURM's
# variables, which rear_scale/world.py reads. Every task sees all GPUs of its node, as NCCL's peer-to-peer copies require.
tasks() {
    # --wait: when one rank fails, the others have a minute to print their messages before they are ended.
    # shellcheck disable=SC2086  # words, not one word
    setsid srun --nodes="$NODES" --ntasks="$((NODES * REAR_TASKS_PER_NODE))" --ntasks-per-node="$REAR_TASKS_PER_NODE" \
        --cpus-per-task="$CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=60 "${LOG[@]}" ${REAR_SRUN_OPTIONS:-} \
        bash launchers/slurm/task.sh ${REAR_CONTAINER:-} "$REAR_PYTHON" "$@" &
    wait_for $!
}

# alone ARGUMENTS...: runs python with these arguments, as a single process on the first node.
alone() {
    # shellcheck disable=SC2086
    srun --nodes=1 --ntasks=1 --overlap ${REAR_SRUN_OPTIONS:-} ${REAR_CONTAINER:-} "$REAR_PYTHON" "$@"
}

# wait_for PID: waits for a process and returns its exit code. A signal to this shell interrupts `wait`, which is then repeated.
wait_for() {
    step=$1
    if [[ -n "$asked" ]]; then pass_on_usr1; fi
    while kill -0 "$step" 2>/dev/null; do
        wait "$step" || true
    done
    local code=0
    wait "$step" || code=$?
    step=
    return "$code"
}

# Sends SIGUSR1 to the tasks repeatedly until they have ended, because a task that is still starting ignores the first one. The
# signal goes to the whole process group, because the deepspeed launcher does not forward it to its ranks.
pass_on_usr1() {
    asked=1
    if [[ -z "$step" ]]; then return; fi
    while sleep 1 && kill -USR1 -- "-$step" 2>/dev/null; do
        sleep 4
    done &
}

# again REASON: requeues this job under its own number.
again() {
    echo "$1: requeued" >&2
    scontrol requeue "$SLURM_JOB_ID"
}

# with_deepspeed ARGUMENTS...: starts the same ranks as `tasks` by the deepspeed launcher, which uses its own processes on one
# node, and srun on several nodes.
with_deepspeed() {
    local options=(--num_gpus "$REAR_TASKS_PER_NODE" --master_port "$MASTER_PORT") hosts
    if ((NODES > 1)); then
        hosts=$(scontrol show hostnames)
        sed "s/\$/ slots=$REAR_TASKS_PER_NODE/" <<<"$hosts" >"$REAR_LOGS/hostfile"
        # Without these options, the launcher would look up and test the first node over ssh.
        options=(--launcher slurm --hostfile "$REAR_LOGS/hostfile" --no_ssh_check --master_addr "${hosts%%$'\n'*}")
        # The launcher splits this string into words as a shell does.
        options+=(--launcher_args
            "--ntasks-per-node=$REAR_TASKS_PER_NODE --cpus-per-task=$CPUS_PER_TASK --wait=60 ${LOG[*]@Q} ${REAR_SRUN_OPTIONS:-}")
    fi
    # The launcher ignores SIGUSR1, which would otherwise end it.
    # shellcheck disable=SC2086
    setsid bash -c 'trap "" USR1; exec "$@"' launcher ${REAR_CONTAINER:-} \
        "$REAR_PYTHON" -m deepspeed.launcher.runner "${options[@]}" "$@" &
    wait_for $!
}
