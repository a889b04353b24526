"""Imported once by the fork server, so that a rank of a test starts in milliseconds."""

import deepspeed  # noqa: F401
