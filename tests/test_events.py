"""What a run writes for TensorBoard, read back through TensorBoard itself."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.summary.writer.record_writer import RecordWriter

from vae_cli.config.claims import entry
from vae_cli.core.images import grid
from vae_cli.training import tensorboard
from vae_cli.training.cards import tag_of
from vae_cli.training.records import write_record
from vae_cli.training.tensorboard import EventWriter, Hparam

Get = Callable[..., Any]

COMMON: dict[str, Hparam] = {"dataset": "digits", "latent": 4, "optimizer.lr": 1e-3, "network.batch_norm": False}
RUNS: dict[str, dict[str, Hparam]] = {
    "digits/default": COMMON | {"sigma": "learned", "epochs": 1},
    "digits/sigma-deterministic": COMMON | {"sigma": "deterministic", "epochs": 1},
    "digits/sigma-fixed_sigma.value-0.5": COMMON | {"sigma": "fixed", "sigma.value": 0.5, "epochs": 2},
    "digits/sigma-shared": COMMON | {"sigma": "shared", "epochs": 1},
}
RESUMED = "digits/sigma-fixed_sigma.value-0.5"
STATUS: dict[str, tensorboard.Status] = {"digits/sigma-deterministic": "failed", "digits/sigma-shared": "interrupted"}
STATUSES = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]


def terms(hparams: Mapping[str, Hparam]) -> list[str]:
    return ["loss", "distortion"] if hparams["sigma"] == "deterministic" else ["loss", "distortion", "rate", "rate_loc"]


def train(writer: EventWriter, hparams: Mapping[str, Hparam], first: int, last: int, shift: float = 0.0) -> None:
    """Write the events of some steps as a training would; `shift` is added to all values."""
    writer.hparams(hparams)
    writer.layout()
    images = torch.rand(8, 1, 8, 8)
    for step in range(first, last + 1):
        writer.scalars({f"train/{term}": step + shift for term in terms(hparams)}, step)
        if step % 5 == 0:
            writer.scalars({f"validation/{term}": step + shift for term in terms(hparams)}, step)
            writer.histograms({"posterior/loc": torch.randn(20, 4), "posterior/scale": torch.full((20, 4), 0.5)}, step)
            writer.pictures("images/pairs", grid(images, 4), step, "Upper row: images.")


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four runs: finished, failed, resumed after a crash (3 steps after its checkpoint), interrupted."""
    logdir = tmp_path_factory.mktemp("runs")
    for name, hparams in RUNS.items():
        if name == RESUMED:
            crashed = EventWriter(logdir / name)
            train(crashed, hparams | {"epochs": 1}, 1, 13, shift=100)
            crashed.embedding(torch.randn(5, 4), None, None, 13)
            crashed.close("failed")
        writer = EventWriter(logdir / name, purge_step=11 if name == RESUMED else None)
        train(writer, hparams, 11 if name == RESUMED else 1, 20)
        if name != "digits/sigma-shared":
            writer.scalars({f"test/{term}": 7.0 for term in terms(hparams)}, 20)
        labels = [f"label\t{index}" for index in range(6)]
        latent = 1 if name == "digits/default" else 4
        writer.embedding(torch.arange(6.0 * latent).reshape(6, latent), labels, torch.rand(6, 1, 8, 6), 20)
        writer.close(STATUS.get(name, "finished"))
    return logdir


def session_groups(get: Get, *columns: Mapping[str, object]) -> dict[str, dict[str, Any]]:
    payload = {"allowedStatuses": STATUSES, "sliceSize": 1000, "colParams": columns}
    groups = get("plugin/hparams/session_groups", payload)["sessionGroups"]
    assert len({group["name"] for group in groups}) == len(groups)
    return {group["name"]: group for group in groups}


def test_a_sweep_of_a_hundred_runs_is_a_hundred_rows(tmp_path: Path, tensorboard: Callable[..., Get]) -> None:
    rows: dict[str, dict[str, Hparam]] = {
        f"sigma-{sigma}_latent-{latent}_seed-{seed}": {"sigma": sigma, "latent": latent, "seed": seed}
        for sigma in ("learned", "shared", "fixed", "deterministic")
        for latent in (2, 4, 8, 16, 32)
        for seed in range(5)
    }
    for number, (name, hparams) in enumerate(rows.items()):
        writer = EventWriter(tmp_path / name)
        writer.hparams(hparams)
        writer.scalars({"validation/loss": float(number)}, 1)
        writer.close("failed" if hparams["seed"] == 4 else "finished")
    get = tensorboard(tmp_path)
    groups = session_groups(get)
    assert {name: group["hparams"] for name, group in groups.items()} == rows
    failed = {name for name, group in groups.items() if group["sessions"][0]["status"] == "STATUS_FAILURE"}
    assert failed == {name for name in rows if name.endswith("seed-4")}
    losses = [group["metricValues"][0]["value"] for group in groups.values()]
    assert sorted(losses) == list(range(100))
    columns = {info["name"]: info for info in get("plugin/hparams/experiment", {})["hparamInfos"]}
    assert {name for name, info in columns.items() if info["differs"]} == {"sigma", "latent", "seed"}


# TensorBoard reads with its data server if it can, otherwise in Python. They treat a resumed run differently.
@pytest.mark.parametrize("reader", ["auto", "false"])
def test_tensorboard_shows_each_run_once_and_completely(
    reader: str, logdir: Path, tensorboard: Callable[..., Get]
) -> None:
    get = tensorboard(logdir, f"--load_fast={reader}")

    # Curves
    tags = get("plugin/scalars/tags")
    for run, hparams in RUNS.items():
        parts = ["train", "validation"] if run == "digits/sigma-shared" else ["train", "validation", "test"]
        assert set(tags[run]) == {tag_of(f"{part}/{term}") for part in parts for term in terms(hparams)}
        shown = "rate" if "rate" in terms(hparams) else "distortion"
        for part in ("train", "validation"):
            about = tags[run][f"curves/{shown}/{part}"]
            assert about["displayName"] == f"{entry(shown).title} ({part})"
            assert entry(shown).definition.split(":")[0] in about["description"]
        for tag, every in {"curves/loss/train": 1, "curves/loss/validation": 5}.items():
            points = [(step, value) for _, step, value in get("plugin/scalars/scalars", run=run, tag=tag)]
            shift = 100 if run == RESUMED else 0
            assert points == [(step, step + (shift if step < 11 else 0)) for step in range(every, 21, every)]

    # Histograms and pictures
    for kind, expected in {"histograms": {"posterior/loc", "posterior/scale"}, "images": {"images/pairs"}}.items():
        assert {run: set(tags) for run, tags in get(f"plugin/{kind}/tags").items()} == dict.fromkeys(RUNS, expected)
    for _, _, buckets in get("plugin/histograms/histograms", run=RESUMED, tag="posterior/scale"):
        assert [bucket for bucket in buckets if bucket[2]] == [[0.5, 0.5, 80]]
    pictures = get("plugin/images/images", run=RESUMED, tag="images/pairs", sample="0")
    assert [picture["step"] for picture in pictures] == [5, 10, 15, 20]
    for run in RUNS:
        about = get("plugin/images/tags")[run]["images/pairs"]
        assert about["displayName"] == "pairs"
        assert "Upper row: images." in about["description"]

    # The HPARAMS tab
    columns = {info["name"]: info for info in get("plugin/hparams/experiment", {})["hparamInfos"]}
    assert set(columns) == set().union(*RUNS.values())
    assert {name for name, info in columns.items() if info["differs"]} == {"sigma", "epochs"}
    assert set(columns["sigma"]["domainDiscrete"]) == {"learned", "shared", "fixed", "deterministic"}
    assert columns["sigma.value"]["type"] == columns["latent"]["type"] == "DATA_TYPE_FLOAT64"
    assert columns["network.batch_norm"]["type"] == "DATA_TYPE_BOOL"

    rows = session_groups(get)
    assert {name: row["hparams"] for name, row in rows.items()} == RUNS
    assert {name: [session["status"] for session in row["sessions"]] for name, row in rows.items()} == {
        "digits/default": ["STATUS_SUCCESS"],
        "digits/sigma-deterministic": ["STATUS_FAILURE"],
        RESUMED: ["STATUS_SUCCESS"],
        "digits/sigma-shared": ["STATUS_UNKNOWN"],
    }
    for name, row in rows.items():
        metrics = {metric["name"]["tag"]: metric["value"] for metric in row["metricValues"]}
        values = {"train": 20.0, "validation": 20.0} | ({} if name == "digits/sigma-shared" else {"test": 7.0})
        pairs = ((f"{part}/{term}", value) for part, value in values.items() for term in terms(RUNS[name]))
        assert metrics == {tag_of(figure): value for figure, value in pairs}

    only = {"excludeMissingValues": True}
    assert set(session_groups(get, {"hparam": "sigma", "filterDiscrete": ["fixed"]})) == {RESUMED}
    assert set(session_groups(get, {"hparam": "network.batch_norm", "filterDiscrete": [False]})) == set(RUNS)
    between = {"minValue": 0.4, "maxValue": 0.6}
    assert set(session_groups(get, {"hparam": "sigma.value", "filterInterval": between, **only})) == {RESUMED}

    # Custom scalars: one chart for each term, although every run writes the layout
    categories = {category["title"]: category["chart"] for category in get("plugin/custom_scalars/layout")["category"]}
    charts = {chart["title"]: chart["multiline"]["tag"] for chart in categories["train and validation"]}
    assert len(charts) == len(categories["train and validation"])
    assert set(charts) == {"loss", "distortion", "rate", "rate_loc", "rate_scale", "penalty", "elbo"}
    matches = get("plugin/custom_scalars/scalars", run="digits/default", tag=charts["rate"][0])["tag_to_events"]
    assert set(matches) == {"curves/rate/train", "curves/rate/validation"}

    # The projector
    assert set(get("plugin/projector/runs")) == set(RUNS)
    for run, shape in {"digits/default": [6, 3], RESUMED: [6, 4]}.items():
        (shown,) = get("plugin/projector/info", run=run)["embeddings"]
        assert shown["tensorName"] == "z at step 20"
        assert shown["tensorShape"] == shape
        asked = {"run": run, "name": shown["tensorName"]}
        codes = torch.frombuffer(bytearray(get("plugin/projector/tensor", **asked)), dtype=torch.float32)
        assert codes.reshape(shape)[:, 0].tolist() == [index * (1.0 if shape[1] == 3 else 4.0) for index in range(6)]
        assert get("plugin/projector/metadata", **asked).decode().splitlines() == [f"label {i}" for i in range(6)]
        sheet = Image.open(io.BytesIO(get("plugin/projector/sprite_image", **asked)))
        width, height = shown["sprite"]["singleImageDim"]
        assert (width, height) == (24, 32)
        assert sheet.size == (3 * width, 3 * height)  # a square


def test_a_failure_is_written_and_an_interruption_is_not(tmp_path: Path) -> None:
    cases: list[tuple[type[BaseException] | None, int]] = [(None, 1), (ValueError, 1), (KeyboardInterrupt, 0)]
    for error, ends in cases:
        folder = tmp_path / str(error)
        writer = EventWriter(folder)
        with suppress(ValueError, KeyboardInterrupt), writer:
            writer.hparams(COMMON)
            if error:
                raise error
        assert len(list(folder.glob("*end"))) == ends
        writer.close("finished")  # a second call does nothing
        assert len(list(folder.glob("*end"))) == ends


def test_points_that_are_not_finite_are_shown_and_left_out_of_histograms(
    tmp_path: Path, tensorboard: Callable[..., Get]
) -> None:
    with EventWriter(tmp_path / "run") as writer:
        writer.hparams({"sigma": "learned", "sigma.value": float("nan")})
        writer.scalars({"train/loss": float("nan"), "train/rate": float("inf")}, 1)
        writer.histograms({"loc": torch.tensor([[1.0, float("nan")], [3.0, float("inf")]])}, 1)
        writer.histograms({"empty": torch.tensor([float("nan")]), "none": torch.empty(0)}, 1)
    get = tensorboard(tmp_path)
    assert get("plugin/scalars/scalars", run="run", tag="curves/loss/train")[0][2] == "NaN"
    assert get("plugin/scalars/scalars", run="run", tag="curves/rate/train")[0][2] == "Infinity"
    assert set(get("plugin/histograms/tags")["run"]) == {"loc"}
    ((_, _, buckets),) = get("plugin/histograms/histograms", run="run", tag="loc")
    assert sum(count for _, _, count in buckets) == 2
    assert session_groups(get)["run"]["hparams"] == {"sigma": "learned"}
    assert [info["name"] for info in get("plugin/hparams/experiment", {})["hparamInfos"]] == ["sigma"]


def test_the_projector_has_a_limit_and_sprites_fit_a_texture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EventWriter(tmp_path) as writer:
        monkeypatch.setattr(tensorboard, "POINTS", 10)
        writer.embedding(torch.randn(12, 2), [str(index) for index in range(12)], torch.rand(12, 3, 100, 150), 1)
        assert len((tmp_path / "projector/tensors.tsv").read_text().splitlines()) == 10
        assert len((tmp_path / "projector/metadata.tsv").read_text().splitlines()) == 10
        assert Image.open(tmp_path / "projector/sprite.png").size == (4 * 50, 4 * 34)  # 150 by 100 shrunk threefold
        writer.embedding(torch.randn(3, 2), None, None, 2)
        config = (tmp_path / "projector_config.pbtxt").read_text()
    assert config.count("embeddings") == 1
    assert "metadata_path" not in config
    largest = tensorboard.SPRITE * round(tensorboard.POINTS**0.5 + 1)
    assert largest <= 8192
    assert not list(tmp_path.rglob(".*"))


def test_nothing_needs_tensorflow(tmp_path: Path) -> None:
    code = (
        "import sys, json; from pathlib import Path; sys.modules['tensorflow'] = None\n"
        "from vae_cli.training.tensorboard import EventWriter\n"
        "print(json.dumps([name for name in ('torch', 'numpy', 'PIL', 'tensorboard') if name in sys.modules]))\n"
        "with EventWriter(Path(sys.argv[1])) as writer: writer.hparams({'latent': 4}); writer.layout()\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []  # and the module itself imports nothing heavy


@pytest.mark.parametrize("size", [0, 1, 255, 10_000])
def test_records_are_those_of_tensorboard(size: int) -> None:
    data, ours, theirs = random.Random(size).randbytes(size), io.BytesIO(), io.BytesIO()
    write_record(ours, data)
    RecordWriter(theirs).write(data)
    assert ours.getvalue() == theirs.getvalue()
