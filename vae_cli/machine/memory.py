"""How much memory there is, and a refusal of what cannot fit into it before any of it is taken."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from vae_cli.core.errors import UserError

COPIES = 4  # of a parameter: itself, its gradient and the two moments of Adam
FEW = 2  # images that are as good as many; of one alone no statistics can be taken


def refuse_oversize(needed: int, what: str, advice: str, device: torch.device | str = "cpu") -> None:
    """Raise UserError where so many bytes are more than the device has in all."""
    there = memory_of(torch.device(device))
    if there is not None and needed > there:
        raise UserError(f"{what} would take {_words(needed)} of memory, and there are {_words(there)}: {advice}.")


def memory_of(device: torch.device) -> int | None:
    """The bytes that a device has in all; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    try:  # a container may be given less than the machine has
        return min(there, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return there


def training_memory(model: nn.Module, shape: tuple[int, ...], images: int) -> int:
    """The bytes that a step of training takes on so many images of a shape: parameters with their gradients and
    moments, and what is kept for the way back, which is found from a few images.

    On torch's `meta` device nothing is computed or stored for that. Elsewhere the images pass through the model, which
    may keep statistics of them.
    """
    parameters = list(model.parameters())
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # or another would take its address
        return tensor

    alive: list[Tensor] = []
    saved = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with saved, torch.random.fork_rng(devices=[]), parameters[0].device:
        inference = model(torch.zeros(FEW, *shape))
        _ = inference.distortion + inference.kl
    return math.ceil(sum(kept.values()) * images / FEW) + COPIES * size_of(model)


def size_of(model: nn.Module) -> int:
    """The bytes of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _words(count: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
