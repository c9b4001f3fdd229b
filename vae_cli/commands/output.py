"""Pictures and arrays that a command writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_cli.config import naming
from vae_cli.core.errors import Failure, UserError
from vae_cli.core.files import replace_file
from vae_cli.core.images import save_gif, save_png

if TYPE_CHECKING:
    from vae_cli.core.images import Picture
from vae_cli.runs.folder import refuse_link

LONGEST = 100  # letters of a file's name


def place(run: Path, kind: str, name: str, out: Path | None) -> Path:
    """The path, without an ending, under which a command writes: RUN/kind/name unless --out names a file or folder."""
    if out is None:
        refuse_link(run, kind)
        return run / kind / name
    return out.with_suffix("") if out.suffix.lower() in (".png", ".npz", ".gif") else out / name


def named(kind: str, **differences: object) -> str:
    """The name of what is written: its kind, and what was asked that is not the default (None, False), so that another
    question does not take the place of this one's answer."""
    words = [
        naming.clean(key if value is True else f"{key}-{value}")
        for key, value in differences.items()
        if value is not None and value is not False
    ]
    name = "_".join([kind, *words])
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}-{naming.digest(name)}"


def refuse_unused(asked: str, **given: object) -> None:
    """Raise UserError where options were given that mean nothing beside what was asked."""
    unused = [f"--{name}" for name, value in given.items() if value is not None]
    if unused:
        raise UserError(f"{' and '.join(unused)} would change nothing {asked}; leave it out.")


def write(stem: Path, picture: Picture, arrays: Mapping[str, Any], frames: list[Picture] | None = None) -> list[Path]:
    """Write a picture, its arrays and, where there are frames, a film beside it. Raises Failure."""
    import numpy as np

    png, npz, gif = (stem.parent / f"{stem.name}{ending}" for ending in (".png", ".npz", ".gif"))
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        save_png(png, picture)
        replace_file(npz, lambda file: np.savez_compressed(file, **arrays))
        if frames is not None:
            save_gif(gif, frames, 80)
    except OSError as error:
        raise Failure(f"{stem.parent} cannot be written to: {error.strerror}. Type --out FOLDER.") from error
    return [png, npz, *([gif] if frames is not None else [])]
