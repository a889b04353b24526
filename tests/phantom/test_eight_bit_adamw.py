"""Memory and traffic of an update of AdamW in 8 bits at a real size, on the phantom GPU, against the plan."""

from __future__ import annotations

import pytest

import phantoms
from bifrost.trainer.optim.rules import BLOCK, CHUNK, RULES


def update() -> tuple[float, float]:
    """Per element of a chunk: bytes that an update needs next to state, masters and gradients, and bytes that its
    operators read and write."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from bifrost.trainer.optim.eight_bit_adamw import EightBitAdamW
    from bifrost.trainer.optim.eight_bit_slice import Slice
    from bifrost.trainer.phantom.mode import Phantom

    moved = 0

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal moved
            result = function(*args, **(kwargs or {}))
            views = function.is_view or "empty" in str(function)
            for tensor in () if views else tree_leaves((args, result)):
                moved += tensor.nbytes if isinstance(tensor, torch.Tensor) and tensor.numel() > BLOCK else 0
            return result

    group = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    with Phantom() as mode:
        flat = torch.nn.Parameter(torch.zeros(2 * CHUNK, device="cuda"))
        flat.grad = torch.zeros_like(flat)
        optimizer = EightBitAdamW([{"params": [flat]}], (0.9, 0.95), 1e-8)
        maps = {kind: torch.zeros(BLOCK, device="cuda") for kind in ("exp_avg", "exp_avg_sq")}
        optimizer._codes, optimizer.state[flat] = maps, {"step": torch.tensor(1.0)}
        own = Slice.of(2 * CHUNK, 0, 2 * CHUNK, 0, flat.detach())
        held = mode.memory.live
        mode.restart()
        with Counted():
            optimizer._update(own, flat, group, None)
        return (mode.memory.peak - held) / CHUNK, moved / (2 * CHUNK)


def test_an_update_needs_and_moves_what_is_planned() -> None:
    temporary, moved = phantoms.run(update)
    print(temporary, moved)
    rule = RULES["adamw-8bit"]
    assert rule.temporary == pytest.approx(temporary, rel=0.05)
    assert rule.moved == pytest.approx(moved, rel=0.05)
