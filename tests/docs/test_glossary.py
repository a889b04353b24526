"""The glossary's exit codes are those of the code, and it uses none of the words that it replaces."""

import re
import runpy
from pathlib import Path

from bifrost.slurm import exit_codes

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "glossary.md"


def test_exit_codes() -> None:
    section = PAGE.read_text().split("## Exit codes")[1]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", section, flags=re.M)}
    assert listed == {value for name, value in vars(exit_codes).items() if name.isupper()}


def test_page_has_none_of_the_words_that_it_replaces() -> None:
    made = runpy.run_path(str(ROOT / ".ci" / "words.py"))
    words, _ = made["read_list"]((ROOT / made["LIST"]).read_text())
    assert [one.text for one in made["search"]("docs/glossary.md", PAGE.read_text(), words)] == []
