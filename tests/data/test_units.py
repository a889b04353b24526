from __future__ import annotations

import pytest

from bifrost.data.units import counted


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 shards"), (1, "1 shard"), (2, "2 shards"), (12345, "12,345 shards")]
)
def test_nouns_agree_with_their_numbers(number: int, text: str) -> None:
    assert counted(number, "shard") == text


def test_other_plurals() -> None:
    assert [counted(n, "pass", "es") for n in (1, 3)] == ["1 pass", "3 passes"]
