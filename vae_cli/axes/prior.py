"""Where codes are expected: all choices of the axis `prior`, p(z) with batch () and event (D,)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vae_cli.core.compatibility import Need
from vae_cli.core.values import Count
from vae_cli.model.scales import LearnedScale, Standard, diagonal_normal


class Prior(nn.Module):
    """A prior: forward() gives p(z).

    provides  "dimensions" where p(z) is a product over latent dimensions, so that the rate splits into theirs;
              "given" where there is nothing in it to learn
    """

    provides: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[tuple[Need, ...]] = ()


class StandardNormal(Prior):
    """N(0, I)."""

    provides = frozenset({"dimensions", "given"})

    loc: Tensor
    scale: Tensor

    def __init__(self, latent: Count) -> None:
        super().__init__()
        # Not part of a checkpoint: there is nothing to remember.
        self.register_buffer("loc", torch.zeros(latent), persistent=False)
        self.register_buffer("scale", torch.ones(latent), persistent=False)

    def forward(self) -> Distribution:
        return diagonal_normal(self.loc, self.scale, Standard)


class ScaledNormal(Prior):
    """N(loc, diag(scale^2)), both learned for each dimension. It begins as N(0, I).

    Under it a fixed sigma = 1 is one learned sigma per dimension that all images share, up to the scale of z.
    """

    provides = frozenset({"dimensions"})
    needs = (
        Need(
            "sigma",
            "noise",
            "the energy of a point mass has no lower bound where the prior's scale is learned; "
            "type prior=standard_normal",
        ),
    )

    def __init__(self, latent: Count) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(latent))
        self.scale = LearnedScale(latent)

    def forward(self) -> Distribution:
        return diagonal_normal(self.loc, self.scale())
