"""FLOPs against torch's own counter on real passes, kept activations against what autograd saves."""

import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import editing_pairs
import plain
from bifrost.kernels import PrefixLayout
from bifrost.recipes import load_recipe
from bifrost.recipes.branch import PROJECTIONS, Lora
from bifrost.trainer.models.backbone import FrozenBackbone, Prefix, read_config
from bifrost.trainer.models.branch import GenerationBranch
from bifrost.trainer.models.flow_head import FlowHead
from bifrost.trainer.models.flux_transformer import FluxTransformer
from bifrost.trainer.models.hub import locate
from bifrost.trainer.models.layers import BranchLayer
from bifrost.trainer.models.low_rank import share
from bifrost.trainer.planner import open_model, parts, parts_of, shapes
from bifrost.trainer.planner.flops import BRANCH_KEPT, head_part, low_rank_kept
from bifrost.trainer.planner.flux_flops import FLUX_KEPT


def counted(work: Callable[[], Any]) -> tuple[int, Any]:
    """FLOPs of matrix products and convolutions alone: attention goes by another name on every device."""
    with FlopCounterMode(display=False) as counter:
        result = work()
    flops = counter.get_flop_counts()["Global"]
    return sum(n for operator, n in flops.items() if str(operator).split(".")[1] in KINDS), result


KINDS = ("mm", "addmm", "convolution", "_convolution", "convolution_backward")


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("tiny-mllm", "branch.draws=1"),
        ("tiny-mllm", "branch.draws=3"),
        ("tiny-mllm", "branch={head: flow, flow_head: {layers: 2, width: 96, draws: 3}}"),
        ("tiny-mllm", "branch.layers=3"),
        ("tiny-mllm", "branch.weights=lora"),
        ("tiny-controlnet", "flux.draws=1"),
        ("tiny-controlnet", "flux.draws=3"),
        ("tiny-controlnet", "controlnet.weights=lora"),
        ("tiny-controlnet", "controlnet={double: 1, single: 1, weights: lora, lora: {targets: [attention, mlp]}}"),
    ],
)
def test_linear_flops_are_torchs_own(name: str, setting: str, shards) -> None:
    small = ["precision=fp32", "global_batch=4", "micro_batch=4", "data.workers=0", "data.shuffle_window=2"]
    recipe = load_recipe(name, [*small, setting, f"data.shards={shards}/train-*.tar"])
    inputs, model = plain.loaded(recipe)
    batch = {**next(iter(plain.batches(recipe, inputs))).arrays, "normalizer": 1.0}
    text = sum(batch["text_lengths"]) / 4 if "text_lengths" in batch else 0
    planned = parts(recipe, text)
    forward, losses = counted(lambda: model(**batch))
    # One product of FLUX's transposed latents goes by the name of attention's.
    assert forward == pytest.approx(4 * sum(part.linear for part in planned), rel=2e-3)
    backward, _ = counted(losses.loss.backward)
    wanted = 4 * sum(part.backward - part.backward_attention for part in planned)
    # Inputs of a trained part's first layers need no gradient; in so small a ControlNet these are much of it.
    assert backward == pytest.approx(wanted, rel=1e-3 if name == "tiny-mllm" else 0.15)


def test_linear_flops_of_editing_pairs_are_torchs_own(shards: Path, tmp_path: Path) -> None:
    """In half of the samples: the vision encoder has a second image, the prompt its latents."""
    small = ["precision=fp32", "global_batch=4", "micro_batch=4", "data.workers=0", "data.shuffle_window=2"]
    edits, images = editing_pairs.save(tmp_path), f"{shards}/train-*.tar"
    listed = f"{{name: e, shards: {edits}, weight: 1, task: editing}}, {{name: g, shards: '{images}', weight: 1}}"
    recipe = load_recipe("tiny-mllm", [*small, "data.shards=null", f"data.sources=[{listed}]"])
    inputs, model = plain.loaded(recipe)
    batch = {**next(iter(plain.batches(recipe, inputs))).arrays, "normalizer": 1.0}
    assert len(batch["sources"]) == 2
    planned = parts(recipe, (sum(batch["text_lengths"]) - 2 * 16) / 4)
    forward, losses = counted(lambda: model(**batch))
    assert forward == pytest.approx(4 * sum(part.linear for part in planned), rel=2e-3)
    backward, _ = counted(losses.loss.backward)
    assert backward == pytest.approx(4 * sum(part.backward - part.backward_attention for part in planned), rel=1e-3)
    alone = parts_of(replace(open_model(recipe), edited=1.0), "fp32", 40)  # pyright: ignore[reportCallIssue]
    kept = [[part.kept for part in some] for some in (planned, alone)]
    assert kept[0] == kept[1], "memory is that of pairs"


@pytest.fixture
def fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's fused attention, as on a GPU, whatever the number of keys."""
    monkeypatch.setattr(importlib.import_module("bifrost.kernels.dense_attention"), "MOST_KEYS", 0)


def kept(work: Callable[[], Any], own: Iterable[Tensor]) -> int:
    """Bytes that autograd saves, those of the tensors `own` left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    assert result is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.usefixtures("fused_attention")
def test_a_branch_layer_keeps_what_is_planned() -> None:
    config = read_config(locate("builtin:tiny")).text_config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 256, 1353, 2
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 64
    config.rope_parameters["mrope_section"] = [8, 12, 12]
    patches = 144
    branch = GenerationBranch(config, 12, "learned", False).bfloat16()
    for parameter in branch.parameters():
        nn.init.normal_(parameter, std=0.02)
    layers = list(branch.layers)
    layout = PrefixLayout.of((10,), patches, torch.device("cpu"))
    text = tuple(torch.randn(10, 2, 64).bfloat16() for _ in layers)
    latents, mask = torch.randn(1, patches, 256).bfloat16(), torch.ones(1, patches, dtype=torch.bool)

    def bytes_of(count: int) -> int:
        branch.layers = nn.ModuleList(layers[:count])
        return kept(lambda: branch(latents, mask, Prefix(text, text, layout)), [*branch.parameters(), *text, latents])

    hidden, mlp, keys = BRANCH_KEPT
    planned = 2 * (patches * (hidden * 256 + mlp * 1353) + keys * (patches + 10) * 128)
    assert bytes_of(2) - bytes_of(1) == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("width", "layers", "draws"), [(None, 2, 3), (96, 1, 2), (320, 4, 1)])
def test_a_flow_head_keeps_what_is_planned(width: int | None, layers: int, draws: int, recomputed: bool) -> None:
    flow = {"layers": layers, "width": width, "draws": draws}
    branch = load_recipe("tiny-mllm", [f"branch={json.dumps({'head': 'flow', 'flow_head': flow})}"]).branch
    head, rows = FlowHead(256, branch.flow_head, recomputed).bfloat16(), 400
    hidden, target = torch.randn(2, rows, 256).bfloat16().unbind()
    hidden = hidden.clone().requires_grad_()
    states, tokens = torch.randint(2**62, (rows, 2)), torch.arange(rows)
    found = kept(lambda: head.loss(hidden, target, 1.0, states, tokens), [*head.parameters(), *head.buffers()])
    part = head_part(list(shapes.head(256, branch)), branch, 256, rows, 2)
    assert found == pytest.approx(part.kept_recomputed if recomputed else part.kept, rel=0.05)


@pytest.mark.usefixtures("fused_attention")
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("targets", [PROJECTIONS, ("v_proj", "down_proj"), ("gate_proj", "q_proj"), ("o_proj",)])
def test_a_layer_with_pairs_keeps_what_is_planned(targets: tuple[Any, ...], recomputed: bool) -> None:
    config = read_config(locate("builtin:tiny")).text_config
    lora, patches, width, mlp = Lora(rank=8, targets=list(targets)), 144, 192, config.intermediate_size
    head = width // config.num_attention_heads
    keys = config.num_key_value_heads * head
    source = FrozenBackbone(read_config(locate("builtin:tiny")), vision=False, differentiable=True).bfloat16()
    layer: Any = BranchLayer(config, 0, lora).bfloat16()
    share([layer], [source.text.layers[0]])
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    text = (torch.randn(10, config.num_key_value_heads, head).bfloat16(),)
    prefix = Prefix(text, text, PrefixLayout.of((10,), patches, torch.device("cpu")))
    hidden = torch.randn(1, patches, width).bfloat16().requires_grad_()
    own = [*layer.parameters(), *source.parameters(), *text]
    found = kept(lambda: layer(hidden, prefix, None, "sdpa", recomputed), own)
    inner, inners, key, pairs = low_rank_kept(lora)[recomputed]
    planned = 2 * (patches * (inner * width + inners * mlp + pairs) + key * keys * (patches + 10))
    assert found == pytest.approx(planned, rel=0.02)


@pytest.mark.usefixtures("fused_attention")
@pytest.mark.parametrize("gradient", ["through", "trained"])
def test_a_flux_block_keeps_what_is_planned(gradient: str) -> None:
    def bytes_of(double: int, single: int) -> int:
        flux = FluxTransformer.build(
            {
                "patch_size": 1,
                "in_channels": 16,
                "num_layers": double,
                "num_single_layers": single,
                "attention_head_dim": 64,
                "num_attention_heads": 4,
                "joint_attention_dim": 32,
                "pooled_projection_dim": 16,
                "guidance_embeds": True,
                "axes_dims_rope": (16, 24, 24),
            }
        ).bfloat16()
        flux.requires_grad_(gradient == "trained")
        image = torch.randn(1, 64, 16).bfloat16().requires_grad_()
        inputs = {
            "hidden_states": image,
            "encoder_hidden_states": torch.randn(1, 32, 32).bfloat16(),
            "pooled_projections": torch.randn(1, 16).bfloat16(),
            "timestep": torch.tensor([0.5]),
            "guidance": torch.tensor([3.5]),
            "img_ids": torch.zeros(64, 3),
            "txt_ids": torch.zeros(32, 3),
        }
        return kept(lambda: flux(**inputs, return_dict=False)[0], [*flux.parameters(), image])

    unit = 2 * 96 * 256
    double, single = (14, 11) if gradient == "trained" else FLUX_KEPT
    assert (bytes_of(3, 1) - bytes_of(2, 1)) / unit == pytest.approx(double, rel=0.05)
    assert (bytes_of(2, 3) - bytes_of(2, 2)) / unit == pytest.approx(single, rel=0.05)
