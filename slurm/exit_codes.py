"""Exit codes of a rank, as the batch script and the launcher interpret them."""

DONE = 0
FAILED = 1
"""Not retryable: a bug, or an unhealthy run."""
USAGE = 2
"""User error; one line states what to fix."""
LOST = 74
"""Transient storage failure, or a killed loader worker: retryable (EX_IOERR)."""
STOPPED = 75
"""Stopped on request after saving: restart to resume (EX_TEMPFAIL)."""
HUNG = 76
"""Ended by the watchdog: retryable."""
BAD_NODE = 77
"""Preflight found a bad node: retryable without that node."""
LOCKED = 78
"""Another process owns the run: not retryable."""
INTERRUPTED = 130
"""Ended by Ctrl-C without saving."""
