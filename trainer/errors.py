"""The trainer's error for its users."""


class RunError(ValueError):
    """Bad input or state that the user can mend; the message is one line: what, where, what to do."""


class Unhealthy(RuntimeError):
    """Training cannot usefully go on; the message is one line with the reason."""
