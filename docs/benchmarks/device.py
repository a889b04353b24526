"""All checks that need a GPU, in one command with a time limit: `make device`, or

    python docs/benchmarks/device.py [--budget 540] [--folder build/device] [--out FOLDER] [PART …]

Installs the checkout and the wheels of `make device-wheels` into a folder of their own, then runs the parts in their
order, each in a process of its own with a time limit. Without a GPU the same parts run at reduced sizes. The result of
a part is written as soon as it ends, to device.json and device.log in `--folder`, copied to `--out`. Started again, an
interrupted run continues: parts that are done on the same kind of device are left out, whichever checkout they had.
Needs only Python and pip.

Exit code 0 when every part is done, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device_parts import INSTALL, PARTS, ROOT, Context, Part, fingerprint

MARGIN_S = 3
"""Seconds of the budget left for ending a part and writing its result."""
LEAST_S = 5
"""A part is not started with less time than this."""


@dataclass
class Record:
    """The results so far: `device.json`, rewritten after every part."""

    folder: Path
    copies: Path | None
    content: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, copies: Path | None) -> Record:
        """Continue the results in `folder`, unless every part of them is done."""
        try:
            content = json.loads((folder / "device.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = {}
        parts = content.get("parts", {})
        if all(parts.get(part.name, {}).get("state") == "done" for part in PARTS):
            content = {}
            for name in ("device.json", "device.log"):
                (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, copies, {"parts": {}, **content})

    @property
    def log(self) -> Path:
        return self.folder / "device.log"

    def is_done(self, part: Part, context: Context) -> bool:
        """Whether a part was done on this kind of device; the installation, of this checkout."""
        found = self.content["parts"].get(part.name, {})
        same = "checkout" if part is INSTALL else "on"
        return found.get("state") == "done" and found[same] == (context.checkout if part is INSTALL else context.kind)

    def add(self, part: Part, **result: Any) -> None:
        self.content["parts"][part.name] = {"shows": part.shows, **result}
        self.write()

    def write(self) -> None:
        draft = self.folder / "device.json.new"
        draft.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.folder / "device.json")
        if self.copies:
            self.copies.mkdir(parents=True, exist_ok=True)
            for name in ("device.json", "device.log"):
                if (self.folder / name).exists():
                    shutil.copyfile(self.folder / name, self.copies / name)


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description="All checks that need a GPU, within a time limit.")
    made.add_argument("parts", nargs="*", metavar="PART", help=f"default all: {', '.join(p.name for p in PARTS)}")
    made.add_argument("--budget", type=float, default=540, help="seconds for everything (default %(default)s)")
    made.add_argument("--folder", type=Path, default=ROOT / "build" / "device")
    made.add_argument("--out", type=Path, help="folder for copies of device.json and device.log")
    made.add_argument("--wheels", type=Path, default=ROOT / "build" / "device-wheels")
    given = made.parse_args(arguments)
    if unknown := set(given.parts) - {part.name for part in PARTS}:
        made.error(f"{', '.join(sorted(unknown))}: known parts are {', '.join(part.name for part in PARTS)}")
    end = time.monotonic() + given.budget
    record = Record.open(given.folder.resolve(), given.out)
    context = Context(record.folder, given.wheels.resolve(), fingerprint(given.wheels))
    chosen = [part for part in PARTS if not given.parts or part.name in given.parts or part is INSTALL]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the part that runs, too
    try:
        for part in chosen:
            run_part(part, context, record, end)
            if part is INSTALL:
                context.kind = record.content["device"] = device_kind(context)
                record.content["date"] = time.strftime("%Y-%m-%d", time.gmtime())
                record.write()
    finally:
        signal.signal(signal.SIGTERM, before)
    print(table(record.content))
    return int(any(record.content["parts"][part.name]["state"] != "done" for part in chosen))


def device_kind(context: Context) -> str:
    """`cuda`, `phantom` or `cpu`; `unknown` if the installed package cannot tell."""
    asked = "from bifrost.trainer.bench.machine import device_kind; print(device_kind())"
    with open(context.folder / "device.log", "a", encoding="utf-8") as log:
        ended = subprocess.run(
            [sys.executable, "-c", asked],
            cwd=context.folder,
            env=context.environment(),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    return (ended.stdout.split() or ["unknown"])[-1]


def run_part(part: Part, context: Context, record: Record, end: float) -> None:
    """Run a part within its limit and what is left until `end`, and record its outcome."""
    kind = "any" if part is INSTALL else context.kind
    if record.is_done(part, context):
        print(f"{part.name:<14} done before", flush=True)
        return
    if part is not INSTALL and kind == "unknown":
        record.add(part, state="not run", on=kind, reason="the package cannot be imported: see device.log")
        return
    left = end - time.monotonic() - MARGIN_S
    if left < LEAST_S:
        record.add(part, state="not run", on=kind, reason="the budget is spent")
        return
    folder = context.folder / part.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = part.command(context, folder)
    if isinstance(command, str):
        record.add(part, state="not run", on=kind, reason=command)
        return
    limit, begun = min(part.limit_s, left), time.monotonic()
    code = run(command, context, limit, record.log)
    spent = time.monotonic() - begun
    shown = " ".join(command).replace(f"{ROOT}/", "").replace(sys.executable, "python")
    result: dict[str, Any] = {"on": kind, "checkout": context.checkout, "command": shown}
    result |= {"seconds": round(spent, 1), "limit_s": round(limit, 1)}
    try:
        result["figures"] = part.figures(folder)
        result["records"] = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")}
    except (OSError, ValueError, KeyError, IndexError) as error:
        result["reason"] = f"no result: {type(error).__name__} {error}".replace(f"{ROOT}/", "")
    if code is None:
        result["reason"] = f"not done within {limit:.0f} s"
    elif code:
        result["reason"] = f"exit code {code}: see device.log"
    state = "timed out" if code is None else "failed" if "reason" in result else "done"
    record.add(part, state=state, **result)
    print(f"{part.name:<14} {state} in {spent:.0f} s of {limit:.0f} s on {kind}", flush=True)


def run(command: Sequence[str], context: Context, limit: float, log: Path) -> int | None:
    """Run a command with its output in the log; its exit code, None if it was ended after `limit` seconds."""
    with open(log, "a", encoding="utf-8") as file:
        print(f"\n$ {' '.join(command)}", file=file, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=context.environment(), stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Its children too: ranks, and xdist's workers.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def table(content: dict[str, Any]) -> str:
    lines = [f"device: {content.get('device', 'unknown')}"]
    for name, part in content["parts"].items():
        figures = ", ".join(f"{key} {value}" for key, value in part.get("figures", {}).items() if value is not None)
        lines.append(f"{name:<14} {part['state']:<10} {part['on']:<8} {part.get('reason') or figures}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
