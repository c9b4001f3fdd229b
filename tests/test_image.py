"""Pictures: their pixels, and the files they are written to and read from."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from PIL import Image

from vae_cli.core.errors import UserError
from vae_cli.core.images import BACKGROUND, SEPARATOR, Heading, fast_png, grid, load_image, save_gif, save_png, to_uint8


def test_to_uint8_clamps_and_rounds_and_maps_nan_and_infinity_to_0() -> None:
    values = torch.tensor([-1.0, 0.0, 0.499, 0.999, 2.0, float("nan"), float("inf"), -float("inf")])
    assert to_uint8(values.reshape(2, 1, 2, 2)).flatten().tolist() == [0, 0, 127, 255, 255, 0, 0, 0]
    assert to_uint8(values).dtype == torch.uint8
    assert to_uint8(values.to(torch.bfloat16).requires_grad_()).shape == (8,)


def test_every_level_survives() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels / 255), levels)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_image_where_it_belongs(channels: int) -> None:
    images = torch.randint(0, 256, (5, channels, 4, 6)) / 255
    picture = grid(images, columns=3, side=12, pad=2)
    assert picture.dtype == np.uint8
    assert picture.shape == (2 * (8 + 2) + 2, 3 * (12 + 2) + 2, 3)
    for index, image in enumerate(images):
        top, left = 2 + index // 3 * 10, 2 + index % 3 * 14
        cell = torch.from_numpy(picture[top : top + 8, left : left + 12]).permute(2, 0, 1)
        large = image.repeat_interleave(2, 1).repeat_interleave(2, 2)  # no smoothing
        assert torch.equal(cell, to_uint8(large).expand(3, -1, -1))
        assert (picture[top - 2 : top, left : left + 12] == SEPARATOR).all()
        assert (picture[top : top + 8, left + 12 : left + 14] == SEPARATOR).all()
    assert (picture[12:, 30:] == BACKGROUND).all()  # the place without an image


@pytest.mark.parametrize(("size", "shown"), [(8, 64), (24, 72), (28, 56), (32, 64), (64, 64), (128, 128)])
def test_a_grid_enlarges_small_images_by_a_whole_factor(size: int, shown: int) -> None:
    assert grid(torch.rand(1, 1, size, size), columns=8, pad=0).shape == (shown, shown, 3)


def test_row_labels_are_beside_their_rows() -> None:
    images = torch.zeros(4, 1, 8, 8)
    plain, labeled = grid(images, 2), grid(images, 2, row_labels=["input", ""])
    margin = labeled.shape[1] - plain.shape[1]
    assert margin > 0
    assert np.array_equal(labeled[:, margin:], plain)
    assert (labeled[:66, :margin] < 128).any()
    assert (labeled[66:, :margin] == BACKGROUND).all()


def test_headings_are_above_their_columns_and_fit() -> None:
    images = torch.zeros(6, 1, 8, 8)
    plain = grid(images, 3)
    headed = grid(images, 3, headings=[Heading("one"), Heading("a long heading of two columns", 2)])
    strip = headed[: headed.shape[0] - plain.shape[0]]
    assert (headed[len(strip) :] == plain).all()
    inked = np.nonzero((strip < 200).any((0, 2)))[0]
    width = plain.shape[1] // 3
    assert 0 < (inked < width).sum() < (inked > width).sum()
    assert not ((inked > width - 3) & (inked < width + 3)).any()  # the two do not touch


def test_the_place_of_an_image_that_is_nan_stays_empty() -> None:
    images = torch.zeros(4, 1, 8, 8)
    images[1] = torch.nan
    picture = grid(images, 4, side=8, pad=2)
    columns = picture[:, :, 0].mean(0)
    assert (columns[14:20] == 255).all()
    assert columns[4] < 255 > columns[26]


def test_a_grid_without_images_or_with_2_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="an image"):
        grid(torch.zeros(0, 1, 8, 8), 2)
    with pytest.raises(ValueError, match="not 2"):
        grid(torch.zeros(1, 2, 8, 8), 2)


def test_a_png_is_read_back_as_written_and_leaves_no_other_file(tmp_path: Path) -> None:
    picture = grid(torch.rand(4, 3, 8, 8), 2)
    save_png(tmp_path / "new" / "a.png", picture)
    save_png(tmp_path / "new" / "a.png", picture)  # replaces
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), picture)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_picture_that_cannot_be_written_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(image: Image.Image, file: IO[bytes], **options: object) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    picture = grid(torch.rand(1, 1, 8, 8), 1)
    (tmp_path / "a.png").write_bytes(b"old")
    (tmp_path / "a.gif").write_bytes(b"old")
    with pytest.raises(OSError, match="No space"):
        save_png(tmp_path / "a.png", picture)
    with pytest.raises(OSError, match="No space"):
        save_gif(tmp_path / "a.gif", [picture], 80)
    assert {file.read_bytes() for file in tmp_path.iterdir()} == {b"old"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.gif", "a.png"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gif_has_its_frames(channels: int, tmp_path: Path) -> None:
    frames = [grid(torch.full((1, channels, 8, 8), level / 255), 1, pad=0) for level in (10, 77, 200)]
    save_gif(tmp_path / "a.gif", frames, 120)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.info["duration"], image.info["loop"]) == (3, 120, 0)  # type: ignore[attr-defined]
        for index, frame in enumerate(frames):
            image.seek(index)
            assert np.array_equal(np.asarray(image.convert("RGB")), frame)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_any_mode_is_read(mode: str, channels: int, tmp_path: Path) -> None:
    # A white left half and a dark right half, in every mode.
    half = np.full((6, 10), 0 if mode == "1" else 51, np.uint8)
    half[:, :5] = 255
    if mode in ("I", "I;16"):
        image = Image.fromarray(half.astype(np.uint16) * 257)
        image = image.convert("I") if mode == "I" else image
    elif mode == "F":
        image = Image.fromarray(half.astype(np.float32) / 255)
    else:
        image = Image.fromarray(half).convert("RGB").convert(mode)
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr", "F", "I") else "a.png")
    image.save(path)
    loaded = load_image(path, (channels, 6, 10))
    assert loaded.shape == (channels, 6, 10)
    assert loaded.dtype == torch.float32
    assert loaded.is_contiguous()
    torch.testing.assert_close(loaded, torch.from_numpy(half / 255).float().expand(channels, -1, -1), atol=0.02, rtol=0)


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", (1, 4, 4))
    assert loaded[0, :2].eq(0).all()
    assert loaded[0, 2:].eq(1).all()


def test_the_middle_is_kept_and_the_shorter_side_fits(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30), np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels.T.copy()).save(tmp_path / "tall.png")
    for name in ("wide.png", "tall.png"):
        for side in (5, 10, 20):
            assert load_image(tmp_path / name, (3, side, side)).min() > 0.7  # scaling mixes neighbors


def test_an_image_of_the_right_size_is_untouched(tmp_path: Path) -> None:
    picture = grid(torch.rand(1, 3, 64, 64), 1, pad=0)
    save_png(tmp_path / "a.png", picture)
    loaded = load_image(tmp_path / "a.png", (3, 64, 64))
    assert np.array_equal(to_uint8(loaded).permute(1, 2, 0).numpy(), picture)


HUGE = b"qoif" + (60_000).to_bytes(4, "big") * 2 + b"\x03\x00"
SHORT = b"qoif" + (4).to_bytes(4, "big") * 2 + b"\x03\x00"


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n broken", HUGE, SHORT, "cut", "folder"])
def test_a_file_that_is_not_an_image_is_named(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    if content == "folder":
        path.mkdir()
    elif content == "cut":
        save_png(path, grid(torch.rand(4, 3, 64, 64), 2))
        path.write_bytes(path.read_bytes()[:1000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"picture\.png' cannot be read as an image"):
        load_image(path, (3, 8, 8))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file '.*picture\.png'"):
        load_image(tmp_path / "picture.png", (3, 8, 8))


def test_a_photograph_is_rotated_upright(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8), np.uint8)
    pixels[:, :4] = 255
    tags = Image.Exif()
    tags[0x0112] = 6  # the camera was held sideways: left is up
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=tags)
    loaded = load_image(tmp_path / "a.png", (1, 8, 4))
    assert loaded[0, :4].eq(1).all()
    assert loaded[0, 4:].eq(0).all()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_fast_png_has_the_same_pixels(channels: int, mode: str) -> None:
    picture = grid(torch.rand(6, channels, 5, 4, generator=torch.Generator().manual_seed(0)), columns=3)
    with Image.open(BytesIO(fast_png(picture))) as image:
        assert image.mode == mode
        assert (np.array(image.convert("RGB")) == picture).all()
