"""The only user of DeepSpeed: ZeRO-3 around a stage's model, behind the few calls that the loop makes."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...recipes.schema import Optimizer, Zero
from ..distributed.process_group import Ranks
from ..errors import RunError
from ..models.weights import full_shape
from ..stages import StageModel
from ..versions import importing, version, without
from .eight_bit_adamw import EightBitAdamW
from .optimizers import build_optimizer, create_state
from .rules import RULES, rule_name

T = TypeVar("T")

# Below this version ZeRO-3 fails in our case: frozen parameters with activation checkpointing crash in backward
# (fixed by deepspeed#8148), and non-finite bf16 gradients reach the masters.
DEEPSPEED_FLOOR = "0.19.8"


def import_deepspeed(device: torch.device) -> Any:
    """The deepspeed module, with its version checked and its logging reduced. RunError when it is too old."""
    found = version("deepspeed")
    if found is None:
        raise RunError(f"deepspeed is not installed: pip install 'deepspeed>={DEEPSPEED_FLOOR}'")
    if _version(found) < _version(DEEPSPEED_FLOOR):
        raise RunError(
            f"deepspeed {found} is installed, {DEEPSPEED_FLOOR} or newer is needed: pip install -U deepspeed"
        )
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torch renamed the collectives that DeepSpeed calls; a warning per call helps nobody.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if "deepspeed" not in sys.modules:
        # DeepSpeed's autotuner, which is not used, imports MLflow, in more time than all the rest.
        with importing(), without("mlflow"):
            import deepspeed
            import deepspeed.ops

            _import_muon()
    import deepspeed
    import deepspeed.ops

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_not_about_a_skip)
    if device.type == "cpu":
        # Its C++ shared-memory collectives take 40 s and a compiler to build, and training never calls them.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer, which is not used, without its `torch.compile`: the engine imports the module
    in any case, and compiling needs all of torch's Inductor."""
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    before, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        with suppress(ImportError):  # another version's may have another name
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = before


def _not_about_a_skip(record: logging.LogRecord) -> bool:
    """DeepSpeed logs every skipped step as an overflow; the loop logs the step and the true reason."""
    return "OVERFLOW" not in record.getMessage()


@contextmanager
def partitioned(config: dict[str, Any], device: torch.device) -> Iterator[None]:
    """Within it, every module is sharded over the ranks when it is built (`zero.Init`), in the precision of
    DeepSpeed's `config`."""
    deepspeed = import_deepspeed(device)
    # The dtype comes from the configuration: the argument is ignored without fp16 (0.19.8).
    with deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(config)):
        yield


def require_quantizer(zero: Zero, device: torch.device) -> None:
    """RunError if quantized weights are set and DeepSpeed's quantizer is not available."""
    if not zero.quantized_weights:
        return
    if device.type != "cuda":
        raise RunError(f"zero.quantized_weights: DeepSpeed quantizes only on CUDA, not on {device.type}; leave it off")
    import_deepspeed(device)
    try:
        importlib.import_module("deepspeed.ops.op_builder").QuantizerBuilder().load()
    except Exception as error:  # compiler and loader failures have many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"zero.quantized_weights: DeepSpeed's quantizer cannot be built here ({reason}); install CUDA's compiler"
            " and ninja, or leave it off"
        ) from error


class Engine:
    """A model under ZeRO-3 with the recipe's optimizer on its trainable parameters."""

    def __init__(self, model: StageModel, settings: Optimizer, config: dict[str, Any], ranks: Ranks) -> None:
        """config: DeepSpeed's, as in `partitioned`."""
        deepspeed = import_deepspeed(ranks.device)
        self.ranks = ranks
        self.settings = settings
        self._updates = 0
        self.restored: dict[str, Mapping[str, Tensor]] = {}
        """What `moments` returned and a checkpoint has filled, until `adopt`."""
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, settings),
            config=copy.deepcopy(config),
            dist_init_required=False,
        )
        self._quantized = bool(config["zero_optimization"]["zero_quantized_weights"])
        if self._quantized:
            self._require_quantizable()
        self._create_moments()
        self._drop_second_copies()
        self._gather_small()
        self._before_step: dict[str, Tensor] = {}

    @property
    def model(self) -> Any:
        return self._engine.module

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's own engine, for comparisons with what it does by itself."""
        return self._engine

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter; each holds this rank's slice (`ds_tensor`)."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def slices(self) -> dict[str, Tensor]:
        """Name -> this rank's slice of the compute weights: 1-D, padding included. Call `refresh` after changing it."""
        return {name: parameter.ds_tensor.data for name, parameter in self.trainable().items()}  # type: ignore[attr-defined]

    def forward(self, batch: Mapping[str, Any]) -> Any:
        if not self._before_step:
            self._before_step = {name: buffer.clone() for name, buffer in self.model.statistics().items()}
        return self._engine(**batch)

    def backward(self, loss: Tensor) -> None:
        """Backward pass of one micro-batch; the last of a step also reduces the gradients."""
        self._engine.backward(loss)

    def after_pass(self) -> None:
        """Close a micro-batch that does not end the step."""
        self._engine.step()

    def grad_norm(self) -> Tensor:
        """Norm [] of this rank's slices of the reduced gradients, after the last backward pass of a step. The
        squares of all ranks' norms add up to the square of the global norm, before clipping."""
        from deepspeed.utils import safe_get_local_grad

        return torch.nn.utils.get_total_norm([safe_get_local_grad(p) for p in self.trainable().values()])

    def step(self, lr: float, skip: bool) -> bool:
        """Close the last micro-batch and update the weights, unless `skip` is set or DeepSpeed finds the gradient norm
        not finite; returns whether it did.

        `skip` must be the same on all ranks. A skipped step leaves masters, moments, statistics and step count as
        they were.
        """
        if skip:
            self._poison()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        applied = self._engine.was_step_applied()
        if not applied:
            for name, buffer in self.model.statistics().items():
                buffer.copy_(self._before_step[name])
            self._gather_small()
        self._before_step = {}
        self._updates += applied
        return applied

    def refresh(self) -> None:
        """Drop gathered parameters after their slices were set from outside."""
        self._engine.empty_partition_cache()
        self._drop_second_copies()
        self._gather_small()

    @torch.no_grad()
    def undisturbed(self, work: Callable[[], T]) -> T:
        """The result of `work`, the model in evaluation mode; BatchNorm statistics are kept. Every rank calls it."""
        self._engine.eval()
        try:
            return work()
        finally:
            self._engine.train()

    def masters(self) -> dict[str, Tensor]:
        """Name -> this rank's slice of the fp32 master: 1-D, padding included, the optimizer's own memory."""
        from deepspeed.utils import safe_get_local_fp32_param

        return {name: safe_get_local_fp32_param(p).detach() for name, p in self.trainable().items()}

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Kind of optimizer state, such as AdamW's `exp_avg` -> name -> this rank's slice of it, like `masters`; a copy
        of what is held in 8 bits, see `adopt`."""
        from deepspeed.utils import safe_get_local_optimizer_state

        optimizer = self._engine.optimizer.optimizer
        eight_bits = optimizer.moment if isinstance(optimizer, EightBitAdamW) else None
        found: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.trainable().items():
            for kind in RULES[rule_name(self.settings.name, name, full_shape(parameter))].state:
                found.setdefault(kind, {})[name] = (eight_bits or safe_get_local_optimizer_state)(parameter, kind)
        return found

    def adopt(self) -> None:
        """Set the state that is held in 8 bits to `restored`. Every rank calls it."""
        optimizer = self._engine.optimizer.optimizer
        if isinstance(optimizer, EightBitAdamW) and self.restored:
            given = {
                parameter.ds_id: {kind: values[name] for kind, values in self.restored.items()}  # type: ignore[attr-defined]
                for name, parameter in self.trainable().items()
            }
            optimizer.adopt(given)
        self.restored = {}

    @property
    def updates(self) -> int:
        """Applied steps."""
        return self._updates

    @updates.setter
    def updates(self, value: int) -> None:
        self._updates = value
        for count in self.step_counts():
            count.fill_(value)

    def step_counts(self) -> list[Tensor]:
        """The optimizer's own counts of applied steps, each []; none if its rule does not depend on them."""
        return [state["step"] for state in self._engine.optimizer.optimizer.state.values() if "step" in state]

    def _create_moments(self) -> None:
        """Create the optimizer's state before the first step, so that a resume can fill it."""
        zero = self._engine.optimizer
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
            create_state(zero.optimizer, zero.sub_group_to_group_id[index], flat, zero.fp16_groups[index])

    def _drop_second_copies(self) -> None:
        """DeepSpeed makes hpZ's copies when weights are first released and refreshes them only after its own updates:
        copies of weights that were set from outside are stale, and those of frozen weights would stay stale."""
        for parameter in self.model.parameters():
            parameter.ds_secondary_tensor = None

    def _require_quantizable(self) -> None:
        """RunError unless the size of every slice that is sent quantized is a multiple of 8."""
        for name, parameter in self.model.named_parameters():
            if not parameter.ds_persist and (parameter.ds_numel % (8 * self.ranks.size)):
                raise RunError(
                    f"zero.quantized_weights: {name} has {parameter.ds_numel} elements, not a multiple of 8 on each of"
                    f" {self.ranks.size} ranks; raise zero.persistence_threshold, or keep the frozen parts replicated"
                )

    def _gather_small(self) -> None:
        """Gather the persistent parameters, as DeepSpeed does after its own updates. The forward pass would quantize
        them, for which they are too small."""
        if self._quantized and (small := self._engine.optimizer.persistent_parameters):
            small[0].all_gather(small)

    def _poison(self) -> None:
        """Make the gradient norm infinite: DeepSpeed then skips the step with all its bookkeeping."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        parameter = next(iter(self.trainable().values()))
        safe_set_local_grad(parameter, torch.full_like(safe_get_local_grad(parameter), float("inf")))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:3] if part.isdigit())
