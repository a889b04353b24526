"""Stored tensors right next to the weights that are read, which nothing reads: scales under names that no list has,
adapters that were never merged, weights of another model. Reading the weights without them would be wrong in silence.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from .quantization import hidden

_HARMLESS = re.compile(r"(.+\.)?((original_)?inv_freq|position_ids|(cos|sin)_cached|freqs_cis)")
"""Tables that every model computes itself: older releases of transformers saved them with the weights."""


def unread_neighbours(stored: Iterable[str], read: Collection[str]) -> list[tuple[str, str]]:
    """Tensors in `stored` next to one of `read` and not among them, each with that one.

    Next to a weight `a.b.weight` are the tensors of its module (`a.b.scale`), those of modules inside it
    (`a.b.quantizer.amax`), and those directly in the module around it (`a.b_scale`). Whole modules that a model does
    not use (`lm_head`, the other text encoder of a CLIP) are none of these. At the root, where tensors of any module
    may be, a name has to begin with the module's.
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
