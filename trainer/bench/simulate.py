"""Simulation of a run on hundreds of ranks in one process: what each rank holds, reads and writes, and full coverage.

It checks the code that such a run would use: the slices of a checkpoint, the data plan, the files of a save, the reads
of a resume, the planner. No weights are allocated and no ranks are started.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...recipes import Recipe
from ..checkpoint.durable import HASH, Entry, Span
from ..checkpoint.layout import local_range, rank_file, reads, slice_size
from ..checkpoint.manifest import Manifest
from ..checkpoint.safetensors_parts import header
from ..checkpoint.shard import Payload
from ..checkpoint.verification import HEADER
from ..planner import Row, batch, open_model, parts, plan, workload
from ..planner.parameters import Parameters, named_parameters
from .machine import write_record
from .simulated_data import Broken, data, large_data

SMALLER = (2, 64)
"""Divisors of the number of ranks for resumes on fewer ranks: 512 -> 256 -> 8."""


@dataclass
class Simulation:
    """The checks: title -> figures."""

    recipe: str
    ranks: int
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def simulate(recipe: Recipe, ranks: int) -> Simulation:
    """Check partition, data, checkpoint and memory of the run on `ranks` ranks. Broken names what is not covered
    exactly once; RunError if the batch does not divide."""
    sizes = fewer(ranks)
    splits = [batch(recipe.global_batch, recipe.micro_batch, number) for number in (ranks, *sizes)]
    found = Simulation(recipe.name, ranks)
    shapes = named_parameters(open_model(recipe))
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "partition": lambda: partition(shapes, ranks),
        "data": lambda: data(recipe.data, recipe.seed, splits),
        "large data": lambda: large_data(recipe.data, recipe.seed, splits),
        "checkpoint": lambda: checkpoint(shapes, ranks, recipe.ema is not None),
        "resume": lambda: {"moves": [move(shapes.trained, a, b) for a, b in zip((ranks, *sizes), sizes, strict=False)]},
        "memory": lambda: memory(plan(parts(recipe), workload(recipe), ranks), shapes, ranks),
    }
    for title, check in checks.items():
        begun = time.perf_counter()
        found.sections[title] = check()
        found.seconds[title] = time.perf_counter() - begun
    found.sections["data"].update(micro_batch=splits[0].micro_batch, passes=splits[0].passes)
    return found


def fewer(ranks: int) -> list[int]:
    """The smaller numbers of ranks on which a run resumes."""
    return [ranks // by for by in SMALLER if ranks % by == 0 and ranks // by]


def partition(shapes: Parameters, ranks: int) -> dict[str, Any]:
    """Check that every element of every parameter is on exactly one rank."""
    found: dict[str, Any] = {}
    for kind, held in (("trained", shapes.trained), ("frozen", shapes.frozen)):
        padding = elements = 0
        own = np.zeros(ranks, dtype=np.int64)
        for name, shape in held.items():
            numel, size = math.prod(shape), slice_size(math.prod(shape), ranks)
            end = 0
            for rank in range(ranks):
                lo, hi = local_range(numel, rank, ranks)
                if lo != end or not 0 <= hi - lo <= size:
                    raise Broken(f"{name}: rank {rank} of {ranks} holds [{lo}, {hi}), the one before ends at {end}")
                own[rank] += hi - lo
                end = hi
            if end != numel:
                raise Broken(f"{name}: the slices of {ranks} ranks end at {end} of {numel} elements")
            elements += numel
            padding += size * ranks - numel
        least, most = int(own.min()), int(own.max())
        found[kind] = {
            "parameters": len(held),
            "elements": elements,
            "per_rank_least": least,
            "per_rank_most": most,
            "padding": padding,
            "padding_share": padding / max(elements, 1),
        }
    return found


def checkpoint(shapes: Parameters, ranks: int, ema: bool) -> dict[str, Any]:
    """The files of a save: bytes per rank, in total, and of the manifest."""
    slots = ("master", "exp_avg", "exp_avg_sq", *(("ema",) if ema else ()))
    files, saved = {}, dict.fromkeys(shapes.trained, 0)
    known: dict[tuple[int, ...], Entry] = {}  # a file's spans depend on its slices' lengths, equal on most ranks
    for rank in range(ranks):
        ranges = (local_range(math.prod(shape), rank, ranks) for shape in shapes.trained.values())
        lengths = tuple(hi - lo for lo, hi in ranges)
        if lengths not in known:
            pieces = _content(shapes.trained, slots, rank, ranks).pieces()
            # Only the header: the tensors do not exist.
            spans = {HEADER: len(header(pieces)), **dict.fromkeys(slots, 0)}
            for piece in pieces:
                spans[piece.name.partition("/")[0]] += piece.size
            known[lengths] = _entry(spans)
        files[rank_file(rank)] = known[lengths]
        for name, length in zip(saved, lengths, strict=True):
            saved[name] += length
    for name, shape in shapes.trained.items():
        if saved[name] != math.prod(shape):
            raise Broken(f"{name}: {ranks} files hold {saved[name]} of its {math.prod(shape)} elements")
    metadata = _content(shapes.trained, slots, 0, ranks).metadata()
    manifest = Manifest(step=1, time=0.0, files=files, **metadata._asdict()).encode()
    return {
        "slots": list(slots),
        "files": ranks + 2,  # state and manifest
        "rank_bytes_least": min(entry.size for entry in files.values()),
        "rank_bytes_most": max(entry.size for entry in files.values()),
        "bytes": sum(entry.size for entry in files.values()),
        "manifest_bytes": len(manifest),
    }


def _entry(sizes: dict[str, int]) -> Entry:
    """A file with spans of these sizes."""
    ends = list(itertools.accumulate(sizes.values()))
    parts = zip(sizes.items(), ends, strict=True)
    return Entry(ends[-1], {name: Span(end - size, size, f"{HASH}:{0:032x}") for (name, size), end in parts})


def _content(shapes: dict[str, tuple[int, ...]], slots: Sequence[str], rank: int, ranks: int) -> Payload:
    def slices() -> dict[str, torch.Tensor]:
        held = {}
        for name, shape in shapes.items():
            lo, hi = local_range(math.prod(shape), rank, ranks)
            held[name] = torch.empty(hi - lo, device="meta")
        return held

    own = slices()
    return Payload(rank, ranks, {slot: own for slot in slots}, shapes, {}, {})


def move(shapes: dict[str, tuple[int, ...]], before: int, after: int) -> dict[str, Any]:
    """A resume on `after` ranks of a save by `before` ranks: what each new rank reads of one slot."""
    files, elements, count = [], [], 0
    for rank in range(after):
        opened: set[int] = set()
        own = 0
        for name, shape in shapes.items():
            numel = math.prod(shape)
            lo, hi = local_range(numel, rank, after)
            at = 0
            for piece in reads(numel, lo, hi, before):
                first, last = local_range(numel, piece.rank, before)
                if piece.at != at or first + piece.start != lo + at or first + piece.stop > last:
                    raise Broken(f"{name}: rank {rank} of {after} reads the wrong piece of rank {piece.rank}'s file")
                at += piece.stop - piece.start
                opened.add(piece.rank)
                count += 1
            if at != hi - lo:
                raise Broken(f"{name}: rank {rank} of {after} reads {at} of its {hi - lo} elements")
            own += at
        files.append(len(opened))
        elements.append(own)
    if sum(elements) != sum(map(math.prod, shapes.values())):
        raise Broken(f"{after} ranks read {sum(elements)} elements in total")
    return {
        "from": before,
        "to": after,
        "files_per_rank_most": max(files),
        "bytes_per_rank_most": 4 * max(elements),
        "pieces": count,
    }


def memory(row: Row, shapes: Parameters, ranks: int) -> dict[str, Any]:
    """The plan's figures; checks that its slices equal those of the checkpoint."""
    own = sum(slice_size(math.prod(shape), ranks) for shape in shapes.trained.values())
    if row.memory.held["masters"] != 4 * own:
        raise Broken(f"the plan holds {row.memory.held['masters']:.0f} bytes of masters per rank, slices are {4 * own}")
    return {
        "held_bytes": row.memory.static,
        "peak_bytes": row.memory.peak,
        "masters_bytes": row.memory.held["masters"],
        "received_bytes_per_step": row.received,
    }


def report(recipe: Recipe, ranks: int, out: Path) -> Simulation:
    """Simulate, print, and write `simulated-N.json` to `out`."""
    found = simulate(recipe, ranks)
    write_record(out, f"simulated-{ranks}.json", {"simulated": True, **dataclasses.asdict(found)})
    print(f"{recipe.name} on {ranks} ranks, simulated in one process: nothing was run; all is covered once.")
    for title, lines in format_simulation(found).items():
        print(f"{title} ({found.seconds[title]:.1f} s)")
        for line in lines:
            print(f"  {line}")
    return found


def format_simulation(found: Simulation) -> dict[str, list[str]]:
    """Every section as lines of text."""
    s, ranks = found.sections, found.ranks
    cut = [
        f"{kind}: {p['elements']:,} elements in {p['parameters']} parameters, {p['per_rank_least']:,} to"
        f" {p['per_rank_most']:,} per rank; padding {p['padding']:,} ({p['padding_share']:.2e})"
        for kind, p in s["partition"].items()
    ]
    d, c, m = s["data"], s["checkpoint"], s["memory"]
    resumed = ", ".join(map(str, d["resumed_on"]))
    order = [
        f"{d['samples']:,} samples of {d['shards']} imaginary shards, {d['steps']} steps of {ranks} ranks x"
        f" {d['micro_batch']} x {d['passes']}, {d['readers']:,} reading processes: every sample once per epoch",
        f"a step reads at most {d['shards_per_step_most']} shards",
    ]
    if resumed:
        order.append(f"resumed at step {d['resumed_at']} on {resumed} ranks: the same global batches")
    g = s["large data"]
    large = [
        f"{g['samples']:,} samples of {g['shards']:,} imaginary shards, {g['steps']:,} steps; {g['checked_steps']} of"
        f" them on {', '.join(map(str, [ranks, *d['resumed_on']]))} ranks: the same samples, none twice",
        f"the plan opens in {g['opened_s'] * 1e3:.0f} ms and holds {g['plan_bytes'] / 1e6:.1f} MB per process; a step"
        f" anywhere in it takes {g['seek_s'] * 1e3:.0f} ms, at most {g['seek_s_most'] * 1e3:.0f}",
    ]
    save = [
        f"{c['files']} files, {c['bytes'] / 1e9:.2f} GB ({', '.join(c['slots'])}); each rank writes"
        f" {c['rank_bytes_least'] / 1e6:.1f} to {c['rank_bytes_most'] / 1e6:.1f} MB; manifest"
        f" {c['manifest_bytes'] / 1e3:.0f} kB"
    ]
    moves = [
        f"{one['from']} -> {one['to']} ranks: each rank opens at most {one['files_per_rank_most']} files and reads"
        f" {one['bytes_per_rank_most'] / 1e6:.1f} MB of each of {len(c['slots'])} slots; {one['pieces']:,}"
        " pieces per slot"
        for one in s["resume"]["moves"]
    ]
    needs = [
        f"predicted per GPU: {m['held_bytes'] / 1e9:.2f} GB held, {m['peak_bytes'] / 1e9:.2f} GB at peak; masters"
        f" {m['masters_bytes'] / 1e6:.1f} MB, equal to the slices"
    ]
    return {"partition": cut, "data": order, "large data": large, "checkpoint": save, "resume": moves, "memory": needs}
