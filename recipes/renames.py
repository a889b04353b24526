"""Settings that have been renamed. CHANGELOG.md lists the names of metrics, events and files too.

A recipe, an override or a site file with an old name is refused with the new one. What a run has written itself (its
recipe, its checkpoints, exports) is read under the new names and never written again under the old ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel

RECIPE = {
    "data.block": "data.shuffle_window",
    "data.max_bad_share": "data.max_bad_fraction",
    "flux.placement.tower": "flux.placement.vision_encoder",
    "kernels.provider": "kernels.head_backend",
    "samples": "previews",
    "watchdog.save_s": "watchdog.save_timeout_s",
    "watchdog.start_s": "watchdog.startup_timeout_s",
    "watchdog.step_s": "watchdog.step_timeout_s",
    "zero.overlap": "zero.overlap_comm",
}
SITE = {"offences": "bad_node_threshold", "offenders": "bad_node_file"}


def new_name(key: str, model: type[BaseModel]) -> str | None:
    """The current name of a renamed dotted `key` of a recipe or site file; None if it was never a key."""
    names = RECIPE if "stage" in model.model_fields else SITE
    return names.get(key)


def with_new_names(tree: Mapping[str, Any], names: Mapping[str, str] = RECIPE) -> dict[str, Any]:
    """Settings `tree` with renamed keys under their new names; an existing value of the new key is kept."""
    found = dict(tree)
    for old, new in names.items():
        *groups, key = old.split(".")
        at: Any = found
        for group in groups:
            if not isinstance(at.get(group), Mapping):
                break
            at[group] = at = dict(at[group])  # the caller's tree is not changed
        else:
            if key in at:
                value = at.pop(key)
                at.setdefault(new.rpartition(".")[2], value)
    return found
