"""Run commands in processes that are forked from this one, which has imported everything, and let them meet a fault.

Reads one JSON object a line: argv, cwd, out and err (files), and fault (see Fault) or null. Writes the process id of
the command in one line, and its exit code, or minus the signal that ended it, in the next.
"""

from __future__ import annotations

import builtins
import importlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


class Fault:
    """What happens at the n-th call of a function that has to do with a file: an error, or the end of the process.

    `at` is write, fsync, replace or mkstemp, `file` a part of the file's path, and `number` counts from 1. `error` is
    an errno, and 0 is SIGKILL. It comes before the call, after it (`after`), or, in a write, when half is written; with
    `stays` it comes at every call from then on. With `at` size no file can grow beyond `number` bytes.
    """

    def __init__(
        self, at: str, file: str = "", number: int = 1, error: int = 0, after: bool = False, stays: bool = False
    ) -> None:
        self.at, self.file, self.number, self.error, self.after, self.stays = at, file, number, error, after, stays
        self.met = 0

    def comes(self, name: object) -> bool:
        if self.file not in os.fsdecode(name):  # type: ignore[arg-type]
            return False
        self.met += 1
        return self.met == self.number or (self.stays and self.met > self.number)

    def strike(self) -> None:
        if not self.error:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self.error, os.strerror(self.error))

    def install(self) -> None:
        if self.at == "size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.number, resource.RLIM_INFINITY))
            return
        if self.at == "write":
            for module, name in ((builtins, "open"), (io, "open"), (os, "fdopen")):
                setattr(module, name, self._opening(getattr(module, name)))
            return
        module, name_of = {
            "fsync": (os, lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}")),
            "replace": (os, lambda source, target: target),
            "mkstemp": (tempfile, lambda **named: f"{named['dir']}/{named['prefix']}"),
        }[self.at]
        setattr(module, self.at, self._calling(getattr(module, self.at), name_of))

    def _calling(self, function: Callable[..., Any], name_of: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            comes = self.comes(name_of(*given, **named))
            if comes and not self.after:
                self.strike()
            result = function(*given, **named)
            if comes:
                self.strike()
            return result

        return call

    def _opening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
            opened = function(file, mode, *given, **named)
            if not set(mode) & set("wax+"):
                return opened
            name = os.readlink(f"/proc/self/fd/{opened.fileno()}")
            return Struck(opened, self) if self.file in name else opened

        return call


class Struck:
    """An open file whose writes meet a fault when half is written."""

    def __init__(self, file: Any, fault: Fault) -> None:
        self._file, self._fault = file, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Struck:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def write(self, content: Any) -> Any:
        if not self._fault.comes("" if not self._fault.file else self._fault.file):
            return self._file.write(content)
        self._file.write(content[: len(content) // 2])
        self._file.flush()
        return self._fault.strike()


def carry_out(asked: dict[str, Any], then: Callable[[], object] = lambda: None) -> None:
    """Be the command, in a process of its own."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(asked["cwd"])
    sys.argv = ["vae", *asked["argv"]]
    from vae_cli.cli import main
    from vae_cli.dataset import pack

    pack.IMAGES_A_STEP = 16  # more writes to be killed in
    if asked["fault"] is not None:
        Fault(**asked["fault"]).install()
    code: object = 1
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        then()
        os._exit(code if isinstance(code, int) else 1)


def import_everything() -> None:
    """Import what a run imports, once for all commands. A first run tells what that is."""
    with tempfile.TemporaryDirectory() as folder:
        said = {name: f"{folder}/{name}" for name in ("out", "err")}
        words = ["train", "epochs=1", "network.hidden=[4]"]
        process = os.fork()
        if not process:
            modules = Path(folder, "modules")
            carry_out(
                {"argv": words, "cwd": folder, "fault": None, **said},
                lambda: modules.write_text("\n".join(sys.modules)),
            )
        _, status = os.waitpid(process, 0)
        assert status == 0, Path(said["err"]).read_text()
        for name in Path(folder, "modules").read_text().splitlines():
            with suppress(Exception):
                importlib.import_module(name)


def main() -> None:
    import_everything()
    print("ready", flush=True)
    while line := sys.stdin.readline():
        process = os.fork()
        if not process:
            carry_out(json.loads(line))
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
