"""Datasets that read and write files: folders of images, and torchvision."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vae_cli.axes.dataset import ImageFolder, Split, Torchvision, data_folder, mapped, pack
from vae_cli.axes.dataset.split import fingerprint
from vae_cli.cli import run as run_command
from vae_cli.core.errors import Failure, UserError
from vae_cli.core.images import load_image, to_pixels
from vae_cli.core.listing import listing_once, save_listings
from vae_cli.core.white import WHITES

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "data"


def contents(split: Split) -> torch.Tensor:
    return split.batch(torch.arange(len(split)))


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


# -- more images than fit into memory ---------------------------------------------------------------------------------


@pytest.fixture
def beyond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Split, list[int]]:
    """A packed split that is treated as too large for memory, and the rows of its file that were requested."""
    for name, value in {"BLOCK_BYTES": 3 * 12, "BLOCKS_TOGETHER": 4}.items():
        monkeypatch.setattr(mapped, name, value)
    monkeypatch.setattr(pack, "BLOCKWISE_ABOVE", 0)
    pixels = np.random.default_rng(0).integers(0, 256, (101, 3, 2, 2), dtype=np.uint8)
    packed = pack.write_pack(tmp_path, "here", (3, 2, 2), (pack.Chunk(pixels, None) for _ in range(1)))
    asked: list[int] = []
    will_need = mapped.Mapped.will_need

    def noted(self: mapped.Mapped, first: int, last: int) -> None:
        asked.extend(range(first, last + 1))
        will_need(self, first, last)

    monkeypatch.setattr(mapped.Mapped, "will_need", noted)
    rows = torch.randperm(101, generator=torch.Generator().manual_seed(1))[:90]
    return Split(packed.images, None, rows, packed.mapped), asked


def drawn(split: Split, seed: int, skip: int = 0) -> list[torch.Tensor]:
    return list(split.shuffled(torch.Generator().manual_seed(seed), 8, skip))


def test_blocks_contain_every_image_once_in_an_order_set_by_the_seed(beyond: tuple[Split, list[int]]) -> None:
    split, _ = beyond
    order = torch.cat(drawn(split, 0))
    assert torch.equal(order.sort().values, torch.arange(90))
    assert torch.equal(order, torch.cat(drawn(split, 0)))
    assert not torch.equal(order, torch.cat(drawn(split, 1)))
    assert [len(batch) for batch in drawn(split, 0)] == [8] * 11 + [2]
    for one, other in zip(drawn(split, 0)[7:], drawn(split, 0, skip=7), strict=True):
        assert torch.equal(one, other)
    # A batch has images from more than one block, and neighbors in the file are separated.
    places = split.index[order].diff().abs()
    assert (places == 1).float().mean() < 0.3


def test_blocks_are_requested_before_they_are_used(beyond: tuple[Split, list[int]]) -> None:
    split, asked = beyond
    for skip in (0, 7):
        asked.clear()
        for positions in split.shuffled(torch.Generator().manual_seed(0), 8, skip):
            assert set(split.index[positions].tolist()) <= set(asked)
    asked.clear()
    next(split.shuffled(torch.Generator().manual_seed(0), 8))
    assert len(set(asked)) < 60, "only some blocks ahead"


def test_batches_of_mapped_images_equal_those_in_memory(beyond: tuple[Split, list[int]]) -> None:
    split, asked = beyond
    asked.clear()
    there = Split(split.images.clone(), None, split.index)
    batches = [split.batch(positions) for positions in split.in_order(7)]
    assert torch.equal(torch.cat(batches), contents(there))
    assert sorted(asked) == sorted(split.index.tolist())
    assert torch.equal(split.mean(), there.mean())
    assert split.to("cpu").mapped is split.mapped


def test_few_images_are_shuffled_without_blocks(tmp_path: Path) -> None:
    pixels = np.zeros((5, 3, 2, 2), dtype=np.uint8)
    assert pack.write_pack(tmp_path, "here", (3, 2, 2), (pack.Chunk(pixels, None) for _ in range(1))).mapped is None


# -- the data folder --------------------------------------------------------------------------------------------------


def test_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VAE_DATA_DIR", raising=False)
    assert data_folder(None) == tmp_path / "cache" / "vae"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert data_folder(None) == tmp_path / ".cache" / "vae"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert data_folder(None) == tmp_path / "Library" / "Caches" / "vae"
    monkeypatch.setenv("VAE_DATA_DIR", str(tmp_path / "variable"))
    assert data_folder(None) == tmp_path / "variable"
    assert data_folder("~/given") == tmp_path / "given"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data_dir=.*file is a file"):
        data_folder(str(tmp_path / "file"))


# -- any image to pixels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_levels(mode: str, channels: int) -> None:
    if mode in ("I", "I;16"):  # 16-bit gray
        image = Image.fromarray(np.full((9, 7), 200 * 257, np.uint16 if mode == "I;16" else np.int32))
        assert image.mode == mode
        expected = 200
    elif mode == "1":
        image, expected = Image.new("1", (7, 9), 1), 255
    else:
        expected = 204  # a level of the palette of 216 colors too
        image = Image.new("RGB", (7, 9), (204, 204, 204))
        image = image.convert("L").convert(mode) if mode in ("LA", "F") else image.convert(mode)
    pixels = to_pixels(image, (channels, 4, 4))
    assert pixels.shape == (channels, 4, 4)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= 2


def test_channels_are_red_green_blue() -> None:
    pixels = to_pixels(Image.new("RGB", (8, 8), (10, 20, 30)), (3, 2, 2))
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(("background", "level"), [("white", 255), ("black", 0)])
def test_transparent_pixels_show_the_background(background: str, level: int) -> None:
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([200, 0, 0])
    palette.info["transparency"] = 0
    for image in (clear, palette, clear.convert("LA")):
        assert to_pixels(image, (3, 2, 2), background=background).tolist() == np.full((3, 2, 2), level).tolist()


def test_the_middle_is_kept_and_the_crop_cut_first() -> None:
    array = np.zeros((20, 60), np.uint8)
    array[:, 20:40] = 255
    assert (to_pixels(Image.fromarray(array), (1, 5, 5)) == 255).all()
    array = np.zeros((30, 30), np.uint8)
    array[10:20, 10:20] = 255
    assert (to_pixels(Image.fromarray(array), (1, 5, 5), crop=10) == 255).all()
    assert (to_pixels(Image.fromarray(array), (1, 5, 5)) == 0).any()


def test_shrinking_is_anti_aliased() -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(to_pixels(Image.fromarray(stripes), (1, 8, 8)).astype(int) - 127).max() < 10


def test_a_photograph_is_rotated_by_its_exif_data(tmp_path: Path) -> None:
    array = np.zeros((16, 16), np.uint8)
    array[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise: the top becomes the right
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    pixels = to_pixels(Image.open(tmp_path / "a.png"), (1, 16, 16))
    assert (pixels[0, :, 8:] == 255).all()
    assert (pixels[0, :, :8] == 0).all()


def test_pictures_of_runs_below_the_images_are_left_out(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    images = ["dataset=image_folder", "dataset.path=.", "dataset.side=8", "dataset.test=5", "dataset.validation=5"]
    settings = ["run_name=a", "epochs=1", "network.hidden=[8]", "data_dir=../data"]
    for command in (["train", *images, *settings], ["sample", "a", "--count", "4"]):
        monkeypatch.setattr(sys, "argv", ["vae", *command])
        assert run_command() == 0
    assert list(Path("runs/a").rglob("*.png"))
    for name in ("report.html", "compare.json", "figures/scales.png"):
        file = Path("runs/compare") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    shutil.copytree("runs/a", "copied", ignore=shutil.ignore_patterns(".*"))
    splits = image_folder(photos).load()
    assert splits.classes == ("cats", "dogs")
    assert sum(len(split) for split in splits[:3]) == 30


# -- the value of white -----------------------------------------------------------------------------------------------


def test_the_images_of_a_sweep_are_fixed_at_its_start(photos: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    with listing_once():
        image_folder(photos).check()
        save_listings(sweep)
        first = image_folder(photos).load()
        _add(photos)
        assert fingerprint(image_folder(photos).load()) == fingerprint(first)
    with listing_once(sweep):  # a job in another process
        assert fingerprint(image_folder(photos).load()) == fingerprint(first)
    assert fingerprint(image_folder(photos).load()) != fingerprint(first)
    with listing_once(sweep):  # the pack is that of the new images
        assert fingerprint(image_folder(photos).load()) == fingerprint(first)
    shutil.rmtree(photos.parent / "data")
    _edit(photos)
    with listing_once(sweep), pytest.raises(UserError, match="have changed or were removed since this command started"):
        image_folder(photos).load()


def ramp(white: float, kind: str = "float32") -> Image.Image:
    """Return an image whose values go from 0 to white, and whose last rows are white."""
    values = np.linspace(0, white, 32 * 24).reshape(24, 32)
    return Image.fromarray(np.concatenate([values, np.full((8, 32), white)]).astype(kind))


def overshooting(white: float) -> Image.Image:
    """Return an image with black and white halves and a few values outside, as interpolation makes them."""
    values = np.zeros((32, 32), "float32")
    values[:, 16:] = white
    values[0, 15:17] = -0.2 * white, 1.2 * white
    values[1:20, 16] = 1.0001 * white
    return Image.fromarray(values)


@pytest.mark.parametrize("white", WHITES)
def test_floating_point_images_have_one_range_that_tolerates_overshoot(white: int, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(12):
        overshooting(white).save(tmp_path / "photos" / f"{number}.tif")
    ramp(0.5 * white).save(tmp_path / "photos" / "dark.tif")
    Image.new("L", (32, 32), 255).save(tmp_path / "photos" / "eight-bit.png")
    images = image_folder(tmp_path / "photos", test=1, validation=1).load().train.images
    found = images.amax((1, 2, 3)).sort().values
    assert found[0] == pytest.approx(128, abs=2)
    assert (found[1:] == 255).all()


def test_integers_of_16_bits_have_the_range_of_their_type(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number, white in enumerate([65535, 30000, 2000]):
        ramp(white, "uint16").save(tmp_path / "photos" / f"{number}.png")
    images = image_folder(tmp_path / "photos", test=1, validation=0).load().train.images
    assert images.amax((1, 2, 3)).tolist() == pytest.approx([255, 117, 8], abs=1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            [ramp(4000, "uint16"), ramp(100, "uint16")],
            r"at most 4000, even in .* 0\.png, .*Type dataset\.range",
        ),
        ([ramp(200, "int32")], r"at most 200, .*Type dataset\.range"),
        ([ramp(1e6)], r"0\.tif has values up to 1e\+06.*white is unknown"),
        ([ramp(20)], "at most 20, .*value of white is unknown"),
        ([ramp(255), ramp(1)], r"differs between images: 1\.tif has values up to 1, and 0\.tif up to 255"),
        ([Image.fromarray(np.linspace(-1, 1, 1024).reshape(32, 32).astype("float32"))], "value of black is unknown"),
    ],
)
def test_images_of_an_unknown_range_are_refused_unless_it_is_given(
    images: list[Image.Image], message: str, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        image = images[min(number, len(images) - 1)]
        image.save(tmp_path / "photos" / f"{number}.{'png' if image.mode == 'I;16' else 'tif'}")
    with pytest.raises(UserError, match=message):
        image_folder(tmp_path / "photos", test=1, validation=0).load()
    images_in_range = image_folder(tmp_path / "photos", test=1, validation=0, range=4095).load().train.images
    high = max(float(np.asarray(image).max()) for image in images)
    assert int(images_in_range.max()) == pytest.approx(min(255, 255 * high / 4095), abs=1)


def test_a_single_file_of_an_unknown_range_is_refused(tmp_path: Path) -> None:
    ramp(4000, "uint16").save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png.*unknown\. Save it with 8 bits"):
        load_image(tmp_path / "a.png", (1, 8, 8))
    assert float(load_image(tmp_path / "a.png", (1, 8, 8), white=4095).max()) == pytest.approx(4000 / 4095, abs=2 / 255)


# -- image_folder -----------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Thirty images, each of one level, in two sub-folders: 0 to 14 in cats, 15 to 29 in dogs."""
    folder = tmp_path / "photos"
    for number in range(30):
        name = "cats" if number < 15 else "dogs"
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (20 + number, 40), 5 * number).save(folder / name / f"{number:02d}.png")
    return folder


def image_folder(photos: Path, **settings: Any) -> ImageFolder:
    return ImageFolder(
        **{
            "path": str(photos),
            "side": 8,
            "channels": 1,
            "test": 5,
            "validation": 5,
            "data_dir": str(photos.parent / "data"),
            **settings,
        }
    )


def packs(photos: Path) -> list[Path]:
    return sorted((photos.parent / "data" / "packed").glob("*/*/images.npy"))


def test_image_folder_contains_every_image_once_with_its_label(photos: Path) -> None:
    splits = image_folder(photos).load()
    assert splits.classes == ("cats", "dogs")
    levels = []
    for split, size in zip(splits[:3], (20, 5, 5), strict=True):
        assert len(split) == size
        found = (contents(split) * 51).round().long()
        assert found.shape == (size, 1, 8, 8)
        assert torch.equal(found.amin((1, 2, 3)), found.amax((1, 2, 3)))
        assert torch.equal(split.batch_labels(torch.arange(size)), (found[:, 0, 0, 0] >= 15).long())
        levels += found[:, 0, 0, 0].tolist()
    assert sorted(levels) == list(range(30))


def test_image_folder_is_memory_mapped_and_cannot_be_written_back(photos: Path) -> None:
    images = image_folder(photos).load().train.images
    before = images.clone()
    images.zero_()
    assert torch.equal(image_folder(photos).load().train.images, before)


def test_images_at_the_top_have_no_labels(photos: Path) -> None:
    Image.new("RGB", (9, 9)).save(photos / "top.jpg")
    splits = image_folder(photos).load()
    assert splits.classes is None
    assert splits.train.labels is None
    assert len(splits.train) == 21


def test_an_unchanged_folder_is_packed_once(photos: Path) -> None:
    image_folder(photos).load()
    first = listing(photos.parent / "data")
    image_folder(photos, test=0.5, validation=0, split_seed=9).load()  # not part of the pack
    assert listing(photos.parent / "data") == first


def _add(photos: Path) -> None:
    Image.new("L", (9, 9)).save(photos / "cats" / "new.png")


def _remove(photos: Path) -> None:
    (photos / "cats" / "00.png").unlink()


def _edit(photos: Path) -> None:
    Image.new("L", (99, 99), 255).save(photos / "cats" / "00.png")


def _touch(photos: Path) -> None:
    os.utime(photos / "cats" / "00.png", ns=(1, 1))


def _move(photos: Path) -> None:  # into another class, but still the same position in the sorted list of all images
    (photos / "cats" / "14.png").rename(photos / "dogs" / "14.png")


@pytest.mark.parametrize("change", [_add, _remove, _edit, _touch, _move])
def test_a_changed_folder_is_packed_again_and_the_old_pack_removed(
    photos: Path, change: Callable[[Path], None]
) -> None:
    image_folder(photos).load()
    (old,) = packs(photos)
    change(photos)
    images = image_folder(photos).load().train.images
    (new,) = packs(photos)
    assert new != old
    assert len(images) == sum(len(files) for _, _, files in os.walk(photos))


def test_other_settings_have_their_own_pack(photos: Path) -> None:
    image_folder(photos).load()
    assert image_folder(photos, side=4).load().train.images.shape == (30, 1, 4, 4)
    assert image_folder(photos, channels=3).load().train.images.shape == (30, 3, 8, 8)
    image_folder(photos, background="black").load()
    assert len(packs(photos)) == 4
    image_folder(photos).load()
    assert len(packs(photos)) == 4


def test_packing_that_fails_leaves_no_pack(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "IMAGES_PER_STEP", 10)
    image_folder(photos).load()
    (old,) = packs(photos)
    _add(photos)
    real, calls = np.stack, 0

    def stop(arrays: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "stack", stop)
        with pytest.raises(KeyboardInterrupt):
            image_folder(photos).load()
    assert packs(photos) == [old]
    assert len(image_folder(photos).load().train.images) == 31


def test_packing_that_is_killed_leaves_no_pack(photos: Path) -> None:
    """The process ends just before the pack is renamed into place, so it cannot clean up."""
    program = (
        "import os, sys; from vae_cli.axes.dataset import ImageFolder; os.replace = lambda *names: os._exit(7);"
        "ImageFolder(path=sys.argv[1], side=8, channels=1, test=5, validation=5, data_dir=sys.argv[2]).load()"
    )
    arguments = [sys.executable, "-c", program, str(photos), str(photos.parent / "data")]
    assert subprocess.run(arguments, cwd=ROOT, check=False).returncode == 7
    (partial,) = (photos.parent / "data" / "packed").glob("*/.partial-*")
    assert len(image_folder(photos).load().train.images) == 30
    assert not partial.exists()
    (whole,) = packs(photos)
    assert not whole.parent.name.startswith(".")


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: os.truncate(file, 1000)])
def test_a_damaged_pack_is_made_again(photos: Path, damage: Callable[[Path], None]) -> None:
    before = contents(image_folder(photos).load().train)
    damage(packs(photos)[0])
    assert torch.equal(contents(image_folder(photos).load().train), before)


def test_runs_that_start_together_pack_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fcntl")
    written = []
    real = pack.write_images

    def write(*arguments: Any) -> None:
        written.append(1)
        real(*arguments)

    monkeypatch.setattr(pack, "write_images", write)
    threads = [threading.Thread(target=image_folder(photos).load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1


def test_an_unwritable_data_folder(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: Any, **settings: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(Failure, match=r"Cannot write to .*packed.*Permission denied.*data_dir="):
        image_folder(photos).load()


def test_a_full_disk(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Failure, match=r"No space left on device.*data_dir="):
        image_folder(photos).load()
    assert not packs(photos)
    assert not list((photos.parent / "data" / "packed").glob("*/.partial-*"))


def test_the_progress_bar_ends_before_the_error_is_shown(tmp_path: Path) -> None:
    ended = []

    class Full(np.ndarray[Any, np.dtype[np.uint8]]):
        def tobytes(self, *arguments: Any) -> bytes:
            raise OSError(28, "No space left on device")

    def chunks() -> Generator[pack.Chunk, None, None]:
        try:
            yield pack.Chunk(np.zeros((1, 1, 2, 2), np.uint8).view(Full), None)
        finally:
            ended.append(1)

    with pytest.raises(Failure, match="No space left") as caught:
        pack.write_pack(tmp_path, "fingerprint", (1, 2, 2), chunks())
    assert caught.tb  # which keeps the generator alive
    assert ended


def test_a_finished_pack_needs_no_writing(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(photos).load()
    monkeypatch.setattr(Path, "mkdir", None)
    monkeypatch.setattr(pack, "exclusive", None)
    image_folder(photos).load()


def spoil(photos: Path) -> None:
    (photos / "cats" / "00.png").write_bytes(b"no image")
    whole = (photos / "dogs" / "20.png").read_bytes()
    (photos / "dogs" / "20.png").write_bytes(whole[: len(whole) // 2])
    (photos / "dogs" / "21.jpg").write_bytes(b"")


def test_corrupt_images_are_named(photos: Path) -> None:
    spoil(photos)
    with pytest.raises(UserError, match=r"cats/00.png.*dogs/20.png.*dogs/21.jpg.*dataset.skip_corrupt=true") as caught:
        image_folder(photos).load()
    assert "cats/01" not in str(caught.value)
    assert not packs(photos)


def test_corrupt_images_are_skipped_with_skip_corrupt(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "IMAGES_PER_STEP", 7)
    spoil(photos)
    splits = image_folder(photos, skip_corrupt=True).load()
    assert len(splits.train.images) == 28
    found = (splits.train.images[:, 0, 0, 0].float() / 5).round().long().tolist()
    assert found == [number for number in range(30) if number not in (0, 20)]
    assert splits.train.labels is not None
    assert splits.train.labels.tolist() == [int(number >= 15) for number in found]


def test_files_that_are_no_pictures_are_named_and_not_waited_for(photos: Path) -> None:
    os.mkfifo(photos / "cats" / "pipe.png")
    (photos / "cats" / "dead.png").symlink_to("nowhere")
    (photos / "dogs" / "two\nlines.png").write_text("no")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(photos / "dogs" / "nan.tiff")
    with pytest.raises(UserError) as caught:
        image_folder(photos).load()
    for said in (
        "cats/pipe.png (it is not a regular file)",
        "cats/dead.png (No such file or directory)",
        "dogs/nan.tiff (none of its values is finite)",
        "dogs/two lines.png (not an image)",
    ):
        assert said in str(caught.value)
    assert len(image_folder(photos, skip_corrupt=True).load().train) == 20
    with pytest.raises(UserError, match="it is not a regular file"):
        load_image(photos / "cats" / "pipe.png", (1, 8, 8))


def test_many_corrupt_images_end_the_packing(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in sorted((photos / "cats").iterdir()):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"04.png.* and others\."):
        image_folder(photos).load()
    for file in (photos / "dogs").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="No image in the folder can be read"):
        image_folder(photos, skip_corrupt=True).load()


def test_a_decompression_bomb_is_named(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (400, 400)).save(photos / "cats" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50 * 50)
    with pytest.raises(UserError, match=r"cats/bomb.png .*pixels"):
        image_folder(photos).load()


def test_too_few_images(photos: Path) -> None:
    with pytest.raises(
        UserError,
        match="30 images, too few for a test set of 5, a validation set of 25 and at least one",
    ):
        image_folder(photos, validation=25).load()
    with pytest.raises(UserError, match=r"30 images, too few for a test set of 30.*test=1 dataset.validation=0"):
        image_folder(photos, test=1.0, validation=0).load()
    assert len(image_folder(photos, validation=24).load().train) == 1
    assert len(image_folder(photos, test=0.001).load().test) == 1
    assert len(image_folder(photos, test=1, validation=0).load().test) == 1


@pytest.mark.parametrize(("images", "sizes"), [(3, (1, 1, 1)), (30, (24, 3, 3)), (28, (22, 3, 3))])
def test_a_tenth_of_the_images_is_held_out_by_default(images: int, sizes: tuple[int, ...], photos: Path) -> None:
    for number in range(images, 30):
        next(photos.rglob(f"{number:02d}.png")).unlink()
    splits = ImageFolder(path=str(photos), side=8, channels=1, data_dir=str(photos.parent / "data")).load()
    assert tuple(len(split) for split in splits[:3]) == sizes


def test_a_path_without_images_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.path=<folder>"):
        image_folder(photos, path=None)
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        image_folder(tmp_path / "nowhere").check()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"it is empty"):
        image_folder(tmp_path / "empty").load()
    (tmp_path / "empty" / "notes.txt").touch()
    (tmp_path / "empty" / ".hidden.png").touch()
    with pytest.raises(UserError, match=r"none of its 1 files is an image"):
        image_folder(tmp_path / "empty").check()
    with pytest.raises(UserError, match=r"notes.txt is a file, not a folder"):
        image_folder(tmp_path / "empty" / "notes.txt").check()
    image_folder(photos).check()


def test_cyclic_and_broken_links(photos: Path) -> None:
    (photos / "cats" / "circle").symlink_to(photos)
    assert len(image_folder(photos).load().train.images) == 30
    (photos / "cats" / "lost.png").symlink_to(photos / "nowhere.png")
    with pytest.raises(UserError, match=r"cats/lost.png"):
        image_folder(photos).load()


# -- torchvision ------------------------------------------------------------------------------------------------------


def choice(name: str, data: Path, **settings: Any) -> Torchvision:
    values = yaml.safe_load((ROOT / "configs" / "dataset" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert values.pop("_target_") == "vae_cli.axes.dataset.Torchvision"
    return Torchvision(**{**values, "data_dir": str(data), **settings})


def idx(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def fake_mnist(data: Path, prefixes: tuple[str, str] = ("train", "t10k"), name: str = "MNIST") -> None:
    folder = data / name / "raw"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for prefix, count in zip(prefixes, (20, 6), strict=True):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(count)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets.utils as utils

    def fail(*arguments: Any, **settings: Any) -> None:
        raise URLError("no network here")

    monkeypatch.setattr(utils, "_get_redirect_url", fail)
    monkeypatch.setattr(utils, "_urlretrieve", fail)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_files_that_are_complete_are_only_read(name: str, tmp_path: Path) -> None:
    dataset = choice(name, tmp_path, validation=5)
    fake_mnist(tmp_path, name=dataset.source)
    before = listing(tmp_path)
    splits = dataset.load()
    assert listing(tmp_path) == before
    assert [len(split) for split in splits[:3]] == [15, 5, 6]
    assert dataset.shape == splits.train.images.shape[1:] == (1, 28, 28)
    assert splits.train.images.dtype == torch.uint8
    assert splits.classes is not None
    assert len(splits.classes) == 10
    held = {*splits.train.index.tolist(), *splits.validation.index.tolist()}
    assert held == set(range(20))
    for split in splits[:3]:
        numbers = (contents(split)[:, 0, 0, 0] * 255).round().long()
        assert torch.equal(split.batch_labels(torch.arange(len(split))), numbers % 10)
    assert (contents(splits.test)[:, 0, 0, 0] * 255).round().tolist() == list(range(6))


def test_held_out_images_of_mnist_follow_the_split_seed(tmp_path: Path) -> None:
    fake_mnist(tmp_path)
    one, same, other = (choice("mnist", tmp_path, validation=5, split_seed=seed).load() for seed in (0, 0, 1))
    assert torch.equal(one.validation.index, same.validation.index)
    assert set(one.validation.index.tolist()) != set(other.validation.index.tolist())
    with pytest.raises(UserError, match=r"validation=20 .* only 20 images for training"):
        choice("mnist", tmp_path, validation=20).load()


def test_archives_as_downloaded_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import MNIST

    fake_mnist(tmp_path)
    resources = []
    for file in sorted((tmp_path / "MNIST" / "raw").iterdir()):
        archive = file.with_name(file.name + ".gz")
        archive.write_bytes(gzip.compress(file.read_bytes()))
        resources.append((archive.name, hashlib.md5(archive.read_bytes()).hexdigest()))
        file.unlink()
    monkeypatch.setattr(MNIST, "resources", resources)
    assert len(choice("mnist", tmp_path, validation=5).load().train) == 15
    # A truncated archive is not mistaken for a complete one.
    for file in (tmp_path / "MNIST" / "raw").glob("*ubyte"):
        file.unlink()
    os.truncate(archive, 20)
    with pytest.raises(Failure, match="no network here"):
        choice("mnist", tmp_path, validation=5).load()


def test_a_failed_download_says_which_files_go_where(tmp_path: Path) -> None:
    for name in ("mnist", "emnist", "cifar10", "svhn", "celeba"):
        with pytest.raises(Failure) as caught:
            choice(name, tmp_path / name).load()
        message = str(caught.value)
        dataset = choice(name, tmp_path)
        for part in (*dataset.files, str(tmp_path / name), "data_dir=", "dataset=digits", dataset.source):
            assert part in message, name
        assert ("as downloaded or unpacked" in message) == (name in ("mnist", "emnist", "cifar10"))
        assert "\n" not in message


@pytest.mark.parametrize("size", [0, 3, 1000])
def test_a_truncated_file_is_not_mistaken_for_a_complete_one(size: int, tmp_path: Path) -> None:
    fake_mnist(tmp_path)
    os.truncate(tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte", size)
    with pytest.raises(Failure, match=r"incomplete or damaged.*dataset=digits"):
        choice("mnist", tmp_path, validation=5).load()


def test_files_named_in_the_configurations_are_those_of_torchvision() -> None:
    from torchvision import datasets

    for name in ("mnist", "fashion_mnist", "kmnist"):
        dataset = choice(name, ROOT)
        resources = getattr(datasets, dataset.source).resources
        assert list(dataset.files) == [f"{dataset.source}/raw/{file}" for file, _ in resources]
    assert choice("cifar10", ROOT).files == [datasets.CIFAR10.filename]
    assert choice("svhn", ROOT).files == [datasets.SVHN.split_list[split][1] for split in ("train", "test")]
    texts = [f"celeba/{file}" for _, _, file in datasets.CelebA.file_list if file.endswith(".txt")]
    assert list(choice("celeba", ROOT).files[1:]) == texts


def test_emnist_images_are_upright(tmp_path: Path) -> None:
    fake_mnist(tmp_path, ("emnist-balanced-train", "emnist-balanced-test"), "EMNIST")
    published = (tmp_path / "EMNIST" / "raw" / "emnist-balanced-test-images-idx3-ubyte").read_bytes()[16:]
    splits = choice("emnist", tmp_path, validation=5).load()
    expected = np.frombuffer(published, np.uint8).reshape(6, 1, 28, 28).swapaxes(2, 3)
    assert (splits.test.images.numpy() == expected).all()
    assert splits.test.images.is_contiguous()
    assert splits.classes is not None
    assert len(splits.classes) == 47


def test_images_are_resized_to_the_shape(tmp_path: Path) -> None:
    fake_mnist(tmp_path)
    original = choice("mnist", tmp_path, validation=5).load().test.images.float()
    half = choice("mnist", tmp_path, validation=5, shape=[1, 14, 14]).load().test.images
    expected = torch.nn.functional.interpolate(original, (14, 14), mode="bilinear", antialias=True)
    assert (half.float() - expected).abs().max() <= 0.5
    cropped = choice("mnist", tmp_path, validation=5, shape=[1, 20, 20], crop=20).load().test.images
    assert torch.equal(cropped.float(), original[:, :, 4:24, 4:24])
    wide = choice("mnist", tmp_path, validation=5, shape=[1, 14, 28]).load().test.images
    assert torch.equal(wide.float(), original[:, :, 7:21])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": [28, 28]}, r"shape=\[28, 28\].*\[1,28,28\]"),
        ({"shape": [2, 28, 28]}, r"channels \(1 or 3\)"),
        ({"shape": [3, 28, 28]}, r"dataset\.shape=\[1,28,28\]"),
        ({"crop": 29}, r"dataset.crop=29 .* 28 or less"),
        ({"source": "MNST"}, r"dataset.source=MNST .*'MNIST'"),
        ({"source": "utils"}, r"dataset.source=utils"),
        ({"train": {"trian": True}}, r"trian"),
        ({"source": "SVHN", "train": {"split": "tain"}}, r"tain"),
    ],
)
def test_settings_that_do_not_match_the_data_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fake_mnist(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        choice("mnist", tmp_path, **{"validation": 5, **settings}).load()
    assert caught.value.exit_code == 2


def test_cifar10_is_read_as_one_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)

    def save(name: str, value: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(value))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    batches = [random.integers(0, 256, (8, 3 * 32 * 32), dtype=np.uint8) for _ in range(3)]
    parts = [save(f"part{n}", {"data": data, "labels": list(range(8))}) for n, data in enumerate(batches)]
    meta = save("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "train_list", parts[:2])
    monkeypatch.setattr(CIFAR10, "test_list", parts[2:])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    splits = choice("cifar10", tmp_path, validation=4).load()
    assert [len(split) for split in splits[:3]] == [12, 4, 8]
    assert (splits.train.images.numpy() == np.concatenate(batches[:2]).reshape(16, 3, 32, 32)).all()
    assert splits.test.labels is not None
    assert splits.test.labels.tolist() == list(range(8))
    assert splits.classes == tuple("abcdefghij")


def test_svhn_is_read_as_one_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    split_list = {}
    for split in ("train", "test"):
        images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 9), dtype=np.uint8)
        savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": np.arange(2, 11, dtype=np.uint8)[:, None]})
        checksum = hashlib.md5((tmp_path / f"{split}_32x32.mat").read_bytes()).hexdigest()
        split_list[split] = ["", f"{split}_32x32.mat", checksum]
    monkeypatch.setattr(SVHN, "split_list", split_list)
    splits = choice("svhn", tmp_path, validation=2).load()
    assert (splits.test.images.numpy() == images.transpose(3, 2, 0, 1)).all()
    assert splits.test.labels is not None
    assert splits.test.labels.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 0]


@pytest.fixture
def faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CelebA of 14 images: 8 for training, 3 for validation, 3 for testing; the middle of image n has level 10 n."""
    from torchvision.datasets import CelebA

    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{n:06d}.png" for n in range(14)]
    for n, name in enumerate(names):
        array = np.full((218, 178, 3), 255, np.uint8)
        array[35:183, 15:163] = 10 * n
        Image.fromarray(array).save(folder / "img_align_celeba" / name)
    texts = {
        "list_eval_partition.txt": [f"{name} {0 if n < 8 else 1 if n < 11 else 2}" for n, name in enumerate(names)],
        "identity_CelebA.txt": [f"{name} 1" for name in names],
    }
    for name in ("list_bbox_celeba.txt", "list_landmarks_align_celeba.txt", "list_attr_celeba.txt"):
        texts[name] = ["14", "one two", *(f"{image} 1 -1" for image in names)]
    files = []
    for name, lines in texts.items():
        (folder / name).write_text("\n".join(lines))
        files.append(("", hashlib.md5((folder / name).read_bytes()).hexdigest(), name))
    monkeypatch.setattr(CelebA, "file_list", files)
    return tmp_path


def test_celeba_is_cropped_and_packed_once(faces: Path) -> None:
    dataset = choice("celeba", faces, validation=2)
    splits = dataset.load()
    assert "labels" not in dataset.provides
    assert splits.train.labels is None
    assert [len(split) for split in splits[:3]] == [6, 2, 3]
    assert splits.train.images.shape == (8, 3, 64, 64)
    assert (splits.train.images == 10 * torch.arange(8)[:, None, None, None]).all()
    assert splits.test.images[:, 0, 0, 0].tolist() == [110, 120, 130]
    shutil.rmtree(faces / "celeba")  # it is not needed again
    assert torch.equal(dataset.load().test.images, splits.test.images)


def test_interrupted_unpacking_is_noticed(faces: Path) -> None:
    (faces / "celeba" / "img_align_celeba" / "000005.png").unlink()
    with pytest.raises(Failure, match=r"000005.png.*incomplete or damaged"):
        choice("celeba", faces, validation=2).load()
    assert not list((faces / "packed").glob("*/*/about.json"))


def test_a_source_that_makes_its_images_one_by_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "source": "FakeData",
        "train": {"size": 12, "image_size": [3, 20, 10]},
        "test": {"size": 4, "image_size": [3, 20, 10]},
        "shape": [3, 8, 8],
        "validation": 2,
        "data_dir": str(tmp_path),
    }
    splits = Torchvision(**settings).load()
    assert splits.train.images.shape == (12, 3, 8, 8)
    assert splits.train.labels is not None
    assert splits.train.labels.shape == (12,)


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        ({"size": -5}, "should return >= 0"),
        ({"size": "x"}, "cannot be interpreted as an integer"),
        ({"size": 5, "transform": "os.system"}, "'str' object is not callable"),
        ({"size": 5, "image_size": "x"}, ""),
        ({"size": 5, "num_classes": 0}, ""),
        ({"size": 5, "nonsense": 1}, "unexpected keyword"),
        ({"size": 10**9}, "1,000,000,000 images, more than"),
    ],
)
def test_arguments_that_torchvision_cannot_use(train: dict[str, Any], reason: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"source": "FakeData", "test": {"size": 9}, "shape": [1, 8, 8], "validation": 1}
    with pytest.raises(UserError, match=rf"torchvision's FakeData cannot be created with \{{.*{reason}"):
        Torchvision(**settings, train=train, data_dir=str(tmp_path)).load()
    assert not list(tmp_path.rglob("images.npy"))


def test_images_that_do_not_fit_on_the_disk(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(Failure, match=r"The 30 images need .* only 0\.0 GB of free space.*data_dir="):
        image_folder(photos).load()


@pytest.mark.skipif(not (REAL / "MNIST").is_dir(), reason=f"there is no {REAL / 'MNIST'}")
def test_real_mnist() -> None:
    before = listing(REAL)
    splits = choice("mnist", REAL).load()
    assert listing(REAL) == before
    assert [len(split) for split in splits[:3]] == [55000, 5000, 10000]
    whole = torch.cat([splits.train.index, splits.validation.index])
    assert torch.equal(whole.sort().values, torch.arange(60000))
    mean = (splits.train.mean() * 55 + splits.validation.mean() * 5).mean() / 60
    torch.testing.assert_close(mean, torch.tensor(0.1307), atol=1e-4, rtol=0)
    assert splits.test.labels is not None
    assert splits.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    counts = splits.validation.batch_labels(torch.arange(5000)).bincount()
    assert counts.min() > 400  # of about 500 each: a random tail, not the end of a sorted file
