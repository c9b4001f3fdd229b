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

    It covers the parameters with their gradients and Adam moments, and the activations saved for the backward pass,
    measured on a few images. What the prior saves while it makes p(z), such as the encoded pseudo-inputs of prior=vamp,
    does not depend on the number of images. If the model is on torch's `meta` device, this computes and stores nothing;
    otherwise the images pass through the model, which may update its running statistics.
    """
    parameters = list(model.parameters())
    # torch has one Python object for each storage as long as the object is referenced, so `id` tells storages apart.
    own = {id(storage): storage for storage in (parameter.untyped_storage() for parameter in parameters)}
    of_images: dict[int, torch.UntypedStorage] = {}
    of_prior: dict[int, torch.UntypedStorage] = {}
    kept = of_images

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own and id(storage) not in of_prior:
            kept[id(storage)] = storage
        return tensor

    def switch(to: dict[int, torch.UntypedStorage]) -> None:
        nonlocal kept
        kept = to

    prior: nn.Module = model.get_submodule("prior")
    hooks = [
        prior.register_forward_pre_hook(lambda *_: switch(of_prior)),
        prior.register_forward_hook(lambda *_: switch(of_images), always_call=True),
    ]
    saved = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    try:
        with saved, torch.random.fork_rng(devices=[]), parameters[0].device:
            inference = model(torch.zeros(SAMPLE, *shape), samples)
            _ = inference.distortion + inference.kl
    finally:
        for hook in hooks:
            hook.remove()
    by_images, by_prior = (sum(storage.nbytes() for storage in part.values()) for part in (of_images, of_prior))
    return math.ceil(by_images * images / SAMPLE) + by_prior + COPIES * size_of(model)


def size_of(model: nn.Module) -> int:
    """Return the size of a model's parameters, in bytes."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _words(count: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
