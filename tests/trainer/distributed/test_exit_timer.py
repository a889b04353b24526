"""The clock ends a process that keeps the interpreter's lock, and none that puts it off."""

import subprocess
import sys

SCRIPT = """
import ctypes
from bifrost.trainer.distributed.exit_timer import ExitTimer
timer = ExitTimer(76)
timer.set(0.5)
timer.{call}
ctypes.PyDLL(None).sleep(2)
"""


def code(call: str) -> int:
    return subprocess.run([sys.executable, "-c", SCRIPT.format(call=call)], timeout=120, check=False).returncode


def test_a_blocked_interpreter_is_ended() -> None:
    assert code("set(1.0)") == 76


def test_put_off_and_cancelled() -> None:
    assert code("set(60)") == 0
    assert code("cancel()") == 0
