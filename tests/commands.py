"""Run commands in processes that are forked from this one, which has imported everything, and let them meet a fault.

Reads one JSON object a line, and answers in one line. To argv, environment, cwd, out and err (files), a group (whether
it is to lead a group of processes), before (Python that is carried out first), and fault (see Fault) or null, with the
process id of the command, which is started; to poll (a process id), with its exit code, or minus the signal that ended
it, or null while it runs.
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


def carry_out(asked: dict[str, Any]) -> None:
    """Be the command, in a process of its own."""
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

    pack.IMAGES_PER_STEP = 16  # more writes to be killed in
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
    finally:  # what Python does at its end, but for taking apart all that was imported; no Ctrl-C comes into it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else code is not None)


def import_everything() -> None:
    """Import what a run imports, once for all commands: our modules, and what torch and PIL import when first used."""
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
    gc.freeze()  # so that collecting garbage does not copy what the processes share


def answer(asked: dict[str, Any]) -> int | None:
    """Start a command, or look after one."""
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
