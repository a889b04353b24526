"""The trainer's error for its users."""


class RunError(ValueError):
    """Bad input or state that the user can mend; the message is one line: what, where, what to do."""


class Locked(RunError):
    """Another start of the run is alive."""


class Unhealthy(RuntimeError):
    """Training cannot usefully go on; the message is one line with the reason."""
