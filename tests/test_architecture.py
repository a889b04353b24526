"""The house's rules: which room may import which, and how long files and functions may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"kernels": [], "data": [], "recipes": [], "slurm": ["recipes", "data"]}
"""Folder -> what of ours it may import, apart from itself. trainer/ may import all of them."""
ROOMS = {
    "": [],
    "distributed": [],
    "models": ["distributed"],
    "stages": ["models", "distributed"],
    "optim": ["stages", "distributed"],
    "planner": ["optim", "stages", "models"],
    "checkpoint": ["optim", "stages", "models", "distributed"],
    "monitors": ["planner", "optim", "distributed"],
    "inference": ["checkpoint", "stages", "models"],
    "evaluation": ["inference", "models"],
    "training": ["inference", "monitors", "planner", "checkpoint", "optim", "stages", "models", "distributed"],
    "report": ["training", "monitors", "distributed"],
    "doctor": [],
    "bench": ["training", "planner", "checkpoint", "optim", "stages", "models", "distributed"],
}
"""Room of trainer/ -> other rooms that it may import; all may import trainer/'s own files, and cli/ may import all."""
FILES = sorted(file for floor in [*FLOORS, "trainer"] for file in (ROOT / floor).rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Dotted names, from the root, of what `file` imports relatively."""
    package = file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            yield from (".".join([*above, *filter(None, [node.module]), name.name]) for name in node.names)


def room(parts: tuple[str, ...]) -> str:
    return parts[1] if len(parts) > 1 and (ROOT / "trainer" / parts[1]).is_dir() else ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downward_and_sizes_are_kept(file: Path) -> None:
    floor, *rest = file.relative_to(ROOT).parts
    allowed = FLOORS.get(floor)
    here = room((floor, *rest))
    for name in imports(file):
        other, *inner = name.split(".")
        if allowed is not None:
            assert other == floor or any(f"{name}.".startswith(f"{each}.") for each in allowed), name
        elif other == "trainer" and (there := room((other, *inner))) not in ("", here) and here != "cli":
            assert rest == ["__main__.py"] or there in ROOMS[here], name
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 350
    most = 60 if here == "training" else 80
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < most, f"{node.name} is longer than {most} lines"


def test_rooms_are_a_ladder_and_the_ground_floor_is_small() -> None:
    seen: set[str] = set()
    for here, below in ROOMS.items():
        assert set(below) <= seen, here
        seen.add(here)
    assert len([file for file in (ROOT / "trainer").iterdir() if file.is_file()]) <= 6
