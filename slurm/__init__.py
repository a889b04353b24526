"""Slurm: jobs, the ranks that they start, and a cluster to try them on."""

from .errors import SlurmError
from .ranks import private_folders, rank_environment

__all__ = ["SlurmError", "private_folders", "rank_environment"]
