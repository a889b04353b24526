"""The table of optimizers is that of the code."""

import re
from pathlib import Path

from bifrost.trainer.optim.rules import RULES

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"


def test_costs_are_those_of_the_plan() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|(.+)\|$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    costs = {name: [float(cell.replace(",", "")) for cell in cells.split("|")[1:]] for name, cells in rows}
    assert costs == {
        name: [round(rule.state_bytes, 2), 4 + 4 * len(rule.state), rule.temporary, rule.moved]
        for name, rule in RULES.items()
    }
