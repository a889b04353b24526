"""Slurm: batch jobs, rank environments and a local test cluster."""

from .errors import SlurmError
from .rank_env import launched_by, private_folders, rank_environment

__all__ = ["SlurmError", "launched_by", "private_folders", "rank_environment"]
