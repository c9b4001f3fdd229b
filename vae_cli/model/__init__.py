"""The variational autoencoder, the record of one pass through it, its distributions, scales and fast layers."""

__all__ = ["distributions", "inference", "kernels", "scales", "vae"]
