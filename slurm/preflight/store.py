"""How ranks find each other before they trust each other: files in the run's folder, and a store at rank 0.

A node's report lies in both. So a node that reaches neither is told from one that only cannot reach the rendezvous,
and when rank 0 is the dead one, the lowest node alive judges by the files.
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
from .rank_info import Place

Report = dict[str, Any]
"""{"node": …, "rank": …, "leader": …, "findings": [Finding as a dict, …]}"""

POLL_S = 0.1


def report_of(place: Place, findings: list[Finding]) -> Report:
    """This rank's report as plain JSON."""
    plain = [asdict(finding) for finding in findings]
    return {"node": place.node, "rank": place.rank, "leader": place.leader, "findings": plain}


def findings_of(reports: Iterable[Report]) -> dict[str, list[Finding]]:
    """Node -> findings: its leader's, and what its other ranks find bad."""
    found: dict[str, list[Finding]] = {}
    for report in sorted(reports, key=lambda report: report["rank"]):
        findings = [Finding(**plain) for plain in report["findings"]]
        found.setdefault(report["node"], []).extend(f for f in findings if report["leader"] or f.reason)
    return found


class Board:
    """Key and value at rank 0; calls are bounded in time and raise RuntimeError where the store does not answer."""

    def __init__(self, place: Place, seconds: float) -> None:
        """Rank 0 serves and fails at once when its port is taken; the others try for `seconds`."""
        self._place = place
        self._store = self._connect(place.rank == 0, seconds)

    def for_group(self) -> Store:
        """For a process group in a thread: with a connection of its own, since a waiting call holds its connection."""
        return PrefixStore("group", self._connect(False, POLL_S * 100))

    def _connect(self, serve: bool, seconds: float) -> TCPStore:
        patience = timedelta(seconds=seconds)
        return TCPStore(self._place.host, self._place.port, None, serve, patience, wait_for_workers=False)

    def put(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def get(self, key: str, seconds: float) -> Any:
        """The value of `key` as soon as it is there; None when it is not within `seconds`."""
        return self.collect({0: key}, seconds).get(0)

    def collect(self, keys: dict[int, str], seconds: float) -> dict[int, Any]:
        """The values of all keys that are there within `seconds`, at once when all are."""
        deadline, values = time.monotonic() + seconds, {}
        while True:
            for name, key in keys.items():
                if name not in values and self._store.check([key]):
                    values[name] = json.loads(self._store.get(key))
            if len(values) == len(keys) or time.monotonic() > deadline:
                return values
            time.sleep(POLL_S)


class Folder:
    """RUN/preflight/<job>-<restart>-<step>/: a report a node, and the verdict."""

    def __init__(self, run: Path, place: Place) -> None:
        self.path = run / "preflight" / place.name
        self.nodes = place.nodes

    def write(self, report: Report) -> None:
        """Raises OSError. The run's folder itself is not made: where it is missing, something is wrong."""
        self.path.parent.mkdir(exist_ok=True)
        self.path.mkdir(exist_ok=True)
        write_json(self.path / f"{report['node']}.json", report)

    def seen(self, seconds: float = 0) -> list[str]:
        """Nodes whose report is seen here, waiting up to `seconds` for all; none where the folder cannot be read."""

        def look() -> list[str]:
            try:
                names = set(os.listdir(self.path))
            except OSError:
                return []
            return [node for node in self.nodes if f"{node}.json" in names]

        return poll(look, lambda seen: len(seen) == len(self.nodes), seconds)

    def reports(self, seconds: float) -> dict[str, Report]:
        """Node -> its report, of those that are here within `seconds`."""
        return {node: read_json(self.path / f"{node}.json") for node in self.seen(seconds)}

    def claim(self) -> bool:
        """Whether this process judges: one alone gets a yes."""
        try:
            os.close(os.open(self.path / "judge", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:  # nobody can write there, and somebody has to judge
            return True
        return True

    def verdict(self, seconds: float) -> Report | None:
        """What the judge wrote, waiting up to `seconds` for it."""
        return poll(lambda: read_json(self.path / "verdict.json"), lambda verdict: verdict is not None, seconds)


def poll(look: Callable[[], Any], enough: Callable[[Any], bool], seconds: float) -> Any:
    """What `look` gives once it is enough, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not enough(found := look()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return found
