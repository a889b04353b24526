"""The plan: memory against DeepSpeed's, arithmetic, devices, and the command."""

import gc
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import opened
import ranked
from bifrost.recipes import load_recipe
from bifrost.trainer.errors import RunError
from bifrost.trainer.models.hub import locate
from bifrost.trainer.planner import batch, parts, plan, workload
from bifrost.trainer.planner.curves import CURVE, curves, distinct, retention
from bifrost.trainer.planner.devices import FILE, find_device, load
from bifrost.trainer.planner.layout import LAYOUTS, Layout
from bifrost.trainer.planner.part import Part
from bifrost.trainer.planner.sources import edited_share, samples_of_sources
from bifrost.trainer.planner.traffic import buckets, packs


def middle_model(folder: Path) -> Path:
    """Settings of a model of 60 million parameters, for a run that reads no weights."""
    config = json.loads((locate("builtin:tiny") / "config.json").read_text())
    config["text_config"].update(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2
    )
    config["text_config"].pop("layer_types", None)
    config["text_config"]["rope_parameters"]["mrope_section"] = [8, 12, 12]
    config["vision_config"]["out_hidden_size"] = 512
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def allocated(recipe_name: str, overrides: list[str]) -> int:
    """Bytes of all tensors that stay after a step on this rank; runs in a process of its own."""
    from bifrost.trainer.distributed.process_group import join
    from bifrost.trainer.optim.ema import Ema
    from bifrost.trainer.optim.engine import Engine, import_deepspeed, partitioned
    from bifrost.trainer.stages import open_stage

    def storages() -> dict[int, int]:
        gc.collect()
        found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}

    ranks = join()
    import_deepspeed(ranks.device)
    recipe = load_recipe(recipe_name, overrides)
    stage: Any = open_stage(recipe, for_counting=True)
    before = storages()
    config = opened.deepspeed(recipe, ranks.size)
    with partitioned(config, ranks.device):
        model = stage.build(recipe.activation_checkpointing)
    model.restore_rotary()
    for parameter in model.parameters():
        parameter.ds_tensor.normal_(std=0.02)
    engine = Engine(model, recipe.optimizer, config, ranks)
    ema = Ema(engine.masters(), 0.9) if recipe.ema else None
    side, size = recipe.data.image_size, recipe.micro_batch
    patches = stage.tokens_per_image
    mask = torch.ones(size, patches, dtype=torch.bool)
    engine.backward(
        engine.forward(
            {
                "images": torch.zeros(size, 3, side, side, dtype=torch.uint8),
                "input_ids": torch.arange(8).repeat(size),
                "text_lengths": (8,) * size,
                "mask": mask,
                "masked": mask.flatten().nonzero()[:, 0],
                "normalizer": float(patches),
            }
        ).loss
    )
    assert engine.step(1e-4, skip=False)
    del mask
    after = storages()
    assert ema is None or ema.slices
    return sum(size for at, size in after.items() if at not in before)


@pytest.mark.multi
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("builtin:tiny", ["ema={decay: 0.9}"]),
        ("middle", ["ema=null"]),
        ("middle", ["ema=null", "precision=fp32", "zero.persistence_threshold=0"]),
        ("middle", ["ema=null", "branch.weights=lora"]),
        ("middle", ["ema={decay: 0.9}", "branch.layers=3"]),
        ("middle", ["ema=null", "optimizer.name=lion"]),
        ("middle", ["ema=null", "optimizer.name=muon"]),
        ("middle", ["ema=null", "optimizer.name=adamw-8bit"]),
    ],
)
def test_held_memory_is_what_deepspeed_allocates(model: str, settings: list[str], tmp_path: Path) -> None:
    path = str(middle_model(tmp_path)) if model == "middle" else model
    overrides = [f"backbone.path={path}", "backbone.placement=sharded", "global_batch=2", "micro_batch=1"]
    overrides += ["zero.reduce_bucket=1000000", *settings]
    recipe = load_recipe("tiny-mllm", overrides)
    planned = plan(parts(recipe), workload(recipe), 2).memory
    ended = ranked.run(allocated, 2, "tiny-mllm", overrides)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    for rank in ended:
        assert planned.static == pytest.approx(rank.value, rel=0.05)


SIZES = [
    ("mllm-3b", 8, (16, 8)),
    ("mllm-3b", 64, (16, 1)),
    ("mllm-3b-256", 256, (16, 1)),
    ("mllm-7b", 8, (16, 8)),
    ("mllm-7b", 64, (16, 1)),
    ("mllm-7b-256", 256, (16, 1)),
    ("mllm-7b-lora", 8, (16, 8)),
    ("flux-controlnet", 8, (4, 8)),
    ("flux-controlnet", 64, (4, 1)),
    ("flux-controlnet-256", 256, (4, 1)),
    ("flux-controlnet-lora", 8, (4, 8)),
]


@pytest.fixture(scope="module")
def models() -> dict[str, list[Part]]:
    return {name: parts(load_recipe(name)) for name in {name for name, _, _ in SIZES}}


def bifrost(*arguments: str) -> str:
    from bifrost.trainer.cli.main import app

    ended = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.output


@pytest.mark.parametrize(("name", "gpus", "batch_of"), SIZES)
def test_large_recipes_run_dry_with_the_plans_figures(
    name: str, gpus: int, batch_of: tuple[int, int], models: dict[str, list[Part]]
) -> None:
    recipe = load_recipe(name)
    split = batch(recipe.global_batch, recipe.micro_batch, gpus)
    assert (split.micro_batch, split.passes) == batch_of
    micro_batch, passes = batch_of
    for device in ("h100", "h200"):
        row = plan(models[name], workload(recipe), gpus, find_device(device))
        assert row.global_batch == recipe.global_batch
        assert row.fits and row.times is not None and 0.4 < row.times.mfu <= row.times.hfu < 0.5
        assert row.largest_micro_batch and row.largest_micro_batch >= micro_batch
    printed = bifrost("train", name, "--dry-run", "--ranks", str(gpus))
    assert f"{gpus} ranks x micro batch {micro_batch} x {passes} backward pass" in printed
    trained = sum(part.size for part in models[name] if part.gradient == "trained")
    assert f"trainable parameters  {trained:>16,}" in printed
    assert f"frozen parameters     {sum(p.size for p in models[name]) - trained:>16,}" in printed


def test_the_7b_recipe_keeps_its_throughput(models: dict[str, list[Part]]) -> None:
    recipe, device = load_recipe("mllm-7b-256"), find_device("h200")
    curve = [plan(models["mllm-7b-256"], workload(recipe), count, device, weak=True) for count in CURVE]
    kept = dict(zip(CURVE, retention(curve), strict=True))
    assert kept[8] == 1
    assert kept[128] >= 0.97
    assert kept[512] >= 0.92


def test_sizes_keep_the_throughput_of_a_gpu(models: dict[str, list[Part]]) -> None:
    """With the batch of each size, its own micro_batch and passes."""
    device = find_device("h200")
    rates = {
        (name, gpus): plan(models[name], workload(load_recipe(name)), gpus, device).samples_s for name, gpus, _ in SIZES
    }
    for (name, gpus), rate in rates.items():
        at_8 = rates[name.removesuffix("-256"), 8]
        assert rate and at_8 and rate / gpus >= 0.94 * at_8 / 8, name
    alike = {name: load_recipe(name) for name in models}
    for name, recipe in alike.items():
        small = alike[name.removesuffix("-256")]
        assert recipe.steps * recipe.global_batch == small.steps * small.global_batch
        # The rate by the root of the batch.
        assert recipe.optimizer.lr**2 / recipe.global_batch == pytest.approx(small.optimizer.lr**2 / small.global_batch)


def test_layouts_move_frozen_weights_and_traffic(models: dict[str, list[Part]]) -> None:
    recipe = load_recipe("mllm-7b")
    rows = {layout.name: plan(models["mllm-7b"], workload(recipe), 64, layout=layout) for layout in LAYOUTS}
    frozen = {name: row.memory.held["frozen weights"] / 1e9 for name, row in rows.items()}
    assert frozen["frozen parts sharded over all"] == pytest.approx(15.494 / 64, rel=1e-3)
    assert frozen["frozen parts sharded within a node"] == pytest.approx(15.494 / 8, rel=1e-3)
    assert frozen["frozen parts replicated on every GPU"] == pytest.approx(15.494, rel=1e-3)
    received = {name: row.received / 1e9 for name, row in rows.items()}
    cut, whole = received["frozen parts sharded over all"], received["frozen parts replicated on every GPU"]
    assert cut - whole == pytest.approx(15.494 * 63 / 64, rel=1e-3)
    hpz = rows["hpZ: all weights also sharded within a node"]
    over_all = {t.kind for t in hpz.transfers if t.scope == "all"}
    assert over_all == {"gather trained, forward", "reduce gradients"}
    assert hpz.memory.held["second copy (hpZ), frozen"] == pytest.approx(15.494e9 / 8, rel=1e-3)
    assert hpz.memory.per_pass["second copy (hpZ), trained"] == pytest.approx(13.079e9 / 8, rel=1e-3)
    assert hpz.memory.held == plan(models["mllm-7b"], workload(load_recipe("mllm-7b", ["zero.hpz=8"])), 64).memory.held


def test_passes_gather_again_and_one_gpu_sends_nothing(models: dict[str, list[Part]]) -> None:
    recipe = load_recipe("mllm-7b")
    eight, sixty_four = (plan(models["mllm-7b"], workload(recipe), gpus) for gpus in (8, 64))
    per_pass = [row.received / row.passes * row.gpus / (row.gpus - 1) for row in (eight, sixty_four)]
    assert per_pass[0] == pytest.approx(per_pass[1], rel=1e-3)
    alone = plan(models["mllm-7b"], workload(recipe.model_copy(update={"global_batch": 16})), 1)
    assert alone.transfers == []
    assert alone.memory.per_pass["gathered weights"] == 0
    cached = load_recipe("flux-controlnet", ["flux.placement.text=cached", "flux.placement.transformer=replicated"])
    found = parts(cached)
    row = plan(found, workload(cached), 64, find_device("h100"))
    assert not any("frozen, backward" in t.kind for t in row.transfers)
    assert row.memory.held["frozen weights"] / 1e9 == pytest.approx(2 * (11.901 + 0.760 / 64), rel=1e-3)


def test_what_stays_gathered_is_not_fetched_again(models: dict[str, list[Part]]) -> None:
    """At the turn from the forward to the backward pass, max_live_parameters elements are there; a parameter below the
    threshold is fetched alone, once after the update."""

    def fetched(*overrides: str) -> dict[str, tuple[float, int]]:
        row = plan(models["mllm-7b"], workload(load_recipe("mllm-7b", list(overrides))), 8)
        return {t.kind: (t.bytes / row.passes / 2e9 * 8 / 7, t.count) for t in row.transfers}

    trained = 6.539391488
    assert fetched()["gather trained, backward"][0] == pytest.approx(trained - 1)
    assert fetched("zero.max_live_parameters=3000000000")["gather trained, backward"][0] == pytest.approx(trained - 3)
    assert fetched("zero.quantized_weights=true")["gather trained, backward"][0] == pytest.approx((trained - 1) / 2)
    whole = fetched("zero.max_live_parameters=20000000000")
    assert "gather trained, backward" not in whole
    assert whole["gather trained, forward"][0] == pytest.approx(trained)
    assert whole["gather trained, forward"][1] < 0.4 * fetched()["gather trained, forward"][1]
    assert "gather small parameters" not in whole
    # 28 layers of 2 norms and 3 biases, the last norm, mask token, the head's bias; as many frozen, and the tower's.
    kept = fetched("zero.persistence_threshold=100000")["gather small parameters"][1]
    assert kept > 2 * 28 * 5 + 3
    kept = fetched("zero.persistence_threshold=1000000000")
    assert {kind for kind in kept if "gather" in kind} == {"gather small parameters"}
    assert kept["gather small parameters"][0] == pytest.approx((trained + 7.747169280) / 8)


def test_buckets_fill_in_order() -> None:
    assert packs([30, 30, 30], 50) == 3 and packs([30, 20, 60, 10], 50) == 3 and packs([], 50) == 0
    assert buckets([30, 30, 30], 50) == 2
    assert buckets([60, 60], 50) == 2
    assert buckets([10], 50) == 1
    assert buckets([], 50) == 0


def test_collectives() -> None:
    device = find_device("h200").model_copy(update={"link_efficiency": 1.0})
    assert device.collective_s(1e9, 1, 1) == 0
    hops = (8.4 + 7 * 3.4) * 1e-6
    assert device.collective_s(450e9, 2, 8) == pytest.approx(1 + 2 * hops)
    # Two nodes: half of everything comes in through 8 ports of 50 GB/s each.
    assert device.collective_s(400e9 * 15 / 16, 0, 16) == pytest.approx(0.9375 * 400 / 450)
    assert device.collective_s(1e3, 100, 16) == pytest.approx(100 * (6.6 + 14 * 0.6 + 2.7) * 1e-6, rel=1e-2)
    thin = device.model_copy(update={"inter_gbs": 5.0})
    assert thin.collective_s(400e9 * 15 / 16, 0, 16) == pytest.approx(400 / 2 / 40)


def test_steps_overlap_as_far_as_they_are_let(models: dict[str, list[Part]]) -> None:
    recipe = load_recipe("mllm-7b")
    device = find_device("h200")

    def times(layout: Layout, **changes: Any) -> Any:
        return plan(models["mllm-7b"], workload(recipe), 64, device.model_copy(update=changes), layout).times

    plain = times(LAYOUTS[0])
    assert plain.serial == pytest.approx(plain.compute + plain.ahead + plain.behind + plain.update + plain.data)
    assert plain.as_set == pytest.approx(plain.compute + plain.behind + plain.update)
    assert plain.serial > plain.as_set > plain.overlapped
    assert plain.bound == "compute"
    overlapping = times(Layout("", overlap=True))
    assert overlapping.as_set == pytest.approx(plain.overlapped, rel=5e-3)
    unfetched = load_recipe("mllm-7b", ["zero.prefetch_bucket=0"])
    behind = plan(models["mllm-7b"], workload(unfetched), 64, device).times
    assert behind and behind.ahead == 0
    slow = times(LAYOUTS[0], inter_gbs=1.0)
    assert slow.bound == "links between nodes" and slow.as_set > 2 * plain.as_set
    starved = times(LAYOUTS[0], loader_samples_s=1.0)
    assert starved.bound == "data" and starved.as_set == starved.data == 4


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ([], "per_pass"),
        (["branch.layers=2", "activation_checkpointing=true", "micro_batch=128", "global_batch=1024"], "encoding"),
    ],
    ids=["all layers", "few, recomputed"],
)
def test_largest_micro_batch_is_the_last_that_fits(settings: list[str], bound: str) -> None:
    recipe, device = load_recipe("mllm-3b", settings), find_device("a100-40gb")
    model = parts(recipe, 80)
    row = plan(model, workload(recipe), 8, device)
    needed = {name: sum(getattr(row.memory, name).values()) for name in ("per_pass", "encoding", "update")}
    assert max(needed, key=needed.__getitem__) == bound
    most = row.largest_micro_batch
    assert most

    def fits(micro_batch: int) -> bool | None:
        whole = recipe.model_copy(update={"micro_batch": micro_batch, "global_batch": 8 * micro_batch})
        return plan(model, workload(whole), 8, device).fits

    assert fits(most) and not fits(most + 1)
    if not settings:
        small = workload(recipe.model_copy(update={"global_batch": 32}))
        assert plan(model, small, 1, device).largest_micro_batch == 0


def test_the_command(tmp_path: Path) -> None:
    plot = tmp_path / "plan.png"
    found = json.loads(
        bifrost("plan", "mllm-7b", "--gpus", "8,64,3", "--device", "h200", "--samples", "1000000", "--json")
    )
    assert found["predicted"] is True
    assert found["parameters"] == {"trained": 6_539_391_488, "frozen": 7_747_169_280}
    assert [row["gpus"] for row in found["rows"]] == [8, 64]
    assert "global_batch 1024 does not divide over 3 GPUs" in found["left_out"][0]
    row = found["rows"][1]
    hours = row["cost"]["gpu_hours"]
    assert hours == pytest.approx(64 * 1e6 / row["samples_s"] / 3600)
    assert row["cost"]["energy_mwh"] == pytest.approx(hours * 700 / 1e6)
    assert found["checkpoint_bytes"] == 12 * 6_539_391_488
    assert row["checkpoint_s"] == pytest.approx(found["checkpoint_bytes"] / 16e9)
    printed = bifrost("plan", "mllm-3b", "--gpus", "8", "--device", "H200", "--plot", str(plot))
    assert "predicted" in printed and "bound by" in printed and "micro_batch" in printed
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000
    with pytest.raises(RunError, match=r"missing/plan\.png: cannot be written"):
        bifrost("plan", "mllm-3b", "--gpus", "8", "--device", "H200", "--plot", str(tmp_path / "missing" / "plan.png"))


def test_curves_that_nobody_can_tell_apart_are_drawn_once(models: dict) -> None:
    recipe, device = load_recipe("mllm-7b-256"), find_device("h200")
    found = curves(models["mllm-7b"], workload(recipe), device)
    drawn = distinct(found)
    assert 1 < len(drawn) < len(found)
    named = [name for _, names in drawn for name in names.split("\n")]
    assert sorted(named) == sorted(rows[0].layout.name for rows in found)
    for one, other in itertools.combinations([rows for rows, _ in drawn], 2):
        assert any(abs(a.samples_s / b.samples_s - 1) > 0.009 for a, b in zip(one, other, strict=True))


def test_without_a_peak_there_are_no_times(tmp_path: Path) -> None:
    content = yaml.safe_load(FILE.read_text())
    own = {**content["devices"]["h200"], "hbm_gb": 20}
    del own["bf16_tflops"]
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"assumed": content["assumed"], "devices": {"ours": own}}))
    found = json.loads(bifrost("plan", "mllm-7b", "--gpus", "8", "--device", str(file), "--json"))
    (row,) = found["rows"]
    assert "mfu" not in row and "seconds" not in row and row["cost"] is None
    assert row["memory"]["fits"] is False
    assert any("ours has no bf16_tflops" in sentence for sentence in found["assumptions"])
    assert "MFU" not in bifrost("plan", "mllm-7b", "--gpus", "8", "--device", str(file)).split("\n- ")[0]
    with pytest.raises(RunError, match="needs step times"):
        bifrost("plan", "mllm-7b", "--gpus", "8", "--device", str(file), "--plot", str(tmp_path / "a.png"))
    file.write_text(yaml.safe_dump({"assumed": content["assumed"], "devices": {"ours": {**own, "wats": 3}}}))
    with pytest.raises(RunError, match=r"own.yaml: ours.wats: Extra"):
        find_device(str(file))
    file.write_text("devices: 3")
    with pytest.raises(RunError, match="no `devices`"):
        find_device(str(file))
    with pytest.raises(RunError, match=r"has 5 devices \(a100, "):
        find_device(str(FILE))
    with pytest.raises(RunError, match="cannot be read"):
        find_device(str(tmp_path / "missing.yaml"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "h20"), ["--device h20", "nearest is h200"]),
        (("--gpus", "8,x"), ["--gpus 8,x", "whole numbers"]),
        (("--gpus", "0"), ["--gpus 0"]),
        (("--gpus", "48"), ["global_batch 1024 does not divide over 48 GPUs", "1056"]),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(RunError) as caught:
        bifrost("plan", "mllm-7b", *arguments)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_every_device_is_whole() -> None:
    for device in load(FILE).values():
        assert device.bf16_tflops and device.hbm_gbs > 1000 and device.intra_gbs > device.inter_gbs


def test_samples_of_sources() -> None:
    """As the plan of the data takes them, without reading it."""
    from bifrost.data.mixture import MixedPlan, PlannedSource, Segment

    listed = [
        "{name: a, shards: x, weight: {0: 3, 5: 1}}",
        "{name: b, shards: y, weight: 1}",
        "{name: c, shards: z, weight: {0: 0, 8: 0.5}}",
    ]
    sizes = "global_batch=20", "micro_batch=20"
    recipe = load_recipe("tiny-mllm", ["data.shards=null", f"data.sources=[{', '.join(listed)}]", *sizes])
    segments = [Segment(0, {0: 3, 1: 1}), Segment(5, {0: 1, 1: 1}), Segment(8, {0: 2, 1: 2, 2: 1})]
    drawn = MixedPlan([PlannedSource(n, np.array([50])) for n in range(3)], segments, 20, 0)
    for batches in (3, 5, 7, 8, 12):
        found = samples_of_sources(recipe.data, 20, 20 * batches)
        exact = drawn.counts(batches)
        assert sum(found.values()) == 20 * batches
        assert all(abs(found[name] - exact.get(number, 0)) <= 1 for number, name in enumerate("abc")), batches
    assert samples_of_sources(load_recipe("tiny-mllm").data, 32, 100) == {}
    by_size = load_recipe("tiny-mllm", ["data.shards=null", "data.sources=[{name: a, shards: x, repeats: 2}]"])
    assert samples_of_sources(by_size.data, 32, 100) == {}


def test_the_share_of_editing_pairs() -> None:
    """By the weights over the whole run; the most that it can be where sizes decide it."""

    def share(*listed: str) -> float:
        data = load_recipe("tiny-mllm", ["data.shards=null", f"data.sources=[{', '.join(listed)}]"]).data
        return edited_share(data, 20, 10)

    scheduled = "{name: a, shards: x, task: editing, weight: {0: 3, 5: 1}}"
    assert share(scheduled, "{name: b, shards: y, weight: 1}") == pytest.approx((0.75 + 0.5) / 2)
    assert share("{name: a, shards: x, task: editing}", "{name: b, shards: y}") == 1
    assert share("{name: a, shards: x}", "{name: b, shards: y}") == 0
