"""The plan's activations against what DeepSpeed's ranks keep between the forward and the backward pass."""

from __future__ import annotations

import gc
import importlib
from typing import Any

import pytest
import torch

import opened
import ranked
from bifrost.recipes import load_recipe
from bifrost.trainer.planner import parts, plan, workload

# Every parameter is gathered and freed, as in a large model.
SETTINGS = ["precision=bf16", "global_batch=2", "micro_batch=1", "zero.persistence_threshold=0"]
STAGE_1 = [*SETTINGS, "backbone.placement=sharded", "data.image_size=336"]
STAGE_2 = [*SETTINGS, "flux.image_size=96", "data.image_size=168"]
SHARDED = "flux.placement={transformer: sharded, vae: sharded, text: sharded, vision_encoder: sharded}"
FLOW = "branch={head: flow, flow_head: {layers: 2, draws: 2}}"
TEXT = 20


def inputs(stage: Any, size: int) -> dict[str, Any]:
    """One sample of random inputs, `size` pixels wide for the vision encoder."""
    images = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    if hasattr(stage, "folder"):
        folder, (channels, height, width) = stage.folder, stage.latents
        normal, draws = torch.randn(1, channels, height, width), stage.flux.draws
        lengths = folder.tokenizers.t5_length
        return {
            "images": images,
            "posterior": torch.randn(draws, channels, height, width),
            "noise": torch.randn(draws, height * width // 4, 4 * channels),
            "level": torch.zeros(draws),
            "normalizer": 1.0,
            "mean": normal,
            "std": normal,
            "text": torch.randn(1, lengths, folder.t5.d_model),
            "pooled": torch.randn(1, folder.clip.hidden_size),
        }
    mask = torch.ones(stage.branch.draws, stage.tokens_per_image, dtype=torch.bool)
    noise = {"noise": torch.ones(1, 2, dtype=torch.int64)} if stage.branch.head == "flow" else {}
    return {
        **noise,
        "images": images,
        "input_ids": torch.arange(TEXT),
        "text_lengths": (TEXT,),
        "mask": mask,
        "masked": mask.flatten().nonzero()[:, 0],
        "normalizer": 1.0,
    }


def kept(recipe_name: str, overrides: list[str]) -> tuple[int, bool]:
    """Bytes that this rank keeps for the backward pass of a micro-batch, and whether that pass gives every trained
    parameter a finite gradient; runs in a process of its own."""
    from bifrost.trainer.distributed.process_group import join
    from bifrost.trainer.models.kernel_selection import KernelChoice
    from bifrost.trainer.optim.engine import Engine, import_deepspeed, partitioned
    from bifrost.trainer.stages import open_stage

    def alive() -> dict[int, int]:
        gc.collect()
        found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}

    importlib.import_module("bifrost.kernels.dense_attention").MOST_KEYS = 0  # the fused kernel, as on a GPU
    ranks = join()
    import_deepspeed(ranks.device)
    recipe = load_recipe(recipe_name, overrides)
    stage: Any = open_stage(recipe, for_counting=True)
    if not hasattr(stage, "folder"):
        stage.kernels = KernelChoice("in-place")  # a fused head, as on a GPU
    config = opened.deepspeed(recipe, ranks.size)
    with partitioned(config, ranks.device):
        model: Any = stage.build(recipe.activation_checkpointing)
    model.backbone.restore_rotary()
    if hasattr(model, "controlnet"):
        if model.recomputed:
            model.flux.transformer.enable_gradient_checkpointing()
            if hasattr(model.controlnet, "enable_gradient_checkpointing"):
                model.controlnet.enable_gradient_checkpointing()
    else:
        model.branch.restore_rotary()
    for parameter in model.parameters():
        parameter.ds_tensor.normal_(std=0.1)
    engine = Engine(model, recipe.optimizer, config, ranks)
    batch = inputs(stage, recipe.data.image_size)
    engine.backward(engine.forward(batch).loss)  # allocates what stays for the whole run
    engine.after_pass()
    before = alive()
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in {p.untyped_storage().data_ptr() for p in model.parameters()}:
            saved[storage.data_ptr()] = tensor  # kept alive, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = engine.forward(batch)
    after = {**alive(), **{at: tensor.untyped_storage().nbytes() for at, tensor in saved.items()}}
    gathered = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved.clear()
    engine.backward(losses.loss)
    finite = bool(torch.isfinite(engine.grad_norm()))
    return sum(size for at, size in after.items() if at not in before and at not in gathered), finite


@pytest.mark.multi
@pytest.mark.parametrize("recomputed", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tiny-mllm", STAGE_1),
        ("tiny-mllm", [*STAGE_1, FLOW]),
        ("tiny-mllm", [*STAGE_1, FLOW, "branch.weights=lora"]),
        ("tiny-mllm", [*STAGE_1, "branch.weights=lora"]),
        ("tiny-mllm", [*STAGE_1, "branch.weights=lora", "branch.lora.targets=[v_proj, o_proj, down_proj]"]),
        ("tiny-mllm", [*STAGE_1, "branch.weights=lora", "branch.lora.targets=[o_proj, gate_proj]"]),
        ("tiny-mllm", [*STAGE_1, "branch.layers=3"]),
        ("tiny-controlnet", [*STAGE_2, SHARDED]),
        ("tiny-controlnet", [*STAGE_2, SHARDED, "flux.draws=2"]),
        ("tiny-controlnet", [*STAGE_2, SHARDED, "controlnet.weights=lora", "flux.draws=2"]),
        ("tiny-controlnet", [*STAGE_2, SHARDED, "controlnet.weights=lora", "controlnet.lora.targets=[mlp]"]),
        ("tiny-controlnet", [*STAGE_2, SHARDED, "controlnet.bridge=queries"]),
        ("tiny-controlnet", [*STAGE_2, SHARDED, "controlnet.bridge=cross_attention", "flux.draws=2"]),
    ],
    ids=[
        "tiny-mllm",
        "flow",
        "flow-pairs",
        "pairs",
        "no-pair-on-mlp-input",
        "no-pair-on-attention-input",
        "fewer-layers",
        "tiny-controlnet",
        "tiny-controlnet-draws",
        "tiny-controlnet-pairs-draws",
        "tiny-controlnet-mlp-pairs",
        "queries",
        "cross-attention-draws",
    ],
)
def test_activations_are_what_deepspeeds_ranks_keep(name: str, settings: list[str], recomputed: bool) -> None:
    overrides = [*settings, f"activation_checkpointing={str(recomputed).lower()}"]
    overrides += ["branch.draws=2"] if name == "tiny-mllm" and recomputed else []
    recipe = load_recipe(name, overrides)
    planned = plan(parts(recipe, TEXT, TEXT), workload(recipe), 2).memory.per_pass["activations"]
    ended = ranked.run(kept, 2, name, overrides)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    for rank in ended:
        found, finite = rank.value
        assert finite
        print(name, recomputed, found, planned, found / planned)
        assert planned == pytest.approx(found, rel=0.05)
