#!/usr/bin/env bash
# task.sh COMMAND...: runs one task of srun on the cores, and therefore the memory, close to its GPU (number SLURM_LOCALID).
# It does not bind the task where these cores are not known, or where REAR_SRUN_OPTIONS has a --cpu-bind option.
#   REAR_PCI_DEVICES  folder in which the system lists PCI devices  default: /sys/bus/pci/devices

trap "" USR1 # ignored until Python installs its handler; it would end the task

bind_to_gpu() {
    [[ " ${REAR_SRUN_OPTIONS:-}" != *" --cpu-bind"* && -n "${SLURM_LOCALID:-}" ]] || return 0
    local gpus gpu cores
    mapfile -t gpus < <(nvidia-smi --query-gpu=pci.bus_id --format=csv,noheader 2>/dev/null)
    ((${#gpus[@]} > 0)) || return 0
    gpu=${gpus[SLURM_LOCALID % ${#gpus[@]}],,} # nvidia-smi prints 00000000:1b:00.0, and the system uses 0000:1b:00.0
    cores=$(cat "${REAR_PCI_DEVICES:-/sys/bus/pci/devices}/${gpu:4}/local_cpulist" 2>/dev/null) || return 0
    # Binds this shell, and thereby the command that replaces it. Memory is allocated close to the cores that first write to it.
    taskset --cpu-list --pid "$cores" $$ >/dev/null 2>&1 || echo "note: cores $cores of GPU $gpu are not this task's" >&2
}

bind_to_gpu
exec "$@"
