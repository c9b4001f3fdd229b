"""Write the codes of a run to a file that `vae evaluate --codes` and other programs read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from vae_cli.axes.dataset import Split
from vae_cli.core.errors import UserError
from vae_cli.core.files import refuse_unwritable, replace_file
from vae_cli.core.rng import evaluating
from vae_cli.machine.memory import refuse_oversize
from vae_cli.model.distributions import Delta
from vae_cli.model.scales import factors_of
from vae_cli.runs.codes import BATCH
from vae_cli.runs.codes_file import SPLITS
from vae_cli.runs.export import describe_posterior
from vae_cli.runs.run import Run

NAME = "codes.npz"


def export_codes(run: Run, folder: Path, overwrite: bool = False) -> tuple[Path, list[str]]:
    """Write codes.npz with the codes of all images of a run, split by split, in the order of the dataset.

    Returns its path, and sentences on what it does not contain. Raises UserError if the file exists and `overwrite` is
    not given, or if the posterior is neither normal with independent dimensions nor a point mass.
    """
    file = folder / NAME
    refuse_unwritable(folder, "Write it elsewhere with --to FOLDER.")
    if (file.is_symlink() or file.exists()) and not overwrite:
        raise UserError(f"{file} exists. To replace it, add --overwrite; to write elsewhere, add --to FOLDER.")
    arrays, notes = codes_of(run)
    folder.mkdir(parents=True, exist_ok=True)
    # Not compressed: codes are nearly incompressible, and compressing takes much longer than encoding.
    replace_file(file, lambda opened: np.savez(opened, **arrays))
    return file, notes


def codes_of(run: Run) -> tuple[dict[str, Any], list[str]]:
    """Return the arrays of codes.npz (see codes_file.ARRAYS), and sentences on what they do not contain.

    Raises UserError as `export_codes` does, before images are encoded.
    """
    splits = [getattr(run.splits, name) for name in SPLITS]
    count = sum(map(len, splits))
    numbers = splits[0].images[0].numel() * splits[0].images.element_size() + 8 * run.model.prior().event_shape.numel()
    refuse_oversize(2 * count * numbers, f"Storing {count:,} codes and images", "use a machine with more memory")
    loc, scale, notes = [], [], []
    with evaluating(run.model, 0, run.device):
        for split in splits:
            for positions in split.in_order(BATCH):
                posterior = run.encode(split.batch(positions))
                _refuse_others(run, posterior)
                loc.append(posterior.mean.cpu())
                if not isinstance(posterior, Delta):
                    scale.append(posterior.stddev.expand_as(posterior.mean).cpu())
    arrays = {"loc": _shaped(run, loc), "split": np.repeat(SPLITS, [len(split) for split in splits])}
    if scale:
        arrays["scale"] = _shaped(run, scale)
    images = np.concatenate([_rows(split, split.images) for split in splits])
    if images.dtype == np.uint8 or (images.min() >= 0 and images.max() <= 1):
        arrays["images"] = images
    else:
        notes.append("Images are left out, because their pixel values are not limited to [0, 1].")
    if all(split.labels is not None for split in splits):
        arrays["labels"] = np.concatenate([_rows(split, split.labels) for split in splits])
    if run.splits.factors is not None:
        arrays["factors"] = np.concatenate([_rows(split, split.factors) for split in splits])
        arrays["factor_names"] = np.array([factor.name for factor in run.splits.factors])
        arrays["factor_kinds"] = np.array([factor.kind for factor in run.splits.factors])
    if run.config["likelihood"].get("binarize") == "dynamic":
        notes.append(
            "The encoder was given one random binarization of each image; the file holds the gray images. vae evaluate "
            "draws others, so its figures differ by chance."
        )
    return arrays, notes


def _refuse_others(run: Run, posterior: Distribution) -> None:
    """Raise UserError unless loc and scale define the posterior: a normal with independent dimensions or a point mass.

    Draws would misrepresent any other posterior: as codes without noise, they would be measured as point masses.
    """
    if factors_of(posterior) is None and not isinstance(posterior, Delta):
        raise UserError(
            f"The posterior of {run.path} is {describe_posterior(posterior)}, but a file of codes can hold only "
            "posteriors N(loc, diag(scale^2)) and point masses. To measure this run type vae evaluate "
            f"{run.path}; to get its codes in Python, call load_run({str(run.path)!r}).encode(x)."
        )


def _shaped(run: Run, parts: Sequence[Tensor]) -> Any:
    """Return codes as an array (N, D), or (N, C, h, w) if the run's `latent` is such a shape."""
    latent = run.config["latent"]
    codes = torch.cat([*parts])
    return (codes if isinstance(latent, int) else codes.unflatten(1, latent)).numpy()


def _rows(split: Split, values: Tensor | None) -> Any:
    """Return the rows of an array (images, labels or factors) that belong to a split, in the order of its positions."""
    assert values is not None
    return values.index_select(0, split.index).cpu().numpy()
