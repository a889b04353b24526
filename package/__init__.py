"""The top-level package; its subpackages are the folders next to this one: bifrost.kernels, bifrost.data, …"""

from typing import Any

__version__ = "0.1.0"
"""The single source of the version, which setup.py reads. CHANGELOG.md lists the changes of each version."""


def __getattr__(name: str) -> Any:
    """`BifrostPipeline`, imported when it is first used: it imports torch, which most commands do without."""
    if name != "BifrostPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Installed as `bifrost.trainer`, which is not visible in the tree.
    from .trainer.inference.pipeline import BifrostPipeline  # pyright: ignore[reportMissingImports]

    return BifrostPipeline
