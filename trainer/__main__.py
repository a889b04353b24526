"""`python -m bifrost.trainer`: the `bifrost` command, for launchers that start modules."""

import os
import sys

# Python before 3.11 ignores PYTHONSAFEPATH and puts the working directory first, whose folders `kernels/` and `data/`
# would shadow distributions of those names.
if sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from .distributed.interrupt import end_on_interrupt
from .distributed.stop_signals import end_on_signals

RANK_OF = {"BIFROST_LAUNCHER", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID"}


def start() -> None:
    """Run the command; Ctrl-C is handled even during its imports, which take seconds."""
    end_on_interrupt()
    # The launcher starts its ranks with stop signals blocked.
    if sys.argv[1:2] in (["train"], ["resume"]) and RANK_OF & os.environ.keys():
        end_on_signals()
    from .cli.main import main

    main()


if __name__ == "__main__":
    start()
