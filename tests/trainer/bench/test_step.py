"""`bifrost bench step`: baselines compute the same; FLOPs are those executed; the ratio is the measured one."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bifrost.recipes import load_recipe
from bifrost.trainer.bench import prompts, step
from bifrost.trainer.bench.dense import DenseStep
from bifrost.trainer.bench.routed import routed_step
from bifrost.trainer.bench.shapes import random_model, scaled
from bifrost.trainer.errors import RunError
from bifrost.trainer.models.backbone import read_config
from bifrost.trainer.models.hub import architecture
from bifrost.trainer.planner import parts
from bifrost.trainer.planner.flops import patch_latent_parts
from bifrost.trainer.planner.opened import PatchLatents
from bifrost.trainer.planner.timing import done_flops, useful_flops
from bifrost.trainer.stages import open_patch_latents
from bifrost.trainer.stages.patch_latents import PatchLatentStage

SMALL = {"layers": 2, "width": None, "samples": 3, "baseline": "eager", "rounds": 1}
CPU = torch.device("cpu")


def model_of(recipe: Any, **shape: Any) -> tuple[Any, Any, int]:
    """A model of the recipe with random weights, its stage, and its patches."""
    config = scaled(read_config(architecture(recipe.backbone.path)), **shape)
    tokens = step.grid_side(config, recipe.data.image_size) ** 2
    own = recipe.backbone, recipe.branch, recipe.data.image_size, recipe.seed
    stage = PatchLatentStage(*own, config, tokens, None, None, for_counting=True)
    build = partial(stage.build, recipe.activation_checkpointing)
    return random_model(build, CPU, torch.float32), stage, tokens


def counted_of(recipe: Any, config: Any) -> PatchLatents:
    return PatchLatents(config, recipe.backbone, recipe.branch, recipe.data.image_size, recipe.seed)


def test_every_case_is_measured_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = step.bench(load_recipe("tiny-mllm"), text_tokens="20,real", out=tmp_path, **SMALL)
    record = json.loads((tmp_path / "step.json").read_text())
    assert [case["text_tokens"] for case in record["cases"]] == ["20", "real"]
    assert record["cases"][1]["padded_text_tokens"] == 64  # the recipe's max_text_tokens
    for case, row in zip(record["cases"], rows, strict=True):
        assert case["ratio"] == row.ratio == pytest.approx(row.baseline_s / row.routed_s)  # of the one round
        assert case["activation_ratio"] == case["baseline_activation_bytes"] / case["routed_activation_bytes"] > 1
        assert max(case["loss_error"], case["gradient_error"]) < 1e-5
        assert sum(case["shares"].values()) == pytest.approx(1)
        assert case["shares"].keys() == {"tower", "prefix", "branch forward", "head", "branch backward"}
        assert (case["mfu"], case["hfu"]) == (None, None)  # a CPU's peak is not known
    printed = capsys.readouterr().out
    assert f"{rows[0].ratio:.2f}" in printed and "in 64" in printed


def test_what_does_not_fit_costs_no_other_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline runs out of memory in the first case, both in the second; the third is whole."""
    dense, routed, draw, cases = DenseStep.step, step.routed_step, step.draw_batch, []

    def drawn(case: Any, *rest: Any) -> Any:
        cases.append(case.name)
        return draw(case, *rest)

    def within(limits: tuple[str, ...], work: Any) -> Any:
        def run(*arguments: Any) -> Any:
            if cases[-1] in limits:
                raise torch.OutOfMemoryError
            return work(*arguments)

        return run

    monkeypatch.setattr(step, "draw_batch", drawn)
    monkeypatch.setattr(DenseStep, "step", within(("20", "30"), dense))
    monkeypatch.setattr(step, "routed_step", within(("30",), routed))
    rows = step.bench(load_recipe("tiny-mllm"), text_tokens="20,30,40", out=tmp_path, **{**SMALL, "layers": 1})
    assert [case["text_tokens"] for case in json.loads((tmp_path / "step.json").read_text())["cases"]] == ["20", "40"]
    alone, whole = rows
    assert (
        alone.routed_s > 0 and (alone.ratio, alone.baseline_s, alone.activation_ratio, alone.loss_error) == (None,) * 4
    )
    assert whole.ratio and whole.loss_error is not None
    printed = capsys.readouterr().out
    assert "20 text tokens: the baseline (eager) does not fit" in printed
    assert "30 text tokens: the routed step does not fit" in printed
    monkeypatch.setattr(step, "routed_step", within(("20",), routed))
    with pytest.raises(RunError, match="no case fits"):
        step.bench(load_recipe("tiny-mllm"), text_tokens="20", out=None, **{**SMALL, "layers": 1})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_are_a_baseline_with_the_same_numbers() -> None:
    (row,) = step.bench(
        load_recipe("tiny-mllm"), text_tokens="20", out=None, **{**SMALL, "layers": 1, "baseline": "compiled"}
    )
    assert row.flops_ratio == 1 and max(row.loss_error, row.gradient_error) < 1e-5


@pytest.mark.parametrize("encoder", ["null", "cached"])
def test_shared_masks_have_the_numbers_of_single_ones(encoder: str) -> None:
    """And the FLOPs are those of a step for every mask, less what is shared."""
    settings = [f"backbone.vision_encoder={encoder}", "activation_checkpointing=true"]
    several, single = (load_recipe("tiny-mllm", [*settings, f"branch.draws={draws}"]) for draws in (3, 1))
    (row,) = step.bench(several, text_tokens="20", out=None, **{**SMALL, "layers": None, "baseline": "single"})
    assert max(row.loss_error, row.gradient_error) < 1e-5
    computed = single.model_copy(update={"backbone": single.backbone.model_copy(update={"vision_encoder": None})})
    assert row.baseline_flops == pytest.approx(3 * done_flops(parts(computed, 20), True))
    shared = {part.name: part.forward for part in parts(single, 20) if part.gradient == "none"}
    saved = 2 * sum(shared.values()) + (encoder == "cached") * shared["vision encoder"]
    assert row.baseline_flops - row.routed_flops == pytest.approx(saved)


@pytest.mark.parametrize(("name", "draws", "least"), [("mllm-7b", 4, 1.18), ("mllm-3b", 2, 1.33)])
def test_shared_masks_and_a_cache_need_fewer_flops_at_full_size(name: str, draws: int, least: float) -> None:
    cached = load_recipe(name, [f"branch.draws={draws}", "backbone.vision_encoder=cached"])
    assert useful_flops(parts(load_recipe(name))) / (useful_flops(parts(cached)) / draws) > least


def test_baselines_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline that forgets the padding's columns, as a mask of the wrong kind would."""
    monkeypatch.setattr("bifrost.trainer.bench.dense.additive_mask", lambda real, patches, dtype: torch.zeros(()))
    with pytest.raises(RunError, match="the baseline differs"):
        step.bench(load_recipe("tiny-mllm"), text_tokens="real", out=None, **SMALL)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_torchs_own(checkpointing: bool) -> None:
    """Counted by torch over real passes, with attention written out for both."""
    recipe = load_recipe("tiny-mllm", [f"activation_checkpointing={str(checkpointing).lower()}"])
    model, stage, tokens = model_of(recipe, layers=2, width=None)
    model.backbone.attention = model.branch.attention = "reference"
    (case,) = prompts.cases("20", 2, 64)
    batch = prompts.draw_batch(case, tokens, recipe.data.image_size, stage.config, CPU, torch.float32)
    parts = patch_latent_parts(counted_of(recipe, stage.config), "bf16", 20)

    def counted(work: Any) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops() / 2

    dense = counted(lambda: DenseStep(model).step(batch))
    assert DenseStep(model).flops([parts], case.padded) == pytest.approx(dense, rel=2e-3)
    named = {part.name: part for part in step.step_parts(parts)}
    branch = named["generation branch"]
    linear = sum(p.linear + p.backward - p.backward_attention for p in named.values()) + checkpointing * (
        branch.linear - branch.last
    )
    # The reference's scores go over all rows of the batch: its attention is left out by having none counted.
    with FlopCounterMode(display=False) as counter:
        routed_step(model, batch)
    products = counter.get_flop_counts()["Global"]
    found = sum(n for operator, n in products.items() if str(operator).split(".")[1] in ("mm", "addmm")) / 2
    assert linear == pytest.approx(found, rel=2e-3)


@pytest.mark.parametrize(("recipe", "least"), [("mllm-7b", (1.85, 2.4, 2.8)), ("mllm-3b", (1.85, 2.4, 2.8))])
def test_fewer_flops_by_the_claimed_factors(recipe: str, least: tuple[float, ...]) -> None:
    """At the real sizes, all layers: 80 and 300 text tokens, and captions of real lengths padded to 300."""
    settings = load_recipe(recipe, ["activation_checkpointing=false"])
    stage = open_patch_latents(settings, for_counting=True)
    counted = counted_of(settings, stage.config)
    with torch.device("meta"):
        model = stage.build()
    for case, wanted in zip(prompts.cases("80,300,real", 16, 300), least, strict=True):
        flops = [step.step_parts(patch_latent_parts(counted, "bf16", float(length))) for length in case.lengths]
        ours = sum(useful_flops(sample) for sample in flops) / 16
        assert DenseStep(model).flops(flops, case.padded) / ours > wanted


def test_real_lengths_have_their_mean_at_any_number_of_samples() -> None:
    for samples in (4, 16, 256):
        lengths = prompts.real_lengths(samples, 300)
        assert len(set(lengths)) > samples // 4
        assert sum(lengths) / samples == pytest.approx(prompts.MEAN, rel=0.05)
        assert max(lengths) <= 300


def test_a_cut_model_keeps_its_proportions() -> None:
    config = read_config(architecture("Qwen/Qwen2.5-VL-7B-Instruct"))
    cut = scaled(config, layers=4, width=1024)
    text, vision = cut.text_config, cut.vision_config
    assert (text.hidden_size, text.num_hidden_layers, len(text.layer_types)) == (1024, 4, 4)
    assert (text.num_attention_heads, text.num_key_value_heads) == (8, 1)
    assert text.intermediate_size / 1024 == pytest.approx(18944 / 3584, rel=0.02)
    assert (vision.depth, vision.hidden_size % vision.num_heads, vision.out_hidden_size) == (5, 0, 1024)
    assert config.text_config.hidden_size == 3584, "the model's own settings stay"
    whole = scaled(config, layers=None, width=None)
    assert whole.text_config.num_hidden_layers == 28 and whole.vision_config.fullatt_block_indexes == [7, 15, 23, 31]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_tokens": "80,long"}, "--text-tokens 80,long"),
        ({"layers": 99}, "--layers 99: the model has 4"),
        ({"width": 100}, "--width 100: give a multiple of 32"),
        ({"baseline": "flash"}, "--baseline flash: give one of eager, sdpa, compiled, single"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        step.bench(load_recipe("tiny-mllm"), out=None, **{"text_tokens": "20", **SMALL, **change})


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("branch.head=flow", r"the public release, whose head is linear; set branch\.head=linear"),
        ("branch.targets=pca", r"predicts the MLLM's own latents; set branch\.targets=native"),
        ("branch.layers=2", r"measures a full copy of every layer: leave branch\.layers and"),
        ("branch.weights=lora", r"measures a full copy of every layer: leave branch\.layers and"),
    ],
)
def test_a_branch_that_no_baseline_computes_is_refused(setting: str, line: str) -> None:
    with pytest.raises(RunError, match=line):
        step.bench(load_recipe("tiny-mllm", [setting]), out=None, **{"text_tokens": "20", **SMALL})
