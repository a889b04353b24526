"""`bifrost bench engine`: both stages on one rank and two, held memory by a count and by the plan, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ranked
from bifrost.recipes import load_recipe
from bifrost.trainer.bench import engine
from bifrost.trainer.bench.engine_table import Measured, Planned, table
from bifrost.trainer.bench.random_weights import randomised
from bifrost.trainer.planner.devices import find_device
from bifrost.trainer.stages import open_stage

CPU = torch.device("cpu")
SMALL = ("micro_batch=2", "zero.reduce_bucket=1000000")
TRAINED, FROZEN = 1_616_192, 2_713_600  # tiny-mllm, as the README has them


def measured(ranks: int, folder: Path, recipe: str, *words: str) -> dict[str, Any]:
    """The record of `bench engine` with random weights on so many ranks."""
    command = ("bench", "engine", recipe, *words, "--random", "--steps=2", "--against-plan", f"--out={folder}")
    ended = ranked.bifrost(ranks, *command)
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    assert "measured" in ended[0].out and not any(rank.out for rank in ended[1:])
    return json.loads((folder / "engine.json").read_text())


@pytest.mark.multi
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("recipe", ["tiny-mllm", "tiny-controlnet"])
def test_both_stages_are_measured_and_hold_what_is_planned(recipe: str, ranks: int, tmp_path: Path) -> None:
    record = measured(ranks, tmp_path, recipe, *SMALL)
    assert (record["recipe"], record["ranks"], record["micro_batch"]) == (recipe, ranks, 2)
    assert (record["device"], record["weights"], record["steps"]) == ("cpu", "random", 2)
    found, planned = record["measured"], record["planned"]
    assert 0 < found["least_step_s"] <= found["step_s"] <= found["most_step_s"]
    assert found["samples_s"] == pytest.approx(2 * ranks / found["step_s"])
    assert found["parts_s"].keys() == {"forward", "backward", "exchange", "update"}
    assert found["launches"] > 500
    for absent in ("mfu", "hfu", "peak_bytes", "alloc_retries"):  # a CPU has none of them
        assert found[absent] is None
    assert planned["step_s"] is None and planned["peak_bytes"] > planned["held_bytes"]
    assert found["held_bytes"] == pytest.approx(planned["held_bytes"], rel=0.05)
    if recipe == "tiny-mllm":
        # Weights, master, two moments, accumulated gradient, average; frozen weights are whole on every rank. Trained
        # ones are all below zero.persistence_threshold: on two ranks they are held whole next to their slices.
        by_hand = TRAINED * (2 + 4 + 8 + 4 + 4) / ranks + 2 * FROZEN + 4 * 1_000_000
        by_hand += 2 * TRAINED if ranks > 1 else 0
        assert found["held_bytes"] == pytest.approx(by_hand, rel=0.05)


@pytest.mark.multi
@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("mllm-3b", ("micro_batch=1", "branch.draws=2", "backbone.weights=int8")),
        (
            "flux-controlnet",
            ("micro_batch=1", "flux.image_size=128", "data.image_size=112", "flux.placement.text=cached"),
        ),
    ],
)
def test_published_models_are_scaled_down_without_their_files(
    recipe: str, settings: tuple[str, ...], tmp_path: Path
) -> None:
    """No weights or tokenizers of these models are in this repository, and tests cannot reach the hub."""
    record = measured(1, tmp_path, recipe, *settings, "--layers=1", "--width=256", "zero.reduce_bucket=1000000")
    assert record["width"] == 256 and record["layers"] in (1, [1, 2])
    assert record["measured"]["held_bytes"] == pytest.approx(record["planned"]["held_bytes"], rel=0.05)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("tiny-mllm", "--layers=2"), "--layers and --width: the model's files have their own; add --random"),
        (("flux-controlnet", "--random", "--layers=1", "--ranks=1"), "--width 768: T5 and CLIP keep their widths"),
    ],
)
def test_what_cannot_be_scaled_is_refused_in_one_line(words: tuple[str, ...], line: str) -> None:
    (ended,) = ranked.bifrost(1, "bench", "engine", *(word for word in words if "ranks" not in word))
    assert ended.code == 2 and ended.err.startswith(f"error: {line}") and ended.err.count("\n") == 1


def test_random_weights_are_a_function_of_their_name() -> None:
    stage: Any = randomised(open_stage(load_recipe("tiny-mllm"), for_counting=True))  # type: ignore[arg-type]
    files = stage.files
    norm, matrix = "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
    first, again = (files.flat(matrix, 0, 4096) for _ in range(2))
    assert torch.equal(first, again), "replicas on several ranks are equal"
    assert not torch.equal(first, files.flat("model.layers.1.mlp.up_proj.weight", 0, 4096))
    assert float(first.std()) == pytest.approx(0.02, rel=0.1) and abs(float(first.mean())) < 2e-3
    assert float(files.flat(norm, 0, 128).mean()) == pytest.approx(1, abs=0.01)
    assert files.shape(matrix) is not None and files.shape("lm_head.weight") is None


def test_live_bytes_count_every_storage_once() -> None:
    before = engine.live_bytes(CPU)
    kept = [torch.zeros(1000, 250)]
    kept += [kept[0][10:], kept[0].T, torch.zeros(500, device="meta")]
    with FakeTensorMode():
        kept += [torch.zeros(500)]
    assert engine.live_bytes(CPU) - before == 1_000_000
    del kept
    assert engine.live_bytes(CPU) == before


def test_operators_are_counted_without_those_that_they_call() -> None:
    one, square = torch.ones(4, 4), torch.ones(4, 4)
    assert engine.launches(lambda: (one + square, torch.nn.functional.linear(one, square)), CPU) == 2


def test_utilisation_is_of_the_median_step() -> None:
    device = find_device("h200")
    times = [{"forward": 1.0, "update": seconds} for seconds in (0.5, 1.0, 3.0)]
    rest: dict[str, Any] = dict(startup_s=1.0, held_bytes=2 * 10**9, peak_bytes=10**9, alloc_retries=0, launches=7)
    found = Measured.of(times, 16, (989e12, 2 * 989e12), device, **rest)
    assert (found.step_s, found.least_step_s, found.most_step_s, found.samples_s) == (2, 1.5, 4, 8)
    assert found.mfu == pytest.approx(0.5, rel=1e-3) and found.hfu == pytest.approx(1, rel=1e-3)
    planned = Planned(step_s=1.0, samples_s=16.0, mfu=1.0, hfu=1.0, held_bytes=10**9, peak_bytes=4 * 10**9)
    record = {
        "recipe": "mllm-3b", "layers": 36, "width": 2048, "weights": "random", "ranks": 2, "micro_batch": 8,
        "text_tokens": 80, "precision": "bf16", "device": "cuda", "activation_checkpointing": False,
        "kernels": {"head": "triton-tma"}, "steps": 3, "date": "2026-01-01",
        "machine": {"cpu": "CPU", "cores": 1, "gpus": ["GPU"], "versions": {}},
    }  # fmt: skip
    lines = [line.split() for line in table(record, found, planned).splitlines()]
    assert ["step,", "s", "2.0000", "1.0000", "2.00"] in lines
    assert ["held,", "GB", "2.0000", "1.0000", "2.00"] in lines
    assert ["launches", "per", "step", "7", "-", "-"] in lines
    assert "planned" not in table(record, found, None)
