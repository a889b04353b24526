from __future__ import annotations

import hashlib
import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from bifrost.data import clean_caption, decode_image, open_dataset
from bifrost.data.photos import make_photos
from bifrost.data.transforms import centre_square, resized


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((np.stack([x, y, (x + y) / 2], -1) * 255).astype(np.uint8))


def near(pixels: np.ndarray, expected: np.ndarray) -> bool:
    """Equal up to the rounding of a resize."""
    return np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.square(one.astype(float) - other).mean())


def test_centre_crop_and_resize_match_pillow():
    image = smooth(90, 60)
    expected = np.asarray(image.crop((15, 0, 75, 60)).resize((32, 32), Image.Resampling.BICUBIC))
    assert near(decode_image(encode(image), 32), expected)
    tall = np.asarray(smooth(40, 80).crop((0, 20, 40, 60)).resize((32, 32), Image.Resampling.BICUBIC))
    assert near(decode_image(encode(smooth(40, 80)), 32), tall)
    assert np.array_equal(decode_image(encode(image), 60), np.asarray(image.crop((15, 0, 75, 60))))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_and_draft_mode_are_close(kind):
    image = smooth(2000, 1600)  # large enough that the JPEG decoder drops two octaves
    exact = image.crop((200, 0, 1800, 1600)).resize((64, 64), Image.Resampling.BICUBIC)
    got = decode_image(encode(image, kind, quality=95), 64)
    assert got.shape == (64, 64, 3)
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - np.asarray(exact).astype(int)).max() <= 4


@pytest.mark.parametrize("side", [900, 1024, 1800])
def test_jpeg_decoded_at_small_size_is_close_to_full_decode(tmp_path, side):
    shards = make_photos(tmp_path, 3, 1, (side, side))
    dataset = open_dataset(shards)
    for number in range(3):
        data = dataset.read(0, number).image
        whole = Image.open(io.BytesIO(data)).convert("RGB")
        part = side // 448  # of the size: the decoded square starts at a multiple of it
        left, top = ((-(-extent // part) - -(-side // part)) // 2 * part for extent in whole.size)
        square = whole.crop((left, top, left + side, top + side))
        exact = np.asarray(square.resize((448, 448), Image.Resampling.BICUBIC))
        got = decode_image(data, 448)
        assert len(centre_square(data, 448)) == -(-side // part)
        bilinear = np.asarray(square.resize((448, 448), Image.Resampling.BILINEAR))
        assert psnr(got, exact) > max(40, psnr(bilinear, exact) - 4)
        assert got.std() > 0.99 * exact.std(), "no detail is lost"


def test_resize_is_bitwise_equal_on_every_processor():
    """Torch without AVX and with other threads gives the same bytes: a run may resume on another machine."""
    code = """
import hashlib, numpy, torch
from bifrost.data.transforms import resized
torch.set_num_threads(3)
pixels = numpy.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=numpy.uint8)
sizes = 112, 299, 448
print(torch.backends.cpu.get_cpu_capability())
print(hashlib.sha256(b"".join(resized(pixels, size).tobytes() for size in sizes)).hexdigest())
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    capability, elsewhere = done.stdout.split()
    assert capability in ("DEFAULT", "NO"), capability
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    here = hashlib.sha256(b"".join(resized(pixels, size).tobytes() for size in (112, 299, 448)))
    assert here.hexdigest() == elsewhere


@pytest.mark.parametrize(
    ("image", "kind", "colour"),
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 128)), "PNG", (255, 127, 127)),
        (Image.new("LA", (8, 8), (0, 0)), "PNG", (255, 255, 255)),
        (Image.new("L", (8, 8), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (8, 8), 1), "PNG", (255, 255, 255)),
        (Image.fromarray(np.full((8, 8), 30000, np.uint16)), "PNG", (117, 117, 117)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        (Image.new("RGBA", (8, 8), (0, 0, 255, 255)), "WEBP", (0, 0, 255)),
    ],
)
def test_modes(image, kind, colour):
    pixels = decode_image(encode(image, kind), 4).astype(int)
    assert pixels.shape == (4, 4, 3)
    assert np.abs(pixels - colour).max() <= 2


def test_transparent_palette_is_composited_on_white():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert (decode_image(encode(image, transparency=0), 4) == 255).all()
    assert (decode_image(encode(image), 4) == 0).all()


def test_every_value_at_every_opacity_is_composited_on_white():
    value, opacity = np.meshgrid(np.arange(256), np.arange(256))
    expected = (2 * (value * opacity + 255 * (255 - opacity)) + 255) // 510  # the nearest integer, in integers
    for mode, channels in (("RGBA", 3), ("LA", 1)):
        pixels = np.stack([value] * channels + [opacity], -1).astype(np.uint8)
        found = decode_image(encode(Image.fromarray(pixels, mode)), 256)
        assert np.array_equal(found, np.stack([expected] * 3, -1))
    assert np.array_equal(expected[255], value[255]), "opaque values are kept"


def test_opaque_images_are_not_composited(monkeypatch):
    image = smooth(32, 32)
    expected = decode_image(encode(image), 32)
    image.putalpha(255)
    monkeypatch.setattr(Image.Image, "paste", lambda *_, **__: pytest.fail("composited"))
    assert np.array_equal(decode_image(encode(image), 32), expected)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (0, 0, 16, 8))  # black above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be displayed rotated clockwise by 90 degrees: black at the right
    pixels = decode_image(encode(image, "JPEG", exif=exif, quality=95), 16)
    assert pixels[:, :6].mean() > 240
    assert pixels[:, -6:].mean() < 15


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_images_are_refused(kind):
    data = encode(smooth(300, 300), kind)
    with pytest.raises(ValueError, match=r"truncated|does not decode"):
        decode_image(data[: len(data) * 2 // 3], 32)


def test_decompression_bomb_is_refused_before_decoding():
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    body = b"IDAT" + zlib.compress(b"")
    data += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    with pytest.raises(ValueError, match=r"limit|bomb"):
        decode_image(data, 32)
    large = encode(Image.new("1", (12000, 12000)))
    with pytest.raises(ValueError, match="12000 x 12000 pixels are above the limit"):
        decode_image(large, 32)


def test_empty_file_is_reported_as_empty():
    with pytest.raises(ValueError, match=r"^empty file \(0 bytes\)$"):
        decode_image(b"", 32)


@pytest.mark.parametrize("data", [b"not an image", b"GIF89a" + bytes(20)])
def test_other_formats_are_refused(data):
    with pytest.raises(ValueError, match="does not decode"):
        decode_image(data, 32)


def test_captions():
    assert clean_caption("  a\tred \n\x00 apple ") == "a red apple"
    assert clean_caption("\ufeffdéjà vu".encode()) == "déjà vu"
    for empty in ("", b" \n\x00 "):
        with pytest.raises(ValueError, match="empty"):
            clean_caption(empty)
    for wrong in (b"\xff\xfe", "\ud800"):
        with pytest.raises(ValueError, match="UTF-8"):
            clean_caption(wrong)
