"""`python -m bifrost.trainer`: the `bifrost` command, for launchers that start modules."""

import os
import sys

# Python before 3.11 knows no PYTHONSAFEPATH and puts the working directory first, whose folders `kernels/` and `data/`
# would shadow distributions of those names.
if sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from .cli import main

main()
