"""Kernel selection: what the recipe sets, or the fastest on this device at the run's shapes.

Rank 0 measures, all ranks use its choice, and `kernels.json` in the run folder records it: a run resumed on the same
device uses the same kernels and is bitwise reproducible, whatever a second measurement would choose.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ...kernels import attention, latent_loss
from ...kernels.attention import Backend
from ...kernels.latent_loss import Provider
from ...kernels.providers import Choice, choose_attention, choose_loss
from ...recipes.schema import Kernels
from ..distributed.process_group import Ranks
from ..errors import RunError
from ..io import read_json
from . import elementwise

FILE = "kernels.json"


@dataclass(frozen=True)
class KernelChoice:
    """Kernels of a `PatchLatentModel`; the defaults run everywhere."""

    head: Provider = "reference"
    attention: Backend = "sdpa"
    elementwise: elementwise.Provider = "torch"


def make_deterministic() -> None:
    """Use deterministic algorithms in this process. Call before any computation on the GPU.

    Applies to attention too: torch's own reads the switch, the packages of `kernels.attention` receive it as an
    argument. An operation without a deterministic implementation raises RuntimeError with its name.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may split a product by free workspace
    torch.use_deterministic_algorithms(True)
    # Allocated memory is always written before it is read here: filling it would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False


@dataclass(frozen=True)
class KernelWork:
    """The shapes of a backward pass for which kernels are chosen.

    patches: per image. lengths: text tokens before each image. width: of the hidden states. heads: of queries, of keys
    and values, and the width of one.
    """

    patches: int
    lengths: Sequence[int]
    width: int
    heads: tuple[int, int, int]
    dtype: torch.dtype

    @classmethod
    def of(
        cls, config: Any, micro_batch: int, patches: int, max_text_tokens: int, precision: str, draws: int = 1
    ) -> KernelWork:
        """For captions of every length up to `max_text_tokens`, each of `draws` images. config: the backbone's
        Qwen2_5_VLConfig."""
        text = config.text_config
        width, heads = text.hidden_size, text.num_attention_heads
        texts = [max(1, (i + 1) * max_text_tokens // micro_batch) for i in range(micro_batch)]
        lengths = [length for length in texts for _ in range(draws)]
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        return cls(patches, lengths, width, (heads, text.num_key_value_heads, width // heads), dtype)

    @property
    def tokens(self) -> int:
        """Rows of the head's product."""
        return len(self.lengths) * self.patches

    def fastest_head(self, device: torch.device) -> Choice:
        return choose_loss(self.tokens, self.width, self.width, self.dtype, device)

    def fastest_attention(self, device: torch.device) -> Choice:
        return choose_attention(list(self.lengths), self.patches, self.heads, self.dtype, device)


def choose_kernels(
    asked: Kernels, work: KernelWork, ranks: Ranks, folder: Path
) -> tuple[KernelChoice, dict[str, dict[str, Any]]]:
    """The kernels of this run, the same on every rank, and the record for `kernels.json`.

    folder: the run folder. RunError if a kernel set in the recipe cannot run here.
    """
    device, dtype = ranks.device, work.dtype
    if asked.head_backend != "auto":
        _refuse("head_backend", latent_loss.unavailable(asked.head_backend, device, dtype))
    if asked.attention != "auto":
        _refuse("attention", attention.unavailable(asked.attention, device, dtype))
    _refuse("elementwise", elementwise.unavailable(asked.elementwise, device))

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    key = f"{gpu}, torch {torch.__version__}, {dtype}, {work.tokens} x {work.width}, {max(work.lengths)} text tokens"
    known = read_json(folder / FILE) or {} if ranks.first else {}

    def decide(operation: str, setting: str, measure: Callable[[], Choice]) -> dict[str, Any]:
        if setting != "auto":
            return {"key": key, **asdict(Choice(operation, setting, "set in the recipe"))}
        before = known.get(operation)
        return before if before and before["key"] == key else {"key": key, **asdict(measure())}

    record: dict[str, dict[str, Any]] = {}
    if ranks.first:
        record = {
            "patch_latent_loss": decide("patch_latent_loss", asked.head_backend, lambda: work.fastest_head(device)),
            "prefix_attention": decide("prefix_attention", asked.attention, lambda: work.fastest_attention(device)),
        }
    record = ranks.gather(record)[0]
    head, over = (record[operation]["provider"] for operation in ("patch_latent_loss", "prefix_attention"))
    return KernelChoice(cast(Provider, head), cast(Backend, over), asked.elementwise), record


def _refuse(setting: str, reason: str | None) -> None:
    if reason:
        raise RunError(f"kernels.{setting}: {reason}; set kernels.{setting} to another, see docs/kernels.md")
