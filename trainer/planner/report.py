"""A plan as tables and as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from ..errors import RunError
from . import NODE, Row, as_json, checkpoint_bytes, checkpoint_s, cost, plan
from .base_loss import PlannedTexts
from .buckets import PlannedBucket
from .curves import CURVE, curves, retention
from .devices import Device
from .layout import LAYOUTS, Workload
from .optimizer import state_bytes
from .part import Part
from .timing import done_flops, useful_flops


class Prompts(NamedTuple):
    """Tokens of stage 1's prompts, on average and at most, and the share of editing pairs among the samples."""

    mean: float
    longest: float
    edited: float


class Report:
    """The plan of one recipe for several numbers of GPUs, with alternative layouts.

    Numbers of GPUs that do not divide the global batch are skipped, with the reason in `left_out`; RunError if none
    remains.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        work: Workload,
        gpus: Sequence[int],
        device: Device | None,
        prompts: Prompts | None,
        previews: float = 0.0,
        caches: Mapping[str, int] = {},
    ) -> None:
        """name: of the recipe. prompts: None in stage 2. previews: see `plan`. caches: kind -> bytes per sample."""
        self.caches = dict(caches)
        self.name, self.parts, self.work, self.device, self.prompts = name, parts, work, device, prompts
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        for count in gpus:
            try:
                self.rows.append(plan(parts, work, count, device, previews=previews))
            except RunError as error:
                self.left_out.append(str(error))
        if not self.rows:
            raise RunError(self.left_out[0])
        most = max(row.gpus for row in self.rows)
        self.choices = [plan(parts, work, most, device, layout, previews=previews) for layout in LAYOUTS]
        self.curves = curves(parts, work, device)

    @property
    def timed(self) -> bool:
        return self.rows[0].times is not None

    def assumptions(self) -> list[str]:
        """The assumptions of the figures, one sentence each."""
        sentences = [
            "All figures are predicted; none was measured.",
            "GB are 10^9 bytes. Activations: what autograd keeps of transformers' and diffusers' own layers,"
            " attention without a score matrix.",
            "Not counted: allocator fragmentation beyond usable_memory, stragglers, stalls of file systems, start-up,"
            " copies of offloaded parts, reads of cached ones.",
        ]
        if self.prompts is not None:
            mean, longest, edited = self.prompts
            sentences.append(
                f"Prompts of {mean:g} tokens (--text-tokens), packed; memory for the longest, {longest:g} tokens"
                " (branch.max_text_tokens)."
            )
            if edited:
                sentences.append(
                    f"{100 * edited:.3g} % of the samples are editing pairs, with the latents of a source image in"
                    " addition; memory for pairs alone."
                )
        device = self.device
        if device is None:
            sentences.append(f"No --device: no times; nodes of {NODE} GPUs.")
        elif device.bf16_tflops is None:
            sentences.append(f"{device.name} has no bf16_tflops: no times and no MFU.")
        else:
            sentences += [
                f"{device.name}: {device.bf16_tflops:g} TFLOP/s, of which linear layers reach"
                f" {device.gemm_efficiency:.0%} and attention {device.attention_efficiency:.0%};"
                f" {device.hbm_gb:g} GB, of which {device.usable_memory:.0%} are used, less"
                f" {device.runtime_gb:g} GB for the runtime.",
                f"Links: {device.intra_gbs:g} GB/s per GPU in nodes of {device.gpus_per_node},"
                f" {device.inter_gbs:g} GB/s per GPU between nodes, {device.link_efficiency:.0%} of both reached; rings"
                f" of {device.base_latency_us:g} us and {device.intra_latency_us:g} or {device.inter_latency_us:g} us"
                f" per hop, small messages of {device.small_base_latency_us:g}, {device.small_intra_latency_us:g} and"
                f" {device.small_inter_latency_us:g} us.",
                f"Data: {self.work.workers} loader processes per GPU, {device.loader_samples_s:g}"
                " samples/s each."
                f" Storage: {device.storage_node_gbs:g} GB/s per node, {device.storage_gbs:g} GB/s in total."
                f" Energy: {device.watts:g} W per GPU, nothing else.",
                "A step as the recipe has it: prefetched gathers overlap computation, reduces only with"
                " zero.overlap_comm, the loader overlaps everything.",
            ]
        return sentences

    def as_json(
        self,
        samples: int,
        sources: Mapping[str, int] = {},
        buckets: Sequence[PlannedBucket] = (),
        texts: Sequence[PlannedTexts] = (),
    ) -> dict[str, Any]:
        """sources, buckets, texts: see `show`."""
        size = checkpoint_bytes(self.parts, self.work)
        rows = []
        for row in self.rows:
            found = as_json(row)
            if self.device is not None:
                found["cost"] = cost(row, self.device, samples)
                found["checkpoint_s"] = checkpoint_s(size, row.gpus, self.device)
            rows.append(found)
        return {
            "predicted": True,
            "recipe": self.name,
            "device": self.device.model_dump(mode="json") if self.device else None,
            "assumptions": self.assumptions(),
            "samples": samples,
            "source_samples": dict(sources),
            "buckets": [bucket.as_json() for bucket in buckets],
            "base_loss": [each.as_json() for each in texts],
            "parameters": {
                "trained": sum(part.size for part in self.parts if part.gradient == "trained"),
                "frozen": sum(part.size for part in self.parts if part.gradient != "trained"),
            },
            "flops_per_sample": {
                "useful": useful_flops(self.parts),
                "with_recomputation": done_flops(self.parts, self.work.recomputed),
                "parts": {
                    part.name: {
                        "gradient": part.gradient,
                        "place": part.place,
                        "parameters": part.size,
                        "forward": part.forward,
                        "attention": part.attention,
                        "backward": part.backward,
                        "recomputed": part.recomputed if self.work.recomputed else 0.0,
                    }
                    for part in self.parts
                },
            },
            "activation_bytes_per_sample": {
                "kept": sum(part.kept for part in self.parts),
                "kept_with_checkpointing": sum(part.kept_recomputed for part in self.parts),
            },
            "optimizer": {"name": self.work.optimizer, "state_bytes": state_bytes(self.parts, self.work.optimizer)},
            "checkpoint_bytes": size,
            "cache_bytes_per_sample": self.caches,
            "rows": rows,
            "left_out": self.left_out,
            "choices": [as_json(row) for row in self.choices],
            "weak_scaling": [[as_json(row) for row in curve] for curve in self.curves],
        }

    def show(
        self,
        console: Console,
        samples: int,
        sources: Mapping[str, int] = {},
        buckets: Sequence[PlannedBucket] = (),
        texts: Sequence[PlannedTexts] = (),
    ) -> None:
        """sources: samples of each source among the `samples`, if the recipe decides them. buckets: of the images.
        texts: the understanding sources."""
        size = checkpoint_bytes(self.parts, self.work)
        console.print(f"{self.name}, predicted", style="bold")
        console.print(self._parts())
        kept, recomputed = sum(p.kept for p in self.parts), sum(p.kept_recomputed for p in self.parts)
        console.print(
            f"activations kept per sample: {_gb(kept)} GB, with activation checkpointing {_gb(recomputed)} GB"
            f" ({'on' if self.work.recomputed else 'off'} in the recipe). A checkpoint: {_gb(size)} GB.",
        )
        if buckets:
            title = "Buckets; FLOPs and times elsewhere are of their mean"
            heads = ("shape", "patch latents", "share", "TFLOP per sample", "")
            console.print(_table(title, heads, [bucket.cells() for bucket in buckets]))
        if sources:
            shares = (f"{name} {count:,} ({count / samples:.4g})" for name, count in sources.items())
            console.print(f"{samples:,} samples by source, with their share: {', '.join(shares)}.")
        for each in texts:
            console.print(str(each))
        state = state_bytes(self.parts, self.work.optimizer)
        each = state / sum(part.size for part in self.parts if part.gradient == "trained")
        console.print(f"optimizer {self.work.optimizer}: {_gb(state)} GB of state, {each:.3g} bytes per parameter.")
        for kind, each in self.caches.items():
            console.print(f"cache of kind {kind}: {each / 1e6:.3g} MB per sample of the data, next to its shards.")
        console.print(self._memory())
        console.print(self._traffic())
        if self.timed:
            console.print(self._times(samples, size))
        console.print(self._choices())
        if self.timed:
            console.print(self._scaling())
        for row in self.rows:
            if row.micro_batch != self.work.micro_batch:
                console.print(
                    f"{row.gpus} GPUs need micro_batch={row.micro_batch}: with the recipe's {self.work.micro_batch},"
                    f" global_batch {self.work.global_batch} does not divide over them.",
                )
        for sentence in [*(f"Skipped: {reason}" for reason in self.left_out), *self.assumptions()]:
            console.print(f"- {sentence}", soft_wrap=True)

    def _parts(self) -> Table:
        again = self.work.recomputed
        rows = [
            (
                part.name,
                {"none": "frozen", "through": "frozen, gradients pass", "trained": "trained"}[part.gradient],
                part.place,
                f"{part.size:,}",
                *(f"{value / 1e12:.3f}" for value in (part.forward, part.backward, again * part.recomputed)),
            )
            for part in self.parts
        ]
        useful, done = useful_flops(self.parts), done_flops(self.parts, self.work.recomputed)
        rows.append(("useful / done", "", "", "", f"{useful / 1e12:.2f}", "", f"{done / 1e12:.2f}"))
        heads = ("part", "", "place", "parameters", "forward", "backward", "again")
        return _table("TFLOP per sample", heads, rows)

    def _memory(self) -> Table:
        """Memory with a column per number of GPUs."""
        names = dict.fromkeys(name for row in self.rows for name in (*row.memory.held, *row.memory.per_pass))
        lines: list[tuple[str, ...]] = []
        for name in names:
            values = [row.memory.held.get(name, row.memory.per_pass.get(name, 0.0)) for row in self.rows]
            if any(values):
                lines.append((("" if name in self.rows[0].memory.held else "+ ") + name, *map(_gb, values)))
        if any(row.memory.encoded_sample for row in self.rows):
            values = [row.memory.encoding["encoder at work"] for row in self.rows]
            lines.append(("+ or before: vision encoder", *map(_gb, values)))
        if any(row.memory.previews for row in self.rows):
            lines.append(("+ previews, rank 0", *(_gb(row.memory.previews) for row in self.rows)))
        lines.append(("held permanently", *(_gb(row.memory.static) for row in self.rows)))
        lines.append(("peak", *(_gb(row.memory.peak) for row in self.rows)))
        if self.device:
            lines.append(("fits", *("yes" if row.fits else "NO" for row in self.rows)))
            lines.append(("largest micro_batch", *(str(row.largest_micro_batch) for row in self.rows)))
        return _table("GB per GPU", ("", *(f"{row.gpus} GPUs" for row in self.rows)), lines)

    def _traffic(self) -> Table:
        kinds = dict.fromkeys((t.kind, t.scope) for row in self.rows for t in row.transfers)
        lines: list[tuple[str, ...]] = []
        for kind, scope in kinds:
            found = [[t for t in row.transfers if (t.kind, t.scope) == (kind, scope)] for row in self.rows]
            name = kind + (" (within a node)" if scope == "node" else "")
            lines.append((name, *(f"{_gb(t[0].bytes)} in {t[0].count}" if t else "-" for t in found)))
        lines.append(("received", *(_gb(row.received) for row in self.rows)))
        return _table("GB per GPU and step, collectives", ("", *(f"{row.gpus} GPUs" for row in self.rows)), lines)

    def _times(self, samples: int, size: int) -> Table:
        assert self.device is not None
        lines: list[tuple[str, ...]] = []
        for row in self.rows:
            times, spent = row.times, cost(row, self.device, samples)
            assert times is not None and spent is not None
            lines.append(
                (
                    str(row.gpus),
                    f"{row.micro_batch} x {row.passes}",
                    *(f"{s:.3f}" for s in (times.compute, times.ahead + times.behind, times.data)),
                    *(f"{s:.3f}" for s in (times.serial, times.as_set, times.overlapped)),
                    f"{times.mfu:.1%} / {times.hfu:.1%}",
                    times.bound,
                    f"{row.samples_s:.0f}",
                    f"{checkpoint_s(size, row.gpus, self.device):.1f}",
                    f"{spent['gpu_hours']:,.0f}",
                    f"{spent['energy_mwh']:.2f}",
                )
            )
        heads = ("GPUs", "micro x passes", "compute s", "links s", "data s", "step, serial", "step, as set")
        heads += ("step, overlapped", "MFU / HFU", "bound by", "samples/s", "checkpoint s", "GPU-h", "MWh")
        return _table(f"Time on {self.device.name}; GPU-hours and energy for {samples:,} samples", heads, lines)

    def _choices(self) -> Table:
        lines: list[tuple[str, ...]] = []
        for row in self.choices:
            held, copies = row.memory.held, {**row.memory.held, **row.memory.per_pass}
            line = (
                row.layout.name,
                _gb(
                    held["frozen weights"] + sum(copies[f"second copy (hpZ), {kind}"] for kind in ("frozen", "trained"))
                ),
                _gb(row.memory.static),
                _gb(sum(t.bytes for t in row.transfers if t.scope == "all")),
                _gb(sum(t.bytes for t in row.transfers if t.scope == "node")),
            )
            lines.append((*line, f"{row.times.as_set:.3f}", f"{row.times.mfu:.1%}") if row.times else line)
        heads: tuple[str, ...] = ("what if", "frozen + copy GB", "held GB", "GB over all", "GB within nodes")
        heads += ("step s", "MFU") if self.timed else ()
        return _table(f"Other layouts of {self.choices[0].gpus} GPUs", heads, lines)

    def _scaling(self) -> Table:
        lines = [(curve[0].layout.name, *(f"{value:.1%}" for value in retention(curve))) for curve in self.curves]
        title = (
            f"Throughput per GPU relative to {CURVE[0]} GPUs, micro_batch {self.work.micro_batch}, one pass per step"
        )
        return _table(title, ("", *(f"{count} GPUs" for count in CURVE)), lines)


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f}"


def _table(title: str, heads: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left")
    for at, head in enumerate(heads):
        table.add_column(head, justify="left" if at == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table
