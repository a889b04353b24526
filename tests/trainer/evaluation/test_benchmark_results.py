"""Results of GenEval's and DPG-Bench's scorers, read back by `bifrost score`."""

import json
from pathlib import Path

import numpy as np
import pandas
import pytest

from bifrost.trainer.cli import main
from bifrost.trainer.errors import RunError

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
DPG = """\
/images/a1.png, 0.5, 1.0, 0.0, 0.5, 0.5
/images/with, comma.png, 1.0, 1.0, 1.0, 0.6, 0.9
Model: images
L1 category scores:
\tentity: 75.0
\tattribute: 50.0
L2 category scores:
\tattribute - color: 50.0
\tentity - whole: 75.0
Image path: /images
Save results to: /results.txt
DPG-Bench score: 70.0
"""


def bifrost(*arguments: object) -> None:
    assert not main.app(["score", *map(str, arguments)], standalone_mode=False)


def figures(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())["figures"]


@pytest.fixture
def geneval(tmp_path: Path) -> Path:
    """GenEval's results of 18 prompts, more of some tags than of others, with four images each."""
    draw, rows = np.random.default_rng(0), []
    for prompt in range(18):
        tag = TAGS[min(prompt, 5) if prompt < 10 else prompt % 2]
        metadata = json.dumps({"tag": tag, "include": [], "prompt": f"prompt {prompt // 2}"} | {"number": prompt})
        for sample in range(4):
            correct = bool(draw.random() < 0.3)
            name = f"geneval/{prompt:05d}/samples/{sample:04d}.png"
            rows.append({"filename": name, "tag": tag, "correct": correct, "reason": "", "metadata": metadata})
    pandas.DataFrame(rows).to_json(tmp_path / "results.jsonl", orient="records", lines=True)  # as the scorer writes it
    return tmp_path / "results.jsonl"


def record(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    lines = ({"file": f"{number}.png", "prompt": "a"} for number in range(count))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_geneval(geneval: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers that GenEval's summary_scores.py prints, here by pandas as there."""
    folder = record(tmp_path / "geneval", 72)
    bifrost(folder, "--geneval", geneval)
    table = pandas.read_json(geneval, orient="records", lines=True)
    found, by_tag = figures(folder)["geneval"], table.groupby("tag")["correct"].mean()
    assert found["tags"] == pytest.approx(by_tag.to_dict()) and len(by_tag) == 6
    assert found["score"] == pytest.approx(by_tag.mean()) and found["score"] != pytest.approx(table["correct"].mean())
    assert found["correct_images"] == pytest.approx(table["correct"].mean())
    assert found["correct_prompts"] == pytest.approx(table.groupby("metadata")["correct"].any().mean())
    assert (found["images"], found["prompts"]) == (72, 18)
    assert f"geneval.score                    {found['score']:.5g}" in capsys.readouterr().out


def test_dpg_bench(tmp_path: Path) -> None:
    (tmp_path / "results.txt").write_text(DPG)
    folder = record(tmp_path / "dpg", 2)
    bifrost(folder, "--dpg", tmp_path / "results.txt")
    assert figures(folder)["dpg"] == {
        "score": 70.0,
        "l1": {"entity": 75.0, "attribute": 50.0},
        "l2": {"attribute - color": 50.0, "entity - whole": 75.0},
        "prompts": 2,
    }


def test_both_and_the_run(geneval: Path, tmp_path: Path) -> None:
    """Another group's figures remain; those of the run are by name."""
    (tmp_path / "results.txt").write_text(DPG)
    run, folder = tmp_path / "run", tmp_path / "images"
    for each in (run, folder):
        each.mkdir()
    (run / "metrics.jsonl").touch()
    bifrost(folder, "--geneval", geneval, "--run", run)
    bifrost(folder, "--dpg", tmp_path / "results.txt", "--run", run)
    assert figures(folder).keys() == {"geneval", "dpg"}
    first, second = (json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines())
    assert first["geneval/tags/counting"] == figures(folder)["geneval"]["tags"]["counting"]
    assert second["dpg/score"] == 70.0 and "geneval/score" not in second


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no results"),
        ("Summary\n", "line 1: not a result of GenEval"),
        ('{"tag": "colors", "correct": 1, "metadata": ""}', "line 1: not a result of GenEval .*other types"),
        ('{"tag": "colors", "correct": true, "metadata": ""}', "has 1 results, .*images 2 images; score them again"),
    ],
)
def test_unusable_results_of_geneval(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(RunError, match=message):
        bifrost(record(tmp_path / "images", 2), "--geneval", tmp_path / "results.jsonl")
    assert not (tmp_path / "images" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DPG.replace("DPG-Bench score: 70.0\n", ""), "let compute_dpg_bench.py finish"),
        (DPG.replace("score: 70.0", "score: 71.0"), "71.0, but its 2 lines have a mean of 70: it is damaged"),
        (DPG, "has 2 results, .*images 3 images"),
    ],
)
def test_unusable_results_of_dpg_bench(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "results.txt").write_text(text)
    with pytest.raises(RunError, match=message):
        bifrost(record(tmp_path / "images", 3), "--dpg", tmp_path / "results.txt")
    with pytest.raises(RunError, match=r"none\.txt: cannot be read \(No such file"):
        bifrost(tmp_path / "images", "--dpg", tmp_path / "none.txt")
