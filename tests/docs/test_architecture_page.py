"""docs/architecture.md agrees with the code: the import tables with the tested rules, the names with their files."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_import_tables_are_the_tested_rules() -> None:
    rules = runpy.run_path(str(ROOT / "tests" / "test_architecture.py"))
    rows = re.findall(r"^\| `(\w+)/` \| .* \| (.*?) ?\|$", TEXT, flags=re.M)
    tables = {name: set(re.findall(r"`([\w.]+)`", allowed)) for name, allowed in rows}
    packages = {name: set(allowed) for name, allowed in rules["PACKAGES"].items() if name}
    layers = {name: set(allowed) for name, allowed in rules["LAYERS"].items()}
    # trainer/ and cli/ may import everything.
    assert tables == {**packages, **layers, "trainer": set(), "cli": set()}


def test_every_name_is_defined_in_the_linked_file() -> None:
    links = re.findall(r"\[`(\w+)(\(\))?`\]\(\.\./([\w/.]+\.py)\)", TEXT)
    assert len(links) > 30
    for name, call, file in links:
        kind = "def" if call else "class"
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^\s*{kind} {name}\b", source, flags=re.M), f"{file} has no {kind} {name}"
    for name, file in re.findall(r"`(\w+)\(\)` in \[[\w/.]+\]\(\.\./([\w/.]+\.py)\)", TEXT):
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {name}()"
