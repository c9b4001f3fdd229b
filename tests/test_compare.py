"""`vae compare` on runs: the table, the files, the cached report, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vae_cli.cli import run as run_command
from vae_cli.commands.train import train
from vae_cli.comparison.statistics import statistic
from vae_cli.config.naming import clean
from vae_cli.core.errors import UserError
from vae_cli.metrics.record import FORMAT
from vae_cli.runs.folder import RunDir

REASON = "a point mass has no finite rate"
SIGMAS = {"learned": "learned", "fixed": "fixed 1.0", "deterministic": "deterministic"}  # and the arms' labels
Vae = Callable[..., int]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of short runs of three sigma modes."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for sigma in SIGMAS:
            for seed in (0, 1):
                train([f"sigma={sigma}", "epochs=3", "network.hidden=[16]", "latent=3", f"seed={seed}"])
    return folder


class Terms:
    """A stand-in for the only metric."""


def read_evaluation(folder: RunDir) -> dict[str, Any] | None:
    """Return the evaluation that the stand-in has written."""
    file = folder.path / "evaluation/metrics.json"
    return json.loads(file.read_text()) if file.exists() else None


def stand_in(monkeypatch: pytest.MonkeyPatch, evaluate_run: Callable[..., dict[str, Any]]) -> None:
    """Replace the evaluation by a fast stand-in."""
    monkeypatch.setattr("vae_cli.metrics.evaluate.METRICS", (Terms,))
    monkeypatch.setattr("vae_cli.metrics.record.MODULES", {"terms": ("Terms",)})  # after the real metrics are imported
    monkeypatch.setattr("vae_cli.metrics.evaluate.evaluate_run", evaluate_run)
    monkeypatch.setattr("vae_cli.comparison.missing.stored_evaluation", read_evaluation)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Evaluate with a stand-in that copies figures from the summary; return the list of evaluated runs."""
    seen: list[Path] = []

    def evaluate_run(
        folder: RunDir,
        profile: str = "quick",
        kinds: object = (Terms,),
        before: dict[str, Any] | None = None,
        samples: int | None = None,
        seed: int = 0,
        weights: str = "best",
        device: str = "auto",
        data_dir: object = None,
    ) -> dict[str, Any]:
        seen.append(folder.path)
        summary = folder.summary()
        figures: dict[str, Any] = {
            name: {
                "value": value,
                "unit": "nats",
                "count": 297,
                "metric": "Terms",
                "claim": "bits" if name.startswith("rate") else "price",
            }
            for name, value in {**summary["test"], **summary["posterior"]}.items()
        }
        figures["noise_probe_t"] = {"value": [0.0, 0.5, 1.0], "metric": "Terms", "claim": "bits"}
        figures["noise_probe_distortion"] = {"value": [1.0, 2.0, 4.0], "metric": "Terms", "claim": "bits"}
        evaluation = {
            "format": FORMAT,
            "run": folder.path.name,
            "step": summary["step"],
            "weights": weights,
            "seed": seed,
            "profile": profile,
            "budget": {"samples": samples},
            "images": "abc",
            "noise": ["dimensions", "noise", "smooth"] if "rate" in figures else [],
            "figures": {**(before or {}).get("figures", {}), **figures},
            "left_out": {} if "rate" in figures else {"rate": {"reason": REASON, "metric": "Terms", "claim": "bits"}},
        }
        (folder.path / "evaluation").mkdir(exist_ok=True)
        (folder.path / "evaluation/metrics.json").write_text(json.dumps(evaluation))
        return evaluation

    stand_in(monkeypatch, evaluate_run)
    return seen


@pytest.fixture
def vae(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Vae:
    monkeypatch.chdir(trained)

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["vae", *words])
        return run_command()

    return call


def test_compare(vae: Vae, trained: Path, evaluated: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert vae("compare", "--jobs", "1") == 0
    out = capsys.readouterr().out
    assert len(evaluated) == 6
    folder = trained / "runs/digits/compare"
    assert all(str(Path("runs/digits/compare", name)) in out for name in ("compare.csv", "compare.json", "report.html"))
    assert re.search(r"^ *deterministic +2 ", out, re.MULTILINE)
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    assert len(rows) == 6
    assert {row["arm"] for row in rows} == set(SIGMAS.values())
    assert all((row["rate"] == "") == (row["arm"] == "deterministic") for row in rows)
    plain = json.loads((folder / "compare.json").read_text())
    summaries = [RunDir(trained / row["run"]).summary() for row in rows if row["arm"] == "learned"]
    learned = next(arm for arm in plain["arms"] if arm["label"] == "learned")
    mean = sum(summary["test"]["distortion"] for summary in summaries) / 2
    assert learned["figures"]["distortion"]["mean"] == pytest.approx(mean)
    assert learned["figures"]["distortion"]["n"] == 2
    page = (folder / "report.html").read_text()
    assert page.count("<img") >= 6
    assert "Pictures are of the runs with seed 0" in page

    # The report's folder is not mistaken for a run, and runs are evaluated again only for a more thorough profile.
    assert vae("compare", "runs/digits", "--jobs", "1", "--out", "elsewhere", "--tensorboard") == 0
    assert len(evaluated) == 6
    assert (trained / "elsewhere/report.html").exists()
    assert {p.parent.name for p in (trained / "elsewhere/tensorboard/fixed-1.0").rglob("events*")} == {"mean", "sd"}
    assert vae("compare", "--jobs", "1", "--profile", "default", "--reference", "fixed 1.0") == 0
    assert len(evaluated) == 12
    assert vae("compare", "--jobs", "1") == 0  # the profile of most runs is used
    assert len(evaluated) == 12
    part = folder.parent / Path(rows[0]["run"]).name / "evaluation/metrics.json"
    found = json.loads(part.read_text())
    own = {"value": 1.0, "metric": "Mine", "claim": "bits"}
    part.write_text(json.dumps({**found, "figures": {"mine": own}, "left_out": {}}))
    assert vae("compare", "--jobs", "1", "--reference", "fixed 1.0") == 0
    assert evaluated[12:] == [Path(rows[0]["run"])]
    whole = json.loads(part.read_text())
    assert (whole["profile"], whole["figures"]) == ("default", {**found["figures"], "mine": own})
    assert json.loads((folder / "compare.json").read_text())["reference"] == "fixed 1.0"


def test_only_the_metrics_that_the_runs_or_the_user_name_are_measured(
    vae: Vae, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each metric, which the stand-in measures as a figure of its name, is measured once."""
    measured: list[set[str]] = []

    class Fast:
        pass

    class Slow:
        pass

    class Other:
        pass

    def evaluate_run(
        folder: RunDir, profile: str = "quick", *, kinds: Any, before: Any = None, **_: Any
    ) -> dict[str, Any]:
        names = {kind.__name__ for kind in kinds}
        measured.append(names)
        figures = {name.lower(): {"value": 1.0, "metric": name, "claim": "bits"} for name in sorted(names)}
        about = {"format": FORMAT, "weights": "best", "seed": 0, "profile": profile, "budget": {"samples": 1}}
        found = {
            **about,
            "images": "abc",
            "noise": ["noise"],
            "left_out": {},
            "figures": (before or {}).get("figures", {}) | figures,
        }
        (folder.path / "evaluation").mkdir(exist_ok=True)
        (folder.path / "evaluation/metrics.json").write_text(json.dumps(found))
        return found

    stand_in(monkeypatch, evaluate_run)
    monkeypatch.setattr("vae_cli.metrics.evaluate.METRICS", (Fast, Slow, Other))
    monkeypatch.setattr("vae_cli.metrics.record.MODULES", {"terms": ("Fast", "Slow", "Other")})
    for run in (trained / "runs/digits").glob("*latent*"):
        shutil.copytree(run, tmp_path / run.name, ignore=shutil.ignore_patterns("evaluation"))
        config = tmp_path / run.name / "config.yaml"
        config.write_text(re.sub(r"^metrics: .*$", "metrics: [fast]", config.read_text(), flags=re.MULTILINE))
    compare = ("compare", str(tmp_path), "--jobs", "1")
    assert vae(*compare) == 0
    assert measured == [{"Fast"}] * 6
    assert "Measured: only fast. To measure the other metrics, too, add --metrics all." in capsys.readouterr().out
    assert vae(*compare, "--metrics", "slow") == 0
    assert measured[6:] == [{"Slow"}] * 6
    assert vae(*compare, "--profile", "default") == 0
    assert measured[12:] == [{"Fast", "Slow"}] * 6  # a more thorough evaluation loses no figures
    assert vae(*compare, "--metrics", "all") == 0
    assert measured[18:] == [{"Other"}] * 6  # the others were measured already
    assert vae(*compare, "--metrics", "fst") == 2
    assert "there is no metric with this name. Did you mean 'fast'?" in capsys.readouterr().err
    assert len(measured) == 24


@pytest.mark.parametrize("out", ["notes.txt", "notes.txt/below"])
def test_an_unwritable_folder_is_refused_before_anything_is_evaluated(
    vae: Vae, trained: Path, evaluated: list[Path], out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained / "notes.txt").write_text("")
    assert vae("compare", "--jobs", "1", "--profile", "full", "--out", out) == 2
    assert "notes.txt is a file. Choose a different folder" in capsys.readouterr().err
    assert evaluated == []


def test_a_run_evaluated_with_another_seed_is_named(
    vae: Vae, trained: Path, evaluated: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert vae("compare", "--jobs", "1") == 0
    count = len(evaluated)
    run = sorted((trained / "runs/digits").glob("*/evaluation"))[0].parent
    file = run / "evaluation/metrics.json"
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | {"seed": 9}))
    try:
        assert vae("compare", "--jobs", "1") == 2
    finally:
        file.write_text(whole)
    assert f"vae evaluate runs/digits/{run.name} --quick --seed 0 --weights best" in capsys.readouterr().err
    assert len(evaluated) == count


@pytest.fixture
def quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write placeholder files instead of a report."""

    def write(_: object, folder: Path, *__: object) -> bool:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for name in ("compare.csv", "compare.json", "report.html", "figures/plane.png"):
            (folder / name).write_text(name)
        return True

    monkeypatch.setattr("vae_cli.comparison.write.write_all", write)


@pytest.fixture
def compared(
    vae: Vae, trained: Path, evaluated: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[Callable[..., str], Path, Path]:
    """Return a function that compares copies of the runs and returns the output; their folder; the report's folder."""
    runs = tmp_path / "copies"
    for run in (trained / "runs/digits").glob("*latent*"):
        shutil.copytree(run, runs / run.name)
    assert vae("compare", str(runs), "--jobs", "1") == 0  # evaluates them, unless another test has
    shutil.rmtree(runs / "compare")
    capsys.readouterr()

    def compare(*words: str) -> str:
        assert vae("compare", str(runs), "--jobs", "1", *words) == 0
        return capsys.readouterr().out

    return compare, runs, runs / "compare"


UNCHANGED = "Nothing has changed since this report was written:\n"


def test_a_report_is_cached_until_something_changes(
    compared: tuple[Callable[..., str], Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, _, folder = compared
    said = compare()
    assert UNCHANGED not in said

    def write(*_: object) -> None:
        raise AssertionError("the report is cached")

    with monkeypatch.context() as patched:
        patched.setattr("vae_cli.comparison.write.write_all", write)
        patched.setattr("vae_cli.comparison.compare.collect", write)
        again = compare()
    assert again.replace(UNCHANGED, "") == said
    assert UNCHANGED in again
    with_curves = compare("--tensorboard")
    assert UNCHANGED not in with_curves
    assert compare("--tensorboard") == with_curves.replace(
        str(folder / "compare.csv"), UNCHANGED + str(folder / "compare.csv")
    )


def _edit_unnoticed(file: Path) -> None:
    """Change a figure in a file, in place, and restore the times of the file."""
    stat = file.stat()
    with file.open("r+") as text:
        text.write(re.sub(r'(?<="seconds": )\d', "9", file.read_text()))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "other figures": lambda run, _: (run / "evaluation/metrics.json").write_text(
        (run / "evaluation/metrics.json").read_text().replace('"value": ', '"value":  ')
    ),
    "other figures of the same size and times": lambda run, _: _edit_unnoticed(run / "evaluation/metrics.json"),
    "other weights": lambda run, _: (run / "best.pt").write_bytes((run / "best.pt").read_bytes()),
    "another summary": lambda run, _: os.utime(run / "summary.json", ns=(1, 1)),
    "other settings": lambda run, _: os.utime(run / "config.yaml", ns=(1, 1)),
    "a run less": lambda run, _: shutil.rmtree(run),
    "a run more": lambda run, _: shutil.copytree(run, run.parent / "another"),
    "no report": lambda _, folder: (folder / "report.html").unlink(),
    "no figure": lambda _, folder: next((folder / "figures").iterdir()).unlink(),
    "another figure": lambda _, folder: next((folder / "figures").iterdir()).write_bytes(b""),
    "a changed cache": lambda _, folder: (folder / ".kept.json").write_text("{}"),
}


@pytest.mark.usefixtures("quick_report")
@pytest.mark.parametrize("change", CHANGES)
def test_a_report_is_written_again_if_something_has_changed(
    compared: tuple[Callable[..., str], Path, Path], change: str
) -> None:
    compare, runs, folder = compared
    compare()
    CHANGES[change](sorted(runs.glob("*latent*"))[0], folder)
    assert UNCHANGED not in compare()
    assert UNCHANGED in compare()


@pytest.mark.usefixtures("quick_report")
def test_a_report_of_newly_evaluated_runs_is_cached(
    compared: tuple[Callable[..., str], Path, Path], evaluated: list[Path]
) -> None:
    compare, runs, _ = compared
    for file in runs.rglob("evaluation/metrics.json"):
        file.unlink()
    count = len(evaluated)
    assert UNCHANGED not in compare()
    assert len(evaluated) == count + 6
    assert UNCHANGED in compare()
    assert len(evaluated) == count + 6


@pytest.mark.usefixtures("quick_report")
def test_a_report_is_not_cached_while_a_run_is_training(compared: tuple[Callable[..., str], Path, Path]) -> None:
    compare, runs, _ = compared
    last = sorted(runs.glob("*latent*"))[-1]
    summary = json.loads((last / "summary.json").read_text())
    (last / "summary.json").write_text(json.dumps({**summary, "status": "running"}))
    for _ in range(2):
        assert "is interrupted" in compare()
    assert UNCHANGED not in compare()


@pytest.mark.usefixtures("quick_report")
@pytest.mark.parametrize(
    "change",
    [
        {"notes": ["\x1b[2J"]}, {"notes": 1}, {"table": {}}, {"table": {"title": 1}}, {"format": 3},
        {"table": {"title": "", "arms": ["a"], "counts": [], "columns": {}, "below": ""}},
        {"table": {"title": "", "arms": ["a"], "counts": [[]], "columns": {}, "below": ""}},
    ],
)  # fmt: skip
def test_a_malformed_cache_is_ignored(compared: tuple[Callable[..., str], Path, Path], change: dict[str, Any]) -> None:
    compare, _, folder = compared
    said = compare()
    file = folder / ".kept.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert compare() == said


def test_curves_over_seeds(
    vae: Vae, trained: Path, evaluated: list[Path], tmp_path: Path, tensorboard: Callable[..., Callable[..., Any]]
) -> None:
    assert vae("compare", "--jobs", "1", "--out", str(tmp_path), "--tensorboard") == 0
    get = tensorboard(tmp_path / "tensorboard")
    assert set(get("runs")) == {f"{clean(label)}/{kind}" for label in SIGMAS.values() for kind in ("mean", "sd")}
    paths = [path for path in (trained / "runs/digits").glob("latent-3*") if "sigma" not in path.name]
    values = [RunDir(path).metrics()[-1]["validation/loss"] for path in paths]
    tag = "curves/loss/validation"
    for kind, expected in {"mean": statistic(values).mean, "sd": statistic(values).sd}.items():
        points = get("plugin/scalars/scalars", run=f"learned/{kind}", tag=tag)
        assert len(points) == 3
        assert points[-1][2] == pytest.approx(expected, rel=1e-5)


def test_runs_that_cannot_be_compared_are_refused(
    vae: Vae, trained: Path, evaluated: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = next((trained / "runs/digits").glob("*sigma-fixed*"))
    assert vae("compare", str(run)) == 2
    assert "can be compared here" in capsys.readouterr().err
    assert vae("compare", str(tmp_path)) == 2
    assert "There are no runs in" in capsys.readouterr().err
    assert vae("compare", "nowhere") == 2
    assert vae("compare", "--reference", "fixd", "--jobs", "1") == 2
    assert "Did you mean 'fixed 1.0'" in capsys.readouterr().err
    assert not evaluated  # all of this is refused before anything is evaluated


def test_unfinished_runs_are_left_out_and_named(
    vae: Vae, trained: Path, evaluated: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for run in sorted((trained / "runs/digits").glob("*latent*")):
        copy = tmp_path / run.name
        copy.mkdir()
        for name in ("config.yaml", "summary.json", "best.pt", "metrics.jsonl"):
            (copy / name).write_bytes((run / name).read_bytes())
    first, second, *_ = sorted(tmp_path.iterdir())
    (first / "summary.json").write_text(json.dumps({"status": "interrupted"}))
    (second / "summary.json").write_text("{")
    assert vae("compare", str(tmp_path), "--jobs", "1") == 0
    out = capsys.readouterr().out
    assert f"Left out: {first} is interrupted after 3 epochs" in out
    assert "damaged" in out
    assert len(evaluated) == 4


def test_an_evaluation_that_fails_names_its_run(
    vae: Vae, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def evaluate_run(folder: RunDir, **_: object) -> dict[str, Any]:
        raise UserError("no images")

    stand_in(monkeypatch, evaluate_run)
    assert vae("compare", "--jobs", "1", "--profile", "full") == 1
    error = capsys.readouterr().err
    assert "6 of 6 runs could not be evaluated" in error
    assert "no images" in error
