"""Evaluation of edits: source images in the prompts, figures against explicit formulas, and what is refused."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import editing_pairs
import run_folders
import small_shards
from bifrost.data import Dataset, write_shard
from bifrost.data.demo import _edit_images
from bifrost.data.scenes.edits import heldout_edits, training_edits
from bifrost.data.scenes.grammar import render
from bifrost.data.shards import open_dataset
from bifrost.data.transforms import decode_image
from bifrost.recipes import load_recipe
from bifrost.trainer.cli import main
from bifrost.trainer.errors import RunError
from bifrost.trainer.evaluation.data_sets import PAIRS, open_sets
from bifrost.trainer.evaluation.evaluate import evaluate
from bifrost.trainer.evaluation.samples import SampleSet
from bifrost.trainer.evaluation.scenes import evaluate_scenes
from bifrost.trainer.inference.generator import Generator
from bifrost.trainer.inference.settings import Sampling, Settings

FAST = Settings(steps=2, flux=Sampling(steps=1))
QUICK = ("--steps=2", "--flux-steps=1", "--samples=4")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return editing_pairs.save(tmp_path_factory.mktemp("pairs"))


def save(folder: Path, *sources: str, settings: Sequence[str] = ()) -> Path:
    data = "data.shards=null", f"data.sources=[{', '.join(sources)}]"
    return run_folders.save(
        folder, load_recipe("tiny-mllm", ["branch.positions=mrope", "ema=null", *data, *settings]), 4
    )


@pytest.fixture(scope="module")
def edits(place: Path) -> Path:
    """A run on editing pairs alone."""
    return save(place / "edits", "{name: edits, shards: edits, task: editing}")


@pytest.fixture(scope="module")
def editor(edits: Path, controlnet: Path) -> Generator:
    return Generator.load(edits, controlnet)


def opened(pairs: Path, shard: int) -> Dataset:
    return open_dataset(f"{pairs}/edit-{shard:05d}.tar", captions=PAIRS)


def pattern(number: int, size: int) -> torch.Tensor:
    """uint8 [3, size, size]."""
    return torch.from_numpy(decode_image(small_shards.pattern(number), size)).permute(2, 0, 1)


def psnr(found: Sequence[Image.Image], wanted: torch.Tensor) -> float:
    each = [
        10 * np.log10(255**2 / np.square(np.asarray(image, float) - original.permute(1, 2, 0).numpy()).mean())
        for image, original in zip(found, wanted, strict=True)
    ]
    return float(np.mean(each))


def test_figures(editor: Generator, pairs: Path) -> None:
    found = evaluate(editor, opened(pairs, 0), opened(pairs, 1), 4, 5, FAST, gallery=15)
    assert found.edits and found.record()["task"] == "editing"
    assert set(found.figures["heldout"]["match"]) == {
        *("full", "ground_truth", "latents_alone", "no_controlnet", "empty_prompt", "other_source", "source", "chance")
    }
    assert found.figures["train"]["match"].keys() - found.figures["heldout"]["match"].keys() == {
        *("other_latents", "random_latents")
    }
    samples, figures = found.samples["heldout"], found.figures["heldout"]
    numbers = [int(sample.key.removeprefix("edit-")) for sample in samples]
    texts, seeds = [f"make it pattern {number}" for number in numbers], found.image_seeds["heldout"]
    sources = [pattern(editing_pairs.SOURCE + number, 112) for number in numbers]
    others = [*sources[1:], sources[0]]
    own = editor.encode(torch.stack([pattern(100 + number, 112) for number in numbers]))
    first = Settings(steps=1)  # all patches are hidden in the first step
    wanted = {
        "mse": editor.latents(texts, seeds, first, sources),
        "other_source_mse": editor.latents(texts, seeds, first, others),
        "source_mse": editor.encode(torch.stack(sources)),
    }
    for name, latents in wanted.items():
        error = float((latents - own).square().mean())
        assert figures["latents"]["1.0"][name] == pytest.approx(error, rel=1e-4), name
    targets = torch.stack([pattern(100 + number, 64) for number in numbers])
    made = editor.generate(texts, seeds, FAST, sources=sources)
    alone = editor.generate(texts, seeds, Settings(steps=2, empty_prompt=True, flux=FAST.flux), sources=others)
    unchanged = [
        Image.fromarray(pattern(editing_pairs.SOURCE + number, 64).permute(1, 2, 0).numpy()) for number in numbers
    ]
    for prefix, images in {"": made, "other_source_": alone, "source_": unchanged}.items():
        assert figures["editing"][f"{prefix}psnr"] == pytest.approx(psnr(images, targets), rel=1e-6), prefix
    assert figures["editing"]["empty_prompt_psnr"] != figures["editing"]["other_source_psnr"]


def test_in_a_bucket_sources_have_the_shape_of_their_targets(place: Path, controlnet: Path, tmp_path: Path) -> None:
    def wide(number: int) -> bytes:
        file = io.BytesIO()
        Image.open(io.BytesIO(small_shards.pattern(number))).resize((192, 128)).save(file, "PNG")
        return file.getvalue()

    pairs = {f"{n}": {"png": wide(n), "source.png": wide(50 + n), "txt": f"edit {n}".encode()} for n in range(5)}
    write_shard(tmp_path / "a.tar", [*pairs.items(), ("square", editing_pairs.pair(0))])
    buckets = "data.buckets={ratios: [1x1, 3x2], max_upscale: 4}"
    mllm = save(place / "in-buckets", "{name: edits, shards: edits, task: editing}", settings=(buckets,))
    stage2 = load_recipe("tiny-controlnet", [f"flux.path={place / 'flux'}", "ema=null", buckets])
    editor = Generator.load(mllm, run_folders.save(place / "controlnet-in-buckets", stage2, 2))
    assert editor.rule
    (shape,) = (each for each in editor.rule.buckets if each.largest[0] < each.largest[1])
    settings = replace(FAST, shape=str(shape))
    found = evaluate(editor, open_dataset(str(tmp_path), captions=PAIRS), None, 4, 5, settings, gallery=6)
    samples = found.samples["train"]
    assert "square" not in {sample.key for sample in samples}
    seen = [torch.from_numpy(sample.seen).permute(2, 0, 1) for sample in samples]
    assert tuple(seen[0].shape[1:]) == shape.largest
    sources = [editor.source_image(pairs[sample.key]["source.png"], settings) for sample in samples]
    own, row = editor.encode(torch.stack(seen)), found.figures["train"]["latents"]["1.0"]
    latents = editor.latents([s.caption for s in samples], [0] * 4, replace(settings, steps=1), sources)
    assert row["mse"] == pytest.approx(float((latents - own).square().mean()), rel=1e-4)
    unchanged = editor.encode(torch.stack(sources))
    assert row["source_mse"] == pytest.approx(float((unchanged - own).square().mean()), rel=1e-4)


def test_one_instruction_for_several_sources_is_several_pairs(tmp_path: Path) -> None:
    def pair(source: int, target: int) -> dict[str, bytes]:
        images = {"png": small_shards.pattern(target), "source.png": small_shards.pattern(source)}
        return {**images, "txt": b"remove the owl"}

    write_shard(tmp_path / "a.tar", [("a", pair(1, 2)), ("b", pair(3, 2)), ("c", pair(1, 2))])
    samples = SampleSet("train", open_dataset(str(tmp_path), captions=PAIRS), 0, (112, 64))
    assert {sample.key for sample in samples.choose(2)} in ({"a", "b"}, {"b", "c"})
    with pytest.raises(RunError, match="2 readable samples with distinct captions or source images, 3 requested"):
        samples.choose(3)
    assert len(samples.image_hashes(3)) == 2, "a target of other pairs is not a known pair"


def bifrost(*arguments: object) -> None:
    """Run the command in this process."""
    code = main.app(["eval", *map(str, arguments)], standalone_mode=False)
    assert not code


def test_the_command(edits: Path, controlnet: Path, pairs: Path, tmp_path: Path) -> None:
    out, usual = tmp_path / "out", ("--mllm", edits, "--controlnet", controlnet, *QUICK)
    shards = ("--data", f"{pairs}/edit-00000.tar", "--heldout", f"{pairs}/edit-00001.tar")
    bifrost(*usual, *shards, "--out", out)
    record, text = json.loads((out / "metrics.json").read_text()), (out / "table.txt").read_text()
    assert record["task"] == "editing" and all(key.startswith("edit-") for key in record["data"]["train"]["keys"])
    assert "training editing pairs: 4" in text and "held-out editing pairs: 4" in text and "captions:" not in text
    for name, label in (
        ("other_source_psnr", "another pair's source image"),
        ("source_psnr", "the source image itself"),
    ):
        assert any(
            line.split()[-3:-1] == [f"{record['figures']['heldout']['editing'][name]:.2f}", "dB"]
            for line in text.splitlines()
            if line.strip().startswith(label)
        ), label
    assert Image.open(out / "contact_sheet.png").height > 7 * 128


def test_what_the_run_was_not_trained_on_is_one_line(
    mllm: Path,
    edits: Path,
    controlnet: Path,
    generator: Generator,
    pairs: Path,
    shards: Path,
    place: Path,
    tmp_path: Path,
) -> None:
    out, plain = tmp_path / "out", f"{shards}/train-00003.tar"

    def refused(message: str, run: Path, data: object, *more: object) -> None:
        with pytest.raises(RunError, match=message) as error:
            bifrost("--mllm", run, "--controlnet", controlnet, "--data", data, *more, *QUICK, "--out", out)
        assert "\n" not in str(error.value) and not out.exists()

    refused(r"train-00003\.tar: no source images .* trained on editing pairs alone: give shards of such", edits, plain)
    refused(r"edit-00000\.tar and 1 more: editing pairs .* not trained on any .*task=editing", mllm, pairs)
    mixed = save(place / "mixed", *("{name: a, shards: a, task: editing}", "{name: b, shards: b}"))
    refused("^--data has source images and --heldout has none", mixed, pairs, "--heldout", plain)
    refused("^--heldout has source images and --data has none", mixed, plain, "--heldout", pairs)
    for data, use in ((pairs, "required"), (plain, "ignored")):  # such a run is measured on either
        ((_, dataset),) = open_sets({"train": str(data)}, None, mixed).values()
        assert dataset.captions.source_images == use
    with pytest.raises(RunError, match="the stage-1 run was not trained on editing pairs"):
        evaluate(generator, opened(pairs, 0), None, 4)
    bifrost("--controlnet", controlnet, "--data", pairs, *QUICK, "--out", out)  # stage 2 reconstructs the targets
    assert "task" not in json.loads((out / "metrics.json").read_text())


class Editor(Generator):
    """Decodes the true latents of a pair's target, or with another pair's source image those of that source; its images
    are those of the latents."""

    targets: dict[tuple[str, bytes], torch.Tensor]
    """Instruction and source image -> latents."""
    renders: list[tuple[torch.Tensor, Image.Image]]

    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings = FAST,
        sources: Sequence[torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        found = []
        for prompt, source in zip(prompts, sources or [], strict=True):
            assert source is not None
            right = self.targets.get((prompt, source.numpy().tobytes()))
            found.append(self.encode(source[None])[0] if right is None else right)
        return torch.stack(found)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings = FAST,
        latents: torch.Tensor | None = None,
        batch: int = 8,
        made: Callable[[int], None] = lambda count: None,
    ) -> list[Image.Image]:
        if latents is None:
            return [Image.new("RGB", (64, 64), "white") for _ in prompts]
        return [next(image for known, image in self.renders if torch.equal(known, each)) for each in latents]


def test_which_edits_are_done(editor: Generator, tmp_path: Path) -> None:
    """On scenes: with its own source every edit, with another's none; and what the sources already show."""
    parts = {"train": training_edits(8, 0), "heldout": heldout_edits(4, 1)}
    truth, known, renders = {}, {}, []
    made = Editor(**{field.name: getattr(editor, field.name) for field in fields(Generator)})
    # One image at a time: `encode` does not give the same last bits in every batch.
    made.encode = lambda images: torch.stack([Generator.encode(made, image[None])[0] for image in images])
    for part, every in parts.items():
        keyed = {f"{part}{number:05d}": edit for number, edit in enumerate(every)}
        samples = [(key, {**_edit_images(edit), "txt": edit.target.caption.encode()}) for key, edit in keyed.items()]
        write_shard(tmp_path / f"{part}-00000.tar", samples)
        truth |= {key: edit.target for key, edit in keyed.items()}
        for edit in every:
            source, target = render(edit.source), render(edit.target)
            known[edit.target.caption, source.transpose(2, 0, 1).tobytes()] = target
            for image in (source, target):
                latents = made.encode(torch.from_numpy(image.transpose(2, 0, 1).copy())[None])[0]
                renders.append((latents, Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC)))
    made.targets = {
        each: made.encode(torch.from_numpy(target.transpose(2, 0, 1).copy())[None])[0] for each, target in known.items()
    }
    made.renders = renders
    data, heldout = (open_dataset(f"{tmp_path}/{part}-*.tar", captions=PAIRS) for part in parts)
    found = evaluate_scenes(made, data, heldout, truth, 4, 0, FAST)
    assert found.edits and found.scenes.keys() == {"heldout", "seen"}
    for part in found.scenes.values():
        assert part["probe"] == part["probe_true"], "the decoded latents are the true ones"
        for category in ("recolour", "remove"):
            scores = {control: part[control][category]["all"] for control in part}
            for control in ("both", "latents_alone", "true_latents", "swapped"):
                assert scores[control] == 1, control
            for control in ("other_source", "shuffled", "source", "flux_alone", "probe_other_source"):
                assert scores[control] == 0, control
    chosen = found.samples["heldout"]
    by_key = {f"heldout{number:05d}": edit for number, edit in enumerate(parts["heldout"])}
    for category in ("recolour", "remove"):
        shown = [
            len({*edit.target.objects} & {*edit.source.objects}) / len(edit.target.objects)
            for edit in (by_key[sample.key] for sample in chosen if sample.scene.category == category)
        ]
        assert found.scenes["heldout"]["source"][category]["objects"] == pytest.approx(np.mean(shown))
