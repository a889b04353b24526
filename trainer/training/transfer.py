"""Transfer of a micro-batch to the device."""

from __future__ import annotations

from typing import Any

import torch

from ...data import Batch


def on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The arrays of a micro-batch, tensors on `device`."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.arrays.items()
    }
