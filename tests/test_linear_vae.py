"""The linear VAE reaches its closed-form optimum.

Learned sigma: Lucas et al., Don't Blame the ELBO!, NeurIPS 2019. Fixed sigma: the same calculation with a constant
scale. lam: eigenvalues of the data covariance; s: the scale of the encoder's noise; the likelihood's scale is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from vae_cli import Run, load_run
from vae_cli.commands.train import train

LATENT = 6
LEARNED = "sigma=learned"
FIXED = ["sigma=fixed", "sigma=fixed sigma.value=0.5"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Runs of `vae train experiment=linear_vae` in a sigma mode, each trained once."""
    folder = tmp_path_factory.mktemp("linear")

    @cache
    def run(sigma: str) -> Run:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            name = sigma.replace("=", "-").replace(" ", "_")
            train(["experiment=linear_vae", *sigma.split(), f"run_name={name}"])
            return load_run(folder / "runs" / name, device="cpu")

    return run


def layers(experiment: Run) -> tuple[Tensor, Tensor]:
    """W (pixels, D) of the decoder and V (D, pixels), the encoder's locations."""
    decoder: Any = experiment.model.decoder
    encoder: Any = experiment.model.encoder
    return decoder[0].weight.detach().double(), encoder[1].weight.detach().double()[:LATENT]


@pytest.mark.parametrize("sigma", [LEARNED, *FIXED])
def test_optimum(trained: Callable[[str], Run], sigma: str) -> None:
    experiment = trained(sigma)
    W, V = layers(experiment)  # noqa: N806
    x = experiment.splits.test.batch(torch.arange(len(experiment.splits.test)))
    pixels = x.flatten(1).double()
    covariance = pixels.T @ pixels / len(pixels)
    lam = torch.linalg.eigvalsh(covariance).flip(0)
    s = {LEARNED: None, FIXED[0]: 1.0, FIXED[1]: 0.5}[sigma]

    # The closed forms, for each latent dimension.
    top = lam[:LATENT]
    active = top > (1.0 if s is None else s * s)
    shrinkage = torch.where(active, 1 - 1 / top if s is None else 1 - s / top.sqrt(), 0.0)
    information = torch.where(active, top.log() / 2 if s is None else (top.sqrt() / s).log() / 2, 0.0)
    floor = 0.0 if s is None else (s * s - 1 - math.log(s * s)) / 2
    rate = information if s is None else torch.where(active, s * s * (top.sqrt() / s - 1) / 2, 0.0) + floor

    # The trained model.
    found = torch.linalg.eigvals(W @ V).real.sort(descending=True).values[:LATENT]
    torch.testing.assert_close(found, shrinkage, rtol=0.02, atol=0.01)
    with torch.no_grad():
        inference = experiment.model(x, (200,))
    assert inference.rate is not None
    torch.testing.assert_close(inference.rate.double().mean(), rate.sum(), rtol=0.02, atol=0)
    noise = inference.scale.double().square().mean(0)
    signal = V @ covariance @ V.T
    channel = (torch.logdet(signal + noise.diag()) - noise.log().sum()) / 2
    torch.testing.assert_close(channel, information.sum(), rtol=0.02, atol=0)
    if s is None:
        # Each axis is a principal component, so active units can be counted.
        units = inference.loc.double().var(0) > 0.01
        assert int(units.sum()) == int(active.sum()) == experiment.folder.summary()["test"]["active_units"]
        assert inference.rate_per_dimension is not None
        each = inference.rate_per_dimension.double().mean(0).sort(descending=True).values
        torch.testing.assert_close(each, rate, rtol=0.02, atol=0.01)
        each = (1 + signal.diagonal() / noise).log() / 2
        torch.testing.assert_close(each.sort(descending=True).values, information, rtol=0.02, atol=0.01)
    else:
        # Fixed noise is isotropic, so the code may be rotated: its axes are those of the signal.
        turned = torch.linalg.eigvalsh(signal).flip(0)
        assert int((turned > 0.01 * s * s).sum()) == int(active.sum())
        torch.testing.assert_close((1 + turned / (s * s)).log() / 2, information, rtol=0.02, atol=0.01)
        torch.testing.assert_close(turned / 2 + floor, rate, rtol=0.02, atol=0.01)

    if s is None:
        explained = torch.where(active, top, 1.0)  # the model's variances; pPCA with noise variance 1
        model = torch.cat([explained, torch.ones(len(lam) - LATENT)])
        likelihood = -0.5 * (model.log() + lam / model + math.log(2 * math.pi)).sum()
        assert inference.elbo is not None
        torch.testing.assert_close(inference.elbo.double().mean(), likelihood, rtol=0.005, atol=0)


def test_half_the_information_at_one(trained: Callable[[str], Run]) -> None:
    """At s = 1 the mutual information is exactly half of the learned model's."""
    found = []
    for sigma in (LEARNED, FIXED[0]):
        experiment = trained(sigma)
        _, V = layers(experiment)  # noqa: N806
        x = experiment.splits.test.batch(torch.arange(len(experiment.splits.test)))
        pixels = x.flatten(1).double()
        signal = V @ (pixels.T @ pixels / len(pixels)) @ V.T
        with torch.no_grad():
            scale = experiment.model.encode(x).stddev.double().square().mean(0)
        found.append(float((torch.logdet(signal + scale.diag()) - scale.log().sum()) / 2))
    assert found[1] == pytest.approx(found[0] / 2, rel=0.02)
