"""The ControlNet starts as a copy of FLUX without effect, and learns from the output layers inward."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxControlNetModel
from safetensors.torch import save_file

import opened
import ranked
from bifrost.recipes import FOLDER, load_recipe
from bifrost.trainer.errors import RunError
from bifrost.trainer.models.controlnet_config import ControlNetConfig, resampling, residuals_added
from bifrost.trainer.models.flux import FluxFolder, image_ids, velocity
from bifrost.trainer.models.flux_transformer import FluxTransformer
from bifrost.trainer.models.latent_controlnet import (
    LatentControlNet,
    Residuals,
    read_config,
    write_config,
)
from bifrost.trainer.models.resampler import SyncedBatchNorm
from bifrost.trainer.models.weights import WeightFiles
from bifrost.trainer.stages import open_stage
from small_flux import CONFIG as FLUX
from small_flux import InMemory

WIDTH = 12
GRIDS = {"up": (2, 4), "none": (4, 4), "down": (8, 4)}


def shape(kind: str = "up", **options) -> ControlNetConfig:
    return ControlNetConfig.of(FLUX, WIDTH, *GRIDS[kind], **{"double": 2, "single": 1, **options})


def flux() -> FluxTransformer:
    torch.manual_seed(0)
    return FluxTransformer.build(FLUX).requires_grad_(False)


def build(kind: str = "up", seed: int = 0, **options) -> LatentControlNet:
    model = LatentControlNet(shape(kind, **options))
    model.initialise(InMemory(flux()), "flux", seed)
    return model


def inputs(kind: str = "up") -> tuple[torch.Tensor, torch.Tensor, list]:
    """Noisy latents, patch latents, and the other inputs of both networks."""
    draw = torch.Generator().manual_seed(1)
    noisy, text, pooled = (torch.randn(s, generator=draw) for s in ((2, 16, 16), (2, 5, 24), (2, 20)))
    latents = torch.randn(2, GRIDS[kind][0] ** 2, WIDTH, generator=draw)
    conditions = [text, pooled, torch.tensor([0.2, 0.9]), torch.full((2,), 3.5), image_ids(8, 8), torch.zeros(5, 3)]
    return noisy, latents, conditions


@pytest.mark.parametrize(
    ("width", "double", "single", "total"),
    [
        (3584, 4, 1, 1_771_186_432),
        (2048, 4, 1, 1_653_998_848),
        (3584, 4, 0, 1_620_154_368),
        (3584, 1, 4, 1_176_467_968),
    ],
)
def test_parameter_counts_of_the_published_sizes(width: int, double: int, single: int, total: int) -> None:
    folder = FluxFolder.open(FOLDER / "architectures/black-forest-labs/FLUX.1-dev", for_counting=True)
    with torch.device("meta"):
        model = LatentControlNet(
            ControlNetConfig.of(folder.transformer, width, 16, folder.grid(512), double=double, single=single)
        )
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_flux_is_unchanged_at_the_start_to_the_bit(kind: str, norm: str) -> None:
    noisy, latents, conditions = inputs(kind)
    transformer = flux()
    residuals = build(kind, norm=norm)(noisy, latents, *conditions)
    assert [len(part) for part in residuals] == [2, 1]
    assert not any(r.any() for part in residuals for r in part)
    plain = velocity(transformer, noisy, None, *conditions)
    assert torch.equal(velocity(transformer, noisy, residuals, *conditions), plain)


def test_only_double_or_only_single_blocks() -> None:
    noisy, latents, conditions = inputs()
    for options in ({"single": 0}, {"double": 0}):
        residuals = build(**options)(noisy, latents, *conditions)
        assert torch.equal(velocity(flux(), noisy, residuals, *conditions), velocity(flux(), noisy, None, *conditions))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_gradients_appear_from_the_outside_in(checkpointing: bool) -> None:
    """Spec 2.3: first the output projections, then layers off the condition's path, last the upsampler."""
    noisy, latents, conditions = inputs()
    transformer, model = flux(), build()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    moving = []
    for _ in range(3):
        optimizer.zero_grad()
        velocity(transformer, noisy, model(noisy, latents, *conditions), *conditions).square().mean().backward()
        moving.append({n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step()
    names = {n for n, _ in model.named_parameters()}
    outputs = {n for n in names if n.startswith(("controlnet_blocks", "controlnet_single_blocks"))}
    resampler = {n for n in names if n.startswith("up_sampling_block")}
    # A bias in front of a BatchNorm has no effect; what is left of its gradient is rounding.
    felt = resampler - {"up_sampling_block.upconv.bias", "up_sampling_block.conv.bias"}
    assert moving[0] == outputs
    assert moving[1] == names - resampler
    assert felt <= moving[2] <= names
    assert all(p.grad is None for p in transformer.parameters())


def test_initial_weights() -> None:
    transformer, model = dict(flux().named_parameters()), build(seed=3)
    parameters = dict(model.named_parameters())
    copied = model.copied_names()
    assert set(copied) == {n for n in parameters if not n.startswith(("controlnet_", "up_sampling_block"))}
    for ours, theirs in copied.items():
        assert torch.equal(parameters[ours], transformer[theirs])
    block = model.up_sampling_block
    for ours, theirs in ((block.upconv, torch.nn.ConvTranspose2d(12, 12, 2)), (block.conv, torch.nn.Conv2d(12, 12, 3))):
        for part in ("weight", "bias"):
            found, usual = getattr(ours, part), getattr(theirs, part)
            bound = (theirs.weight[0].numel()) ** -0.5
            assert bound / 2 < found.abs().max() <= bound
            assert usual.abs().max() <= bound
    for norm in (block.bn1, block.bn2):
        assert (norm.weight == 1).all() and (norm.bias == 0).all() and (norm.running_var == 1).all()
    again, other = dict(build(seed=3).named_parameters()), dict(build(seed=4).named_parameters())
    assert all(torch.equal(p, again[n]) for n, p in parameters.items())
    assert {n for n, p in parameters.items() if not torch.equal(p, other[n])} == {
        f"up_sampling_block.{layer}.{part}" for layer in ("upconv", "conv") for part in ("weight", "bias")
    }


def test_a_missing_flux_tensor_is_named() -> None:
    source = InMemory(flux())
    del source.tensors["transformer_blocks.1.ff.net.2.bias"]
    with pytest.raises(RunError, match=r"some/flux: 1 tensors are missing, transformer_blocks\.1\.ff\.net\.2\.bias"):
        LatentControlNet(shape()).initialise(source, "some/flux", 0)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(("kind", "norm"), [("up", "batch"), ("up", "group"), ("down", "batch"), ("none", "batch")])
def test_public_folder_round_trip(tmp_path: Path, kind: str, norm: str, shards: int) -> None:
    model = build(kind, norm=norm)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) * 9)
    tensors = model.state_dict()
    write_config(tmp_path, model.shape)
    for number in range(shards):
        part = {n: t for i, (n, t) in enumerate(tensors.items()) if i % shards == number}
        name = f"-{number + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        save_file(part, tmp_path / f"diffusion_pytorch_model{name}.safetensors")
    if shards > 1:
        (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    config, files = read_config(tmp_path)
    again = LatentControlNet(config)
    again.load(files, tmp_path)
    assert (config.resampling, config.double, config.single) == (kind, 2, 1)
    assert again.state_dict().keys() == tensors.keys()
    assert all(torch.equal(t, tensors[n]) for n, t in again.state_dict().items())
    known = inspect.signature(FluxControlNetModel.__init__).parameters
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name for name in written if not name.startswith("_")} == known.keys() - {"self"}


def test_wrong_folders_and_mismatches_are_one_line_errors(tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(RunError) as error:
            read_config(tmp_path)
        assert words in str(error.value) and "\n" not in str(error.value)

    refused("no config.json")
    with pytest.raises(RunError, match=r"nothing: no such folder; give a folder with a FLUX ControlNet"):
        read_config(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    refused("is not JSON")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    refused("expected FluxControlNetModel")
    settings = shape().public()
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_mode": 3}))
    refused("num_mode is 3")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    refused("no safetensors files")
    save_file({"x": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    refused("controlnet_x_embedder.weight is missing")
    save_file({"controlnet_x_embedder.weight": torch.zeros(32, 7)}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "num_layers"}))
    refused("num_layers missing")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_config(tmp_path)[0].latent_width == 7

    ours = shape()
    ours.require(FLUX, WIDTH, 2, 4)
    for arguments, words in (
        ((FLUX, 8, 2, 4), "of width 12, this MLLM has 8"),
        ((FLUX, WIDTH, 4, 4), "resamples patch latents by 'up', but 4 x 4 latents and 4 x 4 FLUX tokens need 'none'"),
        (({**FLUX, "in_channels": 64}, WIDTH, 2, 4), "in_channels 16, this one has 64"),
    ):
        with pytest.raises(RunError, match=words):
            ours.require(*arguments)
    with pytest.raises(RunError, match="30 double blocks: this FLUX has 3"):
        shape(double=30)
    with pytest.raises(RunError, match="0 double and 0 single"):
        shape(double=0, single=0)
    with pytest.raises(RunError, match="3 x 3 patch latents cannot be resampled to 4 x 4 FLUX tokens"):
        resampling(3, 4)


def normalised(rank: int, ranks: int) -> dict[str, list]:
    """Two training steps of conv-free statistics on this rank's rows of one batch."""
    draw = torch.Generator().manual_seed(5)
    norm = SyncedBatchNorm(6)
    x = torch.randn(4, 6, 3, 3, generator=draw) * torch.arange(1, 7)[:, None, None] + 20
    x += torch.arange(4)[:, None, None, None]  # no two ranks see the same mean
    wanted = torch.randn(4, 6, 3, 3, generator=draw)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6, generator=draw))
        norm.bias.copy_(torch.randn(6, generator=draw))
    rows = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    x = x[rows].requires_grad_()
    for _ in range(2):
        out = norm(x)
    torch.nn.functional.mse_loss(out.sigmoid(), wanted[rows]).backward()
    assert x.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
    tensors = {"out": out, "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return {name: t.tolist() for name, t in (tensors | dict(norm.named_buffers())).items()}


def normalised_on_ranks() -> dict[str, list]:
    from bifrost.trainer.distributed.process_group import join

    ranks = join()
    return normalised(ranks.rank, ranks.size)


@pytest.mark.multi
def test_batch_norm_on_two_ranks_equals_one_process() -> None:
    alone = {name: torch.tensor(value) for name, value in normalised(0, 1).items()}
    ranks = [rank.value for rank in ranked.run(normalised_on_ranks, 2)]
    for name, wanted in alone.items():
        first, second = (torch.tensor(value[name]) for value in ranks)
        if name in ("out", "x"):
            found = torch.cat((first, second)) / (2 if name == "x" else 1)  # each rank's loss is a mean of its own
        elif name in ("weight", "bias"):
            found = (first + second) / 2
        else:
            assert torch.equal(first, second)
            found = first
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_batch_norm_is_torchs() -> None:
    draw = torch.Generator().manual_seed(6)
    ours, theirs = SyncedBatchNorm(5), torch.nn.BatchNorm2d(5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for step in range(5):
        x = torch.randn(3, 5, 4, 4, generator=draw) * 3 + 7
        for norm in (ours, theirs):
            norm.train(step < 4)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, wanted = ours(a), theirs(b)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
        found.sin().sum().backward()
        wanted.sin().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, atol=1e-6, rtol=1e-6)


def test_running_statistics_stay_fp32() -> None:
    model = build()
    block = model.up_sampling_block
    block.bn1.running_mean.fill_(1 / 3)
    model.bfloat16()
    assert block.conv.weight.dtype == torch.bfloat16
    assert {str(b.dtype) for b in model.statistics().values()} == {"torch.float32", "torch.int64"}
    assert (block.bn1.running_mean == torch.tensor(1 / 3)).all()
    noisy, latents, conditions = inputs()
    assert model(noisy, latents, *conditions).double[0].dtype == torch.bfloat16
    with torch.device("meta"):
        hollow = LatentControlNet(shape())
    assert hollow.to_empty(device="cpu").up_sampling_block.bn1.running_var.dtype == torch.float32


def slices_under_zero_init(folder: str) -> list[bool]:
    """Whether this rank has only its slices, equal to those of a full model, and fp32 statistics."""
    from bifrost.trainer.distributed.process_group import join
    from bifrost.trainer.optim.engine import partitioned

    ranks = join()
    whole = dict(build().named_parameters())
    with partitioned(opened.deepspeed(load_recipe("tiny-mllm", ("precision=bf16",)), ranks.size), ranks.device):
        model = LatentControlNet(shape())
    model.initialise(WeightFiles(Path(folder)), folder, 0)
    equal = []
    for name, parameter in model.named_parameters():
        mine = parameter.ds_tensor
        wanted = whole[name].flatten().bfloat16()[ranks.rank * mine.numel() :][: mine.numel()]
        equal.append(parameter.numel() == 0 and torch.equal(mine[: len(wanted)], wanted))
    kinds = {buffer.dtype for buffer in model.statistics().values()}
    return [all(equal), kinds == {torch.float32, torch.int64}]


@pytest.mark.multi
def test_every_rank_fills_its_own_slice(tmp_path: Path) -> None:
    save_file(flux().state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    for rank in ranked.run(slices_under_zero_init, 2, str(tmp_path)):
        assert rank.value == [True, True], rank.err


def test_idle_blocks_are_refused_with_the_nearest_that_learn() -> None:
    """Against diffusers' own forward pass: an unused residual has no gradient."""
    double, single = 7, 9
    settings = {**FLUX, "num_layers": double, "num_single_layers": single, "num_attention_heads": 1}
    torch.manual_seed(0)
    transformer = FluxTransformer.build(settings).requires_grad_(False)
    noisy, _, conditions = inputs()
    for count in range(1, single + 1):
        residuals = Residuals(
            tuple(torch.zeros(2, 16, 16, requires_grad=True) for _ in range(min(count, double))),
            tuple(torch.zeros(2, 16, 16, requires_grad=True) for _ in range(count)),
        )
        velocity(transformer, noisy, residuals, *conditions).square().sum().backward()
        for kind, blocks, made in (("double", double, residuals.double), ("single", single, residuals.single)):
            used = sum(tensor.grad is not None and bool(tensor.grad.any()) for tensor in made)
            assert residuals_added(len(made), blocks) == used
            other = {"single" if kind == "double" else "double": 1}
            shaped = ControlNetConfig.of(settings, WIDTH, 2, 4, **{kind: len(made)}, **other)
            if used == len(made):
                shaped.require_use(settings)
            else:
                with pytest.raises(
                    RunError, match=rf"controlnet\.{kind}={len(made)}: .*; set (\d+) or (\d+)"
                ) as refused:
                    shaped.require_use(settings)
                near = [int(word) for word in str(refused.value).split("; set ")[1].split(" or ")]
                assert near[0] < len(made) < near[1]
                assert all(residuals_added(number, blocks) == number for number in near)


def test_published_flux_and_idle_blocks() -> None:
    """Worked out by hand for FLUX.1-dev: 19 double and 38 single blocks."""
    idle = [count for count in range(1, 20) if residuals_added(count, 19) < count]
    assert idle == [6, 8, 9, *range(11, 19)]
    idle = [count for count in range(1, 39) if residuals_added(count, 38) < count]
    assert idle == [9, 11, 12, *range(14, 19), *range(20, 38)]


def test_a_recipe_with_idle_blocks_is_refused() -> None:
    recipe = load_recipe("flux-controlnet", ["controlnet.double=6"])
    with pytest.raises(
        RunError, match=r"controlnet\.double=6: a FLUX of 19 double blocks uses only the first 5 .*set 5 or 7"
    ):
        open_stage(recipe, for_counting=True)
