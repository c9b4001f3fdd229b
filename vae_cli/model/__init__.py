"""The VAE, the result of a forward pass, its loss, distributions, flows, scales, fast layers and a critic."""

__all__ = ["critic", "distributions", "flow", "inference", "kernels", "loss", "scales", "spectral", "vae"]
