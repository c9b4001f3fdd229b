"""Penalties on the distribution of the codes of all images, estimated from a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from vae_cli.axes.regularizer.base import GIVEN, Regularizer, Weight, has_weight, weighted_kl
from vae_cli.axes.schedule import as_schedule
from vae_cli.core.compatibility import Need
from vae_cli.core.errors import UserError
from vae_cli.core.values import Count, Interval, Positive
from vae_cli.machine import distributed
from vae_cli.model.aggregate import Kernel, covariance, log_densities, mean_discrepancy
from vae_cli.model.critic import Critic
from vae_cli.model.inference import Inference, over_samples

Layers = Annotated[int, Interval(1, 100)]
Decay = Annotated[float, Interval(0, 0.999999)]  # of a running mean


class MMD(Regularizer):
    """weight * MMD^2(q(z), p(z)) + beta * KL(q(z|x) || p(z)): pulls the distribution of all codes towards the prior.

    MMD^2 is the squared maximum mean discrepancy between the B codes of the batch and B draws of the prior, estimated
    without bias as a U-statistic:

        MMD^2 = E k(z, z') - 2 E k(z, y) + E k(y, y'),  z, z' ~ q(z), y, y' ~ p(z)
        kernel=imq   k(z, y) = sum_t t C / (t C + |z - y|^2), inverse multiquadratics
        kernel=rbf   k(z, y) = sum_t exp(-|z - y|^2 / (t C)), Gaussians

    The sums are over t in `scales`. C = 2 D s^2 for a prior with standard deviation s, in general 2 sum_j Var_p(z_j).
    The curve `mmd` shows MMD^2 without its weight. It is the same for every image of a batch, and 0 if the batch has
    one image. A large weight can keep a noisy posterior at the prior, where MMD^2 is 0 and the code carries no
    information. The gradient of MMD^2 reaches only the codes; a prior's parameters are trained by the KL term. For a
    point mass, the KL term is the energy, as in regularizer=kl.

    WAE-MMD    beta = 0 and weight = lambda, with kernel=imq, the default scales and any sigma, if the distortion is the
               cost. If the cost is |x - g(z)|^2 instead, and the likelihood is N(g(z), v I), type weight = lambda /
               (2 v): the loss of the paper is then 2 v times this loss, up to a constant. Tolstikhin et al.,
               Wasserstein Auto-Encoders, ICLR 2018.
    InfoVAE    beta = 1 - alpha and weight = alpha + lambda - 1, since its loss is distortion + (1 - alpha) KL +
               (alpha + lambda - 1) MMD^2. The kernel exp(-|z - y|^2 / D^2) of its authors' code is kernel=rbf with
               scales=[D / 2] under N(0, I). Zhao et al., InfoVAE: Balancing Learning and Inference in Variational
               Autoencoders, AAAI 2019.

    Raises UserError if `scales` is empty.
    """

    parts = ("mmd",)
    least_images = 2
    kernel: Kernel
    scales: Tensor  # (T,)

    def __init__(
        self,
        weight: Weight = 10.0,
        beta: Weight = 0.0,
        kernel: Kernel = "imq",
        scales: Sequence[Positive] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
    ) -> None:
        super().__init__()
        if not scales:
            raise UserError("regularizer.scales=[] is not allowed: give at least one number above 0, such as [1.0].")
        self.weight = as_schedule(weight)
        self.beta = as_schedule(beta)
        self.kernel = kernel
        self.register_buffer("scales", torch.tensor([float(t) for t in scales]), persistent=False)
        self.needs = () if has_weight(self.beta) else (GIVEN,)

    def forward(self, inference: Inference) -> Tensor:
        mmd = mean_discrepancy(inference.z, inference.prior, self.kernel, self.scales)
        inference.parts["mmd"] = mmd
        return weighted_kl(self.beta, inference) + self.weight.times(mmd)


class TotalCorrelation(Regularizer):
    """alpha * MI + beta * TC + gamma * DKL: the three parts of the mean KL, each with a weight of its own.

        mean KL(q(z|x) || p(z)) = MI + TC + DKL
        MI   mutual information of image index and code, E[ln q(z|x) - ln q(z)]
        TC   total correlation of the dimensions, E[ln q(z) - sum_j ln q(z_j)]
        DKL  dimension-wise KL, sum_j KL(q(z_j) || p(z_j))
        q(z) = 1/N sum_n q(z|x_n), over the N training images

    q(z) and its marginals q(z_j) are estimated from each batch by minibatch stratified sampling (see `log_densities`),
    and MI and TC from the code z of each image. DKL is the KL divergence, which has a closed form, minus MI and TC. So
    the parts add up to the rate of each image, and with equal weights the penalty is that of regularizer=kl. The
    estimate of ln q(z) is too low on average, so that of MI is too high. It never exceeds ln N.

    The parts are logged as the curves `index_code_mi`, `total_correlation` and `dimension_kl`. N is the number of
    training images in validation and test, too, so that all curves estimate the same quantities. The estimates still
    depend on the batch size, which is 500 in validation and test. In a batch of one image, MI and TC are 0.

    beta-TCVAE of Chen et al., Isolating Sources of Disentanglement in Variational Autoencoders, NeurIPS 2018.
    """

    parts = ("index_code_mi", "total_correlation", "dimension_kl")
    least_images = 2
    needs: tuple[Need, ...] = (
        Need("sigma", "noise", "the mutual information of a point mass is infinite; type regularizer=kl"),
        Need(
            "sigma",
            "dimensions",
            "the estimate needs a posterior that is a product over dimensions; type sigma=learned, or regularizer=kl",
        ),
        Need(
            "sigma",
            "smooth",
            "the density of the codes has no gradient where it is constant, so its estimate trains nothing; type "
            "sigma=fixed, or regularizer=kl",
        ),
        Need(
            "prior",
            "dimensions",
            "a dimension-wise KL needs a prior that is a product over dimensions; type prior=standard_normal",
        ),
    )

    def __init__(self, alpha: Weight = 1.0, beta: Weight = 6.0, gamma: Weight = 1.0) -> None:
        super().__init__()
        self.alpha = as_schedule(alpha)
        self.beta = as_schedule(beta)
        self.gamma = as_schedule(gamma)
        self.images: int | None = None
        if not has_weight(self.gamma):  # the only part with the prior in it
            self.needs = (*self.needs, GIVEN)

    def start(self, images: int) -> None:
        """Set N, the number of training images; until then, N is the batch size."""
        self.images = images

    def forward(self, inference: Inference) -> Tensor:
        joint, single = log_densities(inference.posterior, inference.z, self.images)
        information = over_samples(inference.posterior.log_prob(inference.z) - joint)
        correlation = over_samples(joint - single.sum(-1))
        rest = inference.kl - information - correlation
        inference.parts.update(zip(self.parts, (information, correlation, rest), strict=True))
        return self.alpha.times(information) + self.beta.times(correlation) + self.gamma.times(rest)


class DIP(Regularizer):
    """beta * KL + lambda_od * sum_{i != j} Cov_ij^2 + lambda_d * sum_i (Cov_ii - 1)^2: pulls codes to covariance I.

    version=I    Cov = Cov_x(E(z|x)), of the mean codes
    version=II   Cov = Cov_x(E(z|x)) + E_x(Cov(z|x)), of the codes z ~ q(z)

    Cov_x is the covariance over the images of the batch, with B - 1 in the denominator. Both sums are the same for
    every image of a batch, and 0 if it has one image; the curves `dip_off_diagonal` and `dip_diagonal` show them
    without their weights. For a point mass, the versions are equal, and the KL term is the energy, as in
    regularizer=kl. The variances are compared with 1 whatever the prior is.

    DIP-VAE-I, with lambda_d = 10 lambda_od, and DIP-VAE-II, with lambda_d = lambda_od, of Kumar et al., Variational
    Inference of Disentangled Latent Concepts from Unlabeled Observations, ICLR 2018.
    """

    provides = frozenset()
    parts = ("dip_off_diagonal", "dip_diagonal")
    least_images = 2

    def __init__(
        self,
        version: Literal["I", "II"] = "I",
        lambda_od: Weight = 10.0,
        lambda_d: Weight = 10.0,
        beta: Weight = 1.0,
    ) -> None:
        super().__init__()
        self.version = version
        self.lambda_od = as_schedule(lambda_od)
        self.lambda_d = as_schedule(lambda_d)
        self.beta = as_schedule(beta)
        self.needs = () if has_weight(self.beta) else (GIVEN,)

    def forward(self, inference: Inference) -> Tensor:
        cov = covariance(inference.posterior.mean)
        if self.version == "II":
            cov = cov + mean_noise(inference.posterior)
        diagonal = cov.diagonal()
        off = (cov - diagonal.diag()).square().sum()
        away = (diagonal - 1).square().sum()
        if distributed.size(inference.x) == 1:
            off, away = 0 * off, 0 * away
        inference.parts.update(zip(self.parts, (off, away), strict=True))
        return weighted_kl(self.beta, inference) + self.lambda_od.times(off) + self.lambda_d.times(away)


class Factor(Regularizer):
    """beta * KL(q(z|x) || p(z)) + gamma * TC: the total correlation TC of the codes is penalized, too.

        TC = KL(q(z) || prod_j q(z_j)) = E[ln q(z) - sum_j ln q(z_j)]

    q(z) is the distribution of the codes of all images. A critic l(z) learns the log density ratio in brackets, and TC
    is estimated as the mean of l(z) over the batch. The critic is trained to tell codes from codes whose dimensions are
    shuffled over the same batch. (The paper shuffles a second batch, which costs a second pass through the encoder.)
    The critic's cross-entropy trains only the critic, and the penalty only the model. Both take their steps at the same
    time; the critic has its own learning rate and betas, and no weight decay. Its cross-entropy is not part of the
    loss. The critic changes in training, so losses of different epochs compare only roughly.

    It adds the curves critic_loss (ln 2 = 0.69 if the critic cannot tell the codes apart) and critic_total_correlation.
    FactorVAE of Kim and Mnih, Disentangling by Factorising, ICML 2018.
    """

    provides = frozenset()
    parts = ("critic_loss", "critic_total_correlation")
    needs = (
        Need(
            "sigma",
            "noise",
            "without noise, the codes of N images are N points, whose total correlation is (D - 1) ln N wherever they "
            "are; type regularizer=kl, or sigma=fixed",
        ),
    )

    def __init__(
        self,
        latent: Count,
        beta: Weight = 1.0,
        gamma: Weight = 10.0,
        layers: Layers = 6,
        hidden: Count = 1000,
        lr: Weight = 1e-4,
        betas: list[Decay] | None = None,
    ) -> None:
        super().__init__()
        if latent == 1:
            raise UserError("regularizer=factor needs latent=2 or more: the total correlation of one dimension is 0.")
        if betas is not None and len(betas) != 2:
            raise UserError(f"regularizer.betas={betas} is not allowed: give two numbers, such as [0.5,0.9].")
        self.beta = as_schedule(beta)
        self.gamma = as_schedule(gamma)
        self.critic = Critic(latent, layers, hidden)
        # A learning rate is no part of the loss, so it is not one of the regularizer's modules, as a weight is.
        self.optimizer = {"lr": lr, "weight_decay": 0.0, **({} if betas is None else {"betas": tuple(betas)})}

    def forward(self, inference: Inference) -> Tensor:
        loss, total_correlation = self.critic.loss(inference.z), over_samples(self.critic(inference.z, frozen=True))
        inference.parts.update(zip(self.parts, (loss, total_correlation), strict=True))
        penalty = self.beta.times(inference.kl) + self.gamma.times(total_correlation)
        return penalty + (loss - loss.detach())  # 0, with the gradient of the critic's loss


def mean_noise(posterior: Distribution) -> Tensor:
    """Return E_x(Cov(z|x)) (D, D), the mean over the whole batch of the posterior's covariance."""
    whole = getattr(posterior, "covariance_matrix", None)
    if whole is not None:  # the dimensions are not independent
        return distributed.mean(whole, 0)
    return distributed.mean(posterior.variance, 0).diag()
