"""Runs that are killed, or whose disk fails, at any moment: no training is lost, and no figure changes."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from vae_cli.commands.runs import runs as list_runs
from vae_cli.config.catalog import groups
from vae_cli.runs.checkpoint import load_checkpoint
from vae_cli.runs.folder import RunDir

SMALL = ["network.hidden=[8]", "latent=2"]
# Steps take a millisecond, with a checkpoint after each: most kills hit a write.
OFTEN = [*SMALL, "epochs=12", "batch_size=32", "log_every=5", "checkpoint_minutes=1e-6"]
SELDOM = OFTEN[:-1]  # a checkpoint after each epoch

Fault = dict[str, Any]  # see commands.py
Commands = Any


@pytest.fixture(scope="module")
def whole(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert commands.run("train", *OFTEN, "run_name=a", cwd=folder).returncode == 0, commands.err
    return folder / "runs/a"


def equal(a: Any, b: Any) -> bool:
    """Return whether two nested values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def check_survived(run: Path) -> None:
    """Check that no file is damaged after a kill or a fault."""
    folder = RunDir(run)
    for file in (folder.checkpoint_file, folder.best_file):
        if file.exists():
            load_checkpoint(file)
    if folder.config_file.exists():
        folder.config()
        assert folder.status() in ("interrupted", "failed", "finished")
        list_runs(run.parent)


def check_finished(run: Path, whole: Path) -> None:
    """Check that a finished run equals one that was never interrupted."""
    ours, theirs = (load_checkpoint(folder / "checkpoint.pt") for folder in (run, whole))
    for part in ("step", "model", "regularizer", "optimizer", "random", "meter"):
        assert equal(ours[part], theirs[part]), part
    assert equal(*(load_checkpoint(folder / "best.pt")["model"] for folder in (run, whole)))
    assert records(run) == records(whole)
    assert curves(run) == curves(whole)
    ours, theirs = RunDir(run).summary(), RunDir(whole).summary()
    assert ours["status"] == "finished"
    assert all(ours[part] == theirs[part] for part in ("train", "validation", "test", "posterior", "weights_of_epoch"))
    hidden = {path.name for path in run.iterdir() if path.name.startswith(".")}
    assert hidden - {".restart.pt"} == {".hydra", ".lock"}
    assert (".restart.pt" in hidden) == (theirs["config"]["on_divergence"] == "restart")
    assert [path for path in run.rglob("*") if ".part" in path.name or ".new" in path.name] == []


# Kills ----------------------------------------------------------------------------------------------------------------


def kill(commands: Commands, cwd: Path, *argv: str, since: Callable[[], object], seconds: float) -> int:
    """Start a command, kill it some seconds after something changes, and return its exit code."""
    before = since()
    process = commands.start(*argv, cwd=cwd)
    while process.poll() is None and since() == before:
        time.sleep(0.002)
    time.sleep(seconds)
    process.send(signal.SIGKILL)
    ended = process.wait()
    assert ended in (0, -signal.SIGKILL), commands.err
    return int(ended)


def written(folder: Path, pattern: str) -> dict[Path, int]:
    """Return when the files that match a pattern below a folder were last written."""
    times = {}
    for path in folder.rglob(pattern):
        with suppress(FileNotFoundError):
            times[path] = path.stat().st_mtime_ns
    return times


def test_killed_at_any_moment(
    commands: Commands,
    whole: Path,
    tmp_path: Path,
    is_long: bool,
    record_property: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chance = random.Random(0)
    wanted, kills, number = 50 if is_long else 5, 0, 0
    while kills < wanted:
        number += 1
        run, ended = tmp_path / f"runs/run{number}", -signal.SIGKILL
        argv = ("train", *OFTEN, f"run_name={run.name}")
        while ended:
            if kills < wanted:
                since = lambda run=run: written(run, "checkpoint.pt")  # noqa: E731
                ended = kill(commands, tmp_path, *argv, since=since, seconds=chance.uniform(0, 0.2))
            else:
                ended = commands.run(*argv, cwd=tmp_path).returncode
                assert ended == 0, commands.err
            kills += ended != 0
            check_survived(run)
        check_finished(run, whole)
    record_property("kills survived", f"{kills} of {wanted}, in {number} runs")


NARROW = {
    "mlp": ["network.hidden=[8]"], "linear": [], "conv": ["network.width=4", "network.hidden=8"],
    "resnet": ["network.width=4"],
}  # fmt: skip


def kinds_of_runs() -> list[str]:
    """Return overrides that together use every choice, every schedule, and settings with a state of their own."""
    axes = ("sigma", "likelihood", "prior", "network", "regularizer", "optimizer")
    found = [f"{axis}={choice}" for axis in axes for choice in groups()[axis].choices]
    ends = {"constant": "", "cosine": " regularizer.beta.start=1 regularizer.beta.stop=2 regularizer.beta.epochs=2",
            "steps": " regularizer.beta.values=[1,2] regularizer.beta.epochs=[1,1]"}  # fmt: skip
    for schedule in groups()["schedule"].choices:
        found.append(f"+schedule@regularizer.beta={schedule}" + ends.get(schedule, " regularizer.beta.epochs=2"))
    return [
        *found,
        "likelihood=bernoulli likelihood.binarize=dynamic",
        "precision=bfloat16 network=conv",
        "+schedule@optimizer.lr=cosine optimizer.lr.start=1e-3 optimizer.lr.stop=0 max_grad_norm=1",
        "likelihood=gaussian likelihood.scale=optimal prior=scaled_normal sigma=shared",
        "network=conv network.normalization=batch likelihood=discretized_logistic",
        "optimizer=sgd optimizer.momentum=0.9 prior=scaled_normal",
        "on_divergence=restart",
        "patience=1 optimizer.lr=0.1",
        "dataset=shapes dataset.images=200 dataset.test=20 dataset.validation=20",
        " ".join(["batch_size=8", *PHOTOS]),
    ]


def test_every_kind_of_run_survives_kills(
    commands: Commands, tmp_path: Path, is_long: bool, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(3)
    photos(tmp_path)
    kills, kinds = 0, kinds_of_runs()
    chosen = kinds if is_long else chance.sample(kinds, 2)
    for number, words in enumerate(chosen):
        network = next((word.partition("=")[2] for word in words.split() if word.startswith("network=")), "mlp")
        few = [] if "dataset" in words else ["dataset.validation=1000"]
        argv = ["train", *OFTEN[len(SMALL) :], "latent=2", "epochs=3", *NARROW[network], *few, *words.split()]
        whole, run = tmp_path / f"runs/whole{number}", tmp_path / f"runs/run{number}"
        assert commands.run(*argv, f"run_name={whole.name}", cwd=tmp_path).returncode == 0, (words, commands.err)
        for _ in range(2):
            since = lambda run=run: written(run, "checkpoint.pt")  # noqa: E731
            seconds = chance.uniform(0, 0.2)
            kills += kill(commands, tmp_path, *argv, f"run_name={run.name}", since=since, seconds=seconds) != 0
            check_survived(run)
        ended = commands.run(*argv, f"run_name={run.name}", cwd=tmp_path)
        assert ended.returncode == 0, (words, commands.err)
        check_finished(run, whole)
    record_property("kills survived", f"{kills}, of {len(chosen)} kinds of runs")


def writes(*files: str, number: int = 1) -> list[Fault]:
    """Return the moments when files are half written under a temporary name, and before and after they are renamed."""
    return [
        fault
        for folder, name in (file.rsplit("/", 1) for file in files)
        for fault in (
            {"at": "write", "file": f"{folder}/.{name.partition('.')[0]}.", "number": number},
            {"at": "replace", "file": f"{folder}/{name}", "number": number},
            {"at": "replace", "file": f"{folder}/{name}", "number": number, "after": True},
        )
    ]


def appends(file: str, *numbers: int) -> list[Fault]:
    """Return the moments at which an addition to a file is half written."""
    return [{"at": "write", "file": file, "number": number} for number in numbers]


# Kills before the first checkpoint: the next session starts over.
BEFORE_THE_FIRST_CHECKPOINT = [
    *writes("/config.yaml", "/summary.json", "/best.pt", "/events.out.tfevents"),
    *writes("/checkpoint.pt")[:2],
    *appends(".hydra/", 1, 2, 3),
    *appends("tfevents", 1, 2, 3, 4, 12),
    *appends("/metrics.jsonl", 1),
    *appends("/train.log", 1),
]
UNDER_WAY = [
    *appends("/metrics.jsonl", 2),  # this kill comes first: it leaves a checkpoint of the first epoch
    *writes("/metrics.jsonl"),
    *writes("/checkpoint.pt", "/best.pt", number=2)[:-1],
    *writes("/checkpoint.pt")[2:],
]
AT_THE_END = [
    *writes("/projector/tensors.tsv", "/projector/metadata.tsv", "/projector/sprite.png", "/projector_config.pbtxt"),
    *writes("/summary.json", number=2)[:2],
    *writes("/events.out.tfevents", number=2),  # the test figures
    *writes("/events.out.tfevents", number=3),  # the session end
]


def test_killed_during_every_write(
    commands: Commands, whole: Path, tmp_path: Path, is_long: bool, record_property: Any, capsys: Any
) -> None:
    chance, kills = random.Random(1), 0
    run = tmp_path / "runs/a"
    for points in (BEFORE_THE_FIRST_CHECKPOINT, UNDER_WAY, AT_THE_END):
        for fault in (points[0], *chance.sample(points[1:], len(points) - 1 if is_long else 1)):
            ended = commands.run("train", *SELDOM, "run_name=a", cwd=tmp_path, fault=fault).returncode
            assert ended == -signal.SIGKILL, (fault, commands.err)
            kills += 1
            check_survived(run)
    assert commands.run("train", *SELDOM, "run_name=a", cwd=tmp_path).returncode == 0, commands.err
    check_finished(run, whole)
    record_property("kills survived", str(kills))


# Faults ---------------------------------------------------------------------------------------------------------------

ERRORS = [errno.ENOSPC, errno.EACCES, errno.EIO]


def failing(
    named: str, *, at: tuple[str, ...] = ("mkstemp", "write", "fsync", "replace"), number: int = 1
) -> list[Fault]:
    """Return the faults that can hit a file that is replaced, or, if `at` says so, one that is appended to."""
    folder, _, name = named.rpartition("/")
    beside = f"{folder}/.{name.partition('.')[0]}."
    return [
        {"at": one, "file": named if one == "replace" or len(at) < 4 else beside, "number": number, "error": error}
        for one in at
        for error in ERRORS
    ]


ADDED = ("write", "fsync")
# The part of the message that names the file: the faults that hit it, during training and at its end.
FAULTS = {
    "a/config.yaml": failing("a/config.yaml"),
    "a/summary.json": failing("a/summary.json"),
    "a/best.pt": failing("a/best.pt"),
    "a/checkpoint.pt": failing("a/checkpoint.pt"),
    "a/metrics.jsonl": failing("a/metrics.jsonl", at=ADDED),
    "a/events.out.tfevents": [
        *failing("a/events.out.tfevents"),
        *failing("a/events.out.tfevents", at=ADDED),
        *failing("a/events.out.tfevents", at=("write",), number=4),
        *failing("a/events.out.tfevents", at=("write",), number=12),
    ],
}
FAULTS_AT_THE_END = {
    "projector/tensors.tsv": failing("projector/tensors.tsv"),
    "projector/sprite.png": failing("projector/sprite.png"),
    "a/events.out.tfevents": failing("a/events.out.tfevents", number=2),
    "a/summary.json": failing("a/summary.json", number=2),
}


def test_a_fault_is_reported_and_loses_nothing(
    commands: Commands, whole: Path, tmp_path: Path, is_long: bool, record_property: Any, capsys: Any
) -> None:
    chance, faults = random.Random(6), 0
    run, words = tmp_path / "runs/a", ["train", *SELDOM, "run_name=a"]
    for group, moved in ((FAULTS, [None, *appends("/metrics.jsonl", 2)]), (FAULTS_AT_THE_END, [None])):
        for kill_first in moved:  # once in a new run and once in a resumed one
            if kill_first is not None:
                assert commands.run(*words, cwd=tmp_path, fault=kill_first).returncode == -signal.SIGKILL
            all_of_them = [(name, fault) for name in group for fault in group[name]]
            for name, fault in chance.sample(all_of_them, len(all_of_them) if is_long else 2):
                before = load_checkpoint(run / "checkpoint.pt") if (run / "checkpoint.pt").exists() else None
                assert commands.run(*words, cwd=tmp_path, fault=fault).returncode == 1, (fault, commands.err)
                faults += 1
                *_, said = commands.err.splitlines()
                assert commands.err.count("vae: ") == 1, (fault, commands.err)
                assert said.startswith("vae: ")
                # The best weights are written to .best.next, which becomes best.pt.
                assert name in said or name.replace("best.pt", ".best.next") in said, (fault, said)
                assert os.strerror(fault["error"]) in said
                assert "Traceback" not in commands.err
                assert "rror in" not in commands.err  # an error printed by a thread or by logging
                check_survived(run)
                if before is not None:
                    assert load_checkpoint(run / "checkpoint.pt")["step"] >= before["step"]
    assert commands.run(*words, cwd=tmp_path).returncode == 0, commands.err
    check_finished(run, whole)
    record_property("faults survived", str(faults))


def test_a_full_disk_is_reported_and_loses_nothing(
    commands: Commands, whole: Path, tmp_path: Path, is_long: bool, record_property: Any, capsys: Any
) -> None:
    chance, faults = random.Random(7), 0
    run, words = tmp_path / "runs/a", ["train", *SELDOM, "run_name=a"]
    full: list[Fault] = [
        {"at": "write", "file": "/runs/", "number": number, "error": errno.ENOSPC, "stays": True}
        for number in (1, 4, 5, 6, 7, 8, 9, 12, 20, 40)
    ]
    full += [{"at": "size", "number": size} for size in (900, 2000, 5000, 12_000, 20_000)]
    for fault in chance.sample(full, len(full) if is_long else 3):
        assert commands.run(*words, cwd=tmp_path, fault=fault).returncode == 1, (fault, commands.err)
        faults += 1
        assert commands.err.count("vae: ") == 1, (fault, commands.err)
        assert os.strerror(errno.EFBIG if fault["at"] == "size" else errno.ENOSPC) in commands.err
        assert "Traceback" not in commands.err
        assert "rror in" not in commands.err
        check_survived(run)
    assert commands.run(*words, cwd=tmp_path).returncode == 0, commands.err
    check_finished(run, whole)
    record_property("faults survived", str(faults))


def test_a_fault_while_packing_is_reported(
    commands: Commands, tmp_path: Path, is_long: bool, record_property: Any, capsys: Any
) -> None:
    words = photos(tmp_path)
    faults = [
        {**fault, "error": error} for fault in (*PACKING, {"at": "fsync", "file": "/images.npy"}) for error in ERRORS
    ]
    faults = [fault for fault in faults if not fault.get("after")]
    faults = random.Random(8).sample(faults, len(faults) if is_long else 3)
    for fault in faults:
        assert commands.run("train", *words, cwd=tmp_path, fault=fault).returncode == 1, (fault, commands.err)
        assert commands.err.startswith(f"vae: Cannot write to {tmp_path}/data/packed/photos-")
        assert os.strerror(fault["error"]) in commands.err
        assert "Traceback" not in commands.err
        assert list(packed(tmp_path)) == [f"{next((tmp_path / 'data/packed').iterdir()).name}/.lock"]
    assert commands.run("train", *words, cwd=tmp_path).returncode == 0, commands.err
    record_property("faults survived", str(len(faults)))


@pytest.fixture(scope="module")
def halfway(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its fifth epoch, after four checkpoints."""
    folder = tmp_path_factory.mktemp("halfway")
    words = ["train", *SELDOM, "run_name=a"]
    assert commands.run(*words, cwd=folder, fault=appends("/metrics.jsonl", 5)[0]).returncode == -signal.SIGKILL
    return folder / "runs/a"


@pytest.mark.parametrize("name", ["checkpoint.pt", "best.pt", "summary.json", "config.yaml"])
def test_a_truncated_file_is_refused_with_a_message(
    commands: Commands, name: str, halfway: Path, whole: Path, tmp_path: Path, is_long: bool, record_property: Any
) -> None:
    chance, words = random.Random(name), ["train", *SELDOM, "run_name=a"]
    count = 6 if is_long else 1
    for _ in range(count):
        shutil.copytree(halfway, tmp_path / "runs/a")
        file = tmp_path / "runs/a" / name
        good = file.read_bytes()
        file.write_bytes(good[: chance.randrange(len(good) - 2)])
        before = {path: path.read_bytes() for path in file.parent.glob("[!.]*.*")}
        code = commands.run(*words, cwd=tmp_path).returncode
        assert code in (1, 2)  # a truncated config.yaml can be valid, with other settings
        assert commands.err.startswith("vae: ")
        assert commands.err.count("\n") == 1
        assert (f"runs/a/{name} is damaged" if code == 1 else "holds a run with different settings") in commands.err
        assert "overwrite=true" in commands.err
        assert before == {path: path.read_bytes() for path in file.parent.glob("[!.]*.*")}
        if name == "summary.json":
            assert "Remove the file" in commands.err
            file.unlink()
            assert commands.run(*words, cwd=tmp_path).returncode == 0, commands.err
            assert "Resuming runs/a at step" in commands.err
        else:
            assert commands.run(*words, "overwrite=true", cwd=tmp_path).returncode == 0, commands.err
            RunDir(file.parent).config()
        check_finished(file.parent, whole)
        shutil.rmtree(file.parent)
    record_property("cuts met", str(count))


def test_files_that_a_kill_truncates_are_repaired(
    commands: Commands,
    halfway: Path,
    whole: Path,
    tmp_path: Path,
    is_long: bool,
    record_property: Any,
    tensorboard: Callable[..., Callable[..., Any]],
) -> None:
    chance, run = random.Random(9), tmp_path / "runs/a"
    count = 6 if is_long else 1
    for number in range(count):
        shutil.copytree(halfway, run)
        metrics = run / "metrics.jsonl"
        lines = metrics.read_bytes()
        assert not lines.endswith(b"\n")  # half of the fifth line
        start = lines.rindex(b"\n") + 1
        metrics.write_bytes(lines[: chance.randrange(start, len(lines))])
        events = max(run.glob("events.*"))
        content = events.read_bytes()
        points = {tag: dict(found) for tag, found in curves(run).items()}
        events.write_bytes(content[: chance.randrange(1, len(content))])
        assert commands.run("train", *SELDOM, "run_name=a", cwd=tmp_path).returncode == 0, commands.err
        assert records(run) == records(whole)
        for tag, expected in curves(whole).items():  # the truncated points are gone, all others are there once
            found = curves(run)[tag]
            assert [point for point in expected if point in found] == found
            assert [point for point in expected if point[0] > 4 * 41] == [point for point in found if point[0] > 4 * 41]
            assert points.get(tag, {}).keys() >= {step for step, _ in found if step <= 4 * 41}
        if is_long and number == 0:  # TensorBoard's other reader
            get = tensorboard(tmp_path / "runs")
            found = get("plugin/scalars/scalars", run="a", tag="curves/loss/validation")
            assert [(step, value) for _, step, value in found] == curves(run)["curves/loss/validation"]
        shutil.rmtree(run)
    record_property("cuts healed", str(count))


PHOTOS = [
    "dataset=image_folder", "dataset.path=photos", "dataset.side=8", "dataset.channels=1", "dataset.test=10",
    "dataset.validation=10", "data_dir=data",
]  # fmt: skip


def photos(folder: Path) -> list[str]:
    """Make a folder of images and return the words that train on them."""
    from PIL import Image

    for number in range(60):
        file = folder / "photos" / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((9, 9), 10 + number).save(file)
    return [*PHOTOS, *SMALL, "epochs=1", "run_name=a"]


def packed(folder: Path) -> dict[str, bytes]:
    """Return the content of all files in the folder of packs, by name."""
    below = folder / "data/packed"
    return {str(path.relative_to(below)): path.read_bytes() for path in below.rglob("*") if path.is_file()}


PACKING = [
    *appends("/images.npy", 1, 2, 3, 5),
    *appends("/labels.npy", 1, 2),
    *appends("/about.json", 1),
    *[{"at": "replace", "file": "data/packed/", "after": after} for after in (False, True)],
]


def test_killed_while_packing(
    commands: Commands, tmp_path: Path, is_long: bool, record_property: Any, capsys: Any
) -> None:
    chance = random.Random(2)
    words = photos(tmp_path)
    assert commands.run("train", *words, cwd=tmp_path).returncode == 0, commands.err
    good = packed(tmp_path)
    assert len(good) == 4  # including the lock
    kills = 0
    for fault in chance.sample(PACKING, len(PACKING) if is_long else 2):
        shutil.rmtree(tmp_path / "data")
        shutil.rmtree(tmp_path / "runs")
        assert commands.run("train", *words, cwd=tmp_path, fault=fault).returncode == -signal.SIGKILL, (
            fault,
            commands.err,
        )
        kills += 1
        for _ in range(3 if is_long else 1):
            since = lambda: set((tmp_path / "data").rglob("*"))  # noqa: E731
            kills += kill(commands, tmp_path, "train", *words, since=since, seconds=chance.uniform(0, 0.02)) != 0
        if not (tmp_path / "runs/a/summary.json").exists() or RunDir(tmp_path / "runs/a").status() != "finished":
            assert commands.run("train", *words, cwd=tmp_path).returncode == 0, commands.err
        assert packed(tmp_path) == good
        assert not [path for path in tmp_path.rglob(".*") if "part" in path.name]
        assert RunDir(tmp_path / "runs/a").status() == "finished"
    record_property("kills survived", str(kills))


@pytest.mark.parametrize("file", ["images.npy", "labels.npy", "about.json"])
def test_a_truncated_pack_is_packed_again(
    commands: Commands, file: str, tmp_path: Path, is_long: bool, capsys: Any
) -> None:
    from vae_cli.axes.dataset.pack import open_pack

    chance = random.Random(3)
    words = photos(tmp_path)
    assert commands.run("train", *words, cwd=tmp_path).returncode == 0, commands.err
    good = packed(tmp_path)
    (pack,) = (tmp_path / "data/packed").rglob(file)
    whole = pack.read_bytes()
    for length in range(0, len(whole), 1 if is_long else 41):
        pack.write_bytes(whole[:length])
        assert open_pack(pack.parent.parent, pack.parent.name) is None, length
    for length in (0, chance.randrange(len(whole))):
        pack.write_bytes(whole[:length])
        assert commands.run("train", *words, "overwrite=true", cwd=tmp_path).returncode == 0, commands.err
        assert packed(tmp_path) == good


def test_a_sweep_that_is_killed_is_resumed(
    commands: Commands, tmp_path: Path, is_long: bool, record_property: Any, capsys: Any
) -> None:
    chance, kills = random.Random(4), 0
    words = ["train", "-m", *SELDOM, "seed=0,1,2"]
    assert commands.run(*words, "runs_dir=whole", cwd=tmp_path).returncode == 0, commands.err
    for number in range(4 if is_long else 1):
        ended, argv, folder = -signal.SIGKILL, [*words, f"runs_dir=runs{number}"], tmp_path / f"runs{number}/digits"
        for _ in range(3 if is_long else 2):
            since = lambda folder=folder: written(folder, "metrics.jsonl")  # noqa: E731
            ended = kill(commands, tmp_path, *argv, since=since, seconds=chance.uniform(0, 1.5))
            kills += ended != 0
            for run in folder.iterdir():
                check_survived(run)
        if ended:
            assert commands.run(*argv, cwd=tmp_path).returncode == 0, commands.err
        runs = sorted(path.name for path in folder.iterdir())
        assert len(runs) == 3
        for run in runs:
            check_finished(folder / run, tmp_path / "whole/digits" / run)
    record_property("kills survived", str(kills))


def test_a_second_ctrl_c_stops_at_once_and_loses_nothing(
    commands: Commands, whole: Path, tmp_path: Path, is_long: bool, capsys: Any
) -> None:
    chance, run, is_said = random.Random(5), tmp_path / "runs/a", False
    for _ in range(12 if is_long else 2):
        before = written(run, "checkpoint.pt")
        process = commands.start("train", *OFTEN, "run_name=a", cwd=tmp_path)
        while process.poll() is None and written(run, "checkpoint.pt") == before:
            time.sleep(0.002)
        for _ in range(2):
            process.send(signal.SIGINT)
            time.sleep(chance.uniform(0.0005, 0.006))
        assert process.wait() == 130
        # The second one may arrive before this is printed.
        is_said |= "stopping after this step (Ctrl-C again stops at once)" in commands.err
        assert "Traceback" not in commands.err
        assert RunDir(run).status() == "interrupted"
        check_survived(run)
    assert is_said
    assert commands.run("train", *OFTEN, "run_name=a", cwd=tmp_path).returncode == 0, commands.err
    check_finished(run, whole)


def test_two_kills_and_fewer_epochs_test_the_weights_of_the_checkpoint(commands: Commands, tmp_path: Path) -> None:
    """The first kill falls between the best weights and the checkpoint of epoch 3, the second after the curves are cut
    back to the checkpoint; then training ends with the epochs that it had."""
    words = ["train", *SMALL, "batch_size=32", "run_name=a"]
    for folder in (tmp_path / "clean", tmp_path / "killed"):
        folder.mkdir()
        assert commands.run(*words, "epochs=2", cwd=folder).returncode == 0, commands.err
    run = tmp_path / "killed" / "runs" / "a"
    for file in ("a/checkpoint.pt", "a/metrics.jsonl"):
        fault = {"at": "replace", "file": file, "number": 1, "after": file.endswith("jsonl")}
        assert commands.run(*words, "epochs=4", cwd=run.parent.parent, fault=fault).returncode == -signal.SIGKILL
    assert commands.run(*words, "epochs=2", cwd=run.parent.parent).returncode == 0, commands.err
    clean = tmp_path / "clean" / "runs" / "a"
    assert equal(load_checkpoint(run / "best.pt"), load_checkpoint(clean / "best.pt"))
    assert RunDir(run).summary()["test"] == RunDir(clean).summary()["test"]
    assert not RunDir(run).next_best_file.exists()


def test_best_weights_of_another_step_are_not_tested(commands: Commands, tmp_path: Path) -> None:
    words = ["train", *SMALL, "batch_size=32", "run_name=a"]
    assert commands.run(*words, "epochs=2", cwd=tmp_path).returncode == 0, commands.err
    file = tmp_path / "runs" / "a" / "best.pt"
    torch.save({**load_checkpoint(file), "step": 7}, file)
    (tmp_path / "runs" / "a" / "summary.json").unlink()
    assert commands.run(*words, "epochs=2", cwd=tmp_path).returncode == 1
    assert "best.pt does not belong to" in commands.err
