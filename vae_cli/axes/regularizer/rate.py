"""Penalties on the rate of each image, and on the mean rate."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from vae_cli.axes.regularizer.base import Regularizer, Weight
from vae_cli.axes.schedule import as_schedule
from vae_cli.core.compatibility import Need
from vae_cli.core.values import Count
from vae_cli.machine import distributed
from vae_cli.model.inference import Inference

SMOOTH = Need(
    "sigma",
    "smooth",
    "the doubly reparameterized gradient needs a density that is positive everywhere; type "
    "regularizer.gradient=reparameterized",
)


class KL(Regularizer):
    """beta * KL(q(z|x) || p(z)); for a point mass, beta * energy, with energy = -log p(loc).

    With beta = 1 the loss is the negative ELBO of Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014; with
    another beta it is the beta-VAE of Higgins et al., ICLR 2017. Distortion, and a KL divergence without a closed form,
    are averaged over `draws` draws of z, which lowers the variance of the gradient.
    """

    def __init__(self, beta: Weight = 1.0, draws: Count = 1) -> None:
        super().__init__()
        self.beta = as_schedule(beta)
        self.draws = draws

    def forward(self, inference: Inference) -> Tensor:
        return self.beta.times(inference.kl)


class ImportanceWeighted(Regularizer):
    """The penalty that makes the loss the negative importance-weighted bound with K = `draws` draws:

        loss = -ln(1/K sum_k w_k)
        w_k = p(x|z_k) (p(z_k) / q(z_k|x))^beta, z_k ~ q(z|x)

    The penalty is the loss minus the distortion, so it can be lower than the rate, and even negative. With beta = 1 the
    bound grows with K towards ln p(x); with K = 1 it is the ELBO, with a sampled rate. Burda et al., Importance
    Weighted Autoencoders, ICLR 2016.

    gradient=reparameterized is the gradient of the loss. With gradient=doubly_reparameterized, the gradient of the
    bound with respect to the posterior's parameters is sum_k v_k^2 (d ln w_k / d z_k) (d z_k / d parameters), with
    normalized weights v_k = w_k / sum_j w_j. It has the same mean, and its signal-to-noise ratio does not fall as K
    grows. Tucker et al., Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives, ICLR 2019.
    """

    needs: tuple[Need, ...] = (
        Need("sigma", "noise", "a point mass has no density to weight its draws with; type regularizer=kl"),
    )

    def __init__(
        self,
        draws: Count = 5,
        beta: Weight = 1.0,
        gradient: Literal["reparameterized", "doubly_reparameterized"] = "reparameterized",
    ) -> None:
        super().__init__()
        self.draws = draws
        self.beta = as_schedule(beta)
        self.gradient = gradient
        if gradient == "doubly_reparameterized":
            self.needs = (*self.needs, SMOOTH)

    def forward(self, inference: Inference) -> Tensor:
        z = inference.z
        is_doubled = self.gradient == "doubly_reparameterized" and torch.is_grad_enabled() and z.requires_grad
        log_posterior = inference.posterior.log_prob(z)
        if is_doubled:  # keep the gradient through z, and drop the one through the parameters of the density
            through_parameters = inference.posterior.log_prob(z.detach())
            log_posterior = log_posterior - (through_parameters - through_parameters.detach())
        log_weight = self.beta.times(inference.prior.log_prob(z) - log_posterior) - inference.surprisal
        log_weight = log_weight.unflatten(0, (-1, len(inference.x))) if log_weight.dim() == 1 else log_weight
        if is_doubled:  # the gradient of the bound gives z_k one factor v_k
            share = log_weight.detach().softmax(0).reshape(z.shape[:-1])
            z.register_hook(lambda gradient: gradient * share.unsqueeze(-1))
        return math.log(self.draws) - log_weight.logsumexp(0) - inference.distortion


class FreeBits(Regularizer):
    """beta * sum_j max(floor, mean over the batch of KL_j): only KL above the floor is penalized.

    floor is in nats per latent dimension. The mean over the batch is inside the maximum, so the penalty is the same for
    every image of a batch. Kingma et al., Improved Variational Inference with Inverse Autoregressive Flow, NeurIPS
    2016, appendix C.8.
    """

    needs = (
        Need("sigma", "noise", "the rate of a point mass is infinite, so a floor has no effect; type regularizer=kl"),
        Need("sigma", "dimensions", "with this sigma the rate is not a sum over dimensions; type regularizer=kl"),
        Need("prior", "dimensions", "with this prior the rate is not a sum over dimensions; type regularizer=kl"),
    )

    def __init__(self, floor: Weight = 0.1, beta: Weight = 1.0) -> None:
        super().__init__()
        self.floor = as_schedule(floor)
        self.beta = as_schedule(beta)

    def forward(self, inference: Inference) -> Tensor:
        assert inference.rate_per_dimension is not None  # ensured by `needs`
        rates = distributed.mean(inference.rate_per_dimension, 0)
        return self.beta.times(torch.maximum(rates, self.floor()).sum()).expand(len(inference.x))


class Capacity(Regularizer):
    """gamma * |mean over the batch of KL - capacity|: steers the rate towards the capacity, in nats per image.

    The mean over the batch is inside the absolute value, so the penalty is the same for every image of a batch.
    Burgess et al., Understanding disentangling in beta-VAE, 2018.
    """

    needs = (Need("sigma", "noise", "the rate of a point mass is infinite and cannot be steered; type regularizer=kl"),)

    def __init__(self, capacity: Weight = 25.0, gamma: Weight = 10.0) -> None:
        super().__init__()
        self.capacity = as_schedule(capacity)
        self.gamma = as_schedule(gamma)

    def forward(self, inference: Inference) -> Tensor:
        return self.gamma.times((distributed.mean(inference.kl) - self.capacity()).abs()).expand(len(inference.x))
