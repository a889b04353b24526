"""The report of a campaign, and a simulation of the effective training time ratio on 512 GPUs."""

from __future__ import annotations

import math
import random
import statistics
import textwrap
import time
from collections import Counter
from typing import NamedTuple

from campaign import GRACE_S, Campaign

MOMENTS = {
    "boundary": "SIGKILL of one rank, by itself, at a write boundary; in 3 of 10 cases of the other one too",
    "step": "SIGKILL of one rank or both at a random time after the attempt's first step",
    "start": "SIGKILL of one rank or both at a random time during startup",
    "worker": "SIGKILL of a loader worker",
    "signal": "SIGTERM or SIGUSR1 to one rank or both",
    "damage": "no kill: one bit of a random file of the newest checkpoint flipped between two attempts",
}
SAVE_S = 5.0
FAILURES = 20_000  # simulated
MTBF_H = {"24 h": 24.0, "99 h": 16384 / 512 * 54 * 24 / 419}


class About(NamedTuple):
    """Which runs are killed."""

    title: str
    command: str
    trained: str
    """What two ranks train."""


STAGE_1 = About("The campaign of random kills", "make faults", "a backbone of one layer and width 32 in fp32")
MIXTURE = About(
    "The campaign of random kills with a mixture in buckets",
    "make faults-mixture",
    "a small ControlNet in fp32 on two sources, 3 : 1, in three aspect-ratio buckets, with a damaged image and one that"
    " is too small,",
)


def page(campaign: Campaign, about: About, asked: int, hardware: str) -> str:
    """The report in Markdown. asked: the requested number of kills."""
    kills, hits, met = campaign.kills, campaign.hits(), campaign.met()
    moments = Counter(kill.moment for kill in kills)
    sent = campaign.sent()
    setting = f"""
        {time.strftime("%Y-%m-%d")}, {hardware}: {sent:,} kills in {len(campaign.runs)} runs. Two ranks over gloo
        train {about.trained} for {campaign.steps} steps. At random, a run saves every one,
        two or three steps, keeps one to three checkpoints, and reads with or without a loader worker. A fork server
        with all modules imported starts the ranks. Every attempt has one fault. After a rank was killed, the others are
        killed within {GRACE_S:.0f} s (the launcher waits 10 s), and the run is restarted until it is done.
    """
    check = """
        After every kill each checkpoint under its final name is compared with that of the same step of an uninterrupted
        run, and the next attempt has to resume from the newest. At the end of each run all lines of metrics.jsonl
        (step, samples, loss, gradient norm, learning rate, digest over all samples) and the files of the checkpoints
        have to be bitwise equal.
    """
    limit = """
        SIGKILL ends processes but keeps the kernel's page cache: the loss of unflushed writes in a power failure is not
        tested here.
    """
    boundaries = [
        (f"`{label}`", ", ".join(str(rank) for rank in sorted(met[label])), str(hits[label])) for label in sorted(hits)
    ]
    return "\n".join(
        [
            f"# {about.title}\n",
            f"```text\n{about.command} N={asked}\n```\n",
            *(_paragraph(text) for text in (setting, check, limit)),
            "## Results\n",
            _table(("", ""), _found(campaign)),
            "## Kills by moment\n",
            _table(("moment", "", "times"), [(name, MOMENTS[name], str(moments[name])) for name in MOMENTS]),
            "## Kills by write boundary\n",
            "Right before the named call. A write has two boundaries: before it, and with half of its bytes written.\n",
            _table(("boundary", "ranks that reach it", "kills"), boundaries),
            "## On 512 GPUs\n",
            *_projection(_quantile(_recoveries(campaign), 0.95)),
        ]
    )


def _found(campaign: Campaign) -> list[tuple[str, ...]]:
    kills, recoveries, hits = campaign.kills, _recoveries(campaign), campaign.hits()
    wrong = Counter(text.partition(":")[0] for text in campaign.wrong())
    signals = [kill for kill in kills if kill.moment == "signal"]
    stopped = sum(kill.codes == [75, 75] for kill in signals)
    steps = campaign.steps * len(campaign.runs)
    seconds = sum(run["seconds"] for run in campaign.runs)
    return [
        ("checkpoints compared after kills, of which torn", f"{sum(k.compared for k in kills):,}, {wrong['torn']}"),
        (
            "attempts that resumed from a checkpoint, of which not from the newest valid one",
            f"{sum(bool(kill.began) for kill in kills):,}, {wrong['resume']}",
        ),
        (
            "steps compared after runs, of which lost, repeated, on other samples or with another loss",
            f"{steps:,}, {wrong['line']}",
        ),
        (
            "attempts, of which neither ended nor made a step within two minutes",
            f"{sum(bool(kill.codes) for kill in kills):,}, {wrong['hang']}",
        ),
        ("write boundaries reached, of which killed at", f"{len(hits)}, {sum(count > 0 for count in hits.values())}"),
        (
            "stop signals, of which handled by both ranks with one checkpoint and code 75",
            f"{len(signals)}, {stopped}" + "; the others arrived before the handlers" * (stopped < len(signals)),
        ),
        (
            "time from a kill to the first new step, over attempts with one",
            f"median {statistics.median(recoveries):.1f} s, 95 % within {_quantile(recoveries, 0.95):.1f} s,"
            f" maximum {recoveries[-1]:.1f} s",
        ),
        (
            "effective training time ratio (ETTR)",
            f"{steps * campaign.step_s / seconds:.0%}, with a kill every {seconds / campaign.sent():.1f} s",
        ),
    ]


def _projection(restart_s: float) -> list[str]:
    text = f"""
        Projected, not measured: a simulation of {FAILURES:,} failures at exponentially distributed intervals. A save
        blocks training for {SAVE_S:.0f} s, this project's upper bound, every sqrt(2 x {SAVE_S:.0f} s x mean time
        between failures). A failure loses the time since the last save and the time of the restart. The mean time
        between failures is an assumption: 24 h for a bad cluster; and 99 h, which is 419 unexpected interruptions of
        16,384 GPUs in 54 days (Llama 3, 2024) scaled to 512. Only the restart time of the first column is measured: 95
        % of the campaign's restarts were at least as fast, with a tiny model on one machine. 2 and 15 minutes are this
        project's upper bounds for a warm and a cold restart, including the detection of the fault.
    """
    rows = []
    for name, hours in MTBF_H.items():
        interval = math.sqrt(2 * SAVE_S * hours * 3600)
        shares = [ettr(hours * 3600, interval, SAVE_S, restart) for restart in (restart_s, 120, 900)]
        rows.append((f"a failure every {name}, a save every {interval / 60:.0f} min", *(f"{x:.1%}" for x in shares)))
    head = ("effective training time ratio (ETTR)", f"restart {restart_s:.1f} s", "2 min", "15 min")
    return [_paragraph(text), _table(head, rows).rstrip("\n") + "\n"]


def ettr(mtbf_s: float, interval_s: float, save_s: float, restart_s: float, seed: int = 0) -> float:
    """Effective training time ratio: work for `interval_s`, save for `save_s`, and so on until a failure, which loses
    the work since the last save and takes `restart_s`."""
    chance, worked, passed = random.Random(seed), 0.0, 0.0
    for _ in range(FAILURES):
        lived = chance.expovariate(1 / mtbf_s)
        worked += lived // (interval_s + save_s) * interval_s
        passed += lived + restart_s
    return worked / passed


def _recoveries(campaign: Campaign) -> list[float]:
    return sorted(kill.recovery_s for kill in campaign.kills if kill.recovery_s is not None)


def _quantile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines) + "\n"
