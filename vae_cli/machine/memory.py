"""The memory of a device, and an estimate of what training needs: a run that cannot fit is refused before it starts."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from vae_cli.core.errors import UserError

COPIES = 4  # of a parameter: itself, its gradient and the two moments of Adam
SAMPLE = 2  # images that memory is measured with; batch statistics need two


def refuse_oversize(needed: int, what: str, advice: str, available: int | None = None) -> None:
    """Raise UserError if `needed` bytes exceed the memory `available`: by default, the total memory of the machine."""
    available = memory_of(torch.device("cpu")) if available is None else available
    if available is not None and needed > available:
        raise UserError(
            f"{what} would need {_words(needed)} of memory, but only {_words(available)} is available: {advice}."
        )


def memory_of(device: torch.device) -> int | None:
    """Return the total memory of a device in bytes, or None if it cannot be determined."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    try:  # a container may be limited to less than the machine has
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


def free_memory(device: torch.device) -> int | None:
    """Return the memory in bytes that this process can still use on a GPU; elsewhere, the total memory of the device.

    On a GPU this is the memory that no process uses, plus what torch has reserved in this process but not allocated.
    Calling this function takes some GPU memory, so processes that only check a configuration use `memory_of`.
    """
    if device.type != "cuda":
        return memory_of(device)
    unused, _ = torch.cuda.mem_get_info(device)
    return unused + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def training_memory(model: nn.Module, shape: tuple[int, ...], images: int, samples: tuple[int, ...] = ()) -> int:
    """Return the memory, in bytes, that a training step on `images` images of this shape (C, H, W) needs, with draws of
    z of shape `samples` for each image.

    It covers the parameters with their gradients and Adam moments, and the tensors saved for the backward pass. These
    are measured with a few images and with twice as many, since some do not depend on the number of images, such as the
    encoded pseudo-inputs of prior=vamp, or the weights of layers with spectral normalization. If the model is on
    torch's `meta` device, this computes and stores nothing; otherwise the images pass through the model, which may
    update its running statistics.
    """
    few, twice = (_saved(model, shape, count, samples) for count in (SAMPLE, 2 * SAMPLE))
    return max(0, 2 * few - twice) + math.ceil((twice - few) * images / SAMPLE) + COPIES * size_of(model)


def _saved(model: nn.Module, shape: tuple[int, ...], images: int, samples: tuple[int, ...]) -> int:
    """Return the size, in bytes, of the tensors that are saved for the backward pass on this number of images."""
    parameters = list(model.parameters())
    # torch has one Python object for each storage as long as the object is referenced, so `id` tells storages apart.
    own = {id(storage): storage for storage in (parameter.untyped_storage() for parameter in parameters)}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with saved, torch.random.fork_rng(devices=[]), parameters[0].device:
        inference = model(torch.zeros(images, *shape), samples)
        _ = inference.distortion + inference.kl
    return sum(storage.nbytes() for storage in kept.values())


def size_of(model: nn.Module) -> int:
    """Return the size of a model's parameters, in bytes."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _words(count: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
