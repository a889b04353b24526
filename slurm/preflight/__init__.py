"""Preflight: are these nodes fit to train on? Names those that are not, in bounded time."""

from .finding import Finding, Limits, read_limits
from .place import Place, find_place
from .session import preflight

__all__ = ["Finding", "Limits", "Place", "find_place", "preflight", "read_limits"]
