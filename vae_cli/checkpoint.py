"""Checkpoints: tensors and plain values only, so that they load without running code."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from vae_cli.errors import Failure, UserError, first_line
from vae_cli.files import replace_file
from vae_cli.folder import ANEW

CHECKPOINT_FORMAT = 1


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Replace a checkpoint by a new one. Raises OSError, and leaves the old one as it was, where that cannot be."""
    whole = BytesIO()  # written in one piece: in torch.save a full disk ends in an error that does not name it
    torch.save({"format": CHECKPOINT_FORMAT, **state}, whole)
    replace_file(path, lambda file: file.write(whole.getbuffer()))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Load a checkpoint without running code. Raises UserError where there is none, Failure where it is damaged or was
    written by a newer version."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except IsADirectoryError as error:
        raise Failure(f"{path} is a folder.") from error
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent} has no {path.name}: its training has not come to a first checkpoint. "
            "Type the command that started it again, and it goes on."
        ) from error
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # a disk or a network that fails does not damage the file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise Failure(f"{path} is damaged and cannot be loaded: {first_line(error)}. {ANEW}") from error
    except Exception as error:  # bytes at random can make the unpickler raise anything
        raise Failure(f"{path} is damaged and cannot be loaded: {first_line(error)}. {ANEW}") from error
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise Failure(f"{path} is damaged, or not a checkpoint of vae. {ANEW}")
    if state["format"] > CHECKPOINT_FORMAT:
        raise Failure(
            f"{path} has format {state['format']}, and this version of vae knows formats up to {CHECKPOINT_FORMAT}; "
            "install a newer vae."
        )
    if not {"step", "shape", "model"} <= state.keys():
        raise Failure(f"{path} is damaged: it does not hold a model. {ANEW}")
    return state
