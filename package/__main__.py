"""`python -m bifrost`: the `bifrost` command."""

# Installed as `bifrost.trainer`, which a look at the tree does not tell.
from .trainer.__main__ import start  # pyright: ignore[reportMissingImports]

if __name__ == "__main__":
    start()
