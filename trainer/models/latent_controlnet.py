"""The latent ControlNet: a trainable copy of FLUX's first blocks, conditioned on patch latents.

diffusers' FLUX ControlNet, except that its condition is [B, N, D] patch latents, resampled to FLUX's token grid.
Names and folder layout are those of the public release's `flux_controlnet`.

Legend: B samples, N patch latents of width D, M packed FLUX tokens of C channels, L text tokens of width E, P pooled
text width, H FLUX's hidden width.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from torch import Tensor, nn

from ..errors import RunError
from . import weights
from .flux_blocks import use_own_blocks
from .flux_transformer import embed, run_block
from .resampler import DownsamplingBlock, Norm, Resampling, UpsamplingBlock, on_grid, resampling

_SHARED = (
    "patch_size",
    "in_channels",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "axes_dims_rope",
)
"""Settings that the ControlNet inherits from its FLUX."""
_BLOCKS: dict[Resampling, str] = {"up": "up_sampling_block", "down": "down_sampling_block"}
_ZERO = "controlnet_"
"""Name prefix of all zero-initialised tensors: the projections of the condition and of the residuals."""


class Residuals(NamedTuple):
    """Residuals that FLUX adds, [B, M, H] each, in order of the groups of double and of single blocks."""

    double: tuple[Tensor, ...]
    single: tuple[Tensor, ...]


@dataclass(frozen=True)
class ControlNetConfig:
    """Shape of a latent ControlNet. flux: settings inherited from its FLUX; double, single: copied blocks."""

    flux: Mapping[str, Any]
    latent_width: int
    resampling: Resampling
    double: int = 4
    single: int = 1
    norm: Norm = "batch"

    @classmethod
    def of(
        cls,
        transformer: Mapping[str, Any],
        latent_width: int,
        grid_in: int,
        grid_out: int,
        double: int = 4,
        single: int = 1,
        norm: Norm = "batch",
    ) -> ControlNetConfig:
        """The shape for a FLUX transformer and patch latents [B, grid_in^2, latent_width]; RunError if none fits."""
        for kind, wanted, there in (
            ("double", double, transformer["num_layers"]),
            ("single", single, transformer["num_single_layers"]),
        ):
            if not 0 <= wanted <= there:
                raise RunError(f"a ControlNet of {wanted} {kind} blocks: this FLUX has {there} to copy from")
        if double + single == 0:
            raise RunError("a ControlNet of 0 double and 0 single blocks has no effect: give it at least one")
        shared = {name: transformer[name] for name in _SHARED if name in transformer}
        return cls(shared, latent_width, resampling(grid_in, grid_out), double, single, norm)

    def require_use(self, transformer: Mapping[str, Any]) -> None:
        """RunError if this FLUX ignores some of the residuals: their blocks would never learn."""
        for kind, count, blocks in (
            ("double", self.double, transformer["num_layers"]),
            ("single", self.single, transformer["num_single_layers"]),
        ):
            if count and (added := residuals_added(count, blocks)) < count:
                fits = [n for n in range(1, blocks + 1) if residuals_added(n, blocks) == n]
                near = [max(n for n in fits if n < count), min(n for n in fits if n > count)]
                raise RunError(
                    f"controlnet.{kind}={count}: a FLUX of {blocks} {kind} blocks uses only the first {added}"
                    f" residuals, the other blocks would never learn; set {near[0]} or {near[1]}"
                )

    def public(self) -> dict[str, Any]:
        """`config.json` of a `flux_controlnet` folder. Width, resampling and norm follow from the weights."""
        return {
            "_class_name": "FluxControlNetModel",
            "_diffusers_version": diffusers.__version__,
            **self.flux,
            "num_layers": self.double,
            "num_single_layers": self.single,
            "num_mode": None,
            "conditioning_embedding_channels": None,
        }

    def require(self, transformer: Mapping[str, Any], latent_width: int, grid_in: int, grid_out: int) -> None:
        """RunError unless this ControlNet fits these latents and this FLUX."""
        if latent_width != self.latent_width:
            raise RunError(
                f"the ControlNet expects patch latents of width {self.latent_width}, this MLLM has {latent_width}:"
                " use the ControlNet that was trained with it"
            )
        wanted = resampling(grid_in, grid_out)
        if wanted != self.resampling:
            raise RunError(
                f"the ControlNet resamples patch latents by '{self.resampling}', but {grid_in} x {grid_in} latents and"
                f" {grid_out} x {grid_out} FLUX tokens need '{wanted}': change the image sizes"
            )
        for name, value in self.flux.items():
            there = transformer.get(name, value)
            if _plain(there) != _plain(value):
                raise RunError(f"the ControlNet was trained for a FLUX with {name} {value}, this one has {there}")


def residuals_added(count: int, blocks: int) -> int:
    """How many of `count` residuals a FLUX of `blocks` blocks adds: number i // ceil(blocks / count) after block i, as
    in diffusers' FluxTransformer2DModel."""
    return (blocks - 1) // math.ceil(blocks / count) + 1


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class LatentControlNet(FluxControlNetModel):
    """Residuals for FLUX from patch latents. `initialise` or `load` fills the weights after construction.

    With `enable_gradient_checkpointing()` the backward pass recomputes every block.
    """

    def __init__(self, shape: ControlNetConfig) -> None:
        settings = {name: value for name, value in shape.public().items() if not name.startswith("_")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # a moved import in diffusers itself
            super().__init__(**settings)
        self.shape = shape
        width = shape.latent_width
        self.controlnet_x_embedder = nn.Linear(width, self.inner_dim)
        if shape.resampling == "up":
            self.up_sampling_block = UpsamplingBlock(width, shape.norm)
        elif shape.resampling == "down":
            self.down_sampling_block = DownsamplingBlock(width, shape.norm)
        use_own_blocks(self)

    def resample(self, latents: Tensor) -> Tensor:
        """Patch latents [B, N, D] on FLUX's token grid, [B, M, D]."""
        if self.shape.resampling == "none":
            return latents
        return on_grid(getattr(self, _BLOCKS[self.shape.resampling]), latents)

    def forward(  # type: ignore[override]
        self,
        noisy: Tensor,
        patch_latents: Tensor,
        text: Tensor,
        pooled: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        img_ids: Tensor,
        txt_ids: Tensor,
        scale: float = 1.0,
    ) -> Residuals:
        """Residuals for noisy packed latents [B, M, C] at timestep [B] in [0, 1], times `scale`.

        patch_latents [B, N, D], text [B, L, E], pooled [B, P], img_ids [M, 3], txt_ids [L, 3]; guidance [B] for a
        FLUX that takes one, else None.
        """
        dtype = self.x_embedder.weight.dtype
        condition = self.controlnet_x_embedder(self.resample(patch_latents.to(dtype)))
        rest = text.to(dtype), pooled.to(dtype), timestep, guidance, img_ids, txt_ids
        text, image, level, rotation = embed(self, self.x_embedder(noisy.to(dtype)) + condition, *rest)
        double, single = [], []
        for block, project in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            text, image = run_block(self, block, text, image, level, rotation)
            double.append(project(image))
        hidden, tokens = torch.cat((text, image), dim=1), image.shape[1]
        blocks: Any = self.single_transformer_blocks
        for block, project in zip(blocks, self.controlnet_single_blocks, strict=True):
            last = {"image": tokens} if block is blocks[-1] else {}
            hidden = run_block(self, block, hidden, level, rotation, **last)
            single.append(project(hidden if last else hidden[:, -tokens:]))
        return Residuals(*(tuple(x if scale == 1 else x * scale for x in part) for part in (double, single)))

    def statistics(self) -> dict[str, Tensor]:
        """Name -> buffer that training updates in addition to the weights: BatchNorm's running statistics."""
        return dict(self.named_buffers())

    def copied_names(self) -> dict[str, str]:
        """Parameter -> FLUX transformer's parameter that initialises it."""
        fresh = (_ZERO, *_BLOCKS.values())
        return {name: name for name, _ in self.named_parameters() if not name.startswith(fresh)}

    def initialise(self, flux: weights.Source, where: object, seed: int) -> None:
        """Copy FLUX's first blocks and embeddings from `flux`, zero the projections, initialise the rest as torch does.

        flux: a FLUX transformer's weights under their own names; `where` names them in errors.
        """
        parameters = dict(self.named_parameters())
        copied = self.copied_names()
        weights.fill({theirs: parameters.pop(ours) for ours, theirs in copied.items()}, flux, where)
        zero = {name: parameters.pop(name) for name in list(parameters) if name.startswith(_ZERO)}
        weights.fill(zero, _Constants({n: (weights.full_shape(p), 0.0) for n, p in zero.items()}), "zeros")
        norms = {name: parameters.pop(name) for name in list(parameters) if name.split(".")[1].startswith("bn")}
        ones = {n: (weights.full_shape(p), float(n.endswith("weight"))) for n, p in norms.items()}
        weights.fill(norms, _Constants(ones), "norms")
        fans = {n.rpartition(".")[0]: weights.full_shape(p) for n, p in parameters.items() if n.endswith("weight")}
        drawn = {n: _as_torch(weights.full_shape(p), fans[n.rpartition(".")[0]]) for n, p in parameters.items()}
        weights.fill(parameters, weights.RandomInit(seed, drawn), "initial weights")

    def load(self, source: weights.Source, where: object) -> None:
        """Load all weights and running statistics from a ControlNet in the public layout."""
        tensors: dict[str, Any] = {**dict(self.named_parameters()), **self.statistics()}
        weights.fill(tensors, source, where)


def _as_torch(shape: tuple[int, ...], weight: tuple[int, ...]) -> weights.Distribution:
    """torch's initialisation of a convolution: uniform in +-1 / sqrt(fan in), with the fan in counted on axis 1."""
    return weights.Distribution(shape, "uniform", (weight[1] * weight[2] * weight[3]) ** -0.5)


class _Constants:
    """A source of constant weights: name -> (shape, value)."""

    def __init__(self, tensors: Mapping[str, tuple[tuple[int, ...], float]]) -> None:
        self.tensors = tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.tensors[name][0] if name in self.tensors else None

    def flat(self, name: str, lo: int, hi: int) -> Tensor:
        return torch.full((hi - lo,), self.tensors[name][1])


def read_config(folder: Path) -> tuple[ControlNetConfig, weights.WeightFiles]:
    """Shape and weights of a `flux_controlnet` folder; RunError for any other folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise RunError(f"{folder}: no config.json; give a folder with a FLUX ControlNet, such as `flux_controlnet`")
    settings = weights.read_json(file)
    if settings.get("_class_name") != "FluxControlNetModel":
        raise RunError(f"{file}: _class_name is {settings.get('_class_name')}, expected FluxControlNetModel")
    for name in ("num_mode", "conditioning_embedding_channels"):
        if settings.get(name) is not None:
            raise RunError(f"{file}: {name} is {settings[name]}; a latent ControlNet has none")
    files = weights.WeightFiles(folder)
    projection = files.shape("controlnet_x_embedder.weight")
    if projection is None:
        raise RunError(f"{folder}: controlnet_x_embedder.weight is missing; is it complete?")
    prefixes: list[Resampling] = [kind for kind, name in _BLOCKS.items() if files.shape(f"{name}.conv.weight")]
    kind: Resampling = prefixes[0] if prefixes else "none"
    batch = kind == "none" or files.shape(f"{_BLOCKS[kind]}.bn1.running_mean") is not None
    if missing := [name for name in ("num_layers", "num_single_layers", *_SHARED) if name not in settings]:
        raise RunError(f"{file}: {', '.join(missing)} missing; fetch it again")
    double, single = settings["num_layers"], settings["num_single_layers"]
    shared = {name: settings[name] for name in _SHARED}
    return ControlNetConfig(shared, projection[1], kind, double, single, "batch" if batch else "group"), files


def write_config(folder: Path, config: ControlNetConfig) -> None:
    """Write `config.json` of a `flux_controlnet` folder; creates the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.public(), indent=2) + "\n")
