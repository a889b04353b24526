"""Steps of the engine on one of N pretended ranks, on the phantom GPU, against the plan: what it holds; and the host
reads one value per step."""

from __future__ import annotations

import pytest

from bifrost.recipes import load_recipe
from bifrost.trainer.phantom.check import count, engine_problems, held_row
from bifrost.trainer.planner import parts, workload

REPLICATED = "flux.placement={transformer: replicated, vae: replicated, text: replicated, vision_encoder: replicated}"
SHARDED = "flux.placement={transformer: sharded, vae: sharded, text: sharded, vision_encoder: sharded}"
OFFLOADED = "flux.placement={transformer: sharded, vae: offloaded, text: offloaded, vision_encoder: offloaded}"
CACHED = "flux.placement={transformer: sharded, vae: cached, text: cached, vision_encoder: cached}"
TRANSFORMER = "flux.placement.transformer=replicated"
LARGE = ("mllm-3b", "mllm-7b", "flux-controlnet")
SMALL_BUCKET = "zero.reduce_bucket=1000000"
"""The bucket would otherwise be nearly all that a tiny model holds."""
TINY_CASES = [
    ("tiny-mllm", 16, (SMALL_BUCKET, "backbone.placement=sharded", "zero.persistence_threshold=0", "zero.hpz=8")),
    ("tiny-controlnet", 8, (SMALL_BUCKET, OFFLOADED)),
    ("tiny-controlnet", 8, (SMALL_BUCKET, SHARDED, "zero.overlap_comm=true", "activation_checkpointing=true")),
    ("tiny-mllm", 8, (SMALL_BUCKET, "optimizer.name=lion")),
    ("tiny-controlnet", 8, (SMALL_BUCKET, "optimizer.name=muon")),
    ("tiny-mllm", 8, (SMALL_BUCKET, "optimizer.name=adamw-8bit")),
]
BACKBONE = "backbone.placement=replicated"
REAL_CASES = [
    *((name, 8, ()) for name in LARGE),
    *((f"{name}-256", 64, ()) for name in LARGE),
    ("mllm-3b", 8, (BACKBONE, "zero.overlap_comm=true")),
    ("mllm-3b", 8, (BACKBONE, "backbone.weights=int8")),
    ("mllm-7b", 8, (BACKBONE, "backbone.vision_encoder=cached", "activation_checkpointing=true")),
    *(("mllm-7b-lora", 8, (f"backbone.placement={place}",)) for place in ("replicated", "sharded")),
    ("flux-controlnet-lora", 8, ()),
    ("flux-controlnet", 8, ("zero.overlap_comm=true",)),
    ("flux-controlnet", 8, (REPLICATED, "activation_checkpointing=true")),
    ("flux-controlnet", 8, (OFFLOADED,)),
    ("flux-controlnet", 8, (TRANSFORMER, "flux.weights=int8")),
    # DeepSpeed makes a view for each parameter and rank: more ranks take too long.
    ("mllm-3b", 64, ("zero.overlap_comm=true",)),
    ("mllm-3b", 64, (BACKBONE, "zero.hpz=8")),
    ("mllm-7b", 64, ()),
    ("flux-controlnet", 64, ()),
    ("flux-controlnet", 64, (CACHED, "zero.hpz=8")),
    ("flux-controlnet", 64, (OFFLOADED, TRANSFORMER)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "settings"),
    [
        *TINY_CASES,
        *(pytest.param(*case, marks=pytest.mark.real_size) for case in REAL_CASES),
    ],
    ids=str,
)
def test_the_engine_holds_what_is_planned(name: str, ranks: int, settings: tuple[str, ...]) -> None:
    overrides = [f"global_batch={64 * 64}", *settings]
    recipe = load_recipe(name, overrides)
    text = 64 if name.startswith("tiny") else 80
    counts = count(name, overrides, text, ranks)
    row = held_row(parts(recipe, text), workload(recipe), ranks, counts)
    print(row.cells(), counts["peak"], counts["reads"])
    assert engine_problems(counts) == []
    assert row.agrees, row.cells()
