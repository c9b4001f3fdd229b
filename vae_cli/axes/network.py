"""The axis `network`: the layers of encoder and decoder.

Each choice builds an encoder, images (B, C, H, W) -> raw (B, raw_size * D), and a matching decoder, codes (B, D) -> raw
(B, raw_size * C, H, W). The sigma mode defines the encoder's raw_size and turns its raw output into q(z|x); the
likelihood does the same for the decoder and p(x|z).

A code is a vector z (B, D) everywhere in the program. If `latent` is a shape (C, h, w), only the network knows that the
D = C h w numbers lie at h x w positions. The order is channel-major: z[:, (c * h + i) * w + j] is channel c at row i
and column j.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from vae_cli.core.errors import UserError
from vae_cli.core.values import Count, Interval
from vae_cli.core.wording import listed
from vae_cli.model.kernels import Dense

Shape = tuple[int, int, int]
Code = int | Shape  # the number D of latent dimensions, or (C, h, w) for a code with positions
Layer = nn.Linear | nn.Conv2d
Blocks = Annotated[int, Interval(1, 100)]
Activation = Literal["relu", "tanh", "gelu", "silu", "elu", "leaky_relu", "softplus"]
OutputBias = Literal["mean", "zero"]
Gated = Literal[Activation, "gated"]
Initialization = Literal["default", "glorot", "small"]

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
    """A network architecture, which builds an encoder and a decoder.

    bias_per_pixel  whether every pixel has its own output bias, or all pixels of a channel share one
    output_bias     "mean": the untrained decoder outputs the mean of the training images (Burda et al., Importance
                    Weighted Autoencoders, ICLR 2016); "zero": it outputs raw = 0
    spectral_norm   whether the weights of every decoder layer are divided by their spectral norm (see
                    `normalize_layers` in model/spectral.py)
    initialization  "default": torch's, uniform between +-1 / sqrt(inputs); "glorot" and "small": see `initialize`
    provides        "positions" if `latent` may also be a shape (C, h, w), with h and w above 1
    """

    bias_per_pixel: ClassVar[bool] = True
    provides: ClassVar[frozenset[str]] = frozenset()
    spectral_norm: bool = False
    initialization: Initialization = "default"

    def __init__(
        self,
        output_bias: OutputBias = "mean",
        spectral_norm: bool = False,
        initialization: Initialization = "default",
    ) -> None:
        self.output_bias = output_bias
        self.spectral_norm = spectral_norm
        self.initialization = initialization

    @abstractmethod
    def encoder(self, shape: Shape, latent: int, raw_size: int) -> nn.Module:
        """Build the encoder, images (B, *shape) -> raw (B, raw_size * latent)."""

    @abstractmethod
    def decoder(self, latent: int, start: Tensor) -> nn.Module:
        """Build the decoder, codes (B, latent) -> raw (B, *start.shape); start initializes the output bias."""


class Linear(Network):
    """A linear encoder and a linear decoder: the linear VAE.

    Its optimum has a closed form (Lucas et al., Don't Blame the ELBO!, NeurIPS 2019).
    """

    def encoder(self, shape: Shape, latent: int, raw_size: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), head(math.prod(shape), latent, raw_size))

    def decoder(self, latent: int, start: Tensor) -> nn.Module:
        return nn.Sequential(output_linear(latent, start), nn.Unflatten(1, start.shape))


class MLP(Network):
    """Fully connected layers; `hidden` lists their units from image to code, and the decoder mirrors the encoder.

    With activation=gated, the output of a hidden layer is a * sigmoid(b), where a and b are linear in its input
    (Dauphin et al., Language Modeling with Gated Convolutional Networks, ICML 2017).
    """

    def __init__(
        self,
        hidden: list[Count],
        activation: Gated = "relu",
        output_bias: OutputBias = "mean",
        spectral_norm: bool = False,
        initialization: Initialization = "default",
    ) -> None:
        super().__init__(output_bias, spectral_norm, initialization)
        self.hidden = list(hidden)
        self.is_gated = activation == "gated"
        self.activation = nn.GLU if activation == "gated" else _ACTIVATIONS[activation]

    def _layers(self, inputs: int, hidden: list[int]) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [Dense(inputs, 2 * width if self.is_gated else width), self.activation()]
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
    """Strided 4x4 convolutions that halve the image until a side is at most 4 pixels, then one fully connected layer.

    The decoder mirrors the encoder. Height and width of the images must be between 8 and 128 pixels.

    With latent=[C,h,w], the convolutions halve the image until it has h x w positions. A 3x3 and a 1x1 convolution then
    replace the fully connected layers before the code, and likewise those after it. So the code at a position depends
    only on pixels around it, and is decoded only into pixels around it, except that group normalization and, in
    training, batch normalization average over all positions.
    """

    bias_per_pixel = False
    provides = frozenset({"positions"})

    def __init__(
        self,
        width: Count = 32,
        max_width: Count = 256,
        hidden: Count = 256,
        activation: Activation = "relu",
        normalization: Literal["none", "batch", "group"] = "none",
        output_bias: OutputBias = "mean",
        spectral_norm: bool = False,
        initialization: Initialization = "default",
    ) -> None:
        super().__init__(output_bias, spectral_norm, initialization)
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

    def encoder(self, shape: Shape, latent: Code, raw_size: int) -> nn.Module:
        sizes = resolutions(shape[1:], latent, "conv")
        layers: list[nn.Module] = []
        channels = shape[0]
        for width in doublings(self.width, self.max_width, len(sizes) - 1):
            layers += [nn.Conv2d(channels, width, 4, 2, 1), *self._after(width)]
            channels = width
        if isinstance(latent, int):
            flat = channels * math.prod(sizes[-1])
            layers += [nn.Flatten(), Dense(flat, self.hidden), self.activation(), head(self.hidden, latent, raw_size)]
        else:
            # 3x3, so that a code can take its neighbors into account: on the digits with latent=[2,4,4] (25 epochs),
            # the test ELBO is 16 to 18 nats (three seeds), and -2 nats if both layers are 1x1 convolutions (one seed).
            layers += [nn.Conv2d(channels, self.hidden, 3, padding=1), self.activation()]
            layers += [head(self.hidden, latent[0], raw_size, pointwise), nn.Flatten()]
        return nn.Sequential(*layers)

    def decoder(self, latent: Code, start: Tensor) -> nn.Module:
        sizes = resolutions(tuple(start.shape[1:]), latent, "conv")
        widths = [start.shape[0], *doublings(self.width, self.max_width, len(sizes) - 1)]
        layers: list[nn.Module]
        if isinstance(latent, int):
            flat = widths[-1] * math.prod(sizes[-1])
            layers = [Dense(latent, self.hidden), self.activation(), Dense(self.hidden, flat)]
            layers += [self.activation(), nn.Unflatten(1, (widths[-1], *sizes[-1]))]
        else:
            layers = [nn.Unflatten(1, latent), nn.Conv2d(latent[0], self.hidden, 3, padding=1), self.activation()]
            layers += [pointwise(self.hidden, widths[-1]), self.activation()]
        for level in range(len(sizes) - 1, 0, -1):
            # Halving an odd side drops a pixel, which is added back here.
            odd = (sizes[level - 1][0] % 2, sizes[level - 1][1] % 2)
            layers += [nn.ConvTranspose2d(widths[level], widths[level - 1], 4, 2, 1, output_padding=odd)]
            layers += self._after(widths[level - 1]) if level > 1 else []
        return nn.Sequential(*with_output_bias(layers, start))


class ResNet(Network):
    """Pre-activation residual blocks with group normalization at every resolution, until a side is at most 4 pixels.

    The decoder mirrors the encoder. Height and width of the images must be between 8 and 128 pixels. He et al.,
    Identity Mappings in Deep Residual Networks, ECCV 2016.

    With latent=[C,h,w], the image is halved until it has h x w positions, and the layers between the last block and the
    code are 1x1 convolutions: the same layer at every position.
    """

    bias_per_pixel = False
    provides = frozenset({"positions"})

    def __init__(
        self,
        width: Count = 32,
        max_width: Count = 256,
        blocks: Blocks = 1,
        activation: Activation = "silu",
        output_bias: OutputBias = "mean",
        spectral_norm: bool = False,
        initialization: Initialization = "default",
    ) -> None:
        super().__init__(output_bias, spectral_norm, initialization)
        self.width, self.max_width, self.blocks = width, max_width, blocks
        self.activation = _ACTIVATIONS[activation]

    def _blocks(self, channels: int) -> list[nn.Module]:
        return [ResidualBlock(channels, self.activation) for _ in range(self.blocks)]

    def encoder(self, shape: Shape, latent: Code, raw_size: int) -> nn.Module:
        sizes = resolutions(shape[1:], latent, "resnet")
        widths = doublings(self.width, self.max_width, len(sizes))
        layers: list[nn.Module] = [nn.Conv2d(shape[0], widths[0], 3, padding=1), *self._blocks(widths[0])]
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, 2, 1), *self._blocks(after)]
        layers += [group_norm(widths[-1]), self.activation()]
        if isinstance(latent, int):
            layers += [nn.Flatten(), head(widths[-1] * math.prod(sizes[-1]), latent, raw_size)]
        else:
            layers += [head(widths[-1], latent[0], raw_size, pointwise), nn.Flatten()]
        return nn.Sequential(*layers)

    def decoder(self, latent: Code, start: Tensor) -> nn.Module:
        sizes = resolutions(tuple(start.shape[1:]), latent, "resnet")
        widths = doublings(self.width, self.max_width, len(sizes))
        layers: list[nn.Module]
        if isinstance(latent, int):
            layers = [Dense(latent, widths[-1] * math.prod(sizes[-1])), nn.Unflatten(1, (widths[-1], *sizes[-1]))]
        else:
            layers = [nn.Unflatten(1, latent), pointwise(latent[0], widths[-1])]
        layers += self._blocks(widths[-1])
        for level in range(len(sizes) - 1, 0, -1):
            layers += [nn.Upsample(sizes[level - 1]), nn.Conv2d(widths[level], widths[level - 1], 3, padding=1)]
            layers += self._blocks(widths[level - 1])
        layers += [group_norm(widths[0]), self.activation(), nn.Conv2d(widths[0], start.shape[0], 3, padding=1)]
        return nn.Sequential(*with_output_bias(layers, start))


class ResidualBlock(nn.Module):
    """x -> x + conv(act(norm(conv(act(norm(x)))))), from (B, C, H, W) to the same shape."""

    def __init__(self, channels: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *(group_norm(channels), activation(), nn.Conv2d(channels, channels, 3, padding=1)),
            *(group_norm(channels), activation(), nn.Conv2d(channels, channels, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)


def head(inputs: int, outputs: int, raw_size: int, layer: Callable[[int, int], Layer] = Dense) -> Layer:
    """Return the encoder's last layer: raw_size blocks of `outputs`, which are latent dimensions or channels of a code.

    Each block is initialized as if it were a separate layer. So the initial weights of the first block, the locations,
    are the same for every sigma mode.
    """
    blocks = [layer(inputs, outputs) for _ in range(raw_size)]
    merged = layer(inputs, outputs * raw_size)
    with torch.no_grad():
        for number, block in enumerate(blocks):
            rows = slice(number * outputs, (number + 1) * outputs)
            merged.weight[rows] = block.weight
            merged.bias[rows] = block.bias  # type: ignore[index,assignment]
    return merged


def pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 1x1 convolution, (B, inputs, h, w) -> (B, outputs, h, w): the same linear layer at every position."""
    return nn.Conv2d(inputs, outputs, 1)


def output_linear(inputs: int, start: Tensor) -> Dense:
    """Return the decoder's last fully connected layer, (B, inputs) -> (B, start.numel()), with `start` as its bias."""
    layer = Dense(inputs, start.numel())
    with torch.no_grad():
        layer.bias.copy_(start.flatten())
    return layer


def with_output_bias(layers: list[nn.Module], start: Tensor) -> list[nn.Module]:
    """Set the bias of the last layer, a convolution, to start (C, H, W) averaged over pixels, and return the layers."""
    bias = layers[-1].bias
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        bias.copy_(start.mean((1, 2)))
    return layers


def initialize(kind: Initialization, network: nn.Module, blocks: int = 1, has_own_bias: bool = False) -> None:
    """Draw all weights of a network anew, unless kind is "default".

    glorot  uniform between +-sqrt(6 / (inputs + outputs)) of the layer, biases 0 (Glorot and Bengio, Understanding the
            difficulty of training deep feedforward neural networks, AISTATS 2010)
    small   weights and biases from N(0, 0.01^2) (Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014)

    The last layer consists of this many `blocks` of outputs, each of which counts as a layer (see `head`); if it has a
    bias of its own, it keeps it.
    """
    if kind == "default":
        return
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    for layer in layers:
        is_last = layer is layers[-1]
        with torch.no_grad():
            for rows in layer.weight.chunk(blocks) if is_last else [layer.weight]:
                _ = nn.init.xavier_uniform_(rows) if kind == "glorot" else nn.init.normal_(rows, std=0.01)
        if layer.bias is not None and not (is_last and has_own_bias):
            _ = nn.init.zeros_(layer.bias) if kind == "glorot" else nn.init.normal_(layer.bias, std=0.01)


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group normalization layer with gcd(8, channels) groups."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


def halvings(size: tuple[int, ...], name: str) -> list[tuple[int, int]]:
    """Return the height and width of images at every resolution, halved until a side is at most 4.

    name is the choice of network, for the error message. Raises UserError unless both sides are between 8 and 128.

    >>> halvings((28, 28), "conv")
    [(28, 28), (14, 14), (7, 7), (3, 3)]
    """
    height, width = size
    if not all(8 <= side <= 128 for side in size):
        raise UserError(
            f"network={name} accepts images of 8 to 128 pixels a side, not {height}x{width}; type network=mlp."
        )
    sizes = [(height, width)]
    while min(sizes[-1]) > 4:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    return sizes


def resolutions(size: tuple[int, ...], latent: Code, name: str) -> list[tuple[int, int]]:
    """Return the height and width of images at every resolution: halved down to the h x w positions of a code (C, h, w)
    or, if the code is a vector, until a side is at most 4 (see `halvings`).

    name is the choice of network, for the error message. Raises UserError if halving does not lead to h x w.

    >>> resolutions((28, 28), (4, 7, 7), "conv")
    [(28, 28), (14, 14), (7, 7)]
    """
    sizes = halvings(size, name)
    if isinstance(latent, int):
        return sizes
    channels, positions, reached = latent[0], (latent[1], latent[2]), sizes[1:]
    if positions not in reached:
        typed = [f"'latent=[{channels},{height},{width}]'" for height, width in reached]
        raise UserError(
            f"latent=[{channels},{positions[0]},{positions[1]}] is not allowed here: network={name} halves images of "
            f"{size[0]}x{size[1]} pixels to {listed([f'{height}x{width}' for height, width in reached])}. Type "
            f"{', '.join(typed)}, or latent={math.prod(latent)} for a code without positions."
        )
    return sizes[: sizes.index(positions) + 1]


def doublings(width: int, max_width: int, count: int) -> list[int]:
    """Return the number of channels at each of `count` resolutions: it doubles from one to the next, up to max_width.

    >>> doublings(32, 100, 3)
    [32, 64, 100]
    """
    return [min(max_width, width * 2**level) for level in range(count)]
