"""The axis `dataset`: published images, the user's own images, and synthetic images with known structure."""

from vae_cli.axes.dataset.digits import Digits
from vae_cli.axes.dataset.image_folder import ImageFolder
from vae_cli.axes.dataset.linear_gaussian import LinearGaussian
from vae_cli.axes.dataset.pack import data_folder
from vae_cli.axes.dataset.shapes import Shapes
from vae_cli.axes.dataset.split import Dataset, Factor, Split, Splits
from vae_cli.axes.dataset.torchvision import Torchvision

__all__ = [
    "Dataset",
    "Digits",
    "Factor",
    "ImageFolder",
    "LinearGaussian",
    "Shapes",
    "Split",
    "Splits",
    "Torchvision",
    "data_folder",
]
