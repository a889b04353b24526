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
from ...kernels.providers import Choice, choose_attention, choose_loss, choose_vision_attention
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
    """Of the text model and the branch."""
    vision: Backend = "sdpa"
    """Attention of the vision encoder, whose heads are narrower."""
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


@dataclass(frozen=True)
class VisionWork:
    """The shapes of a forward pass of the vision encoder for which its attention is chosen.

    segmentations: lengths of the segments of a layer and the number of such layers, windows first. heads: of queries,
    of keys and values, and the width of one.
    """

    segmentations: tuple[tuple[tuple[int, ...], int], ...]
    heads: tuple[int, int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, config: Any, images: int, shape: tuple[int, int], precision: str) -> VisionWork:
        """For images of this height and width in pixels. config: the backbone's Qwen2_5_VLConfig."""
        vision = config.vision_config
        window = vision.window_size // vision.patch_size
        rows, columns = sides = [pixels // vision.patch_size for pixels in shape]
        high, wide = ([min(window, side - start) for start in range(0, side, window)] for side in sides)
        windows = tuple(a * b for a in high for b in wide) * images
        whole = len(vision.fullatt_block_indexes)
        heads = vision.num_heads, vision.num_heads, vision.hidden_size // vision.num_heads
        segmentations = ((windows, vision.depth - whole), ((rows * columns,) * images, whole))
        return cls(segmentations, heads, torch.float32 if precision == "fp32" else torch.bfloat16)

    def fastest(self, asked: Backend | None, device: torch.device) -> Choice:
        return choose_vision_attention(self.segmentations, self.heads, self.dtype, device, asked)


def choose_kernels(
    asked: Kernels, work: KernelWork | None, vision: VisionWork | None, ranks: Ranks, folder: Path | None = None
) -> tuple[KernelChoice, dict[str, dict[str, Any]]]:
    """The kernels of this run, the same on every rank, and the record for `kernels.json`.

    work, vision: None if the run computes no branch, or no vision encoder. folder: the run folder, None to remember
    nothing. RunError if a kernel set in the recipe cannot run here. The vision encoder uses the attention set in the
    recipe if it runs there.
    """
    device = ranks.device
    for dtype in {each.dtype for each in (work, vision) if each}:
        if asked.head_backend != "auto":
            _refuse("head_backend", latent_loss.unavailable(asked.head_backend, device, dtype))
        if asked.attention != "auto":
            _refuse("attention", attention.unavailable(asked.attention, device, dtype))
    _refuse("elementwise", elementwise.unavailable(asked.elementwise, device))

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    machine = f"{gpu}, torch {torch.__version__}"
    known = (read_json(folder / FILE) if ranks.first and folder else None) or {}
    record: dict[str, dict[str, Any]] = {}

    def decide(operation: str, key: str, measure: Callable[[], Choice]) -> None:
        before = known.get(operation)
        record[operation] = before if before and before["key"] == key else {"key": key, **asdict(measure())}

    def decide_by(setting: str, operation: str, key: str, measure: Callable[[], Choice]) -> None:
        if setting == "auto":
            return decide(operation, key, measure)
        record[operation] = {"key": key, **asdict(Choice(operation, setting, "set in the recipe"))}

    if ranks.first and work:
        key = f"{machine}, {work.dtype}, {work.tokens} x {work.width}, {max(work.lengths)} text tokens"
        decide_by(asked.head_backend, "patch_latent_loss", key, lambda: work.fastest_head(device))
        decide_by(asked.attention, "prefix_attention", key, lambda: work.fastest_attention(device))
    if ranks.first and vision:
        set_backend = None if asked.attention == "auto" else asked.attention
        shape = " and ".join(f"{len(lengths)} x {lengths[0]}" for lengths, _ in vision.segmentations)
        key = f"{machine}, {vision.dtype}, {shape}, heads of {vision.heads[2]}, kernels.attention={asked.attention}"
        decide("vision_attention", key, lambda: vision.fastest(set_backend, device))
    record = ranks.gather(record)[0]
    chosen = {operation: each["provider"] for operation, each in record.items()}
    return KernelChoice(
        head=cast(Provider, chosen.get("patch_latent_loss", "reference")),
        attention=cast(Backend, chosen.get("prefix_attention", "sdpa")),
        vision=cast(Backend, chosen.get("vision_attention", "sdpa")),
        elementwise=asked.elementwise,
    ), record


def _refuse(setting: str, reason: str | None) -> None:
    if reason:
        raise RunError(f"kernels.{setting}: {reason}; set kernels.{setting} to another, see docs/kernels.md")
