"""Imported once by the fork server, so that a rank of a test starts in milliseconds."""

import bifrost.trainer.cli
import bifrost.trainer.run
import deepspeed  # noqa: F401
