"""Prefix attention against scores written out in fp64: ragged captions, padding on either side, grouped queries."""

import pytest
import torch

from bifrost.kernels import prefix_attention


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_equals_dense_attention(groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    samples, heads, text, image, width = 3, 6, 7, 4, 8
    query = torch.randn(samples, heads, image, width, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, samples, groups, text + image, width, generator=generator, dtype=torch.float64)
    visible = torch.ones(samples, text + image, dtype=torch.bool)
    visible[1, 1:text] = False  # one real token, padded on the right
    visible[2, : text - 3] = False  # three, padded on the left
    found = prefix_attention(query, key, value, visible, 0.3)
    full_key, full_value = (t.repeat_interleave(heads // groups, dim=1) for t in (key, value))
    scores = query @ full_key.transpose(-1, -2) * 0.3
    scores = scores.masked_fill(~visible[:, None, None, :], -torch.inf)
    torch.testing.assert_close(found, scores.softmax(-1) @ full_value, atol=1e-12, rtol=0)


def test_without_padding_no_mask_is_needed() -> None:
    query, key = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 5, 8)
    everything = torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(
        prefix_attention(query, key, key, None, 1.0), prefix_attention(query, key, key, everything, 1.0)
    )
