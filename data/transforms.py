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
    largest = max(sizes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit stands in for Pillow's bomb warning
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are above the limit of {MAX_PIXELS}")
            # JPEG alone: let the decoder drop octaves, but keep twice the target so that the resize still filters.
            image.draft(None, (2 * largest, 2 * largest))
            image.load()
            image = _rgb(_centre_square(ImageOps.exif_transpose(image)))
    except ValueError:
        raise
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise ValueError(f"image does not decode: {error}") from None
    return [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for size in sizes]


def _centre_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _rgb(image: Image.Image) -> Image.Image:
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
