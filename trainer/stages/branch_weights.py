"""Initial weights of stage 1's trained part: copies of the text model's, or drawn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ...recipes.schema import Branch
from ..models.branch import INIT_STD
from ..models.low_rank import pair_init
from ..models.weights import Distribution


def text_layer(name: str, layers: Sequence[int]) -> str:
    """A parameter's name with its layer of the branch replaced by the text model's, one of `layers`."""
    return re.sub(r"(?<=^branch\.layers\.)\d+", lambda found: str(layers[int(found[0])]), name)


def copies(
    trainable: Iterable[str], branch: Branch, layers: Sequence[int], backbone: Mapping[str, str]
) -> dict[str, str]:
    """Trainable parameters that start as copies -> names of their sources in the backbone's files.

    layers: the text model's layers that the branch's are copies of; backbone: the backbone's parameters -> names in the
    files.
    """
    if branch.init == "random":
        return {}
    sources = {name: text_layer(name, layers).replace("branch.", "text.", 1) for name in trainable}
    return {name: backbone[source] for name, source in sources.items() if source in backbone}


def initial(name: str, shape: tuple[int, ...], std: float) -> Distribution:
    """Initial values of a trained parameter that is not a copy. Layers and final norm like Qwen's own, with standard
    deviation `std`; mask token and position table as in MAR; head like a torch Linear; pairs as in `pair_init`. Of a
    flow head the modulations and the last layer are zero, as in DiT."""
    if name.startswith("head.clean.") or ".modulation." in name:
        return Distribution(shape, "constant", 0.0)
    if name.startswith("head."):
        return Distribution(shape, "uniform", shape[-1] ** -0.5)
    if name.endswith(("mask_token", "positions")):
        return Distribution(shape, "normal", INIT_STD)
    if name.endswith(("lora_A", "lora_B")):
        return pair_init(name, shape)
    if name.endswith("norm.weight"):
        return Distribution(shape, "constant", 1.0)
    return Distribution(shape, "constant", 0.0) if name.endswith(".bias") else Distribution(shape, "normal", std)
