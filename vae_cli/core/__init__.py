"""General utilities, not specific to autoencoders: errors, files, images, values, random numbers, wording."""

__all__ = ["compatibility", "errors", "files", "garbage", "images", "listing", "rng", "values", "white", "wording"]
