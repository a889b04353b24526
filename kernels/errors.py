"""Errors as one line."""


def first_line(error: Exception) -> str:
    """The first line of the error's text, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
