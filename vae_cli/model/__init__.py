"""The variational auto-encoder, the record of a batch, scales and distributions."""

__all__ = ["distributions", "inference", "kernels", "scales", "vae"]
