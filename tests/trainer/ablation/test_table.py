"""The table of a suite: means, spreads, paired differences and verdicts of scores that are written here."""

import json
import math
from pathlib import Path

import pytest
from scipy import stats

from bifrost.recipes import RecipeError
from bifrost.recipes.suite import Question, Suite, load_suite, shipped_suites
from bifrost.trainer.ablation.plot import plot
from bifrost.trainer.ablation.table import Row, difference, markdown, record, rows
from bifrost.trainer.ablation.trials import Trial, trials

SUITE = Suite(
    recipe="tiny-mllm",
    seeds=[0, 1, 2],
    settings=["steps=2"],
    score=["--data=x"],
    categories=["two", "count"],
    questions={
        "loss": Question(asks="?", paper="all", rows={"all": [], "masked": ["branch.loss_tokens=masked"]}),
        "decoding": Question(asks="?", paper="16", rows={"16": [], "4": ["--steps=4"]}),
    },
)


def score(trial: Trial, two: float, count: float, step: int = 2) -> None:
    trial.score.mkdir(parents=True, exist_ok=True)
    figures = {"two": {"all": two}, "count": {"all": count}, "grid": {"all": 0.0}}
    text = {"mllm": f"{trial.run.resolve()} step {step}", "scenes": {"heldout": {"probe": figures}}}
    (trial.score / "metrics.json").write_text(json.dumps(text))


def scored(folder: Path, values: dict[str, tuple[float, ...]]) -> list[Trial]:
    """Trials of the question on the loss, with the mean of both categories of each seed by row."""
    found = [trial for trial in trials(SUITE, folder) if trial.question == "loss"]
    for trial in found:
        score(trial, values[trial.row][trial.seed] + 0.05, values[trial.row][trial.seed] - 0.05)
    return found


def test_rows_share_trainings_and_evaluations(tmp_path: Path) -> None:
    found = trials(SUITE, tmp_path)
    assert [trial.seed for trial in found] == [0] * 4 + [1] * 4 + [2] * 4
    named = {(trial.question, trial.row): trial for trial in found[:4]}
    usual, masked, four = named["loss", "all"], named["loss", "masked"], named["decoding", "4"]
    assert usual.train == four.train == named["decoding", "16"].train and usual.train != masked.train
    assert usual.evaluate == named["decoding", "16"].evaluate and usual.evaluate != four.evaluate
    assert "branch.loss_tokens=masked" in masked.train and "--steps=4" in four.evaluate and usual.steps == 2
    assert len({trial.run for trial in found}) == 6 and len({trial.score for trial in found}) == 9


@pytest.mark.parametrize("seeds", [2, 3, 11, 12, 16, 26, 200])
def test_an_interval_is_never_narrower_than_student_t(seeds: int) -> None:
    values = [0.01 * (seed % 7) for seed in range(seeds)]
    paper, row = (
        Row("loss", name, list(range(seeds)), each, {}) for name, each in (("a", [0.0] * seeds), ("b", values))
    )
    apart = difference(row, paper)
    exact = stats.t.ppf(0.975, seeds - 1) * stats.sem(values)
    assert apart is not None and apart.half_width is not None
    assert exact * (1 - 1e-3) <= apart.half_width <= exact * 1.03


def test_mean_spread_and_interval(tmp_path: Path) -> None:
    """Differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1; 4.303 is Student's quantile for two degrees of freedom."""
    found = rows(SUITE, scored(tmp_path, {"all": (0.5, 0.6, 0.4), "masked": (0.6, 0.8, 0.7)}))
    paper, row = found
    assert row.mean == pytest.approx(0.7) and row.spread == pytest.approx(0.1) and row.seeds == [0, 1, 2]
    assert row.categories == pytest.approx({"two": 0.75, "count": 0.65})
    apart = difference(row, paper)
    assert apart is not None and apart.half_width is not None
    assert apart.mean == pytest.approx(0.2) and apart.half_width == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert apart.verdict == "no difference shown"


@pytest.mark.parametrize(
    ("masked", "verdict"),
    [
        ((0.61, 0.7, 0.49), "better than the paper's choice"),
        ((0.39, 0.5, 0.31), "worse than the paper's choice"),
        ((0.5, 0.6, 0.4), "no difference shown"),
    ],
)
def test_verdicts(tmp_path: Path, masked: tuple[float, ...], verdict: str) -> None:
    done = scored(tmp_path, {"all": (0.5, 0.6, 0.4), "masked": masked})
    found = rows(SUITE, done)
    text = markdown(SUITE, found)
    assert f": {verdict} |" in text and "| all | 3 | 0.50 ± 0.10 | 0.55 | 0.45 | the paper's choice |" in text
    (kept,) = (row for row in record(SUITE, found)["rows"] if row["name"] == "masked")
    assert kept["difference"]["verdict"] == verdict and kept["values"] == pytest.approx(masked)
    drawn = plot(SUITE, found)
    assert drawn == plot(SUITE, found) and b"loss: masked" in drawn and drawn.count(b"<use") >= 6


RECONSTRUCTION = Suite(
    recipe="tiny-controlnet",
    seeds=[0, 1, 2],
    score=["--data=x"],
    control="reconstruction",
    categories=["psnr"],
    questions={"size": Question(asks="?", paper="64", rows={"64": [], "16": ["data.image_size=56"]})},
)


def test_reconstructions_are_compared_by_one_metric(tmp_path: Path) -> None:
    done = trials(RECONSTRUCTION, tmp_path)
    for trial in done:
        assert f"--controlnet={trial.run}" in trial.evaluate and "--data=x" in trial.evaluate
        trial.score.mkdir(parents=True, exist_ok=True)
        psnr = {"64": 20.0, "16": 18.0}[trial.row] + trial.seed + (trial.row == "16" and trial.seed == 1)
        found = {"heldout": {"reconstruction": {"psnr": psnr, "ssim": 0.5}}, "train": {}}
        record = {"controlnet": f"{trial.run.resolve()} step {trial.steps}", "figures": found}
        (trial.score / "metrics.json").write_text(json.dumps(record))
    found = rows(RECONSTRUCTION, done)
    assert found[1].values == [18, 20, 20] and found[0].values == [20, 21, 22]
    text = markdown(RECONSTRUCTION, found)
    assert "| 64 | 3 | 21.00 ± 1.00 | 21.00 | the paper's choice |" in text and "-1.67 ± 1.43: worse" in text
    assert b"psnr of held-out images" in plot(RECONSTRUCTION, found)


def test_what_is_not_done_is_left_out(tmp_path: Path) -> None:
    done = scored(tmp_path, {"all": (0.5, 0.6, 0.4), "masked": (0.9, 0.9, 0.9)})
    for trial in done:
        if trial.row == "masked" and trial.seed > 0:
            (trial.score / "metrics.json").unlink()
    text = markdown(SUITE, rows(SUITE, done))
    assert "+0.40: one seed: nothing shown" in text and "| masked | 1 | 0.90 |" in text
    for trial in done:  # of weights that were trained for other steps
        score(trial, 0.5, 0.5, step=1)
    assert rows(SUITE, done) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"questions": {"x": {"asks": "?", "paper": "b", "rows": {"a": [], "c": []}}}},
            "'b' is not among the rows a, c",
        ),
        ({"question": {}}, "unknown key question; did you mean questions?"),
        ({"control": "reconstruction"}, "metrics of reconstructions have no common mean; name one, such as psnr"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_wrong_suites_are_one_line(tmp_path: Path, changes: dict, message: str) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(json.dumps({**SUITE.model_dump(exclude_defaults=True), **changes}))
    with pytest.raises(RecipeError) as error:
        load_suite(str(file))
    assert message in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def of_rows(folder: Path, rows: dict[str, list[str]]) -> list[Trial]:
    questions = {"loss": SUITE.questions["loss"].model_copy(update={"rows": rows})}
    return trials(SUITE.model_copy(update={"questions": questions}), folder)


def test_wrong_rows_are_one_line(tmp_path: Path) -> None:
    for given, message in (
        ({"all": [], "masked": ["branch.los=masked"]}, "loss, row masked: override 'branch.los=masked': unknown key"),
        # Folders are named by the ends of paths.
        (
            {"all": [], "a": ["init_from=a/x"], "b": ["init_from=b/x"]},
            "a (loss) and b (loss) would both be init_from-x-0",
        ),
    ):
        with pytest.raises(RecipeError) as error:
            of_rows(tmp_path, given)
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(RecipeError, match="no question size; this suite has loss, decoding"):
        trials(SUITE, tmp_path, ["size"])
    with pytest.raises(RecipeError, match="no such suite; shipped ones are mllm-3b"):
        load_suite("nothing")


@pytest.mark.parametrize("name", shipped_suites())
def test_shipped_suites_have_only_valid_rows(name: str, tmp_path: Path) -> None:
    _, suite = load_suite(name)
    assert len(suite.seeds) == 3
    for trial in trials(suite, tmp_path):
        assert trial.steps > 0
