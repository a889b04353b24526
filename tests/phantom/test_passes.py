"""A pass of every shipped recipe on the phantom GPU, at its real size, against the plan: FLOPs, kept bytes, peak; and
the host waits nowhere."""

from __future__ import annotations

import re
from typing import Any

import pytest

import phantoms
from bifrost.recipes import load_recipe, shipped_recipes
from bifrost.trainer.models.image_grids import only_largest
from bifrost.trainer.phantom.check import pass_problems, pass_rows
from bifrost.trainer.planner import open_model, parts, workload

RECIPES = list(shipped_recipes())
RECOMPUTED = "activation_checkpointing=true"
STORED = "activation_checkpointing=false"
TEXT = {"tiny-mllm": 64}
"""Tokens of a prompt, if not 80."""
BUCKETS = "data.buckets={ratios: [1x1, 3x2, 2x1]}"
"""Of which 3x2 has the most patches at 448 px, and 2x1 at 112 px."""
STAGE_1 = {
    "int8": ["backbone.weights=int8", "backbone.placement=replicated"],
    "fp8": ["backbone.weights=fp8", "backbone.placement=replicated"],
    "cached": ["backbone.vision_encoder=cached"],
    "draws": ["branch.draws=3"],
    "vae": ["branch.targets=vae", "flux.path=builtin:tiny-flux", "flux.image_size=64"],
    "encoder": ["branch.targets=encoder", "branch.encoder=builtin:tiny"],
    "masked": ["branch.loss_tokens=masked"],
    "flow": ["branch.head=flow"],
    "fewer layers": ["branch.layers=2"],
    "pairs": ["branch.weights=lora"],
    "few pairs": ["branch.weights=lora", "branch.lora.targets=[o_proj, down_proj]", "branch.draws=2"],
    "pairs on int8, flow": ["branch.weights=lora", "branch.head=flow", "backbone.weights=int8"],
    "mrope": ["branch.positions=mrope"],
    "editing": ["data.shards=null", "data.sources=[{name: edits, shards: edits, weight: 1, task: editing}]"],
    "fp32": ["precision=fp32"],
    "buckets": [BUCKETS],
    "buckets, interleaved": [BUCKETS, "branch.positions=interleaved", "branch.loss_tokens=masked"],
}
STAGE_2 = {
    "buckets": [BUCKETS],
    "int8": ["flux.weights=int8", "flux.placement.transformer=replicated"],
    "cached": [f"flux.placement.{part}=cached" for part in ("vae", "text", "vision_encoder")],
    "cached text": ["flux.placement.text=cached"],
    "draws": ["flux.draws=2"],
    "single": ["controlnet.double=0", "controlnet.single=2"],
    "queries": ["controlnet.bridge=queries"],
    "queries, draws": ["controlnet.bridge=queries", "controlnet.connector={queries: 8, layers: 2}", "flux.draws=2"],
    "cross-attention": ["controlnet.bridge=cross_attention"],
    "fewer tokens": ["flux.text_tokens=16"],
    "pairs": ["controlnet.weights=lora", "flux.placement.transformer=replicated"],
    "few pairs on int8": [
        "controlnet.weights=lora",
        "controlnet.lora.targets=[attention, mlp]",
        "flux.weights=int8",
        "flux.draws=2",
    ],
}
FIRST = {"tiny-mllm": STAGE_1, "tiny-controlnet": STAGE_2, "mllm-3b": STAGE_1, "flux-controlnet": STAGE_2}
"""Recipe -> variants to count too."""
CASES = {
    f"{name}{': ' if variant else ''}{variant}{', recomputed' if recomputed == RECOMPUTED else ''}": (
        name,
        [*settings, recomputed],
    )
    for name in RECIPES
    for recomputed in (STORED, RECOMPUTED)
    for variant, settings in {"": [], **FIRST.get(name, {})}.items()
}
RECOMPUTED_VARIANT = re.compile(": .*, recomputed$")
TINY = [case for case, (name, _) in CASES.items() if name.startswith("tiny")]
QUICK = ["mllm-3b", "flux-controlnet, recomputed"]
SLOW = [case for case in CASES if case not in (*TINY, *QUICK) or (case in TINY and RECOMPUTED_VARIANT.search(case))]
"""Counted only with --real-size. One recipe per stage is always counted at its size."""


def real_size(case: str) -> Any:
    return pytest.param(case, marks=[pytest.mark.real_size] if case in SLOW else [])


def counts_of(cases: list[tuple[str, list[str]]]) -> list[dict[str, Any]]:
    """In a process with the phantom GPU: counts of a pass of every (recipe, overrides)."""
    from bifrost.trainer.phantom.passes import count_pass

    return [count_pass(load_recipe(name, settings), TEXT.get(name, 80)).as_json() for name, settings in cases]


def agrees(name: str, settings: list[str], counts: dict[str, Any]) -> None:
    recipe = load_recipe(name, settings)
    text = TEXT.get(name, 80)
    planned = parts(recipe, text, text, only_largest(open_model(recipe).grids))
    rows = pass_rows(planned, workload(recipe), counts)
    print(name, settings, *(row.cells() for row in rows), sep="\n")
    assert pass_problems(counts) == []
    assert [row.cells() for row in rows if not row.agrees] == []


@pytest.fixture(scope="module")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Counts of the variants of the tiny recipes."""
    cases = TINY if request.config.getoption("--real-size") else [case for case in TINY if case not in SLOW]
    found = phantoms.run_once(tmp_path_factory, counts_of, [CASES[case] for case in cases])
    return dict(zip(cases, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", [real_size(case) for case in TINY])
def test_a_pass_of_a_tiny_recipe_is_as_planned(case: str, tiny: dict[str, dict[str, Any]]) -> None:
    agrees(*CASES[case], tiny[case])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [real_size(case) for case in CASES if case not in TINY],
)
def test_a_pass_at_real_size_is_as_planned(case: str) -> None:
    (counts,) = phantoms.run(counts_of, [CASES[case]])
    agrees(*CASES[case], counts)
