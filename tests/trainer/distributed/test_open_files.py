"""Open files of a rank: the soft limit is raised to what the number of ranks needs; too low a hard limit is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 1200))
from bifrost.trainer.distributed.open_files import allow_open_files
from bifrost.trainer.errors import RunError
for ranks in map(int, sys.argv[1:]):
    try:
        allow_open_files(ranks)
    except RunError as error:
        print(error)
    print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ("100", "556 1200"),
        ("300 1", "1156 1200\n1156 1200"),  # never lowered
        (
            "400",
            "400 ranks need up to 1456 open files each, and this machine allows 1200: raise the hard limit"
            " (ulimit -Hn, LimitNOFILE of slurmd)\n200 1200",
        ),
    ],
)
def test_the_limit_follows_the_number_of_ranks(ranks: str, expected: str) -> None:
    words = [sys.executable, "-c", LIMITED, *ranks.split()]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == expected
