"""All-gather of Python objects, for code that does not need torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Gather = Callable[[object], list[Any]]
"""All-gather of a Python object: every rank passes one and gets those of all ranks, in rank order."""


def single_process(value: object) -> list[Any]:
    """The gather of a single rank."""
    return [value]
