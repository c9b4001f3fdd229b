"""Many steps and many runs: memory stays flat, event files stay small, lists stay quick."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vae_cli.commands.train import train
from vae_cli.metrics.evaluate import evaluate_run
from vae_cli.runs.folder import RunDir

MB = 1 << 20


def memory() -> int:
    """Return the current memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("there is no RssAnon")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_memory_stays_flat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_long: bool, record_property: Callable[[str, str], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    from vae_cli.training import loop

    per_epoch = 162  # 1297 images in batches of 8
    epochs = 100_000 // per_epoch + 1 if is_long else 40
    held: dict[int, int] = {}
    append = RunDir.append_metrics

    def note(self: RunDir, record: dict[str, float]) -> None:
        held[int(record["step"])] = memory()
        append(self, record)

    monkeypatch.setattr(loop.RunDir, "append_metrics", note)
    train([f"epochs={epochs}", "batch_size=8", "network.hidden=[8]", "latent=2", "run_name=a"])
    steps = max(held)
    assert steps >= (100_000 if is_long else 5_000)
    early = max(bytes_ for step, bytes_ in held.items() if step <= steps // 4)
    grown = held[steps] - early
    written = sum(file.stat().st_size for file in (tmp_path / "runs/a").glob("events.*"))
    record_property(f"memory that the last three quarters of {steps} steps added", f"{grown / MB:.1f} MB")
    record_property(f"event files of {steps} steps", f"{written / MB:.1f} MB")
    assert grown < (8 if is_long else 5) * MB
    assert written < 2 * MB + 400 * steps  # a point of the curves every 50 steps, and pictures at milestones


def test_many_runs_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_long: bool, record_property: Callable[[str, str], None]
) -> None:
    """Listing takes time proportional to the number of runs, not to its square."""
    monkeypatch.chdir(tmp_path)
    train(["epochs=1", "network.hidden=[4]", "latent=2", "run_name=a"])
    run = RunDir(tmp_path / "runs/a")
    config = run.config()
    files = ["summary.json", "metrics.jsonl", "best.pt", "checkpoint.pt"]
    if is_long:
        evaluate_run(run, "quick")
        files.append("evaluation/metrics.json")
    few, many = (50, 2000) if is_long else (20, 200)
    for folder, count in (("few", few), ("runs", many)):
        for number in range(count):
            copy = tmp_path / folder / "digits" / f"seed-{number}"
            (copy / "evaluation").mkdir(parents=True)
            RunDir(copy).write_config({**config, "seed": number})
            for file in files:
                os.link(run.path / file, copy / file)

    shutil.rmtree(run.path)

    def seconds(*words: str, **more: str) -> float:
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "vae_cli", *words], capture_output=True, text=True, env={**os.environ, **more}
        )
        assert done.returncode == 0, done.stderr
        assert f"seed-{few - 1}" in done.stdout or f"{many} seeds" in done.stdout or f"{few} seeds" in done.stdout
        return time.perf_counter() - begin

    begun, listed = seconds("runs", "few"), seconds("runs")
    record_property(f"vae runs over {many} runs", f"{listed:.2f} s, over {few} {begun:.2f} s")
    typed = {"_VAE_COMPLETE": "complete_bash", "COMP_WORDS": "vae\nsample\nruns/", "COMP_CWORD": "2"}
    completed = seconds(**typed, _TYPER_COMPLETE_ARGS="vae sample runs/")
    record_property(f"completion of a run's name over {many} runs", f"{completed:.2f} s")
    assert listed < 10 * begun, "ten or forty times the runs, and most of the time is the start of Python"
    if is_long:
        one, all_of_them = seconds("compare", "few"), seconds("compare")
        again = seconds("compare")
        shutil.rmtree("runs/digits/compare")
        command_line = [sys.executable, "-u", "-m", "vae_cli", "compare"]
        begin = time.perf_counter()
        with subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert f"{many} seeds" in process.stdout.readline()
            table = time.perf_counter() - begin
            process.stdout.read()
        said = f"{all_of_them:.1f} s, its table after {table:.2f} s, over {few} {one:.1f} s, asked again {again:.2f} s"
        record_property(f"vae compare over {many} runs", said)
        assert again < all_of_them / 4, "nothing has changed, and what was said is kept"
        assert all_of_them < 4 * one, "forty times the runs, and most of the time goes into the report"
