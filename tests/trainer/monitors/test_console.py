"""Step lines: whole in files and logs, and never folded on a terminal."""

import logging
import os
import re
import sys

import pytest

from bifrost.trainer.monitors.console import Console, WithoutSecrets, fitting, step_fields

RECORD = {
    "step": 50000,
    "loss": 0.4321,
    "loss_low_noise": 0.1,
    "loss_high_noise": None,
    "grad_norm": 0.3487,
    "lr": 3e-3,
    "samples_per_s": 12345.6,
    "data_wait_s": 0.02,
    "skipped_steps": 7,
}


def test_a_file_gets_the_whole_line(capsys: pytest.CaptureFixture[str]) -> None:
    Console(100, 0, shown=True).metrics(RECORD)
    assert capsys.readouterr().out == (
        "step  50000  loss 0.4321  low noise 0.1000  high noise not finite  grad 0.3487  lr 3.00e-03"
        "  12345.6 samples/s  wait 20 ms  skipped 7\n"
    )


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_a_terminal_gets_what_fits(width: int) -> None:
    fields = step_fields({key: value for key, value in RECORD.items() if key != "loss_high_noise"})
    line = fitting(fields, width)
    assert line.startswith("step  50000  loss 0.4321")
    if width >= 80:
        assert len(line) <= width and "samples/s" in line
    assert set(line.split("  ")) <= set("  ".join(fields).split("  "))
    assert (line == "  ".join(fields)) == (len("  ".join(fields)) <= width)


def test_lines_of_a_terminal_are_not_folded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    console = Console(100, 0, shown=True)
    assert console._bar is not None
    console.metrics({key: value for key, value in RECORD.items() if not key.endswith("_noise")})
    console.say("a path of more than eighty characters " + "/long" * 20)
    console.close()
    printed = capsys.readouterr().out
    lines = [re.sub(r"\x1b\[[\d;?]*\w", "", line).strip() for line in printed.splitlines()]
    (line,) = [line for line in lines if line.startswith("step")]
    assert line == "step  50000  loss 0.4321  grad 0.3487  lr 3.00e-03  12345.6 samples/s  skipped 7"  # 80
    assert "/long" * 20 in printed


def test_logs_hold_no_logins() -> None:
    record = logging.LogRecord("x", logging.ERROR, "", 1, "%s failed", ("https://me:pw@host/a?sig=abc",), None)
    assert WithoutSecrets("%(message)s").format(record) == "https://REDACTED@host/a?sig=REDACTED failed"


def test_a_run_outlives_who_reads_its_output(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Ctrl-C in a terminal ends the `tee` that a run is piped to, before the run has saved."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        console = Console(100, 0, shown=True)
        console.say("stopped by SIGINT")
        console.metrics(RECORD)
        console.close()
    assert caplog.text.count("standard output is gone") == 1
