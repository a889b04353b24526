"""Which nodes are bad: those that differ from most; a fault that all share is not attributed to any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from ..exit_codes import BAD_NODE, DONE, USAGE
from .fabric import Link, Outcome
from .figures import Figures, figures_of
from .finding import Finding, Limits
from .store import findings_of

SILENT = 1 / 4
"""Maximum fraction of nodes (at least one) that may be excluded because they did not report."""

Findings = Mapping[str, Sequence[Finding]]
"""Node -> its findings."""


@dataclass(frozen=True)
class Verdict:
    """Exit code, the bad nodes with their reasons, and a one-line summary."""

    code: int
    bad: dict[str, str]
    line: str


def decide(findings: Findings, in_job: bool) -> Verdict:
    """Nodes are bad if a check fails on them and passes on others; a check that fails everywhere is a common fault.

    If many nodes do not report, none of them is bad: the network or the deciding node may be at fault. A node without
    others to compare with is bad only for faults of its own machine, and only in a job, which can restart elsewhere.
    """
    checks: dict[str, dict[str, Finding]] = {}
    for node, found in findings.items():
        for finding in found:
            checks.setdefault(finding.check, {})[node] = finding
    bad: dict[str, str] = {}
    common: list[str] = []
    for check, by_node in checks.items():
        failing = {node: finding for node, finding in by_node.items() if finding.reason}
        silent = [node for node, finding in failing.items() if finding.silent]
        alone = len(by_node) == 1 and in_job and any(finding.own for finding in failing.values())
        if len(silent) > max(1, SILENT * len(findings)):
            some = ", ".join(silent[:3]) + (", …" if len(silent) > 3 else "")
            responsive = next((node for node in findings if node not in silent), "")
            common.append(
                f"{check}: {len(silent)} of {len(findings)} nodes did not report ({some}), too many to exclude: check"
                f" the network, and {responsive}"
            )
        elif silent:
            bad |= {node: f"{check}: {failing[node].reason}" for node in silent if node not in bad}
        elif len(failing) < len(by_node) or alone:
            for node, finding in failing.items():
                bad.setdefault(node, f"{check}: {finding.reason}")
        elif failing:
            where = "" if len(findings) == 1 else f"on all {len(findings)} nodes: "
            common.append(f"{where}{check}: {next(iter(failing.values())).reason}")
    if bad:
        return Verdict(BAD_NODE, bad, "bad nodes: " + "; ".join(f"{node} ({why})" for node, why in bad.items()))
    if common:
        more = f" (and {len(common) - 1} more)" if len(common) > 1 else ""
        return Verdict(USAGE, {}, f"{common[0]}{more}")
    return Verdict(DONE, {}, f"{len(findings)} nodes pass" if len(findings) > 1 else f"{next(iter(findings))} passes")


def compare(findings: Findings) -> dict[str, list[Finding]]:
    """`findings` with a reason added to every figure that must be equal on all nodes and differs from most."""
    figures: dict[str, Counter[str]] = {}
    for found in findings.values():
        for finding in found:
            if finding.same:
                figures.setdefault(finding.check, Counter())[finding.figure] += 1

    def judged(finding: Finding) -> Finding:
        if not finding.same:
            return finding
        most, times = figures[finding.check].most_common(1)[0]
        total = sum(figures[finding.check].values())
        if times == total or (times > total / 2 and finding.figure == most):
            return finding
        if times > total / 2:
            return replace(finding, reason=f"{finding.figure}, most nodes have {most}")
        return replace(finding, reason=f"differs between nodes: {', '.join(sorted(figures[finding.check]))}")

    return {node: [judged(finding) for finding in found] for node, found in findings.items()}


def missing_nodes(
    expected: Sequence[str],
    present: Mapping[str, Sequence[int]],
    size: int,
    files: Mapping[str, Any],
    waited: str,
) -> dict[str, list[Finding]]:
    """Findings of the nodes that did not join, or not with all their ranks.

    present: node -> ranks that joined. size: number of ranks. files: node -> report on disk.
    """
    found: dict[str, list[Finding]] = {}
    for node in expected:
        if node in files and node not in present:
            reason = "its report is in the run folder, but it did not join the rendezvous"
            found[node] = [*findings_of([files[node]])[node], Finding("present", "", reason, own=True, silent=True)]
        elif node not in present:
            found[node] = [Finding("present", "", waited, own=True, silent=True)]
        elif len(present[node]) < size // len(expected):
            reason = f"{len(present[node])} of {size // len(expected)} ranks joined"
            found[node] = [Finding("present", "", reason, own=True, silent=True)]
    return found


def shared_folder(seen: Mapping[str, Sequence[str]], folder: str) -> dict[str, Finding]:
    """A node that does not see the files of most nodes has a different folder mounted at that path."""
    result = {}
    for node, others in seen.items():
        missing = sorted(set(seen) - set(others))
        reason = f"{folder} does not show what was written on {', '.join(missing[:3])}"
        fine = 2 * (len(seen) - len(missing)) > len(seen)
        result[node] = Finding("shared run folder", f"{len(others)} of {len(seen)} nodes seen", "" if fine else reason)
    return result


def fabric(
    outcomes: Mapping[int, Outcome | None], nodes: Mapping[int, str], limits: Limits
) -> dict[str, list[Finding]]:
    """Findings of every node on pairs, clocks and the all-reduce. outcomes: by rank, None if it stopped responding."""
    ranks: dict[str, list[int]] = {}
    for rank, node in nodes.items():
        ranks.setdefault(node, []).append(rank)
    progress = {node: min(o.steps if (o := outcomes[rank]) else -1 for rank in mine) for node, mine in ranks.items()}
    if any(outcome is None or outcome.trouble for outcome in outcomes.values()):
        last = min(progress.values())
        return {node: [_stopped([outcomes[r] for r in mine], progress[node] == last)] for node, mine in ranks.items()}

    links: dict[str, list[Link]] = {node: [] for node in ranks}
    best: dict[str, float] = {}
    for node, mine in ranks.items():
        each = [outcomes[rank].links for rank in mine if outcomes[rank].links]  # type: ignore[union-attr]
        links[node] = [link for own in each for link in own]
        if each:
            # Each GPU's best partner, since a slow partner is not its fault; then the node's worst GPU.
            best[node] = min(max(link.gb_s for link in own) for own in each)
    result: dict[str, list[Finding]] = {}
    for node, mine in ranks.items():
        found = result[node] = []
        if links[node]:
            known = figures_of(outcomes[mine[0]].device)  # type: ignore[union-attr]
            found += [_data(links[node]), _clock(links[node], limits), _speed(node, best, limits, known)]
        found += _gpus([o for rank in mine if (o := outcomes[rank])], [o for o in outcomes.values() if o], limits)
        sums = [outcomes[rank] for rank in mine]
        wrong = any(outcome and outcome.wrong_sums for outcome in sums)
        speed = min(outcome.reduce_gb_s for outcome in sums if outcome)
        found.append(Finding("all-reduce", f"{speed:.2f} GB/s", "sums are wrong" if wrong else ""))
    return result


def _stopped(outcomes: Sequence[Outcome | None], last: bool) -> Finding:
    if any(outcome is None for outcome in outcomes):
        return Finding("fabric", "", "stopped responding during the check", own=True, silent=True)
    troubled = [outcome for outcome in outcomes if outcome and outcome.trouble]
    if not troubled:
        return Finding("fabric", "ended")
    return Finding("fabric", f"got as far as {troubled[0].stage}", troubled[0].trouble if last else "")


def _data(links: Sequence[Link]) -> Finding:
    wrong = [link.partner for link in links if link.wrong]
    reason = f"data differs to and from {', '.join(wrong[:3])}" if 2 * len(wrong) > len(links) else ""
    return Finding("pair data", f"{len(links) - len(wrong)} of {len(links)} pairs exact", reason)


def _clock(links: Sequence[Link], limits: Limits) -> Finding:
    # The offset's error is at most half the round trip.
    far = [link for link in links if abs(link.offset_s) - link.round_trip_s / 2 > limits.clock_s]
    nearest = -min((link.offset_s for link in links), key=abs)
    reason = f"differs from most nodes' by {nearest:+.3g} s" if 2 * len(far) > len(links) else ""
    return Finding("clock", f"{nearest:+.3f} s", reason)


def _gpus(mine: Sequence[Outcome], every: Sequence[Outcome], limits: Limits) -> list[Finding]:
    """Slowest product and copy of a node's GPUs, compared with the vendor's figures and with all other GPUs."""
    gpus, others = [each for each in mine if each.device], [each for each in every if each.device]
    if not gpus:
        return []
    known = figures_of(gpus[0].device)
    checks = {
        "GPU product": ("product_tflops", "TFLOP/s", known and limits.product_share * known.bf16_tflops),
        "GPU copy": ("copy_gb_s", "GB/s", known and limits.copy_share * known.hbm_gbs),
    }
    found = []
    for check, (field, unit, bound) in checks.items():
        values = [getattr(each, field) for each in gpus]
        worst, typical = min(values), median(getattr(each, field) for each in others)
        gpu, reason = values.index(worst), ""
        if check == "GPU product" and any(each.wrong_products for each in gpus):
            reason = f"GPU {[each.wrong_products for each in gpus].index(True)}: two runs of the same product differ"
        elif bound and worst < bound:
            reason = f"GPU {gpu}: {worst:.3g} {unit}, at least {bound:.3g} expected of {gpus[0].device}"
        elif worst < limits.gpu_slow * typical:
            reason = f"GPU {gpu}: {worst:.3g} {unit}, the median of all GPUs is {typical:.3g}"
        found.append(Finding(check, f"{worst:.3g} {unit}", reason, own=True))
    return found


def _speed(node: str, best: Mapping[str, float], limits: Limits, known: Figures | None) -> Finding:
    own, others = best[node], [value for name, value in best.items() if name != node]
    typical = median(others)
    # With only two nodes, both measured the same exchange.
    slow = len(others) > 1 and own < limits.slow * typical
    reason = f"{own:.3g} GB/s, the other nodes' median is {typical:.3g} GB/s" if slow else ""
    if known and own < limits.pair_share * known.inter_gbs:
        reason = (
            f"{own:.3g} GB/s, at least {limits.pair_share * known.inter_gbs:.3g} expected of {known.name}: NCCL may use"
            " TCP; see fabric.interface and fabric.hca of the site file, or lower preflight_limits.pair_share"
        )
    return Finding("pair bandwidth", f"{own:.2f} GB/s", reason)
