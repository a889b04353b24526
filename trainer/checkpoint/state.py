"""Engine <-> slices: what a checkpoint holds of a run's tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import RunError
from ..models.weights import fill, full_shape, local_slice
from ..optim.ema import Ema
from ..optim.engine import Engine
from ..stages import StageModel
from .reader import AVERAGED, CheckpointReader


class CheckpointWeights:
    """A checkpoint's weights as a source for `weights.fill`. slot: `master`, or `ema` for the average."""

    def __init__(self, reader: CheckpointReader, slot: str = "master") -> None:
        self.reader = reader
        self.slot = slot

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self.reader.shapes[name]) if name in self.reader.shapes else None

    def flat(self, name: str, lo: int, hi: int) -> Tensor:
        return self.reader.read(self.slot, name, lo, hi)


def capture(engine: Engine, ema: Ema | None) -> tuple[dict[str, dict[str, Tensor]], dict[str, tuple[int, ...]]]:
    """Slots (slot -> name -> this rank's slice, 1-D fp32 without padding) and the whole parameters' shapes."""
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
    """Buffers to save: the model's, and the average's under a prefix."""
    averaged = ema.statistics if ema is not None else {}
    return {**engine.model.statistics(), **{AVERAGED + name: buffer for name, buffer in averaged.items()}}


def restore(engine: Engine, ema: Ema | None, reader: CheckpointReader, updates: int) -> None:
    """Set masters, moments, EMA and AdamW's step count from a checkpoint of any number of ranks.

    The engine's compute weights must have been filled from the same checkpoint before it was made.
    """
    parameters = engine.trainable()
    if parameters.keys() != reader.shapes.keys():
        odd = sorted(parameters.keys() ^ reader.shapes.keys())
        raise RunError(f"{reader.folder}: holds other parameters than this recipe trains: {', '.join(odd[:3])} …")
    for slot, tensors in _slots(engine, ema).items():
        for name, tensor in tensors.items():
            _, lo, hi = local_slice(parameters[name])
            tensor[: hi - lo].copy_(reader.read(slot, name, lo, hi))
            tensor[hi - lo :].zero_()
    engine.updates = updates
    if ema is not None:
        ema.updates = updates
        restore_statistics(ema.statistics, reader, "ema")


def reload(engine: Engine, ema: Ema | None, reader: CheckpointReader) -> None:
    """Bring a running engine, its model and the average to a checkpoint. Every rank calls it alike."""
    take_from(engine.model, reader)
    restore(engine, ema, reader, reader.state["updates"])
    engine.refresh()


def take_from(model: StageModel, reader: CheckpointReader) -> None:
    """Give a model the weights that it computes with, and its statistics, from a checkpoint."""
    fill(model.trainable(), CheckpointWeights(reader), reader.folder)
    restore_statistics(model.statistics(), reader)


def restore_statistics(statistics: Mapping[str, Tensor], reader: CheckpointReader, slot: str = "master") -> None:
    """Set buffers, by their names in the run's model, from a checkpoint; RunError when it lacks one. slot: of which
    weights, `ema` for the average's."""
    saved = reader.buffers(slot)
    for name, buffer in statistics.items():
        if name not in saved:
            raise RunError(f"{reader.folder}: holds no statistics {name}; was it saved by another recipe?")
        buffer.copy_(saved[name])


def _slots(engine: Engine, ema: Ema | None) -> dict[str, Mapping[str, Tensor]]:
    slots: dict[str, Mapping[str, Tensor]] = {
        "master": engine.masters(),
        "exp_avg": engine.moments("exp_avg"),
        "exp_avg_sq": engine.moments("exp_avg_sq"),
    }
    if ema is not None:
        slots["ema"] = ema.slices
    return slots
