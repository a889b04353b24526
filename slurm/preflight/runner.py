"""The course of a preflight: every node checks itself, all report, then pairs and all ranks together try the fabric.

Rank 0 judges. Where it does not answer, the lowest node alive does, by the files in the run's folder.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch._C._distributed_c10d import HashStore, Store

from ..exclusions import Memory
from ..exit_codes import DONE, FAILED
from .fabric import Outcome, Wire, measure
from .finding import Finding, Limits, within
from .node import node_checks
from .rank_info import Place
from .result import conclude
from .store import Board, Folder, findings_of, report_of
from .verdict import absent, compare, decide, fabric, shared


def preflight(
    run: Path | None,
    place: Place,
    site: Memory | None = None,
    limits: Limits | None = None,
    scratch: Sequence[str] = (),
    command: str | None = None,
    wire: Wire | None = None,
) -> int:
    """Check the nodes of this step and return the exit code: 0 fine, 2 a fault of all, 77 bad nodes.

    `scratch` are folders that every node needs, `command` has to exit with 0 on every node. The judge prints the table
    and writes RUN/preflight/<job>-<restart>-<step>/verdict.json and RUN/excluded.json. The caller has to leave by
    `os._exit`: threads that hang in a dead file system or network would keep the process alive.
    """
    session = _Session(run, place, site, limits or Limits(), wire or Wire(place.local))
    findings = session.look(scratch, command) if place.leader else []
    return session.alone(findings) if place.size == 1 else session.together(findings)


class _Session:
    def __init__(self, run: Path | None, place: Place, site: Memory | None, limits: Limits, wire: Wire) -> None:
        self.run, self.place, self.site, self.limits, self.wire = run, place, site, limits, wire
        self.folder = Folder(run, place) if run else None
        self.start = time.monotonic()

    def look(self, scratch: Sequence[str], command: str | None) -> list[Finding]:
        """What this node finds by itself; a check that hangs is a finding too."""
        found: list[Finding] = []
        begun = [""]

        def work() -> None:
            for name, check in node_checks(self.place, self.run, scratch, command, self.limits):
                begun.append(name)
                try:
                    found.extend(check())
                except Exception as error:  # whatever it is, the other nodes must not wait for this one
                    found.append(Finding(name, "", f"{type(error).__name__}: {error}"))
            begun.append("report")
            self._write(found)

        if not within(self.limits.node_s, work):
            found.append(Finding(begun[-1], "", f"no answer within {self.limits.node_s:g} s", own=True))
        return found

    def alone(self, findings: list[Finding]) -> int:
        nodes = {self.place.node: [0]}
        outcome = self._measure(HashStore(), nodes)
        measured = fabric({0: outcome}, {0: self.place.node}, self.limits)
        return self._conclude({self.place.node: [*findings, *measured[self.place.node]]})

    def together(self, findings: list[Finding]) -> int:
        board, trouble = self._board()
        if self.place.rank == 0:
            findings = [*findings, Finding("rendezvous port", str(self.place.port), trouble, own=True)]
        else:
            findings = [*findings, Finding("rendezvous", f"{self.place.host}:{self.place.port}", trouble)]
        codes: list[int | None] = []

        def talk(board: Board) -> None:
            try:
                board.put(f"report/{self.place.rank}", report_of(self.place, findings))
                codes.append(self._lead(board) if self.place.rank == 0 else self._follow(board))
            except RuntimeError:
                codes.append(None)

        # A store whose process is frozen takes every question and answers none.
        if board and within(self._whole(), lambda: talk(board)) and codes[0] is not None:
            return codes[0]
        if board is None and self.place.leader:
            self._write(findings)
        return self._by_files(findings, trouble or "rank 0 does not answer any more", lost=board is not None)

    def _board(self) -> tuple[Board | None, str]:
        """The store at rank 0, or why there is none."""
        patience = max(self.limits.grace_s, self._left())
        boards: list[Board] = []
        trouble = [f"no answer within {patience:.0f} s"]

        def connect() -> None:
            try:
                boards.append(Board(self.place, patience))
            except (RuntimeError, OSError) as error:
                trouble[0] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]

        # A foreign program on that port may take the connection and say nothing: the store's own bound is none then.
        within(patience + 1, connect)
        return (boards[0], "") if boards else (None, trouble[0])

    def _whole(self) -> float:
        """Seconds after which nothing is to be waited for."""
        limits = self.limits
        return limits.node_s + limits.meet_s + limits.shared_s + limits.fabric_s + 5 * limits.grace_s

    def _lead(self, board: Board) -> int:
        size = self.place.size
        got = board.collect({rank: f"report/{rank}" for rank in range(size)}, max(self.limits.grace_s, self._left()))
        nodes: dict[str, list[int]] = {}
        for rank in sorted(got):
            nodes.setdefault(got[rank]["node"], []).append(rank)
        complete = len(got) == size
        board.put("roll", {"complete": complete, "nodes": nodes})
        findings = findings_of(list(got.values()))
        if not complete:
            files = self.folder.reports(0) if self.folder else {}
            waited = f"no report within {self.limits.meet_s:g} s"
            findings.update(absent(self.place.nodes, nodes, size, files, waited))
        elif self.folder:
            leaders = {rank: f"seen/{rank}" for rank, report in got.items() if report["leader"] and rank}
            seen = {self.place.node: self.folder.seen(self.limits.shared_s)}
            for rank, names in board.collect(leaders, self.limits.shared_s + self.limits.grace_s).items():
                seen[got[rank]["node"]] = names
            for node, finding in shared(seen, str(self.run)).items():
                findings[node].append(finding)
        findings = compare(findings)
        go = complete and decide(findings, self.place.in_job).code == DONE
        board.put("go", go)
        if go:
            outcomes: dict[int, Outcome | None] = dict.fromkeys(range(size))
            begun = time.monotonic()
            outcomes[0] = self._measure(board.for_group(), nodes)
            # Where this rank has failed at once, the others still wait for it: they are silent only after their time.
            rest = max(0.0, self.limits.fabric_s - (time.monotonic() - begun))
            keys = {rank: f"fabric/{rank}" for rank in range(1, size)}
            heard = board.collect(keys, rest + self.limits.grace_s)
            outcomes.update({rank: Outcome.of(plain) for rank, plain in heard.items()})
            names = {rank: node for node, ranks in nodes.items() for rank in ranks}
            for node, measured in fabric(outcomes, names, self.limits).items():
                findings[node] = [*findings[node], *measured]
        code = self._conclude(findings)
        board.put("verdict", code)
        # The store has to outlive the last question.
        board.collect({rank: f"bye/{rank}" for rank in got if rank}, self.limits.grace_s)
        return code

    def _follow(self, board: Board) -> int | None:
        """The judge's exit code; None when rank 0 does not answer any more."""
        limits = self.limits
        roll = board.get("roll", limits.meet_s + limits.node_s)
        if roll is None:
            return None
        if roll["complete"] and self.place.leader and self.folder:
            board.put(f"seen/{self.place.rank}", self.folder.seen(limits.shared_s))
        if board.get("go", limits.shared_s + 3 * self.limits.grace_s):
            outcome = self._measure(board.for_group(), roll["nodes"])
            board.put(f"fabric/{self.place.rank}", outcome.plain())
        code = board.get("verdict", limits.fabric_s + 3 * self.limits.grace_s)
        board.put(f"bye/{self.place.rank}", True)
        return code

    def _measure(self, store: Store, nodes: dict[str, list[int]]) -> Outcome:
        out = Outcome()
        limits = self.limits
        if not within(limits.fabric_s, lambda: measure(self.wire, store, self.place.rank, nodes, limits.rounds, out)):
            out.trouble = f"{out.stage}: no answer within {limits.fabric_s:g} s"
        return out

    def _by_files(self, findings: list[Finding], trouble: str, lost: bool) -> int:
        """Without rank 0: the lowest node whose report is there judges, each next one later should that one fail.

        `lost`: rank 0 was there and has had its time.
        """
        if self.folder is None:
            print(f"error: rank {self.place.rank} on {self.place.node}: {trouble}", file=sys.stderr)
            return FAILED
        turn = self._whole()
        reports = self.folder.reports(max(self.limits.grace_s, self._left()))
        order = [node for node in self.place.nodes if node in reports]
        before = order[: order.index(self.place.node)] if self.place.node in order else order
        verdict = self.folder.verdict(turn * (len(before) - lost))
        if verdict is None and self.place.leader:
            reports[self.place.node] = report_of(self.place, findings)
            found = findings_of([report for node, report in reports.items() if node not in before])
            found.update(absent(self.place.nodes, {node: [] for node in found}, 0, reports, f"no report: {trouble}"))
            return self._conclude(compare(found))
        verdict = verdict or self.folder.verdict(turn)
        return FAILED if verdict is None else verdict["code"]

    def _conclude(self, findings: dict[str, list[Finding]]) -> int:
        return conclude(findings, decide(findings, self.place.in_job), self.run, self.site, self.folder)

    def _write(self, findings: list[Finding]) -> None:
        """The report as a file. Where that fails the folder's own check says so, and the report goes by the store."""
        if self.folder:
            try:
                self.folder.write(report_of(self.place, findings))
            except OSError as error:
                print(f"preflight: {self.place.node}: no report in {self.folder.path}: {error}", file=sys.stderr)

    def _left(self) -> float:
        """Seconds of `meet_s` that are left."""
        return self.limits.meet_s - (time.monotonic() - self.start)
