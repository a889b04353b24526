"""The base of all groups of settings."""

from __future__ import annotations

from typing import Any, TypeGuard, get_origin

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings. Rejects unknown keys and values of another type; an integer is accepted as a number."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def is_group(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Whether a type is a group of settings; a list of groups is none."""
    return get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel)
