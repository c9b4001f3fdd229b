"""`vae evaluate` on runs of every sigma mode: what it prints, writes and refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vae_cli.cli import run as run_command
from vae_cli.commands.train import train
from vae_cli.comparison.run_plots import draw_run, losses
from vae_cli.config import catalog
from vae_cli.config.claims import CLAIMS, TITLES, entry
from vae_cli.core.errors import UserError
from vae_cli.metrics.base import Figure, Metric, mean_figure
from vae_cli.metrics.evaluate import METRICS, USUAL, find_metrics, word
from vae_cli.metrics.record import stored_evaluation
from vae_cli.runs.folder import RunDir
from vae_cli.terminal.errors import explain_error

MODES = list(catalog.groups()["sigma"].choices)
NEED_NOISE = {
    "rate",
    "elbo",
    "mutual_information",
    "snr_per_dimension",
    "iw_bound_k64",
    "elbo_gaussian_prior",
    "scale_mean",
}
Vae = Callable[..., int]


def chosen(sigma: str) -> list[str]:
    """Return the overrides for a choice of sigma; codes on a sphere need a prior of their own."""
    return [f"sigma={sigma}", *(["prior=sphere"] if sigma == "power_spherical" else [])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short run of each sigma mode, each evaluated quickly."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for sigma in MODES:
            train([*chosen(sigma), "epochs=2", "network.hidden=[32]", "latent=5", f"run_name={sigma}"])
            patch.setattr(sys, "argv", ["vae", "evaluate", sigma, "--quick"])
            assert run_command() == 0
    return folder


@pytest.fixture
def vae(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Vae:
    """Call the command line on a copy of the runs."""
    shutil.copytree(runs / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(runs / "cache"))

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["vae", *words])
        return run_command()

    return call


def found(folder: Path, run: str) -> dict[str, Any]:
    evaluation: dict[str, Any] = json.loads((folder / "runs" / run / "evaluation" / "metrics.json").read_text())
    return evaluation


@pytest.mark.parametrize("sigma", MODES)
def test_every_figure_says_what_it_is_and_what_it_is_a_mean_over(runs: Path, sigma: str) -> None:
    evaluation = found(runs, sigma)
    assert evaluation["profile"] == "quick"
    names = {kind.__name__ for kind in USUAL}
    assert {one["metric"] for part in ("figures", "left_out") for one in evaluation[part].values()} == names
    for name, one in evaluation["figures"].items():
        values = one["value"] if isinstance(one["value"], list) else [one["value"]]
        assert all(math.isfinite(value) for value in values), name
        assert one["claim"] in TITLES
    for one in evaluation["left_out"].values():
        assert one["reason"]
    assert not evaluation["figures"].keys() & evaluation["left_out"].keys()


def test_figures_are_of_the_weights_that_were_measured_and_of_no_others(vae: Vae, tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "runs/learned")
    assert stored_evaluation(folder) == found(tmp_path, "learned")
    weights = folder.best_file.read_bytes()
    folder.best_file.write_bytes(weights)  # the same at another time, as in a copy
    os.utime(folder.best_file, ns=(1, 1))
    assert stored_evaluation(folder) == found(tmp_path, "learned")
    folder.best_file.write_bytes(weights[:-1] + b"!")
    assert stored_evaluation(folder) is None


@pytest.mark.parametrize("sigma", MODES)
def test_what_a_mode_does_not_define_is_left_out_with_the_reason(runs: Path, sigma: str) -> None:
    evaluation = found(runs, sigma)
    missing, there = evaluation["left_out"].keys(), evaluation["figures"].keys()
    assert there >= {"distortion", "noise_probe_tolerance", "jacobian_norm_codes", "frechet_mixture"}
    on_sphere = {"elbo_gaussian_prior"} if sigma == "power_spherical" else set()  # where a Gaussian has no density
    assert missing >= on_sphere
    assert (missing if sigma == "deterministic" else there) >= NEED_NOISE - on_sphere


@pytest.mark.parametrize("sigma", MODES)
def test_the_figures_agree_with_those_of_the_training(runs: Path, sigma: str) -> None:
    tested = json.loads((runs / "runs" / sigma / "summary.json").read_text())["test"]
    figures = found(runs, sigma)["figures"]
    assert figures["distortion"]["value"] == pytest.approx(tested["distortion"], abs=4 * figures["distortion"]["error"])
    if "rate" in tested:
        assert figures["rate"]["value"] == pytest.approx(tested["rate"], rel=1e-4)
        assert figures["active_units"]["value"] == tested["active_units"]
        assert figures["iw_bound_k64"]["value"] >= figures["elbo"]["value"] - 4 * figures["elbo"]["error"]


def test_tensorboard_has_the_scalars_once(vae: Vae, tmp_path: Path) -> None:
    assert vae("evaluate", "learned", "--quick", "--metrics", "rate") == 0
    events = EventAccumulator(str(tmp_path / "runs" / "learned")).Reload()
    tags = events.Tags()["scalars"]
    assert "vae evaluate/noise_probe_tolerance" in tags
    assert len(events.Scalars("vae evaluate/rate")) == 1
    assert 12 <= sum(tag.startswith("vae evaluate/") for tag in tags) <= 30
    (page,) = events.Tensors("vae evaluate/figures")
    assert b"| Noise tolerance of a code |" in page.tensor_proto.string_val[0]
    assert "test/loss" in tags


def test_the_same_seed_gives_the_same_figures_whatever_else_is_measured(vae: Vae, tmp_path: Path) -> None:
    before = found(tmp_path, "shared")["figures"]
    assert vae("evaluate", "shared", "--quick", "--metrics", "noise_probe,rate") == 0
    assert found(tmp_path, "shared")["figures"] == before
    assert vae("evaluate", "shared", "--quick", "--metrics", "noise_probe", "--seed", "1", "--overwrite") == 0
    other = found(tmp_path, "shared")["figures"]
    assert other["noise_probe_distortion"] != before["noise_probe_distortion"]
    assert "rate" not in other  # under another seed nothing else was measured


@pytest.mark.parametrize(
    ("flags", "change"),
    [
        (["--quick", "--seed", "1"], "leave out --seed 1;"),
        (["--quick", "--weights", "last"], "leave out --weights last;"),
        (["--weights", "last"], "add --quick and leave out --weights last;"),
        ([], "add --quick;"),
    ],
)
def test_a_few_figures_do_not_take_the_place_of_all(
    vae: Vae, tmp_path: Path, flags: list[str], change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = found(tmp_path, "shared")
    assert vae("evaluate", "shared", "--metrics", "rate", *flags) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"which would be replaced by one with only the metrics you chose. To add them to it, {change}" in said
    assert found(tmp_path, "shared") == before


def test_the_figures_that_decide_about_claims_are_resampled(vae: Vae, tmp_path: Path) -> None:
    assert vae("evaluate", "learned", "--quick", "--overwrite") == 0
    figures = found(tmp_path, "learned")["figures"]
    resampled = {name: figure for name, figure in figures.items() if "resampled" in figure}
    assert resampled.keys() <= {claim.primary.replace("{k}", "64") for claim in CLAIMS.values()} & figures.keys()
    assert len(resampled) >= 4
    for name, figure in resampled.items():
        spread = (sum(value**2 for value in figure["resampled"]) / len(figure["resampled"])) ** 0.5
        assert spread == pytest.approx(figure["error"], rel=0.35), name


def test_k_can_be_set(vae: Vae, tmp_path: Path) -> None:
    assert vae("evaluate", "fixed", "--quick", "--metrics", "bound", "--samples", "7") == 0
    figures = found(tmp_path, "fixed")["figures"]
    assert figures.keys() >= {"iw_bound_k7", "rate", "noise_probe_tolerance"}
    assert "iw_bound_k64" not in figures
    assert vae("evaluate", "fixed", "--quick", "--metrics", "rate") == 0
    again = found(tmp_path, "fixed")
    assert "iw_bound_k7" in again["figures"]
    assert again["budget"]["samples"] == 7
    assert vae("evaluate", "fixed", "--metrics", "bound", "--overwrite") == 0
    assert found(tmp_path, "fixed")["budget"]["samples"] == 5000  # of another profile nothing is kept


def test_the_table_is_grouped_by_claim(vae: Vae, capsys: pytest.CaptureFixture[str]) -> None:
    assert vae("evaluate", "deterministic", "--quick", "--metrics", "rate,noise_probe") == 0
    printed = capsys.readouterr().out
    assert printed.index(CLAIMS["bits"].title) < printed.index("Noise tolerance of a code")
    assert "Not defined: Rate; Rate, log base 2" in " ".join(printed.split())
    assert "noise_probe" not in printed  # titles, not identifiers
    assert "nan" not in printed
    assert "inf " not in printed


def test_the_headline_figures_are_printed_with_their_meaning(vae: Vae, capsys: pytest.CaptureFixture[str]) -> None:
    assert vae("evaluate", "deterministic", "--quick") == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert entry("noise_probe_tolerance").definition.split()[0] in printed
    assert "Rate: not defined The KL divergence of a point mass from the prior is infinite." in printed
    assert "Quantization: distortion" not in printed
    assert entry("jacobian_ratio").title in printed
    assert "figures: --all prints" in printed
    assert vae("evaluate", "deterministic", "--quick", "--all") == 0
    assert "Distortion without quantization" in capsys.readouterr().out


def test_the_losses_of_a_run_are_drawn(vae: Vae, tmp_path: Path) -> None:
    for name, titles in {"learned": ["Loss", "Distortion", "Rate"], "deterministic": ["Loss", "Distortion"]}.items():
        figure = losses(RunDir(tmp_path / "runs" / name))
        assert figure is not None
        assert [axes.get_title(loc="left") for axes in figure.axes] == titles
        records = RunDir(tmp_path / "runs" / name).metrics()
        for axes, term in zip(figure.axes, titles, strict=True):
            train, validation, best = axes.lines
            assert train.get_ydata().tolist() == [one[f"train/{term.lower()}"] for one in records]
            assert validation.get_ydata().tolist() == [one[f"validation/{term.lower()}"] for one in records]
            assert best.get_xdata()[0] == RunDir(tmp_path / "runs" / name).summary()["weights_of_epoch"]


def test_two_dimensional_codes_get_a_map(vae: Vae, tmp_path: Path) -> None:
    assert vae("train", "latent=2", "epochs=1", "network.hidden=[8]", "run_name=two") == 0
    assert vae("evaluate", "two", "--quick", "--metrics", "rate") == 0
    assert vae("evaluate", "learned", "--quick", "--metrics", "rate") == 0
    maps = [(tmp_path / "runs" / name / "evaluation/codes.png").exists() for name in ("two", "learned")]
    assert maps == [True, False]
    left, right = draw_run(RunDir(tmp_path / "runs/two"), "cpu", None)["codes"].axes
    assert len(left.collections[0].get_offsets()) == 297
    assert {text.get_text() for text in left.texts} == set("0123456789")
    assert right.get_images()[0].get_extent() == [-2.5, 2.5, -2.5, 2.5]


class Loudness(Metric):
    """The mean of |loc|, as a user's own metric."""

    claim = "scale"

    def compute(self) -> dict[str, Figure]:
        return {"loudness": mean_figure(self.subject.codes().loc.abs().mean(1))}


def test_a_users_own_metric(vae: Vae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    monkeypatch.setattr(Loudness, "__module__", "mine")
    monkeypatch.delenv("VAE_TRUST", raising=False)
    with pytest.raises(UserError, match="--trust mine"):
        find_metrics(["mine.Loudness"])
    monkeypatch.setenv("VAE_TRUST", "mine")
    assert vae("evaluate", "fixed", "--quick", "--metrics", "mine.Loudness") == 0
    assert found(tmp_path, "fixed")["figures"]["loudness"]["count"] == 297


def test_a_thorough_evaluation_is_not_lost_by_mistake(
    vae: Vae, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "runs" / "fixed" / "evaluation" / "metrics.json"
    evaluation = found(tmp_path, "fixed") | {"profile": "full"}
    file.write_text(json.dumps(evaluation))
    assert vae("evaluate", "fixed", "--quick") == 2
    assert "To replace it, add --overwrite." in capsys.readouterr().err
    assert found(tmp_path, "fixed") == evaluation
    assert vae("evaluate", "fixed", "--quick", "--metrics", "rate", "--overwrite") == 0
    assert found(tmp_path, "fixed")["profile"] == "quick"


def test_a_read_only_run_is_evaluated_into_another_folder(
    vae: Vae, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "fixed"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.setattr("vae_cli.core.files.os.access", lambda path, mode: Path(path).name != "evaluation")
    words = ["evaluate", "fixed", "--quick", "--metrics", "rate", "--overwrite"]
    assert vae(*words) == 1
    assert "Write the evaluation elsewhere: vae evaluate runs/fixed --out FOLDER" in capsys.readouterr().err
    assert vae(*words, "--out", "elsewhere/new") == 0
    assert "elsewhere/new/metrics.json" in capsys.readouterr().out
    assert json.loads((tmp_path / "elsewhere/new/metrics.json").read_text())["figures"]["rate"]
    assert list((tmp_path / "elsewhere/new").glob("*.png"))
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_an_evaluation_elsewhere_is_not_lost_by_mistake(
    vae: Vae, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def names(folder: str) -> set[str]:
        return {
            entry["metric"]
            for entry in json.loads((tmp_path / folder / "metrics.json").read_text())["figures"].values()
        }

    words = ["--quick", "--out", "new", "--metrics"]
    assert vae("evaluate", "fixed", *words, "rate") == 0
    assert vae("evaluate", "fixed", *words, "noise_probe") == 0
    assert names("new") == {"Rate", "NoiseProbe"}
    assert vae("evaluate", "learned", *words, "rate") == 2
    assert "is the evaluation of another run" in capsys.readouterr().err
    (tmp_path / "new" / "metrics.json").write_text("precious")
    assert vae("evaluate", "fixed", *words, "rate") == 1
    assert "--overwrite --out new" in capsys.readouterr().err
    assert (tmp_path / "new" / "metrics.json").read_text() == "precious"
    assert vae("evaluate", "learned", *words, "rate", "--overwrite") == 0
    assert names("new") == {"Rate"}


def test_a_run_that_changes_during_its_evaluation_is_not_evaluated(
    vae: Vae, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "runs" / "fixed" / "best.pt"
    before = found(tmp_path, "fixed")
    monkeypatch.setattr("vae_cli.metrics.evaluate.compute_metrics", lambda *_: os.utime(file) or {"Rate": {}})
    assert vae("evaluate", "fixed", "--quick", "--metrics", "rate", "--overwrite") == 1
    assert "was trained further or replaced during its evaluation" in capsys.readouterr().err
    assert found(tmp_path, "fixed") == before


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["latest", "--quick", "--full"], 2, "--quick and --full cannot be combined"),
        (["latest", "--metrics", "noise_prob"], 2, "Did you mean 'noise_probe'?"),
        (["latest", "--metrics", ""], 2, "there is no metric with this name"),
        (["latest", "--samples", "0"], 2, "--samples"),
        (["nowhere"], 2, "There is no run 'nowhere'"),
        (["fixed", "--device", "tpu"], 2, "device=tpu"),
    ],
)
def test_impossible_requests_are_refused_with_a_message(
    vae: Vae, words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vae("evaluate", *words) == code
    assert said in capsys.readouterr().err


def test_a_run_that_is_not_finished_is_not_measured(
    vae: Vae, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "runs" / "fixed" / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "interrupted"}))
    assert vae("evaluate", "fixed", "--quick") == 2
    assert "is interrupted, and only a finished run can be evaluated" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 1, "weights": "best", "figures": 3}'])
def test_a_damaged_evaluation_is_reported(
    vae: Vae, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "fixed" / "evaluation" / "metrics.json").write_text(text)
    assert vae("evaluate", "fixed", "--quick") == 1
    assert "is damaged" in capsys.readouterr().err
    assert vae("evaluate", "fixed", "--quick", "--metrics", "rate", "--overwrite") == 0
    assert found(tmp_path, "fixed")["figures"].keys() >= {"rate"}


def test_an_evaluation_without_the_properties_of_the_noise_is_damaged(
    vae: Vae, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = found(tmp_path, "fixed")
    assert evaluation.pop("noise") == ["dimensions", "noise", "separate", "smooth"]
    (tmp_path / "runs" / "fixed" / "evaluation" / "metrics.json").write_text(json.dumps(evaluation))
    assert vae("evaluate", "fixed", "--quick") == 1
    assert "is damaged" in capsys.readouterr().err


class Wild(Metric):
    """A metric whose figure is not a finite number."""

    claim = "scale"

    def compute(self) -> dict[str, Figure]:
        return {"wild": Figure(math.inf), "curve": Figure([1.0, math.nan]), "sure": Figure(0.0, error=0.0)}


def test_a_figure_that_is_not_finite_is_left_out(vae: Vae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    monkeypatch.setattr(Wild, "__module__", "mine")
    monkeypatch.setenv("VAE_TRUST", "mine")
    assert vae("evaluate", "fixed", "--quick", "--metrics", "mine.Wild") == 0
    evaluation = found(tmp_path, "fixed")
    assert {"wild", "curve"} <= evaluation["left_out"].keys()
    assert evaluation["figures"]["sure"]["error"] == 0


def test_names_of_metrics_are_distinct_and_plain() -> None:
    words = [word(kind) for kind in METRICS]
    assert len(set(words)) == len(words)
    assert find_metrics(words) == list(METRICS)
    assert explain_error(UserError("x")) == ("x", 2)
