"""What a suite shows: the figures of its rows over the seeds, and whether a row differs from the paper's choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev

from ...recipes.suite import Question, Suite
from .run import scores
from .trials import Trial

T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
T_95 |= {12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000}
"""97.5 % quantiles of Student's t by degrees of freedom; in between that of fewer, which is larger."""
PART = "heldout"


@dataclass(frozen=True)
class Row:
    """A row of a question over the seeds that are done."""

    question: str
    name: str
    seeds: list[int]
    values: list[float]
    """The compared figure of each seed: the mean over the suite's categories."""
    categories: dict[str, float]
    """Means over the seeds."""

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """Of a row from the paper's choice, over the seeds that both have."""

    mean: float
    half_width: float | None
    """Of the 95 % confidence interval of the mean paired difference; None with fewer than two seeds."""

    @property
    def verdict(self) -> str:
        if self.half_width is None:
            return "one seed: nothing shown"
        if abs(self.mean) <= self.half_width:
            return "no difference shown"
        return "better than the paper's choice" if self.mean > 0 else "worse than the paper's choice"


def rows(suite: Suite, trials: Sequence[Trial]) -> list[Row]:
    """The rows that have a score, in the order of the suite."""
    found = []
    for name, question in suite.questions.items():
        for row in question.rows:
            done = [
                (trial.seed, _measured(suite, measured))
                for trial in trials
                if (trial.question, trial.row) == (name, row) and (measured := scores(trial)) is not None
            ]
            if done:
                found.append(_row(suite, name, row, done))
    return found


def _measured(suite: Suite, metrics: dict) -> dict[str, float]:
    """Category -> score of an evaluation, on held-out data."""
    if suite.control == "reconstruction":
        return {name: metrics["figures"][PART]["reconstruction"][name] for name in suite.categories}
    return {name: metrics["scenes"][PART][suite.control][name]["all"] for name in suite.categories}


def _row(suite: Suite, question: str, name: str, done: list[tuple[int, dict[str, float]]]) -> Row:
    by_seed = [list(measured.values()) for _, measured in done]
    means = dict(zip(suite.categories, map(fmean, zip(*by_seed, strict=True)), strict=True))
    return Row(question, name, [seed for seed, _ in done], [fmean(values) for values in by_seed], means)


def difference(row: Row, paper: Row) -> Difference | None:
    """None if the two have no seed in common."""
    theirs = dict(zip(paper.seeds, paper.values, strict=True))
    apart = [value - theirs[seed] for seed, value in zip(row.seeds, row.values, strict=True) if seed in theirs]
    if not apart:
        return None
    if len(apart) < 2:
        return Difference(apart[0], None)
    freedom = len(apart) - 1
    quantile = T_95[max(known for known in T_95 if known <= freedom)]
    return Difference(fmean(apart), quantile * stdev(apart) / math.sqrt(len(apart)))


def markdown(suite: Suite, found: Sequence[Row]) -> str:
    """A table per question, with its verdicts."""
    lines: list[str] = []
    for name, question in suite.questions.items():
        own = [row for row in found if row.question == name]
        if own:
            lines += [*_section(suite, name, question, own), ""]
    return "\n".join(lines)


def _section(suite: Suite, name: str, question: Question, own: Sequence[Row]) -> list[str]:
    paper = _paper(suite, own)
    claim = f" The paper: {question.paper_claims}" if question.paper_claims else ""
    heads = [name, "seeds", "mean", *suite.categories, "compared with the paper's choice"]
    lines = [f"**{question.asks}**{claim}", "", "|".join(["", *(f" {head} " for head in heads), ""])]
    lines += ["|---|" + "---:|" * (len(heads) - 2) + "---|"]
    for row in own:
        spread = "" if row.spread is None else f" ± {row.spread:.2f}"
        cells = [row.name, str(len(row.seeds)), f"{row.mean:.2f}{spread}"]
        cells += [f"{value:.2f}" for value in row.categories.values()]
        lines.append("| " + " | ".join([*cells, _comparison(row, paper)]) + " |")
    return lines


def _paper(suite: Suite, own: Sequence[Row]) -> Row | None:
    """The row of the paper's choice among those of one question, if it has a score."""
    return next((row for row in own if row.name == suite.questions[row.question].paper), None)


def _comparison(row: Row, paper: Row | None) -> str:
    if paper is None:
        return "not measured"
    if row is paper:
        return "the paper's choice"
    apart = difference(row, paper)
    if apart is None:
        return "no seed in common"
    width = "" if apart.half_width is None else f" ± {apart.half_width:.2f}"
    return f"{apart.mean:+.2f}{width}: {apart.verdict}"


def record(suite: Suite, found: Sequence[Row]) -> dict:
    """The same as JSON."""
    every = []
    for row in found:
        paper = _paper(suite, [one for one in found if one.question == row.question])
        apart = difference(row, paper) if paper is not None and paper is not row else None
        compared = None if apart is None else {**asdict(apart), "verdict": apart.verdict}
        every.append({**asdict(row), "mean": row.mean, "spread": row.spread, "difference": compared})
    return {"control": suite.control, "rows": every}
