"""The axis `regularizer`: the penalty that is added to the distortion.

Each choice maps an Inference to the penalty (B,), in nats per image. The loss is the mean of distortion + penalty over
the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vae_cli.axes.schedule import Schedule, as_schedule
from vae_cli.core.compatibility import Need
from vae_cli.core.errors import UserError
from vae_cli.core.values import Count, Interval, NonNegative, Positive
from vae_cli.machine import distributed
from vae_cli.model.aggregate import Kernel, covariance, log_densities, mean_discrepancy
from vae_cli.model.critic import Critic
from vae_cli.model.inference import Inference, over_samples

Weight = NonNegative | Schedule
Layers = Annotated[int, Interval(1, 100)]
Decay = Annotated[float, Interval(0, 0.999999)]  # of a running mean

GIVEN = Need("prior", "given", "this loss would not train the prior's parameters; type prior=standard_normal")


class Regularizer(nn.Module):
    """A regularizer: forward maps an Inference to the penalty (B,), in nats per image.

    parts           names of the terms that forward adds to Inference.parts; they become curves
    draws           the number of draws of z for each image, in training and validation
    least_images    the smallest batch size that the penalty is meant for
    needs           may depend on the settings: an instance can replace it
    optimizer       the optimizer's arguments for the regularizer's own parameters, if they differ from the model's
    differentiates  whether forward differentiates the decoder, so that the loss needs second derivatives
    """

    parts: ClassVar[tuple[str, ...]] = ()
    differentiates: ClassVar[bool] = False
    least_images: ClassVar[int] = 1
    needs: tuple[Need, ...] = ()
    draws: int = 1
    optimizer: Mapping[str, Any] = MappingProxyType({})

    @property
    def samples(self) -> tuple[int, ...]:
        """The shape *S of the draws of z (see `VAE.forward`)."""
        return () if self.draws == 1 else (self.draws,)

    def start(self, images: int) -> None:
        """Get to know the number of training images, before the training. The default does nothing with it."""


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
        return self.beta() * inference.kl


class ImportanceWeighted(Regularizer):
    """The penalty that makes the loss the negative importance-weighted bound with K = `draws` draws:

        loss = -ln 1/K sum_k w_k,  w_k = p(x|z_k) (p(z_k) / q(z_k|x))^beta,  z_k ~ q(z|x)

    The penalty is the loss minus the distortion, so it can be lower than the rate, and even negative. With beta = 1 the
    bound grows with K towards ln p(x); with K = 1 it is the ELBO, with a sampled rate. Burda et al., Importance
    Weighted Autoencoders, ICLR 2016.

    gradient  "reparameterized": that of the loss; "doubly_reparameterized": the gradient of the posterior's parameters
              is sum_k v_k^2 (d ln w_k / d z_k) (d z_k / d parameters), with normalized weights v_k. It has the same
              mean, and its signal-to-noise ratio does not fall as K grows. Tucker et al., Doubly Reparameterized
              Gradient Estimators for Monte Carlo Objectives, ICLR 2019.
    """

    needs = (Need("sigma", "noise", "a point mass has no density to weight its draws with; type regularizer=kl"),)

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

    def forward(self, inference: Inference) -> Tensor:
        z = inference.z
        is_doubled = self.gradient == "doubly_reparameterized" and torch.is_grad_enabled() and z.requires_grad
        log_posterior = inference.posterior.log_prob(z)
        if is_doubled:  # keep the gradient through z, and drop the one through the parameters of the density
            through_parameters = inference.posterior.log_prob(z.detach())
            log_posterior = log_posterior - (through_parameters - through_parameters.detach())
        log_weight = inference.log_likelihood + self.beta() * (inference.prior.log_prob(z) - log_posterior)
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
        Need("prior", "dimensions", "with this prior the rate is not a sum over dimensions; type regularizer=kl"),
    )

    def __init__(self, floor: Weight = 0.1, beta: Weight = 1.0) -> None:
        super().__init__()
        self.floor = as_schedule(floor)
        self.beta = as_schedule(beta)

    def forward(self, inference: Inference) -> Tensor:
        assert inference.rate_per_dimension is not None  # ensured by `needs`
        rates = distributed.mean(inference.rate_per_dimension, 0)
        return (self.beta() * torch.maximum(rates, self.floor()).sum()).expand(len(inference.x))


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
        return (self.gamma() * (distributed.mean(inference.kl) - self.capacity()).abs()).expand(len(inference.x))


class MMD(Regularizer):
    """weight * MMD^2(q(z), p(z)) + beta * KL(q(z|x) || p(z)): the codes of a batch shall be distributed like the prior.

    MMD^2 is the squared maximum mean discrepancy between the B codes of the batch and B draws of the prior, estimated
    without bias as a U-statistic:

        MMD^2 = E k(z, z') - 2 E k(z, y) + E k(y, y'),  z, z' ~ q(z), y, y' ~ p(z)
        kernel=imq   k(z, y) = sum_t t C / (t C + |z - y|^2), inverse multiquadratics
        kernel=rbf   k(z, y) = sum_t exp(-|z - y|^2 / (t C)), Gaussians

    The sums are over t in `scales`. C = 2 D s^2 for a prior with standard deviation s, in general 2 sum_j Var_p(z_j).
    The curve `mmd` shows MMD^2 without its weight. It is the same for every image of a batch, and 0 if the batch has
    one image. A large weight can keep a noisy posterior at the prior, where MMD^2 is 0 and the code says nothing. Only
    the codes follow its gradient; the parameters of a prior are trained by the KL term. For a point mass, the KL term
    is the energy, as in regularizer=kl.

    WAE-MMD    beta = 0 and weight = lambda, with sigma=deterministic or noise, kernel=imq and the default scales, if
               the distortion is the cost. If the cost is |x - y|^2 and the likelihood N(y, v), weight = lambda / (2 v).
               Tolstikhin et al., Wasserstein Auto-Encoders, ICLR 2018.
    InfoVAE    beta = 1 - alpha and weight = alpha + lambda - 1, for its loss distortion + (1 - alpha) KL
               + (alpha + lambda - 1) MMD^2. The kernel exp(-|z - y|^2 / D^2) of its authors' code is kernel=rbf with
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
        return weighted_kl(self.beta, inference) + self.weight() * mmd


class TotalCorrelation(Regularizer):
    """alpha * MI + beta * TC + gamma * dimension-wise KL: the three parts of the mean KL divergence, weighted apart.

        MI   = E ln q(z|x) / q(z)               index-code mutual information, of the image's number and its code
        TC   = E ln q(z) / prod_j q(z_j)        total correlation of the dimensions of the code
        D-KL = sum_j KL(q(z_j) || p(z_j))       dimension-wise KL
        mean KL(q(z|x) || p(z)) = MI + TC + D-KL,  q(z) = 1/N sum_n q(z|x_n) over the N training images

    q(z) and its marginals q(z_j) are estimated from each batch by minibatch stratified sampling (see `log_densities`),
    and the parts from the code z of each image. The dimension-wise KL is what the other two leave of the KL divergence,
    which has a closed form, so that the parts add up to the rate of each image; with equal weights the penalty is that
    of regularizer=kl. As ln q(z) is estimated too low, MI is too high, and it never exceeds ln N.

    The parts are logged as the curves `index_code_mi`, `total_correlation` and `dimension_kl`. Images for validation
    and test are treated as a batch of N images, too, so that their curves compare with those of training. They still
    depend on the size of the batch, which is 500 there. In a batch of one image, MI and TC are 0. Without `start`, N is
    the size of the batch.

    beta-TCVAE of Chen et al., Isolating Sources of Disentanglement in Variational Autoencoders, NeurIPS 2018.
    """

    parts = ("index_code_mi", "total_correlation", "dimension_kl")
    least_images = 2
    needs: tuple[Need, ...] = (
        Need("sigma", "noise", "the mutual information of a point mass is infinite; type regularizer=kl"),
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
        self.images = images

    def forward(self, inference: Inference) -> Tensor:
        joint, single = log_densities(inference.posterior, inference.z, self.images)
        information = over_samples(inference.posterior.log_prob(inference.z) - joint)
        correlation = over_samples(joint - single.sum(-1))
        rest = inference.kl - information - correlation
        inference.parts.update(zip(self.parts, (information, correlation, rest), strict=True))
        return self.alpha() * information + self.beta() * correlation + self.gamma() * rest


class DIP(Regularizer):
    """beta * KL + lambda_od * sum_{i != j} Cov_ij^2 + lambda_d * sum_i (Cov_ii - 1)^2, for codes with covariance I.

    version=I    Cov = Cov_x(loc(x)), of the mean codes
    version=II   Cov = Cov_x(loc(x)) + E_x(Cov(z|x)), of the codes z ~ q(z)

    Cov_x is the covariance over the images of the batch, with B - 1 in the denominator. Both sums are the same for
    every image of a batch, and 0 if it has one image; the curves `dip_off_diagonal` and `dip_diagonal` show them
    without their weights. For a point mass, the versions are equal, and the KL term is the energy, as in
    regularizer=kl. The variances are compared with 1 whatever the prior is.

    DIP-VAE-I, with lambda_d = 10 lambda_od, and DIP-VAE-II, with lambda_d = lambda_od, of Kumar et al., Variational
    Inference of Disentangled Latent Concepts from Unlabeled Observations, ICLR 2018.
    """

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
        cov = covariance(inference.loc)
        if self.version == "II":
            cov = cov + mean_noise(inference.posterior)
        diagonal = cov.diagonal()
        off = (cov - diagonal.diag()).square().sum()
        away = (diagonal - 1).square().sum()
        if distributed.size(inference.x) == 1:
            off, away = 0 * off, 0 * away
        inference.parts.update(zip(self.parts, (off, away), strict=True))
        return weighted_kl(self.beta, inference) + self.lambda_od() * off + self.lambda_d() * away


class Energy(Regularizer):
    """beta * |z|^2 / 2, averaged over samples of z: an L2 penalty on the code.

    Unlike the KL divergence, it does not penalize small noise. RAE-L2 of Ghosh et al., From Variational to
    Deterministic Autoencoders, ICLR 2020.
    """

    needs = (GIVEN,)

    def __init__(self, beta: Weight = 1.0) -> None:
        super().__init__()
        self.beta = as_schedule(beta)

    def forward(self, inference: Inference) -> Tensor:
        return self.beta() * over_samples(inference.z.square().sum(-1) / 2)


class Factor(Regularizer):
    """beta * KL(q(z|x) || p(z)) + gamma * TC: the total correlation TC of the codes is penalized, too.

        TC = KL(q(z) || prod_j q(z_j)) = E[ln q(z) - ln prod_j q(z_j)], estimated as the mean of l(z) over the batch

    q(z) is the distribution of the codes of all images. A critic l(z) learns the log density ratio: it is trained to
    tell codes from codes whose dimensions are shuffled over the same batch. (The paper shuffles a second batch, which
    costs a second pass through the encoder.) The critic's cross-entropy trains only the critic, and the penalty only
    the model. Both take their steps at the same time; the critic has its own learning rate and betas, and no weight
    decay. Its cross-entropy is not part of the loss. Losses of different epochs are measured by different critics.

    It adds the curves critic_loss (ln 2 = 0.69 if the critic cannot tell the codes apart) and critic_total_correlation.
    FactorVAE of Kim and Mnih, Disentangling by Factorising, ICML 2018.
    """

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
        penalty = self.beta() * inference.kl + self.gamma() * total_correlation
        return penalty + (loss - loss.detach())  # 0, with the gradient of the critic's loss


class GradientPenalty(Regularizer):
    """beta * |z|^2 / 2 + weight * |J|_F^2 with J = d E[x|z] / dz: a penalty on the code and on the decoder's slope.

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
        return self.beta() * over_samples(inference.z.square().sum(-1) / 2) + self.weight() * squared_jacobian


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


def has_weight(weight: Schedule) -> bool:
    """Return whether a weight is ever above 0."""
    return weight.bounds()[1] > 0


def weighted_kl(beta: Schedule, inference: Inference) -> Tensor:
    """Return beta * KL (B,), or beta * energy for a point mass.

    If beta is always 0, the divergence is not computed: nothing limits the codes then, and 0 times infinity is NaN.
    """
    return beta() * inference.kl if has_weight(beta) else torch.zeros_like(inference.distortion)


def mean_noise(posterior: Distribution) -> Tensor:
    """Return E_x(Cov(z|x)) (D, D), the mean over the whole batch of the posterior's covariance."""
    whole = getattr(posterior, "covariance_matrix", None)
    if whole is not None:  # the dimensions are not independent
        return distributed.mean(whole, 0)
    return distributed.mean(posterior.variance, 0).diag()
