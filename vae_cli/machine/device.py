"""What a run computes on: the device, its precision, and how many threads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vae_cli.core.errors import UserError
from vae_cli.machine import distributed
from vae_cli.machine.cores import cores
from vae_cli.machine.launch import launched

THREADS = torch.get_num_threads()  # before any run of a sweep has asked for its own number
ONE_THREAD = 40_000_000  # multiplications in a forward pass of a batch, below which one thread is best


def find_device(name: str) -> torch.device:
    """The device of this name; `auto` takes a GPU where there is one, and of several processes each takes its own.

    Raises UserError where it is not there.
    """
    if distributed.count() > 1:
        return _find_own_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name} is not a device; type device=auto, cpu, cuda, cuda:1 or mps.") from error
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": _has_mps()}.get(device.type, False)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not there or (device.index or 0) >= count:
        raise UserError(f"device={name} is not on this machine; type device=auto or device=cpu.")
    return device


def _find_own_device(name: str) -> torch.device:
    """The device of this process, one of several."""
    there, launch = torch.cuda.device_count(), launched()
    if name == "cpu" or (name == "auto" and there == 0):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise UserError(
            f"device={name} is one device, and there are {launch.count} processes, each of which takes one of its own: "
            "type device=auto, cuda or cpu."
        )
    if there == 0:
        raise UserError(f"device={name} is not on this machine; type device=auto or device=cpu.")
    if launch.local_count > there:
        raise UserError(
            f"There are {launch.local_count} processes on this machine and {there} GPU{'s' * (there > 1)}: type "
            f"--nproc-per-node {there}, or device=cpu."
        )
    return torch.device("cuda", launch.local_rank)


def check_precision(precision: str, device: torch.device) -> None:
    """Raise UserError for a precision that the device does not have."""
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"precision=tf32 is for CUDA GPUs, and this is {device.type}; type precision=float32.")


def find_threads(config: Mapping[str, Any], model: nn.Module) -> int:
    """How many threads share an operation on the CPU.

    A step of a small fully connected network is so short that a second thread gains a tenth, and loses all of it and
    much more whenever another program takes its core and the first one waits.
    """
    if config["threads"] != "auto":
        return int(config["threads"])
    is_dense = all(weight.dim() <= 2 for weight in model.parameters())
    products = config["batch_size"] // distributed.count() * sum(weight.numel() for weight in model.parameters())
    if is_dense and products < ONE_THREAD:
        return 1
    if distributed.count() == 1:
        return THREADS
    return max(1, cores() // launched().local_count)  # torchrun has left one to each process


def _has_mps() -> bool:
    return torch.backends.mps.is_available()
