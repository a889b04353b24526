"""Conversion between the engine's tensors and the slices in a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor

from ..errors import RunError
from ..models.weights import fill, full_shape, local_slice
from ..optim.ema import Ema
from ..optim.engine import Engine
from ..stages import StageModel
from .durable import WHOLE
from .layout import rank_file
from .reader import AVERAGED, BUFFERS, CheckpointReader
from .shard import COMPLETE


class CheckpointWeights:
    """A checkpoint's weights as a source for `weights.fill`. slot: `master` or `ema`."""

    def __init__(self, reader: CheckpointReader, slot: str = "master") -> None:
        self.reader = reader
        self.slot = slot

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self.reader.shapes[name]) if name in self.reader.shapes else None

    def flat(self, name: str, lo: int, hi: int) -> Tensor:
        return self.reader.read(self.slot, name, lo, hi)

    def content_hash(self) -> str:
        """sha256 over the names of all parameters and the hashes of the slot in the manifest, or of the whole files
        where it has none of the slot, and of the buffers if there are any. The same weights saved by another number of
        ranks have another hash."""
        manifest = self.reader.manifest
        spans = [manifest.files[rank_file(rank)].spans for rank in range(manifest.ranks)]
        hashes = [each[self.slot].hash if self.slot in each else each[WHOLE].hash for each in spans]
        hashes += [manifest.files[BUFFERS].spans[WHOLE].hash] if BUFFERS in manifest.files else []
        return hashlib.sha256(json.dumps([self.slot, sorted(manifest.shapes.items()), hashes]).encode()).hexdigest()


def capture(engine: Engine, ema: Ema | None) -> tuple[dict[str, dict[str, Tensor]], dict[str, tuple[int, ...]]]:
    """Slots (slot -> name -> this rank's slice, 1-D fp32 without padding) and the shapes of the full parameters."""
    parameters = engine.trainable()
    lengths = {}
    for name, parameter in parameters.items():
        _, lo, hi = local_slice(parameter)
        lengths[name] = hi - lo
    slots = {
        slot: {name: tensor[: lengths[name]] for name, tensor in tensors.items()}
        for slot, tensors in _slots(engine, ema).items()
    }
    return slots, {name: full_shape(parameter) for name, parameter in parameters.items()}


def capture_statistics(engine: Engine, ema: Ema | None) -> dict[str, Tensor]:
    """Buffers to save: the model's, and those of the EMA with a prefix."""
    averaged = ema.statistics if ema is not None else {}
    return {**engine.model.statistics(), **{AVERAGED + name: buffer for name, buffer in averaged.items()}}


def restore(engine: Engine, ema: Ema | None, reader: CheckpointReader, updates: int) -> str | None:
    """Set masters, moments, EMA and the optimizer's step count from a checkpoint saved by any number of ranks; the
    compute weights are `refresh`'s.

    Returns what is wrong with this rank's file if it is verified only now (`CheckpointReader.load`); the engine must
    then be restored from another checkpoint before it is used.
    """
    parameters = engine.trainable()
    if parameters.keys() != reader.shapes.keys():
        odd = sorted(parameters.keys() ^ reader.shapes.keys())
        raise RunError(f"{reader.folder}: holds other parameters than this recipe trains: {', '.join(odd[:3])} …")
    for name, parameter in parameters.items():
        if (wanted := full_shape(parameter)) != (found := tuple(reader.shapes[name])):
            raise RunError(f"{reader.folder}: {name} has shape {found}, expected {wanted}; was the recipe changed?")
    slots = _slots(engine, ema)
    for slot, tensors in slots.items():
        slices = {}
        for name, tensor in tensors.items():
            _, lo, hi = local_slice(parameters[name])
            tensor[hi - lo :].zero_()
            slices[name] = tensor[: hi - lo], lo
        if problem := reader.load(slot, slices):
            return problem
    engine.restored = {slot: tensors for slot, tensors in slots.items() if slot not in COMPLETE}
    engine.updates = updates
    restore_statistics(engine.model.statistics(), reader)
    if ema is not None:
        ema.updates = updates
        restore_statistics(ema.statistics, reader, "ema")
    return None


def refresh(engine: Engine) -> None:
    """Set the compute weights from the masters, and what else depends on others, after `restore`. Call it on every
    rank."""
    engine.adopt()
    masters = engine.masters()
    for name, weights in engine.slices().items():
        weights.copy_(masters[name])
    engine.refresh()


def reload(engine: Engine, ema: Ema | None, reader: CheckpointReader) -> None:
    """Reset a running engine, its model and the EMA to a verified checkpoint. Call it on every rank."""
    restore(engine, ema, reader, reader.state["updates"])
    refresh(engine)


def load_weights(model: StageModel, reader: CheckpointReader) -> None:
    """Load a model's compute weights and statistics from a checkpoint."""
    fill(model.trainable(), CheckpointWeights(reader), reader.folder)
    restore_statistics(model.statistics(), reader)


def restore_statistics(statistics: Mapping[str, Tensor], reader: CheckpointReader, slot: str = "master") -> None:
    """Set buffers, by their names in the model, from a checkpoint. slot: `ema` for those of the EMA. Raises RunError if
    one is missing."""
    saved = reader.buffers(slot)
    for name, buffer in statistics.items():
        if name not in saved:
            raise RunError(f"{reader.folder}: holds no statistics {name}; was it saved by another recipe?")
        buffer.copy_(saved[name])


def _slots(engine: Engine, ema: Ema | None) -> dict[str, Mapping[str, Tensor]]:
    slots: dict[str, Mapping[str, Tensor]] = {
        "master": engine.masters(),
        **engine.moments(),
    }
    if ema is not None:
        slots["ema"] = ema.slices
    return slots
