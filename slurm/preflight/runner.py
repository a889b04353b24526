"""Sequence of a preflight: every node checks itself, all ranks report, then pairs and all ranks test the network.

Rank 0 decides. If it does not answer, the lowest responsive node decides from the files in the run folder.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch._C._distributed_c10d import HashStore, Store

from ..errors import first_line
from ..exit_codes import DONE, FAILED
from ..site import Site
from .fabric import Outcome, Wire, measure
from .finding import Finding, Limits, within
from .node import node_checks
from .rank_info import RankInfo
from .result import conclude
from .store import KeyValueStore, ReportFolder, findings_of, report_of
from .verdict import compare, decide, fabric, missing_nodes, shared_folder


def preflight(
    run: Path | None,
    me: RankInfo,
    site: Site | None = None,
    limits: Limits | None = None,
    scratch: Sequence[str] = (),
    command: str | None = None,
    wire: Wire | None = None,
) -> int:
    """Check the nodes of this step and return the exit code: 0 all pass, 2 a fault on all nodes, 77 bad nodes.

    scratch: folders that every node needs. command: must exit with 0 on every node. The deciding rank prints the table
    and writes RUN/preflight/<job>-<restart>-<step>/verdict.json and RUN/excluded.json. The caller must end with
    `os._exit`: threads stuck in an unresponsive file system or network would keep the process alive.
    """
    session = _Session(run, me, site, limits or Limits(), wire or Wire(me.local))
    findings = session.check_node(scratch, command) if me.leader else []
    return session.single_node(findings) if me.size == 1 else session.multi_node(findings)


class _Session:
    def __init__(self, run: Path | None, me: RankInfo, site: Site | None, limits: Limits, wire: Wire) -> None:
        self.run, self.me, self.site, self.limits, self.wire = run, me, site, limits, wire
        self.folder = ReportFolder(run, me) if run else None
        self.start = time.monotonic()

    def check_node(self, scratch: Sequence[str], command: str | None) -> list[Finding]:
        """Findings of this node's own checks; a check that hangs is a finding."""
        found: list[Finding] = []
        begun = [""]

        def work() -> None:
            for name, check in node_checks(self.me, self.run, scratch, command, self.limits):
                begun.append(name)
                try:
                    found.extend(check())
                except Exception as error:  # any exception: the other nodes must not wait for this one
                    found.append(Finding(name, "", f"{type(error).__name__}: {error}"))
            begun.append("report")
            self._write(found)

        if not within(self.limits.node_s, work):
            found.append(Finding(begun[-1], "", f"no answer within {self.limits.node_s:g} s", own=True))
        return found

    def single_node(self, findings: list[Finding]) -> int:
        nodes = {self.me.node: [0]}
        outcome = self._measure(HashStore(), nodes)
        measured = fabric({0: outcome}, {0: self.me.node}, self.limits)
        return self._conclude({self.me.node: [*findings, *measured[self.me.node]]})

    def multi_node(self, findings: list[Finding]) -> int:
        store, trouble = self._connect()
        if self.me.rank == 0:
            findings = [*findings, Finding("rendezvous port", str(self.me.port), trouble, own=True)]
        else:
            findings = [*findings, Finding("rendezvous", f"{self.me.host}:{self.me.port}", trouble)]
        codes: list[int | None] = []

        def exchange(store: KeyValueStore) -> None:
            try:
                store.put(f"report/{self.me.rank}", report_of(self.me, findings))
                codes.append(self._lead(store) if self.me.rank == 0 else self._follow(store))
            except RuntimeError:
                codes.append(None)

        # A store whose process is frozen accepts every request and answers none.
        if store and within(self._total_s(), lambda: exchange(store)) and codes[0] is not None:
            return codes[0]
        if store is None and self.me.leader:
            self._write(findings)
        return self._decide_from_files(findings, trouble or "rank 0 no longer answers", lost=store is not None)

    def _connect(self) -> tuple[KeyValueStore | None, str]:
        """The store at rank 0, or why it cannot be reached."""
        patience = max(self.limits.grace_s, self._left())
        stores: list[KeyValueStore] = []
        trouble = [f"no answer within {patience:.0f} s"]

        def connect() -> None:
            try:
                stores.append(KeyValueStore(self.me, patience))
            except (RuntimeError, OSError) as error:
                trouble[0] = first_line(error)

        # Another program on that port may accept the connection and not answer: the store's own timeout fails then.
        within(patience + 1, connect)
        return (stores[0], "") if stores else (None, trouble[0])

    def _total_s(self) -> float:
        """Upper bound on the seconds of a whole preflight."""
        limits = self.limits
        return limits.node_s + limits.meet_s + limits.shared_s + limits.fabric_s + 5 * limits.grace_s

    def _lead(self, store: KeyValueStore) -> int:
        size = self.me.size
        got = store.collect({rank: f"report/{rank}" for rank in range(size)}, max(self.limits.grace_s, self._left()))
        nodes: dict[str, list[int]] = {}
        for rank in sorted(got):
            nodes.setdefault(got[rank]["node"], []).append(rank)
        complete = len(got) == size
        store.put("roster", {"complete": complete, "nodes": nodes})
        findings = findings_of(list(got.values()))
        if not complete:
            files = self.folder.reports(0) if self.folder else {}
            waited = f"no report within {self.limits.meet_s:g} s"
            findings.update(missing_nodes(self.me.nodes, nodes, size, files, waited))
        elif self.folder:
            leaders = {rank: f"seen/{rank}" for rank, report in got.items() if report["leader"] and rank}
            seen = {self.me.node: self.folder.seen(self.limits.shared_s)}
            for rank, names in store.collect(leaders, self.limits.shared_s + self.limits.grace_s).items():
                seen[got[rank]["node"]] = names
            for node, finding in shared_folder(seen, str(self.run)).items():
                findings[node].append(finding)
        findings = compare(findings)
        go = complete and decide(findings, self.me.in_job).code == DONE
        store.put("go", go)
        if go:
            outcomes: dict[int, Outcome | None] = dict.fromkeys(range(size))
            begun = time.monotonic()
            outcomes[0] = self._measure(store.for_group(), nodes)
            # If this rank failed early, the others still wait for it: allow them their full time.
            rest = max(0.0, self.limits.fabric_s - (time.monotonic() - begun))
            keys = {rank: f"fabric/{rank}" for rank in range(1, size)}
            received = store.collect(keys, rest + self.limits.grace_s)
            outcomes.update({rank: Outcome.of(plain) for rank, plain in received.items()})
            names = {rank: node for node, ranks in nodes.items() for rank in ranks}
            for node, measured in fabric(outcomes, names, self.limits).items():
                findings[node] = [*findings[node], *measured]
        code = self._conclude(findings)
        store.put("verdict", code)
        # The store must outlive the last request.
        store.collect({rank: f"done/{rank}" for rank in got if rank}, self.limits.grace_s)
        return code

    def _follow(self, store: KeyValueStore) -> int | None:
        """Rank 0's exit code; None if rank 0 no longer answers."""
        limits = self.limits
        roster = store.get("roster", limits.meet_s + limits.node_s)
        if roster is None:
            return None
        if roster["complete"] and self.me.leader and self.folder:
            store.put(f"seen/{self.me.rank}", self.folder.seen(limits.shared_s))
        if store.get("go", limits.shared_s + 3 * self.limits.grace_s):
            outcome = self._measure(store.for_group(), roster["nodes"])
            store.put(f"fabric/{self.me.rank}", outcome.plain())
        code = store.get("verdict", limits.fabric_s + 3 * self.limits.grace_s)
        store.put(f"done/{self.me.rank}", True)
        return code

    def _measure(self, store: Store, nodes: dict[str, list[int]]) -> Outcome:
        out = Outcome()
        limits = self.limits
        if not within(limits.fabric_s, lambda: measure(self.wire, store, self.me.rank, nodes, limits.rounds, out)):
            out.trouble = f"{out.stage}: no answer within {limits.fabric_s:g} s"
        return out

    def _decide_from_files(self, findings: list[Finding], trouble: str, lost: bool) -> int:
        """Without rank 0: the lowest node with a report decides; each further one waits longer, in case that one fails.

        lost: rank 0 was connected and has used up its time.
        """
        if self.folder is None:
            print(f"error: rank {self.me.rank} on {self.me.node}: {trouble}", file=sys.stderr)
            return FAILED
        turn = self._total_s()
        reports = self.folder.reports(max(self.limits.grace_s, self._left()))
        order = [node for node in self.me.nodes if node in reports]
        before = order[: order.index(self.me.node)] if self.me.node in order else order
        verdict = self.folder.verdict(turn * (len(before) - lost))
        if verdict is None and self.me.leader:
            reports[self.me.node] = report_of(self.me, findings)
            found = findings_of([report for node, report in reports.items() if node not in before])
            found.update(
                missing_nodes(self.me.nodes, {node: [] for node in found}, 0, reports, f"no report: {trouble}")
            )
            return self._conclude(compare(found))
        verdict = verdict or self.folder.verdict(turn)
        return FAILED if verdict is None else verdict["code"]

    def _conclude(self, findings: dict[str, list[Finding]]) -> int:
        return conclude(findings, decide(findings, self.me.in_job), self.run, self.site, self.folder)

    def _write(self, findings: list[Finding]) -> None:
        """Write the report as a file. If that fails, the folder check reports it, and the store has the report."""
        if self.folder:
            try:
                self.folder.write(report_of(self.me, findings))
            except OSError as error:
                print(f"preflight: {self.me.node}: no report in {self.folder.path}: {error}", file=sys.stderr)

    def _left(self) -> float:
        """Remaining seconds of `meet_s`."""
        return self.limits.meet_s - (time.monotonic() - self.start)
