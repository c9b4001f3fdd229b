"""Studies: several sweeps under one name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from vae_cli.config.catalog import configs_dir
from vae_cli.core.errors import UserError
from vae_cli.metrics.record import metric_words
from vae_cli.sweeps.study import jobs_of_study

ARMS = ["sigma=learned,shared prior=a,b", "sigma=fixed sigma.value=1.0,0.5", "sigma=learned regularizer.beta=0"]


def test_a_study_is_the_union_of_its_sweeps() -> None:
    jobs = jobs_of_study(["seed=3"], ARMS)
    assert [" ".join(job) for job in jobs] == [
        "sigma=learned prior=a seed=3",
        "sigma=learned prior=b seed=3",
        "sigma=shared prior=a seed=3",
        "sigma=shared prior=b seed=3",
        "sigma=fixed sigma.value=1.0 seed=3",
        "sigma=fixed sigma.value=0.5 seed=3",
        "sigma=learned regularizer.beta=0 seed=3",
    ]


def test_overrides_select_arms_of_a_study() -> None:
    assert jobs_of_study(["sigma=fixed", "sigma.value=0.5"], ARMS) == [["sigma=fixed", "sigma.value=0.5"]]
    assert jobs_of_study(["prior=b"], ARMS)[:2] == [["sigma=learned", "prior=b"], ["sigma=shared", "prior=b"]]
    said = r"no arm of this study has sigma=fixed sigma\.value=7\. Its arms are: sigma=learned"
    with pytest.raises(UserError, match=said):
        jobs_of_study(["sigma=fixed", "sigma.value=7"], ARMS)


def test_a_job_in_two_sweeps_is_run_once() -> None:
    assert jobs_of_study(["regularizer.beta=0"], ["sigma=learned", "sigma=learned regularizer.beta=0,1"]) == [
        ["sigma=learned", "regularizer.beta=0"]
    ]


def test_the_sigma_study_has_every_mode_several_seeds_and_a_ladder_of_weights() -> None:
    preset = yaml.safe_load((configs_dir() / "experiment" / "sigma_study.yaml").read_text())
    jobs = [set(job) for job in jobs_of_study([], preset["arms"])]
    for mode in ("learned", "shared", "deterministic"):
        assert any(f"sigma={mode}" in job for job in jobs)
    for value in ("1.0", "0.5", "0.1"):
        for prior in ("standard_normal", "scaled_normal"):
            assert {"sigma=fixed", f"sigma.value={value}", f"prior={prior}"} in jobs
    assert {"sigma=learned", "regularizer.beta=0"} in jobs
    assert len({word for job in jobs for word in job if word.startswith("regularizer.beta=")}) >= 5
    assert len(preset["hydra"]["sweeper"]["params"]["seed"].split(",")) >= 5  # fewer give tentative verdicts
    for latent in (2, 64):
        assert {"sigma=fixed", "sigma.value=1.0", f"latent={latent}", "prior=standard_normal"} in jobs


def test_the_quick_study_is_part_of_the_study_and_tests_every_claim() -> None:
    folder = configs_dir() / "experiment"
    quick, whole = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("sigma_quick", "sigma_study"))
    jobs = [" ".join(job) for job in jobs_of_study([], quick["arms"])]
    for arm in ("sigma=learned", "sigma=deterministic", "sigma=fixed sigma.value=1.0 prior=standard_normal"):
        assert arm in jobs
    assert {word for job in jobs for word in job.split() if "beta" in word} == {
        f"regularizer.beta={beta}" for beta in ("0", "0.25", "4")
    }
    known = [set(job) for job in jobs_of_study([], whole["arms"])]
    assert all(any(set(job.split()) <= one for one in known) for job in jobs)
    assert len(quick["hydra"]["sweeper"]["params"]["seed"].split(",")) >= 5
    assert quick["defaults"] == whole["defaults"]


def test_the_tokenizer_study_has_levels_seeds_and_the_metrics_that_its_report_needs() -> None:
    preset = yaml.safe_load((configs_dir() / "experiment" / "tokenizer_study.yaml").read_text())
    jobs = [dict(word.split("=") for word in job) for job in jobs_of_study([], preset["arms"])]
    levels: dict[str, set[str]] = {}
    for job in jobs:
        levels.setdefault(job["sigma"], set()).add(job.get("sigma.value", job.get("regularizer.beta", "")))
    assert len(levels["fixed"]) >= 3
    assert levels["fixed"] == levels["preserving"] > levels["uniform"]  # the same level, for a paired comparison
    assert all(float(level) < 1 for level in levels["preserving"])
    assert len(levels["learned"]) >= 3
    assert levels["deterministic"] == levels["random"] == levels["interpolated"] == {""}
    assert len(preset["hydra"]["sweeper"]["params"]["seed"].split(",")) >= 3
    assert {"rate", "quality", "second_stage"} <= set(preset["metrics"]) <= metric_words().keys()
    assert preset["runs_dir"] != "runs"  # its report would contain the runs of others


def test_the_rae_table_has_the_weights_of_the_authors_code() -> None:
    """Its loss is the mean of (x - x')^2 over 1024 pixels plus w times the mean of z^2 over 16 dimensions; for the VAEs
    it is the sum of (x - x')^2 plus w KL. Ours is -ln N(x; x', s^2) with 2 s^2 = 1, plus beta |z|^2 / 2 or beta KL."""
    preset = yaml.safe_load((configs_dir() / "experiment" / "rae_table.yaml").read_text())
    jobs = [dict(word.split("=") for word in job) for job in jobs_of_study([], preset["arms"])]
    assert 2 * preset["likelihood"]["scale"] ** 2 == pytest.approx(1, abs=1e-4)
    assert [float(job["regularizer.beta"]) for job in jobs if "regularizer" not in job] == [0.312, 2 * 0.0195]
    without_noise = [job for job in jobs if job["sigma"] == "deterministic" and "regularizer.beta" in job]
    on_code = [float(job["regularizer.beta"]) for job in without_noise]
    assert on_code == pytest.approx([2 * 1024 / 16 * weight for weight in (0.5e-3, 1e-4, 0.009, 1e-4)])
    assert preset["metrics"] == ["quality"]
    assert preset["runs_dir"] != "runs"


def test_a_study_trains_its_arms_and_adds_nothing_to_their_settings(commands: Any, tmp_path: Path) -> None:
    words = ["experiment=sigma_study", "epochs=1", "sigma=fixed", "sigma.value=0.5", "seed=0", "network.hidden=[8]"]
    done = commands.run("train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = sorted((tmp_path / "runs" / "digits").iterdir())
    assert len(runs) == 2
    for run in runs:
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert "arms" not in config
        assert config["sigma"]["value"] == 0.5
    again = commands.run("train", *words, cwd=tmp_path)
    assert again.returncode == 0
    assert again.stdout.startswith("2 jobs: 2 finished (skipped)\n")
    assert "next:\n  vae compare runs/digits" in again.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (['arms=["sigma=fixed"]'], "several runs: add -m"),
        (["-m", 'arms="sigma=fixed"'], "arms must be a list of sweeps"),
        (
            ["-m", "experiment=sigma_study,rae_l2_loss"],
            "a study is already a sweep, so it cannot be one of several values: run each study alone",
        ),
        (["experiment=sigma_study", "sigma=fixed", "sigma.value=3"], "no arm of this study has"),
        (["-m", 'arms=["sigma=fixd"]'], "'fixd' is not a choice of sigma. Did you mean 'fixed'?"),
        (["-m", 'arms=["sigma"]'], "sigma"),
    ],
)
def test_an_invalid_study_is_refused_with_a_message(words: list[str], said: str, commands: Any, tmp_path: Path) -> None:
    done = commands.run("train", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("vae: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "digits").exists()
