"""The frozen text model's own output layer, and its next-token losses.

Legend: R rows whose next token is predicted, D hidden width, V tokens of the vocabulary.
"""

from __future__ import annotations

from . import libraries  # noqa: F401  # isort: skip

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RunError
from .weights import WeightFiles, backbone_names, fill

ROWS = 1024
"""Logits are computed for as many rows at once: all of a micro-batch's would take gigabytes."""


class LanguageHead(nn.Module):
    """Weight [V, D], and the cross-entropy under it."""

    def __init__(self, vocabulary: int, width: int, tied: bool) -> None:
        """vocabulary, width: V and D. tied: whether the weight is that of the embedding."""
        super().__init__()
        self.tied = tied
        self.weight = nn.Parameter(torch.empty(vocabulary, width), requires_grad=False)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Losses [R] fp32 of tokens `targets` int64 [R] after `hidden` [R, D]. One call per pass, whatever R is: ranks
        that gather the weight together must do so equally often."""
        parts = zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
        return torch.cat([F.cross_entropy(F.linear(h, self.weight).float(), t, reduction="none") for h, t in parts])

    def load(self, files: WeightFiles) -> None:
        """Fill the weight; RunError if the folder has none."""
        fill({self._name(files): self.weight}, files, files.path)

    def _name(self, files: WeightFiles) -> str:
        if self.tied:
            return backbone_names("text", ["embed_tokens.weight"], files)["embed_tokens.weight"]
        names = ("lm_head.weight", "vision_language_model.lm_head.weight")
        found = next((name for name in names if files.shape(name) is not None), None)
        if found is None:
            raise RunError(
                f"{files.path}: has no {names[0]}, which task=understanding needs to predict tokens; fetch the model"
                " again, or leave these sources out"
            )
        return found
