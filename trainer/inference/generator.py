"""Image generation from prompts through both stages; the models are loaded once.

Legend: B images, N patch latents of width D, S and P image sides in pixels for the vision encoder and for FLUX.
"""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from ...slurm.run_folder import no_run
from ..checkpoint.state import restore_statistics
from ..checkpoint.store import Store
from ..distributed.process_group import Group
from ..errors import RunError
from ..models import latent_controlnet
from ..models.flux import FluxFolder, FluxTokenizers, FrozenFlux, Tokens
from ..models.hub import locate
from ..models.latent_controlnet import LatentControlNet
from ..models.prompt import PromptTemplate
from ..models.weights import fill
from ..stages import open_controlnet, open_patch_latents
from ..stages.patch_latents import PatchLatentModel
from ..stages.unsharded import init_context
from .flux_sampler import Sampling, Text, draw_noise, sample
from .masked_decoding import Schedule, draw_latent_noise, reveal_counts
from .mllm import decode_prompts, load_mllm
from .stored_runs import RECIPE, checkpoint_weights, stored_recipe

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """Generation settings."""

    steps: int = 16
    """Decoding steps, up to the number of patches."""
    schedule: Schedule = "cosine"
    guidance: float = 1.0
    """w of uncond + w (cond - uncond) on the patch latents; 1 skips the unconditional prompts."""
    controlnet: bool = True
    """False is a control experiment: FLUX sees only its text, and no latents are decoded."""
    empty_prompt: bool = False
    """True is a control experiment: FLUX gets the empty prompt, so that only the latents condition it."""
    flux: Sampling = field(default_factory=Sampling)
    temperature: float = 1.0
    """Standard deviation of the noise from which a flow head samples."""


@dataclass
class Generator:
    """Both stages on one device. `load` reads them from runs; a training loop can pass its own modules."""

    mllm: PatchLatentModel
    template: PromptTemplate
    image_size: int
    """S, side in pixels of the vision encoder's images."""
    flux: FrozenFlux
    controlnet: LatentControlNet
    tokenizers: FluxTokenizers
    flux_size: int
    """P, side in pixels of the generated images."""
    device: torch.device
    group: Group = field(default_factory=Group)
    """Ranks with the same models, which share the batches of `in_batches`."""

    @classmethod
    def load(
        cls,
        mllm: str | Path,
        controlnet: str | Path,
        flux: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        group: Group = Group(),
    ) -> Generator:
        """mllm: a run folder or an export of one. controlnet, flux: see `load_controlnet`.

        EMA weights are used if the run has them. Default: a GPU with bf16, else CPU with fp32. RunError names what
        cannot be used.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        stage = open_patch_latents(stored_recipe(Path(mllm), "patch-latents"))
        assert stage.tokenizer is not None
        # The smaller model first: a mismatch is found before the large ones are read.
        width, side = stage.config.text_config.hidden_size, math.isqrt(stage.tokens_per_image)
        image_generator = load_image_generator(Path(controlnet), flux, width, side, device, dtype)
        model = load_mllm(Path(mllm), stage, device, dtype)
        template = PromptTemplate(stage.tokenizer, stage.branch.max_text_tokens)
        return cls(model, template, stage.image_size, *image_generator, device, group)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings = Settings(),
        latents: Tensor | None = None,
        batch: int = 8,
        made: Callable[[int], None] = lambda count: None,
    ) -> list[Image.Image]:
        """An image per prompt and seed, independent of the rest of the batch.

        latents [B, N, D]: used instead of decoded ones. made: called with the number of images of each batch.
        """
        assert len(prompts) == len(seeds)

        def work(part: slice) -> list[Image.Image]:
            given = latents[part] if latents is not None else None
            if given is None and settings.controlnet:
                given = self.latents(prompts[part], seeds[part], settings)
            return to_images(self.render(prompts[part], seeds[part], settings, given))

        return self.in_batches(len(prompts), batch, work, made)

    def check(self, settings: Settings) -> None:
        """RunError for more decoding steps than patches, or a temperature that has no effect."""
        reveal_counts(self.mllm.branch.side**2, settings.steps, settings.schedule)
        draw_latent_noise(self.mllm.head, [], 0, settings.temperature)

    def in_batches(
        self, count: int, batch: int, work: Callable[[slice], list[T]], made: Callable[[int], None]
    ) -> list[T]:
        """The results of `work` for all slices of `batch` of `count` items, in order. Each slice is computed by one
        rank of the group; all ranks call this and get all results, which must be on the CPU.

        made: called with the numbers of items done.
        """
        rank, size, own = self.group.rank, self.group.size, []
        for start in range(rank * batch, count, batch * size):
            own.append(work(slice(start, start + batch)))
            made(min(batch * size, count - (start - rank * batch)))  # by all ranks in this turn
        shares = self.group.gather(own)
        return [item for turn in range(math.ceil(count / batch)) for item in shares[turn % size][turn // size]]

    def latents(self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings = Settings()) -> Tensor:
        """Patch latents [B, N, D] decoded from the prompts, as one batch."""
        how = settings.steps, settings.schedule, settings.guidance, settings.temperature
        return decode_prompts(self.mllm, self.template, prompts, seeds, *how)

    def decoded(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        batch: int,
        made: Callable[[int], None] = lambda count: None,
    ) -> Tensor:
        """Patch latents [B, N, D] decoded from the prompts in batches, which the ranks share; `made` as in
        `generate`."""

        def work(part: slice) -> list[Tensor]:
            return list(self.latents(prompts[part], seeds[part], settings).cpu())

        return torch.stack(self.in_batches(len(prompts), batch, work, made)).to(self.device)

    def warn_about_truncation(self, prompts: Sequence[str], settings: Settings, decoded: bool = True) -> None:
        """Warn of each prompt beyond the limit of a text model, with the tokens read and dropped: its end is ignored,
        as in training. decoded: whether the patch latents are decoded from the prompt."""
        for prompt in dict.fromkeys(prompts):
            limits = {} if settings.empty_prompt else self.tokenizers.limits(prompt)
            if settings.controlnet and decoded:
                limits["the branch's text model"] = self.template.count_tokens(prompt), self.template.max_tokens
            cut = [f"{name} reads {m} of {n} tokens ({n - m} dropped)" for name, (n, m) in limits.items() if n > m]
            if cut:
                log.warning("prompt %s is cut at its end: %s", textwrap.shorten(repr(prompt), 60), ", ".join(cut))

    def encode(self, images: Tensor) -> Tensor:
        """The vision encoder's patch latents [B, N, D] of uint8 images [B, 3, S, S]."""
        return self.mllm.backbone.patch_latents(images.to(self.device))

    @torch.no_grad()
    def render(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, latents: Tensor | None
    ) -> Tensor:
        """uint8 images [B, 3, P, P] from patch latents [B, N, D] and prompts, as one batch."""
        texts = [""] * len(prompts) if settings.empty_prompt else prompts
        tokens, channels = self.flux.folder.grid(self.flux_size) ** 2, self.flux.folder.transformer["in_channels"]
        found = sample(
            self.flux,
            self._text(texts),
            draw_noise(seeds, tokens, channels).to(self.device),
            settings.flux,
            self.controlnet if settings.controlnet else None,
            latents if settings.controlnet else None,
            self._text([""]) if settings.flux.cfg != 1 else None,
        )
        return self.flux.decode_latents(found)

    def _text(self, prompts: Sequence[str]) -> Text:
        tokens = self.tokenizers(prompts)
        return Text(*self.flux.encode_text(Tokens(tokens.t5.to(self.device), tokens.clip.to(self.device))))


def to_images(pixels: Tensor) -> list[Image.Image]:
    """RGB images of uint8 pixels [B, 3, H, W]."""
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().contiguous().numpy()]


def load_image_generator(
    path: Path, flux: str | None, width: int, side: int, device: torch.device, dtype: torch.dtype
) -> tuple[FrozenFlux, LatentControlNet, FluxTokenizers, int]:
    """The image generator for patch latents [B, side^2, width]: FLUX, ControlNet, tokenizers, image side in pixels."""
    network, folder, size = load_controlnet(path, flux, width, side, device, dtype)
    return load_flux(folder, device, dtype), network, folder.tokenizers, size


def load_flux(folder: FluxFolder, device: torch.device, dtype: torch.dtype) -> FrozenFlux:
    """All parts of a FLUX on `device`."""
    with init_context(device, dtype):
        frozen = FrozenFlux(folder)
    frozen.load()
    return frozen


def load_controlnet(
    path: Path, flux: str | None, width: int, side: int, device: torch.device, dtype: torch.dtype
) -> tuple[LatentControlNet, FluxFolder, int]:
    """The ControlNet of a stage-2 run or of a `flux_controlnet` folder, its FLUX, and the image side in pixels.

    flux: path of the FLUX; a run names its own, a `flux_controlnet` folder does not. RunError unless the ControlNet
    fits patch latents [B, side^2, width].
    """
    if (path / RECIPE).is_file():
        recipe = stored_recipe(path, "controlnet")
        assert recipe.flux is not None
        if flux:
            recipe = recipe.model_copy(update={"flux": recipe.flux.model_copy(update={"path": flux, "revision": None})})
        stage = open_controlnet(recipe)
        shape, folder, size = stage.shape, stage.folder, stage.flux.image_size
        source = trained = checkpoint_weights(path)
    else:
        shape, source = latent_controlnet.read_config(path)
        if flux is None:
            raise RunError(f"{path}: names no FLUX; give the one it was trained on, such as --flux FOLDER")
        folder = FluxFolder.open(locate(flux, None, "--flux", "*/*.safetensors"))
        size = 2 * folder.stride * {"up": 2 * side, "none": side, "down": side // 2}[shape.resampling]
        trained = None
    shape.require(folder.transformer, width, side, folder.grid(size))
    with init_context(device, dtype):
        network = LatentControlNet(shape).eval().requires_grad_(False)
    if trained is None:
        network.load(source, path)
        return network, folder, size
    prefix = "controlnet."
    fill({prefix + name: parameter for name, parameter in network.named_parameters()}, source, path)
    statistics = {prefix + name: buffer for name, buffer in network.statistics().items()}
    restore_statistics(statistics, trained.reader, trained.slot)
    return network, folder, size


def base_folder(path: Path) -> Path:
    """The folder of the MLLM that the stage-1 run, or export of one, at `path` was trained from."""
    backbone = stored_recipe(path, "patch-latents").backbone
    return locate(backbone.path, backbone.revision)


def origin(path: Path) -> str:
    """An identifier of the weights at `path`: the resolved path, and the newest step of a run."""
    if not path.is_dir():
        raise RunError(no_run(path, RECIPE))
    steps = Store(path / "checkpoints").steps()
    return f"{path.resolve()}{f' step {steps[-1]}' if steps else ''}"
