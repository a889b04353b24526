"""Evaluation by ground truth: scores with generators whose images are known, choice of scenes, output files."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import ranked
import small_world
from bifrost.data import DataError, write_shard
from bifrost.data.scenes.grammar import Object, Scene, render
from bifrost.data.scenes.heldout import heldout_scenes, training_scenes
from bifrost.data.scenes.key import read_key, to_json
from bifrost.data.scenes.places import LEFT, RIGHT
from bifrost.data.shards import open_dataset
from bifrost.trainer.cli import main
from bifrost.trainer.errors import RunError
from bifrost.trainer.evaluation.samples import SampleSet
from bifrost.trainer.evaluation.scene_samples import choose_scenes
from bifrost.trainer.evaluation.scenes import evaluate_scenes, others
from bifrost.trainer.evaluation.understanding import Understanding
from bifrost.trainer.inference.generator import Generator
from bifrost.trainer.inference.latent_decoder import load_decoder
from bifrost.trainer.inference.settings import Sampling, Settings
from bifrost.trainer.monitors.metrics import read_metrics

FAST = Settings(steps=2, flux=Sampling(steps=1))
CONTROLS = {
    *("both", "latents_alone", "flux_alone", "true_latents", "swapped", "shuffled"),
    *("probe", "probe_true", "probe_shuffled"),
}
HELD_OUT = ("two", "position", "phrasing")
SEEN = ("single", "two", "position")

pytestmark = pytest.mark.usefixtures("one_thread")


class Scenes(NamedTuple):
    train: str
    heldout: str
    key: Path


def save(folder: Path, name: str, scenes: Sequence[Scene]) -> dict[str, Scene]:
    """Write the scenes to a shard; returns them by key."""
    keyed = {f"{name}{number:05d}": scene for number, scene in enumerate(scenes)}
    write_shard(folder / f"{name}-00000.tar", [(key, small_world.sample(scene)) for key, scene in keyed.items()])
    return keyed


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Scenes:
    """Ten training scenes or more and four held-out ones of every category named above."""
    folder = tmp_path_factory.mktemp("scenes")
    train = training_scenes(30, 0, dict.fromkeys(SEEN, 1 / 3))
    heldout = [scene for scene in heldout_scenes(4, 1) if scene.category in HELD_OUT]
    (folder / "KEY.json").write_text(to_json({**save(folder, "train", train), **save(folder, "heldout", heldout)}))
    return Scenes(f"{folder}/train-*.tar", f"{folder}/heldout-*.tar", folder / "KEY.json")


class Known(Generator):
    """Decodes the true latents of a caption; its images are true renders, chosen by `choose`."""

    true: dict[str, torch.Tensor]
    renders: dict[str, Image.Image]
    choose: Callable[[str, str | None, Settings], str | None]
    """Caption, caption of the latents, settings -> caption whose image is made; of None a white one."""

    def latents(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings = FAST, sources: None = None
    ) -> torch.Tensor:
        return torch.stack([self.true[prompt] for prompt in prompts])

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings = FAST,
        latents: torch.Tensor | None = None,
        batch: int = 8,
        made: Callable[[int], None] = lambda count: None,
    ) -> list[Image.Image]:
        assert (latents is not None) == settings.controlnet
        images = []
        for number, prompt in enumerate(prompts):
            of = None
            if latents is not None:
                (of,) = (each for each, known in self.true.items() if torch.equal(known, latents[number]))
            shown = self.choose(prompt, of, settings)
            images.append(Image.new("RGB", (64, 64), "white") if shown is None else self.renders[shown])
        made(len(images))
        return images


@pytest.fixture(scope="module")
def known(generator: Generator, scenes: Scenes) -> Known:
    made = Known(**{field.name: getattr(generator, field.name) for field in fields(Generator)})
    by_caption = {scene.caption: scene for scene in read_key(scenes.key).values()}
    renders = {caption: Image.fromarray(render(scene)) for caption, scene in by_caption.items()}
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in renders.values()])).permute(0, 3, 1, 2)
    # One image at a time: `encode` does not give the same last bits in every batch.
    made.true = {caption: made.encode(each[None])[0] for caption, each in zip(renders, pixels, strict=True)}
    made.renders = {caption: image.resize((64, 64), Image.Resampling.BICUBIC) for caption, image in renders.items()}
    made.encode = lambda images: torch.stack([Generator.encode(made, image[None])[0] for image in images])
    return made


def scored(known: Known, scenes: Scenes, choose: Callable[[str, str | None, Settings], str | None]) -> dict:
    known.choose = choose
    inputs = open_dataset(scenes.train), open_dataset(scenes.heldout), read_key(scenes.key)
    return evaluate_scenes(known, *inputs, samples=3, seed=0, settings=FAST).scenes


def everything(figures: dict, score: str = "all") -> dict[str, float]:
    """Control -> a score that is the same in every category and both parts."""
    found: dict[str, set[float]] = {}
    for part in figures.values():
        for control, categories in part.items():
            found.setdefault(control, set()).update(row[score] for row in categories.values())
    assert all(len(values) == 1 for values in found.values()), found
    return {control: values.pop() for control, values in found.items()}


def test_a_generator_that_follows_its_latents(known: Known, scenes: Scenes) -> None:
    figures = scored(known, scenes, lambda caption, of, settings: of or caption)
    assert figures.keys() == {"heldout", "seen"}
    assert list(figures["heldout"]["both"]) == ["two", "position", "phrasing"]
    assert list(figures["seen"]["both"]) == ["single", "two", "position"]
    distinct: dict[str, int] = Counter()  # all that are held out, for the probe
    for category, _ in {
        (scene.category, frozenset(scene.objects))
        for key, scene in read_key(scenes.key).items()
        if not key.startswith("train")
    }:
        distinct[category] += 1
    for name, part in figures.items():
        assert part.keys() == CONTROLS
        for control, categories in part.items():
            for category, row in categories.items():
                wins = {"latents_win", "caption_wins"} if control == "swapped" else set()
                assert row.keys() == {"n", "all", "set", "layout", "objects"} | wins
                assert row["n"] == (distinct[category] if "probe" in control and name == "heldout" else 3)
        assert {(row["latents_win"], row["caption_wins"]) for row in part["swapped"].values()} == {(1.0, 0.0)}
    rest = {control: 1.0 for control in CONTROLS if "probe" not in control}
    probes = {"probe", "probe_true", "probe_shuffled"}
    found = {name: {c: v for c, v in part.items() if c not in probes} for name, part in figures.items()}
    assert everything(found) == {**rest, "shuffled": 0.0}
    assert everything(found, "set")["swapped"] == 1
    for part in figures.values():  # the decoded latents are the true ones
        assert part["probe"] == part["probe_true"]


def test_a_generator_that_follows_its_caption(known: Known, scenes: Scenes) -> None:
    figures = scored(known, scenes, lambda caption, of, settings: None if settings.empty_prompt else caption)
    found = {
        name: {control: rows for control, rows in part.items() if "probe" not in control}
        for name, part in figures.items()
    }
    wanted = {"both": 1.0, "flux_alone": 1.0, "latents_alone": 0.0, "true_latents": 0.0, "swapped": 0.0}
    assert everything(found) == {**wanted, "shuffled": 0.0}
    for part in figures.values():
        assert {(row["latents_win"], row["caption_wins"]) for row in part["swapped"].values()} == {(0.0, 1.0)}


def test_a_generator_that_exchanges_places(known: Known, scenes: Scenes) -> None:
    """Of the category `two`, objects and layout are right and every object is in the other's place."""
    truth = read_key(scenes.key).values()
    for scene in [scene for scene in truth if scene.category == "two"]:
        (a, _), (b, _) = scene.objects
        image = Image.fromarray(render(Scene("two", "", (Object(b, LEFT), Object(a, RIGHT)))))
        known.renders[f"exchanged {scene.caption}"] = image
    two = {scene.caption for scene in truth if scene.category == "two"}
    figures = scored(known, scenes, lambda caption, of, settings: f"exchanged {caption}" if caption in two else caption)
    for part in figures.values():
        assert part["both"]["two"] == {"n": 3, "all": 0.0, "set": 1.0, "layout": 1.0, "objects": 0.0}
        assert part["shuffled"]["two"]["set"] == 0


def test_another_scene_is_of_the_same_category() -> None:
    found = [Scene(category, "", ()) for category in ("a", "a", "b", "b", "b")]
    assert others(found) == [1, 0, 3, 4, 2]


def test_choice_by_category(scenes: Scenes) -> None:
    truth = read_key(scenes.key)
    samples = SampleSet("train", open_dataset(scenes.train), 5, (112, 64))
    chosen = choose_scenes(samples, truth, 4)
    assert Counter(each.scene.category for each in chosen) == dict.fromkeys(SEEN, 4)
    assert len({frozenset(each.scene.objects) for each in chosen}) == len(chosen)
    assert all(truth[each.key] == each.scene and each.caption == each.scene.caption for each in chosen)
    fewer = choose_scenes(samples, truth, 2)
    assert [each.key for each in fewer if each.scene.category == "two"] == [
        each.key for each in chosen if each.scene.category == "two"
    ][:2]
    other = choose_scenes(SampleSet("train", samples.dataset, 6, (112, 64)), truth, 4)
    assert {each.key for each in other} != {each.key for each in chosen}
    known = {(each.caption, frozenset(each.scene.objects)) for each in chosen}
    assert not {each.key for each in chosen} & {each.key for each in choose_scenes(samples, truth, 4, known)}


def test_two_captions_of_one_image_are_one_scene(tmp_path: Path) -> None:
    def position(caption: str, first: Object, second: Object) -> Scene:
        return Scene("position", caption, (first, second))

    (a, b), *_ = ([each.look for each in s.objects] for s in training_scenes(10, 0, {"two": 1.0}))
    left, right = Object(a, LEFT), Object(b, RIGHT)
    pairs = [position("1", left, right), position("2", right, left), position("3", Object(b, LEFT), Object(a, RIGHT))]
    truth = save(tmp_path, "train", pairs)
    chosen = choose_scenes(SampleSet("train", open_dataset(f"{tmp_path}/train-*.tar"), 0, (112, 64)), truth, 3)
    assert len(chosen) == 2 and {each.caption for each in chosen} > {"3"}


def bifrost(*arguments: object) -> None:
    """Run the command in this process."""
    code = main.app(["eval", *map(str, arguments)], standalone_mode=False)
    assert not code


QUICK = ("--steps=2", "--flux-steps=1", "--samples=2", "--batch=32")


def test_the_command(mllm: Path, controlnet: Path, scenes: Scenes, tmp_path: Path, capsys, monkeypatch) -> None:
    out = tmp_path / "out"
    (mllm / "metrics.jsonl").touch()
    usual = ("--mllm", mllm, "--controlnet", controlnet, "--data", scenes.train, "--scenes", scenes.key, *QUICK)
    bifrost(*usual, "--heldout", scenes.heldout, "--out", out)
    shown = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["contact_sheet.png", "metrics.json", "table.txt"]
    record = json.loads((out / "metrics.json").read_text())
    assert record["scenes"].keys() == {"heldout", "seen"}
    assert set(record["scenes"]["heldout"]) == CONTROLS
    assert set(record["scenes"]["heldout"]["both"]) == set(HELD_OUT)
    answers = record["understanding"]
    assert answers["before"] == answers["after"] and answers["equal"] is True
    assert answers["before"].keys() == answers["n"].keys() >= {"count", "place", "all"}
    assert len(record["data"]["heldout"]["keys"]) == 2 * len(HELD_OUT)
    text = (out / "table.txt").read_text()
    assert text in shown and text.index("held-out scenes") < text.index("scenes of the training set")
    assert f"of {answers['n']['all']} before stage 1" in text and "equal to the bit" in text
    (noted,) = read_metrics(mllm / "evaluations.jsonl")
    assert (
        noted["scenes/heldout/both/two/n"] == 2
        and noted["scenes/heldout/probe/two/n"] == 4
        and noted["understanding/equal"] == 1
    )
    width, height = Image.open(out / "contact_sheet.png").size
    assert 3 * 128 < width < 3 * 128 + 200 and 5 * 128 < height < 5 * 128 + 250

    found = Understanding({"all": 1}, {"all": 0.0}, {"all": 1.0}, equal=False)
    module = "bifrost.trainer.evaluation.understanding.measure_understanding"
    monkeypatch.setattr(module, lambda *_: found)
    with pytest.raises(RunError, match="logits differ"):
        bifrost(*usual, "--out", out)
    assert "NOT equal" in (out / "table.txt").read_text() and "held-out" not in (out / "table.txt").read_text()
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (mllm / name).unlink()


def test_stage_1_alone_is_scored_as_it_is_with_a_controlnet(
    mllm: Path, controlnet: Path, scenes: Scenes, tmp_path: Path, capsys
) -> None:
    shards = ("--data", scenes.train, "--heldout", scenes.heldout, "--scenes", scenes.key)
    bifrost("--mllm", mllm, "--controlnet", controlnet, *shards, *QUICK, "--out", tmp_path / "both")
    capsys.readouterr()
    bifrost("--mllm", mllm, *shards, *QUICK, "--out", tmp_path / "one")
    assert "stage 1 by a linear probe" in capsys.readouterr().out
    both, one = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("both", "one"))
    for part, controls in both["scenes"].items():
        probes = {control: rows for control, rows in controls.items() if "probe" in control}
        assert one["scenes"][part] == probes and len(probes) == 3
    assert one["understanding"] == both["understanding"] and one["data"] == both["data"]
    assert both.keys() - one.keys() == {"controlnet", "flux"}
    text = (tmp_path / "one" / "table.txt").read_text()
    assert "FLUX" not in text and text.count("true latents by the probe") == 2
    width, height = Image.open(tmp_path / "one" / "contact_sheet.png").size
    assert width > 3 * 112 and height > 3 * 112
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (mllm / name).unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.multi
def test_ranks_share_the_images(mllm: Path, controlnet: Path, scenes: Scenes, tmp_path: Path) -> None:
    """Two ranks write what one process writes: metrics, table and images, with an odd number of batches."""
    shards = ("--data", scenes.train, "--heldout", scenes.heldout, "--scenes", str(scenes.key))
    usual = ("--mllm", str(mllm), "--controlnet", str(controlnet), *shards, *QUICK, "--batch=3")
    bifrost(*usual, "--out", tmp_path / "one")
    first, second = ranked.bifrost(2, "eval", *usual, "--out", str(tmp_path / "two"))
    assert (first.code, second.code, second.out) == (0, 0, ""), first.err + second.err
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one == two
    for name in ("table.txt", "contact_sheet.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (mllm / name).unlink(missing_ok=True)


def test_wrong_inputs_are_one_line_and_leave_nothing(
    mllm: Path, controlnet: Path, scenes: Scenes, tmp_path: Path
) -> None:
    out, usual = tmp_path / "out", {"mllm": mllm, "controlnet": controlnet, "data": scenes.train, "scenes": scenes.key}

    def refused(message: str, *arguments: str, **changes: object) -> None:
        options = [f"--{name}={value}" for name, value in {**usual, "out": out, **changes}.items() if value]
        with pytest.raises((RunError, DataError)) as error:
            bifrost(*options, *QUICK, *arguments)
        assert message in str(error.value) and "\n" not in str(error.value), error.value
        assert not out.exists()

    truth = read_key(scenes.key)

    def key(name: str, changed: dict[str, Scene]) -> Path:
        (tmp_path / name).write_text(to_json(changed))
        return tmp_path / name

    refused("missing.json: No such file", scenes=tmp_path / "missing.json")
    refused("not the ground truth of scenes", scenes=scenes.key.with_name("train-00000.index.jsonl"))
    refused("not the ground truth of scenes (not UTF-8)", scenes=scenes.key.with_name("train-00000.tar"))
    lacking = key("lacking.json", {name: scene for name, scene in truth.items() if name != "train00007"})
    refused("sample train00007 of", scenes=lacking)
    refused("is missing", scenes=lacking)
    moved = dict(zip(truth, [*list(truth.values())[1:], truth["train00000"]], strict=True))
    refused("give the KEY.json that was written with these shards", scenes=key("moved.json", moved))
    refused("others have a caption of --data), at least 2 needed", heldout=scenes.train)
    refused("--gallery is for retrieval", "--gallery=9")
    refused("--scenes are squares; leave out --shape", "--shape=168x84")
    del usual["controlnet"]
    refused("only --scenes measures a stage 1 without --controlnet", "--flux=somewhere")
    refused("only --scenes measures a stage 1 without --controlnet", scenes=None)
    usual["controlnet"] = controlnet
    few = [scene for scene in truth.values() if scene.category == "two"][:1]
    usual["scenes"] = key("few.json", save(tmp_path, "few", few))
    refused("few-00000.tar: 1 readable scenes of the category two, at least 2 needed", data=f"{tmp_path}/few-*.tar")


def test_stage_1_in_buckets_without_the_square_is_not_measured_in_it(mllm: Path) -> None:
    decoder = load_decoder(mllm)
    decoder.check(FAST)
    decoder.shapes = ((84, 168),)
    with pytest.raises(RunError, match=r"^shape 112x112: stage 1 was trained in 168x84 alone \(data\.buckets\)$"):
        decoder.check(FAST)
