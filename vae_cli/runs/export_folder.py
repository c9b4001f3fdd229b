"""The folder of an export: programs, scripts that use them, and export.json, which describes them.

A file is replaced only if export.json lists it and it has not changed since; other files may be the user's own.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vae_cli.config.settings import code_shape, code_size
from vae_cli.core.errors import UserError
from vae_cli.core.files import open_regular, read_text, refuse_unwritable, replace_file, write_text
from vae_cli.core.values import is_finite
from vae_cli.core.wording import listed
from vae_cli.runs.export import (
    ALLOWED,
    CHECKED,
    FORMATS,
    Format,
    Part,
    describe_likelihood,
    describe_posterior,
    describe_prior,
    export,
)
from vae_cli.runs.run import Run

DESCRIPTION = "export.json"
SCRIPTS: dict[Format, str] = {"pt2": "use.py", "onnx": "use_onnx.py"}
WRITTEN = frozenset(f"{part}.{kind}" for part in ("encoder", "decoder") for kind in FORMATS) | {*SCRIPTS.values()}
ADVICE = "Write it elsewhere with --to FOLDER."

PT2 = '''\
"""Encode and decode images with {run}, exported by vae {version}. Needs only torch {torch} or newer."""
from pathlib import Path

import torch

here = Path(__file__).parent
encoder = torch.export.load(here / "encoder.pt2").module()
decoder = torch.export.load(here / "decoder.pt2").module()

images = torch.rand(4, {shape}){binarized}  # your images (B, {shape}): {range}
{encode}
mean = decoder({code})  # the mean images of p(x|z), (B, {shape})
print("reconstructions:", tuple(mean.shape))
'''

ONNX = '''\
"""Encode and decode images with {run}, exported by vae {version}. Needs onnxruntime and numpy."""
from pathlib import Path

import numpy as np
import onnxruntime

here = Path(__file__).parent
encoder = onnxruntime.InferenceSession(here / "encoder.onnx")
decoder = onnxruntime.InferenceSession(here / "decoder.onnx")

images = np.random.rand(4, {shape}){binarized}.astype(np.float32)  # your images (B, {shape}): {range}
{encode}
(mean,) = decoder.run(None, {{"z": {code}}})  # the mean images of p(x|z), (B, {shape})
print("reconstructions:", mean.shape)
'''


class Exported(NamedTuple):
    """What an export wrote: paths, the differences of the programs from the model, and paths that it removed."""

    paths: list[Path]
    differences: dict[str, float]
    parts: tuple[Part, Part]
    removed: list[Path]


def export_to(run: Run, folder: Path, weights: str, formats: Sequence[Format], overwrite: bool = False) -> Exported:
    """Export a run to a folder: encoder and decoder in these formats, a script that uses them, and export.json.

    Files of an earlier export in other formats stay if they hold the same weights; otherwise they are removed.
    Raises UserError if the folder holds files that are not from an export or have changed since, unless overwrite is
    given; otherwise see `export`.
    """
    names = {f"{part}.{kind}" for part in ("encoder", "decoder") for kind in formats}
    names |= {SCRIPTS[kind] for kind in formats}
    refuse_unwritable(folder, ADVICE)
    earlier = _earlier(folder)
    if not overwrite:
        _refuse_to_replace(folder, {*names, DESCRIPTION}, earlier)
    digest = _digest(run.weights_file)
    contents, differences, parts = export(run, formats)
    description = _description(run, weights, digest, parts)
    contents |= {SCRIPTS[kind]: _script(run, kind, parts[0], description).encode() for kind in formats}
    is_same = earlier.get("weights", {}).get("sha256") == digest
    others = [name for name, about in _listed(earlier).items() if name not in names and _is_ours(folder / name, about)]
    files = {name: _listed(earlier)[name] for name in others} if is_same else {}
    for name, content in contents.items():
        files[name] = {"sha256": hashlib.sha256(content).hexdigest()}
        if name in differences:
            files[name]["largest_difference"] = differences[name]
    _write(folder, contents, {**description, "files": files}, _listed(earlier))
    removed = [] if is_same else [folder / name for name in others]
    for path in removed:
        path.unlink()
    return Exported([folder / name for name in (*contents, DESCRIPTION)], differences, parts, removed)


def _write(
    folder: Path,
    contents: Mapping[str, bytes],
    description: Mapping[str, Any],
    earlier: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write the files and their description.

    The description comes first, with the hashes of the files to be replaced: if this is interrupted, the next export
    recognizes the old files and the new ones. It is written again without these hashes at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replaced = {
        name: {**about, "replaces": earlier[name]["sha256"]} if name in earlier else about
        for name, about in description["files"].items()
    }
    _write_description(folder, {**description, "files": {**earlier, **replaced}})
    for name, content in contents.items():
        replace_file(folder / name, lambda file, content=content: file.write(content))  # type: ignore[misc]
    _write_description(folder, description)


def _write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write export.json, with each list of numbers on one line."""
    text = json.dumps(description, indent=2, allow_nan=False)
    text = re.sub(r"\[\n([^\[\]{}]*)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    write_text(folder / DESCRIPTION, f"{text}\n")


def _earlier(folder: Path) -> dict[str, Any]:
    """Return the content of export.json, or an empty dictionary if it is missing or is not from an export."""
    try:
        found = json.loads(read_text(folder / DESCRIPTION))
    except (OSError, ValueError, RecursionError):
        return {}
    is_ours = isinstance(found, dict) and isinstance(found.get("exported_by"), str)
    return found if is_ours and isinstance(found.get("weights"), dict) else {}


def _listed(description: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the hashes and differences that export.json lists for the files that an export writes.

    Anything else in it is ignored, since the folder may come from somebody else.
    """
    files = description.get("files")
    known: dict[str, dict[str, Any]] = {}
    for name, about in files.items() if isinstance(files, dict) else ():
        if name in WRITTEN and isinstance(about, dict):
            hashes = {key: about[key] for key in ("sha256", "replaces") if isinstance(about.get(key), str)}
            measured = {key: about[key] for key in ("largest_difference",) if is_finite(about.get(key))}
            if "sha256" in hashes:
                known[name] = hashes | measured
    return known


def _is_ours(path: Path, about: Mapping[str, Any] | None) -> bool:
    """Return whether a file has the content that export.json lists, or that an interrupted export would replace."""
    if path.is_symlink() or about is None:
        return False
    try:
        return _digest(path) in (about["sha256"], about.get("replaces"))
    except (OSError, ValueError):
        return False


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _refuse_to_replace(folder: Path, names: Iterable[str], earlier: Mapping[str, Any]) -> None:
    about = _listed(earlier)
    foreign = [
        name
        for name in sorted(names)
        if (folder / name).is_symlink() or (folder / name).exists()
        if not (bool(earlier) if name == DESCRIPTION else _is_ours(folder / name, about.get(name)))
    ]
    if foreign:
        is_one = len(foreign) == 1
        raise UserError(
            f"{folder} contains {listed(foreign)}, which vae export did not write or which "
            f"{'has' if is_one else 'have'} changed since. To replace {'it' if is_one else 'them'}, add --overwrite; "
            "to write elsewhere, add --to FOLDER."
        )


def _description(run: Run, weights: str, digest: str, parts: tuple[Part, Part]) -> dict[str, Any]:
    """Return the content of export.json, apart from the files."""
    channels, latent, shape = run.shape, code_size(run.config["latent"]), code_shape(run.config["latent"])
    layout = "" if shape is None else f"; in order of channel, row and column of the shape {list(shape)}"
    meaning = {
        "images": {"shape": ["B", *channels], "meaning": f"images: {_range_of(run)}"},
        "loc": {"shape": ["B", latent], "meaning": f"the code of an image, without noise{layout}"},
        "scale": {"shape": ["B", latent], "meaning": f"the standard deviation of q(z|x){layout}"},
        "z": {"shape": ["B", latent], "meaning": f"codes{layout}"},
        "mean": {"shape": ["B", *channels], "meaning": "the mean of p(x|z): the decoded images"},
    }
    with torch.no_grad():
        posterior = run.model.encode(torch.zeros(1, *run.shape, device=run.device))
        likelihood, prior = run.model.decode(torch.zeros(1, latent, device=run.device)), run.model.prior()
    return {
        "exported_by": f"vae {importlib.metadata.version('vae-cli')}",
        "torch": torch.__version__,
        "run": run.path.name,
        "weights": {"kind": weights, "step": run.step, "sha256": digest},
        "choices": run.config["choices"],
        "precision": {"training": run.model.precision, "export": "float32"},
        **{
            part.name: {
                "inputs": {part.input: {"dtype": "float32", **meaning[part.input]}},
                "outputs": {name: {"dtype": "float32", **meaning[name]} for name in part.outputs},
            }
            for part in parts
        },
        "posterior": {"distribution": describe_posterior(posterior)},
        "likelihood": describe_likelihood(likelihood),
        "prior": describe_prior(prior),
        "check": {"allowed_difference": ALLOWED, "batch_sizes": [*CHECKED]},
    }


def _range_of(run: Run) -> str:
    """Return what the values of the encoder's input are."""
    if _is_binary(run):
        return "each pixel 0 or 1, drawn with its gray value as the probability of 1"
    return "8-bit values / 255, as in training"


def _is_binary(run: Run) -> bool:
    return bool(run.config["likelihood"].get("binarize") == "dynamic")


def _script(run: Run, kind: Format, encoder: Part, description: Mapping[str, Any]) -> str:
    """Return a short script that loads the programs and passes images through them."""
    is_torch = kind == "pt2"
    call = "encoder(images)" if is_torch else 'encoder.run(None, {"images": images})'
    noise = "torch.randn_like(loc)" if is_torch else "np.random.randn(*loc.shape).astype(np.float32)"
    latent = code_size(run.config["latent"])
    formula = description["posterior"]["distribution"]
    if len(encoder.outputs) == 2:
        encode = f"loc, scale = {call}  # q(z|x): {formula}, both (B, {latent})"
    else:
        encode = f"{'loc' if is_torch else '(loc,)'} = {call}  # q(z|x): {formula}, (B, {latent})"
    code = "loc"
    if formula.startswith("N("):
        encode, code = f"{encode}\nz = loc + scale * {noise}", "z"
    binarized = (".bernoulli()" if is_torch else ".round()") if _is_binary(run) else ""
    return (PT2 if is_torch else ONNX).format(
        run=run.path.name, version=importlib.metadata.version("vae-cli"), torch=torch.__version__.partition("+")[0],
        shape=", ".join(map(str, run.shape)), range=_range_of(run), encode=encode, code=code, binarized=binarized,
    )  # fmt: skip
