"""Faults of the network between two nodes of two ranks each, in namespaces of this machine. Every run must detect the
fault or outlast it, and its result must be bitwise equal to that of an undisturbed run.

    python tests/faults/network_campaign.py --folder FOLDER --report docs/faults-network-report.md

An interrupted campaign resumes in the same folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ranked
import runs
import slurm_job
import small_shards
import two_nodes
from bifrost.recipes import load_recipe
from bifrost.recipes.schema import Watchdog
from bifrost.slurm.job import RECIPE
from bifrost.slurm.rank_env import FIRST_PORT, PORTS
from cable import Link
from slurm_job import SlurmJob
from two_nodes import TwoNodes

STEPS, SAVE_EVERY, AT, FAULTY = 24, 8, 10, 8
"""Steps of a run, steps between saves, the step after which its network fails, and steps for which it is slow."""
EXACT = ("step", "samples", "loss", "grad_norm", "lr", "data_digest", "skipped_steps")
EPHEMERAL = (32768, 60999)
"""Linux's ports for connections without a fixed one, such as gloo's."""
MARGIN_S = 60.0
"""Seconds beyond a timeout of the product in which the run must have ended."""


@dataclass
class Found:
    """What a run did with a fault. Seconds count from the fault; None where nothing of the kind happened."""

    name: str
    injected: str
    did: str = ""
    codes: list[int] = field(default_factory=list)
    """Exit codes of the ranks that the first attempt could end itself."""
    detected_s: float | None = None
    """Until the first rank had ended."""
    stepping_s: float | None = None
    """From the end of the fault to the first new step: of the same attempt, or of the next, startup included."""
    lines: list[str] = field(default_factory=list)
    """The error lines, and the decision of the batch script."""
    wrong: list[str] = field(default_factory=list)


class NetworkCampaign:
    """An undisturbed run over loopback, and a run per fault. overrides: of the recipe, such as the watchdog's
    timeouts."""

    def __init__(self, nodes: TwoNodes, folder: Path, shards: Path, overrides: list[str]) -> None:
        self.nodes, self.folder, self.shards, self.overrides = nodes, folder, shards, overrides
        self.log = folder / "found.jsonl"
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.found = [Found(**json.loads(line)) for line in lines]
        ended = ranked.bifrost(slurm_job.RANKS, *self._arguments("undisturbed"))
        assert [rank.code for rank in ended] == [0] * slurm_job.RANKS, ended[0].err
        self.undisturbed = results(folder / "undisturbed" / "tiny-mllm")

    def play(self, name: str, inject: Callable[[Play], Found]) -> Found:
        """Inject a fault into a new run, called `name`, and finish that run."""
        self.nodes.set(Link())
        with SlurmJob(self.nodes, self.folder / name, self._arguments(name)[1:]) as job:
            try:
                found = inject(Play(name, self.nodes, job))
                if job.attempts[-1].code != 0:
                    found.wrong.append(f"{name}: ended with code {job.attempts[-1].code}")
                elif (lines := results(job.run)) != self.undisturbed:
                    found.wrong.append(f"{name}: other results: {differences(lines, self.undisturbed)}")
            except AssertionError as error:  # it waited too long: the other faults are still played
                found = Found(name, name, wrong=[f"{name}: {error}"])
        self.found.append(found)
        with open(self.log, "a") as file:
            file.write(json.dumps(vars(found)) + "\n")
        return found

    def _arguments(self, name: str) -> list[str]:
        """Arguments of `bifrost` for a new run in a folder of that name."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        settings = [*runs.TINY, f"steps={STEPS}", f"checkpoint.every={SAVE_EVERY}", *self.overrides]
        return runs.arguments(self.shards, place, *settings)


@dataclass
class Play:
    """One run with a fault."""

    name: str
    nodes: TwoNodes
    job: SlurmJob

    def link(self, link: Link) -> float:
        """Change the link; returns the time of that."""
        self.nodes.set(link)
        return time.monotonic()

    def to_the_fault(self) -> None:
        """Start the run and wait until its network is to fail."""
        self.job.start()
        self.job.wait_for_step(AT)

    def outlast(self, link: Link, injected: str, seconds: float = 0.0, steps: int = 0) -> Found:
        """A fault of the link for some seconds, then some steps, with which the run continues."""
        self.to_the_fault()
        self.link(link)
        time.sleep(seconds)
        self.job.wait_for_step(AT + steps)
        during = len(self.job.new_steps())
        healed = self.link(Link())
        # The step under way when the link came back may have been nearly complete: the one after it counts.
        stepping = self.job.wait_for_step(during + 2) - healed
        self.job.wait(600)
        found = Found(self.name, injected, stepping_s=stepping)
        longest = max(line["step_s"] for line in self.job.new_steps()[AT:])
        found.did = (
            f"continued, {during - AT} steps meanwhile; the longest step took {longest:.1f} s, those before"
            f" {self.step_s():.2f} s"
        )
        named = [line["rank"] for line in runs.events(self.job.run, "straggler")]
        if named:
            found.wrong.append(f"{injected}: ranks {named} were named as stragglers")
        if errors := self.job.errors():
            found.wrong.append(f"{injected}: printed {errors}")
        return found

    def end(self, began: float, bound_s: float, injected: str) -> Found:
        """Wait for the end of an attempt whose network failed at `began`, restore the link, and start the next one."""
        attempt = self.job.wait(bound_s + MARGIN_S)
        found = Found(self.name, injected, codes=[code for _, (code, _) in sorted(attempt.ended.items())])
        found.detected_s = min(seen for _, seen in attempt.ended.values()) - began
        found.lines = [*self.job.errors(), attempt.decision]
        healed = self.link(Link())
        self.job.start()
        found.stepping_s = self.job.wait_for_step(1) - healed
        resumed = self.job.new_steps()[0]["step"] - 1
        found.did = f"ended with code {attempt.code}, resumed from step {resumed}"
        self.job.wait(600)
        return found

    def step_s(self) -> float:
        """Median seconds per step before the fault."""
        return statistics.median(line["step_s"] for line in self.job.new_steps()[4:AT])

    def step_bound_s(self) -> float:
        """Timeout of the watchdog for a step, as docs/training.md gives it."""
        return self._watchdog().step_timeout_s or max(100.0, 20 * self.step_s())

    def rendezvous_bound_s(self) -> float:
        return self._watchdog().startup_timeout_s / 5

    def _watchdog(self) -> Watchdog:
        return load_recipe(self.job.run / RECIPE, stored=True).watchdog


def slow(play: Play) -> Found:
    link = Link(delay_s=0.005, rate=4e6)
    return play.outlast(link, f"the link slows down to 4 MB/s with a delay of 5 ms, for {FAULTY} steps", steps=FAULTY)


def lossy(play: Play) -> Found:
    return play.outlast(Link(loss=0.03), f"the link loses 3 % of the packets, for {FAULTY} steps", steps=FAULTY)


def short_cut(play: Play) -> Found:
    return play.outlast(Link(loss=1), "the link loses all packets for 20 s, then none", seconds=20)


def long_cut(play: Play) -> Found:
    play.to_the_fault()
    return play.end(play.link(Link(loss=1)), play.step_bound_s(), "the link loses all packets until the attempt ends")


def crawl(play: Play) -> Found:
    play.to_the_fault()
    return play.end(play.link(Link(rate=30e3)), play.step_bound_s(), "the link slows down to 30 kB/s")


def other_node(play: Play) -> Found:
    return _vanish(play, 1, "node2, with ranks 2 and 3, vanishes without closing a connection")


def first_node(play: Play) -> Found:
    return _vanish(play, 0, "node1, with ranks 0 and 1, the store of the rendezvous and the lock, vanishes likewise")


def _vanish(play: Play, node: int, injected: str) -> Found:
    play.to_the_fault()
    began = play.link(Link(loss=1))
    play.job.lose(node)
    return play.end(began, play.step_bound_s(), injected)


def closed_rendezvous(play: Play) -> Found:
    began = play.link(Link(closed=(FIRST_PORT, FIRST_PORT + PORTS - 1)))
    play.job.start()
    return play.end(began, play.rendezvous_bound_s(), "the port of the rendezvous is closed from the beginning")


def closed_data(play: Play) -> Found:
    began = play.link(Link(closed=EPHEMERAL))
    play.job.start()
    return play.end(began, play.rendezvous_bound_s(), "all ports but that of the rendezvous are closed")


FAULTS: dict[str, Callable[[Play], Found]] = {
    "slow": slow,
    "lossy": lossy,
    "short-cut": short_cut,
    "long-cut": long_cut,
    "crawl": crawl,
    "other-node": other_node,
    "first-node": first_node,
    "closed-rendezvous": closed_rendezvous,
    "closed-data": closed_data,
}


def results(run: Path) -> list[dict]:
    """The step lines of a run, without times."""
    return [{name: line[name] for name in EXACT} for line in runs.steps(run)]


def differences(found: list[dict], wanted: list[dict]) -> str:
    """The first difference between two lists of step lines."""
    if len(found) != len(wanted):
        return f"{len(found)} steps instead of {len(wanted)}"
    return next(f"{a} instead of {b}" for a, b in zip(found, wanted, strict=True) if a != b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/faults-network"))
    parser.add_argument("--report", type=Path)
    parser.add_argument("--hardware", default="this machine")
    parser.add_argument("overrides", nargs="*", default=["watchdog.startup_timeout_s=300"], help="of the recipe")
    options = parser.parse_args()
    if lacking := two_nodes.missing():
        raise SystemExit(f"error: {lacking}")
    import network_report

    # As in the tests: interpreted kernels, on the CPU, without network.
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    folder = options.folder.absolute()
    if not (folder / "shards").is_dir():
        small_shards.save(folder / "shards")
    with TwoNodes() as nodes:
        campaign = NetworkCampaign(nodes, folder, folder / "shards", options.overrides)
        for name in [name for name in FAULTS if name not in {found.name for found in campaign.found}]:
            print(campaign.play(name, FAULTS[name]), flush=True)
    campaign.found.sort(key=lambda found: list(FAULTS).index(found.name))
    text = network_report.page(campaign, options.hardware)
    (options.report or folder / "report.md").write_text(text)
    print(text)
    raise SystemExit(any(found.wrong for found in campaign.found))


if __name__ == "__main__":
    main()
