"""Every package that the code imports is declared in setup.py."""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "data", "recipes", "slurm", "trainer", "package")
READERS = {"streaming", "litdata", "datasets", "megatron"}
"""Of other libraries, compared by `bifrost bench data`."""
OPTIONAL = {"flash_attn", "flash_attn_interface", "liger_kernel", "alembic", "sqlalchemy"} | READERS
"""Imported where they are installed; alembic and sqlalchemy come with MLflow and are used with it only."""


def imported() -> dict[str, str]:
    """Top-level module -> one file that imports it."""
    found: dict[str, str] = {}
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    names = [node.module]
                else:
                    continue
                found |= {name.partition(".")[0]: str(file.relative_to(ROOT)) for name in names}
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def brought(distribution: str) -> set[str]:
    """What an installed distribution requires without its extras, and the same for those of its own project."""
    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return set()
    names = {normal(re.match(r"[\w.-]+", line)[0]) for line in lines if "extra ==" not in line}  # type: ignore[index]
    return names.union(*(brought(name) for name in names if name.startswith(f"{distribution}-")))


def test_what_is_imported_is_declared_or_comes_with_what_is() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    declared = {normal(name) for name in re.findall(r'"([\w.-]+)(?:\[\w+\])?[><]=?\d', setup)}
    assert {"torch", "s3fs", "pyarrow"} <= declared
    known = declared.union(*map(brought, declared - {"mlflow"}))  # training does without MLflow
    provided = metadata.packages_distributions()
    undeclared = {
        module: file
        for module, file in imported().items()
        if module not in sys.stdlib_module_names | OPTIONAL | {"bifrost"}
        and not {normal(name) for name in provided.get(module, [module])} & known
    }
    assert undeclared == {}
