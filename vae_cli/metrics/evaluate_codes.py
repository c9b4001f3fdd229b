"""Evaluate the codes of any model, read from a file, and store the figures next to it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vae_cli.axes.dataset.split import fingerprint
from vae_cli.config.instantiate import find_function
from vae_cli.core.compatibility import provided
from vae_cli.core.errors import Failure, UserError
from vae_cli.core.files import digest, refuse_unwritable, write_json
from vae_cli.machine.device import make_deterministic, take_device
from vae_cli.metrics.base import BUDGETS, MeasuredRun, Metric
from vae_cli.metrics.evaluate import USUAL, measure, reusable
from vae_cli.metrics.record import FORMAT, Profile, stamp
from vae_cli.metrics.stored_codes import CodesRun
from vae_cli.runs.codes_file import read_codes

REUSED_IF_EQUAL = ("format", "profile", "seed", "codes_digest", "images", "decoder", "decoder_digest")


def evaluate_codes(
    file: Path,
    target: Path,
    profile: Profile = "default",
    *,
    kinds: Sequence[type[Metric]] = USUAL,
    decoder: str | None = None,
    before: Mapping[str, Any] | None = None,
    samples: int | None = None,
    seed: int = 0,
    device: str = "auto",
    data_dir: str | Path | None = None,
    say: Callable[[str], object] = lambda name: None,
) -> dict[str, Any]:
    """Evaluate the codes in a file, write metrics.json to the path `target`, and return its content.

    For decoder, see `load_codes`. `before` is an earlier evaluation: if it is of the same codes, decoder, profile and
    seed, its figures are kept, except those that are computed again. `say` is called with the name of each metric
    before it is computed. Raises UserError if the file or the decoder cannot be used, and UserError or Failure if
    `target` cannot be written.
    """
    refuse_unwritable(target.parent, "Write the evaluation elsewhere with --out FOLDER.")
    begun = time.perf_counter()
    seen = stamp(file) if file.is_file() else None
    run = load_codes(file, decoder, device, seed, data_dir)
    about = {"format": FORMAT, "codes": file.name, "codes_digest": digest(file), "latent": run.config["latent"]}
    about |= {"decoder": decoder, "decoder_digest": _digest_of_module(decoder), "images": fingerprint(run.splits)}
    if samples is None and before is not None and (before["profile"], before["format"]) == (profile, FORMAT):
        samples = before["budget"]["samples"]  # as many draws as before
    budget = BUDGETS[profile] if samples is None else replace(BUDGETS[profile], samples=samples)
    about |= {"profile": profile, "budget": asdict(budget), "seed": seed, "noise": sorted(provided(run.model.sigma))}
    subject = MeasuredRun(run, budget, seed)  # type: ignore[arg-type]
    if not run.no_decoder:
        run.fit_likelihood(subject)
    _refuse_changed_decoder(about, before, kinds)
    figures, left_out = measure(subject, kinds, reusable(before, about, kinds, REUSED_IF_EQUAL), say)
    if stamp(file) != seen:
        raise Failure(f"{file} was replaced during its evaluation. Evaluate it again.")
    seconds = round(time.perf_counter() - begun, 1)
    found = {**about, "no_decoder": run.no_decoder, "notes": run.notes, "seconds": seconds}
    found |= {"figures": figures, "left_out": left_out}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, found)
    return found


def load_codes(
    file: Path, decoder: str | None = None, device: str = "auto", seed: int = 0, data_dir: str | Path | None = None
) -> CodesRun:
    """Read codes from a file, as a run that metrics can measure.

    decoder is MODULE:FUNCTION: a function from codes to images, in a module that the user trusts. Without it, figures
    that need decoded images are not defined. Raises UserError if the file or the decoder cannot be used.
    """
    stored = read_codes(file)
    given = None if decoder is None else (decoder, find_function(decoder, "--decoder"))
    place = take_device(device)
    make_deterministic(place)
    return CodesRun(stored, place, seed, given, data_dir)


def _refuse_changed_decoder(
    about: Mapping[str, Any], before: Mapping[str, Any] | None, kinds: Sequence[type[Metric]]
) -> None:
    """Raise UserError if figures of an earlier evaluation would be lost because the decoder's module has changed."""
    if before is None or before.get("decoder_digest") == about["decoder_digest"]:
        return
    computed = {kind.__name__ for kind in kinds}
    entries = [*before["figures"].values(), *before["left_out"].values()]
    if before.get("decoder") == about["decoder"] and any(entry["metric"] not in computed for entry in entries):
        raise UserError(
            f"The module of --decoder {about['decoder']} has changed since the other figures were measured. To measure "
            "all of them again, leave out --metrics; to replace them by the metrics you chose, add --overwrite."
        )


def _digest_of_module(decoder: str | None) -> str | None:
    """Return a hash of the source of a decoder's module, which may change between evaluations; None if unknown."""
    module = None if decoder is None else sys.modules.get(decoder.partition(":")[0])
    file = getattr(module, "__file__", None)
    return None if file is None else digest(Path(file))
