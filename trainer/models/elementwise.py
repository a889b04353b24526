"""Norms and SwiGLU of Qwen's layers, by torch or by Liger's fused kernels.

Liger's own patch of transformers replaces classes by name, for every model of the process, and switches on a fused
cross-entropy; here its functions are put into one model's layers alone. Rotary embedding stays torch's: transformers
calls it as a global function, and the published recipe does not rotate patches at all.
"""

from __future__ import annotations

import importlib
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

Provider = Literal["torch", "liger"]


def unavailable(provider: Provider, device: torch.device) -> str | None:
    """Why `provider` cannot run there, in one line; None where it can."""
    if provider == "torch":
        return None
    if device.type != "cuda":
        return "liger needs a CUDA device"
    try:
        _liger()
    except Exception as error:  # it fails in many ways when its Triton is not the installed one
        return f"liger cannot be imported ({type(error).__name__}: {error}): pip install liger-kernel"
    return None


def use_liger(model: nn.Module) -> None:
    """Let every RMSNorm and SwiGLU below `model` compute by Liger, out of place: their gradients have other readers."""
    norm, product = _liger()

    def normalized(self: Any, hidden: Tensor) -> Tensor:
        # Offset 0, Llama's casts (rounded before the weight multiplies), not in place.
        return norm.apply(hidden, self.weight, self.variance_epsilon, 0.0, "llama", False)

    def gated(self: Any, hidden: Tensor) -> Tensor:
        return self.down_proj(product.apply(self.gate_proj(hidden), self.up_proj(hidden)))

    for module in model.modules():
        if type(module) is qwen.Qwen2_5_VLRMSNorm:
            module.forward = MethodType(normalized, module)
        elif type(module) in (qwen.Qwen2MLP, qwen.Qwen2_5_VLMLP):
            module.forward = MethodType(gated, module)


def _liger() -> tuple[Any, Any]:
    """Liger's autograd functions: RMSNorm, SiLU(a) * b."""
    operations = importlib.import_module("liger_kernel.ops")
    return operations.LigerRMSNormFunction, operations.LigerSiLUMulFunction
