"""The report of a campaign of network faults."""

from __future__ import annotations

import textwrap
import time

from cable import MTU
from network_campaign import AT, SAVE_EVERY, STEPS, NetworkCampaign


def page(campaign: NetworkCampaign, hardware: str) -> str:
    """The report in Markdown."""
    setting = f"""
        {time.strftime("%Y-%m-%d")}, {hardware}: `bifrost train tiny-mllm` in fp32 with a global batch of 8 for {STEPS}
        steps, saved every {SAVE_EVERY}, on two nodes with two ranks each over gloo. The nodes are network namespaces,
        connected by a program that copies packets of up to {MTU:,} bytes and injects the faults after step {AT}, or
        before the ranks start. Variables, the steps before and after the ranks, and their decisions are those of the
        Slurm job; Slurm itself, with its delay of a requeue, is not part of it. Settings of the watchdog
        other than the defaults: {", ".join(campaign.overrides) or "none"}.
    """
    check = """
        All step lines of every run (loss, gradient norm, learning rate, samples, data digest) have to be bitwise equal
        to those of an undisturbed run over loopback. Detection: seconds from the fault to the end of the first rank,
        after the line with the cause; of a fault before the ranks start, their startup is included. Stepping again:
        seconds from the end of the fault to the first new step, of the same attempt or of the next one, whose startup
        is included.
    """
    rows = [(each.injected, each.did, _seconds(each.detected_s), _seconds(each.stepping_s)) for each in campaign.found]
    lines = [
        f"{each.injected}:\n\n```text\n" + "\n".join(each.lines) + "\n```\n" for each in campaign.found if each.lines
    ]
    wrong = [text for each in campaign.found for text in each.wrong]
    same = sum(not each.wrong for each in campaign.found)
    return "\n".join(
        [
            "# The campaign of network faults\n",
            "```text\nmake faults-network\n```\n",
            *(textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False) + "\n" for text in (setting, check)),
            "## Results\n",
            _table(("injected", "what the run did", "s to detection", "s to stepping again"), rows),
            f"{same} of {len(campaign.found)} runs equal the undisturbed one, bit for bit.\n",
            *(f"- {text}\n" for text in wrong),
            "## Error lines and decisions\n",
            *lines,
        ]
    )


def _seconds(value: float | None) -> str:
    return "none needed" if value is None else f"{value:.1f}"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
