"""Preflight: are these nodes fit to train on? Names those that are not, in bounded time."""

from .finding import Finding, Limits, read_limits
from .rank_info import Place, find_place
from .runner import preflight

__all__ = ["Finding", "Limits", "Place", "find_place", "preflight", "read_limits"]
