"""`python -m bifrost`: the `bifrost` command."""

# Installed as `bifrost.trainer`, which is not visible in the tree.
from .trainer.__main__ import start  # pyright: ignore[reportMissingImports]

if __name__ == "__main__":
    start()
