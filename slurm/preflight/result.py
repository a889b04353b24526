"""Results of a preflight: the printed table, verdict.json, and the nodes to exclude."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..errors import SlurmError
from ..exclusions import exclude
from ..exit_codes import DONE, FAILED
from ..exit_record import record_outcome
from ..io import write_json
from ..site import Site
from .store import ReportFolder
from .verdict import Findings, Verdict

CLAIM_S = 30.0
"""Seconds to wait for the verdict of another process that was first."""


def conclude(
    findings: Findings, verdict: Verdict, run: Path | None, site: Site | None, folder: ReportFolder | None
) -> int:
    """Write and print the verdict, unless another process was first; return the exit code of the verdict."""
    if folder and not folder.claim():
        other = folder.verdict(CLAIM_S)
        return FAILED if other is None else other["code"]
    try:
        if verdict.bad:
            exclude(verdict.bad, run, site)
        if folder:
            plain = {node: [asdict(finding) for finding in found] for node, found in findings.items()}
            words = {"code": verdict.code, "line": verdict.line, "bad": verdict.bad}
            write_json(folder.path / "verdict.json", {"time": int(time.time()), **words, "nodes": plain})
    except (OSError, SlurmError) as error:
        print(f"preflight: the verdict was not saved: {error}", file=sys.stderr)
    if verdict.code != DONE:
        record_outcome(verdict.code, f"preflight: {verdict.line}")
    Console(markup=False, emoji=False).print(table(findings))
    print(f"preflight: {verdict.line}" if verdict.code == DONE else f"error: preflight: {verdict.line}", flush=True)
    return verdict.code


def table(findings: Findings) -> Table:
    """Check, node, result and figure, with one line for nodes with the same result."""
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for node, found in findings.items():
        for finding in found:
            figures = rows.setdefault((finding.check, finding.reason), {})
            figures.setdefault(finding.figure, []).append(node)
    shown = Table("check", "node", "result", "figure", title="Preflight")
    for (check, reason), figures in rows.items():
        nodes = [node for each in figures.values() for node in each]
        more = ", …" if len(figures) > 3 else ""
        shown.add_row(check, _names(nodes), reason or "fine", ", ".join(list(figures)[:3]) + more)
    return shown


def _names(nodes: Sequence[str]) -> str:
    return ", ".join(nodes) if len(nodes) <= 3 else f"{len(nodes)} nodes"
