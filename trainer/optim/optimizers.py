"""The optimizer of a recipe, for DeepSpeed: ZeRO-3 hands it a flat fp32 slice of many parameters at a time."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...recipes import schema
from ..errors import RunError
from ..versions import installed
from .rules import decays, rule

PACKAGES = {"lion": ("lion_pytorch", "lion-pytorch>=0.2.5")}
"""Optimizer that is not torch's -> its module, and the requirement for pip."""


def require_optimizer(settings: schema.Optimizer) -> None:
    """RunError if the optimizer's package is not installed."""
    if (package := PACKAGES.get(settings.name)) and not installed(package[0]):
        raise RunError(f"optimizer.name={settings.name}: {package[0]} is not installed: pip install '{package[1]}'")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that decay, and those that do not; see `decays`."""
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            (decay if decays(name, shape) else keep).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, settings: schema.Optimizer) -> Optimizer:
    """The optimizer of a model's trainable parameters."""
    groups = parameter_groups(model, settings.weight_decay)
    if settings.name == "lion":
        # Not the package's `foreach.Lion`: DeepSpeed updates one group at a time, and that one fails on empty groups.
        return importlib.import_module("lion_pytorch").Lion(groups, lr=settings.lr, betas=settings.betas)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def new_state(flat: Tensor, settings: schema.Optimizer) -> dict[str, Tensor]:
    """The state of a flat slice before the first step."""
    state = {kind: torch.zeros_like(flat) for kind in rule(settings).state}
    return {"step": torch.zeros((), device=flat.device), **state} if settings.name == "adamw" else state
