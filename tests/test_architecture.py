"""The rules of the code: which package may import which, how long files and functions may be, what they may take."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {"kernels": [], "data": [], "recipes": [], "slurm": ["recipes", "data"]}
"""Folder -> what of ours it may import, apart from itself. trainer/ may import all of them."""
PACKAGES = {
    "": [],
    "distributed": [],
    "models": ["distributed"],
    "stages": ["models", "distributed"],
    "optim": ["stages", "models", "distributed"],
    "planner": ["optim", "models", "distributed"],
    "phantom": ["planner", "optim", "stages", "models", "distributed"],
    "checkpoint": ["optim", "stages", "models", "distributed"],
    "monitors": ["planner", "optim", "distributed"],
    "inference": ["checkpoint", "stages", "models", "distributed"],
    "evaluation": ["inference", "models"],
    "training": ["inference", "monitors", "planner", "checkpoint", "optim", "stages", "models", "distributed"],
    "ablation": ["distributed"],
    "report": ["training", "monitors", "distributed"],
    "doctor": [],
    "bench": ["training", "planner", "checkpoint", "optim", "stages", "models", "distributed"],
}
"""Package of trainer/ -> others that it may import; all may import trainer/'s own files, and cli/ may import all."""
FILES = sorted(file for layer in [*LAYERS, "trainer"] for file in (ROOT / layer).rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Dotted names, from the root, of what `file` imports relatively."""
    folders = file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folders[: len(folders) - node.level + 1]
            yield from (".".join([*above, *filter(None, [node.module]), name.name]) for name in node.names)


def package(parts: tuple[str, ...]) -> str:
    return parts[1] if len(parts) > 1 and (ROOT / "trainer" / parts[1]).is_dir() else ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downward_and_sizes_are_kept(file: Path) -> None:
    layer, *rest = file.relative_to(ROOT).parts
    allowed = LAYERS.get(layer)
    here = package((layer, *rest))
    for name in imports(file):
        other, *inner = name.split(".")
        if allowed is not None:
            assert other == layer or any(f"{name}.".startswith(f"{each}.") for each in allowed), name
        elif other == "trainer" and (there := package((other, *inner))) not in ("", here) and here != "cli":
            assert rest == ["__main__.py"] or there in PACKAGES[here], name
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 350
    most = 60 if here == "training" else 80
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < most, f"{node.name} is longer than {most} lines"


def test_no_package_imports_one_above_it_and_few_files_lie_beside_them() -> None:
    seen: set[str] = set()
    for here, below in PACKAGES.items():
        assert set(below) <= seen, here
        seen.add(here)
    assert len([file for file in (ROOT / "trainer").iterdir() if file.is_file()]) <= 6


WHOLE_RECIPE = {
    "slurm/jobs.py": "describes its job",
    "trainer/stages/__init__.py": "opens its stage",
    "trainer/training/train.py": "trains it",
    "trainer/training/run_context.py": "opens its run",
    "trainer/checkpoint/export.py": "writes it next to its weights",
    "trainer/planner/__init__.py": "opens its plan",
    "trainer/phantom/recipe.py": "opens its stage",
    "trainer/phantom/passes.py": "counts its pass",
    "trainer/phantom/engine.py": "counts its steps",
    "trainer/bench/short_run.py": "trains its first steps",
    "trainer/bench/simulate.py": "simulates its run",
    "trainer/bench/controlnet_step.py": "measures its step",
    "trainer/bench/engine.py": "trains its model",
    "trainer/bench/step.py": "measures its step",
}
"""Module with a parameter or field that is a whole recipe -> why. Others take the settings that they use."""


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """Parameters without self, cls, *args and **kwargs."""
    found = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [each for each in found if each.arg not in ("self", "cls")]


def takes_a_recipe(node: ast.AST) -> bool:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        named = [each.annotation for each in arguments(node)]
        if any(each.arg == "recipe" and each.annotation is None for each in arguments(node)):
            return True
    elif isinstance(node, ast.ClassDef):
        named = [each.annotation for each in node.body if isinstance(each, ast.AnnAssign)]
    else:
        return False
    return any("Recipe" in re.findall(r"\w+", ast.unparse(each)) for each in named if each)


def test_the_whole_recipe_is_passed_only_where_it_is_needed() -> None:
    found = {file for file in FILES if any(map(takes_a_recipe, ast.walk(ast.parse(file.read_text(encoding="utf-8")))))}
    assert {str(file.relative_to(ROOT)) for file in found} == WHOLE_RECIPE.keys()


MOST_ARGUMENTS = 8
PRESCRIBED = {
    ("trainer/models/backbone.py", "_vision_attention"): "transformers' signature of an attention",
    ("trainer/models/flux.py", "velocity"): "the arguments of diffusers' FLUX transformer",
    ("trainer/models/flux_transformer.py", "forward"): "the arguments of diffusers' FLUX transformer",
    ("trainer/models/latent_controlnet.py", "forward"): "the arguments of diffusers' FLUX ControlNet",
    ("trainer/inference/pipeline.py", "__call__"): "the arguments of diffusers' pipelines, and of our decoding",
    ("trainer/stages/controlnet_model.py", "forward"): "the arrays of a batch, some of them from a cache",
    ("trainer/stages/patch_latent_model.py", "image_loss"): "the same",
}
"""Functions whose arguments another library or the batch prescribes."""


def is_command_or_kernel(file: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """The arguments of a command are its options; those of a Triton kernel are pointers, strides and sizes."""
    command = (file.parent.name == "cli" or file.name == "cli.py") and not function.name.startswith("_")
    return command or any("jit" in ast.unparse(each) for each in function.decorator_list)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_functions_take_few_arguments(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_command_or_kernel(file, node):
            prescribed = (str(file.relative_to(ROOT)), node.name) in PRESCRIBED
            assert prescribed or len(arguments(node)) <= MOST_ARGUMENTS, f"{node.name} takes more: use a dataclass"
