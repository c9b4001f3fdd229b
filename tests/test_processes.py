"""A run trained by several processes equals the same run trained by one, and only one process writes files."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vae_cli.cli import run as run_command
from vae_cli.commands.train import train
from vae_cli.config import build
from vae_cli.core.errors import UserError
from vae_cli.machine import device, distributed
from vae_cli.machine.launch import Launch, launched
from vae_cli.runs.folder import ReadOnlyRunDir, RunDir
from vae_cli.training.interruption import AT_ONCE, Interruption
from vae_cli.training.tensorboard import EventWriter, NoEvents

# Batches that do not divide evenly, and a last batch of one image.
WORDS = ["network.hidden=[32]", "batch_size=433", "log_every=1", "epochs=3"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*words: str) -> subprocess.Popen[str]:
    """Start two processes with torchrun."""
    return subprocess.Popen([*TORCHRUN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def together(*words: str) -> subprocess.CompletedProcess[str]:
    with start(*words) as process:
        out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def forked(commands: Any, *words: str) -> list[Any]:
    """Run two forked processes to their end, with the environment that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        whole = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    whole |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environments = [{**os.environ, **whole, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    both = [commands.start("train", *WORDS, *words, cwd=Path.cwd(), environment=each) for each in environments]
    for process in both:
        assert process.wait() == 0, process.stderr
    return both


def alone(*words: str, **flags: Any) -> None:
    train([*WORDS, *words], **flags)


def assert_equal(one: Path, other: Path, rel: float = 1e-4) -> None:
    """Assert that two runs have the same curves and the same final figures."""
    ones, others = RunDir(one), RunDir(other)
    assert len(ones.metrics()) == len(others.metrics()) > 0
    for left, right in zip(ones.metrics(), others.metrics(), strict=True):
        left["seconds"] = right["seconds"] = 0
        assert left == pytest.approx(right, rel=rel, abs=10 * rel)
    for part in ("train", "validation", "test", "posterior"):
        assert ones.summary()[part] == pytest.approx(others.summary()[part], rel=rel, abs=10 * rel)
    assert ones.summary()["step"] == others.summary()["step"]


@pytest.mark.slow
def test_a_divided_step_equals_the_step_of_one_process() -> None:
    ended = together(str(Path(__file__).parent / "divided_steps.py"))
    assert ended.returncode == 0, ended.stderr
    assert "cases are equal" in ended.stdout


@pytest.mark.slow
def test_a_run_of_one_process_is_resumed_by_two(commands: Any, here: Path) -> None:
    alone("sigma=fixed", "run_name=one", "epochs=5")
    alone("sigma=fixed", "run_name=two")
    both = forked(commands, "sigma=fixed", "run_name=two", "epochs=5")
    assert "".join(process.stdout for process in both).count("written: runs/two") == 1
    assert "".join(process.stderr for process in both).count("Resuming runs/two at step 12") == 1
    assert_equal(here / "runs/one", here / "runs/two")


@pytest.mark.slow
def test_a_run_of_two_processes_is_resumed_by_one(here: Path) -> None:
    words = ["sigma=deterministic", "regularizer=energy", "run_name=two"]
    ended = together("-m", "vae_cli", "train", *WORDS, *words)
    assert ended.returncode == 0, ended.stderr
    run = here / "runs/two"
    assert RunDir(run).summary()["processes"] == 2
    names = sorted(path.name for path in run.iterdir())
    assert len([name for name in names if name.startswith("events.")]) == 4  # start, curves, final figures and end
    assert not [name for name in names if name.endswith(".part")]
    assert [path.name for path in here.iterdir()] == ["runs"]
    assert RunDir(run).log_file.read_text().count("starting at step 0") == 1
    assert (run / ".hydra/overrides.yaml").read_text().count("run_name=two") == 1
    alone(*words, "epochs=5")
    alone(*words[:2], "run_name=one", "epochs=5")
    assert_equal(here / "runs/one", run)
    assert RunDir(run).summary()["processes"] == 1


@pytest.mark.slow
def test_a_signal_stops_all_processes_after_one_checkpoint(commands: Any, here: Path) -> None:
    run = RunDir(here / "runs/two")
    with start("-m", "vae_cli", "train", *WORDS, "run_name=two", "epochs=100000") as process:
        deadline = time.monotonic() + 120
        while not run.metrics() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert err.count("type the same command again to resume") == 1, err
    assert run.summary()["status"] == "interrupted"
    epochs = f"epochs={len(run.metrics()) + 2}"
    forked(commands, "run_name=two", epochs)
    alone("run_name=one", epochs)
    assert_equal(here / "runs/one", here / "runs/two", rel=1e-3)


@pytest.mark.slow
def test_an_error_message_is_printed_once(here: Path) -> None:
    ended = together("-m", "vae_cli", "train", "batch_size=1")
    assert ended.returncode != 0
    assert ended.stderr.count("batch_size=1 is less than one image for each of 2 processes") == 1, ended.stderr
    assert not list(here.iterdir())


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**whole, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.usefixtures("second_of_two")
def test_commands_that_several_processes_refuse(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    assert launched() == Launch(1, 2, 1, 2)
    with pytest.raises(UserError, match="run the sweep without torchrun"):
        alone("latent=2,3", multirun=True)
    with pytest.raises(UserError, match="'vae train --cfg' would run 2 times"):
        alone(cfg="job")
    for number in "10":
        monkeypatch.setenv("RANK", number)
        monkeypatch.setattr(sys, "argv", ["vae", "sample", "latest"])
        assert run_command() == 2
        said = capfd.readouterr().err
        assert ("'vae sample' would run 2 times" in said) == (number == "0")
        assert said.count("\n") == (number == "0")
    assert not list(here.iterdir())


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": ""}, "RANK is not set: start the processes with torchrun"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "MASTER_ADDR and MASTER_PORT are not set"),
        ({"RANK": "2"}, "RANK=2.*contradict each other"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x in the environment is not a whole number"),
    ],
    ids=str,
)
def test_an_incomplete_environment_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], message: str
) -> None:
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        alone()
    assert not list(here.iterdir())


def test_one_process_needs_no_other_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("RANK", raising=False)
    assert launched() == Launch()


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize(
    ("name", "gpus", "found"),
    [
        ("auto", 2, "cuda:1"),
        ("cuda", 4, "cuda:1"),
        ("auto", 0, "cpu"),
        ("cpu", 2, "cpu"),
        ("cuda:1", 2, "device=cuda:1 is one device, but each of the 2 processes needs its own"),
        ("mps", 0, "device=mps is one device"),
        ("cuda", 0, "device=cuda is not available on this machine"),
        ("auto", 1, "2 processes on this machine but 1 GPU: type --nproc-per-node 1"),
    ],
)
def test_each_process_gets_its_own_device(monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, found: str) -> None:
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if " " in found:
        with pytest.raises(UserError, match=found):
            device.find_device(name)
    else:
        assert device.find_device(name) == torch.device(found)


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch, compose: Any, second_of_two: None) -> None:
    monkeypatch.setattr(device, "cores", lambda: 8)
    experiment = build.build_experiment(compose("network=conv"))
    monkeypatch.setattr(distributed, "count", lambda: 2)
    assert device.find_threads(experiment.config, experiment.model) == 4
    small = build.build_experiment(compose("network.hidden=[8]", "device=cpu"))
    assert device.find_threads(small.config, small.model) == 1
    with pytest.raises(UserError, match=r"type network\.normalization=group"):
        build.build_experiment(compose("network=conv", "network.normalization=batch", "device=cpu"))


def test_two_signals_at_once_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "greatest", lambda number: number)
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.arrived()
        now += AT_ONCE + 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(SystemExit) as stopped:
            interruption.stop_if_asked("stopped")
    assert stopped.value.code == 143


def test_a_second_signal_ends_with_its_own_exit_code() -> None:
    with Interruption():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.code == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    """Every method that writes is overridden in the class for the other processes."""
    for silent, writer in ((ReadOnlyRunDir, RunDir), (NoEvents, EventWriter)):
        verbs = ("write", "append", "forget", "hparams", "layout", "scalars", "histograms", "pictures", "embedding")
        names = [name for name in vars(writer) if name.startswith((*verbs, "close", "flush"))]
        assert len(names) >= 4
        assert set(names) <= set(vars(silent))
    ReadOnlyRunDir(tmp_path / "a").write_config({})
    NoEvents().scalars({}, 1)
    assert not list(tmp_path.iterdir())


def test_one_process_gets_the_whole_batch() -> None:
    positions, values = torch.arange(5), torch.randn(5, 3)
    with distributed.share(positions) as own:
        assert own is positions
        assert torch.equal(distributed.mean(values), values.mean())
        assert torch.equal(distributed.mean(values, 0), values.mean(0))
        assert torch.equal(distributed.mean_loss(values[:, 0]), values[:, 0].mean())
        assert distributed.counted(values) is values
        assert distributed.size(values) == 5
    assert distributed.total(values) is values
    module = torch.nn.Linear(2, 2)
    assert distributed.wrap(module) is module
    assert distributed.first(lambda: 3) == distributed.together(lambda: 3) == distributed.greatest(3) == 3
    with distributed.joined():
        assert (distributed.rank(), distributed.count(), distributed.is_first()) == (0, 1, True)
