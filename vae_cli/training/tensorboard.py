"""Write a run's files for TensorBoard: curves, histograms, pictures, latent codes and a row of the HPARAMS tab."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal, Self, TypeAlias

from vae_cli.core.errors import is_failure
from vae_cli.core.files import replace_file, reporting_path, write_text
from vae_cli.core.images import fast_png, grid, save_png
from vae_cli.training.cards import describe, page, points_of, tag_of
from vae_cli.training.records import write_record

if TYPE_CHECKING:
    from torch import Tensor

    from vae_cli.core.images import Picture

Status: TypeAlias = Literal["finished", "interrupted", "failed"]
Hparam: TypeAlias = bool | int | float | str

# TensorBoard reads the files of a run in the order of their names. START sorts before all event files, which are named
# events.out.tfevents.<seconds>..., and END sorts after those that were created before it.
START = "events.out.tfevents.0000000000.start"
END = "events.out.tfevents.{:010d}.~end"
VERSION = "brain.Event:2"  # the version of the file format, in the first event of a file

BINS = 64  # of equal width: TensorBoard's default bins widen with the value, so a constant scale of 1 seems to vary
POINTS = 5000  # latent codes in the projector: its limit for t-SNE and UMAP
SPRITE = 64  # longest side of an image in the projector, in pixels: a sheet of 71 * 71 fits a texture of 8192 pixels


class EventWriter:
    """Writes the events of one run into its folder; `tensorboard --logdir` accepts this folder or a parent of it.

    Events that are already in the folder are hidden if their step is `purge_step` or later: a run that resumes from the
    checkpoint of step s passes s + 1, so each curve continues without a repeated step.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self.folder = folder
        # TensorBoard uses the first session end that it finds, so those of earlier processes must go. The files are
        # emptied, not removed: a running TensorBoard stops reading the run if a file is missing.
        for end in folder.glob("events.*.~end"):
            os.truncate(end, 0)
        # Files are read in the order of their names, which contain the time in seconds: the new file must come last.
        while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.05)
        # TensorBoard's Python reader regards the first purge of a run as its start and hides nothing, so a new run
        # begins with a purge. (Its data server needs no purge: it drops repeated steps.)
        is_new = not any(folder.glob("events.out.tfevents.*"))
        self._file: EventFile | None = EventFile(folder)
        self._described: set[str] = set()  # tags of scalars that have a point already
        if is_new or purge_step is not None:
            self._file.purge(0 if is_new else purge_step or 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("finished")
        else:
            self.close("failed" if is_failure(kind) else "interrupted")

    def hparams(self, values: Mapping[str, Hparam]) -> None:
        """Write the run's row of the HPARAMS tab; TensorBoard adds all scalars of the run as metrics.

        Settings that a run does not have are left out, such as sigma.value if sigma is learned. A setting has the same
        type in all runs.
        """
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2

        # No experiment summary is written: TensorBoard would show the columns in the first run's summary for all runs.
        # Without one, it shows the columns of any run, infers types and domains, and puts settings that differ first.
        start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
        for name, value in values.items():
            if isinstance(value, bool):
                start.hparams[name].bool_value = value
            elif isinstance(value, str):
                start.hparams[name].string_value = value
            elif math.isfinite(value):  # JSON has no infinity and no NaN
                start.hparams[name].number_value = value
        content = plugin_data_pb2.HParamsPluginData(session_start_info=start, version=metadata.PLUGIN_DATA_VERSION)
        # In a separate file, which a resumed run replaces: TensorBoard uses the first session start that it finds, and
        # `epochs` is different if a run is trained further.
        _write_alone(self.folder / START, _hparams(metadata.SESSION_START_INFO_TAG, content))

    def close(self, status: Status) -> None:
        """Close the file and write how the run ended; if it was interrupted, TensorBoard's status stays "unknown"."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        if status == "interrupted":
            return
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        end = plugin_data_pb2.SessionEndInfo(
            status=api_pb2.STATUS_SUCCESS if status == "finished" else api_pb2.STATUS_FAILURE,
            end_time_secs=time.time(),
        )
        content = plugin_data_pb2.HParamsPluginData(session_end_info=end, version=metadata.PLUGIN_DATA_VERSION)
        _write_alone(self.folder / END.format(int(time.time())), _hparams(metadata.SESSION_END_INFO_TAG, content))

    def layout(self, parts: Sequence[str] = ()) -> None:
        """Lay out the custom scalars page: a training and validation chart for each loss term, and posterior charts.

        `parts` are the names of the terms that the regularizer adds.
        """
        from torch.utils.tensorboard.summary import custom_scalars  # 0.2 s to import

        terms = ("loss", "distortion", "rate", "rate_loc", "rate_scale", "penalty", *parts, "elbo")
        losses = {term: ["Multiline", [f"^curves/{term}/(train|validation)$"]] for term in terms}  # tags are regexes
        posterior = {
            "posterior scale": ["Multiline", ["^posterior/scale_(mean|min)$"]],
            "spread of loc": ["Multiline", ["^posterior/loc_std$"]],
        }
        self._write(custom_scalars({"train and validation": losses, "posterior": posterior}))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write one point for each figure at a step; `values` has the names of metrics.jsonl, such as train/loss, which
        `tag_of` turns into tags. Values need not be finite."""
        points = {tag_of(name): value for name, value in values.items()}
        self._write(points_of(points, described=points.keys() - self._described), step)
        self._described |= points.keys()

    def results(self, values: Mapping[str, float], step: int) -> None:
        """Write the test figures of a run at its last step. They replace those of an earlier process that was killed
        before it recorded the run as finished."""
        add_scalars(self.folder, f"test-{step}", values, step)

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None:
        """Write a histogram of each tensor's finite values. Tensors without finite values are skipped."""
        from torch.utils.tensorboard.summary import histogram

        for tag, tensor in values.items():
            finite = tensor.detach().float()
            finite = finite[finite.isfinite()]
            if finite.numel():
                self._write(histogram(tag, finite.cpu().numpy(), BINS), step)

    def pictures(self, tag: str, picture: Picture, step: int, description: str) -> None:
        """Write one uint8 picture (H, W, 3). The description, in Markdown, says what its rows and columns are."""
        from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_BLOB_SEQUENCE, Summary
        from tensorboard.plugins.image.metadata import PLUGIN_NAME

        height, width, _ = picture.shape
        encoded = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=fast_png(picture))
        about = describe(PLUGIN_NAME, DATA_CLASS_BLOB_SEQUENCE, tag.rpartition("/")[2], description)
        self._write(Summary(value=[Summary.Value(tag=tag, image=encoded, metadata=about)]), step)

    def embedding(self, codes: Tensor, labels: Sequence[str] | None, images: Tensor | None, step: int) -> None:
        """Show latent codes (N, D) in the projector, with labels and images (N, C, H, W) in [0, 1], if given.

        At most the first 5000 codes are shown. They replace the codes of an earlier call.
        """
        from google.protobuf import text_format  # type: ignore[import-untyped]
        from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
        from torch.nn.functional import pad

        # SummaryWriter.add_embedding is not used: it adds an entry at each call, loses the entries of a resumed run,
        # and does not limit the size of the sprite sheet.
        folder = self.folder / "projector"
        folder.mkdir(exist_ok=True)
        codes = codes[:POINTS].detach().float().nan_to_num().cpu()
        codes = pad(codes, (0, max(0, 3 - codes.shape[1])))  # the projector draws the first three components
        lines = ["\t".join(f"{number:.6g}" for number in code) + "\n" for code in codes.tolist()]
        write_text(folder / "tensors.tsv", "".join(lines))

        config = ProjectorConfig()
        # The name contains the step, because TensorBoard caches codes by name.
        shown = config.embeddings.add(tensor_name=f"z at step {step}", tensor_path="projector/tensors.tsv")
        if labels is not None:
            lines = [(" ".join(label.split()) or "-") + "\n" for label in labels[:POINTS]]
            write_text(folder / "metadata.tsv", "".join(lines))
            shown.metadata_path = "projector/metadata.tsv"
        if images is not None:
            height, width = _save_sprites(folder / "sprite.png", images[:POINTS])
            shown.sprite.image_path = "projector/sprite.png"
            shown.sprite.single_image_dim.extend([width, height])
        write_text(self.folder / "projector_config.pbtxt", text_format.MessageToString(config))

    def flush(self) -> None:
        """Flush to the disk, so that everything written so far survives a power failure."""
        assert self._file is not None
        self._file.flush()

    def _write(self, summary: Any, step: int = 0) -> None:
        assert self._file is not None
        self._file.write(step=step, summary=summary)


class NoEvents(EventWriter):
    """An EventWriter that writes nothing: if several processes train a run, only the first one writes its events."""

    def __init__(self) -> None:
        pass

    def hparams(self, values: Mapping[str, Hparam]) -> None:
        pass

    def close(self, status: Status) -> None:
        pass

    def layout(self, parts: Sequence[str] = ()) -> None:
        pass

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        pass

    def results(self, values: Mapping[str, float], step: int) -> None:
        pass

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None:
        pass

    def pictures(self, tag: str, picture: Picture, step: int, description: str) -> None:
        pass

    def embedding(self, codes: Tensor, labels: Sequence[str] | None, images: Tensor | None, step: int) -> None:
        pass

    def flush(self) -> None:
        pass


def add_scalars(
    folder: Path, name: str, values: Mapping[str, float], step: int, pages: Mapping[str, str] | None = None
) -> None:
    """Add one point per tag in `values` to a run that has ended, in an event file whose name ends in ~`name`.

    `pages` are pages of the Text tab, in Markdown, by tag. All of them replace those of an earlier call with the same
    name.
    """
    for file in folder.glob(f"events.*.~{name}"):
        if file.is_symlink():  # not written by vae; it may lead out of the folder
            continue
        os.truncate(file, 0)  # not removed: a running TensorBoard stops reading the run if a file is missing
    summary = points_of(values, described=values.keys())
    for tag, text in (pages or {}).items():
        summary.value.append(page(tag, text))
    _write_alone(folder / f"events.out.tfevents.{int(time.time()):010d}.~{name}", summary, step)


class EventFile:
    """An event file that writes each event immediately, so that an error is raised by the call and names the file.

    PyTorch's SummaryWriter is not used, because it writes in a background thread: errors appear later, as a traceback,
    and nothing is synced to the disk.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = self.path.open("ab")
        self.write(file_version=VERSION)

    def write(self, **fields: Any) -> None:
        """Write one event; the arguments are fields of TensorBoard's Event, such as step and summary."""
        with reporting_path(self.path):
            write_record(self._file, _event(**fields))
            self._file.flush()  # so that TensorBoard sees it

    def purge(self, step: int) -> None:
        """Hide the events in earlier files from this step on."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self.write(step=step, session_log=SessionLog(status=SessionLog.START))

    def flush(self) -> None:
        """Flush to the disk."""
        with reporting_path(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush to the disk and close the file."""
        with reporting_path(self.path), self._file:
            self.flush()


def _event(**fields: Any) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=time.time(), **fields).SerializeToString()


def _hparams(tag: str, content: Any) -> Any:
    """Return a summary for the HPARAMS plugin."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams import metadata

    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString())
    # TensorBoard's data server does not list a summary without a tensor, so an empty tensor is added.
    value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=metadata.NULL_TENSOR)
    return Summary(value=[value])


def _write_alone(path: Path, summary: Any, step: int = 0) -> None:
    """Write one summary to a separate event file, atomically."""

    def write(file: IO[bytes]) -> None:
        write_record(file, _event(file_version=VERSION))
        write_record(file, _event(step=step, summary=summary))

    replace_file(path, write)


def _save_sprites(path: Path, images: Tensor) -> tuple[int, int]:
    """Write images (N, C, H, W) as a square sheet without gaps; return the height and width of each image in it."""
    from torch.nn.functional import avg_pool2d, pad

    shrink = math.ceil(max(images.shape[2:]) / SPRITE)
    images = avg_pool2d(images.detach().float(), shrink, ceil_mode=True) if shrink > 1 else images
    # Fill the sheet up to a square with black images: the projector assumes as many rows as columns.
    columns = math.ceil(math.sqrt(len(images)))
    images = pad(images, (0, 0, 0, 0, 0, 0, 0, columns**2 - len(images)))
    save_png(path, grid(images, columns, side=SPRITE // 2, pad=0))
    factor = max(1, round(SPRITE / 2 / max(images.shape[2:])))
    return images.shape[2] * factor, images.shape[3] * factor
