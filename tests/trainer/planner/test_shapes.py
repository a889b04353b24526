"""Shapes from settings against the modules built from them, and what of a model's configs is refused."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bifrost.recipes import FOLDER, load_recipe
from bifrost.recipes.schema import Recipe
from bifrost.trainer.errors import RunError
from bifrost.trainer.models.backbone_config import read_shape
from bifrost.trainer.models.controlnet_config import ControlNetConfig
from bifrost.trainer.models.flux import FluxFolder, FluxTokenizers
from bifrost.trainer.models.flux_config import PARTS, FluxConfig
from bifrost.trainer.models.hub import locate
from bifrost.trainer.models.latent_controlnet import LatentControlNet
from bifrost.trainer.planner import flux_shapes, open_model, parts, shapes
from bifrost.trainer.planner.parameters import named_parameters
from bifrost.trainer.planner.shapes import Weight
from bifrost.trainer.stages import open_stage

RECIPES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
PRODUCTS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Conv3d)


def built(module: nn.Module) -> list[Weight]:
    """The parameters of a module in order; of the run's precision are all but integers."""
    products = {f"{name}.weight".lstrip(".") for name, m in module.named_modules() if isinstance(m, PRODUCTS)}
    products |= {name for name, _ in module.named_parameters() if name.endswith(("lora_A", "lora_B"))}
    return [
        Weight(name, tuple(p.shape), name in products, None if p.is_floating_point() else p.element_size())
        for name, p in module.named_parameters()
    ]


def equal(described: Iterable[Weight], module: nn.Module) -> None:
    assert list(described) == built(module)


def check(recipe: Recipe) -> None:
    """Every part of the recipe's model has the described parameters; the plan has their sizes."""
    stage: Any = open_stage(recipe, for_counting=True)
    with torch.device("meta"):
        model: Any = stage.build()
    native = recipe.stage == "controlnet" or recipe.branch.targets == "native"
    encoder = model.backbone.vision if native else model.targets.encoder
    if native:
        equal(shapes.vision_encoder(stage.config.vision_config), model.backbone.vision)
    if recipe.stage == "patch-latents":
        text, side = stage.config.text_config, model.branch.side
        equal(shapes.text_model(text, recipe.backbone.weights), model.backbone.text)
        equal(shapes.branch(text, side, recipe.branch), model.branch)
        equal(shapes.head(text.hidden_size, recipe.branch), model.head)
        modules = [encoder, model.backbone.text, model.branch, model.head]
    else:
        for part in PARTS:
            equal(flux_shapes.flux_part(stage.folder, part), getattr(model.flux, part))
        equal(flux_shapes.bridge(stage.shape), model.controlnet)
        flux = model.flux
        modules = [model.backbone.vision, flux.vae, flux.text_encoder_2, flux.text_encoder, flux.transformer]
        modules.append(model.controlnet)
    whole = named_parameters(open_model(recipe))
    shaped = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    assert list(whole.trained.items()) == shaped
    shaped = [(name, tuple(p.shape)) for name, p in model.named_parameters() if not p.requires_grad]
    assert list(whole.frozen.items()) == shaped
    planned = [part for part in parts(recipe) if not part.shared]
    assert [part.parameters for part in planned] == [tuple(p.numel() for p in m.parameters()) for m in modules]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for part, module in zip(planned, modules, strict=True):
        assert all(p.requires_grad == (part.gradient == "trained") for p in module.parameters())
    assert sum(p.numel() for name, p in model.named_parameters() if name in trained) == sum(
        part.size for part in planned if part.gradient == "trained"
    )


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_have_the_described_shapes(name: str) -> None:
    check(load_recipe(name))


@pytest.mark.parametrize("setting", ["tiny-mllm backbone.weights=int8", "tiny-controlnet flux.weights=fp8"])
def test_weights_in_8_bits_are_counted_as_such(setting: str) -> None:
    name, override = setting.split()
    recipe = load_recipe(name, [override])
    check(recipe)
    narrow, wide = parts(recipe), parts(load_recipe(name))
    (changed,) = [(one, other) for one, other in zip(narrow, wide, strict=True) if one != other]
    sizes = [sum(size * width for size, width in part.stored(2)) for part in changed]
    assert 0.5 < sizes[0] / sizes[1] < 0.8  # embeddings and norms are not quantized
    assert changed[0].linear == changed[1].linear


def test_vae_targets_have_the_described_shapes() -> None:
    check(load_recipe("tiny-mllm", ["branch.targets=vae", "flux.path=builtin:tiny-flux", "flux.image_size=64"]))
    check(load_recipe("mllm-7b", ["branch.targets=vae", "flux.path=black-forest-labs/FLUX.1-dev"]))


def test_targets_of_another_encoder_have_the_described_shapes() -> None:
    check(load_recipe("mllm-3b", ["branch.targets=encoder", "branch.encoder=Qwen/Qwen2.5-VL-7B-Instruct"]))


@pytest.mark.parametrize("name", ["tiny-controlnet", "flux-controlnet"])
def test_bridges_have_the_described_shapes(name: str) -> None:
    check(load_recipe(name, ["controlnet.bridge=queries", "controlnet.connector={queries: 5, layers: 2}"]))
    check(load_recipe(name, ["controlnet.bridge=queries", "controlnet.connector.width=96"]))
    check(load_recipe(name, ["controlnet.bridge=cross_attention"]))


def test_a_flow_head_has_the_described_shapes() -> None:
    for width in ("null", "96"):
        check(load_recipe("tiny-mllm", [f"branch={{head: flow, flow_head: {{layers: 2, width: {width}}}}}"]))


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_a_branch_of_fewer_layers_has_the_described_shapes(layers: int) -> None:
    recipe = load_recipe("tiny-mllm", [f"branch.layers={layers}"])
    check(recipe)
    own, whole = ({part.name: part for part in parts(one)} for one in (recipe, load_recipe("tiny-mllm")))
    assert own["text prefix"] == whole["text prefix"], "the last layer is attended to"
    share = own["generation branch"].linear / whole["generation branch"].linear
    assert share == layers / 4 == own["generation branch"].attention / whole["generation branch"].attention


@pytest.mark.parametrize("settings", [(), ("branch.lora.targets=[up_proj, q_proj]", "branch.layers=3")])
@pytest.mark.parametrize("held", ["bf16", "int8"])
def test_low_rank_pairs_share_the_described_weights(settings: tuple[str, ...], held: str) -> None:
    recipe = load_recipe("tiny-mllm", ["branch.weights=lora", f"backbone.weights={held}", *settings])
    check(recipe)
    (shared,) = (part for part in parts(recipe) if part.shared)
    stage: Any = open_stage(recipe, for_counting=True)
    with torch.device("meta"):
        model: Any = stage.build()
    used = [m.base for m in model.branch.modules() if hasattr(m, "base")]
    assert sorted(shared.parameters) == sorted(p.numel() for base in used for p in base.parameters())
    assert sum(size * width for size, width in shared.stored(4)) == sum(
        p.numel() * p.element_size() for base in used for p in base.parameters()
    )
    assert shared.size == 0, "they are the text model's"


def changed(source: Path, folder: Path, **settings: Any) -> Path:
    """A copy of the config `source` in `folder`, with other settings; None removes one."""
    config = json.loads(source.read_text())
    for name, value in settings.items():
        owner = config
        *groups, last = name.split("__")
        for group in groups:
            owner = owner[group]
        owner.pop(last, None)
        if value is not None:
            owner[last] = value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"text_config__num_key_value_heads": 6, "text_config__num_hidden_layers": 1, "text_config__layer_types": None},
        {"vision_config__depth": 1, "vision_config__spatial_merge_size": 1, "vision_config__in_channels": 3},
        {"vision_config__num_heads": None, "vision_config__num_attention_heads": 2, "text_config__vocab_size": None},
    ],
)
def test_backbones_of_other_shapes(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = changed(locate("builtin:tiny") / "config.json", tmp_path, **settings)
    for positions in ("learned", "mrope", "interleaved"):
        check(load_recipe("tiny-mllm", [f"backbone.path={folder}", f"branch.positions={positions}"]))


def test_flat_and_empty_configs_have_the_librarys_defaults(tmp_path: Path) -> None:
    from bifrost.trainer.models.backbone import read_config

    for stated in (
        {},
        {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": None, "vision_config": {}},
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", **stated}))
        ours, theirs = read_shape(tmp_path), read_config(tmp_path)
        for group in ("text_config", "vision_config"):
            for name in type(getattr(ours, group)).model_fields:
                own, other = getattr(getattr(ours, group), name), getattr(getattr(theirs, group), name)
                assert own == (list(other) if isinstance(other, tuple) else other), name


def flux_copy(folder: Path, part: str, **settings: Any) -> Path:
    """The tiny FLUX's configs, with other settings in one part."""
    source = locate("builtin:tiny-flux", None, "flux.path", "*")
    for each in PARTS:
        changed(source / each / "config.json", folder / each, **(settings if each == part else {}))
    return folder


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("transformer", {"guidance_embeds": False, "out_channels": 32, "patch_size": 2}),
        ("transformer", {"guidance_embeds": None, "num_layers": 0, "num_single_layers": 1}),
        ("transformer", {"attention_head_dim": None, "num_attention_heads": None, "axes_dims_rope": None}),
        ("vae", {"use_quant_conv": True, "use_post_quant_conv": None, "mid_block_add_attention": None}),
        (
            "vae",
            {
                "block_out_channels": [8, 16, 16],
                "down_block_types": 3 * ["DownEncoderBlock2D"],
                "up_block_types": 3 * ["UpDecoderBlock2D"],
                "layers_per_block": 2,
                "out_channels": 5,
            },
        ),
        ("text_encoder", {"num_hidden_layers": 1, "intermediate_size": None, "max_position_embeddings": None}),
        ("text_encoder_2", {"feed_forward_proj": "relu", "is_gated_act": None, "num_layers": 1, "d_ff": None}),
        ("text_encoder_2", {"feed_forward_proj": "relu"}),
        ("text_encoder_2", {"feed_forward_proj": None, "is_gated_act": None, "d_kv": 16}),
        ("text_encoder_2", {"relative_attention_num_buckets": 8}),
    ],
)
def test_flux_parts_of_other_shapes(tmp_path: Path, part: Any, settings: dict[str, Any]) -> None:
    folder = FluxFolder.open(flux_copy(tmp_path, part, **settings), for_counting=True)
    with torch.device("meta"):
        equal(flux_shapes.flux_part(folder, part), folder.build(part))


@pytest.mark.parametrize("grids", [(4, 8), (4, 4), (8, 4)])
@pytest.mark.parametrize(("double", "single", "norm"), [(2, 4, "batch"), (0, 1, "group"), (1, 0, "batch")])
def test_controlnets_of_other_shapes(grids: tuple[int, int], double: int, single: int, norm: Any) -> None:
    folder = FluxConfig.open(locate("builtin:tiny-flux", None, "flux.path", "*"))
    shape = ControlNetConfig.of(folder.transformer, 24, *grids, double, single, norm)
    with torch.device("meta"):
        equal(flux_shapes.controlnet(shape), LatentControlNet(shape))


@pytest.mark.parametrize("targets", ["[attention, embedders]", "[mlp, modulation]"])
@pytest.mark.parametrize("held", ["bf16", "int8"])
def test_a_controlnet_with_pairs_shares_the_described_weights(targets: str, held: str) -> None:
    settings = ["controlnet.weights=lora", f"controlnet.lora.targets={targets}", f"flux.weights={held}"]
    recipe = load_recipe("tiny-controlnet", settings)
    check(recipe)
    (shared,) = (part for part in parts(recipe) if part.shared)
    stage: Any = open_stage(recipe, for_counting=True)
    with torch.device("meta"):
        model: Any = stage.build()
    used = [m.base for m in model.controlnet.modules() if hasattr(m, "base")]
    assert sorted(shared.parameters) == sorted(p.numel() for base in used for p in base.parameters())


def test_prompts_have_the_tokenizers_lengths() -> None:
    folder = FluxFolder.open(locate("builtin:tiny-flux", None, "flux.path", "*"))
    tokenizers = FluxTokenizers(folder)
    assert folder.text_lengths == (tokenizers.t5.model_max_length, tokenizers.clip.model_max_length) == (48, 32)
    assert FluxConfig.open(FOLDER / "architectures/black-forest-labs/FLUX.1-dev").text_lengths == (512, 77)


@pytest.mark.parametrize(
    ("part", "settings", "words"),
    [
        ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"]}, "expected 1 x DownEncoderBlock2D"),
        (
            "text_encoder",
            {"hidden_size": "wide"},
            r"text_encoder/config\.json: not a valid CLIP config \(hidden",
        ),
        ("text_encoder", {"num_attention_heads": 5}, "5 heads do not divide hidden_size 128"),
        ("text_encoder_2", {"feed_forward_proj": "gated-gelu-new"}, "T5 config .feed_forward_proj: "),
        ("text_encoder_2", {"d_ff": 1.5}, r"text_encoder_2/config\.json: not a valid T5 config \(d_ff: "),
    ],
)
def test_flux_configs_that_cannot_be_counted_are_one_line(
    tmp_path: Path, part: str, settings: dict[str, Any], words: str
) -> None:
    path = flux_copy(tmp_path, part, **settings)
    with pytest.raises(RunError, match=words) as error:
        parts(load_recipe("tiny-controlnet", [f"flux.path={path}"]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"text_config": 3}, r"not a valid Qwen2\.5-VL config \(text_config: .*not an object"),
        ({"text_config__hidden_size": "wide"}, r"config \(text_config\.hidden_size: "),
        ({"vision_config__patch_size": 0}, r"config \(vision_config\.patch_size: "),
        ({"text_config__num_attention_heads": 5}, "5 heads do not divide hidden_size 192"),
        ({"model_type": "qwen3_vl"}, "model_type is qwen3_vl"),
    ],
)
def test_backbones_that_cannot_be_counted_are_one_line(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    folder = changed(locate("builtin:tiny") / "config.json", tmp_path, **settings)
    with pytest.raises(RunError, match=words) as error:
        parts(load_recipe("tiny-mllm", [f"backbone.path={folder}"]))
    assert "\n" not in str(error.value)
