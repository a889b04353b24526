"""The top-level package; its subpackages are the folders next to this one: bifrost.kernels, bifrost.data, …"""

import importlib
from typing import Any

__version__ = "0.1.0"
"""The single source of the version, which setup.py reads. CHANGELOG.md lists the changes of each version."""

_PUBLIC = {
    "BifrostPipeline": "trainer.inference.pipeline",
    "Generator": "trainer.inference.generator",
    "evaluate": "trainer.evaluation.evaluate",
    "load_recipe": "recipes",
    "open_dataset": "data",
    "open_run": "trainer.report.files",
    "train": "trainer.training.train",
}
"""Name -> module that it is imported from when it is first used: most of them import torch."""


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
