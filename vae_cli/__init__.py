"""An experiment runner for variational auto-encoders whose subject is the encoder's noise.

>>> from vae_cli import load_run
>>> run = load_run("runs/digits/sigma-fixed")
>>> images = run.sample(16)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vae_cli.runs.run import Run, load_run

__all__ = ["Run", "load_run"]


def __getattr__(name: str) -> Any:
    # What stands behind these names imports torch, and `vae --help` has no use for it.
    if name in __all__:
        from vae_cli.runs import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
