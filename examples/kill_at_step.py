"""Run a training command, and kill all its processes with SIGKILL once its run has logged a step.

    python examples/kill_at_step.py RUN STEP bifrost train recipes/tiny-mllm.yaml --ranks 2

The same command without this script resumes RUN from its last checkpoint. A run that is already past STEP is left
alone. Ctrl-C is passed on. Exit code: 0 after the kill, else that of the command.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

POLL_S = 0.1


def last_step(run: Path) -> int:
    """The last logged step, 0 without any."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return max((record["step"] for record in records if "event" not in record), default=0)


def main(run: Path, step: int, command: list[str]) -> int:
    if last_step(run) >= step:
        print(f"{run} is past step {step}: nothing to kill", flush=True)
        return 0
    process = subprocess.Popen(command, start_new_session=True)
    try:
        while process.poll() is None:
            if (last := last_step(run)) >= step:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                print(f"kill -9 of all processes of {run} after step {last}", flush=True)
                return 0
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
