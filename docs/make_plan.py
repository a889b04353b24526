"""Writes the figures of docs/plan.md: `python docs/make_plan.py`. A test fails when it is out of date, or when an
anchor is not within 15 %."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from bifrost.recipes import load_recipe
from bifrost.trainer.planner import Row, checkpoint_bytes, parts, plan, workload
from bifrost.trainer.planner.curves import CURVE, retention
from bifrost.trainer.planner.devices import find_device
from bifrost.trainer.planner.flux_flops import FLUX_RECOMPUTED
from bifrost.trainer.planner.layout import AS_SET, LAYOUTS, Layout
from bifrost.trainer.planner.part import ATTENTION_BACKWARD, Part
from bifrost.trainer.planner.timing import done_flops, useful_flops

PAGE = Path(__file__).with_name("plan.md")
SIZES: dict[str, dict[int, tuple[str, ...]]] = {
    "mllm-3b": {8: (), 64: ()},
    "mllm-3b-256": {256: ()},
    "mllm-7b": {8: (), 64: ()},
    "mllm-7b-256": {256: (), 512: ("global_batch=8192", "steps=6250", "optimizer.lr=2.8e-4")},
    "mllm-7b-lora": {1: (), 8: ()},
    "flux-controlnet": {8: (), 64: ()},
    "flux-controlnet-256": {256: ()},
    "flux-controlnet-lora": {1: (), 8: ()},
}
"""Recipe -> GPUs that it is for -> overrides there."""
DEVICE = "h200"
LAYERS = 28  # of the 7B model
# FLUX's blocks behind the first residual, 18 double and 38 single ones, in units of a single block that keeps the
# inputs of each operation, as a recomputed block does here.
BLOCKS = (18 * FLUX_RECOMPUTED[0] + 38 * FLUX_RECOMPUTED[1]) / FLUX_RECOMPUTED[1]


class Anchor(NamedTuple):
    """A figure from another source and the plan's own."""

    what: str
    unit: str
    theirs: float
    ours: float

    @property
    def error(self) -> float:
        return self.ours / self.theirs - 1


@cache
def model(name: str, *overrides: str) -> dict[str, Part]:
    return {part.name: part for part in parts(load_recipe(name, list(overrides)), 80)}


@cache
def controlnet(*overrides: str) -> int:
    """Parameters of a ControlNet."""
    return model("flux-controlnet", *overrides)["ControlNet"].size


def trained(name: str) -> int:
    return sum(part.size for part in model(name).values() if part.gradient == "trained")


def counts() -> list[Anchor]:
    """Parameters, which must be equal."""
    smaller = "backbone.path=Qwen/Qwen2.5-VL-3B-Instruct"
    seven, three, flux = model("mllm-7b"), model("mllm-3b"), model("flux-controlnet")
    output = 152_064 * 3_584
    stock = controlnet() - 167_007_232 - 11_013_120 + 199_680
    return [
        Anchor("stage 1, 7B, trained", "", 6_539_391_488, trained("mllm-7b")),
        Anchor("stage 1, 3B, trained", "", 2_779_496_448, trained("mllm-3b")),
        Anchor("Qwen2.5-VL-7B without its output layer", "", 8_292_166_656 - output, frozen(seven)),
        Anchor("Qwen2.5-VL-3B", "", 3_754_622_976, frozen(three)),
        Anchor("vision encoder, 7B / 3B", "", 676_550_144, vision(seven).size),
        Anchor("", "", 668_684_288, vision(three).size),
        Anchor("ControlNet 4 + 1, 7B latents", "", 1_771_186_432, trained("flux-controlnet")),
        Anchor("ControlNet 4 + 1, 3B latents", "", 1_653_998_848, controlnet(smaller)),
        Anchor("ControlNet 1 + 4", "", 1_176_467_968, controlnet("controlnet.double=1", "controlnet.single=4")),
        Anchor("ControlNet 4 + 0", "", 1_620_154_368, controlnet("controlnet.single=0")),
        Anchor("FLUX.1-dev", "", 11_901_408_320, flux["FLUX"].size),
        Anchor("T5-XXL encoder", "", 4_762_310_656, flux["T5"].size),
        Anchor("CLIP-L text", "", 123_060_480, flux["CLIP"].size),
        Anchor("bytes of a stock 4 + 1 ControlNet in fp32", "B", 6_373_463_040, 4 * stock),
    ]


def vision(some: dict[str, Part]) -> Part:
    """The vision encoder with its merger."""
    return next(part for name, part in some.items() if name.startswith("vision "))


def frozen(some: dict[str, Part]) -> int:
    return sum(part.size for part in some.values() if part.gradient != "trained")


def dense(some: dict[str, Part], text: int) -> float:
    """TFLOP of the public code's formulation: both branches on all tokens, gradients through both."""
    branch, encoder, head = some["generation branch"], vision(some), some["head"]
    tokens = text + 256
    one = branch.linear * tokens / 256
    attention = branch.attention / (256 * 336) * tokens**2
    both = one * (2 + 2 + 1)  # two forward passes, weights and inputs of the trained one, inputs of the frozen one
    return (encoder.forward + both + attention * (1 + ATTENTION_BACKWARD) + head.forward + head.backward) / 1e12


def flops() -> list[Anchor]:
    seven, flux = model("mllm-7b"), model("flux-controlnet")
    branch, head, net, big = seven["generation branch"], seven["head"], flux["ControlNet"], flux["FLUX"]
    useful, text = useful_flops(seven.values()), seven["text prefix"].forward
    stage2 = useful_flops(flux.values())

    def row(what: str, theirs: float, ours: float) -> Anchor:
        return Anchor(what, "TFLOP", theirs, ours / 1e12)

    def hours(tflop: float) -> float:
        return tflop / (0.4 * 989) * 1e6 / 3600

    return [
        row("stage 1, 7B, 80 + 256 tokens: vision encoder", 1.347, vision(seven).forward),
        row("frozen prefix, forward", 1.045, text),
        row("image, linear layers, forward", 3.341, branch.linear),
        row("image, attention, forward", 0.035, branch.attention),
        row("image, head, forward", 0.007, head.forward),
        row("image, backward", 6.781, branch.backward + head.backward),
        row("routed, useful", 12.56, useful),
        row("routed, all recomputed", 15.94, done_flops(list(seven.values()), True)),
        row("routed, gradients also through the text", 13.60, useful + text),
        row("public code, 556 tokens", 38.02, 1e12 * dense(seven, 300)),
        row("public code, 336 tokens", 23.43, 1e12 * dense(seven, 80)),
        row("public code, 316 tokens", 22.11, 1e12 * dense(seven, 60)),
        Anchor("1 M samples at 40 % of 989 TFLOP/s", "GPU-h", 8.8, hours(useful / 1e12)),
        Anchor("the same, public code", "GPU-h", 26.7, hours(dense(seven, 300))),
        row("stage 2, 512 px: FLUX forward", 21.48, big.forward),
        row("of that, attention", 1.65, big.attention),
        row("FLUX, gradients of inputs", 23.96, big.backward),
        row("ControlNet 4 + 1, forward", 2.28, net.forward),
        row("ControlNet 4 + 1, backward", 4.56, net.backward),
        row("T5", 4.84, flux["T5"].forward),
        row("VAE, encoding", 1.09, flux["VAE encoder"].forward),
        row("vision encoder", 1.35, vision(flux).forward),
        row("total", 59.5, stage2),
        row("with T5 cached", 54.7, stage2 - flux["T5"].forward),
        row("recomputed, if blocks were recomputed whole", 23.8, flux["FLUX"].forward + net.forward),
        Anchor("1 M samples at 40 % of 989 TFLOP/s", "GPU-h", 41.8, hours(stage2 / 1e12)),
    ]


def bytes_of(name: str, gpus: int, layout: Layout = AS_SET, *overrides: str) -> Row:
    found = model(name, *overrides)
    return plan(list(found.values()), workload(load_recipe(name, list(overrides))), gpus, layout=layout)


def state(row: Row) -> float:
    """GB of trained weights, masters, moments and gradients."""
    return sum(row.memory.held[name] for name in ("trained weights", "masters", "moments", "gradients")) / 1e9


def memory() -> list[Anchor]:
    """Static memory; trained: the source counts 20 bytes per parameter, with a bf16 gradient next to the fp32
    one, which DeepSpeed frees."""
    whole = Layout("whole", frozen="replicated")
    found = []
    for name, what, published in (
        ("mllm-7b", "stage 1, 7B", {8: (16.35, 1.94, 15.49), 64: (2.04, 0.24, 15.49), 256: (0.51, 0.06, 15.49)}),
        ("flux-controlnet", "stage 2", {8: (4.43, 4.39, 35.09), 64: (0.55, 0.55, 35.09), 256: (0.14, 0.14, 35.09)}),
    ):
        for gpus, (train, cut, replicated) in published.items():
            row, other = bytes_of(name, gpus), bytes_of(name, gpus, whole)
            at = f"{what}, {gpus} GPUs: "
            found += [
                Anchor(at + "trained", "GB", train, state(row)),
                Anchor(at + "frozen, sharded", "GB", cut, row.memory.held["frozen weights"] / 1e9),
                Anchor(at + "frozen, replicated", "GB", replicated, other.memory.held["frozen weights"] / 1e9),
            ]
    cached = bytes_of("flux-controlnet", 8, whole, "flux.placement.text=cached").memory.held["frozen weights"]
    kept = [model("mllm-7b", "branch.max_text_tokens=80")["generation branch"], model("flux-controlnet")["FLUX"]]
    found += [
        Anchor("stage 2, frozen, replicated, text cached (the source omits only T5)", "GB", 25.57, cached / 1e9),
        Anchor("stage 1, 7B: a checkpoint's masters and moments", "GB", 78.5, _checkpoint("mllm-7b")),
        # The source's layers keep the inputs of each operation, as a recomputed layer does here.
        Anchor("activations per sample, stage 1, 7B, plain layers", "GB", 1.41, LAYERS * kept[0].layer / 1e9),
        Anchor("with activation checkpointing, prefix included", "MB", 51.4 + 4.6, kept[0].kept_recomputed / 1e6),
        Anchor("activations per sample through FLUX, plain blocks", "GB", 6.5, BLOCKS * kept[1].layer / 1e9),
        Anchor("with activation checkpointing", "GB", 0.54, kept[1].kept_recomputed / 1e9),
    ]
    return found


def _checkpoint(name: str) -> float:
    return checkpoint_bytes(list(model(name).values()), workload(load_recipe(name))) / 1e9


def traffic() -> list[Anchor]:
    """Of one pass; the source reduces in bf16, the engine in fp32, so its bytes are halved here, and it gathers all of
    the weights a second time."""
    found = []
    for name, what, theirs in (("mllm-7b", "stage 1, 7B", 39.2), ("flux-controlnet", "stage 2", 10.6)):
        row = bytes_of(name, 256, Layout("nothing stays gathered", live=0))
        own = {t.kind: t.bytes / row.passes / 1e9 for t in row.transfers}
        gathers = own["gather trained, forward"] + own["gather trained, backward"]
        found.append(
            Anchor(
                f"{what}: gathers and reduces of trained weights", "GB", theirs, gathers + own["reduce gradients"] / 2
            )
        )
    text = model("mllm-7b")["text prefix"].size * 2 * 255 / 256 / 1e9
    found.append(Anchor("stage 1, 7B: frozen text, sharded (the source omits the embedding)", "GB", 13.05, text))
    for bandwidth, node, theirs in ((50, 1, 0.78), (450, 256, 0.087)):
        device = find_device(DEVICE).model_copy(
            update={"link_efficiency": 1.0, "intra_gbs": bandwidth, "inter_gbs": bandwidth, "gpus_per_node": node}
        )
        what = f"the first of these at {bandwidth} GB/s per GPU"
        found.append(Anchor(what, "s", theirs, device.collective_s(1e9 * found[0].ours, 0, 256)))
    return found


def anchors() -> list[Anchor]:
    return [*flops(), *memory(), *traffic()]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def counts_table() -> str:
    rows = [(one.what or "…", f"{one.theirs:,.0f}", f"{one.ours:,.0f}") for one in counts()]
    return table(("parameters", "published or counted by hand", "plan"), rows)


def anchors_table() -> str:
    rows = [
        (
            one.what,
            f"{one.theirs:g} {one.unit}",
            f"{one.ours:.4g}",
            f"{one.error:+.1%}",
        )
        for one in anchors()
    ]
    return table(("", "counted by hand", "plan", "error"), rows)


def plans_table() -> str:
    rows, device = [], find_device(DEVICE)
    for name, sizes in SIZES.items():
        for gpus, overrides in sizes.items():
            recipe = load_recipe(name, list(overrides))
            row = plan(list(model(name).values()), workload(recipe), gpus, device)
            assert row.times is not None and row.fits
            rows.append(
                (
                    " ".join((name, *overrides)),
                    str(gpus),
                    f"{row.micro_batch} x {row.passes}",
                    f"{row.memory.static / 1e9:.1f} / {row.memory.peak / 1e9:.1f}",
                    f"{row.received / 1e9:.0f}",
                    f"{row.times.serial:.2f} / {row.times.as_set:.2f} / {row.times.overlapped:.2f}",
                    f"{row.times.mfu:.0%}",
                    row.times.bound,
                    f"{row.samples_s:,.0f}",
                )
            )
    heads = (
        "recipe",
        "GPUs",
        "micro x passes",
        "GB static / peak",
        "GB received per step",
        "step s: serial / as set / overlapped",
    )
    return table((*heads, "MFU", "bound by", "samples/s"), rows)


def scaling_table() -> str:
    """Throughput per GPU relative to 8 GPUs, of the recipe as it is and with one change."""
    found, recipe, device = list(model("mllm-7b-256").values()), load_recipe("mllm-7b-256"), find_device(DEVICE)

    def kept(name: str, layout: Layout = AS_SET, *overrides: str) -> tuple[str, ...]:
        changed = load_recipe("mllm-7b-256", list(overrides)) if overrides else recipe
        curve = [plan(found, workload(changed), n, device, layout, weak=True) for n in CURVE]
        return (name, f"{curve[-1].memory.peak / 1e9:.0f}", *(f"{value:.1%}" for value in retention(curve)))

    rows = [kept(layout.name, layout) for layout in LAYOUTS]
    rows += [
        kept("`zero.max_live_parameters=8000000000`", Layout("", live=8_000_000_000)),
        kept("`zero.persistence_threshold=100000`", AS_SET, "zero.persistence_threshold=100000"),
        kept("the same, frozen parts sharded", Layout("", frozen="sharded"), "zero.persistence_threshold=100000"),
    ]
    return table(("layout", "GB per GPU at 512", *(f"{n} GPUs" for n in CURVE)), rows)


TABLES: dict[str, Callable[[], str]] = {
    "counts": counts_table,
    "anchors": anchors_table,
    "plans": plans_table,
    "scaling": scaling_table,
}


def page(text: str) -> str:
    """`text` with every table between its marks replaced."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        assert found and closed, name
        text = before + begin + make() + end + after
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
