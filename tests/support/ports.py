"""Ports that a test's server binds later than they are chosen."""

import secrets

from bifrost.slurm import rank_env


def free_port() -> int:
    """A port that is free now and not ephemeral: no connection of another test takes it before the server binds it."""
    return rank_env.free_port(secrets.randbelow(rank_env.PORTS))
