"""Decoding of images and captions. An unusable sample raises ValueError with the reason."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .bucket_rule import Shape

PNG = b"\x89PNG\r\n\x1a\n"
OTHER_FILES = {
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"\0\0\0\x0cjP": "a JPEG 2000",
    b"%PDF": "a PDF",
    b"<": "HTML, SVG or XML",
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip file",
    b"version https://git-lfs": "a Git LFS pointer: fetch the files with `git lfs pull`",
}
"""First bytes of files that are often found under an image's name -> description."""
MAX_PIXELS = 1 << 27
"""Largest image that is decoded: 134 million pixels, 11585 x 11585."""

PNG_ORIENTATIONS = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
"""Marks of the parts of a PNG that may contain an orientation."""
SIDES_SWAPPED = 5
"""Orientations in EXIF from here on swap width and height."""


def decode_image(data: bytes, size: int) -> np.ndarray:
    """The image's centre square as uint8 RGB [size, size, 3].

    Reads JPEG, PNG and WebP of any mode; applies the EXIF orientation, composites transparency on white, scales 16-bit
    grey to 8 bits. Raises ValueError with the reason for anything that does not decode completely or exceeds
    `MAX_PIXELS`.
    """
    return decode_sizes(data, (size,))[0]


def decode_sizes(data: bytes, sizes: Sequence[int]) -> list[np.ndarray]:
    """`decode_image` at each of `sizes`, decoding once."""
    return decode_shapes(data, [(size, size) for size in sizes])


def decode_shapes(data: bytes, shapes: Sequence[Shape]) -> list[np.ndarray]:
    """The image's centre as uint8 RGB [height, width, 3] in each of `shapes`, which have one ratio: as much of the
    image as has this ratio, resized. Raises ValueError like `decode_image`."""
    centre = _centre(data, max(shapes))
    return [_in_shape(centre, shape) for shape in shapes]


def in_shape(image: Image.Image, shape: Shape) -> np.ndarray:
    """An image that is opened already as `decode_shapes` returns that of a file, but from all of its pixels: a large
    JPEG is not decoded smaller. Raises ValueError for one that has no pixels, or none of a known range."""
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode, {image.mode}, does not say which value is white; convert it to RGB")
    if 0 in image.size:
        raise ValueError("it has no pixels")
    try:
        copied = image.copy()  # decodes what is not decoded yet
    except Exception as error:  # as of a damaged file
        raise ValueError(f"image does not decode: {error}") from None
    return _in_shape(_upright(copied, shape), shape)


def centre_square(data: bytes, least: int) -> np.ndarray:
    """The image's centre square as uint8 RGB [side, side, 3] at its stored size; a JPEG may be decoded smaller, down to
    a side of `least` pixels. Raises ValueError like `decode_image`."""
    return _centre(data, (least, least))


def _centre(data: bytes, least: Shape) -> np.ndarray:
    """As much of the image's centre as has the ratio of `least`; a JPEG may be decoded smaller, down to `least`."""
    if not data:
        raise ValueError("empty file (0 bytes)")
    try:
        return _decoded(data, least)
    except _TooLarge:
        raise
    except Exception as error:  # damaged files make Pillow raise almost anything
        if data.startswith(PNG) and (plain := _without_text(data)) != data:
            return _centre(plain, least)
        if not isinstance(error, UnidentifiedImageError):
            raise ValueError(f"image does not decode: {error}") from None
        image_kind(data)  # Pillow's own message is the repr of the file object
        raise ValueError("image does not decode: its header is damaged") from None


def image_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in pixels of the image as `decode_image` decodes it, from its header alone; None for one that is
    not decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _opened(data)
        # Pillow decodes a whole PNG to search for an orientation behind its pixels.
        search = image.format != "PNG" or any(mark in data for mark in PNG_ORIENTATIONS)
    except Exception:
        plain = _without_text(data) if data.startswith(PNG) else data
        return None if plain == data else image_size(plain)
    turned = False
    with suppress(Exception):
        turned = search and image.getexif().get(ExifTags.Base.Orientation, 1) >= SIDES_SWAPPED
    width, height = image.size
    return (height, width) if turned else (width, height)


class _TooLarge(ValueError):
    pass


def _opened(data: bytes) -> Image.Image:
    """The image, of which only the header is read yet."""
    image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    if image.width * image.height > MAX_PIXELS:
        raise _TooLarge(f"{image.width} x {image.height} pixels are above the limit of {MAX_PIXELS}")
    return image


def _decoded(data: bytes, least: Shape) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MAX_PIXELS replaces Pillow's decompression bomb warning
        image = _opened(data)
        # JPEG only: the decoder skips frequencies that are absent at 1/2, 1/4 or 1/8 of the size.
        image.draft(None, (max(least), max(least)))  # the orientation may swap width and height
        image.load()
        if image.format in ("JPEG", "MPO") and not _ends(data):
            raise ValueError("its end marker is missing (incomplete download?)")
        return _upright(image, least)


def _upright(image: Image.Image, ratio: Shape) -> np.ndarray:
    """As much of the image's centre as has the ratio, uint8 RGB [H, W, 3], of an image that is turned in place as its
    EXIF states."""
    with suppress(Exception):  # invalid EXIF loses the rotation, not the image
        ImageOps.exif_transpose(image, in_place=True)
    return np.asarray(_rgb(_cropped(image, *ratio)))


def _ends(jpeg: bytes) -> bool:
    """Whether an end marker follows a JPEG's last scan. Otherwise zeros in place of the rest would decode to grey."""
    start_of_scan, end_of_image = b"\xff\xda", b"\xff\xd9"
    return jpeg.endswith(end_of_image) or jpeg.rfind(end_of_image) > jpeg.rfind(start_of_scan)


def _kind(data: bytes) -> str:
    """Description of bytes that are not a supported image, by their first bytes."""
    if data[4:8] == b"ftyp":
        return f"an {data[8:12].decode('ascii', 'replace').strip().upper()} file"
    return next((name for start, name in OTHER_FILES.items() if data.startswith(start)), "of an unknown format")


def _without_text(png: bytes) -> bytes:
    """A PNG without text and colour profile: Pillow refuses an image with damaged metadata or more than 1 MB of it.

    Chunks: PNG specification (third edition), section 5.3. Returned unchanged when the chunks are inconsistent.
    """
    parts, at = [PNG], len(PNG)
    while at + 12 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            parts.append(png[at:end])
        at = end
    return b"".join([*parts, png[at:]])


def resized(square: np.ndarray, size: int) -> np.ndarray:
    """A square image resized to uint8 [size, size, 3]; see `decode_image`."""
    return _in_shape(square, (size, size))


def _in_shape(image: np.ndarray, shape: Shape) -> np.ndarray:
    """An image resized to uint8 [height, width, 3], bicubic with Pillow's filter; channels-first in memory.

    Torch computes it in integers: bitwise equal on every processor, within rounding of Pillow, and several times faster
    with AVX2.
    """
    import torch  # not needed to open a dataset
    from torch.nn.functional import interpolate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pixels are read-only
        channels = torch.from_numpy(image).permute(2, 0, 1)[None]
    if image.shape[:2] != shape:
        channels = interpolate(channels, size=shape, mode="bicubic", antialias=True)
    return channels[0].contiguous().numpy().transpose(1, 2, 0)


def image_kind(data: bytes) -> str:
    """Extension of an image by its first bytes; raises ValueError for an unsupported format."""
    if data.startswith(PNG):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    raise ValueError(f"image does not decode: it is {_kind(data)}, not a JPEG, PNG or WebP")


def _cropped(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest centre of the image with the ratio of `height` and `width`, to whole pixels."""
    tall, wide = image.height, image.width
    if tall * width > wide * height:
        tall = max(1, (2 * wide * height + width) // (2 * width))
    else:
        wide = max(1, (2 * tall * width + height) // (2 * height))
    if (wide, tall) == image.size:
        return image
    left, top = (image.width - wide) // 2, (image.height - tall) // 2
    return image.crop((left, top, left + wide, top + tall))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.float64) / 257 + 0.5).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    opacity, colours = image.getchannel("A"), image.convert("RGB")
    if opacity.getextrema() == (255, 255):
        return colours
    white = Image.new("RGB", image.size, "white")
    white.paste(colours, mask=opacity)  # the pixels of `Image.alpha_composite`, in half the time
    return white


def clean_caption(caption: bytes | str) -> str:
    """The caption without NULs and with single spaces. Raises ValueError when it is empty or not UTF-8."""
    try:
        text = caption.decode("utf-8-sig") if isinstance(caption, bytes) else caption
        text.encode("utf-8")  # a str may contain lone surrogates, which tokenizers refuse
    except UnicodeError:
        raise ValueError("caption is not UTF-8") from None
    text = " ".join(text.replace("\0", "").split())
    if not text:
        raise ValueError("caption is empty")
    return text
