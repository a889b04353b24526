"""`bifrost bench step` of stage 2: its baseline is diffusers' example, both compute the same, mistakes are named."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.nn import functional as F

from bifrost.recipes import load_recipe
from bifrost.trainer.bench import controlnet_step
from bifrost.trainer.bench.controlnet_shapes import draw_batch, random_model, scaled_stage
from bifrost.trainer.bench.diffusers_step import DiffusersStep
from bifrost.trainer.cli import main
from bifrost.trainer.errors import RunError
from bifrost.trainer.stages import open_controlnet

SMALL: dict[str, Any] = {"layers": None, "width": None, "samples": 2, "rounds": 1, "out": None}
CPU = torch.device("cpu")
SAME_GRID = ["data.image_size=224"]  # patch latents as fine as FLUX's tokens: no resampler


def opened(*overrides: str) -> tuple[Any, Any, Any]:
    """Stage, model with all encoders, and batch of the tiny recipe in fp32."""
    recipe = load_recipe("tiny-controlnet", ["precision=fp32", *overrides])
    stage = scaled_stage(open_controlnet(recipe, for_counting=True), None, None)
    model = random_model(stage, True, recipe.activation_checkpointing, CPU, torch.float32)
    return stage, model, draw_batch(stage, model, 2, 8, torch.float32)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["activation_checkpointing=true"],
        ["controlnet.norm=group", "controlnet.double=2", "controlnet.single=0"],
        [*SAME_GRID, "controlnet.double=0", "controlnet.single=2"],
    ],
    ids=["upsampled", "recomputed", "group-norm", "same-grid"],
)
def test_loss_and_all_gradients_are_those_of_diffusers(overrides: list[str]) -> None:
    found = controlnet_step.bench(load_recipe("tiny-controlnet", ["precision=fp32", *overrides]), **SMALL)
    assert max(found.loss_error, found.gradient_error) < 1e-5
    assert found.activation_ratio > (1 if "activation_checkpointing=true" in overrides else 1.3)


def test_the_baseline_is_the_example() -> None:
    """Its loss from the pipeline's own packing and positions, the scheduler's noise and the VAE's posterior, on the
    weights of ours; the condition needs no resampler here."""
    stage, model, batch = opened(*SAME_GRID)
    step = DiffusersStep(model, torch.float32, online=False)
    assert not step.transformer.training or not any(p.requires_grad for p in step.transformer.parameters())
    scheduler, vae = FlowMatchEulerDiscreteScheduler(), stage.folder.vae
    posterior = DiagonalGaussianDistribution(torch.cat((batch.mean, 2 * batch.std.log()), dim=1))
    sampled = posterior.mean + posterior.std * batch.posterior
    scaled = (sampled - vae["shift_factor"]) * vae["scaling_factor"]
    clean = FluxControlNetPipeline._pack_latents(scaled, *scaled.shape)
    timesteps = scheduler.timesteps[(batch.level.sigmoid() * 1000).long()]
    height, width = (side // 2 for side in scaled.shape[2:])
    shared = {
        "hidden_states": scheduler.scale_noise(clean, timesteps, batch.noise),
        "timestep": timesteps / 1000,
        "guidance": torch.full((2,), stage.flux.guidance),
        "pooled_projections": batch.pooled,
        "encoder_hidden_states": batch.text,
        "txt_ids": torch.zeros(8, 3),
        "img_ids": FluxControlNetPipeline._prepare_latent_image_ids(2, height, width, CPU, torch.float32),
        "return_dict": False,
    }
    double, single = step.controlnet(controlnet_cond=batch.latents, **shared)
    velocity = step.transformer(controlnet_block_samples=double, controlnet_single_block_samples=single, **shared)[0]
    wanted = F.mse_loss(velocity, batch.noise - clean)
    torch.testing.assert_close(step.step(batch), wanted.detach(), rtol=1e-5, atol=0)


def test_the_baseline_has_diffusers_blocks_and_torchs_linear_layers() -> None:
    _, model, _ = opened()
    step = DiffusersStep(model, torch.float32, online=False)
    for module in (*step.transformer.modules(), *step.controlnet.transformer_blocks.modules()):
        assert type(module).__module__.split(".")[0] in ("torch", "diffusers"), module
    assert step.trainable().keys() == model.trainable().keys()
    theirs, ours = step.transformer.proj_out.weight, model.flux.transformer.proj_out.weight
    assert theirs.data_ptr() == ours.data_ptr(), "FLUX is in memory once"


def test_online_encodes_the_images_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, batch = opened()
    calls = []
    for owner, name in ((model.flux, "posterior"), (model.backbone, "patch_latents")):
        encode = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda x, encode=encode, name=name: calls.append(name) or encode(x))
    online, cached = (DiffusersStep(model, torch.float32, each) for each in (True, False))
    expected = cached.step(batch)
    assert not calls
    assert float(online.step(batch)) == pytest.approx(float(expected), rel=1e-6)
    assert calls == ["posterior", "patch_latents"]


def test_everything_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In the recipe's precision, bf16, also on a CPU, with the caches' or the encoders' outputs."""
    settings = {**SMALL, "rounds": 2, "out": tmp_path, "text_tokens": "20", "baseline": "online"}
    found = controlnet_step.bench(load_recipe("tiny-controlnet"), **settings)
    record = json.loads((tmp_path / "step.json").read_text())
    assert {name: record[name] for name in asdict(found)} == asdict(found)
    shape = {"layers": [2, 4], "controlnet": [1, 1], "width": 192, "heads": 3, "samples": 2}
    tokens = {"image_tokens": 64, "text_tokens": 20, "patches": 16, "resampling": "up"}
    run = {"precision": "bf16", "baseline": "online", "rounds": 2, "activation_checkpointing": False}
    assert record | shape | tokens | run == record
    assert 1e-4 < found.gradient_error < 5e-2, "rounded to bf16, once each"
    assert found.baseline_s == pytest.approx(sum(found.baseline_parts_s.values()), rel=0.5)
    assert found.baseline_parts_s.keys() == {"encoders", *found.ours_parts_s} == {"encoders", "forward", "backward"}
    assert found.activation_ratio == found.baseline_activation_bytes / found.ours_activation_bytes
    assert 0 < found.baseline_copied_bytes < found.baseline_activation_bytes
    printed = capsys.readouterr().out
    assert f"{found.ratio:.2f}" in printed and "64 image and 20 text tokens" in printed


@pytest.mark.parametrize("forgotten", ["guidance", "shift"])
def test_baselines_that_differ_are_not_timed(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = DiffusersStep.__init__

    def without(self: Any, *inputs: Any) -> None:
        build(self, *inputs)
        setattr(self, forgotten, 0.0)

    monkeypatch.setattr(DiffusersStep, "__init__", without)
    monkeypatch.setattr(controlnet_step, "activation_bytes", lambda *_: pytest.fail("measured"))
    with pytest.raises(RunError, match="the baseline differs"):
        controlnet_step.bench(load_recipe("tiny-controlnet", ["precision=fp32"]), **SMALL)


def test_what_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(DiffusersStep, "step", step)
    with pytest.raises(RunError, match="give fewer --samples"):
        controlnet_step.bench(load_recipe("tiny-controlnet"), **SMALL)


def test_a_smaller_flux_keeps_its_proportions() -> None:
    stage = open_controlnet(load_recipe("flux-controlnet"), for_counting=True)
    small = scaled_stage(stage, 4, 512)
    assert small.folder.blocks == (4, 8) and (small.shape.double, small.shape.single) == (1, 1)
    assert (small.folder.transformer["num_attention_heads"], small.folder.transformer["attention_head_dim"]) == (4, 128)
    for there, here in (
        (stage.folder.transformer["joint_attention_dim"], small.folder.transformer["joint_attention_dim"]),
        (stage.folder.transformer["pooled_projection_dim"], small.folder.transformer["pooled_projection_dim"]),
        (stage.shape.latent_width, small.shape.latent_width),
    ):
        assert here / there == pytest.approx(512 / 3072, rel=0.1)
    assert all(width % 32 == 0 for width in small.folder.vae["block_out_channels"])
    assert small.latents == stage.latents and small.shape.resampling == stage.shape.resampling
    whole = scaled_stage(stage, None, None)
    assert whole.folder.blocks == (19, 38) and whole.shape == stage.shape and whole.config is stage.config


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], ["--baseline", "sdpa"], "--baseline sdpa: tiny-controlnet is of stage controlnet, give one of diffusers"),
        ([], ["--text-tokens", "20,30"], "--text-tokens 20,30: FLUX's text is padded; give one number from 1 to 48"),
        ([], ["--text-tokens", "49"], "--text-tokens 49"),
        ([], ["--width", "100"], "--width 100: give a multiple of 64, the width of a head, up to 192"),
        ([], ["--layers", "3"], "--layers 3: this FLUX has 2 double blocks"),
        (["flux.weights=int8"], [], "flux.weights=int8: the baseline has no weights in 8 bits"),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    overrides: list[str],
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    printed = refused(monkeypatch, capsys, "tiny-controlnet", *overrides, *options)
    assert printed.startswith(f"error: {message}") and printed.count("\n") == 1


def test_stage_1_has_its_own_baselines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    printed = refused(monkeypatch, capsys, "tiny-controlnet", "controlnet.bridge=queries")
    assert printed == "error: controlnet.bridge=queries: benchmarks measure a ControlNet; leave it out\n"
    printed = refused(monkeypatch, capsys, "tiny-mllm", "--baseline", "online")
    assert printed == "error: --baseline online: give one of eager, sdpa, compiled, single\n"


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What `bifrost bench step` prints on stderr when it ends with exit code 2."""
    monkeypatch.setattr(main.os, "_exit", lambda code: sys.exit(code))
    monkeypatch.setattr(sys, "argv", ["bifrost", "bench", "step", *arguments])
    with pytest.raises(SystemExit) as left:
        main.main()
    printed = capsys.readouterr()
    assert left.value.code == 2 and not printed.out
    return printed.err
