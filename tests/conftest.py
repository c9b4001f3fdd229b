"""Options and fixtures that several test files share."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
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

# The models are tiny, and tests that run in parallel would compete for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Started by nohup or in the background of a script, pytest ignores these signals, and the programs that it starts would
# ignore them, too. A signal with a handler has its default effect in these programs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)

Get = Callable[..., Any]


# The files that `pytest --quick` runs: laws, model, configuration, names, messages, structure and documents. Together
# they take about a minute on two cores; files that train many runs or start other programs do not belong here.
QUICK_FILES = frozenset(
    f"test_{name}.py"
    for name in [
        *("aliases", "architecture", "catalog", "claims", "cli", "commands", "completion", "dataset", "doctests"),
        *("explain", "image", "laws", "linear_vae", "messages", "metric_bits", "quarantine", "readme", "statistics"),
    ]
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="run the tests to run between edits (about a minute)")
    parser.addoption("--long", action="store_true", help="run the long form of the stress tests: more kills and inputs")
    parser.addoption("--save", action="store_true", help="store the figures of tests/gpu in tests/benchmarks/results")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --quick, do not even import the files that are not part of it."""
    is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    return True if config.getoption("--quick") and is_test and collection_path.name not in QUICK_FILES else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --quick, leave out the slow tests of the files that remain."""
    if config.getoption("--quick"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)


@pytest.fixture(scope="session")
def is_long(pytestconfig: pytest.Config) -> bool:
    """Return whether --long was given. Without it, a stress test runs a seeded random selection of its cases."""
    return bool(pytestconfig.getoption("--long"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the figures that tests recorded with record_property, such as the number of kills survived."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    noted = [(report.head_line, *said) for report in reports for said in report.user_properties]
    if noted:
        terminalreporter.section("figures")
        for test, name, value in sorted(noted):
            terminalreporter.write_line(f"{test}: {name}: {value}")


@contextmanager
def _serve(logdir: Path, *flags: str) -> Iterator[str]:
    """Run TensorBoard on a folder and yield its address."""
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
    """Keep the tests out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


class Process:
    """A vae command that runs in its own process."""

    def __init__(self, ask: Get, pid: int, files: dict[str, Path]) -> None:
        self._ask, self.pid, self._files = ask, pid, files
        self.returncode: int | None = None

    @property
    def stdout(self) -> str:
        """Return its standard output so far."""
        return self._files["out"].read_text()

    @property
    def stderr(self) -> str:
        """Return its standard error so far."""
        return self._files["err"].read_text()

    def poll(self) -> int | None:
        """Return its exit code, or minus the signal that killed it, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._ask(poll=self.pid)
        return self.returncode

    def wait(self, seconds: float = 300) -> int:
        """Wait until it ends and return its exit code."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < end, f"it has not ended: {self.stderr}"
            time.sleep(0.002)
        assert self.returncode is not None
        return self.returncode

    def send(self, number: int, to_all: bool = False) -> None:
        """Send it a signal if it is still running. With to_all, send the signal to its process group in any case."""
        if self.poll() is None or to_all:
            with suppress(ProcessLookupError):
                (os.killpg if to_all else os.kill)(self.pid, number)


class Commands:
    """Runs vae commands in processes that are forked from a server, so that they need not import anything first."""

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
        """Start a command; `fault` is described in commands.py, and `before` is Python code that runs first."""
        self._count += 1
        files = {name: self._folder / f"{self._count}.{name}" for name in ("out", "err")}
        more = {"fault": fault, "before": before, "group": group, "environment": environment or dict(os.environ)}
        pid = self._ask(argv=argv, cwd=str(cwd), **{name: str(file) for name, file in files.items()}, **more)
        self._last = Process(self._ask, pid, files)
        return self._last

    @property
    def err(self) -> str:
        """Return the standard error of the command that was started last."""
        return self._last.stderr

    def run(self, *argv: str, cwd: Path, **more: Any) -> Process:
        """Run a command until it ends."""
        process = self.start(*argv, cwd=cwd, **more)
        process.wait()
        return process

    def close(self) -> None:
        """Stop the server."""
        with self._server as server:
            assert server.stdin is not None
            server.stdin.close()


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory, no_cache_of_the_users: None) -> Iterator[Commands]:
    """Run a command in its own process: `commands.run("train", cwd=tmp_path).returncode`."""
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


@pytest.fixture
def tensorboard() -> Iterator[Callable[..., Get]]:
    """Start TensorBoard on a folder of runs: `get = tensorboard(logdir)`; further arguments are TensorBoard's flags.

    `get("plugin/scalars/scalars", run="digits/default", tag="train/loss")` queries /data/... and returns the parsed
    answer; `get("plugin/hparams/session_groups", {...})` sends the dictionary as JSON with POST.
    """
    open_url = build_opener(ProxyHandler({})).open  # a proxy must not see requests to 127.0.0.1

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

            # TensorBoard answers before it has read all events: wait until it shows every run and nothing changes.
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
    """Compose a configuration once for all tests; callers must not change it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from vae_cli.config.catalog import configs_dir
    from vae_cli.config.compose import to_plain

    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        return to_plain(hydra_compose("train", overrides=list(overrides), return_hydra_config=True))


@pytest.fixture
def compose() -> Callable[..., dict[str, Any]]:
    """Compose a configuration from overrides into plain values: `compose("sigma=fixed", "latent=8")`."""
    return lambda *overrides: deepcopy(composed(*overrides))


class Answer(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


class Accepted(BaseException):
    """Raised when training is about to start: a test of invalid input need not wait for the training itself."""


def answer(*words: str) -> Answer:
    """Run the program in this process and in the current folder, as a user would."""
    from vae_cli.cli import main

    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["vae", *words])
        try:
            main()
        except SystemExit as stop:
            return Answer(stop.code if isinstance(stop.code, int) else 1, out.getvalue(), err.getvalue())
    raise AssertionError("the program did not end with SystemExit")


def listing(folder: Path) -> dict[str, object]:
    """Return a snapshot of a folder that changes if anything below it is created, modified or removed."""
    found: dict[str, object] = {}
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            stat = os.lstat(os.path.join(path, name))
            found[os.path.join(path, name)] = (stat.st_size, stat.st_mtime_ns) if name in files else stat.st_mode
    return found


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs, runs/digits/a and (deterministic) runs/digits/b, and some other files."""
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
    """Change to a copy of the folder `two_runs`, which a test may damage; no training starts there."""

    def stop(*_: object, **__: object) -> None:
        raise Accepted

    shutil.copytree(two_runs, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    # Patch `repeat` first: if it were first imported after the other patch, it would keep the patched function.
    monkeypatch.setattr("vae_cli.training.repeat.run_experiment", stop)
    monkeypatch.setattr("vae_cli.training.lifecycle.run_experiment", stop)
    monkeypatch.setenv("VAE_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "place"


@pytest.fixture
def ask() -> Callable[..., Answer]:
    """Run the program: `ask("runs").code`."""
    return answer


@pytest.fixture
def refused(ask: Callable[..., Answer]) -> Callable[..., str]:
    """Run the program with input that it must refuse, and return its message: `refused("train", "latent=0")`.

    Also check that the message is the only one, that it goes to stderr without a traceback, and that nothing below the
    current folder changes.
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
    """The exception that is raised when training is about to start."""
    return Accepted


@pytest.fixture
def listed() -> Callable[[], dict[str, object]]:
    """Take a snapshot of the current folder (see `listing`)."""
    return lambda: listing(Path.cwd())
