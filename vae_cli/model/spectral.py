"""Spectral normalization: weights that are divided by their largest singular value."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

AT_START = 15  # steps of the power iteration, after which one step for each use is enough


class SpectralNorm(nn.Module):
    """W -> W / s, with s an estimate of the largest singular value of the matrix W, as a parametrization of a layer.

    A weight with more than two dimensions counts as the matrix of its dimension `dim` by all the others. The estimate
    is s = u^T W v. In training mode each use first takes one step of the power iteration: u <- W v / |W v|, then
    v <- W^T u / |W^T u|. In evaluation mode u and v stay as they are. The gradient of s goes through W only.
    Miyato et al., Spectral Normalization for Generative Adversarial Networks, ICLR 2018.

    The results are those of torch.nn.utils.parametrizations.spectral_norm, which however computes on torch's `meta`
    device (this imports modules for two seconds) and multiplies in bfloat16 where the network does.
    """

    u: Tensor  # (rows,)
    v: Tensor  # (columns,)

    def __init__(self, weight: Tensor, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim
        matrix = self._matrix(weight.detach())
        for name, size in zip("uv", matrix.shape, strict=True):
            self.register_buffer(name, torch.randn(size) if not weight.is_meta else torch.empty(size))
        if not weight.is_meta:
            self._iterate(matrix, AT_START)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, self.dim).flatten(1)

    @torch.no_grad()
    def _iterate(self, matrix: Tensor, steps: int = 1) -> None:
        for _ in range(steps):
            self.u.copy_(F.normalize(matrix @ self.v, dim=0, eps=1e-12))
            self.v.copy_(F.normalize(matrix.T @ self.u, dim=0, eps=1e-12))

    def forward(self, weight: Tensor) -> Tensor:
        with nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False):
            matrix = self._matrix(weight)
            if self.training:
                self._iterate(matrix)
            # The next use changes the buffers in place, and backward may still need these values.
            return weight / torch.dot(self.u.clone(), matrix @ self.v.clone())


def normalize_layers(network: nn.Module) -> None:
    """Divide the weight of every linear and convolutional layer of a network by its largest singular value.

    So a linear layer's Lipschitz constant is 1 and, if the activations' slopes are at most 1, an mlp moves its output
    no further than its input. Biases and normalization layers stay as they are. For the decoder, this is RAE-SN of
    Ghosh et al., From Variational to Deterministic Autoencoders, ICLR 2020.
    """
    for layer in [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]:
        # A transposed convolution stores its output channels in the second dimension.
        norm = SpectralNorm(layer.weight, dim=1 if isinstance(layer, nn.ConvTranspose2d) else 0)
        register_parametrization(layer, "weight", norm, unsafe=True)  # unsafe: not tried out, which would be a step
