"""The frozen tower and text model: patches as Qwen's processor makes them, cost linear in the batch, exact prefix."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

import ranked
from bifrost.trainer.models import backbone as module
from bifrost.trainer.models.backbone import FrozenBackbone, locate, pixel_patches, read_config, text_positions
from bifrost.trainer.models.weights import WeightFiles, backbone_names, fill


@pytest.fixture(scope="module")
def backbone() -> FrozenBackbone:
    folder = locate("builtin:tiny")
    model = FrozenBackbone(read_config(folder))
    files = WeightFiles(folder)
    for part in ("text", "vision"):
        parameters = dict(getattr(model, part).named_parameters())
        names = backbone_names(part, parameters, files)
        fill({names[name]: p for name, p in parameters.items()}, files, folder)
    return model


@pytest.fixture(scope="module")
def vanilla() -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(locate("builtin:tiny"), dtype=torch.float32)


def images(count: int, side: int = 112) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_pixel_patches_equal_qwens_processor() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    batch = images(2, 56)
    pictures = [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())) for image in batch]
    wanted = Qwen2VLImageProcessorPil(do_resize=False)(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_patches(batch, 14, 2, 2), wanted, atol=1e-6, rtol=0)


def test_latents_equal_transformers_own_tower(
    backbone: FrozenBackbone, vanilla: Qwen2_5_VLForConditionalGeneration
) -> None:
    batch = images(3)
    patches = pixel_patches(batch, 14, 2, 2)
    with torch.no_grad():
        wanted = vanilla.model.visual(patches, grid_thw=torch.tensor([[1, 8, 8]] * 3)).pooler_output
    torch.testing.assert_close(backbone.patch_latents(batch).flatten(0, 1), wanted, atol=1e-5, rtol=0)


def test_the_tower_is_linear_in_the_batch(backbone: FrozenBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores computed a batch: B times those of one image, in one call a layer."""
    calls: list[int] = []
    attention = module.F.scaled_dot_product_attention

    def counted(query, key, value, **settings):
        calls.append(query.shape[:-1].numel() * key.shape[-2])
        return attention(query, key, value, **settings)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", counted)
    backbone.patch_latents(images(1))
    one = list(calls)
    calls.clear()
    backbone.patch_latents(images(6))
    assert len(one) == len(calls) == len(backbone.vision.blocks)
    assert calls == [6 * scores for scores in one]


def test_ragged_segments_equal_one_by_one() -> None:
    lengths = [3, 5, 1]
    query, key, value = torch.randn(3, 1, 2, sum(lengths), 8, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, 3, 8, 9])
    out, _ = module.segment_attention(torch.nn.Module(), query, key, value, None, 0.3, ends, max(lengths))
    for begin, end in itertools.pairwise(ends.tolist()):
        scores = (query[..., begin:end, :] @ key[..., begin:end, :].transpose(-1, -2)) * 0.3
        wanted = scores.softmax(-1) @ value[..., begin:end, :]
        torch.testing.assert_close(out[:, begin:end], wanted.transpose(1, 2))


def test_prefix_is_what_the_vanilla_model_caches(
    backbone: FrozenBackbone, vanilla: Qwen2_5_VLForConditionalGeneration
) -> None:
    ids = torch.arange(10, 26)[None]
    prefix = backbone.prefix(ids, torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad():
        cache = vanilla(input_ids=ids, use_cache=True).past_key_values
    for layer, key, value in zip(cache.layers, prefix.keys, prefix.values, strict=True):
        torch.testing.assert_close(key, layer.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(value, layer.values, atol=1e-5, rtol=0)


def test_padding_does_not_change_real_tokens(backbone: FrozenBackbone) -> None:
    ids = torch.arange(10, 22)[None]
    real = torch.ones_like(ids, dtype=torch.bool)
    alone = backbone.prefix(ids, real)
    left = backbone.prefix(torch.nn.functional.pad(ids, (4, 0)), torch.nn.functional.pad(real, (4, 0)))
    right = backbone.prefix(torch.nn.functional.pad(ids, (0, 4)), torch.nn.functional.pad(real, (0, 4)))
    for key, a, b in zip(alone.keys, left.keys, right.keys, strict=True):
        torch.testing.assert_close(a[:, :, 4:], key, atol=1e-5, rtol=0)
        torch.testing.assert_close(b[:, :, :-4], key, atol=1e-5, rtol=0)
    assert text_positions(torch.tensor([[False, True, True]])).tolist() == [[1, 0, 1]]


def test_update_stores_nothing(backbone: FrozenBackbone) -> None:
    ids = torch.arange(10, 18)[None]
    prefix = backbone.prefix(ids, torch.ones_like(ids, dtype=torch.bool))
    key = torch.randn(1, 2, 3, 32)
    first, second = prefix.update(key, key, 0), prefix.update(key, key, 0)
    assert first[0].shape[2] == 8 + 3
    assert torch.equal(first[0], second[0])


def rotary_tables_under_zero_init() -> list[float]:
    """Largest error of the rotary frequencies of a bf16 model built under zero.Init, and whether weights are bf16."""
    from bifrost.recipes import load_recipe
    from bifrost.trainer.engine import partitioned
    from bifrost.trainer.ranks import join
    from bifrost.trainer.stages.patch_latents import PatchLatentModel

    config = read_config(locate("builtin:tiny"))
    recipe = load_recipe("tiny-mllm")
    plain = PatchLatentModel(config, recipe)
    with partitioned(recipe, join()):
        model = PatchLatentModel(config, recipe)
    model.restore_rotary()
    tables = dict(plain.named_buffers())
    worst = max((buffer.double() - tables[name].double()).abs().max() for name, buffer in model.named_buffers())
    return [worst.item(), float(all(p.dtype == torch.bfloat16 for p in model.parameters()))]


def test_rotary_frequencies_stay_fp32_in_a_bf16_model() -> None:
    """zero.Init creates every tensor in bf16; frequencies rounded to it would turn far positions by whole radians."""
    (rank,) = ranked.run(rotary_tables_under_zero_init, 1)
    assert rank.value == [0.0, 1.0], rank.err
