"""The frozen vision encoder and text model: Qwen's patches, cost linear in the batch, exact prefix."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLForConditionalGeneration

import opened
import ranked
from bifrost.kernels import PrefixLayout
from bifrost.kernels import attention as attention_module
from bifrost.trainer.errors import RunError
from bifrost.trainer.models.backbone import FrozenBackbone, pixel_patches, read_config
from bifrost.trainer.models.hub import locate
from bifrost.trainer.models.weights import WeightFiles, backbone_names, fill
from bifrost.trainer.stages.unsharded import build_unsharded


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
    pil_images = [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())) for image in batch]
    wanted = Qwen2VLImageProcessorPil(do_resize=False)(pil_images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_patches(batch, 14, 2, 2), wanted, atol=1e-6, rtol=0)


def test_latents_equal_transformers_vision_encoder(
    backbone: FrozenBackbone, vanilla: Qwen2_5_VLForConditionalGeneration
) -> None:
    batch = images(3)
    patches = pixel_patches(batch, 14, 2, 2)
    with torch.no_grad():
        wanted = vanilla.model.visual(patches, grid_thw=torch.tensor([[1, 8, 8]] * 3)).pooler_output
    torch.testing.assert_close(backbone.patch_latents(batch).flatten(0, 1), wanted, atol=1e-5, rtol=0)


def test_the_patch_embedding_is_a_matrix_product(
    backbone: FrozenBackbone, vanilla: Qwen2_5_VLForConditionalGeneration
) -> None:
    """Same numbers and same name and shape of the weight, but without cuDNN."""
    called: set[str] = set()

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), settings=None):
            called.add(str(operator).split(".")[1])
            return operator(*arguments, **(settings or {}))

    wanted, ours = vanilla.model.visual.patch_embed, backbone.vision.patch_embed
    patches = pixel_patches(images(2), 14, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(ours(patches), wanted(patches), atol=1e-5, rtol=1e-5)
    with Called():
        backbone.patch_latents(images(2))
    assert not {name for name in called if "conv" in name}
    assert "mm" in called
    assert isinstance(ours.proj, torch.nn.Conv3d), "counted as one by flops.py"
    (name, weight), (theirs, like) = *ours.named_parameters(), *wanted.named_parameters()
    assert (name, weight.shape) == (theirs, like.shape)


def test_the_vision_encoder_is_linear_in_the_batch(backbone: FrozenBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention scores per batch: B times those of one image, in one call per layer."""
    calls: list[int] = []
    attention = attention_module.F.scaled_dot_product_attention

    def counted(query, key, value, **settings):
        calls.append(query.shape[:-1].numel() * key.shape[-2])
        return attention(query, key, value, **settings)

    monkeypatch.setattr(attention_module.F, "scaled_dot_product_attention", counted)
    backbone.patch_latents(images(1))
    one = list(calls)
    calls.clear()
    backbone.patch_latents(images(6))
    assert len(one) == len(calls) == len(backbone.vision.blocks)
    assert calls == [6 * scores for scores in one]


def test_prefix_is_what_the_vanilla_model_caches(
    backbone: FrozenBackbone, vanilla: Qwen2_5_VLForConditionalGeneration
) -> None:
    ids = torch.arange(10, 26)[None]
    prefix = backbone.prefix(ids[0], PrefixLayout.of([16], 16))
    with torch.no_grad():
        cache = vanilla(input_ids=ids, use_cache=True).past_key_values
    for layer, key, value in zip(cache.layers, prefix.keys, prefix.values, strict=True):
        torch.testing.assert_close(key, layer.keys[0].transpose(0, 1), atol=1e-5, rtol=0)
        torch.testing.assert_close(value, layer.values[0].transpose(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_prompts_are_the_padded_ones_without_their_padding(
    backbone: FrozenBackbone, vanilla: Qwen2_5_VLForConditionalGeneration, side: str
) -> None:
    lengths = [12, 1, 5]
    ids, real = torch.zeros(3, 12, dtype=torch.int64), torch.zeros(3, 12, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(12 - length, None) if side == "left" else slice(length)
        ids[row, place] = torch.arange(10 + row, 10 + row + length)
        real[row, place] = True
    positions = (real.long().cumsum(1) - 1).clamp_min(0).expand(3, -1, -1)
    with torch.no_grad():
        wanted = vanilla.model.language_model(
            input_ids=ids, attention_mask=real.long(), position_ids=positions, use_cache=True
        )
    hidden, cache = backbone.read(ids[real], PrefixLayout.of(lengths, 16))
    torch.testing.assert_close(hidden, wanted.last_hidden_state[real], atol=1e-5, rtol=0)
    for layer, theirs in zip(cache.layers, wanted.past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.keys[0], theirs.keys.transpose(0, 1)[:, real], atol=1e-5, rtol=0)


def test_packed_prompts_are_independent(backbone: FrozenBackbone) -> None:
    ids, layout = torch.arange(10, 34), PrefixLayout.of([4, 9, 11], 16)
    others = ids.clone()
    others[:4], others[13:] = 99, 98
    for one, two in zip(backbone.prefix(ids, layout).keys, backbone.prefix(others, layout).keys, strict=True):
        assert torch.equal(one[4:13], two[4:13])
        assert not torch.equal(one[:4], two[:4])


def rotary_tables_under_zero_init() -> list[float]:
    """Largest error of the rotary frequencies of a bf16 model built under zero.Init, and whether weights are bf16."""
    from bifrost.recipes import load_recipe
    from bifrost.trainer.distributed.process_group import join
    from bifrost.trainer.optim.engine import partitioned
    from bifrost.trainer.stages.patch_latent_model import PatchLatentModel

    config = read_config(locate("builtin:tiny"))
    recipe = load_recipe("tiny-mllm")
    plain = PatchLatentModel(config, recipe.branch, recipe.data.image_size)
    with partitioned(opened.deepspeed(recipe, (ranks := join()).size), ranks.device):
        model = PatchLatentModel(config, recipe.branch, recipe.data.image_size)
    model.restore_rotary()
    tables = dict(plain.named_buffers())
    worst = max((buffer.double() - tables[name].double()).abs().max() for name, buffer in model.named_buffers())
    return [worst.item(), float(all(p.dtype == torch.bfloat16 for p in model.parameters()))]


def test_rotary_frequencies_stay_fp32_in_a_bf16_model() -> None:
    """zero.Init creates every tensor in bf16; frequencies rounded to it would be off by radians at far positions."""
    (rank,) = ranked.run(rotary_tables_under_zero_init, 1)
    assert rank.value == [0.0, 1.0], rank.err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stated", ["bfloat16", "float32", None])
def test_a_replicated_backbone_has_the_runs_precision(dtype: torch.dtype, stated: str | None) -> None:
    """Whatever dtype its config gives for the stored weights: all published configs give bfloat16 for every part."""
    config = read_config(locate("builtin:tiny"))
    config.dtype = config.text_config.dtype = config.vision_config.dtype = stated and getattr(torch, stated)
    like = torch.nn.Parameter(torch.empty(1, dtype=dtype))
    made = build_unsharded(partial(FrozenBackbone, config), "replicated", like)
    assert {parameter.dtype for parameter in made.parameters()} == {dtype}
    made.restore_rotary()
    made.load(WeightFiles(locate("builtin:tiny")))
    assert made.patch_latents(images(1)).dtype == dtype
    layout = PrefixLayout.of((3,), 4)
    assert {part.dtype for part in made.prefix(torch.tensor([7, 8, 9]), layout).keys} == {dtype}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "{", r"config\.json: is not JSON"),
        ("config.json", "[]", r"config\.json: not a JSON object"),
        ("config.json", '{"model_type": "qwen3_vl"}', "model_type is qwen3_vl"),
        ("config.json", '{"model_type": "qwen2_5_vl", "text_config": 3}', "not a valid Qwen2.5-VL config"),
        ("preprocessor_config.json", '{"image_mean": [0.5, 0.5, 0.5]}', r"image_mean is \[0\.5, 0\.5, 0\.5\]"),
        ("processor_config.json", '{"image_processor": {"image_std": [1, 1, 1]}}', r"image_std is \[1, 1, 1\]"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line(tmp_path, name: str, content: str, words: str) -> None:
    (tmp_path / "config.json").write_bytes((locate("builtin:tiny") / "config.json").read_bytes())
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.48145466, 0.4578275, 0.40821073]}')
    read_config(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(RunError, match=words):
        read_config(tmp_path)
