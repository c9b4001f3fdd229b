"""The VAE, its forward pass and loss, distributions, flows, scales, fast layers, a critic, and geodesics."""

__all__ = ["critic", "distributions", "flow", "geodesics", "inference", "kernels", "loss", "scales", "spectral", "vae"]
