"""Bytes to pixels, and bytes to a caption. A sample that cannot be used raises ValueError with the reason."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 1 << 27
"""Largest image that is decoded: 134 million pixels, 11585 px squared."""


def decode_image(data: bytes, size: int) -> np.ndarray:
    """The image's centre square as uint8 RGB [size, size, 3].

    JPEG, PNG and WebP of any mode; EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled
    to 8. Raises ValueError with the reason for anything that does not decode completely or is above `MAX_PIXELS`.
    """
    return decode_sizes(data, (size,))[0]


def decode_sizes(data: bytes, sizes: Sequence[int]) -> list[np.ndarray]:
    """`decode_image` at each of `sizes`, from one decoding."""
    square = centre_square(data, max(sizes))
    return [resized(square, size) for size in sizes]


def centre_square(data: bytes, least: int) -> np.ndarray:
    """The image's centre square in uint8 RGB [side, side, 3], as large as it is stored; a JPEG's may be smaller, down
    to `least` pixels a side. Raises ValueError like `decode_image`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit stands in for Pillow's bomb warning
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are above the limit of {MAX_PIXELS}")
            # JPEG alone: the decoder leaves out the frequencies that a half, a quarter or an eighth of the size lacks.
            image.draft(None, (least, least))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(_rgb(_cropped(image)))
    except ValueError:
        raise
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise ValueError(f"image does not decode: {error}") from None


def resized(square: np.ndarray, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of a square of any size, bicubic with Pillow's filter; kept channel by channel in memory.

    Torch computes it in integers: equal to the bit on every processor, within rounding of Pillow, and several times as
    fast where the processor has AVX2.
    """
    import torch  # here: who only opens a data set needs none
    from torch.nn.functional import interpolate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the pixels are read-only
        channels = torch.from_numpy(square).permute(2, 0, 1)[None]
    if len(square) != size:
        channels = interpolate(channels, size=(size, size), mode="bicubic", antialias=True)
    return channels[0].contiguous().numpy().transpose(1, 2, 0)


def _cropped(image: Image.Image) -> Image.Image:
    side = min(image.size)
    if image.width == image.height:
        return image
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.float64) / 257 + 0.5).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def clean_caption(caption: bytes | str) -> str:
    """The caption without NULs and with single spaces. ValueError when it is empty or not UTF-8."""
    try:
        text = caption.decode("utf-8-sig") if isinstance(caption, bytes) else caption
        text.encode("utf-8")  # a str can hold lone surrogates, which no tokenizer takes
    except UnicodeError:
        raise ValueError("caption is not UTF-8") from None
    text = " ".join(text.replace("\0", "").split())
    if not text:
        raise ValueError("caption is empty")
    return text
