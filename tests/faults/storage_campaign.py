"""Many short runs on shards behind HTTP and S3 servers that fail at random. Each must read every sample with the
correct bytes, and the result of each training must be bitwise equal to that of one without faults.

    python tests/faults/storage_campaign.py --runs 200 --folder FOLDER --report docs/faults-storage-report.md
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import textwrap
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import faulty_server
import object_store
import ranked
import runs
import small_model
import small_shards
from bifrost.slurm.rank_env import free_port

TRAIN_EVERY = 10
"""One of so many runs is a `bifrost train`; the others read one epoch through the loader."""
STEPS = 4
PATIENCE_S = 1.0
"""Retry time of the loader runs: pauses of a tenth of the usual length, but the usual number of them."""
EXACT = ("step", "samples", "loss", "grad_norm", "lr", "data_digest")


@dataclass
class Run:
    """One run and its errors."""

    kind: str
    """read or train."""
    server: str
    """http, http without ranges, or s3."""
    late_s: float
    """Seconds for which the server was down at the start."""
    seconds: float = 0.0
    requests: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    """`bytes: …`, `lost: …` or `ended: …`."""


class StorageCampaign:
    """Shards, a fault-free training on them and the servers; `until` makes runs. folder: recreated."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.seed = folder, seed
        self.runs: list[Run] = []
        shutil.rmtree(folder, ignore_errors=True)
        self.shards = small_shards.save(folder / "shards")
        self.settings = [*small_model.settings(folder / "backbone"), f"steps={STEPS}", "checkpoint.every=2"]
        (calm,) = ranked.run(read, 1, f"{self.shards}/train-{{00000..00003}}.tar", {}, 0, 0)
        self.truth = [tuple(sample) for sample in calm.value["samples"]]
        assert len({key for key, _ in self.truth}) == len(self.truth) == 60
        (trained,) = self._train(f"{self.shards}/train-{{00000..00003}}.tar", {}, "calm")
        assert trained.code == 0, trained.err
        self.calm = ends(folder / "calm" / "tiny-mllm")
        self._stack = ExitStack()
        self._moto = self._stack.enter_context(object_store.serving())
        object_store.fill(self._moto, "bucket", self.shards)

    def close(self) -> None:
        self._stack.close()

    def until(self, count: int) -> None:
        while len(self.runs) < count:
            self.runs.append(self._run(len(self.runs)))

    def wrong(self) -> list[str]:
        return [f"run {number}: {text}" for number, run in enumerate(self.runs) for text in run.wrong]

    def _run(self, number: int) -> Run:
        chance = random.Random(f"{self.seed} {number}")
        server = chance.choice(["http", "http", "s3", "s3", "http without ranges"])
        plan = faulty_server.Plan(
            chance=chance.choice([0.05, 0.15, 0.3]),
            in_a_row=chance.choice([1, 2, 3]),
            faults=tuple(chance.sample(faulty_server.FAULTS, chance.randint(1, len(faulty_server.FAULTS)))),
            seed=number,
            ranges=server != "http without ranges",
        )
        kind = "train" if number % TRAIN_EVERY == TRAIN_EVERY - 1 else "read"
        # Below the retry time of both kinds.
        late_s = chance.choice([0.0, 0.0, 0.0, 0.3 if kind == "read" else 2.0])
        run = Run(kind, server, late_s)
        port = free_port()
        address = f"http://127.0.0.1:{port}"
        spec = "s3://bucket" if server == "s3" else address
        spec += "/train-{00000..00003}.tar"
        environment = object_store.environment(address)
        began = time.monotonic()
        stop = threading.Event()
        source = self._moto if server == "s3" else self.shards

        def serve() -> None:
            time.sleep(late_s)
            with faulty_server.serving(source, plan, port):
                stop.wait()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            if kind == "read":
                self._check_read(run, spec, environment, chance.randint(0, 1 << 30), chance.choice([0, 1, 2]))
            else:
                (trained,) = self._train(spec, environment, f"run-{number}")
                folder = self.folder / f"run-{number}"
                if trained.code != 0:
                    run.wrong.append(f"ended: code {trained.code}: {trained.err[-300:]}")
                elif (found := ends(folder / "tiny-mllm")) != self.calm:
                    run.wrong.append(f"bytes: the end differs: {found} instead of {self.calm}")
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            stop.set()
            thread.join()
        run.seconds = time.monotonic() - began
        run.requests = len(plan.asked)
        run.faults = dict(plan.fired)
        return run

    def _check_read(self, run: Run, spec: str, environment: dict[str, str], seed: int, workers: int) -> None:
        (ended,) = ranked.run(read, 1, spec, environment, seed, workers)
        if ended.value is None or ended.value["error"]:
            run.wrong.append(f"ended: {ended.value['error'] if ended.value else ended.err[-300:]}")
            return
        truth, found = dict(self.truth), [tuple(sample) for sample in ended.value["samples"]]
        run.wrong += [f"bytes: {key}" for key, content in found if truth.get(key) != content]
        times = Counter(key for key, _ in found)
        run.wrong += [f"lost: {key} was read {times[key]} times" for key in truth if times[key] != 1]
        run.wrong += [f"lost: {key} was replaced: {reason}" for key, reason in ended.value["replaced"]]

    def _train(self, spec: str, environment: dict[str, str], name: str) -> list[ranked.Rank]:
        overrides = [*self.settings, f"data.shards={spec}", "data.workers=1"]
        arguments = runs.arguments(self.shards, self.folder / name, *overrides)
        return ranked.run(train, 1, environment, arguments)


def read(spec: Path | str, environment: dict[str, str], seed: int, workers: int) -> dict:
    """Read one epoch of shards through the loader: keys and content hashes in order, or the error."""
    from bifrost.data import DataError, Loader, LoaderSettings, Plan, Share, open_dataset, retry

    os.environ.update(environment)
    retry.PATIENCE_S = PATIENCE_S
    samples, replaced = [], []
    try:
        dataset = open_dataset(str(spec))
        plan = Plan(dataset.samples_per_shard, seed, shuffle_window=2)
        loader = Loader(
            dataset,
            plan,
            _hashes,
            Share(0, 1, 4, 4),
            range(len(dataset) // 4),
            LoaderSettings((64,), workers),
        )
        for batch in loader:
            samples += zip(batch.keys, batch.arrays["hashes"], strict=True)
            replaced += batch.replaced
    except DataError as error:
        return {"samples": samples, "replaced": replaced, "error": str(error)}
    return {"samples": samples, "replaced": replaced, "error": None}


def _hashes(items: list) -> dict:
    """Hashes of the model's inputs: pixels and caption."""
    return {"hashes": [hashlib.sha256(item.image.tobytes() + item.caption.encode()).hexdigest() for item in items]}


def train(environment: dict[str, str], arguments: list[str]) -> None:
    """Run `bifrost` with these environment variables."""
    os.environ.update(environment)
    ranked.command(arguments)


def ends(run: Path) -> dict:
    """The result of a training: its lines without times, and hashes of the last checkpoint's tensors."""
    last = sorted((run / "checkpoints").iterdir())[-1]
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(last.glob("*.safetensors"))}
    return {
        "lines": [{name: line.get(name) for name in EXACT} for line in runs.steps(run)],
        "checkpoint": {last.name: files},
    }


def page(campaign: StorageCampaign, asked: int, hardware: str) -> str:
    """The report in Markdown."""
    made = campaign.runs
    wrong = Counter(text.split(": ")[1] for text in campaign.wrong())
    faults = sum((Counter(run.faults) for run in made), Counter())
    setting = f"""
        {time.strftime("%Y-%m-%d")}, {hardware}: {len(made)} runs on 60 samples in four shards, behind an HTTP server
        on loopback or moto's S3 server behind a proxy. The kinds and frequency of faults, and whether the server is
        down at first, are random for each run; no request fails more than three times in a row. A run reads one epoch
        through the loader with up to two worker processes and pauses of a tenth of the usual length, or is a `bifrost
        train` of {STEPS} steps with the usual pauses.
    """
    check = """
        Every sample has to be read once, with the correct pixels and caption. The lines (loss, gradient norm, digest)
        and the last checkpoint of every training have to be bitwise equal to those of one on local files.
    """
    kinds = [
        (
            f"{server}, {kind}",
            str(len(chosen)),
            f"{sum(run.requests for run in chosen):,}",
            f"{sum(sum(run.faults.values()) for run in chosen):,}",
            str(sum(run.late_s > 0 for run in chosen)),
        )
        for server in ("http", "http without ranges", "s3")
        for kind in ("read", "train")
        if (chosen := [run for run in made if (run.server, run.kind) == (server, kind)])
    ]
    found = [
        ("wrong bytes", str(wrong["bytes"])),
        ("lost samples", str(wrong["lost"])),
        ("runs ended that could have continued", str(wrong["ended"])),
        ("runs", str(len(made))),
        ("requests, of which failed on purpose", f"{sum(r.requests for r in made):,}, {sum(faults.values()):,}"),
        ("minutes", f"{sum(run.seconds for run in made) / 60:.0f}"),
    ]
    rows = [(f"`{name}`", f"{faults[name]:,}") for name in faulty_server.FAULTS]
    return "\n".join(
        [
            "# The campaign of failing storage\n",
            f"```text\nmake faults-storage N={asked}\n```\n",
            *(textwrap.fill(" ".join(text.split()), 130, break_on_hyphens=False) + "\n" for text in (setting, check)),
            "## Results\n",
            _table(("", ""), found),
            *(f"- {text}\n" for text in campaign.wrong()[:20]),
            "## Runs\n",
            _table(("server, kind", "runs", "requests", "faults", "down at the start"), kinds),
            "## Faults\n",
            _table(("fault", "times"), rows),
            faulty_server.FAULTS_MEAN,
        ]
    )


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("runs/faults-storage"))
    parser.add_argument("--report", type=Path)
    parser.add_argument("--hardware", default="this machine")
    options = parser.parse_args()
    campaign = StorageCampaign(options.folder.absolute())
    try:
        while len(campaign.runs) < options.runs:
            campaign.until(len(campaign.runs) + 1)
            run = campaign.runs[-1]
            print(json.dumps({"run": len(campaign.runs), **vars(run)}), flush=True)
    finally:
        campaign.close()
    text = page(campaign, options.runs, options.hardware)
    (options.report or options.folder / "report.md").write_text(text)
    print(text)
    raise SystemExit(bool(campaign.wrong()))


if __name__ == "__main__":
    main()
