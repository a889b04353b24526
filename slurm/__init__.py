"""Slurm: jobs, the ranks that they start, and a cluster to try them on."""

from .errors import SlurmError
from .rank_env import launched_by, private_folders, rank_environment

__all__ = ["SlurmError", "launched_by", "private_folders", "rank_environment"]
