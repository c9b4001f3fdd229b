"""The layers of encoder and decoder: all choices of the axis `network`. Tensors to tensors, no probability inside.

Each choice builds an encoder, images (B, C, H, W) -> raw (B, raw_size * D), and a decoder of the same kind,
codes (B, D) -> raw (B, channels, H, W).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from vae_cli.core.errors import UserError
from vae_cli.core.values import Count, Interval
from vae_cli.model.kernels import Dense

Shape = tuple[int, int, int]
Blocks = Annotated[int, Interval(1, 100)]
Activation = Literal["relu", "tanh", "gelu", "silu", "elu", "leaky_relu", "softplus"]
OutputBias = Literal["mean", "zero"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "softplus": nn.Softplus,
}


class Network(ABC):
    """A kind of network, from which an encoder and a decoder are built.

    output_bias says what the decoder draws before training: the `mean` of the training images, where the likelihood
    has a parameter for it (Burda et al. 2016), or whatever an output of zero stands for.
    """

    # Whether every pixel has an output bias of its own, or all pixels of a channel share one.
    bias_per_pixel: ClassVar[bool] = True

    def __init__(self, output_bias: OutputBias = "mean") -> None:
        self.output_bias = output_bias

    @abstractmethod
    def encoder(self, shape: Shape, latent: int, raw_size: int) -> nn.Module:
        """Images of this shape to raw_size numbers for each of the latent dimensions."""

    @abstractmethod
    def decoder(self, latent: int, start: Tensor) -> nn.Module:
        """Codes to images of start's shape; `start` is the bias of the output, what is drawn before training."""


class Linear(Network):
    """One linear layer each way. Lucas et al., Don't Blame the ELBO!, NeurIPS 2019, give the optimum."""

    def encoder(self, shape: Shape, latent: int, raw_size: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), head(math.prod(shape), latent, raw_size))

    def decoder(self, latent: int, start: Tensor) -> nn.Module:
        return nn.Sequential(output_linear(latent, start), nn.Unflatten(1, start.shape))


class MLP(Network):
    """Fully connected layers with `hidden` units, from image to code; the decoder has them in reverse."""

    def __init__(self, hidden: list[Count], activation: Activation = "relu", output_bias: OutputBias = "mean") -> None:
        super().__init__(output_bias)
        self.hidden = list(hidden)
        self.activation = _ACTIVATIONS[activation]

    def _layers(self, inputs: int, hidden: list[int]) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [Dense(inputs, width), self.activation()]
            inputs = width
        return layers

    def encoder(self, shape: Shape, latent: int, raw_size: int) -> nn.Module:
        inputs = math.prod(shape)
        last = self.hidden[-1] if self.hidden else inputs
        return nn.Sequential(nn.Flatten(), *self._layers(inputs, self.hidden), head(last, latent, raw_size))

    def decoder(self, latent: int, start: Tensor) -> nn.Module:
        last = self.hidden[0] if self.hidden else latent
        layers = self._layers(latent, self.hidden[::-1])
        return nn.Sequential(*layers, output_linear(last, start), nn.Unflatten(1, start.shape))


class Conv(Network):
    """Strided 4x4 convolutions that halve the image until a side is 4 or less, one fully connected layer, and the
    mirror of it. For images of 8 to 128 pixels a side."""

    bias_per_pixel = False

    def __init__(
        self,
        width: Count = 32,
        max_width: Count = 256,
        hidden: Count = 256,
        activation: Activation = "relu",
        normalization: Literal["none", "batch", "group"] = "none",
        output_bias: OutputBias = "mean",
    ) -> None:
        super().__init__(output_bias)
        self.width, self.max_width, self.hidden = width, max_width, hidden
        self.activation = _ACTIVATIONS[activation]
        self.normalization = normalization

    def _after(self, channels: int) -> list[nn.Module]:
        norms: dict[str, list[nn.Module]] = {
            "none": [],
            "batch": [nn.BatchNorm2d(channels)],
            "group": [group_norm(channels)],
        }
        return [*norms[self.normalization], self.activation()]

    def encoder(self, shape: Shape, latent: int, raw_size: int) -> nn.Module:
        sizes = halvings(shape[1:], "conv")
        layers: list[nn.Module] = []
        channels = shape[0]
        for width in doublings(self.width, self.max_width, len(sizes) - 1):
            layers += [nn.Conv2d(channels, width, 4, 2, 1), *self._after(width)]
            channels = width
        flat = channels * math.prod(sizes[-1])
        layers += [nn.Flatten(), Dense(flat, self.hidden), self.activation(), head(self.hidden, latent, raw_size)]
        return nn.Sequential(*layers)

    def decoder(self, latent: int, start: Tensor) -> nn.Module:
        sizes = halvings(tuple(start.shape[1:]), "conv")
        widths = [start.shape[0], *doublings(self.width, self.max_width, len(sizes) - 1)]
        flat = widths[-1] * math.prod(sizes[-1])
        layers: list[nn.Module] = [Dense(latent, self.hidden), self.activation(), Dense(self.hidden, flat)]
        layers += [self.activation(), nn.Unflatten(1, (widths[-1], *sizes[-1]))]
        for level in range(len(sizes) - 1, 0, -1):
            # An odd side loses a pixel on the way down and gets it back here.
            odd = (sizes[level - 1][0] % 2, sizes[level - 1][1] % 2)
            layers += [nn.ConvTranspose2d(widths[level], widths[level - 1], 4, 2, 1, output_padding=odd)]
            layers += self._after(widths[level - 1]) if level > 1 else []
        return nn.Sequential(*with_output_bias(layers, start))


class ResNet(Network):
    """Pre-activation residual blocks with group normalization at every resolution, from the whole image down to a side
    of 4 or less, and the mirror of it. He et al., Identity Mappings in Deep Residual Networks, 2016. For images of 8 to
    128 pixels a side."""

    bias_per_pixel = False

    def __init__(
        self,
        width: Count = 32,
        max_width: Count = 256,
        blocks: Blocks = 1,
        activation: Activation = "silu",
        output_bias: OutputBias = "mean",
    ) -> None:
        super().__init__(output_bias)
        self.width, self.max_width, self.blocks = width, max_width, blocks
        self.activation = _ACTIVATIONS[activation]

    def _blocks(self, channels: int) -> list[nn.Module]:
        return [ResidualBlock(channels, self.activation) for _ in range(self.blocks)]

    def encoder(self, shape: Shape, latent: int, raw_size: int) -> nn.Module:
        sizes = halvings(shape[1:], "resnet")
        widths = doublings(self.width, self.max_width, len(sizes))
        layers: list[nn.Module] = [nn.Conv2d(shape[0], widths[0], 3, padding=1), *self._blocks(widths[0])]
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, 2, 1), *self._blocks(after)]
        layers += [group_norm(widths[-1]), self.activation(), nn.Flatten()]
        return nn.Sequential(*layers, head(widths[-1] * math.prod(sizes[-1]), latent, raw_size))

    def decoder(self, latent: int, start: Tensor) -> nn.Module:
        sizes = halvings(tuple(start.shape[1:]), "resnet")
        widths = doublings(self.width, self.max_width, len(sizes))
        layers: list[nn.Module] = [Dense(latent, widths[-1] * math.prod(sizes[-1]))]
        layers += [nn.Unflatten(1, (widths[-1], *sizes[-1])), *self._blocks(widths[-1])]
        for level in range(len(sizes) - 1, 0, -1):
            layers += [nn.Upsample(sizes[level - 1]), nn.Conv2d(widths[level], widths[level - 1], 3, padding=1)]
            layers += self._blocks(widths[level - 1])
        layers += [group_norm(widths[0]), self.activation(), nn.Conv2d(widths[0], start.shape[0], 3, padding=1)]
        return nn.Sequential(*with_output_bias(layers, start))


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), the same shape out as in."""

    def __init__(self, channels: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *(group_norm(channels), activation(), nn.Conv2d(channels, channels, 3, padding=1)),
            *(group_norm(channels), activation(), nn.Conv2d(channels, channels, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)


def head(inputs: int, latent: int, raw_size: int) -> Dense:
    """The encoder's last layer: raw_size blocks of latent outputs, each initialized as a layer of its own.

    The first block, the locations, thus begins with the same weights whatever the sigma mode asks for beside it.
    """
    blocks = [Dense(inputs, latent) for _ in range(raw_size)]
    merged = Dense(inputs, latent * raw_size)
    with torch.no_grad():
        for number, block in enumerate(blocks):
            rows = slice(number * latent, (number + 1) * latent)
            merged.weight[rows], merged.bias[rows] = block.weight, block.bias
    return merged


def output_linear(inputs: int, start: Tensor) -> Dense:
    """The decoder's last layer, one output per number of start, which is its bias."""
    layer = Dense(inputs, start.numel())
    with torch.no_grad():
        layer.bias.copy_(start.flatten())
    return layer


def with_output_bias(layers: list[nn.Module], start: Tensor) -> list[nn.Module]:
    """Give the last layer, a convolution, what start is all over a channel as its bias."""
    bias = layers[-1].bias
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        bias.copy_(start.mean((1, 2)))
    return layers


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalization with as many as 8 groups."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


def halvings(size: tuple[int, ...], name: str) -> list[tuple[int, int]]:
    """A height and width, halved until a side is 4 or less. Raises UserError where a side is not within 8 to 128."""
    height, width = size
    if not all(8 <= side <= 128 for side in size):
        raise UserError(
            f"network={name} takes images of 8 to 128 pixels a side, not {height}x{width}; type network=mlp."
        )
    sizes = [(height, width)]
    while min(sizes[-1]) > 4:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    return sizes


def doublings(width: int, max_width: int, count: int) -> list[int]:
    """Channels of `count` levels: each has twice as many as the one before, but none more than max_width."""
    return [min(max_width, width * 2**level) for level in range(count)]
