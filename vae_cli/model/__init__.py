"""The variational autoencoder, the record of one pass through it, its loss, distributions, scales and fast layers."""

__all__ = ["distributions", "inference", "kernels", "loss", "scales", "vae"]
