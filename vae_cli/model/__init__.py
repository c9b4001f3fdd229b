"""The VAE, its forward pass and loss, distributions, scales, fast layers, and what regularizers and paths need."""

__all__ = [
    *("aggregate", "critic", "distributions", "flow", "geodesics", "inference", "kernels", "loss", "scales"),
    *("spectral", "vae"),
]
