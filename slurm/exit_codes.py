"""Exit codes of a rank, which the batch script and the launcher understand."""

DONE = 0
FAILED = 1
"""It cannot go on by itself: a bug, or a run that is not healthy."""
USAGE = 2
"""The user has to mend something; one line says what."""
LOST = 74
"""Storage failed in a way that may pass, or a loader's worker was killed: start it again (EX_IOERR)."""
STOPPED = 75
"""Asked to stop and has saved: start it again and it goes on (EX_TEMPFAIL)."""
HUNG = 76
"""The watchdog ended it: start it again."""
BAD_NODE = 77
"""Preflight found a bad node: start it again without that node."""
LOCKED = 78
"""Another live copy owns the run: leave it alone."""
INTERRUPTED = 130
"""Ended by Ctrl-C, without a save."""
