"""The optimizer of a recipe, for DeepSpeed: ZeRO-3 hands it a flat fp32 slice of many parameters at a time."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ...recipes import schema
from ..errors import RunError
from ..models.weights import full_shape
from ..versions import version
from .eight_bit_adamw import EightBitAdamW
from .muon import MatrixSlice, Muon
from .rules import RULES, decays, rule_name

PACKAGES = {"lion": ("lion-pytorch", "0.2.5"), "adamw-8bit": ("torchao", "0.18")}
"""Optimizer that is not torch's -> its package, and the first version that is known to do."""


def require_optimizer(settings: schema.Optimizer) -> None:
    """RunError if the optimizer's package is not installed."""
    name, least = PACKAGES.get(settings.name, ("torch", ""))
    if version(name) is None:
        raise RunError(f"optimizer.name={settings.name}: {name} is not installed: pip install '{name}>={least}'")


def parameter_groups(model: nn.Module, settings: schema.Optimizer) -> list[dict[str, Any]]:
    """Groups of trainable parameters by `rule` (see `RULES`) and decay: Muon's matrices, if it is Muon, then what else
    decays, then what does not. RunError if Muon would have no matrix."""
    found: dict[tuple[str, bool], list[nn.Parameter]] = {}
    if settings.name == "muon":
        found["muon", True] = []
    rest = "adamw" if settings.name == "muon" else settings.name
    found |= {(rest, True): [], (rest, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape = full_shape(parameter)
            found[rule_name(settings.name, name, shape), decays(name, shape)].append(parameter)
    if settings.name == "muon" and not found["muon", True]:
        raise RunError("optimizer.name=muon: no trained matrix is in a repeated layer; set optimizer.name=adamw")
    return [
        {"params": parameters, "weight_decay": settings.weight_decay if decay else 0.0, "rule": rule}
        for (rule, decay), parameters in found.items()
        if parameters
    ]


def build_optimizer(model: nn.Module, settings: schema.Optimizer) -> Optimizer:
    """The optimizer of a model's trainable parameters. RunError as of `parameter_groups`."""
    groups = parameter_groups(model, settings)
    if settings.name == "lion":
        # Not the package's `foreach.Lion`: DeepSpeed updates one group at a time, and that one fails on empty groups.
        return importlib.import_module("lion_pytorch").Lion(groups, lr=settings.lr, betas=settings.betas)
    if settings.name == "adamw-8bit":
        return EightBitAdamW(groups, settings.betas, settings.eps)
    matrices = groups.pop(0) | {"momentum": settings.momentum} if settings.name == "muon" else None
    adamw = AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
    return Muon(matrices | {"lr": settings.lr}, adamw) if matrices else adamw


def create_state(optimizer: Optimizer, number: int, flat: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Create the state of a flat slice of `parameters`, of the group with this number, as before the first step."""
    if isinstance(optimizer, EightBitAdamW):
        optimizer.create(flat, parameters)
        return
    rule = optimizer.param_groups[number]["rule"]
    state = {kind: torch.zeros_like(flat) for kind in RULES[rule].state}
    optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **state} if rule == "adamw" else state
    if isinstance(optimizer, Muon) and rule == "muon":
        start, slices = 0, []
        for parameter in parameters:
            rows, columns = full_shape(parameter)
            slices.append(MatrixSlice((rows, columns), start, start := start + parameter.ds_tensor.ds_numel))  # type: ignore[attr-defined]
        optimizer.layout[flat] = slices
