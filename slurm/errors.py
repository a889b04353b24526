"""The errors of the Slurm commands, and any error in one line."""


class SlurmError(ValueError):
    """Bad input, or Slurm refused; the message is one line: what, where, what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; its type's name if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
