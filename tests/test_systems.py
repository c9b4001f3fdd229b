"""What only some operating systems have: each test takes away what Windows or macOS lacks.

The tests do not replace a run on these systems; .github/workflows has one.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

from vae_cli.config.naming import check_path
from vae_cli.core import files
from vae_cli.core.errors import UserError
from vae_cli.core.files import flush_folder, is_locked, locked, open_regular, replace_file
from vae_cli.machine import cores, memory, signals
from vae_cli.training import interruption

HOLD = """
import sys
from pathlib import Path
from vae_cli.core.files import locked
with locked(Path(sys.argv[1]), wait=False) as is_ours:
    print(is_ours, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold(tmp_path: Path) -> Callable[[], subprocess.Popen[str]]:
    """Start a process that locks a file, if it can, until its input is closed."""

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=Path(files.__file__).parents[2])

    return start


@pytest.mark.parametrize("has_fcntl", [True, False])
def test_a_lock_excludes_other_processes_and_ends_with_its_own(
    has_fcntl: bool, hold: Callable[[], subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_fcntl:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    file = tmp_path / "lock"
    assert not is_locked(file)
    assert not file.exists()
    for is_killed in (False, True):
        first = hold()
        assert first.stdout is not None
        assert first.stdout.readline() == "True\n"
        assert is_locked(file)
        with locked(file, wait=False) as is_ours:
            assert not is_ours
        second = hold()
        assert second.stdout is not None
        assert second.stdout.readline() == "False\n"
        second.communicate("")
        assert is_locked(file)
        first.kill() if is_killed else first.communicate("")
        first.wait()
        assert not is_locked(file)
        with locked(file, wait=False) as is_ours:
            assert is_ours
            assert is_locked(file)
        assert not is_locked(file)


def test_a_lock_is_waited_for(hold: Callable[[], subprocess.Popen[str]], tmp_path: Path) -> None:
    first = hold()
    assert first.stdout is not None
    assert first.stdout.readline() == "True\n"
    asked = threading.Event()
    timer = threading.Timer(0.3, lambda: (asked.set(), first.communicate("")))
    timer.start()
    with locked(tmp_path / "lock") as is_ours:
        assert is_ours
        assert asked.is_set()
    timer.join()
    assert first.wait() == 0


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_accepted(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, **_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filelock.FileLock, "acquire", fails)
    with locked(tmp_path / "lock", wait=False) as is_ours:
        assert is_ours


def test_a_lock_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), locked(tmp_path / "file" / "lock"):
        pass


def test_without_hang_up_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        for name in ("SIGHUP", "SIGUSR1", "SIGUSR2"):
            patched.delattr(signal, name, raising=False)
        importlib.reload(signals)
        importlib.reload(interruption)
        assert signals.HANG_UP is None
        assert set(signals.STOPS) == {signal.SIGINT, signal.SIGTERM}
        assert interruption.TIME_WARNINGS == []
        with interruption.Interruption() as caught:
            assert caught.signal is None
    importlib.reload(signals)
    importlib.reload(interruption)


def test_without_the_size_of_memory_and_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert memory.memory_of(torch.device("cpu")) is None
    memory.refuse_oversize(10**18, "A model", "make it smaller")  # the memory is unknown
    assert cores.cores() == (os.cpu_count() or 1)


def test_without_folders_that_can_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Windows opens no folders", path)

    monkeypatch.setattr(files.os, "name", "nt")
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "open", refuses)
        flush_folder(tmp_path)


def test_without_posix_flags_of_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_NONBLOCK", raising=False)
    replace_file(tmp_path / "a", lambda file: file.write(b"whole"))
    with open_regular(tmp_path / "a") as file:
        assert file.read() == b"whole"


@pytest.mark.parametrize("name", ["a:b", "con", "NUL.txt", "a/lpt1", "what?", "a*", "ends.", "ends ", r"x\\com3"])
def test_names_that_windows_does_not_allow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_path("run_name", name)
    monkeypatch.setattr("vae_cli.config.naming.os.name", "nt")
    with pytest.raises(UserError, match="Windows does not allow this name"):
        check_path("run_name", name)


@pytest.mark.parametrize("name", ["a", "../a", "./a", "latent-8_sigma-fixed", "contest", "a.b"])
def test_other_names_are_allowed_on_windows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vae_cli.config.naming.os.name", "nt")
    check_path("run_name", name)
