"""Evaluation: metrics against explicit formulas, choice of samples, controls, output files."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import run_folders
from bifrost.data import DataError, write_shard
from bifrost.data.shards import open_dataset
from bifrost.data.transforms import decode_image
from bifrost.kernels import PrefixLayout
from bifrost.recipes import load_recipe
from bifrost.trainer.cli import main
from bifrost.trainer.errors import RunError
from bifrost.trainer.evaluation.evaluate import evaluate
from bifrost.trainer.evaluation.image_metrics import (
    LARGEST_PSNR,
    NearestPixels,
    centred_cosine,
    frechet,
    psnr,
    recall,
    ssim,
)
from bifrost.trainer.evaluation.samples import SampleSet
from bifrost.trainer.inference.generator import Generator
from bifrost.trainer.inference.settings import Sampling, Settings
from bifrost.trainer.models.masking import draw_masks
from bifrost.trainer.monitors.metrics import read_metrics

FAST = Settings(steps=2, flux=Sampling(steps=1))
QUICK = ("--steps=2", "--flux-steps=1", "--samples=4")
CONTROLS = ["full", "ground_truth", "latents_alone", "no_controlnet", "empty_prompt", "other_latents", "random_latents"]


pytestmark = pytest.mark.usefixtures("one_thread")


def train_shards(shards: Path) -> str:
    return f"{shards}/train-{{00000..00002}}.tar"


def heldout_shards(shards: Path) -> str:
    return f"{shards}/train-00003.tar"


def noise_images(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    draws = np.random.default_rng(seed).integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    return torch.from_numpy(draws)


def test_psnr() -> None:
    one = torch.full((3, 3, 4, 4), 100, dtype=torch.uint8)
    other = one.clone()
    other[0] += 5  # mean square 25
    other[1, 0, 0, 0] = 255  # 155^2 in one of 48 numbers
    wanted = [10 * math.log10(255**2 / 25), 10 * math.log10(255**2 / (155**2 / 48)), LARGEST_PSNR]
    assert psnr(one, other).tolist() == pytest.approx(wanted)


def test_ssim() -> None:
    one, noise = noise_images(2, 13, 12).double(), noise_images(2, 13, 12, 1).double()
    other = (0.7 * one + 0.3 * noise).round()
    for image in range(2):
        values = []
        for colour in range(3):
            for top in range(13 - 10):
                for left in range(12 - 10):
                    sums = np.zeros(6)
                    for i in range(11):
                        for j in range(11):
                            weight = math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2))
                            x = float(one[image, colour, top + i, left + j])
                            y = float(other[image, colour, top + i, left + j])
                            sums += weight * np.array([1, x, y, x * x, y * y, x * y])
                    _, mx, my, xx, yy, xy = sums / sums[0]
                    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                    up = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
                    values.append(up / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2)))
        assert float(ssim(one, other)[image]) == pytest.approx(np.mean(values), abs=1e-12)
    assert ssim(one, one).tolist() == pytest.approx([1, 1])


def test_frechet() -> None:
    def cross(*sizes: float) -> torch.Tensor:
        """Points on the axes, whose covariance is diagonal: 2 a^2 / (n - 1)."""
        return torch.cat((torch.diag(torch.tensor(sizes)), -torch.diag(torch.tensor(sizes))))

    one, other, shift = (1.0, 2.0, 0.0), (3.0, 0.5, 1.0), torch.tensor([1.0, -2.0, 0.5])
    wanted = float(shift.square().sum()) + sum(
        2 / 5 * (a - b) ** 2 for a, b in zip(one, other, strict=True)
    )  # sum of (m1 - m2)^2 + (s1 - s2)^2
    assert frechet(cross(*one), cross(*other) + shift) == pytest.approx(wanted)
    # Covariances that do not commute: the root's trace by the eigenvalues of their plain product.
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, 5, generator=draw).double() @ torch.randn(5, 5, generator=draw).double() for _ in range(2))
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * root
    assert frechet(x, y) == pytest.approx(float(wanted))
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x[:, :1], y[:, :1]) == pytest.approx(
        float((x[:, 0].mean() - y[:, 0].mean()) ** 2 + (x[:, 0].std() - y[:, 0].std()) ** 2)
    )


def test_recall() -> None:
    alike = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.9, 0.5, 0.6, 0.0], [0.5, 0.5, 0.5, 0.4], [1.0, 1.0, 1.0, torch.nan]])
    own = torch.arange(4)
    assert recall(alike, own, 1) == 0.5  # the first, and the third's equals
    assert recall(alike, own, 2) == 0.5
    assert recall(alike, own, 3) == 0.75
    assert recall(alike, own.roll(-1), 1) == 0  # the last row contains a NaN
    assert recall(alike, own.roll(-1), 2) == 0.75
    gallery = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)) + 100  # a large part that all share
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    queries = 0.2 * (gallery[order] - gallery.mean(0)) + gallery.mean(0)  # near the centre, as predicted means are
    assert recall(centred_cosine(queries, gallery), order, 1) == 1
    assert recall(centred_cosine(gallery, gallery), order, 1) < 0.3


def test_nearest_pixels() -> None:
    gallery = noise_images(6, 4, 4)
    queries = gallery[[0, 3, 5]].clone()
    queries[0, 0, 0, 0] ^= 7
    queries[2] = gallery[1]
    nearest = NearestPixels(queries, [("train", 0), ("train", 3), ("train", 5)])
    nearest.add([("heldout", 0), ("heldout", 3)], gallery[[4, 3]])  # a double of the second's own
    assert not nearest.hits().any(), "their own images have not come"
    nearest.add([("train", i) for i in range(3)], gallery[:3])
    nearest.add([("train", i) for i in range(3, 6)], gallery[3:])
    assert nearest.hits().tolist() == [True, True, False]
    assert nearest.seen == 8


def test_the_choice_depends_on_seed_and_index_only(shards: Path) -> None:
    dataset = open_dataset(train_shards(shards))
    samples = SampleSet("train", dataset, 3, (28, 16))
    eight = samples.choose(8)
    assert [s.index for s in samples.choose(4)] == [s.index for s in eight[:4]]
    assert {s.index for s in eight} != {s.index for s in SampleSet("train", dataset, 4, (28, 16)).choose(8)}
    for sample in eight:
        raw = dataset.read(sample.index // 15, sample.index % 15)
        assert (raw.key, raw.caption) == (sample.key, sample.caption)
        assert np.array_equal(sample.seen, decode_image(raw.image, 28))
        assert np.array_equal(sample.original, decode_image(raw.image, 16))
    assert [len(part) for part in samples.gallery(10, 4)] == [4, 4, 2]
    assert [s.index for part in samples.gallery(8, 3) for s in part] == [s.index for s in eight]
    beyond = [eight[0].index, eight[7].index]
    assert [s.index for part in samples.gallery(2, 9, beyond) for s in part] == [eight[i].index for i in (0, 1, 7)]
    known = samples.image_hashes(2)
    assert [s.index for s in samples.choose(4, known)] == [s.index for s in eight[2:6]]


def test_unusable_samples_and_equal_captions_are_skipped(shards: Path, tmp_path: Path) -> None:
    image = open_dataset(train_shards(shards)).read(0, 0).image
    parts = [(image, b"moon"), (image, b"moon"), (image[:50], b"sun"), (image, b""), (image, b"star")]
    samples = [(f"{i}", {"png": data, "txt": text}) for i, (data, text) in enumerate(parts)]
    write_shard(tmp_path / "a.tar", samples)
    found = SampleSet("train", open_dataset(str(tmp_path / "a.tar")), 0, (28, 16))
    assert {sample.caption for sample in found.choose(2)} == {"moon", "star"}
    with pytest.raises(RunError, match=r"a\.tar: 2 readable samples with distinct captions, 3 requested"):
        found.choose(3)


@pytest.fixture(scope="module")
def evaluated(generator: Generator, shards: Path):
    data, heldout = open_dataset(train_shards(shards)), open_dataset(heldout_shards(shards))
    return evaluate(generator, data, heldout, 4, 5, FAST, gallery=40)


def test_a_flow_head_is_evaluated_on_samples_by_seed(place: Path, controlnet: Path, shards: Path) -> None:
    recipe = load_recipe("tiny-mllm", ["ema=null", "branch={head: flow, flow_head: {layers: 1, steps: 2}}"])
    flow = Generator.load(run_folders.save(place / "flow", recipe, 3), controlnet)
    data, heldout = open_dataset(train_shards(shards)), open_dataset(heldout_shards(shards))
    found = evaluate(flow, data, heldout, 4, 5, FAST, gallery=4)
    samples = found.samples["heldout"]
    seen = torch.from_numpy(np.stack([sample.seen for sample in samples])).permute(0, 3, 1, 2)
    seeds = [5 + sample.index for sample in samples]
    latents = flow.latents([sample.caption for sample in samples], seeds, Settings(steps=1))
    wanted = float((latents - flow.encode(seen)).square().mean())
    assert found.figures["heldout"]["latents"]["1.0"]["mse"] == pytest.approx(wanted, rel=1e-4)


def test_figures(evaluated, generator: Generator, shards: Path) -> None:
    assert evaluated.figures.keys() == {"train", "heldout"}
    assert evaluated.gallery == 40 + 15
    train, heldout = evaluated.figures["train"], evaluated.figures["heldout"]
    assert list(train["match"]) == [*CONTROLS, "chance"] and list(train["frechet"]) == CONTROLS
    assert list(heldout["frechet"]) == CONTROLS[:4]
    assert train["match"]["chance"] == {"r1": 0.25, "r5": 1.0}
    assert train["latents"].keys() == {"0.7", "0.8", "0.9", "1.0"}

    def encode(samples) -> torch.Tensor:
        return generator.encode(torch.from_numpy(np.stack([s.seen for s in samples])).permute(0, 3, 1, 2))

    own = encode(evaluated.samples["heldout"])
    captions = [sample.caption for sample in evaluated.samples["heldout"]]
    found = generator.latents(captions, [0] * 4, Settings(steps=1))  # all patches are hidden in the first step
    row = heldout["latents"]["1.0"]
    assert row["mse"] == pytest.approx(float((found - own).square().mean()), rel=1e-4)
    assert row["cosine"] == pytest.approx(float(torch.cosine_similarity(found, own, dim=2).mean()), abs=1e-5)
    data = open_dataset(train_shards(shards))
    every = [s for part in SampleSet("train", data, 5, (112, 64)).gallery(40, 40) for s in part]
    assert row["mean_mse"] == pytest.approx(float((encode(every).mean(0) - own).square().mean()), rel=1e-4)
    errors, averages = [], []
    for sample, latents, caption in zip(evaluated.samples["heldout"], own, captions, strict=True):
        place = np.array([sample.index])
        mask = torch.from_numpy(draw_masks(5, place * 0 - 1, place, np.array([12]), 16))  # 70 % of 16, rounded up
        input_ids, lengths = generator.template.batch([caption])
        prefix = generator.mllm.backbone.prefix(input_ids, PrefixLayout.of(lengths, 16))
        with torch.no_grad():
            found = generator.mllm.head(generator.mllm.branch(latents[None], mask, prefix))[0]
        errors.append((found - latents)[mask[0]].square().mean())
        averages.append((encode(every).mean(0) - latents)[mask[0]].square().mean())
    row = heldout["latents"]["0.7"]
    assert row["mse"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)
    assert row["mean_mse"] == pytest.approx(float(torch.stack(averages).mean()), rel=1e-4)


def test_stage_2_alone_is_measured_as_with_stage_1(evaluated, controlnet: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bifrost(
        "--controlnet",
        controlnet,
        "--data",
        train_shards(shards),
        "--heldout",
        heldout_shards(shards),
        *QUICK,
        "--seed",
        5,
        "--batch",
        3,
        "--out",
        out,
    )
    record = json.loads((out / "metrics.json").read_text())
    assert "mllm" not in record and record["controlnet"] == f"{controlnet.resolve()} step 7"
    for name, whole in evaluated.figures.items():
        alone = record["figures"][name]
        assert alone.keys() == {"reconstruction"} and len(alone["reconstruction"]) == 8
        for metric, value in alone["reconstruction"].items():
            assert value == pytest.approx(whole["reconstruction"][metric], rel=1e-3), metric
        assert record["data"][name]["keys"] == [sample.key for sample in evaluated.samples[name]]
    text = (out / "table.txt").read_text()
    assert "held-out captions: 4" in text and "R@1" not in text
    assert f"{record['figures']['train']['reconstruction']['vae_psnr']:.2f} dB" in text
    width, height = Image.open(out / "contact_sheet.png").size
    assert 8 * 128 < width < 8 * 128 + 200 and 4 * 128 < height < 4 * 128 + 150


def test_stage_2_alone_needs_a_run(controlnet: Path, shards: Path, tmp_path: Path) -> None:
    usual = ("--data", train_shards(shards), "--out", tmp_path / "out")
    for given in (
        (),
        ("--controlnet", controlnet, "--gallery", 9),
        ("--controlnet", controlnet, "--scenes", "KEY.json"),
    ):
        with pytest.raises(RunError, match=r"^without --mllm RUN only reconstructions are measured"):
            bifrost(*usual, *given)
    exported = tmp_path / "flux_controlnet"
    exported.mkdir()
    with pytest.raises(RunError, match="only a run names the vision encoder of its latents; give --mllm RUN, too"):
        bifrost(*usual, "--controlnet", exported)
    assert not (tmp_path / "out").exists()


def test_same_seed_same_figures_in_any_batch(evaluated, generator: Generator, shards: Path) -> None:
    data, heldout = open_dataset(train_shards(shards)), open_dataset(heldout_shards(shards))
    again = evaluate(generator, data, heldout, 4, 5, FAST, batch=3, gallery=40)
    flat, other = (numbers(found.figures) for found in (evaluated, again))
    assert flat.keys() == other.keys() and len(flat) > 50
    for name, value in flat.items():
        assert other[name] == pytest.approx(value, rel=1e-2, abs=1e-3), name


def numbers(figures: dict, prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in figures.items():
        flat.update(numbers(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


class Perfect(Generator):
    """Return the image encoded by the latents, or for unknown latents that of the caption."""

    originals: dict[str, np.ndarray]
    known: dict[str, torch.Tensor]

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings = FAST,
        latents: torch.Tensor | None = None,
        batch: int = 8,
        made: Callable[[int], None] = lambda count: None,
    ) -> list[Image.Image]:
        images = []
        for number, prompt in enumerate(prompts):
            for caption, known in self.known.items():
                if latents is not None and torch.allclose(latents[number], known, atol=1e-4):
                    prompt = caption
            images.append(Image.fromarray(self.originals[prompt]))
        return images


def test_a_perfect_generator_scores_full_marks(generator: Generator, shards: Path) -> None:
    perfect = Perfect(**{field.name: getattr(generator, field.name) for field in fields(Generator)})
    data = open_dataset(train_shards(shards))
    chosen = SampleSet("train", data, 0, (112, 64)).choose(6)
    perfect.originals = {sample.caption: sample.original for sample in chosen}
    seen = torch.from_numpy(np.stack([sample.seen for sample in chosen])).permute(0, 3, 1, 2)
    perfect.known = dict(zip(perfect.originals, perfect.encode(seen), strict=True))
    figures = evaluate(perfect, data, None, 6, 0, FAST).figures["train"]
    for kind in set(CONTROLS) - {"other_latents"}:
        assert figures["match"][kind] == {"r1": 1.0, "r5": 1.0}, kind
    other = figures["match"]["other_latents"]
    assert (other["r1"], other["other_r1"], other["other_r5"]) == (0.0, 1.0, 1.0)
    assert all(value == pytest.approx(0, abs=1e-6) for value in figures["frechet"].values())
    found = figures["reconstruction"]
    assert (
        found["psnr"] == LARGEST_PSNR
        and found["ssim"] == pytest.approx(1)
        and found["r1"] == found["latents_alone_r1"] == 1
    )
    assert found["no_controlnet_psnr"] == LARGEST_PSNR
    assert found["vae_psnr"] < 30, "that VAE is random"


def bifrost(*arguments: object) -> None:
    """Run the command in this process."""
    code = main.app(["eval", *map(str, arguments)], standalone_mode=False)
    assert not code


def test_the_command(mllm: Path, controlnet: Path, shards: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    (mllm / "metrics.jsonl").touch()  # it is a run, the other one an export
    usual = ("--mllm", mllm, "--controlnet", controlnet, "--data", train_shards(shards), *QUICK)
    bifrost(*usual, "--heldout", heldout_shards(shards), "--out", out, "--seed", 9)
    shown = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["contact_sheet.png", "metrics.json", "table.txt"]
    first = (out / "metrics.json").read_bytes()
    record = json.loads(first)
    text = (out / "table.txt").read_text()
    assert text in shown and "held-out captions: 4" in text and "another image's latents" in text
    assert f"{record['figures']['train']['reconstruction']['psnr']:.2f} dB" in text
    assert record["settings"]["flux"]["steps"] == 1 and record["mllm"] == f"{mllm.resolve()} step 7"
    assert (record["seed"], record["samples"], record["gallery"]) == (9, 4, 60)
    index = [int(key.removeprefix("pattern-")) for key in record["data"]["train"]["keys"]]
    assert record["data"]["train"]["image_seeds"] == [9 + number for number in index]
    (noted,) = read_metrics(mllm / "evaluations.jsonl")
    assert (noted["event"], noted["step"]) == ("eval", 7)
    assert noted["heldout/match/full/r1"] == record["figures"]["heldout"]["match"]["full"]["r1"]
    assert not (controlnet / "evaluations.jsonl").exists()
    width, height = Image.open(out / "contact_sheet.png").size
    assert 8 * 128 < width < 8 * 128 + 200 and 5 * 128 < height < 5 * 128 + 150
    bifrost(*usual, "--heldout", heldout_shards(shards), "--out", out, "--seed", 9)
    assert (out / "metrics.json").read_bytes() == first
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (mllm / name).unlink()


def test_wrong_inputs_are_one_line_and_leave_nothing(mllm: Path, controlnet: Path, shards: Path, tmp_path: Path):
    out = tmp_path / "out"
    usual = {"mllm": mllm, "controlnet": controlnet, "data": train_shards(shards), "out": out}

    def refused(message: str, *arguments: str, **changes: object) -> None:
        options = [f"--{name}={value}" for name, value in {**usual, **changes}.items()]
        with pytest.raises((RunError, DataError)) as error:
            bifrost(*options, *QUICK, *arguments)
        assert message in str(error.value) and "\n" not in str(error.value), error.value
        assert not out.exists()

    missing = tmp_path / "missing"
    refused("missing: no such run folder", mllm=missing)
    refused("missing: no such run folder", controlnet=missing)
    refused("is a controlnet run, expected a patch-latents run", mllm=controlnet)
    refused("no such shard", data=f"{missing}.tar")
    refused("no .tar matches", data=f"{missing}/*.tar")
    refused("no .tar matches", heldout=f"{missing}/*.tar")
    refused("45 readable samples with distinct captions, 46 requested", "--samples=46")
    refused("0 readable samples with distinct captions (15 others share", heldout=f"{shards}/train-00001.tar")
    refused("17 decoding steps for 16 patches: set 1 to 16", "--steps=17")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    refused(r"taken: is not empty (thesis.txt)", out=taken)
    refused("thesis.txt: is not a folder", out=taken / "thesis.txt")
