"""Train and compare variational autoencoders that differ in the encoder's noise.

Runs are trained with the command `vae train` and loaded in Python with `load_run`. The main members of a run are
`encode`, `decode`, `sample`, `splits` (the dataset) and `images` (a method that converts your own images).

>>> import torch
>>> from vae_cli import load_run
>>> run = load_run("runs/digits/sigma-fixed")         # trained with: vae train sigma=fixed
>>> x = run.splits.test.batch(torch.arange(8))        # images (8, 1, 8, 8) in [0, 1]
>>> posterior = run.encode(x)                         # q(z|x), a torch Distribution over codes (8, 16)
>>> likelihood = run.decode(posterior.sample())       # p(x|z), a torch Distribution over images (8, 1, 8, 8)
>>> likelihood.mean.shape
torch.Size([8, 1, 8, 8])
>>> run.sample(16).shape                              # from the prior
torch.Size([16, 1, 8, 8])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vae_cli.runs.run import Run, load_run

__all__ = ["Run", "load_run"]


def __getattr__(name: str) -> Any:
    # Imported at first use, because these names import torch, and `vae --help` must start without it.
    if name in __all__:
        from vae_cli.runs import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__  # so that help() lists only these names
