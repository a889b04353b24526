"""Memory of Newton-Schulz at a real size, on the phantom GPU, against the plan."""

import pytest

import phantoms
from bifrost.trainer.optim.rules import orthogonalization_bytes


def peak(rows: int, columns: int) -> int:
    """Bytes at the peak of one rank's turn, its matrix included."""
    import torch

    from bifrost.trainer.optim.muon import orthogonal
    from bifrost.trainer.phantom.mode import Phantom

    with Phantom() as mode:
        matrix = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")
        mode.restart()
        orthogonal(matrix)
        return mode.memory.peak


@pytest.mark.parametrize("shape", [(18944, 3584), (3584, 3584), (512, 3584)])
def test_newton_schulz_needs_what_is_planned(shape: tuple[int, int]) -> None:
    assert phantoms.run(peak, *shape) == pytest.approx(orthogonalization_bytes(shape), rel=0.05)
