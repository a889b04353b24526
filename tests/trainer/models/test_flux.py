"""The frozen FLUX: geometry and flow matching as in diffusers, and checks of a FLUX folder."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

import tiny_flux
from bifrost.recipes import FOLDER
from bifrost.trainer.errors import RunError
from bifrost.trainer.models import flux
from bifrost.trainer.models.flux import FluxFolder, FluxTokenizers, FrozenFlux
from bifrost.trainer.models.flux_config import SPACE_TO_DEPTH_KEY

PROMPTS = ["a red apple", "moon", "", "red " * 30]


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return tiny_flux.pipeline()


@pytest.fixture(scope="module")
def saved(pipeline: FluxPipeline, tmp_path_factory) -> Path:
    return tiny_flux.save(pipeline, tmp_path_factory.mktemp("flux"))


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "flux"))


def loaded(folder: Path, *parts, text_tokens: int = 512) -> FrozenFlux:
    model = FrozenFlux(FluxFolder.open(folder, "bf16", text_tokens), parts or flux.PARTS)
    model.load()
    return model


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 6)])
def test_packing_and_positions_are_diffusers(height: int, width: int) -> None:
    latents = torch.randn(2, 3, height, width)
    tokens = flux.pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 3, height, width))
    assert torch.equal(flux.unpack(tokens, height, width), latents)
    ids = flux.image_ids(height, width)
    assert torch.equal(
        ids, FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, torch.device("cpu"), torch.float32)
    )
    assert len(ids) == tokens.shape[1]


def test_the_published_geometry() -> None:
    """Spec 2.1: 512 px, 64 x 64 latents, 1024 tokens; spec 7.1: parameters."""
    folder = FluxFolder.open(FOLDER / "architectures/black-forest-labs/FLUX.1-dev", for_counting=True)
    assert (folder.stride, folder.grid(512), folder.guided, folder.depth) == (8, 32, True, 1)
    assert folder.text_lengths == (512, 77)
    for tokens, expected in ((128, 128), (1024, 512)):  # FLUX.1-dev was trained with 512
        assert FluxFolder.open(folder.path, "bf16", tokens, for_counting=True).text_lengths == (expected, 77)
    assert flux.image_ids(64, 64).shape == (1024, 3)
    wanted = dict(zip(flux.PARTS, (11_901_408_320, 83_819_683, 123_060_480, 4_762_310_656), strict=True))
    with torch.device("meta"):
        assert {part: sum(p.numel() for p in folder.build(part).parameters()) for part in flux.PARTS} == wanted
    for size in (0, 500, 520):
        with pytest.raises(RunError, match="set a multiple of 16"):
            folder.grid(size)


def test_noise_levels() -> None:
    # sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4; the ends of the table are 1 and 0.001.
    draws = torch.tensor([0.0, 1.0986123, -1.0986123, -60.0, 60.0])
    torch.testing.assert_close(flux.sigmas(draws), torch.tensor([0.5, 0.25, 0.75, 1.0, 0.001]), atol=1.01e-3, rtol=0)
    assert flux.sigmas(draws)[[0, 3, 4]].tolist() == pytest.approx([0.5, 1.0, 0.001])
    # FLUX.1-dev's table before anybody shifts it, at the index that diffusers' script computes.
    table = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    normal = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    index = (normal.double().sigmoid() * 1000).long()
    torch.testing.assert_close(flux.sigmas(normal), table.sigmas[index])
    torch.testing.assert_close(flux.sigmas(normal), table.timesteps[index] / 1000)


def test_flow_matching() -> None:
    latents, noise = torch.tensor([[2.0, 4.0], [1.0, -1.0]]), torch.tensor([[-2.0, 8.0], [3.0, 5.0]])
    mixed = flux.noisy(latents, noise, torch.tensor([0.25, 1.0]))
    assert mixed.tolist() == [[1.0, 5.0], [3.0, 5.0]]
    assert flux.target(latents, noise).tolist() == [[-4.0, 4.0], [2.0, 6.0]]
    wide = flux.noisy(latents[:, :, None, None], noise[:, :, None, None], torch.tensor([0.25, 1.0]))
    assert torch.equal(wide[:, :, 0, 0], mixed)


@pytest.mark.parametrize(("asked", "length"), [(512, 13), (4, 4)], ids=["the tokenizer's limit", "fewer"])
def test_text_as_the_pipeline_encodes_it(pipeline: FluxPipeline, saved: Path, asked: int, length: int) -> None:
    model = loaded(saved, "text_encoder", "text_encoder_2", text_tokens=asked).train()
    assert model.transformer is None and model.vae is None
    tokens = FluxTokenizers(model.folder)(PROMPTS)
    assert (tokens.t5.shape, tokens.clip.shape) == ((4, length), (4, 9))
    text, pooled = model.encode_text(tokens)
    wanted, wanted_pooled, text_ids = pipeline.encode_prompt(PROMPTS, max_sequence_length=length)
    torch.testing.assert_close(text, wanted)
    torch.testing.assert_close(pooled, wanted_pooled)
    assert not text_ids.any()
    assert not text.requires_grad and not pooled.requires_grad


def test_images_there_and_back(pipeline: FluxPipeline, saved: Path) -> None:
    model = loaded(saved, "vae")
    assert model.folder.stride == 4 and model.folder.grid(32) == 4
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    noise = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        folded = torch.nn.functional.pixel_unshuffle(images / 127.5 - 1, 2)
        posterior = pipeline.vae.encode(folded).latent_dist
        unfolded = torch.nn.functional.pixel_shuffle(pipeline.vae.decode(noise).sample, 2)
    wanted = (posterior.mean + posterior.std * noise - 0.2) * 0.7
    torch.testing.assert_close(model.encode_images(images, noise), wanted)
    torch.testing.assert_close(model.encode_images(images), (posterior.mean - 0.2) * 0.7)
    found = model.decode_latents((noise - 0.2) * 0.7)
    assert found.dtype == torch.uint8 and found.shape == (2, 3, 32, 32)
    torch.testing.assert_close(found / 127.5 - 1, unfolded.clamp(-1, 1), atol=0.005, rtol=0)


def test_velocity_and_guidance(pipeline: FluxPipeline, copied: Path) -> None:
    def predict(model: FrozenFlux) -> torch.Tensor:
        draw = torch.Generator().manual_seed(0)
        noisy, text, pooled = (torch.randn(s, generator=draw) for s in ((2, 4, 16), (2, 5, 12), (2, 8)))
        guidance = model.guidance(3.5, 2)
        ids = flux.image_ids(4, 4), torch.zeros(5, 3)
        sigma = torch.tensor([0.1, 0.7])
        return flux.velocity(model.transformer, noisy, None, text, pooled, sigma, guidance, *ids)

    model = loaded(copied, "transformer")
    assert model.guidance(3.5, 2).tolist() == [3.5, 3.5]
    assert all(torch.equal(p, model.transformer.get_parameter(n)) for n, p in pipeline.transformer.named_parameters())
    assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
    tiny_flux.change(copied / "transformer" / "config.json", guidance_embeds=False)
    schnell = loaded(copied, "transformer")
    assert schnell.guidance(3.5, 2) is None
    assert not torch.allclose(predict(model), predict(schnell))


def test_a_folder_of_another_shape_or_with_missing_parts(copied: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(RunError) as error:
            FluxFolder.open(copied)
        assert words in str(error.value) and "\n" not in str(error.value)

    def without(name: str, message: str) -> None:
        away = copied.parent / "away"
        (copied / name).rename(away)
        refused(message)
        away.rename(copied / name)

    FluxFolder.open(copied)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        without(name, f"{name}/")
    without("model_index.json", "model_index.json missing")
    without("vae/config.json", "vae/config.json missing")
    without("text_encoder/model.safetensors", "text_encoder/*.safetensors missing")
    for file, settings, words in (
        ("transformer", {"_class_name": "SD3Transformer2DModel"}, "expected FluxTransformer2DModel"),
        ("transformer", {"in_channels": 64}, "transformer in_channels is 64, 4 x vae latent_channels is 16"),
        ("text_encoder_2", {"d_model": 16}, "joint_attention_dim is 12, text_encoder_2 d_model is 16"),
        ("text_encoder", {"hidden_size": 16}, "pooled_projection_dim is 8, text_encoder hidden_size is 16"),
        ("vae", {SPACE_TO_DEPTH_KEY: 4}, "in_channels 12 are not 3 x 4 x 4"),
    ):
        config = copied / file / "config.json"
        before = config.read_text()
        tiny_flux.change(config, **settings)
        refused(words)
        config.write_text(before)
    (copied / "vae" / "config.json").write_text('{"in_channels": 12}')
    refused("vae/config.json: latent_channels, block_out_channels missing")
    (copied / "vae" / "config.json").write_text("[")
    refused("is not JSON")


def test_missing_shards_and_tokenizers_are_named(copied: Path) -> None:
    shard = sorted((copied / "transformer").glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(RunError, match=r"transformer: \d+ tensors are missing"):
        loaded(copied, "transformer")
    for file in (copied / "tokenizer").iterdir():
        file.write_text("{}")
    with pytest.raises(RunError, match="tokenizer: the tokenizer cannot be read"):
        FluxTokenizers(FluxFolder.open(copied))


def test_the_other_names_of_text_encoders(saved: Path, copied: Path) -> None:
    """Hub files may prefix CLIP's names with `text_model.`, and have two names for T5's embedding."""
    from safetensors.torch import load_file, save_file

    usual = dict(loaded(saved, "text_encoder", "text_encoder_2").named_parameters())
    clip, t5 = (copied / part / "model.safetensors" for part in ("text_encoder", "text_encoder_2"))
    stored = load_file(clip)
    prefix = "text_model."
    bare = not next(iter(stored)).startswith(prefix)
    save_file({prefix + n if bare else n.removeprefix(prefix): t for n, t in stored.items()}, clip)
    save_file({n.replace("shared", "encoder.embed_tokens"): t for n, t in load_file(t5).items()}, t5)
    again = loaded(copied, "text_encoder", "text_encoder_2")
    assert all(torch.equal(p, usual[n]) for n, p in again.named_parameters())
