"""Helpers for the commands that write pictures and arrays: output names and paths, and lists of test images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_cli.core.errors import Failure, UserError, visible

if TYPE_CHECKING:
    from vae_cli.runs.pictures import Rendered

LONGEST = 100  # characters in the name of a file


def place(run: Path, kind: str, name: str, out: Path | None) -> Path:
    """Return the path, without a suffix, of the files to write: RUN/kind/name, unless --out gives a file or a folder.

    Raises UserError if RUN/kind is a symbolic link to a folder outside the run's folder.
    """
    from vae_cli.runs.folder import refuse_link

    if out is None:
        refuse_link(run, kind)
        return run / kind / name
    return out.with_suffix("") if out.suffix.lower() in (".png", ".npz", ".gif") else out / name


def named(kind: str, **differences: object) -> str:
    """Return a name for an output, made of its kind and the options that differ from their defaults (None or False
    means the default), so that outputs with different options do not overwrite each other.

    >>> named("prior", count=9, draw=True, seed=None)
    'prior_count-9_draw'
    """
    from vae_cli.config import naming

    words = [
        naming.clean(key if value is True else f"{key}-{value}")
        for key, value in differences.items()
        if value is not None and value is not False
    ]
    name = "_".join([kind, *words])
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}-{naming.digest(name)}"


def refuse_unused(situation: str, **options: object) -> None:
    """Raise UserError if options are given (not None) that have no effect in this situation."""
    unused = [f"--{name}" for name, value in options.items() if value is not None]
    if unused:
        plural = len(unused) > 1
        raise UserError(
            f"{' and '.join(unused)} {'have' if plural else 'has'} no effect {situation}; "
            f"leave {'them' if plural else 'it'} out."
        )


def parse_indices(text: str, count: int, flag: str, exactly: int | None = None) -> list[int]:
    """Parse a list of test image numbers such as 0,5-7.

    Raises UserError if one is malformed or not below `count`, or if `exactly` is given and differs from their number.

    >>> parse_indices("0,5-7", count=10, flag="--images")
    [0, 5, 6, 7]
    """
    found: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", word)
        if match is None:
            raise UserError(f"{flag} {text} is not a list of test image numbers; type numbers such as 0,5,9 or 0-7.")
        first, last = int(match[1]), int(match[2] or match[1])
        if max(first, last) >= count:
            raise UserError(f"{flag} {text}: there are {count} test images, numbered 0 to {count - 1}.")
        found += range(first, last + 1) if first <= last else range(first, last - 1, -1)
    if exactly is not None and len(found) != exactly:
        raise UserError(f"{flag} {text}: give exactly {exactly} test image numbers, separated by commas.")
    return found


def write(stem: Path, rendered: Rendered) -> None:
    """Write a picture (.png), its arrays (.npz) and, if it has frames, an animation (.gif); print captions and paths.

    Raises Failure if the folder cannot be written to.
    """
    import numpy as np

    from vae_cli.core.files import replace_file
    from vae_cli.core.images import save_gif, save_png

    arrays: dict[str, Any] = {name: array.cpu().numpy() for name, array in rendered.arrays.items()}
    png, npz, gif = (stem.parent / f"{stem.name}{suffix}" for suffix in (".png", ".npz", ".gif"))
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        save_png(png, rendered.picture)
        replace_file(npz, lambda file: np.savez_compressed(file, **arrays))
        if rendered.frames is not None:
            save_gif(gif, rendered.frames, 80)
    except OSError as error:
        raise Failure(
            f"{stem.parent} cannot be written to: {error.strerror}. Choose a different folder with --out FOLDER."
        ) from error
    for caption in rendered.captions:
        print(caption)
    for path in (png, npz, *([gif] if rendered.frames is not None else [])):
        print(visible(str(path)))
