"""Stored tensors next to the weights that nothing reads: scales under unknown names, unmerged adapters, weights of
another model. Reading the weights without them would be silently wrong.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from .quantization import hidden

_HARMLESS = re.compile(r"(.+\.)?((original_)?inv_freq|position_ids|(cos|sin)_cached|freqs_cis)")
"""Tables that every model computes itself; older releases of transformers saved them with the weights."""


def unread_neighbours(stored: Iterable[str], read: Collection[str]) -> list[tuple[str, str]]:
    """Pairs of a tensor in `stored` that is not in `read`, and the weight in `read` next to it.

    Next to a weight `a.b.weight` are the tensors of its module (`a.b.scale`), of modules inside it
    (`a.b.quantizer.amax`), and those directly in its parent (`a.b_scale`). Entire modules that a model does not use
    (`lm_head`, the other text encoder of a CLIP) do not count. At the root, which may contain tensors of any module, a
    name must begin with the module's.
    """
    modules: dict[str, str] = {}
    around: dict[str, str] = {}
    for name in read:
        module = _module(name)
        modules.setdefault(module or name, name)
        if parent := _module(module):
            around.setdefault(parent, name)
    found = []
    for name in stored:
        if name in read or hidden(name) or _HARMLESS.fullmatch(name):
            continue
        module = _module(name)
        at = module
        while at and at not in modules:
            at = _module(at)
        if at:
            found.append((name, modules[at]))
        elif module in around:
            found.append((name, around[module]))
        elif not module and (at := next((each for each in modules if name.startswith(f"{each}_")), "")):
            found.append((name, modules[at]))
    return found


def _module(name: str) -> str:
    return name.rpartition(".")[0]
