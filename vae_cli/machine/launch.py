"""The rank of this process and the number of processes, as `torchrun` sets them in the environment.

They are read without importing torch.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from vae_cli.core.errors import UserError

NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """The rank of this process among all `count` processes, and among the `local_count` on its machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


def launched() -> Launch:
    """Return the launch that the environment describes. Raises UserError if it is incomplete or contradicts itself."""
    count = _number("WORLD_SIZE", 1)
    if count <= 1:
        return Launch()
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE={count} means {count} processes, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: start the processes with torchrun, which sets all of "
            "these, or unset WORLD_SIZE."
        )
    found = Launch(_number("RANK"), count, _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE", count))
    if not (found.rank < count and found.local_rank < found.local_count <= count):
        raise UserError(
            f"RANK={found.rank}, LOCAL_RANK={found.local_rank}, LOCAL_WORLD_SIZE={found.local_count} and "
            f"WORLD_SIZE={count} contradict each other: ranks are counted from 0."
        )
    return found


def is_first() -> bool:
    """Return whether this is rank 0, the process that prints; never raises, whatever the environment contains."""
    try:
        return launched().rank == 0
    except UserError:
        return os.environ.get("RANK", "0") == "0"


def this_process() -> str:
    """Return the name of this process in messages."""
    return f"process {launched().rank} on {socket.gethostname()}"


def refuse_several(command: str) -> None:
    """Raise UserError if several processes were started, because each would run the same command."""
    count = launched().count
    if count > 1:
        raise UserError(
            f"'{command}' would run {count} times, once in each process (WORLD_SIZE={count} in the environment): run "
            "it without torchrun."
        )


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name) or ("" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(f"{name}={text} in the environment is not a whole number; unset it, or start with torchrun.")
    return int(text)
