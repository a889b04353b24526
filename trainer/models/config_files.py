"""Reading and checking the JSON configs of models, without the libraries that build the models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from ...data import DataError
from ...data.retry import call
from ..errors import RunError


class Settings(BaseModel):
    """Settings of a model: those that determine its shapes are declared and checked, the others kept."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())

    def as_stated(self) -> dict[str, Any]:
        """The settings in the file, without defaults."""
        return self.model_dump(exclude_unset=True)


class AttentionSettings(Settings):
    """Settings of layers whose heads share the hidden width."""

    hidden_size: PositiveInt
    num_attention_heads: PositiveInt

    @model_validator(mode="after")
    def _whole_heads(self) -> AttentionSettings:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not divide hidden_size {self.hidden_size}")
        return self


Checked = TypeVar("Checked", bound=Settings)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON config of a model; RunError unless it is an object."""
    try:
        found = json.loads(call(lambda: file.read_text(encoding="utf-8"), file))
    except DataError:  # a storage error
        raise
    except ValueError as error:
        raise RunError(f"{file}: is not JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise RunError(f"{file}: not a JSON object; fetch it again")
    return found


def checked(kind: type[Checked], stated: dict[str, Any], file: Path, name: str) -> Checked:
    """The settings `stated` in `file`; RunError names the first one that a `name` config cannot have."""
    try:
        return kind.model_validate(stated)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(f"{file}: not a valid {name} config ({where}: {first['msg']}); fetch it again") from None
