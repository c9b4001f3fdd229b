"""Checkpoints: tensors and plain values only, so that they load without running code."""

from __future__ import annotations

import errno
import pickletools
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from vae_cli.core.errors import Failure, UserError, first_line
from vae_cli.core.files import replace_file
from vae_cli.runs.folder import ANEW

CHECKPOINT_FORMAT = 1
# What a pickle of tensors and plain values names; others, as bytearray, can be asked for any amount of memory.
PLAIN = frozenset({"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "collections.OrderedDict"})


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Replace a checkpoint by a new one. Raises OSError, and leaves the old one as it was, where that cannot be."""
    whole = BytesIO()  # written in one piece: in torch.save a full disk ends in an error that does not name it
    torch.save({"format": CHECKPOINT_FORMAT, **state}, whole)
    replace_file(path, lambda file: file.write(whole.getbuffer()))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Load a checkpoint without running code. Raises UserError where there is none, Failure where it is damaged or was
    written by a newer version."""
    try:
        look_into(path)
        state = torch.load(path, map_location=device, weights_only=True)
    except IsADirectoryError as error:
        raise Failure(f"{path} is a folder.") from error
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent} has no {path.name}: its training has not come to a first checkpoint. "
            "Type the command that started it again, and it goes on."
        ) from error
    except UserError:
        raise
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
    if not _holds_model(state):
        raise Failure(f"{path} is damaged: it does not hold a model. {ANEW}")
    return state


def look_into(path: Path) -> None:
    """Raise Failure, before any memory is taken, for a file whose parts are not the tensors and plain values that a
    checkpoint consists of, or would be larger in memory than they are on the disk."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise Failure(f"{path} is damaged, or not a checkpoint of vae. {ANEW}")
        with zipfile.ZipFile(file) as parts:
            listed = parts.infolist()
            sizes = sum(part.file_size for part in listed)
            if sizes > path.stat().st_size or any(part.compress_type != zipfile.ZIP_STORED for part in listed):
                raise Failure(f"{path} would unpack to {sizes:,} bytes, which no checkpoint of vae does. {ANEW}")
            for part in listed:
                if part.filename.endswith(".pkl"):
                    _refuse_code(path, parts.read(part))


def _refuse_code(path: Path, pickled: bytes) -> None:
    for operation, argument, _ in pickletools.genops(pickled):
        named = str(argument).replace(" ", ".") if operation.name in ("GLOBAL", "INST") else ""
        is_ours = named in PLAIN or (named.startswith("torch.") and named.endswith("Storage"))
        if operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4") or (named and not is_ours):
            raise Failure(
                f"{path} is not loaded: it asks for {named or 'code'}, and a checkpoint of vae does not. {ANEW}"
            )


def _holds_model(state: Mapping[str, Any]) -> bool:
    shape, model = state.get("shape"), state.get("model")
    return (
        isinstance(state.get("step"), int)
        and isinstance(shape, list | tuple)
        and len(shape) == 3
        and all(isinstance(side, int) and 0 < side < 10**6 for side in shape)
        and isinstance(model, Mapping)
        and all(isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided for tensor in model.values())
        and isinstance(state.get("images"), str | None)
    )
