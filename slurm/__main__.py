"""`python -m bifrost.slurm`: the Slurm commands without torch, for the short steps of the batch script."""

import os
import sys

# As in trainer/__main__.py: folders in the working directory must not shadow distributions of the same name.
if sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from ..data.errors import DataError
from ..recipes import RecipeError
from .cli import slurm_app
from .errors import SlurmError
from .exit_codes import LOST, USAGE

try:
    slurm_app()
except (DataError, RecipeError, SlurmError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(LOST if isinstance(error, DataError) and error.transient else USAGE)
