"""Slurm: what a job's environment says about this process."""

from .ranks import rank_environment

__all__ = ["rank_environment"]
