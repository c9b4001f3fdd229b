"""A real TensorBoard over a folder with a run of each sigma mode."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from vae_cli.commands.train import train
from vae_cli.config import catalog
from vae_cli.metrics.evaluate import evaluate_run, find_metrics
from vae_cli.runs.folder import RunDir

MODES = list(catalog.groups()["sigma"].choices)
ALWAYS = {"loss", "distortion", "penalty"}
NOISY = ALWAYS | {"rate", "rate_loc", "rate_scale", "elbo"}
NOT_NORMAL = {"uniform", "random", "interpolated", "power_spherical"}
NOT_BY_DIMENSION = NOT_NORMAL - {"uniform"}  # of which the rate is not a sum over dimensions


def chosen(sigma: str) -> list[str]:
    """Return the overrides for a choice of sigma; codes on a sphere need a prior of their own."""
    return [f"sigma={sigma}", *(["prior=sphere"] if sigma == "power_spherical" else [])]


def cards_in_order(get: Callable[..., Any]) -> list[str]:
    """Return the tags of all cards of the Time Series page, which TensorBoard sorts part by part."""
    tags = get("plugin/timeseries/tags")
    of_runs = (tags[kind]["runTagInfo"].values() for kind in ("scalars", "histograms"))
    shown = {tag for runs in of_runs for of_run in runs for tag in of_run} | set(tags["images"]["tagRunSampledInfo"])
    return sorted(shown, key=lambda tag: tag.split("/"))


def test_training_curves_come_first_each_beside_its_validation_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensorboard: Callable[..., Callable[..., Any]]
) -> None:
    monkeypatch.chdir(tmp_path)
    train(["epochs=2", "network.hidden=[32]", "latent=4", "run_name=a"])
    evaluate_run(RunDir(Path("runs/a")), "quick", kinds=find_metrics(["rate"]))
    cards = cards_in_order(tensorboard(tmp_path / "runs"))
    groups = {group: list(tags) for group, tags in groupby(cards, lambda tag: tag.partition("/")[0])}
    assert list(groups) == ["curves", "images", "parameters", "posterior", "test", "vae evaluate"]
    first = groups["curves"]
    assert first[::2] == [f"curves/{term}/train" for term in sorted(NOISY)]
    assert first[1::2] == [f"curves/{term}/validation" for term in sorted(NOISY)]


def test_every_tag_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensorboard: Callable[..., Callable[..., Any]]
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ["epochs=3", "network.hidden=[32]", "log_every=7", "latent=4"]
    for sigma in MODES:
        train([*quick, *chosen(sigma), f"run_name={sigma}"])
    get = tensorboard(tmp_path / "runs")
    scalars, histograms, images = (get(f"plugin/{kind}/tags") for kind in ("scalars", "histograms", "images"))
    assert set(scalars) == set(MODES)
    for sigma in MODES:
        has_noise = sigma != "deterministic"
        terms = NOISY if has_noise else ALWAYS
        if sigma in NOT_NORMAL:
            terms = terms - {"rate_loc", "rate_scale"}
        posterior = {"loc_std", *(("scale_mean", "scale_min", "collapsed") if has_noise else ())}
        more = {"rate_bits", "active_units"} if has_noise else set()
        expected = {f"curves/{name}/{split}" for name in terms for split in ("train", "validation")}
        expected |= {f"test/{name}" for name in terms | more}
        expected |= {f"posterior/{name}" for name in posterior | more}
        expected |= {"parameters/beta", "parameters/learning_rate"}
        assert expected <= set(scalars[sigma])
        undefined = {"rate", "rate_loc", "rate_scale", "rate_bits", "elbo", "active_units", "scale_mean", "scale_min"}
        if not has_noise:
            assert not undefined & {part for tag in scalars[sigma] for part in tag.split("/")}
        shapes = {"posterior/loc", *(["posterior/scale"] if has_noise else [])}
        shapes |= {"posterior/rate_per_dimension"} if has_noise and sigma not in NOT_BY_DIMENSION else set()
        assert set(histograms[sigma]) == shapes
        assert set(images[sigma]) == {"images/reconstructions", "images/samples from the prior"}
        assert all("row" in image["description"].lower() for image in images[sigma].values())

        record = RunDir(tmp_path / "runs" / sigma).metrics()
        curve = get("plugin/scalars/scalars", run=sigma, tag="curves/loss/validation")
        assert [(step, value) for _, step, value in curve] == [
            (r["step"], pytest.approx(r["validation/loss"], rel=1e-5)) for r in record
        ]
        steps = [step for _, step, _ in get("plugin/scalars/scalars", run=sigma, tag="curves/loss/train")]
        assert steps == list(range(7, record[-1]["step"] + 1, 7))

    shown = get("plugin/projector/runs")
    assert set(shown) == set(MODES)
    info = get("plugin/projector/info", run="fixed")
    assert info["embeddings"][0]["sprite"]["singleImageDim"]
    layout = get("plugin/custom_scalars/layout")
    titles = [chart["title"] for category in layout["category"] for chart in category["chart"]]
    assert {*NOISY, "posterior scale"} <= set(titles)

    groups = get("plugin/hparams/session_groups", {"allowedStatuses": ["STATUS_SUCCESS"], "sliceSize": 50})[
        "sessionGroups"
    ]
    rows = {group["hparams"]["sigma"]: group for group in groups}
    assert set(rows) == set(MODES)
    assert rows["fixed"]["hparams"]["sigma.value"] == 1.0
    assert "sigma.value" not in rows["learned"]["hparams"]
    for sigma, row in rows.items():
        assert row["hparams"]["latent"] == 4
        metrics = {(m["name"]["group"] or m["name"]["tag"], m["name"]["tag"]): m["value"] for m in row["metricValues"]}
        tested = RunDir(tmp_path / "runs" / sigma).summary()["test"]["distortion"]
        assert [v for (_, tag), v in metrics.items() if tag == "test/distortion"] == [pytest.approx(tested, rel=1e-5)]
