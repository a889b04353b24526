"""The held-out loss: equal to plain PyTorch on any number of ranks, it leaves training alone, keeps the best checkpoint
and ends a run that no longer improves."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import ranked
import runs
import tiny_flux
from bifrost.data import open_dataset
from bifrost.data.transforms import decode_image
from bifrost.kernels import PrefixLayout
from bifrost.recipes import load_recipe
from bifrost.trainer.checkpoint.reader import CheckpointReader
from bifrost.trainer.checkpoint.state import CheckpointWeights, restore_statistics
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.models.draws import gaussian
from bifrost.trainer.models.masking import draw_orders
from bifrost.trainer.models.rng import Stream, uniform
from bifrost.trainer.models.weights import fill
from bifrost.trainer.optim.train_state import TrainState
from bifrost.trainer.stages import open_stage

pytestmark = [pytest.mark.multi, pytest.mark.slow]
SAMPLES = 21  # no multiple of anything


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return tiny_flux.save(tiny_flux.pipeline(), tmp_path_factory.mktemp("flux"))


def split(shards: Path) -> tuple[str, str]:
    return f"data.shards={shards}/train-0000[01].tar", f"validation.shards={shards}/train-0000[23].tar"


def arguments(shards: Path, runs_dir: Path, *settings: str, recipe: str = "tiny-mllm") -> list[str]:
    training, held_out = split(shards)
    given = (training, held_out, "validation.every=2", f"validation.samples={SAMPLES}", "steps=5", *settings)
    return runs.arguments(shards, runs_dir, *given, recipe=recipe)


def train(ranks: int, given: list[str]) -> Path:
    ended = ranked.bifrost(ranks, *given)
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return Path(next(each for each in given if each.startswith("runs_dir=")).partition("=")[2]) / given[1]


def validations(run: Path) -> dict[int, dict[str, float]]:
    return {
        line["step"]: {name: value for name, value in line.items() if name.startswith("val_")}
        for line in runs.steps(run)
        if "val_loss" in line
    }


def held_out(given: list[str]):
    """(number, image [S, S, 3], caption) of every validation sample, and the recipe's stage and built model."""
    recipe = load_recipe(given[1], given[2:])
    stage = open_stage(recipe)
    data = open_dataset(recipe.validation.shards)
    sizes = data.samples_per_shard.tolist()
    for number in range(SAMPLES):
        shard, sample = 0, number * len(data) // SAMPLES
        while sample >= sizes[shard]:
            sample, shard = sample - sizes[shard], shard + 1
        raw = data.read(shard, sample)
        yield number, [decode_image(raw.image, side) for side in stage.image_sizes], raw.caption


def loaded(given: list[str], run: Path, slot: str):
    """The stage and its model without ZeRO, with the weights of the run's last checkpoint."""
    stage = open_stage(load_recipe(given[1], given[2:]))
    model = stage.build()
    stage.load(model)
    reader = CheckpointReader(Store(run / "checkpoints").folder(5))
    fill(model.trainable(), CheckpointWeights(reader, slot), run)
    restore_statistics(model.statistics(), reader, slot)
    return stage, model.eval()


@torch.no_grad()
def plain_patch_latents(given: list[str], run: Path, slot: str) -> list[float]:
    stage, model = loaded(given, run, slot)
    rate, tokens = stage.branch.mask_rate, stage.tokens_per_image
    levels = [rate.low + (rate.high - rate.low) * k / 3 for k in range(4)]
    squares, patches = np.zeros(4), np.zeros(4)
    collate = stage.collate(open_dataset(load_recipe(given[1], given[2:]).data.shards))
    for number, (image,), caption in held_out(given):
        ids, lengths = collate.template.batch([caption])
        masked = math.ceil(levels[number % 4] * tokens - 1e-9)
        order = draw_orders(0, np.array([0]), np.array([number]), tokens)[0]
        mask = torch.zeros(1, tokens, dtype=torch.bool)
        mask[0, order[:masked]] = True
        latents = model.backbone.patch_latents(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
        prefix = model.backbone.prefix(ids, PrefixLayout.of(lengths, tokens, ids.device))
        predicted = model.head(model.branch(latents, mask, prefix))
        error = (predicted - latents).double().square().mean(-1)[mask]
        squares[number % 4] += error.sum().item()
        patches[number % 4] += masked
    return (squares / patches).tolist()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_stage_1_equals_plain_pytorch(shards: Path, tmp_path: Path, ranks: int) -> None:
    given = arguments(shards, tmp_path, "ema.decay=0.9")
    run = train(ranks, given)
    found = validations(run)
    assert list(found) == [2, 4, 5]
    for slot, name in (("master", "val_loss"), ("ema", "val_loss_ema")):
        wanted = plain_patch_latents(given, run, slot)
        assert found[5][name] == pytest.approx(np.mean(wanted), rel=1e-5)
    levels = [value for name, value in found[5].items() if name.startswith("val_loss_mask_")]
    np.testing.assert_allclose(levels, plain_patch_latents(given, run, "master"), rtol=1e-5)


@torch.no_grad()
def plain_controlnet(given: list[str], run: Path, slot: str) -> list[float]:
    stage, model = loaded(given, run, slot)
    channels, height, width = stage.latents
    squares: list[list[float]] = [[] for _ in range(8)]
    for number, images, caption in held_out(given):

        def normal(stream: Stream, *shape: int, number: int = number) -> torch.Tensor:
            draws = uniform(0, stream, np.array([0]), np.array([number]), math.prod(shape))
            return gaussian(torch.from_numpy(draws)).view(1, *shape)

        pixels = [torch.from_numpy(image.copy()).permute(2, 0, 1)[None] for image in images]
        losses = model(
            images=pixels[0],
            flux_images=pixels[1],
            posterior=normal(Stream.POSTERIOR, channels, height, width),
            noise=normal(Stream.NOISE, height * width // 4, 4 * channels),
            # Index 937, 812, ... of the thousand noise levels: 0.063, 0.188, ...
            level=torch.logit(torch.tensor([1 - (number % 8 + 0.5) / 8])),
            normalizer=float(channels * height * width),
            **stage.folder.tokenizers([caption])._asdict(),
        )
        squares[number % 8].append(losses.loss.item())
    return [float(np.mean(each)) for each in squares]


@pytest.mark.parametrize("ranks", [1, 2])
def test_stage_2_equals_plain_pytorch(shards: Path, flux: Path, tmp_path: Path, ranks: int) -> None:
    settings = (f"flux.path={flux}", f"micro_batch={8 // ranks}", "ema.decay=0.9", "optimizer.lr=3e-3")
    given = arguments(shards, tmp_path, *settings, recipe="tiny-controlnet")
    run = train(ranks, given)
    found = validations(run)[5]
    for slot, name in (("master", "val_loss"), ("ema", "val_loss_ema")):
        assert found[name] == pytest.approx(np.mean(plain_controlnet(given, run, slot)), rel=1e-5)
    assert found["val_loss"] != pytest.approx(found["val_loss_ema"], rel=1e-5)
    levels = [value for name, value in found.items() if name.startswith("val_loss_noise_")]
    np.testing.assert_allclose(levels, plain_controlnet(given, run, "master"), rtol=1e-5)


def content(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((run / "checkpoints/step-00000005").glob("*.safetensors"))}


@pytest.mark.parametrize("recipe", ["tiny-mllm", "tiny-controlnet"])
def test_training_is_undisturbed_to_the_bit(shards: Path, flux: Path, tmp_path: Path, recipe: str) -> None:
    settings = ["precision=bf16", "ema.decay=0.9", *([f"flux.path={flux}"] if recipe == "tiny-controlnet" else [])]
    seen = train(2, arguments(shards, tmp_path / "seen", *settings, recipe=recipe))
    calm = train(2, arguments(shards, tmp_path / "calm", *settings, "validation.shards=null", recipe=recipe))
    assert validations(seen) and not validations(calm)
    assert runs.losses(seen) == runs.losses(calm)
    assert content(seen) == content(calm)


def test_the_best_checkpoint_stays_and_the_run_ends_early(shards: Path, tmp_path: Path) -> None:
    """With a learning rate that ruins the weights after two warm-up steps. Killed once: nothing changes."""
    settings = (
        *("optimizer.lr=0.3", "optimizer.warmup_steps=4", "optimizer.clip=1e9", "health.spike_zscore=null", "steps=40"),
        *("checkpoint.keep_best=true", "checkpoint.keep=1", "checkpoint.every=3", "validation.every=1"),
        *("validation.patience=6", *runs.TINY),
    )
    given = arguments(shards, tmp_path / "whole", *settings)
    whole = train(1, given)
    losses = {step: found["val_loss"] for step, found in validations(whole).items()}
    best = min(losses, key=losses.__getitem__)
    last = max(losses)
    assert last == best + 6 < 40, losses
    assert Store(whole / "checkpoints").steps() == [best, last]
    assert CheckpointReader(Store(whole / "checkpoints").folder(last)).state["progress"]["best_step"] == best
    assert train(1, given) == whole and max(validations(whole)) == last, "a run that ended early is left alone"

    killed = tmp_path / "killed/tiny-mllm"
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / f"checkpoints/step-{last:08d}")  # as a SIGKILL between the two saves leaves it
    train(1, arguments(shards, tmp_path / "killed", *settings))
    assert Store(killed / "checkpoints").steps() == [best, last]
    assert {step: found["val_loss"] for step, found in validations(killed).items()} == losses


def train_until_a_stop(given: list[str]) -> None:
    """Train; the job is asked to stop while the second step is computed."""
    from bifrost.trainer.optim import engine

    advance, steps = engine.Engine.step, []

    def signalled(self, lr, skip):
        steps.append(lr)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self, lr, skip)

    engine.Engine.step = signalled
    ranked.command(given)


def test_a_stop_is_not_delayed_by_a_validation(shards: Path, tmp_path: Path) -> None:
    (ended,) = ranked.run(train_until_a_stop, 1, arguments(shards, tmp_path, "validation.every=1"))
    assert ended.code == 75, ended.err
    run = tmp_path / "tiny-mllm"
    stopped = Store(run / "checkpoints").steps()[-1]
    assert list(validations(run)) == list(range(1, stopped)), "the step that stopped saved at once"


def test_the_documented_keys_are_those_of_a_validation(shards: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    table = text.split("With [validation](#validation)")[1].split("Stage 2 has")[0]
    documented = re.findall(r"`(val[\w.]+)`(?:, …)? \|", table)
    run = train(1, arguments(shards, tmp_path, "steps=2", "ema.decay=0.9"))
    (line,) = [line for line in runs.steps(run) if "val_loss" in line]
    found = {re.sub(r"(mask|noise)_[\d.]+", r"\1", key) for key in line if key.startswith("val")}
    wanted = {re.sub(r"(mask|noise)_[\d.]+", r"\1", key) for key in documented}
    assert found == wanted - {"val_loss_noise"}


def test_only_a_finite_loss_is_the_best() -> None:
    progress = TrainState()
    for step, loss in enumerate((math.nan, 3.0, math.inf, 2.0, 2.0, 2.5), start=1):
        progress.step = step
        progress.validated(loss)
    assert (progress.best_loss, progress.best_step, progress.validations_since_best) == (2.0, 4, 2)
    assert json.loads(json.dumps(vars(progress)))["best_loss"] == 2.0


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("validation.shards={shards}/train-00000.tar", "is training data"),
        ("validation.shards={shards}/none-*.tar", "none-"),
        ("validation.samples=3", "3 samples for 4 levels"),
        ("validation.shards=null checkpoint.keep_best=true", "checkpoint.keep_best needs validation.shards"),
        ("validation.shards=null validation.patience=2", "validation.patience needs validation.shards"),
    ],
)
def test_settings_that_cannot_work(shards: Path, tmp_path: Path, setting: str, reason: str) -> None:
    (ended,) = ranked.bifrost(1, *arguments(shards, tmp_path, *setting.format(shards=shards).split()))
    assert ended.code == 2
    assert reason in ended.err and len(ended.err.splitlines()) == 1, ended.err
