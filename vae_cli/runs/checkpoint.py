"""Save and load checkpoints, which contain only tensors and plain values, so that loading one cannot run code."""

from __future__ import annotations

import errno
import os
import pickletools
import zipfile
from collections.abc import Mapping
from copy import copy as shallow_copy
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch

from vae_cli.core.errors import Failure, UserError, first_line
from vae_cli.core.files import open_regular, replace_file
from vae_cli.runs.folder import RETRAIN

CHECKPOINT_FORMAT = 1
ZIP = b"PK\x03\x04"  # the first bytes of an archive
LONGEST = 2**53  # training steps; TensorBoard and JSON cannot store larger numbers exactly
# The functions and classes that pickled tensors and plain values refer to, apart from torch's storages. No others are
# allowed, not even harmless ones: bytearray, for example, could allocate any amount of memory.
PLAIN = frozenset({"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "collections.OrderedDict"})


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint, replacing the old one. Raises OSError if writing fails; the old one then stays intact."""
    whole = BytesIO()  # serialized in memory first: torch.save does not report a full disk
    torch.save({"format": CHECKPOINT_FORMAT, **on_cpu(dict(state))}, whole)
    replace_file(path, lambda file: file.write(whole.getbuffer()))


def on_cpu(state: Any) -> Any:
    """Copy all GPU tensors in nested dicts, lists and tuples to the CPU, waiting for each GPU only once.

    torch.save would copy the tensors one by one and wait after each.
    """
    gpus: set[torch.device] = set()

    def copy(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_cuda:
            gpus.add(value.device)
            return value.detach().to("cpu", non_blocking=True)  # into page-locked memory
        if isinstance(value, dict):
            copied = shallow_copy(value)  # keeps the attribute in which torch notes the versions of modules
            copied.update((key, copy(item)) for key, item in value.items())
            return copied
        return type(value)(map(copy, value)) if isinstance(value, list | tuple) else value

    on_its_way = copy(state)
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
    return on_its_way


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Load a checkpoint without running any code from it.

    Raises UserError if it is missing, Failure if it is damaged or was written by a newer version of vae.
    """
    if path.is_dir():
        raise Failure(f"{path} is a folder, not a checkpoint. Remove it and repeat the run's vae train command.")
    try:
        with open_regular(path) as file:
            check_parts(path, file)
            file.seek(0)
            state = torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent} has no {path.name}: training stopped before the first checkpoint was saved. "
            "To train the run, repeat its vae train command."
        ) from error
    except UserError:
        raise
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # the disk or the network failed; the file may be fine
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise Failure(f"{path} is damaged and cannot be loaded: {first_line(error)}. {RETRAIN}") from error
    except UnpicklingError as error:  # torch's message advises to allow code
        raise Failure(f"{path} is damaged: it contains more than tensors and plain values. {RETRAIN}") from error
    except Exception as error:  # the unpickler can raise anything for random bytes
        raise Failure(f"{path} is damaged and cannot be loaded: {first_line(error)}. {RETRAIN}") from error
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise Failure(f"{path} is damaged or not a checkpoint of vae. {RETRAIN}")
    if state["format"] > CHECKPOINT_FORMAT:
        raise Failure(
            f"{path} has checkpoint format {state['format']}; this version of vae can read formats up to "
            f"{CHECKPOINT_FORMAT}. Install a newer version of vae."
        )
    if not _holds_model(state):
        raise Failure(f"{path} is damaged: it does not contain a model. {RETRAIN}")
    return state


def check_parts(path: Path, file: IO[bytes]) -> None:
    """Raise Failure if a checkpoint contains anything other than tensors and plain values, is compressed, or would need
    more memory than its size on disk. Sizes are checked before anything is unpacked."""
    # torch looks at the first bytes and zipfile at the last, and torch reads an older format without any check of ours.
    if file.read(len(ZIP)) != ZIP or not zipfile.is_zipfile(file):
        raise Failure(f"{path} is damaged or not a checkpoint of vae. {RETRAIN}")
    with zipfile.ZipFile(file) as parts:
        listed = parts.infolist()
        names = [part.filename.lower() for part in listed]  # torch finds parts regardless of case
        if len({*names}) < len(names):
            raise Failure(f"{path} is damaged: it has two parts of the same name. {RETRAIN}")
        sizes = sum(part.file_size for part in listed)
        if sizes > os.fstat(file.fileno()).st_size or any(part.compress_type != zipfile.ZIP_STORED for part in listed):
            raise Failure(
                f"{path} was not loaded: it would unpack to {sizes:,} bytes, but vae checkpoints are not "
                f"compressed. {RETRAIN}"
            )
        for part, name in zip(listed, names, strict=True):
            if name.endswith(".pkl"):
                _refuse_code(path, parts.read(part))


def _refuse_code(path: Path, pickled: bytes) -> None:
    for operation, argument, _ in pickletools.genops(pickled):
        named = str(argument).replace(" ", ".") if operation.name in ("GLOBAL", "INST") else ""
        is_ours = named in PLAIN or (named.startswith("torch.") and named.endswith("Storage"))
        if operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4") or (named and not is_ours):
            raise Failure(
                f"{path} was not loaded: it would run {named or 'code'}, but vae checkpoints contain no code. {RETRAIN}"
            )


def _holds_model(state: Mapping[str, Any]) -> bool:
    shape, model = state.get("shape"), state.get("model")
    return (
        isinstance(state.get("step"), int)
        and 0 <= state["step"] < LONGEST
        and isinstance(shape, list | tuple)
        and len(shape) == 3
        and all(isinstance(side, int) and 0 < side < 10**6 for side in shape)
        and isinstance(model, Mapping)
        and all(isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided for tensor in model.values())
        and isinstance(state.get("images"), str | None)
    )
