"""General utilities, not specific to autoencoders: errors, files, images, values, random numbers, wording."""

__all__ = ["compatibility", "errors", "files", "garbage", "images", "rng", "values", "white", "wording"]
