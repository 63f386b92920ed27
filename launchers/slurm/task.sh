#!/usr/bin/env bash
# task.sh COMMAND...: one task of srun, on the cores beside its GPU (number SLURM_LOCALID of its node), and with memory there.
# Nothing is bound where nvidia-smi or the system do not say which cores these are, or where REAR_SRUN_OPTIONS binds itself.
#   REAR_PCI_DEVICES  where the system lists PCI devices  default: /sys/bus/pci/devices

trap "" USR1 # before Python has its handler, it would end the task

bind_to_gpu() {
    [[ " ${REAR_SRUN_OPTIONS:-}" != *" --cpu-bind"* && -n "${SLURM_LOCALID:-}" ]] || return 0
    local gpus gpu cores
    mapfile -t gpus < <(nvidia-smi --query-gpu=pci.bus_id --format=csv,noheader 2>/dev/null)
    ((${#gpus[@]} > 0)) || return 0
    gpu=${gpus[SLURM_LOCALID % ${#gpus[@]}],,} # as 00000000:1b:00.0, where the system has 0000:1b:00.0
    cores=$(cat "${REAR_PCI_DEVICES:-/sys/bus/pci/devices}/${gpu:4}/local_cpulist" 2>/dev/null) || return 0
    # This shell, and with it what it becomes. Memory comes from the cores that first write to it.
    taskset --cpu-list --pid "$cores" $$ >/dev/null 2>&1 || echo "note: cores $cores of GPU $gpu are not this task's" >&2
}

bind_to_gpu
exec "$@"
