"""`bifrost bench checkpoint`: save and load of one sharded state in our format, DeepSpeed's, and torch DCP's.

All formats save and load the same tensors, masters and both moments of AdamW under ZeRO-3, in the same processes and on
the same file system, in rotating order. Every load is compared with the saved values bit for bit. Before each save all
earlier writes are flushed; one save is timed alone, another with passes of a step after it, as in training. A load
is timed once with the files in the page cache, as the save leaves them, and once after they were dropped from it.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...data.atomic import sync
from ...recipes import BatchSplit
from ...recipes.schema import Optimizer, Zero
from ..checkpoint.state import capture
from ..distributed.process_group import Ranks, join
from ..errors import RunError
from ..optim.deepspeed_config import deepspeed_config
from ..optim.engine import Engine, import_deepspeed, partitioned
from ..stages import StageModel
from .checkpoint_formats import Dcp, DcpAsync, DeepSpeed, Format, Own
from .checkpoint_table import show
from .machine import machine, write_record

WIDTH = 2048
"""Weights are square, of this width."""
STATE_BYTES = 12
"""Per parameter: master and two moments, fp32."""
PASSES_S = 1.0
"""Seconds, about, of the passes that follow a save, before the state changes."""
LEAST_STALL_S = 1e-3
"""Shorter ones cannot be distinguished from the noise of the passes."""
MEASURES = ("call_s", "stall_s", "save_s", "load_s", "cold_load_s")


def bench(size: str, rounds: int, folder: Path, out: Path | None) -> int:
    """Measure on this rank; rank 0 prints the table and writes `out`/checkpoint.json. Returns the exit code.

    size: bytes of the state of all ranks, such as 768MiB. folder: on the storage to measure.
    """
    ranks = join()
    engine = _engine(parse_size(size), ranks)
    group = ranks.background_group()
    formats = [
        Own(engine, ranks, group),
        DeepSpeed(engine),
        Dcp(engine, ranks, dist.group.WORLD),
        DcpAsync(engine, ranks, dist.group.WORLD, keep=False),
        DcpAsync(engine, ranks, dist.group.WORLD, keep=True),
    ]
    expected, passes = Expected(engine), Passes(ranks.device)
    place = folder / ".bench-checkpoint"
    rows: list[dict[str, dict[str, float]]] = []
    try:
        for number in range(rounds + 1):  # the first is not measured
            turn = number % len(formats)
            found = {
                each.name: measure(each, place, ranks, expected, passes) for each in formats[turn:] + formats[:turn]
            }
            if number:
                rows.append({each.name: found[each.name] for each in formats})
    finally:
        if ranks.first:
            shutil.rmtree(place, ignore_errors=True)
    if ranks.first:
        record = {
            "bytes": expected.bytes * ranks.size,
            "ranks": ranks.size,
            "rounds": rounds,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": machine("deepspeed"),
            "formats": {each.name: {"flushed": each.flushed, "verified": each.verified} for each in formats},
            "seconds": {
                each.name: {key: [row[each.name][key] for row in rows] for key in MEASURES} for each in formats
            },
            "ratios": ratios(rows),
        }
        show(record)
        if out:
            write_record(out, "checkpoint.json", record)
    dist.destroy_process_group()  # its threads may abort a process that exits while they run
    return 0


def parse_size(text: str) -> int:
    """The bytes of `768MiB` or `4GiB`. Raises RunError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(MiB|GiB)", text)
    least = STATE_BYTES * WIDTH
    size = int(float(match[1]) * 2 ** {"MiB": 20, "GiB": 30}[match[2]]) if match else 0
    if size < least:
        raise RunError(f"--size {text}: give the bytes of the state, such as 768MiB or 4GiB")
    return size


def measure(one: Format, place: Path, ranks: Ranks, expected: Expected, passes: Passes) -> dict[str, float]:
    """Save twice and load twice; seconds of the slowest rank. RunError if a load differs from what was saved."""
    if ranks.first:
        shutil.rmtree(place, ignore_errors=True)
        for name in ("alone", "training"):
            (place / name).mkdir(parents=True)
    expected.fill()
    spent: dict[str, float] = {}
    with one.ready():
        _settled(ranks)
        begun = time.perf_counter()
        saving = one.save(place / "alone")
        spent["call_s"] = time.perf_counter() - begun
        saving.finish()
        spent["save_s"] = time.perf_counter() - begun
        _settled(ranks)
        undisturbed = passes.run()
        begun = time.perf_counter()
        saving = one.save(place / "training")
        passes.run()
        saving.await_copy()
        spent["stall_s"] = max(LEAST_STALL_S, time.perf_counter() - begun - undisturbed)
        saving.finish()
    gc.collect()
    for key, cold in (("load_s", False), ("cold_load_s", True)):
        expected.clear()
        _settled(ranks)
        if cold and ranks.first:
            drop_from_page_cache(place)
        ranks.barrier()
        begun = time.perf_counter()
        one.load(place / "training")
        spent[key] = time.perf_counter() - begun
        if not all(ranks.gather(expected.holds())):
            raise RunError(f"bench checkpoint: {one.name} loaded other values than were saved")
    return {key: max(each[key] for each in ranks.gather(spent)) for key in MEASURES}


def ratios(rows: Sequence[dict[str, dict[str, float]]]) -> dict[str, list[float]]:
    """Of each round: our save over DeepSpeed's and DCP's, our load over theirs, warm and cold, and call and stall of
    DCP's async_save over ours."""

    def over(key: str, other: str) -> list[float]:
        return [row[Own.name][key] / row[other][key] for row in rows]

    return {
        "save / DeepSpeed's": over("save_s", DeepSpeed.name),
        "save / DCP's": over("save_s", Dcp.name),
        "load / DeepSpeed's": over("load_s", DeepSpeed.name),
        "load / DCP's": over("load_s", Dcp.name),
        "cold load / DeepSpeed's": over("cold_load_s", DeepSpeed.name),
        "cold load / DCP's": over("cold_load_s", Dcp.name),
        **{
            f"{what} of {name} / ours": [row[name][f"{what}_s"] / row[Own.name][f"{what}_s"] for row in rows]
            for what in ("call", "stall")
            for name in rows[0]
            if name.startswith("DCP async")
        },
    }


class Passes:
    """Matrix products of a fixed number: the passes of a step, which do not change the state."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._square = torch.full((1024, 1024), 1e-3, device=device)
        self._count = 1
        self.run()
        self._count = 8
        self._count = max(1, round(8 * PASSES_S / self.run()))

    def run(self) -> float:
        """The seconds that they took."""
        begun = time.perf_counter()
        for _ in range(self._count):
            torch.mm(self._square, self._square)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - begun


class Expected:
    """The values of an engine's state, a function of slot and parameter, so that no copy of them is held."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._base = torch.randn(max(t.numel() for t in self._tensors()), generator=torch.Generator().manual_seed(0))
        self._made = torch.empty_like(self._base)

    @property
    def bytes(self) -> int:
        """Of this rank's state."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def fill(self) -> None:
        for number, tensor in enumerate(self._tensors()):
            tensor.copy_(self._values(number, tensor))

    def clear(self) -> None:
        for tensor in self._tensors():
            tensor.zero_()

    def holds(self) -> bool:
        """Whether the state has these values to the bit."""
        return all(torch.equal(tensor, self._values(number, tensor)) for number, tensor in enumerate(self._tensors()))

    def _tensors(self) -> list[Tensor]:
        # Fetched each time: DeepSpeed's load replaces the moments.
        return [tensor for held in capture(self.engine, None)[0].values() for tensor in held.values()]

    def _values(self, number: int, tensor: Tensor) -> Tensor:
        size = tensor.numel()
        return torch.add(self._base[:size], number, out=self._made[:size])


def drop_from_page_cache(folder: Path) -> None:
    """Drop the pages of all files below `folder`, which must have been flushed, from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)
            handle = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def _settled(ranks: Ranks) -> None:
    """Wait until all ranks are here and the writes of all processes are on disk."""
    ranks.barrier()
    if ranks.first:
        os.sync()
    ranks.barrier()


class _Weights(StageModel):
    """Trainable weights, which nothing uses."""

    def __init__(self, size: int) -> None:
        super().__init__()
        count = size // STATE_BYTES
        rows = [WIDTH] * (count // WIDTH**2)
        if rest := count % WIDTH**2 // WIDTH:
            rows.append(rest)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, each, bias=False) for each in rows)


def _engine(size: int, ranks: Ranks) -> Engine:
    import_deepspeed(ranks.device)
    config = deepspeed_config(BatchSplit(ranks.size, 1, ranks.size), "bf16", Zero(), 1.0)
    with partitioned(config, ranks.device):
        model = _Weights(size)
    return Engine(model, Optimizer(lr=1e-4), config, ranks)
