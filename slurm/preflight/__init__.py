"""Preflight: checks the nodes before training and names the bad ones, in bounded time."""

from .finding import Finding, Limits, read_limits
from .rank_info import RankInfo, find_rank_info
from .runner import preflight

__all__ = ["Finding", "Limits", "RankInfo", "find_rank_info", "preflight", "read_limits"]
