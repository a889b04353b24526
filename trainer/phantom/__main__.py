"""`python -m bifrost.trainer.phantom JSON`: count one thing in this process, and print the counts as one line of JSON.

The argument has `recipe`, `overrides`, `text_tokens`, and `ranks` for the engine's counts instead of a pass's.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

if sys.path and sys.path[0] in ("", os.getcwd()):  # as in trainer/__main__.py
    del sys.path[0]

from ...recipes import RecipeError
from ...slurm.exit_codes import DONE, USAGE
from ..errors import RunError
from .device import load


def counts(recipe: str, overrides: list[str], text_tokens: int, ranks: int | None = None) -> dict[str, Any]:
    """The counts as plain values; see `PassCounts` and `EngineCounts`."""
    load()
    from ...recipes import load_recipe
    from .engine import count_engine
    from .passes import count_pass

    settings = load_recipe(recipe, overrides)
    found = count_engine(settings, ranks, text_tokens) if ranks else count_pass(settings, text_tokens)
    return found.as_json()


if __name__ == "__main__":
    code = DONE
    try:
        print(json.dumps(counts(**json.loads(sys.argv[1]))))
    except (RecipeError, RunError) as error:
        print(error, file=sys.stderr)
        code = USAGE
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Python would end torch, which cannot take the device down
