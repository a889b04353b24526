import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bifrost.trainer.checkpoint.layout import local_range, reads


def cut(numel, ranks):
    """The definition: flatten, pad to a multiple of the ranks, cut evenly, drop the padding (-1)."""
    size = (numel + ranks - 1) // ranks
    padded = np.full(size * ranks, -1)
    padded[:numel] = np.arange(numel)
    return [piece[piece >= 0] for piece in padded.reshape(ranks, size)]


@given(st.integers(0, 200), st.integers(1, 70))
def test_local_ranges_are_the_even_cut(numel, ranks):
    for rank, held in enumerate(cut(numel, ranks)):
        assert list(range(*local_range(numel, rank, ranks))) == held.tolist()


@given(st.integers(0, 200), st.integers(1, 70), st.integers(1, 70))
def test_slices_read_at_any_world_size(numel, saved_ranks, ranks):
    saved = cut(numel, saved_ranks)
    for rank, held in enumerate(cut(numel, ranks)):
        lo, hi = local_range(numel, rank, ranks)
        result = np.full(hi - lo, -1)
        for piece in reads(numel, lo, hi, saved_ranks):
            assert 0 <= piece.start < piece.stop <= len(saved[piece.rank])
            result[piece.at : piece.at + piece.stop - piece.start] = saved[piece.rank][piece.start : piece.stop]
        assert result.tolist() == held.tolist()


@given(st.data(), st.integers(0, 100), st.integers(1, 30))
def test_any_range(data, numel, saved_ranks):
    lo = data.draw(st.integers(0, numel))
    hi = data.draw(st.integers(lo, numel))
    saved = cut(numel, saved_ranks)
    found = [saved[p.rank][p.start : p.stop] for p in reads(numel, lo, hi, saved_ranks)]
    assert [element for piece in found for element in piece] == list(range(lo, hi))


@pytest.mark.parametrize(("lo", "hi"), [(-1, 2), (3, 2), (0, 11)])
def test_range_outside_the_parameter(lo, hi):
    with pytest.raises(IndexError, match="parameter with 10"):
        reads(10, lo, hi, 2)
