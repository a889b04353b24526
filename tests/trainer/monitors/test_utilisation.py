"""Useful FLOPs by hand, MFU only where the peak is known, and what a run of two ranks logs of it."""

from pathlib import Path

import pytest
import torch

import ranked
import runs
from bifrost.recipes import Recipe, load_recipe
from bifrost.trainer.distributed.process_group import Ranks
from bifrost.trainer.models.backbone import read_config
from bifrost.trainer.models.hub import locate
from bifrost.trainer.monitors import memory
from bifrost.trainer.monitors.phase_timer import Times
from bifrost.trainer.monitors.rank_stats import RankStats
from bifrost.trainer.monitors.stragglers import Stragglers
from bifrost.trainer.monitors.utilisation import TEXTS, Utilisation
from bifrost.trainer.planner import parts, workload
from bifrost.trainer.planner.devices import Device, find_device

CPU = torch.device("cpu")
PATCHES = 16


def by_hand(text: int, draws: int = 1) -> tuple[float, float]:
    """FLOPs of a sample of the tiny stage 1, of `draws` masks: useful, and with every layer of the branch computed
    again up to its last projection, whose result is not kept."""
    config = read_config(locate("builtin:tiny"))
    lm, vision = config.text_config, config.vision_config
    width, keys = lm.hidden_size, lm.num_key_value_heads * lm.hidden_size // lm.num_attention_heads
    layers = lm.num_hidden_layers
    weights = layers * (2 * width * width + 2 * width * keys + 3 * width * lm.intermediate_size)
    # Of the prefix's last layer keys and values alone; causal: half of all pairs.
    prefix = 2 * text * (weights * (layers - 1) / layers + 2 * width * keys) + 2 * text**2 * width * (layers - 1)
    attention = 4 * PATCHES * (text + PATCHES) * width * layers
    branch = 6 * PATCHES * weights + 3.5 * attention
    head = 6 * PATCHES * width * width
    pixels, side = 3 * vision.temporal_patch_size * vision.patch_size**2, 112 // vision.patch_size
    v, seen, merged = vision.hidden_size, side * side, vision.spatial_merge_size**2
    tower = 2 * seen * (pixels * v + vision.depth * (4 * v * v + 3 * v * vision.intermediate_size))
    tower += 2 * (seen // merged) * ((merged * v) ** 2 + merged * v * vision.out_hidden_size)
    window = vision.window_size // vision.patch_size
    whole = len(vision.fullatt_block_indexes)
    pairs = whole * seen**2 + (vision.depth - whole) * (side // window) ** 2 * window**4
    useful = prefix + draws * (branch + head) + tower + 4 * pairs * v
    return useful, useful + draws * (2 * PATCHES * (weights - layers * width * lm.intermediate_size) + attention)


def utilisation(recipe: Recipe, ranks: int, node: int, patches: int, device: Device | None) -> Utilisation:
    return Utilisation([parts(recipe, text) for text in TEXTS], workload(recipe), ranks, node, patches, device)


def test_mfu_by_hand() -> None:
    h200 = find_device("h200")
    recipe = load_recipe("tiny-mllm", ["branch.loss_tokens=all", "activation_checkpointing=true"])
    used = utilisation(recipe, 2, 2, PATCHES, h200)
    for text in (0, 37, 61):
        assert used.flops(text + PATCHES) == pytest.approx(by_hand(text), rel=1e-6)
    several = recipe.model_copy(update={"branch": recipe.branch.model_copy(update={"draws": 3})})
    assert utilisation(several, 2, 2, 3 * PATCHES, h200).flops(37 + 3 * PATCHES) == pytest.approx(by_hand(37, 3))
    useful, done = by_hand(37)
    rates = used.rates(samples_per_s=6000.0, tokens_per_s=6000.0 * (37 + PATCHES), step_s=0.01)
    assert rates["tflops_per_device"] == pytest.approx(3000 * useful / 1e12)
    assert rates["mfu"] == pytest.approx(3000 * useful / 989e12)
    assert rates["hfu"] == pytest.approx(3000 * done / 989e12)
    assert rates["hfu"] > rates["mfu"] * 1.1
    plain = recipe.model_copy(update={"activation_checkpointing": False})
    (useful, done) = utilisation(plain, 2, 2, PATCHES, h200).flops(37 + PATCHES)
    assert useful == done


@pytest.mark.parametrize("unknown", ["a CPU", "fp32", "a device without a peak"])
def test_no_mfu_rather_than_a_wrong_one(unknown: str) -> None:
    device = None if unknown == "a CPU" else find_device("h200")
    if unknown == "a device without a peak":
        device = find_device("h200").model_copy(update={"bf16_tflops": None})
    recipe = load_recipe("tiny-mllm", ["precision=fp32"] if unknown == "fp32" else [])
    rates = utilisation(recipe, 1, 1, PATCHES, device).rates(10.0, 500.0, 1.0)
    assert rates.keys() == {"tflops_per_device"}, "and a single rank gathers nothing"
    assert rates["tflops_per_device"] > 0


def test_the_other_stage_does_not_ask_for_the_text() -> None:
    used = utilisation(load_recipe("tiny-controlnet", []), 1, 1, 0, None)
    assert used.flops(10)[0] == pytest.approx(used.flops(1000)[0], rel=1e-9)


class Three(Ranks):
    """Rank 0 of three; the others hold more, have less room, and wait longer."""

    def rows(self, values):
        wait, *own, peak, room, retries = values
        second = [wait + 1, *own, peak + 2**30, room - 2**30, retries + 5]
        return [list(values), second, list(values)]


def test_spread_over_ranks() -> None:
    ranks = Three(0, 3, CPU)
    times = Times({"data": 4.0, "forward": 2.0}, {"forward": 1.0}, 2)
    found = RankStats(ranks, Stragglers(ranks, ["a", "b", "c"], lambda event: None)).collect(2, times)
    assert found["data_wait_s_max"] == pytest.approx(3.0)
    assert (found["rank_work_s_median"], found["rank_work_s_max"], found["slowest_rank"]) == pytest.approx(
        (2.5, 3.5, 1)
    )
    assert found["peak_memory_gib"] == pytest.approx(memory.peak(CPU) / 2**30 + 1, rel=0.01)
    assert 0 < found["memory_headroom_gib"] < memory.headroom(CPU) / 2**30
    assert "alloc_retries" not in found


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """140 in all: 3 of others, 100 held by the allocator now and 120 when it held the most."""
    known = {"mem_get_info": (37, 140), "memory_reserved": 100, "max_memory_reserved": 120, "max_memory_allocated": 110}
    for name, value in known.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": 2})
    gpu = torch.device("cuda")
    assert memory.headroom(gpu) == 140 - 3 - 120 and memory.peak(gpu) == 110
    ranks = Three(0, 3, gpu)
    found = RankStats(ranks, Stragglers(ranks, ["a"] * 3, lambda event: None)).collect(1, Times({}, {}, 1))
    assert found["alloc_retries"] == 2 + 7 + 2


@pytest.mark.multi
def test_what_a_run_logs(shards: Path, tmp_path: Path) -> None:
    overrides = ["steps=2", "micro_batch=4", "branch.loss_tokens=all", *runs.TINY]
    ended = ranked.run(ranked.command, 2, runs.arguments(shards, tmp_path, *overrides))
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    first, second = runs.steps(tmp_path / "tiny-mllm")
    for line in (first, second):
        text = line["tokens_per_s"] / line["samples_per_s"] - PATCHES
        at, beyond = by_hand(int(text))[0], by_hand(int(text) + 1)[0]
        useful = at + (text - int(text)) * (beyond - at)
        assert line["tflops_per_device"] == pytest.approx(useful * line["samples_per_s"] / 2 / 1e12, rel=1e-3)
        assert line["allgather_gb_per_s"] > 0 and line["memory_headroom_gib"] > 0
        assert line["data_wait_s_max"] >= line["data_wait_s"] and not {"mfu", "hfu", "alloc_retries"} & line.keys()
