"""Images of other shapes than squares: their grids, and the models on them, against transformers and diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from bifrost.recipes.data import Buckets, Data
from bifrost.trainer.errors import RunError
from bifrost.trainer.models import flux as flow
from bifrost.trainer.models.backbone import FrozenBackbone, pixel_patches, read_config
from bifrost.trainer.models.hub import locate
from bifrost.trainer.models.image_grids import (
    ImageGrid,
    bucket_grids,
    every_grid,
    largest,
    latent_buckets,
    square_grid,
)
from bifrost.trainer.models.resampler import DownsamplingBlock, UpsamplingBlock, on_grid
from bifrost.trainer.models.weights import WeightFiles

SQUARE = square_grid(16, 32)


def test_grids_of_the_usual_ratios() -> None:
    """448 px for the vision encoder, 512 for FLUX: patches of 28 px, tokens of 16."""
    ratios = ["1x1", "4x3", "3:4", "16x9", "2x1"]
    (found,) = bucket_grids(Buckets(ratios=ratios), 448, SQUARE)
    assert [grid.latents for grid in found] == [(16, 16), (14, 18), (18, 14), (12, 21), (11, 23)]
    assert [grid.tokens for grid in found] == [(2 * rows, 2 * columns) for rows, columns in (g.latents for g in found)]
    assert every_grid(Buckets(ratios=ratios), 448, SQUARE) == tuple(found)
    assert every_grid(None, 448, SQUARE) == (SQUARE,)


def test_stage_1_has_the_same_patches_and_one_image_of_each_shape() -> None:
    data = Data(shards="none.tar", buckets=Buckets(ratios=["1x1", "4x3", "16x9"], areas=[448, 336]))
    grids, rule = latent_buckets(data, 16)
    assert grids == ((16, 16), (14, 18), (12, 21), (12, 12), (10, 14), (9, 16))
    assert rule is not None
    assert [bucket.shapes for bucket in rule.buckets] == [((28 * rows, 28 * columns),) for rows, columns in grids]
    assert latent_buckets(Data(shards="none.tar"), 16) == (((16, 16),), None)


def test_areas_are_ordered_from_the_largest() -> None:
    large, small = bucket_grids(Buckets(ratios=["1x1", "3x2"], areas=[224, 448]), 448, SQUARE)
    assert [grid.latents for grid in large] == [(16, 16), (13, 20)]
    assert [grid.latents for grid in small] == [(8, 8), (7, 10)]
    assert largest([*large, *small]) == 1, "13 x 20 are more than 16 x 16"


def test_a_coarser_grid_of_tokens_divides() -> None:
    (found,) = bucket_grids(Buckets(ratios=["3x2"]), 448, square_grid(16, 8))
    assert found == [ImageGrid((14, 20), (7, 10))]


def test_refusals() -> None:
    with pytest.raises(RunError, match="areas: 300 is not a multiple of 28 pixels; set 308"):
        bucket_grids(Buckets(ratios=["1x1"], areas=[300]), 448, SQUARE)
    with pytest.raises(RunError, match="4x3 of 112 px and 3x2 of 112 px are the same shape, 5 x 3 cells of 28 px"):
        bucket_grids(Buckets(ratios=["4x3", "3x2"]), 112, square_grid(4, 8))


def images(height: int, width: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=draw)


def test_pixel_patches_equal_qwens_processor() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    batch = images(56, 84)
    pil_images = [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())) for image in batch]
    found = Qwen2VLImageProcessorPil(do_resize=False)(pil_images, return_tensors="pt")
    assert found["image_grid_thw"].tolist() == [[1, 4, 6]] * 2
    torch.testing.assert_close(pixel_patches(batch, 14, 2, 2), found["pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(84, 140), (140, 84), (112, 168), (336, 588)])
def test_latents_equal_transformers_vision_encoder(height: int, width: int) -> None:
    """Also where windows at the edges are smaller than the others."""
    folder = locate("builtin:tiny")
    backbone = FrozenBackbone(read_config(folder), text=False)
    backbone.load(WeightFiles(folder))
    vanilla = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).model.visual
    batch = images(height, width)
    grid = torch.tensor([[1, height // 14, width // 14]] * 2)
    with torch.no_grad():
        wanted = vanilla(pixel_patches(batch, 14, 2, 2), grid_thw=grid).pooler_output
    torch.testing.assert_close(backbone.patch_latents(batch).flatten(0, 1), wanted, atol=1e-5, rtol=0)


def test_tokens_and_positions_equal_diffusers() -> None:
    latents = torch.randn(2, 4, 6, 10)
    packed = FluxPipeline._pack_latents(latents, 2, 4, 6, 10)
    assert torch.equal(flow.pack(latents), packed)
    assert torch.equal(flow.unpack(packed, 6, 10), latents)
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(flow.image_ids(6, 10), ids)


@pytest.mark.parametrize("block", [UpsamplingBlock, DownsamplingBlock])
def test_a_block_reads_the_grid_by_rows(block: type) -> None:
    made = block(8, "group")
    image = torch.randn(2, 8, 4, 6)
    wanted = made(image).flatten(2).transpose(1, 2)
    assert torch.equal(on_grid(made, image.flatten(2).transpose(1, 2), columns=6), wanted)
