"""Errors of the data package."""

from __future__ import annotations


class DataError(ValueError):
    """An error that the user can fix. The message is one line: what is wrong, where, what to do."""

    transient = False
    """Whether another attempt may succeed without any change."""


class DataMissing(DataError):
    """The file or object does not exist."""


class DataLost(DataError):
    """Data became unreadable, or the process that read it was killed. Retryable."""

    transient = True


class InvalidResponse(ConnectionError):
    """A response that violates the protocol. A single one may be damaged in transit and is retried; a server that
    sends nothing else has to be fixed, and restarting the job does not help."""

    def __init__(self, text: str, lasting: bool = False) -> None:
        super().__init__(text)
        self.lasting = lasting
        """Whether a retry is known to be useless."""


class BadSample(ValueError):
    """A sample that cannot be used: the reader replaces it, ingest sets it aside."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"
