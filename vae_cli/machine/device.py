"""The device that a run computes on, its precision, and the number of threads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from vae_cli.core.errors import UserError
from vae_cli.machine import distributed
from vae_cli.machine.cores import cores, free_gpu
from vae_cli.machine.launch import launched

THREADS = torch.get_num_threads()  # read at import, before a run of a sweep sets its own number
ONE_THREAD = 40_000_000  # multiplications in a forward pass of a batch, below which one thread is best


def find_device(name: str) -> torch.device:
    """Return the device of this name; `auto` is a GPU if there is one.

    If several processes train the run, each gets its own device. Raises UserError if this machine lacks the device.
    """
    if distributed.count() > 1:
        return _find_own_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name} is not a device; type device=auto, cpu, cuda, cuda:1 or mps.") from error
    exists = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": _has_mps()}.get(device.type, False)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not exists or (device.index or 0) >= count:
        raise UserError(f"device={name} is not available on this machine; type device=auto or device=cpu.")
    return device


def take_device(name: str) -> torch.device:
    """Return the device for this process to compute on; of several GPUs, `auto` and `cuda` take the least busy one.

    The GPU is marked as used by this process until the process ends (see `free_gpu`). Raises UserError.
    """
    device = find_device(name)
    if name in ("auto", "cuda") and device.type == "cuda" and distributed.count() == 1:
        return torch.device("cuda", free_gpu(torch.cuda.device_count()))
    return device


def _find_own_device(name: str) -> torch.device:
    """Return the device of this process, which trains a run together with other processes. Raises UserError."""
    gpus, launch = torch.cuda.device_count(), launched()
    if name == "cpu" or (name == "auto" and gpus == 0):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise UserError(
            f"device={name} is one device, but each of the {launch.count} processes needs its own: type device=auto, "
            "cuda or cpu."
        )
    if gpus == 0:
        raise UserError(f"device={name} is not available on this machine; type device=auto or device=cpu.")
    if launch.local_count > gpus:
        raise UserError(
            f"There are {launch.local_count} processes on this machine but {gpus} GPU{'s' * (gpus > 1)}: type "
            f"--nproc-per-node {gpus}, or device=cpu."
        )
    return torch.device("cuda", launch.local_rank)


def check_precision(precision: str, device: torch.device) -> None:
    """Raise UserError if the device does not support a precision."""
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"precision=tf32 needs a CUDA GPU, but the device is {device.type}; type precision=float32.")


def computing_in(precision: str, device: str) -> AbstractContextManager[object]:
    """Return a context manager in which networks compute in this precision; `device` is `cpu`, `cuda` or `mps`.

    On CUDA, torch by default rounds the inputs of float32 convolutions to TF32; precision `float32` turns this off.
    The backward pass runs outside the context, so training also calls `allow_tf32`.
    """
    if precision == "bfloat16":
        return torch.autocast(device, torch.bfloat16)
    return tf32_allowed(precision == "tf32") if device == "cuda" else nullcontext()


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid CUDA to round the inputs of float32 matmuls and convolutions to TF32, in the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 inside the block, and restore the process's setting afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def make_deterministic(device: torch.device) -> None:
    """Restrict cuDNN to deterministic convolution algorithms, so that a resumed run gives bit-identical results.

    Of the torch operations that the networks use, only convolutions may otherwise sum in a varying order. This sets
    torch's state for the whole process; it does nothing unless the device is a CUDA GPU.
    """
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def find_threads(config: Mapping[str, Any], model: nn.Module) -> int:
    """Return how many threads should share an operation on the CPU.

    In a small fully connected network, a second thread saves at most a tenth of a step, and costs far more whenever
    another program occupies its core, because the first thread then waits.
    """
    if config["threads"] != "auto":
        return int(config["threads"])
    is_dense = all(weight.dim() <= 2 for weight in model.parameters())
    products = config["batch_size"] // distributed.count() * sum(weight.numel() for weight in model.parameters())
    if is_dense and products < ONE_THREAD:
        return 1
    if distributed.count() == 1:
        return THREADS
    return max(1, cores() // launched().local_count)  # not THREADS, because torchrun sets OMP_NUM_THREADS=1


def _has_mps() -> bool:
    return torch.backends.mps.is_available()
