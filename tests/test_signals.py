"""Processes whose parent or terminal is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

import vae_cli

PARENT = """
import sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from vae_cli.machine.signals import end_with_parent

if __name__ == "__main__":
    pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=end_with_parent)
    tasks = [pool.submit(time.sleep, 600) for _ in range(2)]
    time.sleep(2)
    print(*pool._processes, flush=True)
    time.sleep(600)
"""


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_worker_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    children = [int(word) for word in parent.stdout.readline().split()]
    assert len(children) == 2
    assert all(map(is_alive, children))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while any(map(is_alive, children)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


START = "from vae_cli.__main__ import main; print('ready', flush=True); main()"


@pytest.mark.skipif(os.name != "posix", reason="Windows cannot send Ctrl-C to one process")
def test_ctrl_c_during_an_import_ends_the_program_without_an_error(
    tmp_path: Path, is_long: bool, record_property: Callable[[str, object], None]
) -> None:
    """A module whose import was interrupted is half loaded; NumPy, for example, then raises ImportError."""
    delays = [0.02 * step for step in range(1, 100 if is_long else 60, 1 if is_long else 8)]
    codes = []
    for words, delay in product((["evaluate", "x"], ["runs"]), delays):
        environment = {**os.environ, "PYTHONPATH": str(Path(vae_cli.__file__).parents[1])}
        command = [sys.executable, "-c", START, *words]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate()
        codes.append(process.returncode)
        assert process.returncode in (130, 2, -signal.SIGINT), (words, delay, said)  # 2: it had ended before
        assert "Error" not in said, (words, delay, said)
        assert "Traceback" not in said, (words, delay, said)
    assert 130 in codes
    record_property("Ctrl-C during start-up", f"{len(codes)} of {len(codes)} ended without an error")
