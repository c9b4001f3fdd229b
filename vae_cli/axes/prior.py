"""The axis `prior`: the distribution p(z) over codes, with batch shape () and event shape (D,)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

from vae_cli.core.compatibility import Need
from vae_cli.core.errors import UserError
from vae_cli.core.values import Count, Interval
from vae_cli.model.distributions import MixtureDistribution
from vae_cli.model.flow import Coupling, FlowDistribution
from vae_cli.model.scales import LearnedScale, Standard, diagonal_normal
from vae_cli.model.sphere import UniformOnSphere

NOISE = Need(
    "sigma",
    "noise",
    "the penalty on a point mass, -log p(loc), has no lower bound if the prior's scale is learned; "
    "type prior=standard_normal",
)

Encode = Callable[[Tensor], Distribution]
Couplings = Annotated[int, Interval(2, 100)]  # a single one would leave half of the dimensions as they are
Layers = Annotated[int, Interval(1, 100)]


class Prior(nn.Module):
    """A prior: forward() returns p(z).

    If the KL divergence from the posterior has no closed form, the rate is estimated with the draws of z that are
    decoded (see Inference.kl).

    provides  "dimensions" if p(z) is a diagonal normal, so that Inference.rate_per_dimension is defined;
              "given" if the prior has no learned parameters;
              "sphere" if it is a distribution on the sphere |z| = 1
    """

    provides: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[tuple[Need, ...]] = ()

    def start(self, encode: Encode, mean: Tensor, spread: float) -> None:
        """Receive what a prior may need of the model and its training images, before training starts.

        encode maps images (B, C, H, W) to q(z|x); mean (C, H, W) is the mean training image, and spread the root mean
        square deviation of pixels from it. The default does nothing, because most priors need none of this.
        """


class StandardNormal(Prior):
    """The standard normal p(z) = N(0, I). Nothing is learned."""

    provides = frozenset({"dimensions", "given"})

    loc: Tensor
    scale: Tensor

    def __init__(self, latent: Count) -> None:
        super().__init__()
        # Constants, so not part of a checkpoint.
        self.register_buffer("loc", torch.zeros(latent), persistent=False)
        self.register_buffer("scale", torch.ones(latent), persistent=False)
        self._made: tuple[Tensor, Distribution] | None = None  # the distribution, and the loc that it was made from

    def forward(self) -> Distribution:
        if self._made is None or self._made[0] is not self.loc:  # which is replaced on another device
            self._made = self.loc, Standard(self.loc, self.scale)
        return self._made[1]


class Sphere(Prior):
    """The uniform distribution on the sphere |z| = 1. Nothing is learned.

    It is the prior of sigma=power_spherical, the only choice whose codes lie on this sphere. Davidson et al.,
    Hyperspherical Variational Auto-Encoders, UAI 2018.
    """

    provides = frozenset({"given", "sphere"})
    needs = (
        Need(
            "sigma",
            "sphere",
            "codes do not lie on the sphere with this sigma, so the rate is infinite; type sigma=power_spherical "
            "prior=sphere",
        ),
    )

    zero: Tensor

    def __init__(self, latent: Count) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(latent), persistent=False)

    def forward(self) -> Distribution:
        return UniformOnSphere(self.zero)


class ScaledNormal(Prior):
    """p(z) = N(loc, diag(scale^2)) with loc (D,) and scale (D,) learned; it starts as N(0, I).

    Up to a shift and a rescaling of z, sigma=fixed with this prior is equivalent to sigma=shared with N(0, I): both
    learn one ratio of sigma to the prior's scale per dimension, shared by all images.
    """

    provides = frozenset({"dimensions"})
    needs = (NOISE,)

    def __init__(self, latent: Count) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(latent))
        self.scale = LearnedScale(latent)

    def forward(self) -> Distribution:
        log_scale = self.scale.log()
        return diagonal_normal(self.loc, log_scale.exp(), log_scale=log_scale)


class GaussianMixture(Prior):
    """p(z) = sum_k w_k N(z; loc_k, diag(scale_k^2)), with weights w (K,), locs and scales (K, D) learned.

    The weights start equal. In each dimension, components start with variance 1/2 around random locs of variance 1/2,
    so the mixture starts about as wide as N(0, I). A single component starts as N(0, I) and is the same prior as
    prior=scaled_normal, except that its rate is estimated from draws. Jiang et al., Variational Deep Embedding, IJCAI
    2017; as the baseline of the VampPrior: Tomczak and Welling, VAE with a VampPrior, AISTATS 2018.
    """

    needs = (NOISE,)

    def __init__(self, latent: Count, components: Count = 10) -> None:
        super().__init__()
        between = 0.5 if components > 1 else 0.0  # the variance of the locs
        self.loc = nn.Parameter(between**0.5 * torch.randn(components, latent))
        self.scale = LearnedScale(components, latent)
        self.scale.set((1 - between) ** 0.5)
        self.logits = nn.Parameter(torch.zeros(components))

    def forward(self) -> Distribution:
        log_scale = self.scale.log()
        return MixtureDistribution(
            Categorical(logits=self.logits, validate_args=False),
            diagonal_normal(self.loc, log_scale.exp(), log_scale=log_scale),
        )


class Vamp(Prior):
    """The VampPrior p(z) = 1/K sum_k q(z|u_k): a mixture of the posteriors of K learned pseudo-inputs u_k.

    A pseudo-input has the shape of an image. If the pseudo-inputs were the training images, the prior would be the
    aggregate posterior, and the mean rate the mutual information between a code and the index of its image. Every
    training step encodes all pseudo-inputs. Each starts as the mean training image plus noise whose standard deviation
    is the spread of the pixels; its values may leave the range of pixels. Tomczak and Welling, VAE with a VampPrior,
    AISTATS 2018.
    """

    needs = (
        Need(
            "sigma",
            "noise",
            "a mixture of point masses has no density, so the rate is infinite; type prior=standard_normal",
        ),
        Need(
            "sigma",
            "smooth",
            "a mixture of these posteriors has a density of 0 between them, so the rate is infinite; type "
            "prior=standard_normal",
        ),
        Need(
            "sigma",
            "separate",
            "this sigma standardizes codes over the images, and pseudo-inputs are not images; type "
            "prior=standard_normal",
        ),
    )

    inputs: nn.Parameter  # (K, C, H, W)

    def __init__(self, components: Count = 500) -> None:
        super().__init__()
        self.components = components
        self._encode: Encode | None = None
        # Drawn here, where each axis has its own random numbers; on the CPU, because `meta` has no values.
        self._seed = int(torch.randint(1 << 62, (), device="cpu"))

    def start(self, encode: Encode, mean: Tensor, spread: float) -> None:
        self._encode = encode
        if torch.get_default_device().type == "meta":  # a model without values, built to estimate its memory
            self.inputs = nn.Parameter(torch.empty(self.components, *mean.shape))
            return
        generator = torch.Generator().manual_seed(self._seed)
        noise = torch.randn(self.components, *mean.shape, generator=generator, device="cpu")
        self.inputs = nn.Parameter(mean + spread * noise.to(mean.device))

    def forward(self) -> Distribution:
        assert self._encode is not None  # set by `start`
        weights = Categorical(logits=self.inputs.new_zeros(self.components), validate_args=False)
        return MixtureDistribution(weights, self._encode(self.inputs))


class Flow(Prior):
    """p(z) is the distribution of f(u) with u ~ N(0, I), where f is a normalizing flow of affine coupling layers.

    Each coupling layer shifts and rescales one half of the dimensions by amounts that a network computes from the other
    half, and the halves take turns. The flow starts as the identity, so p(z) starts as N(0, I). The rate has no closed
    form and is estimated from draws. Dinh, Sohl-Dickstein and Bengio, Density Estimation Using Real NVP, ICLR 2017.
    Chen et al., Variational Lossy Autoencoder, ICLR 2017, use an autoregressive flow as the prior of a VAE.

    The default sizes are those of the RealNVP in Tomczak, Deep Generative Modeling, Springer 2022, which has separate
    networks for shift and scale; here one network computes both. On the digits (60 epochs, one seed), a single hidden
    layer instead of two lowered the test ELBO from 33.4 to 31.8 nats; 64 instead of 256 units hardly changed it (33.0).

    Raises UserError if latent is 1, because a single dimension has no halves.
    """

    needs = (NOISE,)

    def __init__(self, latent: Count, couplings: Couplings = 8, hidden: Count = 256, layers: Layers = 2) -> None:
        if latent < 2:
            raise UserError(
                "prior=flow needs latent=2 or more, because each coupling transforms half of the dimensions given the "
                "other half; with latent=1, type prior=mixture."
            )
        super().__init__()
        sizes = latent // 2, latent - latent // 2
        networks = [Coupling(sizes[n % 2], sizes[1 - n % 2], hidden, layers) for n in range(couplings)]
        self.couplings = nn.ModuleList(networks)
        self.latent = latent

    def forward(self) -> Distribution:
        return FlowDistribution(self.couplings, self.latent)
