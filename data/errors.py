"""The errors of the data plane."""

from __future__ import annotations


class DataError(ValueError):
    """Something the user can put right. The message is one line: what is wrong, where, what to do."""

    passing = False
    """Whether another attempt may succeed with nothing changed."""


class DataMissing(DataError):
    """There is no such file or object."""


class DataLost(DataError):
    """What was there cannot be read any more, or who read it was killed: another start may well go on."""

    passing = True


class WrongAnswer(ConnectionError):
    """A server's answer that breaks its protocol. One may be damage on its way and is asked for again; a server that
    gives nothing else has to be fixed, and another start of the job does not do that."""

    def __init__(self, text: str, lasting: bool = False) -> None:
        super().__init__(text)
        self.lasting = lasting
        """Whether asking again is known to be useless."""


class BadSample(ValueError):
    """One sample that cannot be used; a reader replaces it, an ingest sets it aside."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"
