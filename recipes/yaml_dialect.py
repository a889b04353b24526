"""YAML as recipes use it: exponents without a point are numbers, and duplicate keys are errors."""

from __future__ import annotations

import re
from typing import Any

import yaml

FLOAT = "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """Reads `3e-4`, which is text in YAML 1.1, as a number, and `1e5` or `5.0` as an integer. Duplicate keys, of which
    other YAML loaders keep the last, are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value]
        earlier = [str(key.value) for key in keys]
        if twice := next((key for at, key in enumerate(keys) if str(key.value) in earlier[:at]), None):
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicate key {twice.value}; remove one", twice.start_mark
            )
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes text that the loader would read as a number."""


for _class in (_Loader, Dumper):
    _class.add_implicit_resolver(FLOAT, re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789"))


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    value = loader.construct_yaml_float(node)
    return int(value) if value.is_integer() else value


_Loader.add_constructor(FLOAT, _number)


def read_yaml(text: str) -> Any:
    """Parse YAML `text`. Raises ValueError when it is not valid."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        at, problem = error.problem_mark or error.context_mark, " ".join((error.problem or str(error)).split())
        remedy = "; indent with spaces" if "'\\t'" in problem else ""
        raise ValueError(f"line {at.line + 1}: {problem}{remedy}" if at else problem) from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ValueError(" ".join(str(error).split())) from error
