"""`python -m bifrost.trainer`: the `bifrost` command, for launchers that start modules."""

import os
import sys

# Python before 3.11 knows no PYTHONSAFEPATH and puts the working directory first, whose folders `kernels/` and `data/`
# would shadow distributions of those names.
if sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from .monitors.stop import hold_signals

# A rank takes seconds to import what it needs: a signal that comes then is for the run that follows.
if "SLURM_STEP_ID" in os.environ and sys.argv[1:2] == ["train"]:
    hold_signals()

from .cli import main

main()
