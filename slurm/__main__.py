"""`python -m bifrost.slurm`: the Slurm commands without torch, for the short steps of the batch script."""

import os
import sys

# As in trainer/__main__.py: folders in the working directory must not shadow distributions of the same name.
if sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from ..recipes import RecipeError
from .cli import slurm_app
from .errors import SlurmError
from .exit_codes import USAGE

try:
    slurm_app()
except (RecipeError, SlurmError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(USAGE)
