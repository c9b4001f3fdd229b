"""Penalties that also suit encoders without noise: on the code and on the decoder, or none."""

from __future__ import annotations

import torch
from torch import Tensor

from vae_cli.axes.regularizer.base import GIVEN, Regularizer, Weight
from vae_cli.axes.schedule import as_schedule
from vae_cli.model.inference import Inference, over_samples


class Energy(Regularizer):
    """beta * |z|^2 / 2, averaged over samples of z: an L2 penalty on the code.

    Unlike the KL divergence, it does not penalize a small sigma. With sigma=deterministic this is the RAE of Ghosh et
    al., From Variational to Deterministic Autoencoders, ICLR 2020. RAE-L2 adds weight decay of the decoder, RAE-SN
    spectral normalization of the decoder.
    """

    provides = frozenset()
    needs = (GIVEN,)

    def __init__(self, beta: Weight = 1.0) -> None:
        super().__init__()
        self.beta = as_schedule(beta)

    def forward(self, inference: Inference) -> Tensor:
        return self.beta.times(_energy(inference))


class GradientPenalty(Regularizer):
    """beta * |z|^2 / 2 + weight * |J|_F^2 with J = d E[x|z] / dz: penalties on the code and on the decoder's Jacobian.

    J is the Jacobian of the decoded mean image with respect to the code. |J|_F^2, the sum of its squared elements,
    bounds the square of the decoder's local Lipschitz constant. It is estimated without bias as |J^T v|^2, with v an
    image of random signs (Hutchinson 1990), and averaged over samples of z. The gradient of the summed pixels, J^T 1,
    would not do: it is 0 if some pixels darken as much as others brighten. If the decoder normalizes over the batch, J
    is the Jacobian of all images of the batch. The curve squared_jacobian shows |J|_F^2.

    With sigma=deterministic this is RAE-GP of Ghosh et al., From Variational to Deterministic Autoencoders, ICLR 2020.
    As in their text, the decoder is differentiated with respect to the code, not with respect to the encoded image.
    """

    parts = ("squared_jacobian",)
    needs = (GIVEN,)
    differentiates = True

    def __init__(self, beta: Weight = 1.0, weight: Weight = 1.0) -> None:
        super().__init__()
        self.beta = as_schedule(beta)
        self.weight = as_schedule(weight)

    def forward(self, inference: Inference) -> Tensor:
        squared_jacobian = over_samples(_pulled_back(inference).square().sum(-1))
        inference.parts["squared_jacobian"] = squared_jacobian
        return self.beta.times(_energy(inference)) + self.weight.times(squared_jacobian)


def _energy(inference: Inference) -> Tensor:
    """Return |z|^2 / 2 (B,), averaged over samples of z."""
    return over_samples(inference.z.square().sum(-1) / 2)


def _pulled_back(inference: Inference) -> Tensor:
    """Return J^T v (*S, B, D) for one image of random signs v for each code, with J = d E[x|z] / dz."""
    z, is_training = inference.z, torch.is_grad_enabled()
    with torch.enable_grad():
        if is_training and z.requires_grad:
            mean = inference.likelihood.mean
        else:  # the decoder was not recorded
            assert inference.decode is not None
            z = z.detach().requires_grad_()
            mean = inference.decode(z).mean
        signs = torch.bernoulli(torch.full_like(mean, 0.5)) * 2 - 1
        # The gradient of a sum: torch imports sympy for the gradient of anything else.
        return torch.autograd.grad((mean * signs).sum(), z, create_graph=is_training)[0]


class Nothing(Regularizer):
    """No penalty, 0 for every image: the loss is the distortion."""

    needs = (GIVEN,)

    def forward(self, inference: Inference) -> Tensor:
        return torch.zeros_like(inference.distortion)
