"""Editing pairs in stage 1: next to plain samples in one batch, the same on any number of ranks, after a resume, and in
a replay."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import editing_pairs
import opened
import plain
import ranked
import runs
from bifrost.data.ingest import ingest
from bifrost.recipes import RecipeError, load_recipe

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return editing_pairs.save(tmp_path_factory.mktemp("pairs"))


def sources(shards: Path, pairs: Path, editing: int = 3, generation: int = 5) -> list[str]:
    """The overrides for editing pairs and plain samples with these weights."""
    listed = [
        {"name": "edits", "shards": str(pairs), "weight": editing, "task": "editing"},
        {"name": "plain", "shards": f"{shards}/train-*.tar", "weight": generation},
    ]
    return ["data.shards=null", f"data.sources={json.dumps([each for each in listed if each['weight']])}"]


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [("branch.positions=mrope",), ("branch.positions=learned", "branch.draws=2", "activation_checkpointing=true")],
    ids=["mrope", "learned-draws"],
)
def test_ranks_equal_plain_pytorch(shards: Path, pairs: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """With 3 pairs in 8 samples, micro-batches of 2 have none, one or two of them."""
    settings = ("steps=5", *runs.TINY, *settings, *sources(shards, pairs))
    wanted = plain.losses(load_recipe("tiny-mllm", runs.arguments(shards, tmp_path, *settings)[2:]))
    digests = set()
    for ranks in (1, 2, 4):
        ended = ranked.bifrost(ranks, *runs.arguments(shards, tmp_path / str(ranks), *settings))
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
        run = tmp_path / str(ranks) / "tiny-mllm"
        np.testing.assert_allclose(runs.losses(run), wanted, rtol=TOLERANCE)
        digests.add(tuple(line["data_digest"] for line in runs.steps(run)))
    assert len(digests) == 1


@pytest.mark.multi
@pytest.mark.slow
def test_resume_on_other_ranks_replay_and_validation(shards: Path, pairs: Path, tmp_path: Path) -> None:
    """2 ranks -> the same 2, to the bit; 2 -> 1 within rounding. Held-out data has pairs and plain samples, too."""
    held_out = editing_pairs.save(tmp_path / "held-out", shards=3)
    for number in (0, 1):  # those are training data
        for file in held_out.glob(f"edit-{number:05d}*"):
            file.unlink()
    validation = (f"validation.shards={held_out}", "validation.every=6", "validation.samples=8", "data.workers=1")
    settings = (*validation, "ema.decay=0.9", *sources(shards, pairs))

    def train(name: str, ranks: int, steps: int) -> Path:
        ended = ranked.bifrost(ranks, *runs.arguments(shards, tmp_path / name, f"steps={steps}", *settings))
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
        return tmp_path / name / "tiny-mllm"

    whole = train("whole", 2, 6)
    train("same", 2, 3)
    train("fewer", 2, 3)
    same, fewer = train("same", 2, 6), train("fewer", 1, 6)
    exact = ("loss", "grad_norm", "data_digest", "source_loss_edits", "source_loss_plain")
    first, second, third = ([[line[key] for key in exact] for line in runs.steps(run)] for run in (whole, same, fewer))
    assert first == second
    np.testing.assert_allclose(runs.losses(fewer), runs.losses(whole), rtol=TOLERANCE)
    assert [line[2] for line in third] == [line[2] for line in first]
    losses = [runs.steps(run)[-1]["val_loss"] for run in (whole, same, fewer)]
    assert math.isfinite(losses[0]) and losses[1] == losses[0] == pytest.approx(losses[2], rel=TOLERANCE)
    (event,) = runs.events(whole, "mixture")
    assert [each.get("task") for each in event["sources"]] == ["editing", None]

    found = runs.replay(whole, "--step=6", f"--out={tmp_path / 'out'}")
    assert found["data_digest"] == first[-1][2]
    edits = [sample for sample in found["samples"] if sample.get("task") == "editing"]
    assert {sample["source"] for sample in edits} == {"edits"} and len(edits) == 3
    assert {sample["source"] for sample in found["samples"] if "task" not in sample} == {"plain"}
    assert Image.open(tmp_path / "out/contact_sheet.png").height > 3 * 56, "source images, images, hidden patches"


def arrays(shards: Path, pairs: Path, *overrides: str, editing: int = 3, generation: int = 5) -> tuple[dict, list[str]]:
    """The first whole batch of a recipe, and its keys."""
    settings = (*overrides, *sources(shards, pairs, editing, generation))
    recipe = load_recipe("tiny-mllm", runs.arguments(shards, Path("runs"), "steps=1", *settings)[2:])
    batch = next(iter(plain.batches(recipe, opened.inputs(recipe))))
    return batch.arrays, batch.keys


def placeholders(batch: dict) -> list[int]:
    """Tokens of each prompt that stand for latents of a source image."""
    rows, begins = batch["input_ids"].split(batch["text_lengths"]), batch["source_begins"]
    token = max(int(ids[begin]) for ids, begin in zip(rows, begins, strict=True) if begin is not None)
    return [int((ids == token).sum()) for ids in rows]


def test_dropout_takes_the_instruction_and_leaves_the_source_image(shards: Path, pairs: Path) -> None:
    kept, keys = arrays(shards, pairs, "branch.caption_dropout=0")
    dropped, same = arrays(shards, pairs, "branch.caption_dropout=1")
    assert keys == same
    assert torch.equal(kept["sources"], dropped["sources"]) and len(kept["sources"]) == 3
    assert kept["source_begins"] == dropped["source_begins"]
    assert [begin is not None for begin in kept["source_begins"]] == [key.startswith("edit") for key in keys]
    lengths = {
        (begin is not None, n) for begin, n in zip(dropped["source_begins"], dropped["text_lengths"], strict=True)
    }
    assert len(lengths) == 2, "one empty prompt of each task"
    assert placeholders(dropped) == [0 if begin is None else 4 for begin in dropped["source_begins"]]
    assert sum(dropped["text_lengths"]) < sum(kept["text_lengths"])


def test_a_batch_without_pairs_is_as_before(shards: Path, pairs: Path) -> None:
    mixed, _ = arrays(shards, pairs, editing=0, generation=1)
    assert "sources" not in mixed and "source_begins" not in mixed


@pytest.mark.multi
@pytest.mark.slow
def test_the_loss_depends_on_the_source_image(shards: Path, pairs: Path, tmp_path: Path) -> None:
    recipe = load_recipe("tiny-mllm", runs.arguments(shards, tmp_path, "steps=1", *sources(shards, pairs))[2:])
    inputs, model = plain.loaded(recipe)
    batch = next(iter(plain.batches(recipe, inputs))).arrays
    with torch.no_grad():
        before = model(**batch, normalizer=1.0).each
        after = model(**{**batch, "sources": batch["sources"].roll(1, 0)}, normalizer=1.0).each
    assert (before != after).tolist() == [begin is not None for begin in batch["source_begins"]]


@pytest.mark.multi
@pytest.mark.slow
def test_ingested_pairs_train_as_written_ones(shards: Path, pairs: Path, tmp_path: Path) -> None:
    for number in range(30):
        for kind, data in editing_pairs.pair(number).items():
            (tmp_path / f"edit-{number:03d}.{kind}").write_bytes(data)
    ingest(tmp_path, tmp_path / "shards", samples_per_shard=15)
    made = sorted((tmp_path / "shards").glob("*.tar"))
    assert [each.read_bytes() for each in made] == [each.read_bytes() for each in sorted(pairs.glob("*.tar"))]
    found = []
    for place in (pairs, tmp_path / "shards"):
        home = tmp_path / f"from-{place.name}"
        arguments = runs.arguments(shards, home, "steps=2", *runs.TINY, *sources(shards, place, generation=0))
        (ended,) = ranked.bifrost(1, *arguments)
        assert ended.code == 0, ended.err
        found.append([(line["loss"], line["data_digest"]) for line in runs.steps(home / "tiny-mllm")])
    assert found[0] == found[1] and len(found[0]) == 2


@pytest.mark.parametrize(
    ("recipe", "override", "named"),
    [
        ("tiny-mllm", "backbone.vision_encoder=cached", "backbone.vision_encoder=cached"),
        ("tiny-mllm", "branch.targets=pca", "branch.targets=pca"),
        ("tiny-controlnet", "seed=0", "stage controlnet"),
    ],
)
def test_what_has_no_place_for_source_images_is_refused(recipe: str, override: str, named: str) -> None:
    edits = ["data.shards=null", "data.sources=[{name: edits, shards: edits, task: editing}]"]
    with pytest.raises(RecipeError, match=f"task=editing is for stage 1 .* not for {named}"):
        load_recipe(recipe, [*edits, override])


def test_in_buckets_the_source_image_has_the_shape_of_its_target(shards: Path, pairs: Path) -> None:
    found, _ = arrays(shards, pairs, "data.image_size=112", "data.buckets={ratios: [2x1], max_upscale: 4}")
    assert found["sources"].shape[1:] == found["images"].shape[1:] == (3, 84, 168)
    assert placeholders(found) == [0 if begin is None else 3 * 6 for begin in found["source_begins"]]
