"""Channels between nodes that are not yet known to work: files in the run folder, and a key-value store at rank 0.

Each node's report is in both. This distinguishes a dead node from one that only cannot reach the rendezvous, and if
rank 0 is the dead one, the lowest responsive node decides from the files.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from ..io import read_json, write_json
from .finding import Finding
from .rank_info import RankInfo

Report = dict[str, Any]
"""{"node": …, "rank": …, "leader": …, "findings": [Finding as a dict, …]}"""

POLL_S = 0.1


def report_of(me: RankInfo, findings: list[Finding]) -> Report:
    """This rank's report as plain JSON."""
    plain = [asdict(finding) for finding in findings]
    return {"node": me.node, "rank": me.rank, "leader": me.leader, "findings": plain}


def findings_of(reports: Iterable[Report]) -> dict[str, list[Finding]]:
    """Node -> findings: those of its leader, and the faults that its other ranks found."""
    found: dict[str, list[Finding]] = {}
    for report in sorted(reports, key=lambda report: report["rank"]):
        findings = [Finding(**plain) for plain in report["findings"]]
        found.setdefault(report["node"], []).extend(f for f in findings if report["leader"] or f.reason)
    return found


class KeyValueStore:
    """Key-value store at rank 0; calls have a timeout and raise RuntimeError if the store does not answer."""

    def __init__(self, me: RankInfo, seconds: float) -> None:
        """Rank 0 serves, and fails at once if its port is in use; the others try to connect for `seconds`."""
        self._me = me
        self._store = self._connect(me.rank == 0, seconds)

    def for_group(self) -> Store:
        """A store for a process group in a thread: on its own connection, since a blocked call holds its connection."""
        return PrefixStore("group", self._connect(False, POLL_S * 100))

    def _connect(self, serve: bool, seconds: float) -> TCPStore:
        patience = timedelta(seconds=seconds)
        return TCPStore(self._me.host, self._me.port, None, serve, patience, wait_for_workers=False)

    def put(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def get(self, key: str, seconds: float) -> Any:
        """The value of `key` as soon as it is set; None after `seconds`."""
        return self.collect({0: key}, seconds).get(0)

    def collect(self, keys: dict[int, str], seconds: float) -> dict[int, Any]:
        """The values of all keys that are set within `seconds`; returns as soon as all are."""
        deadline, values = time.monotonic() + seconds, {}
        while True:
            for name, key in keys.items():
                if name not in values and self._store.check([key]):
                    values[name] = json.loads(self._store.get(key))
            if len(values) == len(keys) or time.monotonic() > deadline:
                return values
            time.sleep(POLL_S)


class ReportFolder:
    """RUN/preflight/<job>-<restart>-<step>/: one report per node, and the verdict."""

    def __init__(self, run: Path, me: RankInfo) -> None:
        self.path = run / "preflight" / me.name
        self.nodes = me.nodes

    def write(self, report: Report) -> None:
        """Write a node's report. Raises OSError, also if the run folder does not exist, which is a fault."""
        self.path.parent.mkdir(exist_ok=True)
        self.path.mkdir(exist_ok=True)
        write_json(self.path / f"{report['node']}.json", report)

    def seen(self, seconds: float = 0) -> list[str]:
        """Nodes whose report is visible here, waiting up to `seconds` for all; none if the folder cannot be read."""

        def visible() -> list[str]:
            try:
                names = set(os.listdir(self.path))
            except OSError:
                return []
            return [node for node in self.nodes if f"{node}.json" in names]

        return poll(visible, lambda seen: len(seen) == len(self.nodes), seconds)

    def reports(self, seconds: float) -> dict[str, Report]:
        """Node -> its report, of those that are visible within `seconds`."""
        return {node: read_json(self.path / f"{node}.json") for node in self.seen(seconds)}

    def claim(self) -> bool:
        """Whether this process writes the verdict: True for exactly one."""
        try:
            os.close(os.open(self.path / "judge", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:  # no process can write there, and one of them must decide
            return True
        return True

    def verdict(self, seconds: float) -> Report | None:
        """The written verdict, waiting up to `seconds` for it."""
        return poll(lambda: read_json(self.path / "verdict.json"), lambda verdict: verdict is not None, seconds)


def poll(read: Callable[[], Any], enough: Callable[[Any], bool], seconds: float) -> Any:
    """Result of `read` once `enough` accepts it, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not enough(found := read()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return found
