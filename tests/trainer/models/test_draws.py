"""Draws on a tensor's device: the loader's numbers to the bit, and normal ones."""

import numpy as np
import pytest
import torch

from bifrost.trainer.models import draws
from bifrost.trainer.models.rng import Stream, states, uniform


def test_lanes_are_those_of_the_loader_to_the_bit() -> None:
    epoch, index = np.array([0, 3, -1]), np.array([0, 12345678901, 2**62])
    wanted = uniform(7, Stream.LATENT_NOISE, epoch, index, 1000)
    own = torch.from_numpy(states(7, Stream.LATENT_NOISE, epoch, index).view(np.int64))
    found = draws.uniform_lanes(own[:, None], torch.arange(1000))
    assert found.dtype == torch.float64
    np.testing.assert_array_equal(found.numpy(), wanted)


def test_gaussian_draws() -> None:
    uniform = torch.tensor([[0.5, 0.975], [0.0227501319, 2.0**-54]], dtype=torch.float64)
    found = draws.gaussian(uniform)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0], torch.tensor([0.0, 1.959964]))
    assert found[1, 0].item() == pytest.approx(-2.0, abs=1e-5) and found.isfinite().all()
