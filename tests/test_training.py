"""Runs as a user starts them: what they write, how they resume, how they end."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import pty
import re
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from rich.console import Console

from vae_cli import load_run
from vae_cli.axes.dataset import data_folder
from vae_cli.cli import run as run_command
from vae_cli.commands.train import train as train_command
from vae_cli.config.build import build_experiment
from vae_cli.config.settings import SETTINGS
from vae_cli.core.errors import Failure, UserError
from vae_cli.core.files import locked
from vae_cli.core.garbage import USUAL, collect_rarely
from vae_cli.model.vae import VAE
from vae_cli.runs.checkpoint import load_checkpoint
from vae_cli.runs.find import find_runs
from vae_cli.runs.folder import RunDir
from vae_cli.runs.plan import Finished, finished_message
from vae_cli.training.divergence import likely_cause
from vae_cli.training.lifecycle import run_experiment
from vae_cli.training.meter import Meter, NotFinite

COSINE = ["+schedule@optimizer.lr=cosine", "optimizer.lr.start=1e-2", "optimizer.lr.stop=0", "optimizer.lr.epochs=5"]
QUICK = ["epochs=2", "network.hidden=[32]", "log_every=5"]
Compose = Callable[..., dict[str, Any]]

TERMS = {"loss", "distortion", "penalty", "rate", "rate_loc", "rate_scale", "elbo"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*overrides: str, **flags: Any) -> None:
    train_command([*QUICK, *overrides], **flags)


def weights(run: Path, file: str = "checkpoint.pt") -> dict[str, torch.Tensor]:
    return load_checkpoint(run / file)["model"]  # type: ignore[no-any-return]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def wait_for_epochs(run: Path, count: int, process: Any) -> None:
    deadline = time.monotonic() + 120
    while len(RunDir(run).metrics()) < count:
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_a_run_writes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("sigma=fixed", "network.hidden=[32]")
    run = here / "runs/digits/network.hidden-32_sigma-fixed"
    names = {path.name.split(".")[0] for path in run.iterdir()}
    assert names >= {"config", "", "checkpoint", "best", "metrics", "summary", "events", "train"}
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) >= {
        *("status", "train", "validation", "test", "config", "versions", "device", "seconds", "images_per_second")
    }
    assert summary["status"] == "finished"
    assert set(summary["train"]) == TERMS
    assert set(summary["validation"]) == set(summary["test"]) == {*TERMS, "rate_bits", "active_units"}
    test = summary["test"]
    assert test["elbo"] == pytest.approx(-(test["distortion"] + test["rate"]))
    assert test["loss"] == pytest.approx(test["distortion"] + test["penalty"])
    assert test["rate"] == pytest.approx(test["rate_loc"] + test["rate_scale"])
    assert test["rate_bits"] == pytest.approx(test["rate"] / math.log(2))
    assert test["rate_scale"] == 0.0  # sigma = 1 costs nothing, exactly
    records = RunDir(run).metrics()
    assert [record["epoch"] for record in records] == [1, 2]
    assert records[-1]["step"] == summary["step"] == 2 * math.ceil(1300 / 64)
    printed = capsys.readouterr().out
    assert "vae sample runs/digits/network.hidden-32_sigma-fixed" in printed
    assert "best weights: epoch 2 of 2" in " ".join(printed.split())
    assert RunDir(run).config() == summary["config"]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "default"),
        (["sigma=learned", "sigma=learned"], "default"),
        (["sigma=fixed", "latent=8"], "latent-8_sigma-fixed"),
        (["seed=3", "sigma=fixed", "sigma.value=0.5"], "sigma-fixed_sigma.value-0.5_seed-3"),
        (["sigma=fixed", "sigma.value=1.0", "epochs=7", "device=cpu", "data_dir=x"], "sigma-fixed"),
        (["experiment=cv_vae_loss"], "sigma-fixed_sigma.value-0.7"),
        (["network.hidden=[400,200]"], "network.hidden-400-200"),
        (["+schedule@regularizer.beta=linear"], "regularizer.beta-linear"),
        (["+schedule@regularizer.beta=linear", "regularizer.beta.epochs=3"], None),
        (["likelihood=gaussian", "likelihood.scale=0.1", "optimizer.lr=1e-4"], None),
        (["dataset=image_folder", "dataset.path=/a b/c=d,e"], None),
    ],
)
def test_the_name_of_a_run_lists_what_differs_from_the_defaults(overrides: list[str], name: str | None) -> None:
    from hydra import compose, initialize_config_dir

    from vae_cli.config.catalog import configs_dir
    from vae_cli.config.compose import named_folder

    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        overrides = [
            o if not o.startswith("dataset.path") else f"dataset.path='{o.partition('=')[2]}'" for o in overrides
        ]
        folder = named_folder(compose("train", overrides=overrides, return_hydra_config=True))
    if name is not None:
        assert folder == Path("runs/digits") / name
    assert not set(folder.name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-")


def test_a_finished_run_is_skipped(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("run_name=a")
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    with pytest.raises(Finished) as ended:
        train("run_name=a")
    assert ended.value.exit_code == 0
    assert "runs/a is finished; skipped" in str(ended.value)
    assert before == {path: path.stat().st_mtime_ns for path in here.rglob("*")}


@pytest.mark.parametrize("extra", [[], ["dataset.validation=0"], COSINE], ids=str)
def test_more_epochs_train_a_finished_run_further(here: Path, extra: list[str]) -> None:
    train("run_name=once", "epochs=4", *extra)
    train("run_name=twice", "epochs=2", *extra)
    train("run_name=twice", "epochs=4", *extra)
    assert same(weights(here / "runs/once"), weights(here / "runs/twice"))
    once, twice = (json.loads((here / "runs" / name / "summary.json").read_text()) for name in ("once", "twice"))
    assert {k: once[k] for k in ("train", "validation", "test")} == {
        k: twice[k] for k in ("train", "validation", "test")
    }


def test_an_overwritten_run_comes_back_if_the_new_one_was_never_trained(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train("run_name=a")
    run, before = RunDir(here / "runs/a"), contents(here / "runs/a")
    diverging = ["optimizer=sgd", "optimizer.lr=1e30", "on_divergence=restart", "restarts=1"]
    for _ in range(2):
        with pytest.raises(Failure, match="diverged"):
            train("run_name=a", "overwrite=true", *diverging)
        assert "The earlier run was put back" in capsys.readouterr().err
        assert contents(run.path) == before
    with monkeypatch.context() as patched:
        patched.setattr(RunDir, "write_summary", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            train("run_name=a", "overwrite=true", "seed=1")
    assert contents(run.path) == before


def test_a_run_that_was_set_aside_by_a_killed_one_is_still_the_run(here: Path) -> None:
    train("run_name=a")
    run, before = RunDir(here / "runs/a"), contents(here / "runs/a")
    (run.path / "notes.txt").touch()
    run.set_aside()  # by a process that was then killed
    with pytest.raises(UserError, match=r"runs/a already holds a run with different settings: seed=0 there, 1 here"):
        train("run_name=a", "seed=1")
    with pytest.raises(Finished):
        train("run_name=a")
    assert contents(run.path) == {**before, "notes.txt": b""}
    run.set_aside()
    train("run_name=a", "seed=1", "overwrite=true")
    assert run.config()["seed"] == 1
    assert not run.replaced.exists()


def test_fewer_epochs_than_were_begun_are_refused(here: Path) -> None:
    words = ["run_name=a", "dataset.validation=0"]
    train(*words, "epochs=3")
    run = RunDir(here / "runs/a")
    last = run.metrics()[-1]["step"]
    run.forget_metrics_after(last - 1)  # as if training had stopped in the middle of the third epoch
    run.write_summary({**run.summary(), "status": "interrupted"})
    before = contents(run.path)
    with pytest.raises(UserError, match=rf"already been trained to step {last}, in epoch 3; set epochs=3 or higher"):
        train(*words, "epochs=2")
    assert contents(run.path) == before


@pytest.mark.parametrize(("name", "kind"), [(".replaced", "folder"), (".best.next", "regular file")])
def test_odd_files_in_place_of_a_runs_own_are_named(name: str, kind: str, here: Path) -> None:
    train("run_name=a", "epochs=1")
    (here / "runs/a/.x.part").mkdir()
    odd = here / "runs/a" / name
    os.mkfifo(odd) if kind == "folder" else odd.mkdir()
    with pytest.raises(UserError, match=f"{name} is not a {kind}: remove it"):
        train("run_name=a", "overwrite=true")
    odd.unlink() if kind == "folder" else odd.rmdir()
    train("run_name=a", "epochs=2")


def test_a_hint_repeats_the_flags_that_the_run_needs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_TRUST", "mine")
    assert finished_message(Path("runs/my run")).endswith("vae sample 'runs/my run' --trust mine")


def test_overwrite_trains_from_the_start(here: Path) -> None:
    train("run_name=a")
    (here / "runs/a/samples").mkdir()
    train("run_name=a", "epochs=1", "seed=1", "overwrite=true")
    run = RunDir(here / "runs/a")
    assert [record["epoch"] for record in run.metrics()] == [1]
    assert not (run.path / "samples").exists()
    assert run.config()["seed"] == 1


def test_an_overwritten_run_is_kept_until_the_new_one_has_a_checkpoint(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train("run_name=a")
    run = RunDir(here / "runs/a")
    (run.path / "samples").mkdir()
    before = contents(run.path)

    def fails(*_: object) -> None:
        assert (run.replaced / "checkpoint.pt").exists()
        assert list(run.replaced.glob("events.*"))
        assert not list(run.replaced.glob("*tfevents*"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("vae_cli.training.loop.end_epoch", fails)
        with pytest.raises(KeyboardInterrupt):
            train("run_name=a", "seed=1", "overwrite=true")
    assert "which was trained for 2 epochs; it is kept until" in capsys.readouterr().err
    assert contents(run.path) == before
    assert not (run.path / ".hydra").exists()  # it described the other run
    run.set_aside()  # and then killed
    train("run_name=a,b", multirun=True, dry_run=True)
    assert "2 jobs: 1 finished (to put back" in capsys.readouterr().out
    with pytest.raises(Finished):
        train("run_name=a")
    assert "the earlier run was put back" in capsys.readouterr().err
    run.replaced.mkdir()
    run.checkpoint_file.rename(run.replaced / "checkpoint.pt")  # killed while the files were moved
    train("run_name=a", dry_run=True)
    assert "1 job: 1 finished (to put back" in capsys.readouterr().out
    with pytest.raises(Finished):
        train("run_name=a")
    assert contents(run.path) == before
    train("run_name=a", "seed=1", "overwrite=true")
    assert not run.replaced.exists()
    assert run.config()["seed"] == 1


def contents(folder: Path) -> dict[str, bytes | None]:
    """All files of a run, except its lock and Hydra's record of the last command."""
    files = (path for path in folder.rglob("*") if path.name != ".lock" and ".hydra" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in files}


@pytest.mark.parametrize("is_putting_back", [False, True])
def test_an_overwritten_run_survives_a_kill_between_any_two_moves(
    is_putting_back: bool, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("run_name=a")
    run = RunDir(here / "runs/a")
    before = contents(run.path)

    class Killed(BaseException):
        pass

    for moves in range(len(before) + 1):
        if is_putting_back:
            run.set_aside()
            for name in ("config.yaml", "events.out.tfevents.1", "metrics.jsonl"):  # of the run that was to replace it
                (run.path / name).write_text("new")
        left = [moves]

        def move(source: Path, target: Path, left: list[int] = left) -> None:
            if not left[0]:
                raise Killed
            left[0] -= 1
            source.rename(target)

        with monkeypatch.context() as patched, suppress(Killed):
            patched.setattr("vae_cli.runs.folder.os.replace", move)
            run.put_back() if is_putting_back else run.set_aside()
        run.put_back()
        assert contents(run.path).keys() - before.keys() <= {".replaced"}
        assert {name: content for name, content in contents(run.path).items() if name in before} == before


PHOTOS = ["dataset=image_folder", "dataset.path=photos", "dataset.side=8", "data_dir=data", "epochs=1"]


def photos(here: Path) -> None:
    (here / "photos").mkdir()
    for number in range(30):
        Image.new("L", (8, 8), 5 * number).save(here / "photos" / f"{number}.png")


def test_a_continuation_that_is_refused_changes_nothing(here: Path) -> None:
    photos(here)
    train(*PHOTOS, "run_name=a")
    before = contents(here / "runs/a")
    Image.new("L", (8, 8), 255).save(here / "photos" / "new.png")
    with pytest.raises(UserError, match="have changed since its checkpoint was saved"):
        train(*PHOTOS, "run_name=a", "epochs=2")
    assert contents(here / "runs/a") == before


def test_finished_runs_on_images_that_have_changed_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos(here)
    train(*PHOTOS, "sigma=learned,fixed", multirun=True)
    capsys.readouterr()
    train(*PHOTOS, "sigma=learned,fixed", multirun=True)
    assert "warning" not in capsys.readouterr().out
    Image.new("L", (8, 8), 255).save(here / "photos" / "new.png")
    train(*PHOTOS, "sigma=learned,fixed,shared", multirun=True)
    assert "2 of the runs were trained before files of the images changed" in capsys.readouterr().out
    with pytest.raises(Finished, match="The images have changed since it was trained"):
        train(*PHOTOS, "sigma=fixed")
    shutil.rmtree(here / "photos")
    with pytest.raises(Finished, match="a larger epochs"):
        train(*PHOTOS, "sigma=fixed")


def test_training_ends_when_the_validation_loss_has_not_fallen_for_a_while(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["optimizer.lr=0.03", "epochs=200"]
    train("run_name=a", *words, "patience=2")
    run = RunDir(here / "runs/a")
    assert "ending after epoch" in capsys.readouterr().err
    losses = [record["validation/loss"] for record in run.metrics()]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 < 200
    assert all(loss < max(losses[max(0, at - 2) : at]) for at, loss in enumerate(losses[:best]) if at)
    summary = run.summary()
    assert (summary["epoch"], summary["weights_of_epoch"]) == (best + 2, best)
    with pytest.raises(Finished, match="type a larger patience"):
        train("run_name=a", *words, "patience=2")
    train("run_name=a", *words, "patience=5")  # goes on as if this had been typed first
    train("run_name=b", *words, "patience=5")
    assert same(weights(run.path), weights(here / "runs/b"))
    train("run_name=a", f"epochs={run.summary()['epoch'] + 1}", *words[:1])
    assert run.summary()["epoch"] == RunDir(here / "runs/b").summary()["epoch"] + 1


def test_patience_needs_validation_images_and_a_constant_loss(here: Path) -> None:
    with pytest.raises(UserError, match="patience needs validation images"):
        train("patience=2", "dataset.validation=0")
    with pytest.raises(UserError, match="no job was started: patience needs validation images"):
        train("patience=2", "dataset.validation=5,0", multirun=True)
    rising = ["+schedule@regularizer.beta=linear", "regularizer.beta.start=0", "regularizer.beta.stop=100"]
    train("run_name=a", *rising, "regularizer.beta.epochs=6", "epochs=6", "patience=1")
    assert RunDir(here / "runs/a").summary()["epoch"] == 6


def test_a_single_edited_image_is_noticed(here: Path) -> None:
    photos(here)
    train(*PHOTOS, "run_name=a")
    for number in range(30):  # the fingerprint reads the pixels of only some images
        file = here / "photos" / f"{number}.png"
        before, times = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
        Image.new("L", (8, 8), 5 * number + 1).save(file)
        with pytest.raises(UserError, match=r"have changed since its checkpoint.*runs_dir=FOLDER"):
            train(*PHOTOS, "run_name=a", "epochs=2")
        with pytest.raises(UserError, match="have changed since it was trained"):
            _ = load_run(here / "runs/a", data_dir=here / "data").splits
        file.write_bytes(before)
        os.utime(file, ns=times)
    with pytest.raises(UserError, match="have changed since they were packed"):
        _ = load_run(here / "runs/a").splits
    train(*PHOTOS, "run_name=a", "epochs=2")


def test_a_run_with_other_settings_is_refused_and_they_are_named(here: Path) -> None:
    train("run_name=a")
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    with pytest.raises(UserError, match=r"latent=16 there, 3 here.*overwrite=true"):
        train("run_name=a", "latent=3")
    assert before == {path: path.stat().st_mtime_ns for path in here.rglob("*")}


def test_a_folder_with_other_files_is_refused(here: Path) -> None:
    (here / "runs/a").mkdir(parents=True)
    (here / "runs/a/thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        train("run_name=a", "overwrite=true")
    assert [path.name for path in (here / "runs/a").iterdir()] == ["thesis.tex"]


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.parametrize("extra", [[], ["checkpoint_minutes=0.0005"]], ids=["by epoch", "within epochs"])
def test_a_killed_run_is_resumed_by_the_same_command(commands: Any, here: Path, extra: list[str]) -> None:
    words = ["train", "epochs=12", "network.hidden=[32]", "log_every=7", "batch_size=16", *extra]
    whole = commands.run(*words, "run_name=whole", cwd=here)
    assert whole.returncode == 0, whole.stderr
    killed = commands.start(*words, "run_name=killed", cwd=here)
    run = here / "runs/killed"
    wait_for_epochs(run, 4, killed)
    killed.send(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert RunDir(run).status() == "interrupted"
    assert len(RunDir(run).metrics()) < 12
    again = commands.run(*words, "run_name=killed", cwd=here)
    assert again.returncode == 0, again.stderr
    assert "Resuming runs/killed at step" in again.stderr
    assert same(weights(run), weights(here / "runs/whole"))
    assert same(weights(run, "best.pt"), weights(here / "runs/whole", "best.pt"))
    for tag in ("curves/loss/train", "curves/rate_scale/train", "curves/elbo/validation", "test/loss"):
        assert curve(run, tag) == curve(here / "runs/whole", tag)
    strip = ("seconds",)
    records = [
        [{k: v for k, v in r.items() if k not in strip} for r in RunDir(p).metrics()]
        for p in (run, here / "runs/whole")
    ]
    assert records[0] == records[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops(commands: Any, here: Path, number: signal.Signals, code: int) -> None:
    process = commands.start("train", "epochs=200", "network.hidden=[32]", "run_name=a", cwd=here)
    wait_for_epochs(here / "runs/a", 3, process)
    process.send(number)
    assert process.wait() == code, process.stderr
    assert "Traceback" not in process.stderr
    run = RunDir(here / "runs/a")
    assert run.status() == "interrupted"
    assert load_checkpoint(run.checkpoint_file)["step"] >= 3 * 21


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
@pytest.mark.parametrize("sweep", [[], ["-m", "seed=0,1", "hydra/launcher=joblib"]], ids=["run", "sweep"])
def test_a_run_whose_terminal_is_closed_is_saved(here: Path, sweep: list[str]) -> None:
    words = ["train", "epochs=2000", "network.hidden=[32]", *sweep]
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-m", "vae_cli", *words])
    drain = threading.Thread(target=read_all, args=(terminal,), daemon=True)
    drain.start()
    deadline = time.monotonic() + 120
    while len(runs := [run for run in find_runs(here / "runs") if len(RunDir(run).metrics()) > 2]) < 1 + bool(sweep):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            pytest.fail(f"training did not start: {list(here.rglob('*'))}")
        time.sleep(0.05)
    os.kill(child, signal.SIGHUP)  # as a shell does; the system sends another when the terminal is gone
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    for run in map(RunDir, runs):
        assert run.status() == "interrupted", run.summary()
        assert load_checkpoint(run.checkpoint_file)["step"] >= 3 * 21


def read_all(descriptor: int) -> None:
    """Read from a terminal until it is closed."""
    with suppress(OSError):
        while os.read(descriptor, 4096):
            pass


LAUNCHER = """
import os, signal, sys
def warned(number, frame):
    os.kill(os.getpid(), signal.SIGTERM)  # as Slurm does when a job is requeued
    print("warned", flush=True)
    {ending}
signal.signal(signal.SIGTERM, lambda number, frame: None)
signal.signal(signal.SIGUSR2, warned)
"""


@pytest.mark.parametrize(
    ("ending", "code", "message"),
    [
        ("sys.exit(-1)", 255, r"stopped at step \d+\n"),
        ("raise RuntimeError('too late.')", 1, r"vae: stopped at step \d+: too late\. Type the same command again"),
        ("return", 0, r"stopped at step \d+\n(.|\n)*stopped at step \d+\n"),
    ],
)
def test_the_handler_of_a_launcher_is_called_when_the_run_is_saved(
    commands: Any, here: Path, ending: str, code: int, message: str
) -> None:
    words = ["train", "epochs=30", "network.hidden=[32]", "run_name=a"]
    process = commands.start(*words, cwd=here, before=LAUNCHER.format(ending=ending))
    run = RunDir(here / "runs/a")
    for epochs in (3, 6):
        wait_for_epochs(run.path, epochs, process)
        process.send(signal.SIGUSR2)
        process.send(signal.SIGTERM)  # a signal that arrives while the step ends
        if ending != "return":
            break
    assert process.wait() == code, process.stderr
    assert re.search(message, process.stderr)
    assert process.stdout.count("warned") == (2 if ending == "return" else 1)
    assert "Traceback" not in process.stderr
    assert run.status() == ("finished" if ending == "return" else "interrupted")
    if code == 255:
        step = load_checkpoint(run.checkpoint_file)["step"]
        assert step >= 3 * 21
        again = commands.run(*words, cwd=here)
        assert f" at step {step}\n" in again.stderr


def test_a_requeued_job_overwrites_only_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_FOLDER", "runs/.sweeps/now/.submitit/%j")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    train("run_name=a", "overwrite=true")
    run = RunDir(here / "runs/a")
    run.write_summary({**run.summary(), "status": "interrupted"})
    before = run.checkpoint_file.stat().st_mtime_ns
    train("run_name=a", "overwrite=true")
    assert run.checkpoint_file.stat().st_mtime_ns == before  # nothing was left to train
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    train("run_name=a", "overwrite=true")
    assert run.checkpoint_file.stat().st_mtime_ns > before


def test_a_loss_that_is_not_finite_stops_the_run(here: Path) -> None:
    with pytest.raises(Failure, match=r"diverged.*at step \d+.*optimizer\.lr") as error:
        train(
            "optimizer=sgd", "optimizer.lr=1e30", "epochs=5", "run_name=a", "likelihood=gaussian", "likelihood.scale=1"
        )
    assert error.value.exit_code == 1
    run = RunDir(here / "runs/a")
    assert run.status() == "failed"
    if run.checkpoint_file.exists():
        assert all(value.isfinite().all() for value in weights(run.path).values())


# With these settings, the learning rate is too large by a factor between 4 and 16.
DIVERGING = ["optimizer=sgd", "optimizer.lr=4", "likelihood=gaussian", "likelihood.scale=1", "run_name=a"]


def test_a_diverging_run_restarts_with_a_smaller_learning_rate(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Failure, match="type on_divergence=restart"):
        train(*DIVERGING)
    train(*DIVERGING, "on_divergence=restart")  # the same run, resumed
    run = RunDir(here / "runs/a")
    summary = run.summary()
    assert summary["status"] == "finished"
    assert summary["restarts"] >= 1
    assert len([said for said in summary["warnings"] if "restarted from step" in said]) == summary["restarts"]
    assert "restarted from step 0" in capfd.readouterr().err
    assert [record["epoch"] for record in run.metrics()] == [1, 2]
    rate = 4 * 0.25 ** summary["restarts"]
    assert curve(run.path, "parameters/learning_rate")[-1][1] == pytest.approx(rate)
    assert all(value.isfinite().all() for value in weights(run.path).values())
    train(*DIVERGING, "on_divergence=restart", "epochs=3")  # the smaller learning rate is remembered
    assert RunDir(here / "runs/a").summary()["restarts"] == summary["restarts"]
    assert curve(run.path, "parameters/learning_rate")[-1][1] == pytest.approx(rate)


def test_a_restart_does_not_depend_on_when_checkpoints_were_saved(here: Path) -> None:
    words = ["optimizer=sgd", "optimizer.lr=3", "on_divergence=restart", "batch_size=100", "epochs=4"]
    train(*words, "run_name=once")
    train(*words, "run_name=often", "checkpoint_minutes=1e-6")
    once, often = (RunDir(here / "runs" / name) for name in ("once", "often"))
    assert once.summary()["restarts"] == often.summary()["restarts"] > 0
    assert same(weights(once.path), weights(often.path))
    assert same(weights(once.path, "best.pt"), weights(often.path, "best.pt"))


def test_the_number_of_restarts_is_limited(here: Path) -> None:
    with pytest.raises(
        Failure, match=r"diverged after 2 restarts: .* at step \d+, probably .*last good checkpoint, from step 0"
    ):
        train(*DIVERGING, "optimizer.lr=1e30", "on_divergence=restart", "restarts=2")
    assert RunDir(here / "runs/a").status() == "failed"


def test_a_scheduled_learning_rate_is_slowed_down_too(here: Path) -> None:
    train(*COSINE, "run_name=a", "epochs=1")
    checkpoint = torch.load(here / "runs/a/checkpoint.pt", weights_only=True)
    torch.save({**checkpoint, "restarts": 1}, here / "runs/a/checkpoint.pt")
    before = curve(here / "runs/a", "parameters/learning_rate")[-1][1]
    train(*COSINE, "run_name=a", "epochs=2")
    assert curve(here / "runs/a", "parameters/learning_rate")[-1][1] < before / 3


@pytest.mark.parametrize(
    ("terms", "cause"),
    [
        (["weights"], "because a step was too large"),
        (["loss", "distortion"], "decoder's output"),
        (["validation/loss", "validation/rate", "validation/penalty"], "codes or their scales"),
        (["loss", "penalty"], "regularizer's weight is too large"),
        (["loss", "distortion", "rate"], "because steps were too large"),
    ],
)
def test_the_likely_cause_is_named(terms: list[str], cause: str) -> None:
    assert cause in likely_cause(terms)


def test_the_first_step_that_is_not_finite_is_named() -> None:
    meter = Meter()
    for step, value in enumerate([1.0, 2.0, math.inf, math.nan], 1):
        meter.add(step, {"loss": torch.tensor([value, 1.0]), "rate": torch.ones(2)})
    with pytest.raises(NotFinite) as error:
        meter.read()
    assert (error.value.step, error.value.terms) == (3, ["loss"])


def test_means_weigh_all_images_equally() -> None:
    meter = Meter()
    meter.add(1, {"loss": torch.tensor([1.0, 2.0, 3.0])})
    meter.add(2, {"loss": torch.tensor([6.0])})
    again = Meter()
    again.load_state_dict(meter.state_dict())
    assert again.point() == again.epoch() == meter.epoch() == {"loss": 3.0}
    assert again.point() == {}


def test_a_point_mass_has_no_rate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("sigma=deterministic", "run_name=a")
    run = RunDir(here / "runs/a")
    undefined = {"rate", "rate_loc", "rate_scale", "rate_bits", "elbo", "active_units", "scale_mean", "scale_min"}
    summary = run.summary()
    for split in ("train", "validation", "test", "posterior"):
        assert not undefined & set(summary[split])
    assert not undefined & {key.rpartition("/")[2] for record in run.metrics() for key in record}
    assert summary["test"]["distortion"] > 0
    assert "elbo" not in capsys.readouterr().out


def test_without_validation_all_images_are_trained_on(here: Path) -> None:
    train("dataset.validation=0", "run_name=a")
    run = RunDir(here / "runs/a")
    summary = run.summary()
    assert summary["validation"] == {}
    assert summary["step"] == 2 * math.ceil(1500 / 64)
    assert not run.best_file.exists()
    assert not any(key.startswith("validation/") for record in run.metrics() for key in record)
    assert "posterior/scale_mean" in run.metrics()[0]


def test_best_weights_have_the_lowest_validation_loss(here: Path) -> None:
    train("epochs=12", "optimizer.lr=2e-2", "run_name=a")
    run = RunDir(here / "runs/a")
    losses = [record["validation/loss"] for record in run.metrics()]
    summary = run.summary()
    assert summary["weights_of_epoch"] == losses.index(min(losses)) + 1
    assert summary["validation"]["loss"] == min(losses)


def test_while_beta_changes_the_newest_weights_are_the_best(here: Path) -> None:
    train("+schedule@regularizer.beta=linear", "regularizer.beta.epochs=50", "epochs=4", "run_name=a")
    run = RunDir(here / "runs/a")
    assert run.summary()["weights_of_epoch"] == 4
    assert curve(run.path, "parameters/beta")[-1][1] == pytest.approx(4 / 50, rel=0.1)


def test_warnings_are_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("regularizer.beta=1000", "epochs=6", "run_name=a")
    assert "posterior collapse" in capsys.readouterr().err
    assert any("posterior collapse" in text for text in RunDir(here / "runs/a").summary()["warnings"])


def test_a_sweep_is_checked_before_its_first_job(here: Path) -> None:
    with pytest.raises(UserError, match="scaled_normal"):
        train("sigma=learned,deterministic", "prior=scaled_normal", multirun=True)
    assert not list(here.rglob("config.yaml"))


@pytest.mark.parametrize("flags", [["-m", "--dry-run"], ["-m", "--cfg", "job"]])
def test_the_runs_of_a_sweep_are_listed_without_training(
    flags: list[str], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train("sigma=fixed", "epochs=1")
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()}
    capsys.readouterr()
    words = [*QUICK[1:], "epochs=1", "sigma=learned,fixed", "latent=16,3"]
    monkeypatch.setattr(sys, "argv", ["vae", "train", *flags, *words])
    assert run_command() == 0
    head, *jobs = capsys.readouterr().out.splitlines()
    assert head == "4 jobs: 1 finished (skipped), 3 to run"
    assert len(jobs) == 4
    assert (
        sum(job.startswith("finished (skipped)  runs/digits/") and "sigma=fixed latent=16" in job for job in jobs) == 1
    )
    assert sum(job.startswith("to run ") and "latent=3" in job for job in jobs) == 2
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()} == before


def test_a_single_run_is_checked_without_training(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, code, said in [
        (["latent=3"], 0, "to run  runs/digits/latent-3"),
        (["latent=3,4"], 2, "type -m to sweep over them"),
        (["latent=0"], 2, "between 1 and 100000"),
        (["--cfg", "job"], 2, "--dry-run and --cfg cannot be given together"),
        (["--repeat", "a"], 2, "leave out --dry-run"),
        (["-m", "hydra/sweeper=optuna", "latent=choice(2,3)"], 0, "No run was started"),
    ]:
        monkeypatch.setattr(sys, "argv", ["vae", "train", "--dry-run", *words])
        assert run_command() == code
        output = capsys.readouterr()
        assert said in output.out + output.err
    assert not [path for path in here.rglob("*") if path.is_file()]


def test_a_sweep_says_if_its_finished_runs_were_trained_for_longer(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train("sigma=learned", "epochs=4")
    train("sigma=fixed", "epochs=3")
    capsys.readouterr()
    train("sigma=learned,fixed,shared", "epochs=2", multirun=True)
    out = capsys.readouterr().out
    assert (
        "3 jobs: 2 finished (skipped), 1 to run\nwarning: 2 of the finished runs were trained for 3 and 4 epochs" in out
    )
    assert "not 2. For runs of equal length, type epochs=4, runs_dir=FOLDER (a new folder), or overwrite=true." in out
    train("sigma=learned,fixed,shared", "epochs=4", multirun=True)
    assert "warning" not in capsys.readouterr().out
    train("seed=1", "epochs=2")
    monkeypatch.setattr(sys, "argv", ["vae", "compare", "--jobs", "1", "--profile", "quick"])
    assert run_command() == 0
    assert "Some arms differ only in epochs (2, 4)" in " ".join(capsys.readouterr().out.split())


def test_the_same_sweep_again_trains_the_missing_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("sigma=learned,fixed", multirun=True)
    runs = sorted(path.parent for path in (here / "runs").rglob("config.yaml") if ".hydra" not in path.parts)
    assert [run.name for run in runs] == ["network.hidden-32", "network.hidden-32_sigma-fixed"]
    before = {run: (run / "checkpoint.pt").stat().st_mtime_ns for run in runs}
    capsys.readouterr()
    train("sigma=learned,fixed,deterministic", multirun=True)
    out, err = capsys.readouterr()
    assert out.startswith("3 jobs: 2 finished (skipped), 1 to run\n1 of 1: epochs=2 ")
    assert out.count("finished  ") == 3  # the final table has a row for each run
    assert "next:\n  vae compare runs/digits" in out
    assert "epoch" not in err  # a run of a sweep prints no epochs
    assert before == {run: (run / "checkpoint.pt").stat().st_mtime_ns for run in runs}
    assert (here / "runs/digits/network.hidden-32_sigma-deterministic/summary.json").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["latent=-3"], "latent=-3 is not allowed: it must be a whole number between 1 and 100000"),
        (["latent=abc"], "latent=abc is not allowed"),
        (["latent=2.5"], r"latent=2\.5 is not allowed"),
        (["sigma=fixed", "sigma.value=0"], r"sigma\.value=0 .*sigma=deterministic"),
        (["sigma=fixed", "sigma.value=-1"], r"sigma\.value=-1 .*sigma=deterministic"),
        (["sigma=fixed", "sigma.value=abc"], r"sigma\.value=abc is not allowed"),
        (["batch_size=0"], "batch_size=0"),
        (["epochs=-1"], "epochs=-1"),
        (["seed=-1"], "seed=-1"),
        (["precision=float8"], "precision=float8.*float32.*tf32.*bfloat16"),
        (["device=tpu"], "device=tpu"),
        (["device=cuda:99"], "device=cuda:99"),
        (["network.hidden=400"], r"network\.hidden=400"),
        (["network.hidden=[0]"], r"network\.hidden"),
        (["network.activation=rellu"], "rellu"),
        (["regularizer.beta=-1"], r"regularizer\.beta=-1"),
        (["optimizer.lr=-1"], r"optimizer\.lr=-1"),
        (["dataset.validation=1500"], "1500"),
        (["dataset.validation=-1"], r"dataset\.validation=-1"),
        (["likelihood=bernoulli", "likelihood.binarize=maybe"], "none, dynamic or threshold"),
        (["likelihood=gaussian", "likelihood.scale=0"], r"likelihood\.scale=0"),
        (["sigma=deterministic", "regularizer=free_bits"], "regularizer=free_bits.*sigma=deterministic"),
        (["sigma=deterministic", "regularizer=capacity"], "regularizer=capacity.*sigma=deterministic"),
        (["sigma=deterministic", "prior=scaled_normal"], "prior=scaled_normal.*sigma=deterministic"),
        (["dataset=linear_gaussian", "likelihood=bernoulli"], "likelihood=bernoulli.*dataset=linear_gaussian"),
        (["dataset=linear_gaussian", "network=conv", "likelihood=gaussian"], "network=conv.*4x4"),
        (
            ["+schedule@sigma.value=linear", "sigma=fixed"],
            r"goes from 0 to 1.*between 1e-06 and 1e\+06: set the schedule's start",
        ),
        (["+schedule@sigma.value=linear"], "sigma=fixed has it"),
        (["+schedule@latent=linear"], r"latent=\(a schedule\) is not allowed"),
        (["sigma=fixed", "sigma.value=1e-300"], "between 1e-06"),
        (["sigma=fixed", "sigma.value=1e30"], "and 1e"),
        (["sigma._target_=os.system"], "VAE_TRUST"),
        (["sigma._target_=vae_cli.core.files.Path"], "VAE_TRUST"),
        (["sigma._target_=vae_cli.axes.sigma.other.Delta"], "not a|VAE_TRUST"),
        (["sigma._target_=vae_cli.axes.sigma.Lerned"], "Learned"),
        (["+optimizer.momentm=1"], r"optimizer\.momentm"),
        (["+schedule@optimizer.lr=linear"], r"optimizer\.lr\.start=1e-3"),
        (["regularizer=energy", "prior=scaled_normal"], "regularizer=energy.*prior=scaled_normal"),
        (["regularizer=none", "prior=scaled_normal"], "regularizer=none.*prior=scaled_normal"),
        (["sigma._target_=vae_cli.axes.prior.StandardNormal"], "not a Sigma"),
        (["sigma._target_=vae_cli.__main__.main"], "VAE_TRUST"),
        (["threads=0"], "threads=0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_with_a_message(here: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        train_command(overrides)
    assert error.value.exit_code == 2
    assert not list(here.iterdir())


def test_users_own_class_needs_consent(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "mine.py").write_text(
        "from vae_cli.axes.sigma import Fixed\n"
        "class Loud(Fixed):\n    def __init__(self):\n        super().__init__(2.0)\n"
    )
    (here / "own/sigma").mkdir(parents=True)
    (here / "own/sigma/loud.yaml").write_text("# N(loc, 4)\n_target_: mine.Loud\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("VAE_TRUST", raising=False)
    with pytest.raises(UserError, match="--trust mine"):
        train("sigma=loud", config_dir=str(here / "own"))
    monkeypatch.setenv("VAE_TRUST", "")  # so that the fixture undoes --trust
    words = ["sigma=loud", "--config-dir", str(here / "own"), "--trust", "mine"]
    monkeypatch.setattr(sys, "argv", ["vae", "train", *QUICK, *words])
    assert run_command() == 0
    summary = RunDir(here / "runs/digits/network.hidden-32_sigma-loud").summary()
    assert summary["posterior"]["scale_mean"] == 2.0


def test_read_only_folder(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise PermissionError(13, "Permission denied", "runs/a")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(sys, "argv", ["vae", "train", *QUICK, "run_name=a"])
    assert run_command() == 1
    assert "Permission denied" in capsys.readouterr().err


def test_full_disk(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    train("run_name=a", "epochs=1")
    before = weights(here / "runs/a")

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", "checkpoint.pt")

    monkeypatch.setattr("torch.save", full)
    monkeypatch.setattr(sys, "argv", ["vae", "train", *QUICK, "run_name=a", "epochs=3"])
    assert run_command() == 1
    assert "No space left" in capsys.readouterr().err
    assert same(weights(here / "runs/a"), before)
    assert not [path for path in (here / "runs/a").iterdir() if path.name.endswith(".part")]


def test_a_running_run_is_not_started_twice(here: Path) -> None:
    train("run_name=a", "epochs=1")
    run = RunDir(here / "runs/a")
    run.write_summary({**run.summary(), "status": "running", "pid": 12345, "host": "elsewhere"})
    assert run.status() == "interrupted"  # nobody holds the lock
    with locked(run.lock_file) as is_ours:
        assert is_ours
        assert run.status() == "running"
        for more in ([], ["overwrite=true"]):
            with pytest.raises(UserError, match="12345 on elsewhere"):
                train("run_name=a", "epochs=3", *more)
    train("run_name=a", "epochs=3")
    assert run.status() == "finished"


def test_a_run_that_finished_in_the_meantime_is_skipped(here: Path, compose: Compose) -> None:
    experiment = build_experiment(compose(*QUICK, "run_name=a"))
    train("run_name=a")
    (here / "runs/a/samples").mkdir()
    with pytest.raises(Finished):
        run_experiment(experiment, RunDir(here / "runs/a"), Console())
    assert (here / "runs/a/samples").exists()


def test_training_collects_garbage_as_often_as_python_does_by_default(here: Path) -> None:
    collect_rarely()
    assert gc.get_threshold()[0] > USUAL[0]
    train("run_name=a")
    assert gc.get_threshold() == USUAL


def test_a_sweep_keeps_nothing_of_its_finished_runs_in_memory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[weakref.ref[VAE]] = []
    init = VAE.__init__

    def noted(self: VAE, *args: Any, **more: Any) -> None:
        init(self, *args, **more)
        models.append(weakref.ref(self))

    monkeypatch.setattr(VAE, "__init__", noted)
    train("seed=0,1,2,3", multirun=True)
    gc.collect()
    assert len(models) >= 4
    assert not [model for model in models if model() is not None]


def test_a_tilde_is_the_home_folder_in_every_path(commands: Any, here: Path) -> None:
    home = here / "home"
    (home / "photos").mkdir(parents=True)
    for number in range(9):
        Image.new("L", (8, 8), 20 * number).save(home / "photos" / f"{number}.png")

    def vae(*words: str) -> str:
        done = commands.run(*words, cwd=here, environment={"HOME": str(home)})
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    folders = [f'{key}="~/{name}"' for key, name in (("runs_dir", "r"), ("data_dir", "d"), ("dataset.path", "photos"))]
    photos = ["dataset=image_folder", "dataset.side=8", "dataset.validation=2", "dataset.test=3"]
    vae("train", "-m", "seed=0,1", "epochs=1", "network.hidden=[8]", *photos, *folders)
    run = find_runs(home / "r")[0]
    assert list(home.glob("d/packed/*"))
    assert list(home.glob("r/.sweeps/*"))
    assert run.name in vae("runs", "~/r")
    vae("sample", f"~/{run.relative_to(home)}", "--out=~/pictures")
    vae("interpolate", run.name, "--runs-dir=~/r", "--out=~/pictures", "--count", "1")
    assert len(list(home.glob("pictures/*.png"))) == 2
    vae("compare", "~/r", "--out=~/compared")
    assert (home / "compared" / "report.html").is_file()
    assert [path.name for path in here.iterdir()] == ["home"]


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (
            ['runs_dir="~nobody-here/x"'],
            {},
            "runs_dir=~nobody-here/x: this home folder is unknown. Give the full path.",
        ),
        (["dataset=mnist", 'data_dir="~nobody-here/x"'], {}, "data_dir=~nobody-here/x: this home folder is unknown"),
        (["dataset=mnist"], {"VAE_DATA_DIR": "~nobody-here"}, "VAE_DATA_DIR=~nobody-here: this home folder is unknown"),
        (["dataset=image_folder", 'dataset.path="~nobody-here"'], {}, "dataset.path=~nobody-here: this home folder"),
    ],
)
def test_an_unknown_home_folder_is_a_user_error(
    commands: Any, here: Path, words: list[str], variables: dict[str, str], message: str
) -> None:
    done = commands.run("train", *words, cwd=here, environment=variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert list(here.iterdir()) == []


def test_without_a_home_folder_the_folder_for_datasets_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("VAE_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(UserError, match=r"home folder is unknown\. Give a folder for datasets: data_dir=FOLDER"):
        data_folder(None)


def test_fewer_epochs_than_were_trained_are_refused(here: Path) -> None:
    train("run_name=a", "epochs=4")
    run = RunDir(here / "runs/a")
    run.write_summary({**run.summary(), "status": "interrupted"})
    with pytest.raises(UserError, match="epochs=4 or higher"):
        train("run_name=a", "epochs=3")


def test_a_run_finishes_despite_lost_records(here: Path) -> None:
    train("run_name=a", "epochs=2", "dataset.validation=0")
    run = RunDir(here / "runs/a")
    run.write_summary({**run.summary(), "status": "interrupted"})
    run.metrics_file.write_text("")
    train("run_name=a", "epochs=2", "dataset.validation=0")
    assert run.status() == "finished"
    assert run.summary()["train"]["loss"] != 0


def test_images_that_have_changed_are_refused(here: Path) -> None:
    from PIL import Image

    (here / "photos").mkdir()
    for number in range(60):
        Image.new("L", (8, 8), number * 4).save(here / f"photos/{number}.png")
    words = ["dataset=image_folder", "dataset.path=photos", "dataset.side=8", "dataset.channels=1", "dataset.test=10"]
    words += ["dataset.validation=10", "run_name=a", f"data_dir={here}/cache"]
    train(*words)
    Image.new("L", (8, 8), 255).save(here / "photos/more.png")
    with pytest.raises(UserError, match="have changed"):
        train(*words, "epochs=4")
    with pytest.raises(UserError, match="have changed"):
        _ = load_run(here / "runs/a").splits


def test_short_runs_have_training_curves(here: Path) -> None:
    train("run_name=a", "epochs=3", "log_every=1000", "batch_size=5000")
    assert [step for step, _ in curve(here / "runs/a", "curves/loss/train")] == [1, 2, 3]


@pytest.mark.parametrize("file", ["summary.json", "config.yaml", "metrics.jsonl", "checkpoint.pt"])
def test_a_damaged_run_can_be_trained_again(here: Path, file: str) -> None:
    train("run_name=a")
    (here / "runs" / "a" / file).write_text('{"stat')
    if file != "metrics.jsonl":
        with pytest.raises(Failure, match="overwrite=true"):
            train("run_name=a", "epochs=9")
    train("run_name=a", "overwrite=true")
    assert RunDir(here / "runs" / "a").status() == "finished"


def test_partial_files_of_a_killed_process_are_removed(here: Path) -> None:
    train("run_name=a")
    part = here / "runs" / "a" / ".checkpoint.pt.abc.part"
    part.write_bytes(b"half")
    train("run_name=a", "epochs=4")
    assert not part.exists()


def test_a_sweep_that_is_refused_leaves_nothing_behind(here: Path) -> None:
    with pytest.raises(UserError, match="no job was started"):
        train("latent=2,-3", multirun=True)
    assert list(here.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not name open files")
def test_a_full_disk_in_a_sweep_is_reported(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = os.fsync

    def full(descriptor: int) -> None:
        if ".sweeps" in os.readlink(f"/proc/self/fd/{descriptor}"):
            return flush(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Failure, match=r"2 of 2 jobs failed:\n.*No space left on device\. Make room.*\n.*No space left"):
        train("latent=2,3", multirun=True)


def test_a_sweep_that_cannot_be_listed_leaves_nothing_behind(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        train("latent=2,3", multirun=True)
    assert not any(here.iterdir())


def test_a_file_in_place_of_a_folder_is_a_user_error(here: Path) -> None:
    (here / "runs").write_text("")
    with pytest.raises(UserError, match="runs is a file, not a folder") as refused:
        train("sigma=fixed")
    assert refused.value.exit_code == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("precision", get_args(SETTINGS["precision"]))
def test_a_gpu_reaches_the_same_quality_in_every_precision(precision: str, here: Path) -> None:
    for device in ("cpu", "cuda"):
        words = [f"device={device}", f"run_name={device}", f"precision={precision if device == 'cuda' else 'float32'}"]
        train(*words, "epochs=30", "network.hidden=[64]")
    losses = [RunDir(here / "runs" / device).summary()["test"]["loss"] for device in ("cpu", "cuda")]
    assert abs(losses[0] - losses[1]) < 2  # nats per image; they differ by 0.5 from seed to seed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_precision_that_the_device_does_not_have_is_refused(here: Path) -> None:
    with pytest.raises(UserError, match="tf32 needs a CUDA GPU, but the device is cpu; type precision=float32"):
        train("precision=tf32", "device=cpu")
    assert not any(here.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
def test_a_compiled_loss_trains_the_same_model(here: Path) -> None:
    for name, compiled in {"eager": "false", "compiled": "true"}.items():
        train("sigma=fixed", f"compile={compiled}", f"run_name={name}")
    losses = [RunDir(here / "runs" / name).summary()["test"]["loss"] for name in ("eager", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert weights(here / "runs/compiled").keys() == weights(here / "runs/eager").keys()
    assert load_run("runs/compiled").sample(2).isfinite().all()


def test_a_loss_that_cannot_be_compiled_is_reported(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: Any, **_: Any) -> Any:
        def failing(x: Any) -> Any:
            raise RuntimeError("no C++ compiler")

        return failing

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(
        Failure, match=r"The loss cannot be compiled here \(no C\+\+ compiler\); leave out compile=true"
    ):
        train("compile=true")
    assert not any(here.iterdir())
