"""The errors of the Slurm commands."""


class SlurmError(ValueError):
    """Bad input, or Slurm refused; the message is one line: what, where, what to do."""
