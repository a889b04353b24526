"""Which bucket an image is in, and how it is cropped, resized and replaced there."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bifrost.data import DataError, ReadableSamples, open_dataset, write_shard
from bifrost.data.bucket_rule import LEFT_OUT, Bucket, BucketRule
from bifrost.data.buckets import open_buckets
from bifrost.data.transforms import decode_shapes
from old_index import as_version_1

SQUARE, WIDE, TALL, SMALL = (Bucket((shape,)) for shape in [(32, 32), (24, 40), (40, 24), (16, 16)])
RULE = BucketRule(((SQUARE, WIDE, TALL), (SMALL,)), max_upscale=1.5)


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=20))
@settings(deadline=None)
def test_an_image_is_in_the_nearest_bucket_that_it_is_large_enough_for(sizes):
    for (width, height), found in zip(sizes, RULE.assign(np.array(sizes)), strict=True):
        distances = [
            abs(math.log(width / height) - math.log(bucket.largest[1] / bucket.largest[0])) for bucket in RULE.areas[0]
        ]
        near = [number for number, each in enumerate(distances) if each < min(distances) + 1e-9]
        for number in near:
            high, wide = RULE.buckets[number].largest
            if max(high / height, wide / width) <= 1.5:
                assert found in near
                break
        else:
            assert found == (3 if max(16 / height, 16 / width) <= 1.5 else LEFT_OUT)


def test_sizes_that_are_unknown_or_extreme():
    assert RULE.assign(np.array([[0, 0], [1 << 27, 1], [1 << 17, 1 << 10]])).tolist() == [LEFT_OUT, LEFT_OUT, 1]


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((100, 60), (0, 0, 100, 60)),
        ((120, 60), (10, 0, 110, 60)),
        ((50, 90), (0, 30, 50, 60)),
        ((20, 12), (0, 0, 20, 12)),
    ],
)
def test_crop_and_resize_match_pillow(size, box):
    """The centre with the bucket's ratio of 5 : 3, in both sizes."""
    image = smooth(*size)
    for found, (height, width) in zip(
        decode_shapes(encode(image), [(24, 40), (48, 80)]), [(24, 40), (48, 80)], strict=True
    ):
        expected = np.asarray(image.crop(box).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_turned_jpeg_is_decoded_as_large_as_needed():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = smooth(1200, 600)
    (found,) = decode_shapes(encode(image, "JPEG", exif=exif, quality=95), [(400, 200)])
    expected = np.asarray(image.rotate(-90, expand=True).resize((200, 400), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(found.astype(int) - expected).mean() < 2


@pytest.fixture
def mixed_shapes(make_image, tmp_path):
    """Ten images in each of two shards, wide, tall and square in turn; number 4 is truncated, 7 is tiny."""
    for shard in range(2):
        samples = []
        for number in range(10):
            size = [(50, 30), (30, 50), (32, 32)][number % 3]
            image = make_image(10 * shard + number, size=(5, 5) if number == 7 else size)
            image = image[: len(image) // 2] if number == 4 else image
            samples.append((f"k{shard}{number}", {"png": image, "txt": b"a caption"}))
        write_shard(tmp_path / f"s-{shard}.tar", samples)
    return open_dataset(str(tmp_path))


def test_buckets_of_a_dataset(mixed_shapes):
    buckets = open_buckets(mixed_shapes, RULE)
    one = [1, 2, 0, 1, 2, 0, 1, LEFT_OUT, 0, 1]
    assert buckets.of.tolist() == 2 * one
    assert buckets.of.dtype == np.uint8
    assert buckets.counts.tolist() == [[3, 3], [4, 4], [2, 2], [0, 0]]
    assert (buckets.left_out, buckets.unknown) == (2, 0)
    assert buckets.members(1, 1).tolist() == [0, 3, 6, 9]
    assert [buckets.number(1, sample) for sample in range(10)] == one


def test_an_unreadable_sample_is_replaced_from_its_bucket(mixed_shapes):
    buckets = open_buckets(mixed_shapes, RULE)
    replaced: list[tuple[str, str]] = []
    item = ReadableSamples(mixed_shapes, (32,), buckets).read(0, 0, 4, 4, replaced)
    assert (item.key, item.bucket, item.image.shape) == ("k01", 2, (40, 24, 3))
    assert [key for key, _ in replaced] == ["k04"]


def test_refusals(mixed_shapes, tmp_path):
    with pytest.raises(DataError, match=r"no image is large enough for a bucket.*max_upscale"):
        open_buckets(mixed_shapes, BucketRule(((Bucket(((320, 320),)),),), 2.0))
    as_version_1(tmp_path / "s-1.tar")
    with pytest.raises(DataError, match=f"s-1.tar: its index has no sizes of images.*data index {tmp_path}`"):
        open_buckets(open_dataset(str(tmp_path)), RULE)
