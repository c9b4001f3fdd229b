"""The cores and GPUs of this machine, and how runs that train side by side share them."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from vae_cli.core.files import locked

# Torch's kernels alone take half a gigabyte per process. The rest is for images, model and activations.
GPU_MEMORY_PER_RUN = 4 << 30

held_locks = ExitStack()  # the locks of the GPUs that this process has taken, held until it ends
taken_gpus: dict[str, int] = {}


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> int:
    """Return the number of GPUs that torch can use; in configurations, this is the resolver ${gpus:}."""
    import torch  # here, because it takes two seconds

    return torch.cuda.device_count()


def gpu_memories() -> list[int]:
    """Return the total memory of each GPU in bytes; nothing is allocated on them."""
    import torch  # here, because it takes two seconds

    return [torch.cuda.get_device_properties(number).total_memory for number in range(gpus())]


def gpus_for_each(device: str = "auto") -> int:
    """Return how many GPUs a run uses, 1 or 0; in configurations, this is the resolver ${gpus_for_each:device}."""
    return 1 if device.startswith("cuda") or (device == "auto" and gpus()) else 0


def jobs_at_once(device: str = "auto") -> int:
    """Return how many runs train at a time; in configurations, this is the resolver ${jobs_at_once:device}.

    Without a GPU, one run per core: several processes with one thread each are faster than one process with several
    threads, because they never wait for each other. With GPUs, also one run per core, because a small network leaves
    most of a GPU idle; but no more runs than fit in GPU memory (GPU_MEMORY_PER_RUN each), and at least one per GPU.
    """
    if not gpus_for_each(device):
        return cores()
    memories = gpu_memories()
    number = device.partition(":")[2]
    used = memories[int(number) : int(number) + 1] if number.isdecimal() else memories  # cuda:1 is one GPU for all runs
    return sum(max(1, min(cores() // len(used), memory // GPU_MEMORY_PER_RUN)) for memory in used)


def free_gpu(count: int) -> int:
    """Return the index of the GPU with the fewest runs of this user, among the `count` GPUs that this process sees.

    To be counted, each run locks a file for its GPU until its process ends.
    """
    visible = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    names = visible if len(visible) == count else [str(number) for number in range(count)]
    key = ",".join(names)
    if key not in taken_gpus:
        folder = Path(tempfile.gettempdir()) / f"vae-gpus-{os.getuid() if hasattr(os, 'getuid') else 0}"
        folder.mkdir(mode=0o700, exist_ok=True)
        places = ((row, number) for row in range(64) for number in range(count))
        taken_gpus[key] = next((number for row, number in places if _hold(folder / f"{names[number]}-{row}")), 0)
    return taken_gpus[key]


def _hold(file: Path) -> bool:
    """Lock a file until this process ends; return False if another process has locked it."""
    lock = ExitStack()
    if lock.enter_context(locked(file, wait=False)):
        held_locks.push(lock)
        return True
    lock.close()
    return False
