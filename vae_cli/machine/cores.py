"""What this machine has, and how runs that train side by side share it."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from vae_cli.core.files import locked

_held = ExitStack()  # the GPU that this process has taken, until it ends
_taken: dict[str, int] = {}


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> int:
    """The GPUs of this machine that torch can use: the resolver ${gpus:}."""
    import torch  # takes two seconds

    return torch.cuda.device_count()


def gpus_for_each(device: str = "auto") -> int:
    """How many GPUs a run takes, 1 or 0: the resolver ${gpus_for_each:device}."""
    return 1 if device.startswith("cuda") or (device == "auto" and gpus()) else 0


def jobs_at_once(device: str = "auto") -> int:
    """How many runs train at a time, one a GPU, or one a core where they use none: the resolver ${jobs_at_once:device}.

    Several processes of one thread are faster than one of several: they never wait for each other.
    """
    if not gpus_for_each(device):
        return cores()
    return max(1, gpus()) if device in ("auto", "cuda") else 1  # all of them on cuda:1


def free_gpu(count: int) -> int:
    """The number of the GPU on which this process is to train, of so many that it sees: the one with the fewest runs of
    this user's, which hold a lock for as long as they live."""
    visible = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    names = visible if len(visible) == count else [str(number) for number in range(count)]
    key = ",".join(names)
    if key not in _taken:
        folder = Path(tempfile.gettempdir()) / f"vae-gpus-{os.getuid() if hasattr(os, 'getuid') else 0}"
        folder.mkdir(mode=0o700, exist_ok=True)
        places = ((row, number) for row in range(64) for number in range(count))
        _taken[key] = next((number for row, number in places if _hold(folder / f"{names[number]}-{row}")), 0)
    return _taken[key]


def _hold(file: Path) -> bool:
    lock = ExitStack()
    if lock.enter_context(locked(file, wait=False)):
        _held.push(lock)
        return True
    lock.close()
    return False
