"""Linear layers of frozen parts with weights in 8 bits and a scale per output channel, dequantized for each product.

A weight [out, in] is a parameter of int8, or of uint8 with the bits of float8_e4m3fn; its scale [out] is a parameter of
int32 with the bits of fp32 numbers. As integers they pass through DeepSpeed unchanged, which casts floating-point
parameters to the run's precision; ZeRO-3 shards and gathers them like any other.
"""

from __future__ import annotations

from . import libraries  # noqa: F401  # isort: skip

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.initialization import no_init_weights

EightBits = Literal["int8", "fp8"]

LARGEST: dict[EightBits, float] = {"int8": 127.0, "fp8": 448.0}
"""Largest magnitude used: both ranges are symmetric."""
STORED: dict[EightBits, torch.dtype] = {"int8": torch.int8, "fp8": torch.uint8}
"""Type of the parameter."""
_FP8 = torch.float8_e4m3fn


def quantized(weight: Tensor, kind: EightBits) -> tuple[Tensor, Tensor]:
    """Rows [n, in] of a weight in 8 bits, of type `STORED`, and their scales [n], fp32: the largest magnitude of each
    row becomes `LARGEST`."""
    weight = weight.float()
    scale = weight.abs().amax(1) / LARGEST[kind]
    scale = torch.where(scale > 0, scale, 1.0)
    values = (weight / scale[:, None]).clamp_(-LARGEST[kind], LARGEST[kind])
    return (values.round_().to(torch.int8) if kind == "int8" else values.to(_FP8).view(torch.uint8)), scale


def dequantized(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """weight x scale [out, in], computed in fp32 and rounded once to `dtype`; without a scale the weight itself."""
    if scale is None:
        return weight
    # The product casts while it writes; it has no fp8, whose values bf16 represents exactly.
    values = weight.view(_FP8).to(torch.bfloat16) if weight.dtype == torch.uint8 else weight
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    return torch.mul(values, scale.view(torch.float32)[:, None], out=out)


@contextmanager
def eight_bit_linears(kind: EightBits) -> Iterator[None]:
    """torch's linear layers that are built in this context are frozen, without initial values, and have weights in 8
    bits; the additional parameter is called `scale`. No layer's weight is allocated in full precision for longer than
    its construction takes."""

    # Any: a parameter or None, of which torch's annotation knows the latter only.
    def replace(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        if type(module) is not nn.Linear or name != "weight":
            return None
        module.register_parameter("scale", empty(parameter.shape[:1], torch.int32, parameter.device))
        return empty(parameter.shape, STORED[kind], parameter.device)

    def empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

    handle = register_module_parameter_registration_hook(replace)
    try:
        with no_init_weights():
            yield
    finally:
        handle.remove()


def scale_of(module: nn.Module) -> Tensor | None:
    """The scale of a linear layer; None if its weight is not in 8 bits."""
    return getattr(module, "scale", None)


def scales(model: nn.Module) -> dict[str, str]:
    """Name of each scale among the model's parameters -> name of its weight."""
    modules = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and scale_of(m) is not None]
    return {f"{name}.scale": f"{name}.weight" for name in modules}
