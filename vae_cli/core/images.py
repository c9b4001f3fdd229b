"""Images and pictures: convert tensors to grids, PNG and GIF files, and image files to tensors.

An image is a float tensor (C, H, W) with values in [0, 1]. A picture, made for viewing, is a uint8 array (H, W, 3).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from vae_cli.core.errors import UserError
from vae_cli.core.files import open_regular, replace_file
from vae_cli.core.white import find_whites, is_deep, values_of

if TYPE_CHECKING:  # numpy, Pillow and torch are imported by the functions that need them: commands start faster
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    Picture: TypeAlias = NDArray[np.uint8]  # (H, W, 3)

BACKGROUND = 255
SEPARATOR = 214  # a gray that is visible between white images and between black ones
INK = 70
SMALLEST = 8  # size of a font, in pixels, below which text cannot be read
# What Pillow raises for a file that it cannot read, in addition to DecompressionBombError.
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, OverflowError, MemoryError, NotImplementedError),
    *(struct.error, zlib.error),
)
SAVE_AS_8_BIT = "Save it with 8 bits per channel."
MAX_PIXELS = 89_000_000  # of one picture: Pillow warns when it opens a larger one


def to_uint8(images: Tensor) -> Tensor:
    """Convert image tensors of any shape to uint8, mapping values in [0, 1] to 0 to 255.

    Values outside [0, 1] are clamped, NaN and infinity become 0.

    >>> import torch
    >>> to_uint8(torch.tensor([-1.0, 0.5, 1.0, float("nan")]))
    tensor([  0, 128, 255,   0], dtype=torch.uint8)
    """
    return images.detach().float().nan_to_num(0.0, 0.0, 0.0).clamp(0, 1).mul(255).round().byte()


class Heading(NamedTuple):
    """A text above one or more columns of a picture."""

    text: str
    columns: int = 1


def grid(
    images: Tensor,
    columns: int,
    side: int = 64,
    pad: int = 6,
    row_labels: Sequence[str] | None = None,
    headings: Sequence[Heading] | None = None,
) -> Picture:
    """Return images (N, C, H, W) with values in [0, 1] as one uint8 picture (H', W', 3), filled row by row.

    C is 1 or 3. Small images are enlarged by an integer factor, without smoothing, so that their longer side is about
    `side` pixels. `pad` pixels separate them. `row_labels` are written to the left of the rows, one per row, and
    `headings` above the columns, from left to right. The place of an image that is NaN stays empty.
    Raises UserError for a picture of more than MAX_PIXELS pixels.

    >>> import torch
    >>> grid(torch.rand(6, 1, 8, 8), columns=3).shape  # two rows of three images, enlarged to 64 pixels
    (146, 216, 3)
    """
    import numpy as np

    count, channels, _, _ = images.shape
    if channels not in (1, 3):
        raise ValueError(f"a picture has 1 or 3 channels, not {channels}")
    if count == 0 or columns < 1:
        raise ValueError(f"a grid needs an image and a column, not {count} and {columns}")
    factor = max(1, round(side / max(images.shape[2:])))
    height, width = images.shape[2] * factor, images.shape[3] * factor
    columns = min(columns, count)
    rows = -(-count // columns)
    margin = _label_width(row_labels, height) if row_labels else 0
    if (pixels := rows * (height + pad) * (margin + columns * (width + pad))) > MAX_PIXELS:
        raise UserError(
            f"A picture of {rows} rows of {columns} images would have {pixels / 1e6:,.0f} million pixels, more than "
            f"the {MAX_PIXELS / 1e6:,.0f} million allowed; ask for fewer images."
        )

    picture = np.full((rows * (height + pad) + pad, margin + columns * (width + pad) + pad, 3), BACKGROUND, np.uint8)
    _paste(picture, images, factor, columns, margin, pad)
    picture = _draw_labels(picture, row_labels, height, pad) if row_labels else picture
    return _draw_headings(picture, headings, margin + pad, width + pad) if headings else picture


def _paste(picture: Picture, images: Tensor, factor: int, columns: int, margin: int, pad: int) -> None:
    """Enlarge images by a factor, and put each into its place in a picture, except those that are NaN."""
    is_empty = images.isnan().flatten(1).all(1).tolist()
    cells = to_uint8(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    cells = cells.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = cells.shape[1:3]
    for index, cell in enumerate(cells):
        if is_empty[index]:
            continue
        top = pad + (index // columns) * (height + pad)
        left = margin + pad + (index % columns) * (width + pad)
        # Each image draws its own frame, so that empty places stay background.
        picture[top - pad : top + height + pad, left - pad : left + width + pad] = SEPARATOR
        picture[top : top + height, left : left + width] = cell


def _font_size(height: int) -> int:
    return min(18, max(11, height // 5))


def _label_width(labels: Sequence[str], height: int) -> int:
    from PIL import ImageFont

    size = _font_size(height)
    return round(max(ImageFont.load_default(size).getlength(label) for label in labels)) + size


def _draw_labels(picture: Picture, labels: Sequence[str], height: int, pad: int) -> Picture:
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    size = _font_size(height)
    font = ImageFont.load_default(size)
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    right = _label_width(labels, height) - size // 2
    for row, label in enumerate(labels):
        middle = pad + row * (height + pad) + height / 2
        draw.text((right, middle), label, fill=(INK, INK, INK), font=font, anchor="rm")
    return np.array(canvas)


def _draw_headings(picture: Picture, headings: Sequence[Heading], left: int, width: int) -> Picture:
    """Return the picture with the headings above its columns, whose width is given in pixels. A heading that is wider
    than its columns gets a smaller font."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    size = _font_size(width)
    strip = Image.new("RGB", (picture.shape[1], round(1.7 * size)), (BACKGROUND, BACKGROUND, BACKGROUND))
    draw = ImageDraw.Draw(strip)
    for text, columns in headings:
        room, own = columns * width - 4, size
        while own > SMALLEST and ImageFont.load_default(own).getlength(text) > room:
            own -= 1
        middle = (left + (columns * width) / 2, strip.height / 2)
        draw.text(middle, text, fill=(INK, INK, INK), font=ImageFont.load_default(own), anchor="mm")
        left += columns * width
    return np.concatenate([np.array(strip), picture])


def save_png(path: Path, picture: Picture) -> None:
    """Write a picture (H, W, 3) as a PNG file (see replace_file); its folder is created if missing."""
    from PIL import Image

    image = Image.fromarray(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: image.save(file, format="PNG"))


def fast_png(picture: Picture) -> bytes:
    """Encode a picture (H, W, 3) as PNG with fast compression, using a single channel if it is gray."""
    from PIL import Image

    is_gray = bool((picture == picture[..., :1]).all())
    file = BytesIO()
    Image.fromarray(picture[..., 0] if is_gray else picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def save_gif(path: Path, frames: Sequence[Picture], milliseconds: int) -> None:
    """Write one or more pictures (H, W, 3) as an endlessly looping GIF; each is shown for `milliseconds`."""
    from PIL import Image

    # In mode L, gray pictures keep all 256 shades; a color palette would have fewer.
    grey = all((frame == frame[..., :1]).all() for frame in frames)
    images = [Image.fromarray(frame).convert("L" if grey else "RGB") for frame in frames]
    options: dict[str, Any] = {"save_all": True, "append_images": images[1:], "duration": milliseconds, "loop": 0}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: images[0].save(file, format="GIF", **options))


def load_image(path: Path, shape: tuple[int, int, int], white: float | None = None) -> Tensor:
    """Return an image file as a float tensor of this shape (C, H, W) with values in [0, 1]; C is 1 or 3.

    It is center-cropped to the aspect ratio of `shape`, then resized; transparent pixels become white. For `white` see
    to_pixels. Raises UserError if the file is missing or is not a readable image.
    """
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        with open_regular(path) as file, Image.open(file) as image:
            image.filename = str(path)  # for messages
            pixels = to_pixels(image, shape, white=white)
    except FileNotFoundError:
        raise UserError(f"There is no file '{path}'.") from None
    except UnidentifiedImageError:
        raise UserError(f"'{path}' cannot be read as an image.") from None
    except Image.DecompressionBombError:
        many = "it has too many pixels to be safe to open; make it smaller"
        raise UserError(f"'{path}' cannot be read as an image: {many}.") from None
    except UNREADABLE as error:
        raise UserError(f"'{path}' cannot be read as an image: {getattr(error, 'strerror', None) or error}.") from error
    return torch.from_numpy(pixels).contiguous().to(torch.float32) / 255


def center_box(height: int, width: int, shape: tuple[int, int, int], crop: int | None) -> tuple[int, int, int, int]:
    """Return the top, left, height and width of the center crop of an image of this height and width.

    It is the centered square of `crop` pixels a side or, if crop is None, the largest centered part with the aspect
    ratio of `shape` (C, H, W). Raises UserError if the crop is larger than the image.

    >>> center_box(10, 30, (1, 28, 28), None), center_box(10, 30, (1, 28, 28), 4)
    ((0, 10, 10, 10), (3, 13, 4, 4))
    """
    if crop is not None and crop > min(height, width):
        raise UserError(
            f"dataset.crop={crop} is larger than an image of {height} by {width} pixels. "
            f"Give {min(height, width)} or less, or null."
        )
    part_height = crop or max(1, min(height, round(width * shape[1] / shape[2])))
    part_width = crop or max(1, min(width, round(height * shape[2] / shape[1])))
    return (height - part_height) // 2, (width - part_width) // 2, part_height, part_width


def to_pixels(
    image: Image.Image,
    shape: tuple[int, int, int],
    crop: int | None = None,
    background: str = "white",
    white: float | None = None,
) -> NDArray[np.uint8]:
    """Convert a Pillow image of any mode and size to a uint8 array of this shape (C, H, W); C is 1 or 3.

    It is rotated according to its EXIF data, composited onto the background if it has transparency, center-cropped
    (see center_box) and resized with anti-aliasing. `white` is the value of white in an image with more than 8 bits per
    channel; if it is None, it is determined from the values. Raises UserError if they do not determine it.
    """
    import numpy as np
    from PIL import Image as Pillow
    from PIL import ImageOps

    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    # A JPEG far larger than needed is decoded at reduced size, but still at least twice the target size.
    if crop is None:
        image.draft(None, (2 * width, 2 * height))
    name = str(getattr(image, "filename", "") or "The image")
    image = ImageOps.exif_transpose(image)
    if is_deep(image):  # convert would clip it at 255
        if white is None:
            (white,) = find_whites({name: values_of(image)}, SAVE_AS_8_BIT).values()
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).any():
            raise ValueError("none of its values is finite")
        gray = np.nan_to_num(values, nan=0.0)
        image = Pillow.fromarray(((gray / white).clip(0, 1) * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        paper = Pillow.new("RGBA", image.size, background)
        image = Pillow.alpha_composite(paper, image.convert("RGBA"))
    image = image.convert(mode)
    top, left, rows, columns = center_box(image.height, image.width, shape, crop)
    image = image.crop((left, top, left + columns, top + rows))
    # Pillow widens the filter by the reduction factor, so the result is anti-aliased.
    image = image.resize((width, height), Pillow.Resampling.BILINEAR)
    return np.array(image, dtype=np.uint8).reshape(height, width, channels).transpose(2, 0, 1)
