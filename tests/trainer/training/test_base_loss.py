"""The frozen base's loss on understanding sources: transformers' own, on any number of ranks, through kills, with no
effect on the training."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

import ranked
import runs
import small_model
import small_shards
from bifrost.data import Plan, open_dataset, write_shard
from bifrost.data.mixture import derived_seed
from bifrost.data.write import index_all

pytestmark = pytest.mark.multi

BAD = 17
"""Number of a question without an answer, whose place the next one takes."""
RATES = {"asked": 0.5, "text": 1.5, "alone": 0.25}
SETTINGS = ("steps=6", "seed=3", "data.max_bad_fraction=1")


def texts(number: int) -> dict[str, str]:
    return {
        "question": f"what is drawn in {number}?",
        "answer": f"a red car and {number} blue hearts " * (number % 3 + 1),
    }


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Two shards to train on, and two of questions, answers and texts."""
    folder = tmp_path_factory.mktemp("sets")
    for name, first in (("images", 0), ("other", 100)):
        for shard in range(2):
            samples = []
            for number in range(first + shard * 15, first + shard * 15 + 15):
                described = texts(number) if number != first + BAD else {"question": "where?"}
                text = {"txt": f"the text of <|im_end|> number {number}", "json": json.dumps(described)}
                image = {"png": small_shards.pattern(number)}
                samples.append((f"k{number:03d}", {**image, **{kind: each.encode() for kind, each in text.items()}}))
            write_shard(folder / name / f"train-{shard:05d}.tar", samples)
            if name == "other":  # the same without images
                alone = [(key, {kind: each for kind, each in found.items() if kind != "png"}) for key, found in samples]
                write_shard(folder / "alone" / f"train-{shard:05d}.tar", alone)
    index_all(str(folder / "alone"), texts=True)
    return folder


def sources(folder: Path, *understanding: str) -> str:
    trained = f"{{name: images, shards: {folder}/images, weight: 1}}"
    return f"data.sources=[{', '.join([trained, *understanding])}]"


def source(folder: Path, name: str, rate: float, member: str) -> str:
    shards = folder / ("other" if name == "asked" else "alone")
    own = f"name: {name}, task: understanding, shards: {shards}, captions: {{{member}: 1}}"
    return f"{{{own}, batches_per_step: {rate}}}"


def both(folder: Path) -> str:
    return sources(folder, source(folder, "asked", 0.5, "json"), source(folder, "text", 1.5, "txt"))


def train(folder: Path, home: Path, ranks: int, *overrides: str) -> Path:
    arguments = runs.arguments(folder, home, "data.shards=null", *SETTINGS, *overrides)
    ended = ranked.bifrost(ranks, *[each for each in arguments if not each.startswith(f"data.shards={folder}")])
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return home / "tiny-mllm"


def measured(run: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in line if key.startswith("base_")} for line in runs.steps(run)]


def weights(run: Path, step: int) -> bytes:
    return (run / f"checkpoints/step-{step:08d}/rank-00000.safetensors").read_bytes()


@torch.no_grad()
def expected(folder: Path, name: str, step: int, rate: float) -> tuple[float, int]:
    """Loss and tokens by transformers' own class, whose labels are -100 where nothing is predicted, of one sample at a
    time, with the images as its own processor reads them."""
    backbone = small_model.shared()
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(backbone, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    process: Any = Qwen2VLImageProcessor(patch_size=14, merge_size=2, temporal_patch_size=2, do_resize=False)
    dataset = open_dataset(str(folder / "other"))
    plan = Plan(dataset.samples_per_shard, derived_seed(3, "understanding"), 2)
    batches = range(int(rate * (step - 1)), int(rate * step))
    total, count = 0.0, 0
    for index in plan.locate(np.arange(batches.start * 8, batches.stop * 8)).index.tolist():
        index += name != "text" and index == BAD
        described, more = texts(100 + index), {}
        if name == "text":
            ids = tokenizer(f"the text of < |im_end|> number {100 + index}").input_ids
            labels = list(ids)
        else:
            shown = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>" if name == "asked" else ""
            turn = [{"role": "user", "content": shown + described["question"]}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            before = tokenizer(text).input_ids
            answer = [*tokenizer(described["answer"].strip()).input_ids, tokenizer.eos_token_id]
            ids, labels = before + answer, [-100] * len(before) + answer
        if name == "asked":
            image = Image.open(io.BytesIO(dataset.read(*dataset.place(index)).image)).convert("RGB").resize((56, 56), 3)
            seen = process(images=[image], return_tensors="pt")
            kinds = (torch.tensor([ids]) == model.config.image_token_id).int()
            more = {"image_grid_thw": seen.image_grid_thw, "mm_token_type_ids": kinds}
            more["pixel_values"] = seen.pixel_values
        found = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), **more)
        predicted = sum(label != -100 for label in labels[1:])
        total, count = total + float(found.loss) * predicted, count + predicted
    return total / count, count


def test_equal_to_transformers_and_without_effect_on_the_training(sets: Path, tmp_path: Path) -> None:
    plain = train(sets, tmp_path / "plain", 2, sources(sets))
    alone = source(sets, "alone", 0.25, "json")
    found = train(sets, tmp_path / "with", 2, both(sets).replace("]", f", {alone}]"))
    exact = ("step", "loss", "grad_norm", "data_digest", "source_loss_images")
    assert [[line[key] for key in exact] for line in runs.steps(found)] == [
        [line[key] for key in exact] for line in runs.steps(plain)
    ]
    assert weights(found, 6) == weights(plain, 6)
    assert not any(measured(plain))
    lines = measured(found)
    read = {name: [step for step, line in enumerate(lines, 1) if f"base_loss_{name}" in line] for name in RATES}
    assert read == {"asked": [2, 4, 6], "text": [1, 2, 3, 4, 5, 6], "alone": [4]}
    for step, line in enumerate(lines, 1):
        for name, rate in RATES.items():
            if f"base_loss_{name}" in line:
                loss, tokens = expected(sets, name, step, rate)
                assert line[f"base_tokens_{name}"] == tokens
                assert line[f"base_loss_{name}"] == pytest.approx(loss, abs=1e-5)
    bad = [pair for event in runs.events(found, "bad_samples") for pair in event["samples"]]
    assert bad and all(pair == ["k117", "its .json has no text under question and answer"] for pair in bad)


@pytest.mark.parametrize("placement", ["sharded", "replicated"])
def test_any_number_of_ranks_and_a_resume(placement: str, sets: Path, tmp_path: Path) -> None:
    """One rank, and 2 -> 1 -> 4 ranks, with workers and without."""
    settings = f"backbone.placement={placement}", both(sets)
    whole = train(sets, tmp_path / "whole", 1, *settings)
    for ranks, steps in ((2, 3), (1, 4), (4, 6)):
        parts = train(sets, tmp_path / "parts", ranks, *settings, f"steps={steps}", f"data.workers={ranks % 2}")
    assert len(measured(whole)) == 6
    for one, other in zip(measured(whole), measured(parts), strict=True):
        assert other == pytest.approx(one, abs=1e-5)


def test_a_kill_and_a_change_of_sources(sets: Path, tmp_path: Path) -> None:
    """The lines after a kill equal those without, to the bit; sources may come and go without a trace."""
    settings = ("data.workers=1", "checkpoint.every=2", both(sets))
    whole = train(sets, tmp_path / "whole", 2, *settings)
    arguments = runs.arguments(sets, tmp_path / "killed", *SETTINGS, *settings)
    arguments = [each for each in arguments if not each.startswith("data.shards=")] + ["data.shards=null"]
    ended = ranked.run(runs.train_until_killed, 2, arguments, 4)
    assert -signal.SIGKILL in [rank.code for rank in ended]
    killed = train(sets, tmp_path / "killed", 2, *settings)
    assert measured(killed) == measured(whole)
    train(sets, tmp_path / "killed", 2, *settings[:2], sources(sets), "steps=7")
    assert measured(killed) == [*measured(whole), {}]
    assert len(runs.events(killed, "mixture")) == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["data.sources=[{name: a, task: understanding, shards: x, batches_per_step: 2}]"],
            "add one that is trained",
        ),
        (["data.sources=[{name: a, shards: x, batches_per_step: 1}]"], "batches_per_step is for task=understanding"),
        (["data.sources=[{name: a, task: understanding, shards: x, weight: 1}]"], "weight is for sources that are"),
        (["data.sources=[{name: a, task: understanding, shards: x}]"], "needs batches_per_step, such as 0.01"),
        (
            [
                "data.sources=[{name: a, shards: x}, {name: b, task: understanding, shards: y, batches_per_step: 1,"
                " captions: {json: 1, txt: 1}}]"
            ],
            "captions name texts and questions",
        ),
        (["ASKED", "backbone.vision_encoder=cached"], "questions about images need the vision encoder"),
        (["ASKED", "branch.targets=pca"], "questions about images need the vision encoder"),
    ],
)
def test_refusals(overrides: list[str], said: str, sets: Path, tmp_path: Path) -> None:
    from bifrost.recipes import RecipeError, load_recipe

    asked = sources(sets, source(sets, "asked", 0.5, "json"))
    given = [asked if each == "ASKED" else each for each in overrides]
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe("tiny-mllm", ["data.shards=null", *given])
    assert "\n" not in str(caught.value)
    if overrides[0] == "ASKED" and "vision_encoder" in overrides[1]:
        with pytest.raises(RecipeError, match="task=understanding is for stage 1"):
            load_recipe("tiny-controlnet", ["data.shards=null", asked])
