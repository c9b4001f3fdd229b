"""A fork server: it imports everything once, then runs vae commands in forked processes and injects faults into them.

It reads one JSON object per line and answers each with one line of JSON:

- {"argv", "cwd", "out", "err", "environment", "group", "before", "fault"} starts a command and returns its process id.
  out and err are files, group says whether the command leads its own process group, before is Python code that runs
  first, and fault holds the arguments of Fault, or is null.
- {"poll": process id} returns the exit code of a command, or minus the signal that ended it, or null while it runs.
"""

from __future__ import annotations

import atexit
import builtins
import gc
import importlib
import io
import json
import os
import pkgutil
import resource
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Fault:
    """An injected error, or a SIGKILL, at the n-th call of a function that works on files.

    at      the function: write, fsync, replace or mkstemp. Or size: no file can grow beyond `number` bytes
    file    only calls on files whose path contains this text count
    number  which call fails, counted from 1
    error   an errno, or 0 for SIGKILL
    after   whether the call fails after its work is done; otherwise it fails before, a write halfway through
    stays   whether every later call fails too
    """

    def __init__(
        self, at: str, file: str = "", number: int = 1, error: int = 0, after: bool = False, stays: bool = False
    ) -> None:
        self.at, self.file, self.number, self.error, self.after, self.stays = at, file, number, error, after, stays
        self.calls = 0

    def is_due(self, name: object) -> bool:
        """Count a call on the file of this name, and return whether it must fail."""
        if self.file not in os.fsdecode(name):  # type: ignore[arg-type]
            return False
        self.calls += 1
        return self.calls == self.number or (self.stays and self.calls > self.number)

    def fail(self) -> None:
        """Kill this process, or raise the error."""
        if not self.error:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self.error, os.strerror(self.error))

    def install(self) -> None:
        """Replace the function by a version that fails when the fault is due, or limit the size of files."""
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
            is_due = self.is_due(name_of(*given, **named))
            if is_due and not self.after:
                self.fail()
            result = function(*given, **named)
            if is_due:
                self.fail()
            return result

        return call

    def _opening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
            opened = function(file, mode, *given, **named)
            if not set(mode) & set("wax+"):
                return opened
            name = os.readlink(f"/proc/self/fd/{opened.fileno()}")
            return FaultyFile(opened, self) if self.file in name else opened

        return call


class FaultyFile:
    """An open file whose writes fail halfway through."""

    def __init__(self, file: Any, fault: Fault) -> None:
        self._file, self._fault = file, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> FaultyFile:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def write(self, content: Any) -> Any:
        if not self._fault.is_due(self._fault.file):
            return self._file.write(content)
        self._file.write(content[: len(content) // 2])
        self._file.flush()
        return self._fault.fail()


def carry_out(asked: dict[str, Any]) -> None:
    """Run the command in this forked process, and exit."""
    if asked["group"]:
        os.setsid()
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    sys.argv = ["vae", *asked["argv"]]
    from vae_cli.axes.dataset import pack
    from vae_cli.cli import main

    pack.IMAGES_PER_STEP = 16  # more writes, so more moments to be killed in
    code: object = 1
    try:
        exec(asked["before"], {})
        if asked["fault"] is not None:
            Fault(**asked["fault"]).install()
        main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:  # what Python does when it exits, except unloading all modules; Ctrl-C must not interrupt it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else code is not None)


def import_everything() -> None:
    """Import everything that a run imports: our modules, and what torch and PIL import when they are first used."""
    import torch
    from PIL import Image

    import vae_cli

    for module in pkgutil.walk_packages(vae_cli.__path__, "vae_cli."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    Image.init()
    for name in ("tensorboard.summary", "hydra_plugins.hydra_joblib_launcher", "hydra_plugins.hydra_submitit_launcher"):
        with suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # garbage collection in the children must not copy the memory that they share


def answer(asked: dict[str, Any]) -> int | None:
    """Start a command, or poll one."""
    if "poll" in asked:
        process, status = os.waitpid(asked["poll"], os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if process else None
    if not (process := os.fork()):
        carry_out(asked)
    return process


def main() -> None:
    import_everything()
    print("ready", flush=True)
    while line := sys.stdin.readline():
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
