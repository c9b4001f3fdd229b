"""What TensorBoard shows of a run: curves, histograms, pictures, latent codes and the row in the HPARAMS tab."""

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
from vae_cli.core.images import grid, save_png

if TYPE_CHECKING:
    from torch import Tensor

    from vae_cli.core.images import Picture

Status: TypeAlias = Literal["finished", "interrupted", "failed"]
Hparam: TypeAlias = bool | int | float | str

# The names sort before and after those of an EventFile, events.out.tfevents.<seconds>..., in the order in which
# TensorBoard reads the files of a run.
START = "events.out.tfevents.0000000000.start"
END = "events.out.tfevents.{:010d}.~end"
VERSION = "brain.Event:2"  # of the format, in the first event of a file

BINS = 64  # of equal width; by default they widen with the value, and a constant scale of 1 seems to vary
POINTS = 5000  # latent codes in the projector: its limit for t-SNE, UMAP and comfort
SPRITE = 64  # longest side of their pictures: 71 * 71 of them fit the 8192 pixels of a texture


class EventWriter:
    """Writes the events of one run into its folder, for `tensorboard --logdir` of that folder or one above it.

    Events at `purge_step` and later that an earlier writer left in the folder are hidden: a run that resumes from a
    checkpoint made after step s passes s + 1, and every curve goes on without a repeated step.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self.folder = folder
        # TensorBoard keeps the first end that it finds in a run, and this run is going on. The files themselves stay: a
        # TensorBoard that is running would stumble over a missing one and stop reading.
        for end in folder.glob("events.*.~end"):
            os.truncate(end, 0)
        # Files are read in the order of their names, which count seconds: this one has to come last.
        while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.05)
        # TensorBoard's reader in Python takes the first purge of a run for its beginning and hides nothing (its data
        # server needs none: it drops what is repeated). So a new run begins with one.
        is_new = not any(folder.glob("events.out.tfevents.*"))
        self._file: EventFile | None = EventFile(folder)
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
        """Write the run's row of the HPARAMS tab; its metrics are all scalars of the run, as they come.

        What a run does not have (sigma.value of a learned sigma) is left out; a name keeps one type in all runs.
        """
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2

        # No experiment summary: TensorBoard would take the columns of the whole folder from the first run's. Without
        # one it takes the union over all runs, finds types and domains itself and puts first what differs.
        start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
        for name, value in values.items():
            if isinstance(value, bool):
                start.hparams[name].bool_value = value
            elif isinstance(value, str):
                start.hparams[name].string_value = value
            elif math.isfinite(value):  # JSON has no other numbers
                start.hparams[name].number_value = value
        content = plugin_data_pb2.HParamsPluginData(session_start_info=start, version=metadata.PLUGIN_DATA_VERSION)
        # In a file of its own, which a resumed run writes anew: TensorBoard keeps the first start that it finds in a
        # run, and a run that is trained further has other epochs.
        _write_alone(self.folder / START, _hparams(metadata.SESSION_START_INFO_TAG, content))

    def close(self, status: Status) -> None:
        """Write what is pending and how the run ended; an interrupted one has not ended and stays "unknown"."""
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

    def layout(self) -> None:
        """Lay out the custom scalars page: each term of the loss, training over validation, and the posterior."""
        from torch.utils.tensorboard.summary import custom_scalars  # takes a fifth of a second

        terms = ("loss", "distortion", "rate", "rate_loc", "rate_scale", "penalty", "elbo")
        losses = {term: ["Multiline", [f"^(train|validation)/{term}$"]] for term in terms}  # tags are patterns
        posterior = {
            "posterior scale": ["Multiline", ["^posterior/scale_(mean|min)$"]],
            "spread of loc": ["Multiline", ["^posterior/loc_std$"]],
        }
        self._write(custom_scalars({"train and validation": losses, "posterior": posterior}))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write one point for each tag, such as train/loss, at a step; a value that is not finite is shown as such."""
        self._write(_points(values), step)

    def results(self, values: Mapping[str, float], step: int) -> None:
        """Write the points with which a run ends at a step, in place of those of an end that was not its last: a
        process that was killed in it."""
        add_scalars(self.folder, f"test-{step}", values, step)

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None:
        """Write a histogram of the finite values of each tensor, whatever its shape; one without any is left out."""
        from torch.utils.tensorboard.summary import histogram

        for tag, tensor in values.items():
            finite = tensor.detach().float()
            finite = finite[finite.isfinite()]
            if finite.numel():
                self._write(histogram(tag, finite.cpu().numpy(), BINS), step)

    def pictures(self, tag: str, picture: Picture, step: int) -> None:
        """Write one uint8 picture (H, W, 3)."""
        from torch.utils.tensorboard.summary import image

        self._write(image(tag, picture, dataformats="HWC"), step)

    def embedding(self, codes: Tensor, labels: Sequence[str] | None, images: Tensor | None, step: int) -> None:
        """Show latent codes (N, D) in the projector, with labels and images (N, C, H, W) in [0, 1] where there are any.

        The first 5000 are shown, and they take the place of the ones shown before.
        """
        from google.protobuf import text_format  # type: ignore[import-untyped]
        from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
        from torch.nn.functional import pad

        # SummaryWriter.add_embedding adds an entry a call, forgets those of the run before it was resumed, and has no
        # limit on the size of the sprites.
        folder = self.folder / "projector"
        folder.mkdir(exist_ok=True)
        codes = codes[:POINTS].detach().float().nan_to_num().cpu()
        codes = pad(codes, (0, max(0, 3 - codes.shape[1])))  # the projector draws the first three components
        lines = ["\t".join(f"{number:.6g}" for number in code) + "\n" for code in codes.tolist()]
        write_text(folder / "tensors.tsv", "".join(lines))

        config = ProjectorConfig()
        # TensorBoard caches codes by name.
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
        """Have all that was written survive a power failure."""
        assert self._file is not None
        self._file.flush()

    def _write(self, summary: Any, step: int = 0) -> None:
        assert self._file is not None
        self._file.write(step=step, summary=summary)


class NoEvents(EventWriter):
    """Writes nothing: another process writes the events of the run."""

    def __init__(self) -> None:
        pass

    def hparams(self, values: Mapping[str, Hparam]) -> None:
        pass

    def close(self, status: Status) -> None:
        pass

    def layout(self) -> None:
        pass

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        pass

    def results(self, values: Mapping[str, float], step: int) -> None:
        pass

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None:
        pass

    def pictures(self, tag: str, picture: Picture, step: int) -> None:
        pass

    def embedding(self, codes: Tensor, labels: Sequence[str] | None, images: Tensor | None, step: int) -> None:
        pass

    def flush(self) -> None:
        pass


def add_scalars(folder: Path, name: str, values: Mapping[str, float], step: int) -> None:
    """Add points to the curves of a run that has ended, in an event file of that name, in place of those that an
    earlier call has added under it."""
    for file in folder.glob(f"events.*.~{name}"):
        if file.is_symlink():  # not ours, and it leads elsewhere
            continue
        os.truncate(file, 0)  # not removed: a TensorBoard that is running would stumble over a missing file
    _write_alone(folder / f"events.out.tfevents.{int(time.time()):010d}.~{name}", _points(values), step)


class EventFile:
    """An event file that is written at once, so that an error is raised where it happens, and names the file.

    SummaryWriter writes in a thread, which reports an error late and with a traceback, and never flushes to the disk.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = self.path.open("ab")
        self._records = RecordWriter(self._file)
        self.write(file_version=VERSION)

    def write(self, **fields: Any) -> None:
        """Write one event: a step, and a summary or something else that an event can hold."""
        with reporting_path(self.path):
            self._records.write(_event(**fields))
            self._file.flush()  # TensorBoard sees it

    def purge(self, step: int) -> None:
        """Hide what earlier files of the run have at this step and later."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self.write(step=step, session_log=SessionLog(status=SessionLog.START))

    def flush(self) -> None:
        with reporting_path(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with reporting_path(self.path), self._file:
            self.flush()


def _event(**fields: Any) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=time.time(), **fields).SerializeToString()


def _points(values: Mapping[str, float]) -> Any:
    """One summary for all of them: SummaryWriter.add_scalar would make one each."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])


def _hparams(tag: str, content: Any) -> Any:
    """A summary for the HPARAMS plugin."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams import metadata

    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString())
    # The tensor is empty; without one TensorBoard's data server would not list the summary.
    value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=metadata.NULL_TENSOR)
    return Summary(value=[value])


def _write_alone(path: Path, summary: Any, step: int = 0) -> None:
    """Write one summary as an event file of its own, which is there whole or not at all."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    def write(file: IO[bytes]) -> None:
        records = RecordWriter(file)
        records.write(_event(file_version=VERSION))
        records.write(_event(step=step, summary=summary))

    replace_file(path, write)


def _save_sprites(path: Path, images: Tensor) -> tuple[int, int]:
    """Write images (N, C, H, W) as a square sheet without separators and return the height and width of one of them."""
    from torch.nn.functional import avg_pool2d, pad

    shrink = math.ceil(max(images.shape[2:]) / SPRITE)
    images = avg_pool2d(images.detach().float(), shrink, ceil_mode=True) if shrink > 1 else images
    # As many rows as columns, even if some stay empty: the projector takes one for the other.
    columns = math.ceil(math.sqrt(len(images)))
    images = pad(images, (0, 0, 0, 0, 0, 0, 0, columns**2 - len(images)))
    save_png(path, grid(images, columns, side=SPRITE // 2, pad=0))
    factor = max(1, round(SPRITE / 2 / max(images.shape[2:])))
    return images.shape[2] * factor, images.shape[3] * factor
