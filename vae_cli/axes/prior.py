"""The axis `prior`: the distribution p(z) over codes, with batch shape () and event shape (D,)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vae_cli.core.compatibility import Need
from vae_cli.core.values import Count
from vae_cli.model.scales import LearnedScale, Standard, diagonal_normal


class Prior(nn.Module):
    """A prior: forward() returns p(z).

    provides  "dimensions" if p(z) is a diagonal normal, so that Inference.rate_per_dimension is defined;
              "given" if the prior has no learned parameters
    """

    provides: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[tuple[Need, ...]] = ()


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
            self._made = self.loc, diagonal_normal(self.loc, self.scale, Standard)
        return self._made[1]


class ScaledNormal(Prior):
    """p(z) = N(loc, diag(scale^2)) with loc (D,) and scale (D,) learned; it starts as N(0, I).

    Up to a shift and a rescaling of z, sigma=fixed with this prior is equivalent to sigma=shared with N(0, I): both
    learn one ratio of sigma to the prior's scale per dimension, shared by all images.
    """

    provides = frozenset({"dimensions"})
    needs = (
        Need(
            "sigma",
            "noise",
            "the penalty on a point mass, -log p(loc), has no lower bound if the prior's scale is learned; "
            "type prior=standard_normal",
        ),
    )

    def __init__(self, latent: Count) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(latent))
        self.scale = LearnedScale(latent)

    def forward(self) -> Distribution:
        log_scale = self.scale.log()
        return diagonal_normal(self.loc, log_scale.exp(), log_scale=log_scale)
