"""Both stages as a pipeline of diffusers: a face of the generator, whose images are those of `bifrost generate`.

Legend: B images of H x W pixels, M packed FLUX tokens of C channels, N patch latents of width D, c x h x w latents of
FLUX.
"""

from __future__ import annotations

from ..models import libraries  # noqa: F401  # isort: skip

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from ...recipes import explain
from ...recipes.data import Buckets
from ...recipes.schema import Flux
from ..errors import RunError
from ..models.flux import PARTS, FluxFolder, FrozenFlux
from ..models.hub import locate
from ..models.image_grids import rule_of, square_grid
from ..stages.unsharded import init_context
from .flux_sampler import OnStep
from .generator import Generator, to_images
from .masked_decoding import Schedule
from .pipeline_arguments import prompts_of, replaced, require_patch_latents, seeds_of, shape_of, sources_of
from .pipeline_folder import MLLM, open_folder
from .pipeline_parts import ControlNet, PatchLatentDecoder
from .settings import Sampling, Settings

T = TypeVar("T", bound=BaseModel)
OutputType = Literal["pil", "np", "pt", "latent"]
Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], "dict[str, Tensor] | None"]
_OF_THE_HUB = ("cache_dir", "token", "local_files_only", "force_download", "proxies", "variant", "custom_pipeline")
_HUB_HINT = "set the hub client's own variables, such as HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, instead"


class BifrostPipeline(DiffusionPipeline):
    """Prompts to images through both stages. `from_pretrained` loads what `bifrost export --format pipeline` wrote.

    Parts of FLUX that are not given are read from the frozen model that `flux` names, a mapping of the recipe's keys
    `path`, `revision`, `image_size`, `text_tokens` and `weights`, in the precision and on the device of the ControlNet.
    `buckets`: those of the recipe, if the ControlNet was trained in aspect-ratio buckets. RunError names what cannot be
    used.
    """

    model_cpu_offload_seq = "mllm->text_encoder_2->text_encoder->transformer->vae"
    _optional_components = list(PARTS)  # noqa: RUF012  (diffusers declares it as an instance's)

    def __init__(
        self,
        mllm: PatchLatentDecoder,
        controlnet: ControlNet,
        transformer: nn.Module | None = None,
        vae: nn.Module | None = None,
        text_encoder: nn.Module | None = None,
        text_encoder_2: nn.Module | None = None,
        flux: dict | None = None,
        buckets: dict | None = None,
    ) -> None:
        super().__init__()
        settings = _stated_settings("flux", flux, Flux)
        try:
            place = locate(settings.path, settings.revision, "flux.path", "*/*.safetensors")
            folder = FluxFolder.open(place, settings.weights, settings.text_tokens)
        except RunError as error:
            raise RunError(f"{error}; or pass flux=FOLDER_OR_HUB_ID") from error
        tokens = folder.grid(settings.image_size)
        controlnet.shape.require(folder.transformer, mllm.width, mllm.side, tokens)
        rule = None
        if buckets is not None:
            sizes = mllm.decoder.image_size, square_grid(mllm.side, tokens), settings.image_size
            rule = rule_of(_stated_settings("buckets", buckets, Buckets), *sizes)
        given = dict(zip(PARTS, (transformer, vae, text_encoder, text_encoder_2), strict=True))
        with init_context(controlnet.device, controlnet.dtype):
            frozen = FrozenFlux(folder, [part for part in PARTS if given[part] is None])
        frozen.load()
        parts = {part: getattr(frozen, part) if module is None else module for part, module in given.items()}
        self.register_modules(mllm=mllm, controlnet=controlnet, **parts)
        self.register_to_config(flux=settings.model_dump(mode="json", include=set(flux or ())), buckets=buckets)
        self._frozen, self._image_size, self._rule, self._interrupt = frozen, settings.image_size, rule, False

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        backbone: str | None = None,
        flux: str | None = None,
        **options: Any,
    ) -> BifrostPipeline:
        """Load a pipeline folder, or that of a hub id; every file of weights is compared with its hash.

        backbone, flux: folder or hub id of the frozen models, if they are elsewhere than the folder states.
        options: those of `DiffusionPipeline.from_pretrained` that apply, such as `dtype` (default fp32),
        `revision`, `device_map="cuda"`, or a component of the pipeline. RunError names what cannot be used.
        """
        if asked := [name for name in _OF_THE_HUB if options.get(name)]:
            raise RunError(f"{asked[0]} does not apply to a pipeline of Bifrost; {_HUB_HINT}")
        if options.get("device_map") == "balanced":
            raise RunError("device_map=balanced: give one device, such as cuda, or call enable_model_cpu_offload()")
        dtype = options.get("dtype") or options.get("torch_dtype")
        if isinstance(dtype, dict):
            raise RunError("dtype: give one for all parts; a part that you load yourself can have its own")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise RunError(f"dtype={dtype!r}: give torch.float32, torch.bfloat16 or torch.float16")
        folder, index = open_folder(pretrained_model_name_or_path, options.pop("revision", None))
        if backbone is not None:
            loaded = {"torch_dtype": dtype, "device_map": options.get("device_map"), "backbone": backbone}
            options["mllm"] = PatchLatentDecoder.from_pretrained(folder / MLLM, **loaded)
        if flux is not None:
            options["flux"] = {**_stated(index, folder), "path": flux, "revision": None}
        if options.get("device_map") is None:
            options["low_cpu_mem_usage"] = False  # no part uses it, and diffusers warns where accelerate is missing
        return super().from_pretrained(str(folder), **options)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        steps: int = 16,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
        *,
        height: int | None = None,
        width: int | None = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_images_per_prompt: int = 1,
        patch_latents: Tensor | None = None,
        empty_prompt: bool = False,
        schedule: Schedule = "cosine",
        latent_guidance_scale: float = 1.0,
        temperature: float = 1.0,
        true_cfg_scale: float = 1.0,
        controlnet_conditioning_scale: float = 0.7,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Images of prompts, as one batch; those of a prompt next to each other. RunError names a wrong argument.

        steps: of decoding the patch latents, up to their number. num_inference_steps, guidance_scale: of FLUX.
        height, width: of the images in pixels, a shape that both stages were trained in; default the square.
        image: a source image, one for all prompts or one for each, which the prompts are instructions to edit; if stage
        1 was trained on editing pairs. empty_prompt: FLUX reads no text, so that the latents alone condition it.
        seed: the images of a prompt have seed, seed + 1, …, and are those of `bifrost generate --seed`. Otherwise each
        image's seed is drawn from `generator`, or from its own of a list, or from torch's default generator.
        patch_latents [B, N, D]: used instead of decoded ones. schedule, temperature: of the decoding.
        latent_guidance_scale, true_cfg_scale: classifier-free guidance of the latents and of FLUX's text; 1 is none.
        output_type: PIL images; `np` [B, H, W, 3] or `pt` [B, 3, H, W], fp32 in [0, 1]; `latent`, [B, c, h, w].
        callback_on_step_end: called after each step of FLUX with the pipeline, the step, its timestep and
        {"latents": [B, M, C]}; may return other latents in such a dictionary, or set `_interrupt` of the pipeline, as
        in diffusers, to end the steps.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise RunError(f"output_type={output_type!r}: give pil, np, pt or latent")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise RunError("callback_on_step_end: give a function, as docs/pipeline.md shows")
        if unknown := set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise RunError(f"callback_on_step_end_tensor_inputs: {min(unknown)!r} is unknown; there is 'latents'")
        prompts = prompts_of(prompt, num_images_per_prompt)
        seeds = seeds_of(len(prompts), num_images_per_prompt, seed, generator)
        sampling = Sampling(num_inference_steps, guidance_scale, controlnet_conditioning_scale, true_cfg_scale)
        shape = shape_of(height, width, self._image_size)
        decoding: dict[str, Any] = {"steps": steps, "schedule": schedule, "guidance": latent_guidance_scale}
        settings = Settings(**decoding, empty_prompt=empty_prompt, flux=sampling, temperature=temperature, shape=shape)
        made = self._generator()
        sources = None
        if patch_latents is None:
            made.check(settings, image is not None)
            read = partial(made.source_image, settings=settings)
            sources = sources_of(image, len(prompts), num_images_per_prompt, read)
        else:
            require_patch_latents(patch_latents, image, (len(prompts), math.prod(made.grid(settings)), self.mllm.width))
        made.warn_about_truncation(prompts, settings, patch_latents is None, image is not None)
        self._interrupt = False
        if patch_latents is None:
            patch_latents = self.mllm(prompts, seeds, settings, made.grid(settings), sources)
        assert patch_latents is not None
        with self.progress_bar(total=num_inference_steps) as bar:  # type: ignore[call-arg]
            after = self._after_step(callback_on_step_end, bar.update)
            images: Any = made.sample(prompts, seeds, settings, patch_latents.to(made.device), after)
        if output_type != "latent":
            images = _converted(made.flux.decode_latents(images), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def to(self, *args: Any, **options: Any) -> BifrostPipeline:
        """Move the pipeline to a device. RunError for another precision: norms' statistics and rotary tables stay fp32,
        and 8-bit weights stay 8-bit, which a conversion would not know."""
        asked = [*args, options.pop("dtype", None), options.pop("torch_dtype", None)]
        if other := [each for each in asked if isinstance(each, torch.dtype) and each != self.dtype]:
            raise RunError(f"the pipeline is {self.dtype}: load it with from_pretrained(…, dtype={other[0]})")
        return super().to(*(each for each in args if not isinstance(each, torch.dtype)), **options)

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """RunError: a pipeline is written from the runs themselves, or its folder is copied."""
        raise RunError("copy the folder of the pipeline, or write one with `bifrost export --format pipeline`")

    def enable_sequential_cpu_offload(self, *args: Any, **options: Any) -> None:
        """RunError: stage 1 reads weights outside of the modules that would be moved."""
        raise RunError("call enable_model_cpu_offload() instead, which moves one part at a time")

    def _generator(self) -> Generator:
        for part in PARTS:  # the user may have replaced one
            setattr(self._frozen, part, getattr(self, part))
        decoder = {**vars(self.mllm.decoder), "device": self._execution_device}
        tokenizers = self._frozen.folder.tokenizers
        rest = {"controlnet": self.controlnet, "tokenizers": tokenizers, "flux_size": self._image_size}
        return Generator(**decoder, flux=self._frozen, **rest, rule=self._rule)

    def _after_step(self, callback: Callback | None, update: Callable[[], Any]) -> OnStep:
        def after(step: int, level: float, latents: Tensor) -> Tensor | None:
            update()
            if callback is not None:
                changed = callback(self, step, torch.tensor(1000 * level), {"latents": latents})
                latents = replaced(changed, latents)
            return None if self._interrupt else latents

        return after


def _stated(index: dict[str, Any], where: Path) -> dict[str, Any]:
    stated = index.get("flux")
    if not isinstance(stated, dict):
        raise RunError(f"{where}: model_index.json names no flux; export the pipeline again")
    return stated


def _stated_settings(name: str, stated: Any, section: type[T]) -> T:
    """A section of the recipe that `model_index.json` has under `name`."""
    if not isinstance(stated, dict):
        raise RunError(f"{name}: give a mapping of settings of the recipe, such as model_index.json has")
    try:
        return section.model_validate(stated)
    except ValidationError as error:
        raise RunError(f"{name}: {explain(error, section)}") from error


def _converted(pixels: Tensor, output_type: OutputType) -> list[Image.Image] | np.ndarray | Tensor:
    """Images in the form of `output_type` of uint8 pixels [B, 3, H, W]."""
    if output_type == "pil":
        return to_images(pixels)
    scaled = pixels.float() / 255
    return scaled if output_type == "pt" else scaled.permute(0, 2, 3, 1).cpu().numpy()
