"""The variational autoencoder, the result of a forward pass, its loss, distributions, flows, scales and fast layers."""

__all__ = ["distributions", "flow", "inference", "kernels", "loss", "scales", "vae"]
