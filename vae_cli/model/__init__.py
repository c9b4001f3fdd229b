"""The variational autoencoder, the result of a forward pass, its loss, distributions, scales and fast layers."""

__all__ = ["distributions", "inference", "kernels", "loss", "scales", "vae"]
