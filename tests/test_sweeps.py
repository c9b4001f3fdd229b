"""Sweeps whose runs train in other processes: the same figures, progress, failures, Ctrl-C, and dead processes."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf
from rich.console import Console

from vae_cli.core.errors import Failure, UserError
from vae_cli.core.files import locked
from vae_cli.core.wording import time_left
from vae_cli.machine import cores
from vae_cli.machine.signals import PARENT
from vae_cli.runs.find import find_runs
from vae_cli.runs.folder import RunDir
from vae_cli.sweeps import launcher, runner
from vae_cli.sweeps.progress import SweepProgress
from vae_cli.sweeps.slurm import states_of

Commands = Any
SMALL = ["network.hidden=[16]", "latent=2", "epochs=2"]
SIX = ["sigma=learned,fixed,deterministic", "seed=0,1"]
LAUNCHERS = {
    "joblib": ("hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": ("hydra_submitit_launcher", []),
    "ray": ("hydra_ray_launcher", []),
}


def start(commands: Commands, *words: str, cwd: Path, **more: Any) -> Any:
    given = {word.partition("=")[0] for word in words}
    small = [word for word in SMALL if word.partition("=")[0] not in given]
    return commands.start("train", "-m", *words, *small, cwd=cwd, **more)


def vae(commands: Commands, *words: str, cwd: Path) -> Any:
    ended = start(commands, *words, cwd=cwd)
    ended.wait()
    return ended


def needs(launcher: str) -> list[str]:
    module, settings = LAUNCHERS[launcher]
    spec = importlib.util.find_spec("hydra_plugins")
    if spec is None or importlib.util.find_spec(f"hydra_plugins.{module}") is None:
        extra = "slurm" if launcher.startswith("submitit") else launcher
        pytest.skip(f"hydra/launcher={launcher} is not installed: pip install 'vae-cli[{extra}]'")
    return [f"hydra/launcher={launcher}", *settings]


def figures(folder: Path) -> dict[str, Any]:
    return {
        file.parent.relative_to(folder).as_posix(): json.loads(file.read_text())["test"]
        for file in sorted(folder.rglob("summary.json"))
    }


def wait_for(what: Any, seconds: float = 120, each: float = 0.1) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(each)


@pytest.fixture(scope="module")
def one_by_one(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("basic")
    ended = vae(commands, *SIX, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_the_same_figures(
    launcher: str, commands: Commands, one_by_one: Path, tmp_path: Path
) -> None:
    ended = vae(commands, *SIX, *needs(launcher), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "6 jobs: 6 to run" in ended.stdout
    assert "6 of 6: distortion" in ended.stdout
    assert ended.stderr == ""
    assert figures(tmp_path / "runs") == figures(one_by_one / "runs")
    for file in sorted((one_by_one / "runs").rglob("checkpoint.pt")):
        here = tmp_path / file.relative_to(one_by_one)
        ours, theirs = (torch.load(path, weights_only=True)["model"] for path in (here, file))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def test_a_failed_run_is_named_and_its_log_has_the_traceback(commands: Commands, tmp_path: Path) -> None:
    ended = vae(commands, "optimizer.lr=1e-3,1e30", *needs("joblib"), cwd=tmp_path)
    assert ended.returncode == 1
    assert "1 of 2 jobs failed:\n  optimizer.lr=1e+30" in ended.stderr
    assert "diverged" in ended.stderr
    assert "Traceback" not in ended.stderr
    failed = tmp_path / "runs/digits/latent-2_network.hidden-16_optimizer.lr-1e+30"
    assert "Traceback" in (failed / "train.log").read_text()
    assert json.loads((failed / "summary.json").read_text())["status"] == "failed"
    assert [run for run, test in figures_of_finished(tmp_path).items() if test] == ["digits/latent-2_network.hidden-16"]


def figures_of_finished(folder: Path) -> dict[str, Any]:
    files = sorted((folder / "runs").rglob("summary.json"))
    read = {file.parent.relative_to(folder / "runs").as_posix(): json.loads(file.read_text()) for file in files}
    return {run: summary.get("test") for run, summary in read.items()}


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_run_without_data_has_a_traceback_in_its_log(launcher: str, commands: Commands, tmp_path: Path) -> None:
    words = [] if launcher == "basic" else needs(launcher)
    ended = vae(commands, "dataset=cifar10,digits", f"data_dir={tmp_path / 'none'}", *words, cwd=tmp_path)
    assert ended.returncode == 1
    assert "1 of 2 jobs failed:\n  dataset=cifar10" in ended.stderr
    failed = tmp_path / "runs/cifar10/latent-2_network.hidden-16"
    assert "Traceback" in (failed / "train.log").read_text()
    again = vae(commands, "dataset=cifar10,digits", f"data_dir={tmp_path / 'none'}", *words, cwd=tmp_path)
    assert "2 jobs: 1 finished (skipped), 1 to run" in again.stdout  # nothing to resume


def under_way(folder: Path) -> list[Path]:
    """The runs that have written at least one epoch."""
    return sorted(file.parent for file in folder.rglob("metrics.jsonl") if file.stat().st_size)


def test_ctrl_c_stops_every_run_after_a_checkpoint_and_starts_no_more(commands: Commands, tmp_path: Path) -> None:
    words = ["seed=0,1,2,3", "epochs=4000", "checkpoint_minutes=1000", *needs("joblib")]
    sweep = start(commands, *words, cwd=tmp_path, group=True)
    try:
        wait_for(lambda: len(under_way(tmp_path)) == 2)
        sweep.send(signal.SIGINT, to_all=True)  # as the terminal does: to every process of the command
        sweep.wait(100)
    finally:
        sweep.send(signal.SIGKILL, to_all=True)
    assert sweep.returncode == 130
    assert "Traceback" not in sweep.stderr
    runs = sorted(file.parent for file in tmp_path.rglob("summary.json"))
    assert len(runs) == 2
    for run in runs:
        assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
        assert (run / "checkpoint.pt").exists()


@pytest.mark.skipif(os.name != "posix", reason="only POSIX gives a process that loses its parent another one")
def test_runs_are_saved_and_stopped_if_the_process_of_their_sweep_is_killed(commands: Commands, tmp_path: Path) -> None:
    words = ["seed=0,1,2,3", "epochs=4000", "checkpoint_minutes=1000", *needs("joblib")]
    sweep = start(commands, *words, cwd=tmp_path, group=True)
    try:
        wait_for(lambda: len(under_way(tmp_path)) == 2)
        sweep.send(signal.SIGKILL)  # to this process alone
        runs = under_way(tmp_path)
        wait_for(lambda: all(RunDir(run).summary()["status"] == "interrupted" for run in runs))
    finally:
        sweep.send(signal.SIGKILL, to_all=True)
    assert all(RunDir(run).checkpoint_file.exists() for run in runs)


def test_ctrl_c_saves_the_only_run_at_a_time(commands: Commands, tmp_path: Path) -> None:
    """With n_jobs=1, joblib trains in the process of the sweep itself."""
    words = ["seed=0,1", "epochs=4000", "checkpoint_minutes=1000", *needs("joblib")[:-1], "hydra.launcher.n_jobs=1"]
    sweep = start(commands, *words, cwd=tmp_path, group=True)
    try:
        wait_for(lambda: len(under_way(tmp_path)) == 1)
        sweep.send(signal.SIGINT)
        sweep.wait(100)
    finally:
        sweep.send(signal.SIGKILL, to_all=True)
    assert sweep.returncode == 130
    (run,) = under_way(tmp_path)
    assert RunDir(run).summary()["status"] == "interrupted"
    assert RunDir(run).checkpoint_file.exists()


LONGER = ["seed=0,1,2", "epochs=30"]


@pytest.fixture(scope="module")
def undisturbed(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The figures of an undisturbed sweep."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = vae(commands, *LONGER, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return figures(folder / "runs")


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_killed_sweep_is_finished_by_typing_it_again(
    launcher: str, commands: Commands, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    words = [] if launcher == "basic" else needs(launcher)
    sweep = start(commands, *words, *LONGER, cwd=tmp_path, group=True)
    done = lambda: [run for run, test in figures_of_finished(tmp_path).items() if test]  # noqa: E731
    begun = lambda: len(list((tmp_path / "runs").rglob("checkpoint.pt")))  # noqa: E731
    try:
        wait_for(lambda: done() and begun() > len(done()), each=0.01)
    finally:
        sweep.send(signal.SIGKILL, to_all=True)
    assert sweep.wait() == -signal.SIGKILL
    finished = done()
    assert 0 < len(finished) < 3
    before = {run: (tmp_path / "runs" / run / "checkpoint.pt").stat().st_mtime_ns for run in finished}
    again = vae(commands, *words, *LONGER, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"3 jobs: {len(finished)} finished (skipped)" in again.stdout
    assert " to resume" in again.stdout
    assert before == {run: (tmp_path / "runs" / run / "checkpoint.pt").stat().st_mtime_ns for run in finished}
    assert all(figures_of_finished(tmp_path).values())
    for run in (tmp_path / "runs").rglob("metrics.jsonl"):
        assert [json.loads(line)["epoch"] for line in run.read_text().splitlines()] == list(range(1, 31))
    assert figures(tmp_path / "runs") == undisturbed


def test_a_run_that_another_process_trains_is_skipped(commands: Commands, tmp_path: Path) -> None:
    first = vae(commands, "seed=0", cwd=tmp_path)
    assert first.returncode == 0
    folder = tmp_path / "runs/digits/latent-2_network.hidden-16"
    with locked(folder / ".lock"):
        ended = vae(commands, "seed=0,1", "epochs=3", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "2 jobs: 1 running in another process (skipped), 1 to run" in ended.stdout
    assert json.loads((folder / "summary.json").read_text())["epoch"] == 2


# Progress -------------------------------------------------------------------------------------------------------------


def write_run(path: Path, epoch: int = 0, **summary: Any) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "summary.json").write_text(json.dumps(summary))
    record = {"epoch": epoch, "step": epoch, "seconds": 1.0}
    (path / "metrics.jsonl").write_text("".join(json.dumps({**record, "epoch": n + 1}) + "\n" for n in range(epoch)))


def progress_of(tmp_path: Path, **more: Any) -> tuple[SweepProgress, Console]:
    lines = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    runs = {number: (tmp_path / name, 10) for number, name in enumerate("abc")}
    return SweepProgress(runs, Console(quiet=True, force_terminal=False), lines), lines


def test_the_progress_follows_the_folders_of_the_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "b", 5, status="failed", error="of an earlier time")
    seen, lines = progress_of(tmp_path)
    seen.look()
    assert str(seen) == "3 waiting"  # files from before the sweep do not count
    write_run(tmp_path / "a", 5, status="running")
    write_run(tmp_path / "b", 6, status="running", started="anew")
    seen.look()
    assert str(seen) == "2 running, 1 waiting"
    test = {"distortion": 3.0, "rate": 1.0}
    write_run(tmp_path / "a", 10, status="finished", test=test, seconds=2.5, warnings=["sigma has collapsed"])
    write_run(tmp_path / "b", 6, status="failed", error="it broke")
    seen.look()
    seen.look()
    said = lines.export_text()
    assert said.count("distortion 3.00  rate 1.00  in 2.5 s") == 1
    assert "warning: sigma has collapsed" in said
    assert "2 of 3, " in said
    assert "failed: " in said
    assert "it broke" in said
    assert str(seen) == "1 failed, 1 waiting"
    assert seen.state(2) == "waiting"


def test_a_sweep_stops_its_own_runs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    seen, _ = progress_of(tmp_path)
    for name, pid, sweep in (("a", 111, os.getpid()), ("b", 222, 333), ("c", 444, None)):
        write_run(tmp_path / name, 3, status="running", pid=pid, host=socket.gethostname(), sweep_pid=sweep)
    seen.stop(is_queued=False)
    assert killed == [111]


def test_the_progress_survives_a_damaged_folder(tmp_path: Path) -> None:
    seen, _ = progress_of(tmp_path)
    write_run(tmp_path / "a", 3, status="running")
    (tmp_path / "a" / "summary.json").write_text("{")
    (tmp_path / "a" / "metrics.jsonl").write_bytes(b"\xff{")
    seen.look()
    assert seen.state(0) == "waiting"


def test_the_time_left_is_given_in_words() -> None:
    assert [time_left(seconds) for seconds in (None, 3, 90, 600, 7200)] == [
        "", "less than a minute left", "2 min left", "10 min left", "2.0 h left",
    ]  # fmt: skip


# Dying workers --------------------------------------------------------------------------------------------------------


class Folders:
    """Stands in for the folders of a sweep's runs, and for its reporter and monitor."""

    def __init__(self, states: dict[int, runner.State]) -> None:
        self.states = states

    def __call__(self, config: Any) -> bool:
        return True

    def begin(self) -> None: ...

    def start(self, number: int, count: int, failed: int, words: Sequence[str]) -> None: ...

    def monitor(self) -> Folders:
        return self

    def look(self) -> None: ...

    def state(self, job: int) -> runner.State:
        return self.states[job]

    def stop(self, is_queued: bool) -> None: ...

    def close(self) -> None: ...

    def end(self) -> None: ...


class Dying(Launcher):
    """A launcher that gives up on all of its jobs when one of them dies, as joblib does."""

    def __init__(self, folders: Folders, deadly: Sequence[str]) -> None:
        self.folders, self.deadly = folders, deadly
        self.launched: list[list[str]] = []

    def setup(self, **_: Any) -> None: ...

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        self.launched.append([words[0] for words in job_overrides])
        for words in job_overrides:
            number = int(words[0].partition("=")[2])
            if words[0] in self.deadly:
                self.folders.states[number] = "interrupted"
                raise RuntimeError("a worker was terminated")
            self.folders.states[number] = "finished"
        done = JobStatus.COMPLETED
        return [JobReturn(overrides=list(words), status=done) for words in job_overrides]


@pytest.mark.parametrize("deadly", [["seed=1"], ["seed=1", "seed=3"], ["seed=4"], []])
def test_a_dying_worker_fails_its_own_job_only(deadly: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LOOK", 0.01)
    folders = Folders(dict.fromkeys(range(5), "waiting"))
    inner = Dying(folders, deadly)
    config = OmegaConf.create(
        {
            "hydra": {
                "sweeper": {"_target_": "hydra.BasicSweeper"},
                "launcher": {"_target_": "plugin.JoblibLauncher", "n_jobs": 2},
                "sweep": {"dir": "none"},
            }
        }
    )
    checked = launcher.CheckedLauncher(inner, folders, folders, None, config)  # type: ignore[arg-type]
    monkeypatch.setattr(checked, "is_to_run", lambda job: True)
    words = [[f"seed={number}"] for number in range(5)]
    if deadly:
        with pytest.raises(Failure) as caught:
            checked.launch(words, 0)
        assert f"{len(deadly)} of 5 jobs failed" in str(caught.value)
        assert all(f"{word}: its process died or was stopped" in str(caught.value) for word in deadly)
    else:
        assert len(checked.launch(words, 0)) == 5
    assert sum(len(batch) for batch in inner.launched) <= 5 + sum(range(5))
    assert [number for number, state in folders.states.items() if state != "finished"] == [
        int(word[-1]) for word in deadly
    ]


@pytest.mark.skipif(os.name != "posix", reason="only POSIX gives a process that loses its parent another one")
def test_a_job_whose_sweep_has_ended_before_it_starts_is_stopped(tmp_path: Path) -> None:
    code = "import time; from vae_cli.machine.signals import stop_with_parent; stop_with_parent(60); time.sleep(60)"
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, PARENT: "999999999"}, timeout=30)
    assert ended.returncode == -signal.SIGTERM


def test_a_launcher_that_starts_nothing_is_not_tried_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    folders, launches = Folders(dict.fromkeys(range(2), "waiting")), []

    class Broken(Dying):
        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            launches.append(job_overrides)
            raise RuntimeError("no such queue")

    config = OmegaConf.create(
        {"hydra": {"sweeper": {"_target_": "x.BasicSweeper"}, "launcher": {"_target_": "x.JoblibLauncher"}}}
    )
    checked = launcher.CheckedLauncher(Broken(folders, []), folders, folders, None, config)  # type: ignore[arg-type]
    monkeypatch.setattr(checked, "is_to_run", lambda job: True)
    with pytest.raises(Failure, match="2 of 2 jobs failed:\n  seed=0: it did not start: RuntimeError: no such queue"):
        checked.launch([["seed=0"], ["seed=1"]], 0)
    assert len(launches) == 2  # once more, since a worker may have died before its first job


# The machine ----------------------------------------------------------------------------------------------------------


def test_a_run_uses_the_gpu_with_the_fewest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    taken = []
    for _ in range(5):  # each stands for a new process, which holds no GPU
        monkeypatch.setattr(cores, "taken_gpus", {})
        taken.append(cores.free_gpu(2))
    assert taken == [0, 1, 0, 1, 0]
    assert cores.free_gpu(2) == 0  # a process keeps its GPU
    cores.held_locks.close()
    monkeypatch.setattr(cores, "taken_gpus", {})
    assert cores.free_gpu(2) == 0  # processes that have ended hold none


def test_a_machine_runs_as_many_jobs_as_cores_and_gpu_memory_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "cores", lambda: 16)
    monkeypatch.setattr(cores, "gpus", lambda: 4)
    for gigabytes, expected in {80: [16, 16, 16, 16], 10: [8, 16, 8, 2], 3: [4, 16, 4, 1]}.items():
        monkeypatch.setattr(cores, "gpu_memories", lambda size=gigabytes: [size << 30] * 4)
        assert [cores.jobs_at_once(device) for device in ("auto", "cpu", "cuda", "cuda:1")] == expected
    monkeypatch.setattr(cores, "gpu_memories", lambda: [80 << 30, 8 << 30])
    assert [cores.jobs_at_once(device) for device in ("cuda", "cuda:0", "cuda:1")] == [10, 16, 2]
    monkeypatch.setattr(cores, "gpu_memories", lambda: [80 << 30] * 4)
    monkeypatch.setattr(cores, "cores", lambda: 2)
    assert cores.jobs_at_once("auto") == 4  # no GPU is left idle
    monkeypatch.setattr(cores, "cores", lambda: 16)
    assert [cores.gpus_for_each(device) for device in ("auto", "cpu", "cuda:1")] == [1, 0, 1]
    monkeypatch.setattr(cores, "gpus", lambda: 0)
    assert [cores.jobs_at_once(device) for device in ("auto", "cpu")] == [16, 16]
    assert cores.gpus_for_each("auto") == 0


def test_an_unknown_plugin_is_reported_as_not_installed() -> None:
    from vae_cli.config.messages import translate

    error = RuntimeError(
        "Unknown plugin class : 'hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher'"
    )
    message = translate(error, ["hydra/launcher=submitit_slurm"])
    assert isinstance(message, UserError)
    assert "hydra/launcher=submitit_slurm is not installed: type pip install 'vae-cli[slurm]'." in str(message)


def test_the_folder_of_a_sweep_names_its_runs(one_by_one: Path) -> None:
    sweep = next((one_by_one / "runs/.sweeps").iterdir())
    assert [path.relative_to(one_by_one).as_posix() for path in find_runs(sweep)] == [
        f"runs/digits/latent-2_network.hidden-16{sigma}{seed}"
        for sigma in ("", "_sigma-fixed", "_sigma-deterministic")
        for seed in ("", "_seed-1")
    ]
    (sweep / "sweep.json").write_text(
        json.dumps({"runs": ["../../../elsewhere", "../../digits/gone", "../../../runs"]})
    )
    assert find_runs(sweep) == []
    (sweep / "sweep.json").write_text('{"runs": 3}')
    with pytest.raises(Failure, match="is damaged"):
        find_runs(sweep)


def test_slurms_queue_tells_which_jobs_have_ended() -> None:
    listed = "12|RUNNING\n13_0|PENDING\n13_1|CANCELLED\n14|CONFIGURING\n15|REQUEUED\n"
    states = states_of(["12", "13_0", "13_1", "14", "15", "16"], listed)
    assert {job: state["State"] for job, state in states.items()} == {
        "12": "RUNNING",
        "13_0": "RUNNING",
        "13_1": "CANCELLED",
        "14": "RUNNING",
        "15": "RUNNING",
        "16": "ENDED",
    }


def test_jobs_that_are_launched_one_by_one_are_never_launched_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LOOK", 0.01)
    folders = Folders(dict.fromkeys(range(4), "waiting"))

    class Losing(Dying):
        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            self.launched.append([words[0] for words in job_overrides])
            raise RuntimeError("the result is lost")

    inner = Losing(folders, [])
    config = OmegaConf.create({"hydra": {"launcher": {"_target_": "x.LocalLauncher"}}})
    found = runner.Runner(inner, config, monitor=folders.monitor)
    outcomes = found.run([runner.Job(number, [f"seed={number}"]) for number in range(4)])
    assert sorted(inner.launched) == [[f"seed={number}"] for number in range(4)]
    assert all("it did not start" in str(outcome) for outcome in outcomes)
