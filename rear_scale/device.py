"""The device that this process computes on, and the settings that have to be made before CUDA starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

import torch

from rear_scale.config import InputError, first_line

# Values of CUDA_VISIBLE_DEVICES that hide every GPU; SLURM has set the last one in jobs without GPUs.
_NO_GPU = ("", "-1", "NoDevFiles")
_USER_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_RECORDER_SETTINGS = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_WAY_OUT = "Repair that, or set CUDA_VISIBLE_DEVICES= (to nothing) to compute on the CPU"


def prepare(env: MutableMapping[str, str] = os.environ) -> None:
    """Sets how torch uses CUDA in this process. Must be called before the first use of CUDA; `cli.run` does so.

    Variables that the user has set keep their values.
    """
    # Evaluation, sampling and checkpoints between steps allocate blocks of changing sizes; fixed segments would fragment.
    if not any(name in env for name in _USER_SETTINGS):
        env["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # Size of torch's flight recorder: the last collectives of this rank, which the watchdog writes out when a rank hangs.
    if not any(name in env for name in _RECORDER_SETTINGS):
        env["TORCH_FR_BUFFER_SIZE"] = "2000"
    # On compute capability 9.0 torch prefers cuDNN's attention. That builds a plan for every new key length (decoding has 256 of
    # them; 0.44 s each were reported on a B200), and rounds dropout probabilities to sixteenths: 0.0625 or 0.125 instead of 0.1.
    torch.backends.cuda.enable_cudnn_sdp(False)


def uses_cuda(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process computes on a GPU.

    Raises InputError where the machine has GPUs that torch cannot use, unless the CPU is asked for (CUDA_VISIBLE_DEVICES
    hides the GPUs, or DS_ACCELERATOR=cpu). Falling back to the CPU would make all other ranks wait for this one, or turn
    hours of training into weeks.
    """
    if _cpu_is_asked_for(env):
        return False
    if torch.cuda.is_available():
        return True
    count = gpus_of_the_machine()
    if count:
        raise InputError(
            f"the NVIDIA driver shows {count} GPUs, but torch cannot use them: {_why_not(env)}. {_WAY_OUT}"
        )
    return False


def use_gpu(index: int) -> torch.device:
    """The device of GPU `index`, made the current one of this process. Raises InputError when it cannot compute."""
    try:
        torch.cuda.set_device(index)
    except RuntimeError as error:
        raise _unusable(index, error) from error
    return check_gpu(index)


def check_gpu(index: int) -> torch.device:
    """GPU `index`, without making it the current one. Raises InputError when it does not compute."""
    try:
        torch.ones(1, device=torch.device("cuda", index)).item()
    except (RuntimeError, AssertionError) as error:
        raise _unusable(index, error) from error
    return torch.device("cuda", index)


def _unusable(index: int, error: Exception) -> InputError:
    return InputError(f"GPU {index} cannot be used: {first_line(error)}. {_WAY_OUT}")


def describe(device: torch.device, env: Mapping[str, str] = os.environ) -> str:
    """A description of the device for messages: its name and memory, or why it is the CPU."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
    return (
        "CPU (asked for by CUDA_VISIBLE_DEVICES or DS_ACCELERATOR)" if _cpu_is_asked_for(env) else "CPU (no GPU found)"
    )


def gpus_of_the_machine() -> int:
    """The number of GPUs that the NVIDIA driver lists or has made device files for, whichever is larger.

    A container may see the driver's list without the device files, or the files without the driver's list.
    """
    return max(len(list(Path(folder).glob(names))) for folder, names in _TRACES)


_TRACES = (("/proc/driver/nvidia/gpus", "*"), ("/dev", "nvidia[0-9]*"))


def _cpu_is_asked_for(env: Mapping[str, str]) -> bool:
    # The deepspeed launcher overwrites CUDA_VISIBLE_DEVICES, but leaves DS_ACCELERATOR as the user has set it.
    return env.get("DS_ACCELERATOR") == "cpu" or env.get("CUDA_VISIBLE_DEVICES", "0").strip() in _NO_GPU


def _why_not(env: Mapping[str, str]) -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return f"none is visible with CUDA_VISIBLE_DEVICES={env.get('CUDA_VISIBLE_DEVICES', '')}"
