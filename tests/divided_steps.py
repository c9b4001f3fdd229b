"""Check, under torchrun, that a step on a batch divided between processes equals the step of one process.

Each process first takes the steps alone, then together with the others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from vae_cli.axes.regularizer import Regularizer
from vae_cli.config.build import Experiment, build_experiment
from vae_cli.config.catalog import configs_dir, groups
from vae_cli.config.compose import to_plain
from vae_cli.core.errors import UserError
from vae_cli.core.rng import derive_seed
from vae_cli.machine import distributed
from vae_cli.machine.launch import launched
from vae_cli.training.meter import Meter, NotFinite
from vae_cli.training.step import Step

BATCHES = [7, 2, 1]  # 7 does not divide evenly; 1 leaves a process without an image
SMALLER = {"regularizer=factor": ["regularizer.hidden=16"]}
TOGETHER = {"sigma=power_spherical": ["prior=sphere"], "prior=sphere": ["sigma=power_spherical"]}

Steps = dict[str, Tensor]


class Dropping(Regularizer):
    """A user's own regularizer, with parameters and with random numbers of all shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 1)

    def forward(self, inference: Any) -> Tensor:
        z = inference.z
        code = nn.functional.dropout(z, 0.5) + torch.randn(len(z), 16) + torch.randn((len(z), 16)) + torch.rand_like(z)
        code = code + torch.normal(z.detach(), torch.ones_like(z)) + torch.empty_like(z).exponential_()
        everywhere = torch.rand(16) + torch.rand(())  # not one for each image
        return self.layer(code + everywhere).squeeze(-1) + torch.randint(3, (len(z),))


def cases() -> Iterator[list[str]]:
    """Yield overrides that cover every choice of the axes that a step depends on."""
    words = {name: [f"{name}={choice}" for choice in group.choices] for name, group in groups().items()}
    for sigma, regularizer in product(words["sigma"], words["regularizer"]):
        yield [sigma, *TOGETHER.get(sigma, []), regularizer, *SMALLER.get(regularizer, [])]
    yield from ([prior, *TOGETHER.get(prior, []), "regularizer=mmd", "regularizer.beta=1"] for prior in words["prior"])
    for sigma in words["sigma"]:
        yield [sigma, *TOGETHER.get(sigma, []), "regularizer=kl", "regularizer.draws=3"]
        yield [sigma, "prior=mixture"]
    yield ["prior=scaled_normal", "regularizer=total_correlation"]
    yield ["regularizer=dip", "regularizer.version=II"]
    yield ["regularizer=importance_weighted", "regularizer.gradient=doubly_reparameterized"]
    yield ["regularizer=kl", "regularizer.draws=3"]
    for likelihood in [*words["likelihood"], "likelihood=bernoulli likelihood.binarize=dynamic"]:
        yield [*likelihood.split(), "regularizer=capacity"]
    yield ["likelihood=laplace", "likelihood.scale=optimal"]
    yield from ([network] for network in words["network"])
    yield from ([f"network={network}", "latent=[1,4,4]"] for network in ("conv", "resnet"))
    for network in words["network"]:
        yield [network, "network.spectral_norm=true", "regularizer=gradient_penalty", "likelihood=bernoulli"]
    yield from (
        [prior, *TOGETHER.get(prior, []), "max_grad_norm=0.1", "precision=bfloat16"] for prior in words["prior"]
    )


def build(overrides: list[str]) -> Experiment | None:
    """Build an experiment, or return None if its choices cannot be combined."""
    try:
        experiment = build_experiment(to_plain(compose("train", overrides, return_hydra_config=True)))
    except UserError as error:
        if "cannot be combined" not in str(error):
            raise
        return None
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in experiment.regularizer.parameters():  # an untrained critic does nothing
            parameter.add_(torch.randn_like(parameter) / 4)
    return experiment


def steps(experiment: Experiment) -> Steps:
    """Run each batch forward and backward, and return the gradients, losses, buffers and random state."""
    before = deepcopy(experiment.model.state_dict())
    torch.manual_seed(derive_seed(0, "noise"))
    step, meter, found, seen = Step(experiment), Meter(), {}, list[Any]()
    hook = experiment.model.register_forward_hook(lambda *given: seen.append(given[-1]))
    parameters = {**dict(experiment.model.named_parameters()), **dict(experiment.regularizer.named_parameters())}
    for batch in BATCHES:
        for parameter in parameters.values():
            parameter.grad = None
        terms = step.compute(torch.arange(batch))
        meter.add(batch, terms)
        found |= {f"{batch} {name}": p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        found[f"{batch} loss"] = distributed.total(terms["loss"].sum()) / batch
        z = seen.pop().z.detach().movedim(-2, 0)[: len(terms["loss"])]
        found[f"{batch} sum of z"] = distributed.total(z.flatten(0, -2).sum(0))
    hook.remove()
    found |= {f"buffer {name}": buffer.clone() for name, buffer in experiment.model.named_buffers()}
    found |= {f"mean {name}": torch.tensor(mean) for name, mean in meter.epoch().items()}
    experiment.model.load_state_dict(before)  # the batches change buffers, such as the optimal scale of a likelihood
    return {**found, "random state": torch.get_rng_state()}


def compare(alone: Steps, divided: Steps, case: object) -> None:
    assert alone.keys() == divided.keys(), case
    assert torch.equal(alone["random state"], divided["random state"]), case
    for name, value in alone.items():
        loose = 1e-2 if "precision=bfloat16" in str(case) else 1e-4
        scale = float(value.abs().max()) if value.is_floating_point() and value.numel() else 1.0
        if name.startswith("mean "):  # a term near 0 can be a difference of much larger numbers
            scale = max(scale, 0.01)
        if "sigma=preserving" in str(case) and " encoder." in name:
            # Standardization makes some gradients 0 but for rounding: of a bias, or of all weights with two images.
            scale = max(float(other.abs().max()) for key, other in alone.items() if " encoder." in key)
        torch.testing.assert_close(divided[name], value, rtol=loose, atol=loose * scale, msg=f"{case}: {name}")


def check_words() -> None:
    """Check the functions that send values from one process to the others."""
    rank = distributed.rank()
    assert distributed.first(lambda: rank) == 0
    assert distributed.gathered(rank) == list(range(distributed.count()))
    assert distributed.greatest(rank) == distributed.count() - 1
    assert distributed.total(torch.tensor([1.0, rank])).tolist() == [
        distributed.count(),
        sum(range(distributed.count())),
    ]
    assert distributed.together(lambda: rank) == rank
    assert distributed.same(1)
    assert not distributed.same(rank)

    def fail(where: int) -> None:
        if rank == where:
            raise UserError("no such thing")

    def diverge() -> None:
        raise NotFinite(3, ["loss"])

    for do, said in (
        (lambda: distributed.first(lambda: fail(0)), "no such thing"),
        (lambda: distributed.first(diverge), "loss became NaN or infinite at step 3"),
        (lambda: distributed.together(lambda: fail(1)), "process 1 on "),
        (lambda: distributed.together(lambda: fail(rank)), "no such thing"),
    ):
        with pytest.raises((UserError, NotFinite), match=f"^{said}"):
            do()


def main() -> None:
    torch.set_num_threads(1)
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        built = [(case, build(case)) for case in cases()]
        alone: list[tuple[object, Experiment, Steps]] = [
            (case, experiment, steps(experiment)) for case, experiment in built if experiment is not None
        ]
        custom = build(["sigma=learned"])
    assert custom is not None
    with torch.random.fork_rng():
        torch.manual_seed(3)
        custom.regularizer = Dropping()  # type: ignore[assignment]
    alone.append(("a user's own regularizer", custom, steps(custom)))
    with distributed.joined():
        assert distributed.count() == launched().count
        check_words()
        for case, experiment, expected in alone:
            compare(expected, steps(experiment), case)
    if launched().rank == 0:
        print(f"{len(alone)} cases are equal")


if __name__ == "__main__":
    sys.exit(main())
