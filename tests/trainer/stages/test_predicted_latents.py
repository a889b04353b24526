"""Patch latents that stage 1 predicts: what the cache holds, when it is refused, and which samples it conditions."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import opened
import plain
import run_folders
import runs
import tiny_flux
from bifrost.data import DataError, ReadableSamples, open_dataset
from bifrost.kernels import PrefixLayout
from bifrost.recipes import Recipe, load_recipe
from bifrost.recipes.load import RecipeError
from bifrost.trainer.checkpoint.export import export
from bifrost.trainer.checkpoint.shard import Payload
from bifrost.trainer.checkpoint.state import CheckpointWeights
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.errors import RunError
from bifrost.trainer.inference.masked_decoding import draw_orders
from bifrost.trainer.inference.mllm import load_mllm
from bifrost.trainer.inference.predicted_latents import order_seed
from bifrost.trainer.models.rng import Stream, uniform
from bifrost.trainer.models.weights import fill
from bifrost.trainer.planner import caches, parts
from bifrost.trainer.stages import open_patch_latents, open_stage
from bifrost.trainer.stages.precompute import encode
from bifrost.trainer.training.run_context import open_run_stage

PREDICTED, MIX = "controlnet.latents=predicted", "controlnet.latents=mix"
VISION = "flux.placement.vision_encoder=cached"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("predicted")


@pytest.fixture(scope="module")
def flux(place: Path) -> Path:
    return tiny_flux.save(tiny_flux.pipeline(), place / "flux")


@pytest.fixture(scope="module")
def mllm(place: Path) -> Path:
    recipe = load_recipe("tiny-mllm", ["branch.positions=learned"])
    return run_folders.save(place / "mllm", recipe, 1, ("master", "ema"))


@pytest.fixture
def data(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "data"))


@pytest.fixture
def make(data: Path, flux: Path, mllm: Path) -> Any:
    """Makes a recipe of stage 2 with settings; `controlnet.mllm` is the run of `mllm` unless another is given."""

    def recipe(*settings: str) -> Recipe:
        whole = (*runs.TINY, f"flux.path={flux}", "micro_batch=4", "steps=2", f"controlnet.mllm={mllm}", *settings)
        return load_recipe("tiny-controlnet", runs.arguments(data, data.parent, *whole, recipe="tiny-controlnet")[2:])

    return recipe


def encoded(recipe: Recipe) -> None:
    encode(open_run_stage(recipe).outputs(), recipe.data, recipe.validation.shards, recipe.micro_batch)


def latents(recipe: Recipe, kind: str, *keys: tuple[int, int, str]) -> torch.Tensor:
    cache = open_run_stage(recipe).open_caches()[kind]
    return torch.stack([cache.read((shard, number), key)["latents"] for shard, number, key in keys])


SOME = [(shard, number, f"pattern-{15 * shard + number:03}") for shard in (0, 2) for number in (0, 7, 14)]


def test_they_are_those_of_a_plain_loop_whatever_the_batch(make, mllm: Path, data: Path) -> None:
    """One patch per step, predicted by the EMA weights from full forward passes of one sample at a time."""
    encoded(make(PREDICTED))
    found = latents(make(PREDICTED), "predicted", *SOME)
    stage: Any = open_stage(load_recipe(mllm / "recipe.yaml", stored=True))
    model = stage.build()
    stage.load(model)
    reader = Store(mllm / "checkpoints").newest_verified()
    assert reader is not None
    fill(model.trainable(), CheckpointWeights(reader, "ema"), mllm)
    inputs = opened.inputs(make())
    for (shard, number, key), cached in zip(SOME, found, strict=True):
        tokens, lengths = stage.collate(inputs.dataset).template.batch([inputs.dataset.read(shard, number).caption])
        with torch.no_grad():
            prefix = model.backbone.prefix(tokens, PrefixLayout.of(lengths, 16, torch.device("cpu")))
            wanted, mask = torch.zeros(1, 16, cached.shape[1]), torch.ones(1, 16, dtype=torch.bool)
            for patch in draw_orders([order_seed(0, key)], 16)[0].tolist():
                wanted[0, patch] = model.head(model.branch(wanted, mask, prefix))[0, patch]
                mask[0, patch] = False
        torch.testing.assert_close(cached, wanted[0], rtol=1e-4, atol=1e-5)
    shutil.rmtree(next(data.glob("cache-predicted-*")))
    encoded(make(PREDICTED, "micro_batch=1"))
    again = latents(make(PREDICTED), "predicted", *SOME)
    torch.testing.assert_close(again, found, rtol=0, atol=5e-4, msg="rounding, over 16 steps")
    assert len({order_seed(seed, key) for seed in (0, 1) for _, _, key in SOME}) == 2 * len(SOME)


def hidden_of_all_masked(model: Any, inputs: Any, shard: Any, number: int, width: int) -> torch.Tensor:
    """The branch's states [1, 16, width] of a caption alone."""
    tokens, lengths = inputs.stage.predictor.template.batch([inputs.dataset.read(shard, number).caption])
    prefix = model.backbone.prefix(tokens, PrefixLayout.of(lengths, 16, torch.device("cpu")))
    return model.branch(torch.zeros(1, 16, width), torch.ones(1, 16, dtype=torch.bool), prefix)


def test_those_of_a_flow_head_are_samples_by_key(make, place: Path, data: Path) -> None:
    """Against a plain loop over its latents' noise, with the statistics of the run; others are other weights."""
    recipe = load_recipe("tiny-mllm", ["ema=null", "branch={head: flow, flow_head: {layers: 1, steps: 2}}"])
    run = run_folders.save(place / "flow", recipe, 3)
    flow = make(PREDICTED, f"controlnet.mllm={run}", "controlnet.decode_steps=1")
    encoded(flow)
    found = latents(flow, "predicted", *SOME)
    model: Any = load_mllm(run, open_patch_latents(recipe), torch.device("cpu"), torch.float32)
    inputs = opened.inputs(flow)
    assert inputs.stage.predictor is not None
    for (shard, number, key), cached in zip(SOME, found, strict=True):
        seed, width = np.array([order_seed(0, key)]), cached.shape[1]
        uniform_draws = torch.from_numpy(uniform(0, Stream.LATENT_NOISE, np.array([-1]), seed, 16 * width))
        noise = torch.special.ndtri(uniform_draws).float().view(16, width)
        with torch.no_grad():
            hidden = hidden_of_all_masked(model, inputs, shard, number, width)
            torch.testing.assert_close(cached, model.head.sample(hidden, noise), rtol=1e-4, atol=1e-4)
    store = Store(run / "checkpoints")
    reader = store.newest_verified()
    assert reader is not None
    tensors = {slot: {n: reader.full(slot, n).flatten() for n in reader.shapes} for slot in reader.slots}
    statistics = {name: buffer + 1 for name, buffer in reader.buffers().items()}
    store.save(8, Payload(0, 1, tensors, reader.shapes, reader.state, statistics))
    assert "made with another stage-1 weights" in refusal(flow)


def test_those_of_low_rank_pairs_depend_on_their_scale(make, place: Path) -> None:
    recipe = load_recipe("tiny-mllm", ["ema=null", "branch={weights: lora, layers: 3, lora: {rank: 2, alpha: 3.0}}"])
    run = run_folders.save(place / "pairs", recipe, 4)
    pairs = make(PREDICTED, f"controlnet.mllm={run}", "controlnet.decode_steps=1")
    encoded(pairs)
    found = latents(pairs, "predicted", *SOME)
    model: Any = load_mllm(run, open_patch_latents(recipe), torch.device("cpu"), torch.float32)
    inputs = opened.inputs(pairs)
    assert inputs.stage.predictor is not None
    for (shard, number, _), cached in zip(SOME, found, strict=True):
        with torch.no_grad():
            hidden = hidden_of_all_masked(model, inputs, shard, number, cached.shape[1])
            torch.testing.assert_close(cached, model.head(hidden)[0], rtol=1e-4, atol=1e-5)
    stored = yaml.safe_load((run / "recipe.yaml").read_text())
    stored["branch"]["lora"]["alpha"] = 6.0
    (run / "recipe.yaml").write_text(yaml.safe_dump(stored))
    assert "branch.lora.alpha 3.0, here 6.0" in refusal(pairs)


def refusal(recipe: Recipe) -> str:
    with pytest.raises((RunError, DataError)) as error:
        open_run_stage(recipe).open_caches()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_checkpoint_or_setting_is_refused(make, mllm: Path, tmp_path: Path) -> None:
    line = refusal(make(PREDICTED))
    assert line.startswith("controlnet.latents=predicted: ") and line.endswith(
        "run `bifrost data encode` with this recipe"
    )
    encoded(make(PREDICTED))
    assert open_run_stage(make(MIX)).open_caches().keys() == {"predicted"}, "the same cache"
    assert "controlnet.decode_steps 16, here 4" in refusal(make(PREDICTED, "controlnet.decode_steps=4"))
    assert "seed 0, here 1" in refusal(make(PREDICTED, "seed=1"))
    assert "precision fp32, here bf16" in refusal(make(PREDICTED, "precision=bf16"))

    run = Path(shutil.copytree(mllm, tmp_path / "mllm"))
    same = make(PREDICTED, f"controlnet.mllm={run}")
    assert open_run_stage(same).open_caches(), "a run may be moved"
    single = f"controlnet.mllm={run}/checkpoints/step-00000007"
    assert open_run_stage(make(PREDICTED, single)).open_caches(), "the newest checkpoint by its own path"
    before = open_run_stage(same).predicting()
    before = {files.content_hash(names) for files, names in before}
    recipe = load_recipe(run / "recipe.yaml", stored=True)
    other = run_folders.save(tmp_path / "other", recipe, 2, ("master", "ema"))
    later = Store(run / "checkpoints").folder(9)
    shutil.copytree(Store(other / "checkpoints").folder(7), later)
    assert open_run_stage(same).open_caches(), "step 9 does not verify: step 7 is used"
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    line = refusal(same)
    assert "cache-predicted-" in line and "made with another stage-1 weights" in line
    after = {files.content_hash(names) for files, names in open_run_stage(same).predicting()}
    assert len(before ^ after) == 2, "a run does not resume with them either"


def test_a_checkpoint_saved_meanwhile_is_not_used(make, mllm: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(mllm, tmp_path / "mllm"))
    encoded(make(PREDICTED))
    wanted = latents(make(PREDICTED), "predicted", *SOME)
    (outputs,) = open_run_stage(make(PREDICTED, f"controlnet.mllm={run}")).outputs()
    outputs.fingerprint()
    store = Store(run / "checkpoints")
    reader = store.newest_verified()
    assert reader is not None
    tensors = {s: {n: reader.full(s, n).flatten() + 1 for n in reader.shapes} for s in reader.slots}
    store.save(8, Payload(0, 1, tensors, reader.shapes, reader.state, {}))
    samples = [open_dataset(make().data.shards).read(shard, number) for shard, number, _ in SOME]
    found = outputs.encode([outputs.read(sample) for sample in samples], torch.device("cpu"))
    assert len(found) == len(SOME)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one["latents"], other, rtol=0, atol=5e-4)


def test_exports_predict_too(make, mllm: Path, tmp_path: Path) -> None:
    encoded(make(PREDICTED, "micro_batch=8"))
    wanted = latents(make(PREDICTED), "predicted", *SOME)
    for layout in ("public", "hf"):
        export(mllm, tmp_path / layout, layout, dtype=torch.float32, ema=True)  # type: ignore[arg-type]
        recipe = make(PREDICTED, f"controlnet.mllm={tmp_path / layout}", "micro_batch=8")
        assert "made with another stage-1 weights" in refusal(recipe)
        encoded(recipe)
        assert torch.equal(latents(recipe, "predicted", *SOME), wanted)


def test_wrong_inputs_are_one_line(make, mllm: Path, tmp_path: Path) -> None:
    assert "controlnet.mllm=nowhere: nowhere: no such run folder" in refusal(make(PREDICTED, "controlnet.mllm=nowhere"))
    controlnet = run_folders.save(tmp_path / "controlnet", make(), 3)
    line = refusal(make(PREDICTED, f"controlnet.mllm={controlnet}"))
    assert "is a controlnet run, expected a patch-latents run" in line
    line = refusal(make(PREDICTED, "controlnet.decode_steps=17"))
    assert line == "controlnet.decode_steps: 17 decoding steps for 16 patches: set 1 to 16"
    line = refusal(make(PREDICTED, "data.image_size=224", "flux.image_size=128"))
    assert "predicts 16 patch latents of width 192, and this recipe's" in line and "have 64 of width 192" in line
    pairs = "data.sources=[{name: edits, shards: edits/*.tar, weight: 1, task: editing}]"
    editor = run_folders.save(tmp_path / "editor", load_recipe("tiny-mllm", ["data.shards=null", pairs]), 1)
    line = refusal(make(PREDICTED, f"controlnet.mllm={editor}"))
    assert line.startswith(f"controlnet.mllm={editor}: was trained on editing pairs alone, and latents are predicted")
    with pytest.raises(RecipeError, match=r"controlnet\.latents=mix needs controlnet\.mllm, the stage-1 run"):
        make(MIX, "controlnet.mllm=null")
    with pytest.raises(RecipeError, match=r"controlnet\.latents: input should be 'true', 'predicted' or 'mix'"):
        make("controlnet.latents=false")
    assert make("controlnet.latents=true").controlnet.latents == "true", "YAML reads a boolean"
    with pytest.raises(RecipeError, match=r"controlnet\.latents has no effect in stage patch-latents"):
        load_recipe("tiny-mllm", [PREDICTED])


def test_predicted_latents_need_no_vision_encoder(make) -> None:
    recipe = make(PREDICTED, "flux.placement.vae=cached", "flux.placement.text=cached", VISION)
    stage: Any = open_run_stage(recipe)
    assert [one.kind for one in stage.outputs()] == ["vae", "text", "predicted"], "true latents are not even encoded"
    with torch.device("meta"):
        model = stage.build()
    assert not any(name.startswith("backbone") for name, _ in model.named_modules())
    assert open_run_stage(make(PREDICTED, "previews.every=1")).vision_placement == "offloaded", "only for previews"
    assert [part.place for part in parts(make(PREDICTED)) if part.name == "vision encoder"] == ["cached"]
    assert [part.place for part in parts(make(MIX)) if part.name == "vision encoder"] == ["replicated"]
    for settings in ((PREDICTED, VISION), (MIX, VISION, "flux.placement.vae=cached"), ("flux.placement.text=cached",)):
        outputs = open_run_stage(make(*settings)).outputs()
        assert caches(make(*settings)) == {one.kind: one.sample_bytes for one in outputs}
    assert caches(load_recipe("tiny-mllm", ["backbone.vision_encoder=cached"])) == {"vision": 16 * 192 * 2}


def drawn(recipe: Recipe, items: int = 16) -> tuple[Any, list[Any]]:
    """The collate function of a recipe, and items of epochs 0 and 1."""
    inputs = opened.inputs(recipe)
    readable = ReadableSamples(inputs.dataset, inputs.stage.image_sizes)
    found = [readable.read(n % 2, *inputs.dataset.place(n // 2), n // 2, []) for n in range(items)]
    return inputs.stage.collate(inputs.dataset), found


def test_mix_draws_per_sample_and_epoch(make) -> None:
    encoded(make(MIX, VISION))
    collate, items = drawn(make(MIX))
    together = collate(items)
    flags = together["predicted"].tolist()
    assert 2 < sum(flags) < 14 and flags[::2] != flags[1::2], "another draw in another epoch"
    assert [collate([item])["predicted"].item() for item in items] == flags, "whatever the batch, hence the rank, is"
    for share, number in ((0.0, 0), (0.25, 4), (0.75, 12)):
        few = drawn(make(MIX, f"controlnet.predicted_share={share}"))[0](items)["predicted"].sum().item()
        assert abs(few - number) <= (4 if share else 0)
    every = drawn(make(MIX, "controlnet.predicted_share=1"))[0](items)
    assert "images" not in every and torch.equal(every["latents"], together["latents"])

    cached = drawn(make(MIX, VISION))[0](items)
    true = drawn(make(VISION))[0](items)["latents"]
    assert cached.keys() == true_keys(together) and "predicted" not in cached
    for flag, one, own, predicted in zip(flags, cached["latents"], true, together["latents"], strict=True):
        assert torch.equal(one, predicted if flag else own) and not torch.equal(own, predicted)


def true_keys(arrays: dict[str, Any]) -> set[str]:
    return arrays.keys() - {"images", "predicted"}


def test_mix_trains_alike_with_and_without_the_vision_encoder(make) -> None:
    """The latents that condition each sample are merged by the model, or before it where all of them are cached."""
    encoded(make(MIX, VISION))
    by_kind = {
        settings: plain.losses(make(*settings, "steps=3")) for settings in ((), (PREDICTED,), (MIX,), (MIX, VISION))
    }
    np.testing.assert_allclose(by_kind[(MIX, VISION)], by_kind[(MIX,)], rtol=1e-6)
    first = {losses[0] for losses in by_kind.values()}
    assert max(first) - min(first) < 1e-6 * max(first), "a ControlNet begins without effect"
    last = [by_kind[settings][-1] for settings in ((), (PREDICTED,), (MIX,))]
    assert len(set(last)) == 3


def test_true_latents_stay_as_they_were(make) -> None:
    """With a stage-1 run set but not used, nothing of it is opened, and a batch has the arrays that it always had."""
    recipe = make("controlnet.mllm=nowhere")
    stage: Any = open_run_stage(recipe)
    assert stage.predictor is None and stage.outputs() == [] and "mllm" not in stage.source
    collate, items = drawn(recipe, 2)
    wanted = {"images", "flux_images", "t5", "clip", "posterior", "noise", "level", "truncated"}
    assert collate(items).keys() == wanted
    assert load_recipe("tiny-controlnet").controlnet.latents == "true"
