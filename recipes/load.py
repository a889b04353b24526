"""Load recipes: YAML, `key.path=value` overrides, and errors that name the key, the file and the remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .renames import new_name, with_new_names
from .secrets import redact

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

    from .schema import Recipe

FOLDER = Path(__file__).parent
UNUSED = {"patch-latents": ("flux", "controlnet"), "controlnet": ("branch",)}
"""Stage -> groups of settings that it does not read."""
OF_THE_VAE = ("path", "revision", "image_size")
"""Settings of `flux` that stage 1 reads, with `branch.targets: vae`."""
NO_NAME = "is not a valid run name, which is also a folder name; use letters, digits, `.`, `_` and `-`"


class RecipeError(ValueError):
    """An invalid recipe or override; the message names it, the place and the remedy."""


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes shipped with the package."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def load_recipe(source: str | Path, overrides: Sequence[str] = (), stored: bool = False) -> Recipe:
    """Load the recipe `source`, a YAML file or the name of a shipped recipe, and apply `key.path=value` overrides.

    stored: the file was written by a run, possibly of an earlier version, so renamed settings are read under their new
    names; elsewhere they are refused.

    `extends: NAME` or `extends: FILE`, relative to its folder, names a recipe with the settings that it does not set.
    """
    from pydantic import ValidationError

    from .schema import Recipe

    path = find_recipe(source)
    tree = _read(path)
    if stored:
        tree = with_new_names(tree)
    try:
        recipe = Recipe.model_validate(apply_overrides(tree, overrides))
        if not stored:  # earlier versions accepted them
            _refuse_unused(path, tree, overrides)
        return recipe
    except ValidationError as error:
        if _problems(error)[0]["loc"][:1] in {(group,) for groups in UNUSED.values() for group in groups}:
            _refuse_unused(path, tree, overrides)
        where = _cause(tree, overrides, error) or str(path)
        raise RecipeError(redact(f"{where}: {explain(error, Recipe)}")) from error


def _refuse_unused(path: Path, tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """RecipeError for a setting of the other stage, unless it has its default value."""
    from .schema import Flux, Recipe

    settings = apply_overrides(tree, overrides)
    branch = settings.get("branch")
    vae = isinstance(branch, dict) and branch.get("targets") == "vae"
    for group in UNUSED.get(str(settings.get("stage")), ()):
        default, used = Recipe.model_fields[group].default, ()
        if group == "flux" and vae:
            default, used = Flux(path=""), OF_THE_VAE
        usual = default.model_dump(mode="json") if default is not None else {}
        given = settings.get(group)
        for key, value in (given if isinstance(given, dict) else {}).items():
            if key not in used and (key not in usual or value != usual[key]):
                name = f"{group}.{key}"
                cause = next((one for one in overrides if one.startswith((f"{name}=", f"{name}."))), None)
                where = f"override {cause!r}" if cause else path
                raise RecipeError(redact(f"{where}: {name} has no effect in stage {settings['stage']}; leave it out"))


def _cause(tree: dict[str, Any], overrides: Sequence[str], error: ValidationError) -> str | None:
    """The override that causes the first problem of `error`; None if settings `tree` have it without overrides. A
    problem of several settings together, such as a stage without its model, carries no key."""
    from pydantic import ValidationError

    from .schema import Recipe

    fault, count = _fault(_problems(error)[0]), len(overrides)
    while count:
        try:
            Recipe.model_validate(apply_overrides(tree, overrides[: count - 1]))
        except ValidationError as earlier:
            if fault in map(_fault, earlier.errors()):
                count -= 1
                continue
        return f"override {overrides[count - 1]!r}"
    return None


def _fault(problem: Any) -> tuple[Any, ...]:
    """Identity of a problem, to recognize it among other settings: its location, type, message and value, unless that
    is a whole group."""
    value = problem["input"]
    return problem["loc"], problem["type"], problem["msg"], None if isinstance(value, dict) else repr(value)


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe given by path or, if shipped, by name."""
    path = Path(source)
    if path.is_file():
        return path
    if (path / "recipe.yaml").is_file():
        raise RecipeError(
            f"{source}: is a run folder, not a recipe: `bifrost resume {source}` continues it, its recipe is"
            f" {path / 'recipe.yaml'}"
        )
    if path.is_dir():
        raise RecipeError(f"{source}: is a folder; name a recipe file, or one of {', '.join(shipped_recipes())}")
    # A path as in the README also works when the package is installed without a checkout.
    shipped = shipped_recipes().get(path.stem) if path.suffix in ("", ".yaml") else None
    if shipped is None or path.parent.name not in ("", "recipes"):
        raise RecipeError(f"{source}: no such recipe; {_nearest(path)}")
    return shipped


def _nearest(path: Path) -> str:
    """What may have been meant by a `path` that is not a recipe: a file next to it, a run, or a shipped recipe."""
    import difflib

    files: list[Path] = []
    with suppress(OSError):
        files = sorted(file for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml") and file.is_file())
    run = Path("runs", path.name)
    names = {**{name: name for name in shipped_recipes()}, **{file.stem: str(file) for file in files}}
    if path.stem not in names and (run / "recipe.yaml").is_file():
        return f"`bifrost resume {run}` continues the run of that name"
    near = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.7)
    return f"did you mean {names[near[0]]}?" if near else f"shipped ones are {', '.join(shipped_recipes())}"


def _read(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings in a file, merged over those of the recipe that it `extends`."""
    tree = read_file(path)
    if not isinstance(tree, dict):
        what = "is empty" if tree is None else "has no settings"
        raise RecipeError(f"{path}: {what}; a recipe is a mapping of settings, such as `steps: 100`")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise RecipeError(f"{path}: extends names one recipe, shipped or a file, not {base!r}")
    sibling = path.parent / base
    try:
        found = sibling if sibling.is_file() else find_recipe(base)
    except RecipeError as error:
        raise RecipeError(f"{path}: extends {error}") from error
    if found.resolve() in (*extending, path.resolve()):
        raise RecipeError(f"{path}: extends {base}, which extends it in turn")
    return _over(_read(found, (*extending, path.resolve())), tree)


def read_file(path: Path) -> Any:
    """The contents of a YAML file. RecipeError if it cannot be read."""
    from .yaml_dialect import read_yaml

    try:
        return read_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
    except ValueError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error


def _over(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """`base` updated with the settings of `tree`, group by group."""
    merged = dict(base)
    for key, value in tree.items():
        old = merged.get(key)
        merged[key] = _over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tree` with each `key.path=value` set; values are parsed as YAML and, if not valid YAML (`*.tar`), are text."""
    from .yaml_dialect import read_yaml

    tree = dict(tree)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise RecipeError(f"override {override!r}: write key.path=value, such as optimizer.lr=3e-4")
        try:
            value = read_yaml(text)
        except ValueError:
            value = text
        *parents, leaf = key.split(".")
        node = tree
        for depth, part in enumerate(parents):
            group = {} if node.get(part) is None else node[part]
            if not isinstance(group, dict):
                raise RecipeError(
                    redact(f"override {override!r}: {'.'.join(parents[: depth + 1])} is not a group of settings")
                )
            node[part] = node = dict(group)
        node[leaf] = value
    return tree


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """What is wrong with settings that are not a valid `model`, in one line; for an unknown key, with the closest known
    key."""
    problems = _problems(error)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _explain(problems[0], model) + more


def _problems(error: ValidationError) -> list[Any]:
    """All problems, missing settings last: a misspelt key is also missing under its right name."""
    return sorted(error.errors(), key=lambda problem: problem["type"] == "missing")


def _explain(problem: Any, model: type[BaseModel]) -> str:
    from .known_keys import section, suggestion

    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        if renamed := new_name(key, model):
            return f"{key} is now {renamed}; write that instead"
        return f"unknown key {key}; {suggestion(key, model)}"
    if problem["type"] == "missing":
        return f"{key} is not set; add it to the recipe or give {key}=value"
    if problem["type"] == "string_pattern_mismatch":
        return f"{key}: {problem['input']!r} {NO_NAME}"
    if problem["type"] == "model_type":
        group = section(path, model)
        names = ", ".join(f"{key}.{name}" for name in list(group.model_fields)[:3]) if group else ""
        return f"{key}: is a group of settings (got {problem['input']!r}); set one of them, such as {names}"
    message = problem["msg"].removeprefix("Value error, ")
    # The messages of our own validators contain the values; their input is a whole group or the whole recipe.
    got = "" if problem["type"] == "value_error" else f" (got {problem['input']!r})"
    quoted = isinstance(problem["input"], str)
    if quoted and problem["type"] in ("int_type", "float_type") and re.fullmatch(r"[-+.\deE]+", problem["input"]):
        got += "; leave the quotes out"
    # Messages about several settings together begin with their names.
    return f"{key}: {message[0].lower()}{message[1:]}{got}" if key else message
