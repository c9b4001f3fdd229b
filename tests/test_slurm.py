"""Sweeps on a real Slurm of one node, which slurm.sh starts if Slurm is installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vae_cli.runs.checkpoint import load_checkpoint
from vae_cli.runs.folder import RunDir

SCRIPT = Path(__file__).with_name("slurm.sh")
QUICK = ["epochs=2", "network.hidden=[32]"]
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which a command finds the cluster."""
    if not all(shutil.which(program, path=PATH) for program in ("slurmctld", "slurmd", "sbatch", "munged")):
        pytest.skip("Slurm is not installed: apt-get install slurm-wlm munge")
    plugin = "hydra_plugins.hydra_submitit_launcher"
    pytest.importorskip(plugin, reason="The launcher is not installed: pip install hydra-submitit-launcher")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons can only be started by root")
    folder = tmp_path_factory.mktemp("cluster") / "slurm"
    started = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True, timeout=120)
    assert started.returncode == 0, started.stderr
    name, _, value = started.stdout.strip().removeprefix("export ").partition("=")
    try:
        yield {**os.environ, name: value}
    finally:
        subprocess.run([SCRIPT, "stop", folder], check=True, timeout=120)


def train(
    here: Path, *words: str, env: dict[str, str] | None = None, timeout: int = 240
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vae_cli", "train", *words]
    return subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, timeout=timeout)


def assert_same(a: Path, b: Path) -> None:
    """Assert that runs have the same figures and the same weights, to the last bit."""
    assert RunDir(a).summary()["test"] == RunDir(b).summary()["test"]
    weights = [load_checkpoint(run / "checkpoint.pt")["model"] for run in (a, b)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_jobs_of_slurm_end_like_those_of_the_basic_launcher(
    slurm: dict[str, str], commands: Any, tmp_path: Path
) -> None:
    words = ["-m", "sigma=learned,fixed,deterministic", *QUICK]
    for launcher in ("basic", "submitit_slurm"):
        launched = [*words, f"hydra/launcher={launcher}", f"runs_dir={launcher}"]
        done = commands.run("train", *launched, cwd=tmp_path, environment=slurm)
        assert done.returncode == 0, done.stderr
        assert "3 jobs: 3 to run" in done.stdout
    runs = sorted((tmp_path / "basic/digits").iterdir())
    assert len(runs) == 3
    for run in runs:
        assert_same(run, tmp_path / "submitit_slurm/digits" / run.name)
    assert len(list(tmp_path.glob("submitit_slurm/.sweeps/*/.submitit/*/*_result.pkl"))) == 3  # Slurm ran them


@pytest.mark.slow
def test_a_failed_job_does_not_stop_the_others(slurm: dict[str, str], commands: Any, tmp_path: Path) -> None:
    words = ["optimizer=sgd", "likelihood=gaussian_fixed", "likelihood.scale=1", "optimizer.lr=1e-5,1e30,1e-6"]
    words = ["train", "-m", "hydra/launcher=submitit_slurm", *words, *QUICK]
    done = commands.run(*words, cwd=tmp_path, environment=slurm)
    assert done.returncode == 1
    assert "1 of 3 jobs failed:" in done.stderr
    assert "optimizer.lr=1e+30" in done.stderr
    assert "diverged" in done.stderr
    assert "Traceback" not in done.stderr
    runs = {run.name.rpartition("-lr")[2]: RunDir(run) for run in (tmp_path / "runs/digits").iterdir()}
    states = [run.status() for run in runs.values()]
    assert sorted(states) == ["failed", "finished", "finished"]
    for run in runs.values():
        assert ("Traceback" in run.log_file.read_text()) == (run.status() == "failed")


@pytest.mark.slow
@pytest.mark.skipif("VAE_TEST_SLURM_REQUEUE" not in os.environ, reason="takes minutes: set VAE_TEST_SLURM_REQUEUE=1")
def test_a_job_that_exceeds_its_time_limit_is_requeued_and_resumes(slurm: dict[str, str], tmp_path: Path) -> None:
    """Slurm checks its jobs twice a minute, and waits two minutes before it restarts a requeued job."""
    words = ["network.hidden=[32]", "batch_size=1", "log_every=1000"]  # long epochs, with one checkpoint each
    assert train(tmp_path, *words, "epochs=2", "run_name=speed").returncode == 0
    speed = RunDir(tmp_path / "runs/speed").summary()["images_per_second"]
    # The signal comes at the first check within 30 + 30 seconds of the end: after 60 to 90 seconds.
    words += [f"epochs={round(105 * speed / 1300)}"]
    command = [sys.executable, "-m", "vae_cli", "train", *words, "run_name=whole"]
    whole = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    limits = ["timeout_min=2", "signal_delay_s=30", "max_num_timeout=9"]
    limits = [f"hydra.launcher.{limit}" for limit in limits]
    launcher = ["-m", "hydra/launcher=submitit_slurm", *limits]
    try:
        # overwrite=true does not apply when a requeued job restarts.
        cut = train(tmp_path, *launcher, *words, "run_name=cut", "overwrite=true", env=slurm, timeout=1800)
        _, said = whole.communicate(timeout=1800)
    finally:
        whole.kill()
    assert whole.returncode == 0, said
    assert cut.returncode == 0, cut.stderr
    log = (tmp_path / "runs/cut/train.log").read_text()
    steps = [int(line.split("resuming at step ")[1].split()[0]) for line in log.splitlines() if "resuming" in line]
    assert steps, log
    assert steps[0] > 0
    assert steps == sorted(set(steps))
    assert any(step % 1300 for step in steps)  # resumed within an epoch, not only at its end
    assert log.count("interrupted") == len(steps)
    assert [run.name for run in (tmp_path / "runs").iterdir() if run.name.startswith("cut")] == ["cut"]
    assert_same(tmp_path / "runs/cut", tmp_path / "runs/whole")


@pytest.mark.slow
def test_a_cancelled_job_is_named_and_the_sweep_ends(slurm: dict[str, str], commands: Any, tmp_path: Path) -> None:
    words = ["train", "-m", "hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "network.hidden=[32]"]
    sweep = commands.start(*words, "seed=0,1", "epochs=100000", cwd=tmp_path, environment=slurm)
    try:
        end = time.monotonic() + 120
        while len([file for file in tmp_path.rglob("metrics.jsonl") if file.stat().st_size]) < 1:
            assert time.monotonic() < end
            time.sleep(0.2)
        subprocess.run(["scancel", "--me"], env=slurm, check=True)
        sweep.wait()
    finally:
        sweep.send(signal.SIGKILL)
    assert sweep.returncode == 1
    said = sweep.stderr
    assert "2 of 2 jobs failed" in said
    assert "the same command again" in said
    assert "Traceback" not in said
    assert "sacct" not in said
