"""Weights in 8 bits: as near as 8 bits allow, computed with like the weights that they stand for, read as stored."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import tiny_flux
from bifrost.recipes import RecipeError, load_recipe
from bifrost.trainer.errors import RunError
from bifrost.trainer.models.eight_bit_source import EightBitSource
from bifrost.trainer.models.eight_bits import STORED, EightBits, dequantized, eight_bit_linears, quantized, scales
from bifrost.trainer.models.flux import FluxFolder
from bifrost.trainer.models.flux_transformer import FluxTransformer
from bifrost.trainer.models.linear import use_own_linear
from bifrost.trainer.models.weights import WeightFiles

KINDS: list[EightBits] = ["int8", "fp8"]
FIXTURES = Path(__file__).parents[2] / "fixtures" / "quantized"
WEIGHT = "visual.blocks.0.attn.qkv.weight"


def bits(scale: torch.Tensor) -> torch.Tensor:
    return scale.contiguous().view(torch.int32)


def in_eight_bits(model: nn.Module, weights: dict[str, torch.Tensor], kind: EightBits) -> dict[str, torch.Tensor]:
    """Set a model's parameters to `weights`, some in 8 bits; returns the weights that these stand for."""
    state, meant = dict(weights), dict(weights)
    for scale, weight in scales(model).items():
        values, factors = quantized(weights[weight], kind)
        state[weight], state[scale] = values, bits(factors)
        plain = values.double() if kind == "int8" else values.view(torch.float8_e4m3fn).double()
        meant[weight] = (plain * factors.double()[:, None]).float()
    model.load_state_dict(state)
    return meant


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.5 / 127), ("fp8", 2.0**-4)])
def test_rows_are_as_near_as_8_bits_allow(kind: EightBits, limit: float) -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 6)[:, None]
    weight[4] = 0
    weight[5] *= 1e-44  # subnormal: nothing overflows
    values, scale = quantized(weight, kind)
    found = dequantized(values, bits(scale), torch.float32)
    assert values.element_size() == 1 and scale.shape == (6,)
    assert not found[4].any() and found.isfinite().all() and (found[5].abs() < 1e-38).all()
    weight, found = weight[:4], found[:4]
    largest = weight.abs().amax(1, keepdim=True)
    # int8: half a step of the row. fp8: three bits of mantissa, down to a thousandth of the row's largest value.
    allowed = largest if kind == "int8" else weight.abs().maximum(largest / 1000)
    assert ((found - weight).abs() <= allowed * limit * 1.001).all()
    torch.testing.assert_close(found.abs().amax(1), largest[:, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_the_dequantized_weight_and_keeps_none(kind: EightBits, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with eight_bit_linears(kind):
        layer = nn.Sequential(nn.Linear(24, 32)).to(dtype)
    use_own_linear(layer)
    bias = torch.randn(32, dtype=dtype)
    meant = in_eight_bits(layer, {"0.weight": torch.randn(32, 24), "0.bias": bias}, kind)["0.weight"].to(dtype)
    dtypes = {name: parameter.dtype for name, parameter in layer.named_parameters()}
    assert dtypes == {"0.scale": torch.int32, "0.weight": STORED[kind], "0.bias": dtype}
    x = torch.randn(2, 5, 24, dtype=dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        found = layer.requires_grad_(False)(ours)
    wanted = F.linear(theirs.flatten(0, 1), meant, bias).unflatten(0, (2, 5))
    assert not saved and torch.equal(found, wanted)
    slope = torch.randn_like(found)
    found.backward(slope)
    wanted.backward(slope)
    assert ours.grad is not None and torch.equal(ours.grad, theirs.grad)
    with torch.no_grad():
        assert torch.equal(layer(x), wanted)


CONFIG: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 8,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


@pytest.mark.parametrize("recomputed", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_flux_equals_one_with_the_dequantized_weights(kind: EightBits, recomputed: bool) -> None:
    torch.manual_seed(0)
    plain, ours = FluxTransformer.build(CONFIG), FluxTransformer.build(CONFIG, kind)
    meant = in_eight_bits(ours, plain.state_dict(), kind)
    plain.load_state_dict(meant)
    found = []
    for model in (ours, plain):
        model.requires_grad_(False)
        if recomputed:
            model.enable_gradient_checkpointing()
        torch.manual_seed(1)
        residuals = [torch.randn(1, 16, 32, requires_grad=True) for _ in range(3)]
        (out,) = model(
            torch.randn(1, 16, 16),
            torch.randn(1, 7, 12),
            torch.randn(1, 8),
            torch.tensor([0.3]),
            torch.tensor([3.5]),
            torch.zeros(16, 3),
            torch.zeros(7, 3),
            residuals[:2],
            residuals[2:],
        )
        out.square().sum().backward()
        found.append([out, *(x.grad for x in residuals)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_only_the_linear_layers_of_the_blocks_are_in_8_bits() -> None:
    with torch.device("meta"):
        ours, plain = FluxTransformer.build(CONFIG, "int8"), FluxTransformer.build(CONFIG)
    assert ours.config.num_layers == 2 and ours.config.num_single_layers == 2
    eight = {name for name, p in ours.named_parameters() if p.dtype == torch.int8}
    layers = {f"{n}.weight" for n, m in plain.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks" in n}
    assert eight == layers == set(scales(ours).values())
    assert set(plain.state_dict()) == set(ours.state_dict()) - scales(ours).keys()
    assert all(p.dtype == torch.int32 for n, p in ours.named_parameters() if n in scales(ours))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.save(tiny_flux.pipeline(), tmp_path_factory.mktemp("flux"))


@pytest.mark.parametrize("kind", KINDS)
def test_values_depend_on_no_rank(flux: Path, kind: EightBits) -> None:
    folder = FluxFolder.open(flux, kind)
    model = folder.build("transformer").requires_grad_(False)
    folder.fill("transformer", model)
    parameters, files = dict(model.named_parameters()), folder.files("transformer")
    source = EightBitSource(files, kind, scales(model))
    for name, parameter in parameters.items():
        assert source.shape(name) == parameter.shape
        if name in scales(model):
            largest = files.full(scales(model)[name]).double().abs().amax(1) / {"int8": 127, "fp8": 448}[kind]
            torch.testing.assert_close(parameter.view(torch.float32).double(), largest, rtol=1e-6, atol=0)
        elif name not in scales(model).values():
            assert torch.equal(parameter, files.full(name))
        for ranks in (3, 100):
            count = parameter.numel()
            size = -(-count // ranks)
            parts = [source.flat(name, min(r * size, count), min((r + 1) * size, count)) for r in range(ranks)]
            assert torch.equal(torch.cat(parts), parameter.flatten()), name


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.tensor([[1.0, 2.0], [float("inf"), 0.0]])}, tmp_path / "model.safetensors")
    source = EightBitSource(WeightFiles(tmp_path), "int8", {"a.scale": "a.weight"})
    assert source.flat("a.weight", 0, 2).tolist() == [64, 127]
    with pytest.raises(RunError, match=r"a\.weight has values that are not finite"):
        source.flat("a.scale", 0, 2)


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [(f.name, "fp8" if f.name.startswith("compressed") else "int8") for f in sorted(FIXTURES.iterdir())],
)
def test_a_quantized_release_is_held_as_stored(scheme: str, kind: EightBits, caplog: pytest.LogCaptureFixture) -> None:
    files, name = WeightFiles(FIXTURES / scheme), WEIGHT
    source = EightBitSource(files, kind, {"scale": name})
    rows, width = files.shape(name) or ()
    values, scale = source.flat(name, 0, rows * width).view(rows, width), source.flat("scale", 0, rows)
    stored = [t for n, t in load_file(FIXTURES / scheme / "model.safetensors").items() if t.shape == (rows, width)]
    assert any(torch.equal(values.view(t.dtype), t) for t in stored if t.element_size() == 1)
    expected = load_file(FIXTURES / scheme / "expected.safetensors")[name]
    found = dequantized(values, scale, torch.bfloat16)
    # bitsandbytes multiplies by the scale and by 1/127 one after the other: a rounding more than one product.
    assert (found != expected).float().mean() < (1e-2 if "bitsandbytes" in scheme else 1e-9)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    assert not caplog.records
    other: EightBits = "fp8" if kind == "int8" else "int8"
    again = EightBitSource(files, other, {"scale": name})
    with caplog.at_level(logging.WARNING):
        values, scale = again.flat(name, 0, rows * width).view(rows, width), again.flat("scale", 0, rows)
        again.flat(name, 0, width)
    assert len(caplog.records) == 1 and f"quantized again, to {other}" in caplog.text
    error = (dequantized(values, scale, torch.float32) - expected.float()).norm() / expected.float().norm()
    assert 0 < error < (0.05 if other == "fp8" else 0.02)


def test_zero_points_are_not_lost(tmp_path: Path) -> None:
    (scheme,) = [folder for folder in FIXTURES.iterdir() if "torchao" in folder.name]
    shutil.copytree(scheme, tmp_path / "copy")
    tensors = load_file(scheme / "model.safetensors")
    (name,) = [n for n in tensors if n.startswith("visual.blocks.0.attn.qkv") and n.endswith("_zero_point")]
    tensors[name] = torch.full_like(tensors[name], 9)
    with safe_open(scheme / "model.safetensors", "pt") as file:
        save_file(tensors, tmp_path / "copy" / "model.safetensors", file.metadata())
    files = WeightFiles(tmp_path / "copy")
    source, wanted = EightBitSource(files, "int8", {"scale": WEIGHT}), files.full(WEIGHT).float()
    count, rows = wanted.numel(), len(wanted)
    found = dequantized(source.flat(WEIGHT, 0, count).view_as(wanted), source.flat("scale", 0, rows), torch.float32)
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_a_recipe_of_another_kind_is_refused() -> None:
    load_recipe("tiny-mllm", ["backbone.weights=int8", "zero.quantized_weights=true"])  # replicated there
    load_recipe("tiny-controlnet", ["flux.weights=fp8"])
    for name, settings, words in (
        ("tiny-controlnet", ["backbone.weights=int8"], "the vision encoder alone, which is never quantized"),
        ("mllm-7b", ["backbone.weights=int8", "zero.quantized_weights=true"], "backbone.weights are in 8 bits already"),
        ("flux-controlnet", ["flux.weights=fp8", "zero.quantized_weights=true"], "flux.weights are in 8 bits already"),
        ("tiny-controlnet", ["flux.weights=int4"], "flux.weights"),
    ):
        with pytest.raises(RecipeError, match=words) as error:
            load_recipe(name, settings)
        assert "\n" not in str(error.value)
