"""Progress of long work: quiet when short, lines with the time left in a log, a bar on a terminal."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bifrost.data import progress as module
from bifrost.data.progress import progress, track
from bifrost.data.units import format_seconds


def test_log_lines_show_count_and_time_left(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.05)
    with progress("verifying", 4000, "shards", done=1000) as shown:
        time.sleep(0.02)
        shown.advance(1500)
        time.sleep(0.1)
    lines = capfd.readouterr().err.splitlines()
    assert lines and lines[0] == "verifying: 2,500 of 4,000 shards, 0 s left"


def test_time_left_excludes_earlier_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 10.0, 40.0))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    shown = progress("rendering", 100, "images", done=40)
    assert shown.line() == "rendering: 40 of 100 images, 10 s so far"
    shown.advance(20)
    assert shown.line() == "rendering: 60 of 100 images, 1 min 20 s left"  # 20 took 40 s, 40 left


def test_short_work_is_silent_and_stdout_stays_empty(capfd) -> None:
    assert list(track([1, 2, 3], "adding", 3, "numbers")) == [1, 2, 3]
    with progress("loading"):
        pass
    assert capfd.readouterr() == ("", "")


def test_durations() -> None:
    assert [format_seconds(s) for s in (0, 59.4, 59.6, 3599, 3600, 7500)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "59 min 59 s",
        "1 h 00 min",
        "2 h 05 min",
    ]


SCRIPT = """
import time
from bifrost.data import progress as module
module.QUIET_S = 0.05
with module.progress("eating", 8, "apples") as shown:
    shown.advance(3)
    time.sleep(0.6)
    print("a result")
    time.sleep(0.3)
"""


def test_bar_on_a_terminal_leaves_redirected_stdout_clean(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with open(tmp_path / "out", "wb") as out:
        child = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=out, stderr=theirs)
        os.close(theirs)
        seen = b""
        while True:
            try:
                block = os.read(ours, 4096)
            except OSError:  # the child has closed its end
                break
            if not block:
                break
            seen += block
        assert child.wait() == 0
    os.close(ours)
    assert b"eating apples" in seen and b"3/8" in seen
    assert seen.rstrip().endswith(b"\x1b[2K") or b"\x1b[?25h" in seen, "the cursor is back"
    assert (tmp_path / "out").read_text() == "a result\n"
