"""What several test files use."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from copy import deepcopy
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote
from urllib.request import ProxyHandler, Request, build_opener

import pytest

# The models are tiny, and tests that run side by side would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

Get = Callable[..., Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="attack for as long as it takes: more kills, inputs, runs")


@pytest.fixture(scope="session")
def is_long(pytestconfig: pytest.Config) -> bool:
    """Whether the long form of a test was asked for; the short one makes a seeded choice of it."""
    return bool(pytestconfig.getoption("--long"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the figures that tests have noted with record_property, such as the kills that were survived."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    noted = [(report.head_line, *said) for report in reports for said in report.user_properties]
    if noted:
        terminalreporter.section("figures")
        for test, name, value in sorted(noted):
            terminalreporter.write_line(f"{test}: {name}: {value}")


@contextmanager
def _serve(logdir: Path, *flags: str) -> Iterator[str]:
    """Run TensorBoard over a folder and give its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                    break
            else:
                pytest.fail("TensorBoard did not start:\n" + "".join(said))
            yield address[0]
        finally:
            process.terminate()


@pytest.fixture(autouse=True, scope="session")
def no_cache_of_the_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither find nor leave anything in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


class Process:
    """A command of vae in a process of its own."""

    def __init__(self, ask: Get, pid: int, files: dict[str, Path]) -> None:
        self._ask, self.pid, self._files = ask, pid, files
        self.returncode: int | None = None

    @property
    def stdout(self) -> str:
        """What it has said on its standard output."""
        return self._files["out"].read_text()

    @property
    def stderr(self) -> str:
        """What it has said on its standard error."""
        return self._files["err"].read_text()

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that killed it, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._ask(poll=self.pid)
        return self.returncode

    def wait(self, seconds: float = 300) -> int:
        end = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < end, f"it has not ended: {self.stderr}"
            time.sleep(0.002)
        assert self.returncode is not None
        return self.returncode

    def send(self, number: int, to_all: bool = False) -> None:
        """Send a signal to it, or to all processes of its group, unless it has ended."""
        if self.poll() is None or to_all:
            with suppress(ProcessLookupError):
                (os.killpg if to_all else os.kill)(self.pid, number)


class Commands:
    """Carries out commands of vae in processes that need not import anything first."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count, self._last = folder, 0, Process(self._ask, 0, {})
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "commands.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip
        self._is_ready = False

    def _ask(self, **asked: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        if not self._is_ready:
            assert self._server.stdout.readline() == b"ready\n"
            self._is_ready = True
        self._server.stdin.write(json.dumps(asked).encode() + b"\n")
        return json.loads(self._server.stdout.readline())

    def start(
        self,
        *argv: str,
        cwd: Path,
        fault: dict[str, Any] | None = None,
        before: str = "",
        group: bool = False,
        environment: dict[str, str] | None = None,
    ) -> Process:
        """Start a command. Its fault, if any, is one of commands.py; `before` is Python that is carried out first."""
        self._count += 1
        files = {name: self._folder / f"{self._count}.{name}" for name in ("out", "err")}
        more = {"fault": fault, "before": before, "group": group, "environment": environment or dict(os.environ)}
        pid = self._ask(argv=argv, cwd=str(cwd), **{name: str(file) for name, file in files.items()}, **more)
        self._last = Process(self._ask, pid, files)
        return self._last

    @property
    def err(self) -> str:
        """What the last command has said on its standard error."""
        return self._last.stderr

    def run(self, *argv: str, cwd: Path, **more: Any) -> Process:
        """Carry out a command to its end."""
        process = self.start(*argv, cwd=cwd, **more)
        process.wait()
        return process

    def close(self) -> None:
        with self._server as server:
            assert server.stdin is not None
            server.stdin.close()


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory, no_cache_of_the_users: None) -> Iterator[Commands]:
    """Carry out a command in a process of its own: `commands.run("train", cwd=tmp_path).returncode`."""
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


@pytest.fixture
def tensorboard() -> Iterator[Callable[..., Get]]:
    """Start TensorBoard over a folder of runs: `get = tensorboard(logdir)`.

    `get("plugin/scalars/scalars", run="digits/default", tag="train/loss")` returns the parsed answer to a query of
    /data/..., `get("plugin/hparams/session_groups", {...})` that to JSON sent with POST. What else `tensorboard` is
    given are flags of TensorBoard's.
    """
    open_url = build_opener(ProxyHandler({})).open  # the test machine's proxy is not for 127.0.0.1

    with ExitStack() as stack:

        def start(logdir: Path, *flags: str) -> Get:
            address = stack.enter_context(_serve(logdir, *flags))

            def get(path: str, payload: object = None, **query: str) -> Any:
                parts = "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items())
                body = None if payload is None else json.dumps(payload).encode()
                request = Request(f"{address}/data/{path}?{parts}", body, {"Content-Type": "application/json"})
                with open_url(request, timeout=30) as answer:
                    content = answer.read()
                try:
                    return json.loads(content)
                except ValueError:  # a picture, a tensor, a list of labels
                    return content

            # TensorBoard serves while it reads: wait until two looks in a row show every run and the same events.
            runs = {str(file.parent.relative_to(logdir)) for file in logdir.rglob("*tfevents*")}
            before: object = None
            for _ in range(150):
                seen = get("plugin/timeseries/tags"), get("plugin/hparams/experiment", {})
                if runs == set(get("runs")) and seen == before:
                    return get
                before = seen
                time.sleep(0.2)
            return pytest.fail(f"TensorBoard shows {get('runs')}, not {sorted(runs)}")

        yield start


@cache
def composed(*overrides: str) -> dict[str, Any]:
    """The configuration of these overrides, which is the same in every test; do not change it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from vae_cli.config.catalog import configs_dir
    from vae_cli.config.compose import to_plain

    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        return to_plain(hydra_compose("train", overrides=list(overrides), return_hydra_config=True))


@pytest.fixture
def compose() -> Callable[..., dict[str, Any]]:
    """Compose a configuration from overrides, as plain values: `compose("sigma=fixed", "latent=8")`."""
    return lambda *overrides: deepcopy(composed(*overrides))


class Answer(NamedTuple):
    """What a command ended with, and what it said."""

    code: int
    out: str
    err: str


class Accepted(BaseException):
    """A training was about to start, which a test of wrong input does not wait for."""


def answer(*words: str) -> Answer:
    """Call the program in this process as a person does, in the folder that one stands in."""
    from vae_cli.cli import main

    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["vae", *words])
        try:
            main()
        except SystemExit as stop:
            return Answer(stop.code if isinstance(stop.code, int) else 1, out.getvalue(), err.getvalue())
    raise AssertionError("the program ends by SystemExit")


def listing(folder: Path) -> dict[str, object]:
    """What tells whether anything below a folder was made, changed or removed."""
    found: dict[str, object] = {}
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            stat = os.lstat(os.path.join(path, name))
            found[os.path.join(path, name)] = (stat.st_size, stat.st_mtime_ns) if name in files else stat.st_mode
    return found


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished runs runs/digits/a and, without noise, runs/digits/b, and some other files."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (["run_name=digits/a"], ["run_name=digits/b", "sigma=deterministic"]):
            assert answer("train", "epochs=1", "network.hidden=[8]", "latent=2", *words).code == 0
    for event in folder.rglob("events.*"):
        event.unlink()
    (folder / "photos").mkdir()
    for shade in range(6):
        Image.new("RGB", (9, 9), (20 * shade, 0, 0)).save(folder / f"photos/{shade}.png")
    Image.new("L", (8, 8), 100).save(folder / "one.png")
    (folder / "text.png").write_text("no picture")
    (folder / "file.txt").write_text("x")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def place(two_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of these runs that a test stands in and may damage, where no training starts."""

    def stop(*_: object, **__: object) -> None:
        raise Accepted

    shutil.copytree(two_runs, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr("vae_cli.training.lifecycle.run_experiment", stop)
    monkeypatch.setattr("vae_cli.training.repeat.run_experiment", stop)
    monkeypatch.setenv("VAE_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "place"


@pytest.fixture
def ask() -> Callable[..., Answer]:
    """Call the program: `ask("runs").code`."""
    return answer


@pytest.fixture
def refused(ask: Callable[..., Answer]) -> Callable[..., str]:
    """Call the program with what it has to refuse, and give its message: `refused("train", "latent=0")`.

    It is one message on stderr without a traceback, and nothing below the folder that one stands in has changed.
    """

    def call(*words: str, code: int = 2) -> str:
        before = listing(Path.cwd())
        try:
            found = ask(*words)
        except Accepted:
            return pytest.fail(f"accepted: {words}")
        assert found.code == code, found
        assert found.err.startswith("vae: "), found
        assert found.err.count("vae: ") == 1, found
        assert "Traceback" not in found.err + found.out, found
        assert "HYDRA_FULL_ERROR" not in found.err, found
        assert not re.search(r"\b[A-Z][A-Za-z]+(Error|Exception)\b", found.err), found
        assert "\x1b" not in found.err + found.out
        assert found.out == ""
        assert listing(Path.cwd()) == before
        return found.err

    return call


@pytest.fixture
def accepted() -> type[BaseException]:
    """What is raised where a training was about to start."""
    return Accepted


@pytest.fixture
def listed() -> Callable[[], dict[str, object]]:
    """List what lies below the folder that one stands in."""
    return lambda: listing(Path.cwd())
