"""The table in the README, on the real MNIST if it is next to the clone.

Reference figures of another implementation, one seed: test distortion, rate and -ELBO in nats per image.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from vae_cli.commands.train import train
from vae_cli.runs.folder import RunDir

DATA = Path(__file__).parent.parent.parent / "shared/data"
TABLE = {
    "sigma=learned": (87.15, 23.18, 110.33),
    "sigma=shared": (87.68, 22.83, 110.51),
    "sigma=fixed": (115.61, 22.55, 138.17),
    "sigma=fixed sigma.value=0.5": (97.20, 19.60, 116.80),
    "sigma=fixed prior=scaled_normal": (87.92, 22.10, 110.02),
}


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "MNIST").exists(), reason="MNIST is not beside the clone")
@pytest.mark.parametrize("words", TABLE)
def test_table(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(["experiment=mnist_table", *words.split(), f"data_dir={DATA}", "run_name=a"])
    test = RunDir(tmp_path / "runs/a").summary()["test"]
    distortion, rate, negative_elbo = TABLE[words]
    assert test["distortion"] == pytest.approx(distortion, abs=1.5)
    assert test["rate"] == pytest.approx(rate, abs=1.5)
    assert -test["elbo"] == pytest.approx(negative_elbo, abs=1.5)
