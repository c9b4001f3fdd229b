"""The VAE, its forward pass and loss, distributions, scales, fast layers, and what regularizers and paths need."""

__all__ = [
    *("aggregate", "bessel", "code_vae", "critic", "distributions", "flow", "flow_matching", "geodesics", "inference"),
    *("kernels", "loss", "mixtures", "normal_kl", "scales", "spectral", "sphere", "vae"),
]
