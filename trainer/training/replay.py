"""Replays one step of a run in one process, with the same samples, random draws and losses, for debugging.

Only the run's folder, shards and frozen weights are needed: the samples of a step are a function of the plan, and every
random draw is a function of the sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...data import Dataset, Item, Loader, LoaderSettings, MixedDataset, Share
from ...kernels.attention import unavailable
from ...recipes import load_recipe
from ..checkpoint.reader import CheckpointReader
from ..checkpoint.state import load_weights
from ..checkpoint.store import Store
from ..distributed.process_group import Ranks
from ..errors import RunError
from ..inference.contact_sheet import make_contact_sheet
from ..models.flux import sigmas
from ..models.kernel_selection import KernelChoice
from ..models.masking import draw_orders
from ..models.rng import Stream, chosen
from ..optim.train_state import TrainState
from ..stages import StageModel
from ..stages.controlnet import ControlNetStage
from ..stages.patch_latents import PatchLatentStage
from ..stages.unsharded import init_context
from .data_digest import SequenceDigest, version
from .inputs import Inputs, difference, open_inputs
from .latent_statistics import measure_statistics
from .mixture import Segments, data_of, read_segments, require_content, until
from .model import initialise_from
from .run_context import open_run_stage
from .run_history import Place

GREY = 128


@dataclass
class Replay:
    """The rebuilt batch of a step."""

    place: Place
    weights: int
    """Step of the weights that the losses were computed with; 0: initial weights."""
    exact: bool
    """Whether these are the weights that the step itself used."""
    items: list[Item]
    samples: list[dict[str, Any]]
    """Per item, its random draws and its `loss`; the mean of the losses is the step's loss."""
    masks: torch.Tensor | None
    """Stage 1: hidden patches of every draw [G, K, N]."""
    replaced: list[tuple[str, str]]
    """Planned samples that could not be read, with the reason; `items` has their neighbours instead."""
    digest: str | None
    """Data digest up to the step; None if the previous step's is not known."""

    @property
    def loss(self) -> float:
        return float(np.mean([sample["loss"] for sample in self.samples]))

    def record(self) -> dict[str, Any]:
        """Everything but the images, for JSON."""
        place = self.place
        return {
            "step": place.step,
            "batch": place.batch,
            "skipped": place.skipped["reason"] if place.skipped else None,
            "weights_step": self.weights,
            "weights_exact": self.exact,
            "loss": self.loss,
            "logged_loss": (place.line or place.skipped or {}).get("loss"),
            "data_digest": self.digest,
            "logged_data_digest": (place.line or {}).get("data_digest"),
            "replaced": self.replaced,
            "samples": self.samples,
        }

    def highest_loss(self, count: int) -> list[int]:
        """Indices in the batch of the samples with the highest losses, non-finite ones first."""
        losses = np.nan_to_num([sample["loss"] for sample in self.samples], nan=np.inf)
        return np.argsort(-losses, kind="stable")[:count].tolist()

    def sheet(self, count: int) -> Image.Image:
        """Contact sheet of the samples with the highest losses: input images, and in stage 1 the hidden patches."""
        order = self.highest_loss(count)
        rows = {"image": [Image.fromarray(self.items[i].image) for i in order]}
        if any(item.source_image is not None for item in self.items):
            rows = {"source image": [_source_image(self.items[i]) for i in order], **rows}
        if self.masks is not None:
            for draw in range(self.masks.shape[1]):
                rows["hidden" + _suffix(draw)] = [_hide(self.items[i].image, self.masks[i, draw]) for i in order]
        return make_contact_sheet(
            rows, [f"{self.samples[i]['loss']:.4g} {self.items[i].key}: {self.items[i].caption}" for i in order]
        )


def replay(run: Path, place: Place, weights_step: int | None = None) -> Replay:
    """The batch at `place` of the run in folder `run`, with losses from the newest checkpoint before it.

    weights_step: use this checkpoint instead; 0: initial weights. RunError when something is missing from the run, or
    when the samples do not match the run's data digest.
    """
    recipe = load_recipe(run / "recipe.yaml", stored=True)
    segments: Segments = ()
    if recipe.data.sources is not None:
        segments = until(read_segments(run), place.batch - 1)
        recipe = recipe.model_copy(update={"data": data_of(segments[-1], recipe.data)})
    data, stage = recipe.data, partial(open_run_stage, recipe)
    inputs = open_inputs(data, recipe.seed, recipe.global_batch, stage)
    reader = _checkpoint(run, place, weights_step)
    if isinstance(inputs.dataset, MixedDataset):
        require_content(segments, inputs.dataset, run)
        inputs = inputs.with_segments(data, recipe.seed, segments)
    elif reader and reader.state["data"] != inputs.dataset.fingerprint and not segments:
        differ = difference(run, inputs.dataset, reader.state["data"])
        raise RunError(
            f"data.shards={data.shards}: are not the shards that {run} was trained on ({differ}); restore them"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(inputs.stage, recipe.precision, reader, device)
    if reader is None and recipe.init_from:
        initialise_from(model, recipe.stage, inputs.stage, Path(recipe.init_from))
    elif reader is None:
        measure_statistics(model, inputs, Ranks(0, 1, device))
    # BatchNorm's statistics cover the samples of a pass on all ranks: use the same number here.
    together = place.stretch.micro_batch or recipe.micro_batch
    together *= place.stretch.ranks if model.batch_statistics else 1
    items, arrays, replaced, losses = _passes(inputs, model, place.batch - 1, together, device)
    samples = [
        {**_identity(item, inputs), **drawn, "loss": loss, "caption": item.caption}
        for item, drawn, loss in zip(items, _draws(recipe.seed, inputs, items, arrays), losses, strict=True)
    ]
    masks = torch.cat([part["mask"] for part in arrays]).unflatten(0, (len(items), -1)) if "mask" in arrays[0] else None
    at = TrainState(**reader.state["progress"]) if reader else TrainState()
    exact = at.step == place.step - 1 and at.batch < place.batch
    before = at.digest if exact else place.digest_before
    return Replay(place, at.step, exact, items, samples, masks, replaced, _digest(place, before, inputs.dataset, items))


def _checkpoint(run: Path, place: Place, step: int | None) -> CheckpointReader | None:
    """The newest checkpoint from before `place`, or that of `step`; None for the initial weights."""
    store = Store(run / "checkpoints")
    if step == 0:
        return None
    if step is not None:
        if problems := store.verify(store.require(step)):
            raise RunError("; ".join(problems))
        return CheckpointReader(store.folder(step))
    # After a rollback, a checkpoint of an earlier step may have seen later samples.
    later = [step for step in store.steps() if step >= place.step or _taken(store, step) >= place.batch]
    return store.newest_verified(later)


def _taken(store: Store, step: int) -> int:
    """Global batches that the checkpoint of `step` has seen; 0 when it cannot be read, which is reported elsewhere."""
    try:
        return TrainState(**CheckpointReader(store.folder(step)).state["progress"]).batch
    except (RunError, OSError, ValueError):
        return 0


def _model(stage: Any, precision: str, reader: CheckpointReader | None, device: torch.device) -> StageModel:
    """The run's model, unsharded on `device`, in the run's compute precision, with the weights of `reader`."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    fast = unavailable("varlen", device, dtype) is None
    over = "varlen" if fast else "sdpa"
    stage.kernels = KernelChoice(attention=over, vision=over)
    with init_context(device, dtype):
        model = stage.build()
    stage.load(model)
    model.to(device)
    if reader:
        load_weights(model, reader)
    return model


def _passes(
    inputs: Inputs, model: StageModel, number: int, together: int, device: torch.device
) -> tuple[list[Item], list[dict[str, Any]], list[tuple[str, str]], list[float]]:
    """Items of global batch `number`, each pass's arrays, replaced samples, and every sample's loss."""
    batch = inputs.global_batch
    collate = inputs.stage.collate(inputs.dataset)
    loader = Loader(
        inputs.dataset,
        inputs.plan,
        lambda items: {"items": items, "arrays": collate(items)},
        Share(0, 1, batch, together),
        range(number, number + 1),
        LoaderSettings(inputs.stage.image_sizes, buckets=inputs.buckets),
    )
    passes = batch // together
    normalizer = inputs.normalizer(number, passes)
    items, arrays, replaced, losses = [], [], [], []
    for part in loader:
        here = part.arrays["arrays"]
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in here.items()}
        with torch.no_grad():
            each = model(**moved, normalizer=normalizer).each
        items += part.arrays["items"]
        arrays.append(here)
        replaced += part.replaced
        losses += (each.double() * batch / passes).tolist()
    return items, arrays, replaced, losses


def _identity(item: Item, inputs: Inputs) -> dict[str, Any]:
    dataset, buckets = inputs.dataset, inputs.buckets
    source = {"source": dataset.names[dataset.source(item.origin[0])]} if isinstance(dataset, MixedDataset) else {}
    return {
        **source,
        **({"task": "editing"} if item.source_image is not None else {}),
        "key": item.key,
        "epoch": item.epoch,
        "index": item.index,
        "shard": item.origin[0],
        "number": item.origin[1],
        "caption_member": item.caption_member,
        **({"bucket": str(buckets.buckets[item.bucket])} if buckets else {}),
    }


def _draws(seed: int, inputs: Inputs, items: Sequence[Item], arrays: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What training draws for each sample from (seed, epoch, index)."""
    stage, dropped = inputs.stage, inputs.stage.dropout(inputs.dataset)(items).tolist()
    epoch, index = (np.array([getattr(item, name) for item in items], dtype=np.int64) for name in ("epoch", "index"))
    if isinstance(stage, ControlNetStage):
        exchanged = chosen(seed, Stream.CAPTION_EXCHANGE, epoch, index, stage.flux.caption_exchange).tolist()
        predicted = chosen(seed, Stream.PREDICTED_LATENTS, epoch, index, stage.controlnet.drawn_share).tolist()
        drawn = sigmas(torch.cat([part["level"] for part in arrays])).view(len(items), -1).tolist()
        levels = [{"noise_level" + _suffix(draw): level for draw, level in enumerate(each)} for each in drawn]
        seeds = [[seed, item.epoch, item.index] for item in items]
        draws = [
            {"caption_exchanged": exchange, "latents_predicted": latents, **level, "noise_seed": each}
            for exchange, latents, level, each in zip(exchanged, predicted, levels, seeds, strict=True)
        ]
    else:
        assert isinstance(stage, PatchLatentStage)
        masks = torch.cat([part["mask"] for part in arrays]).unflatten(0, (len(items), -1))
        counts: Any = masks.sum(2).tolist()
        orders: Any = draw_orders(seed, epoch, index, masks.shape[-1], stage.branch.draws).reshape(masks.shape)
        draws = [_masks(*each) for each in zip(counts, orders.tolist(), strict=True)]
    return [{"caption_dropped": drop, **draw} for drop, draw in zip(dropped, draws, strict=True)]


def _masks(counts: list[int], orders: list[list[int]]) -> dict[str, Any]:
    """Rate and hidden patches of every draw of a sample."""
    found: dict[str, Any] = {}
    for draw, (count, order) in enumerate(zip(counts, orders, strict=True)):
        found |= {"mask_rate" + _suffix(draw): count / len(order), "hidden" + _suffix(draw): order[:count]}
    return found


def _suffix(draw: int) -> str:
    """Of the names of a sample's draws: none for the first, `_2` for the second."""
    return f"_{draw + 1}" if draw else ""


def _digest(place: Place, before: str | None, dataset: Dataset, items: Sequence[Item]) -> str | None:
    if before is None:
        return None
    names = (dataset.name(item.origin[0], item.key, item.caption_member) for item in items)
    found = SequenceDigest(before).advance(*SequenceDigest.fingerprint(names))
    logged = (place.line or {}).get("data_digest", found)
    if version(logged) == "1":  # logged before digests knew shards
        return logged
    if logged != found:
        raise RunError(f"step {place.step}: the samples differ from the run's: logged digest {logged}, rebuilt {found}")
    return found


def _source_image(item: Item) -> Image.Image:
    """White for a sample without one."""
    return Image.fromarray(np.full_like(item.image, 255) if item.source_image is None else item.source_image)


def _hide(image: np.ndarray, mask: torch.Tensor) -> Image.Image:
    """The image with its hidden patches grey."""
    height, width, _ = image.shape
    unit = math.isqrt(height * width // len(mask))
    hidden = mask.view(height // unit, width // unit).numpy().repeat(unit, 0).repeat(unit, 1)
    return Image.fromarray(np.where(hidden[..., None], np.uint8(GREY), image))
