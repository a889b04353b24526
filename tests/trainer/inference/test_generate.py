"""Prompts to images: equal in any batch; weights, controls, exports."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import run_folders
from bifrost.recipes import load_recipe
from bifrost.trainer.checkpoint.export import export
from bifrost.trainer.checkpoint.shard import Payload
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.errors import RunError
from bifrost.trainer.inference.generator import Generator
from bifrost.trainer.inference.settings import Sampling, Settings
from bifrost.trainer.inference.stored_controlnet import load_controlnet
from bifrost.trainer.models.latent_controlnet import LatentControlNet, write_config
from bifrost.trainer.stages import StageModel
from images import differ, equal

FAST = Sampling(steps=3)
QUICK = ("--flux-steps=2", "--steps=4")


pytestmark = pytest.mark.usefixtures("one_thread")


def weights_of(model: StageModel | LatentControlNet) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def test_ema_weights_are_used_if_a_run_has_them(generator: Generator, mllm: Path, controlnet: Path) -> None:
    averaged, trained = (
        Store(mllm / "checkpoints").newest_verified(),
        Store(controlnet / "checkpoints").newest_verified(),
    )
    assert averaged and trained
    found = weights_of(generator.mllm)
    assert all(torch.equal(found[name], averaged.full("ema", name)) for name in averaged.shapes)
    found = weights_of(generator.controlnet)
    assert all(torch.equal(found[n.removeprefix("controlnet.")], trained.full("master", n)) for n in trained.shapes)
    buffers = dict(generator.controlnet.named_buffers())
    assert buffers and all(torch.equal(buffers[n.removeprefix("controlnet.")], b) for n, b in trained.buffers().items())
    assert not any(module.training for part in (generator.mllm, generator.controlnet) for module in part.modules())


def test_averaged_weights_have_averaged_statistics(mllm: Path, flux: Path, tmp_path: Path, caplog) -> None:
    """In generate and export; a checkpoint without averaged statistics falls back to the live ones, with a log line."""
    recipe = load_recipe("tiny-controlnet", [f"flux.path={flux}"])
    run = run_folders.save(tmp_path / "run", recipe, 3, ("master", "ema"))
    reader = Store(run / "checkpoints").newest_verified()
    assert reader
    live = reader.buffers()
    where = torch.device("cpu"), torch.float32

    def taken(path: Path) -> dict[str, torch.Tensor]:
        return {f"controlnet.{n}": b for n, b in load_controlnet(path, None, 192, 4, *where).network.named_buffers()}

    assert all(torch.equal(buffer, live[name]) for name, buffer in taken(run).items())
    assert "no averaged BatchNorm statistics" in caplog.text
    caplog.clear()

    slots = {slot: {n: reader.full(slot, n).flatten() for n in reader.shapes} for slot in reader.slots}
    averaged = {name: (buffer * 2).to(buffer.dtype) for name, buffer in live.items()}
    held = {**live, **{f"ema/{name}": buffer for name, buffer in averaged.items()}}
    Store(run / "checkpoints").save(8, Payload(0, 1, slots, reader.shapes, reader.state, held))
    assert all(torch.equal(buffer, averaged[name]) for name, buffer in taken(run).items())
    for ema, wanted in ((True, averaged), (False, live)):
        export(run, tmp_path / str(ema), "public", ema=ema)
        exported = load_file(tmp_path / str(ema) / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(exported[n.removeprefix("controlnet.")], b) for n, b in wanted.items())
        assert not [name for name in exported if "ema" in name]
    assert not caplog.text


def test_same_prompt_and_seed_same_image_alone_and_in_a_batch(generator: Generator) -> None:
    prompts, seeds = ["a red apple", "moon", "a red apple", "a"], [5, 5, 6, 2**40]
    for settings in (Settings(steps=5, flux=FAST), Settings(steps=5, guidance=2.0, flux=Sampling(steps=3, cfg=2.0))):
        images = generator.generate(prompts, seeds, settings)
        assert [image.size for image in images] == [(64, 64)] * 4
        for image, prompt, seed in zip(images, prompts, seeds, strict=True):
            assert equal(generator.generate([prompt], [seed], settings)[0], image)
        for image, again in zip(images, generator.generate(prompts, seeds, settings, batch=3), strict=True):
            assert equal(again, image)
        assert differ(images[0], images[1]) and differ(images[0], images[2])


def test_controls(generator: Generator) -> None:
    prompts, seeds = ["a red apple", "moon"], [5, 5]
    usual = generator.generate(prompts, seeds, Settings(flux=FAST))
    decoded = []
    handle = generator.mllm.branch.register_forward_pre_hook(lambda *_: decoded.append(1))
    plain = generator.generate(prompts, seeds, Settings(controlnet=False, flux=FAST))
    handle.remove()
    assert not decoded, "FLUX alone needs no latents"
    silent = Sampling(steps=3, conditioning_scale=0.0)
    for one, other, same in zip(plain, generator.generate(prompts, seeds, Settings(flux=silent)), usual, strict=True):
        assert equal(one, other) and differ(one, same)
    latents = generator.latents(prompts, seeds)
    empty = generator.generate(prompts, seeds, Settings(empty_prompt=True, flux=FAST))
    assert differ(empty[0], usual[0]) and differ(empty[0], empty[1])
    given = generator.generate(["", ""], seeds, Settings(flux=FAST), latents)
    assert all(equal(*pair) for pair in zip(empty, given, strict=True))


def test_guidance_leads_away_from_the_empty_prompt(generator: Generator) -> None:
    def latents(prompt: str, guidance: float) -> torch.Tensor:
        return generator.latents([prompt], [3], Settings(steps=1, guidance=guidance))

    conditional, unconditional = latents("a red apple", 1.0), latents("", 1.0)
    torch.testing.assert_close(
        latents("a red apple", 2.5), unconditional + 2.5 * (conditional - unconditional), atol=1e-4, rtol=0
    )
    assert (conditional - unconditional).abs().mean() > 0.01


def test_latents_of_an_image(generator: Generator) -> None:
    images = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    latents = generator.encode(images)
    assert torch.equal(latents, generator.mllm.backbone.patch_latents(images))
    made = generator.generate(["moon", "moon"], [1, 1], Settings(flux=FAST), latents)
    assert differ(*made)


@pytest.mark.parametrize("layout", ["public", "hf"])
def test_exports_and_the_public_controlnet(
    layout, generator: Generator, mllm: Path, flux: Path, tmp_path: Path
) -> None:
    export(mllm, tmp_path / "mllm", layout, dtype=torch.float32, ema=True)
    write_config(tmp_path / "flux_controlnet", generator.controlnet.shape)
    generator.controlnet.save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "saved" / "diffusion_pytorch_model.safetensors", tmp_path / "flux_controlnet")
    other = Generator.load(tmp_path / "mllm", tmp_path / "flux_controlnet", str(flux))
    assert other.flux_size == 64
    settings = Settings(flux=FAST)
    ours, theirs = (each.generate(["a red apple"], [5], settings)[0] for each in (generator, other))
    assert equal(ours, theirs, 0)


def test_bf16(mllm: Path, controlnet: Path, generator: Generator) -> None:
    small = Generator.load(mllm, controlnet, dtype=torch.bfloat16)
    assert {p.dtype for p in small.mllm.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in small.flux.parameters()} == {torch.bfloat16}
    tables = (small.mllm.branch.rotary_embedding, small.mllm.backbone.text.rotary_emb)
    assert all(table.inv_freq.dtype == torch.float32 for table in tables)
    assert all(b.dtype != torch.bfloat16 for b in small.controlnet.statistics().values())
    assert torch.get_default_dtype() == torch.float32
    a, b = (each.latents(["moon"], [1], Settings(steps=1)).float() for each in (generator, small))
    assert (a - b).norm() < 0.1 * a.norm()


def test_a_controlnet_for_other_latents(generator: Generator, mllm: Path, flux: Path, tmp_path: Path) -> None:
    network = LatentControlNet(replace(generator.controlnet.shape, latent_width=24))
    network.save_pretrained(tmp_path)
    write_config(tmp_path, network.shape)
    with pytest.raises(RunError, match="expects patch latents of width 24, this MLLM has"):
        Generator.load(mllm, tmp_path, str(flux))


def test_a_truncated_prompt_is_logged_with_its_tokens(generator: Generator, caplog) -> None:
    long = "an apple and a pear " * 120
    generator.warn_about_truncation(["a red apple", long, long], Settings())
    (line,) = [each.getMessage() for each in caplog.records]
    whole = len(generator.template.tokenizer(generator.template.head + long + generator.template.tail).input_ids)
    kept = len(generator.template.ids(long))
    assert f"the branch's text model reads {kept} of {whole} tokens ({whole - kept} dropped)" in line
    assert generator.tokenizers([long]).t5.shape[1] == generator.tokenizers.t5_length
    for name, tokenizer in (("T5", generator.tokenizers.t5), ("CLIP", generator.tokenizers.clip)):
        count = len(tokenizer(long).input_ids)
        limit = getattr(generator.tokenizers, f"{name.lower()}_length")
        assert f"{name} reads {limit} of {count} tokens ({count - limit} dropped)" in line
    assert line.startswith("prompt 'an apple and a pear") and len(line) < 350
    caplog.clear()
    generator.warn_about_truncation([long], replace(Settings(), empty_prompt=True), decoded=False)
    assert not caplog.records, "nobody reads it"
