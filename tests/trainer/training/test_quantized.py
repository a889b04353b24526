"""Quantized transfers: refused where DeepSpeed cannot make them rightly; with its kernels replaced, they train."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ranked
import runs
from bifrost.recipes import load_recipe
from bifrost.trainer.distributed.process_group import join
from bifrost.trainer.errors import RunError
from bifrost.trainer.optim.engine import import_deepspeed, require_quantizer

WEIGHTS = "zero.quantized_weights=true"


class Quantizer:
    """DeepSpeed's CUDA kernels in plain torch: 8 bits, symmetric, one scale a group."""

    Symmetric = 0
    calls = 0

    def load(self) -> Quantizer:
        return self

    def quantize(self, values: torch.Tensor, groups: int, bits: int, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert values.dtype == torch.half and bits == 8
        Quantizer.calls += 1
        rows = values.float().view(groups, -1)
        scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        return (rows / scale).round().to(torch.int8).view(-1), scale.view(-1)

    def dequantize(self, values: torch.Tensor, scale: torch.Tensor, groups: int, bits: int, kind: int) -> torch.Tensor:
        return (values.float().view(groups, -1) * scale.view(-1, 1)).half().view(values.shape)


def trained(arguments: list[str]) -> int:
    """Train with `Quantizer` as DeepSpeed's; how often it was called."""
    from bifrost.trainer.training import build
    from bifrost.trainer.training.train import train

    import_deepspeed(join().device)
    from deepspeed.ops import op_builder

    vars(op_builder)["QuantizerBuilder"] = Quantizer
    build.require_quantizer = lambda zero, device: None
    assert train(load_recipe("tiny-mllm", arguments)) == 0
    return Quantizer.calls


@pytest.mark.multi
@pytest.mark.parametrize("more", [(), ("zero.hpz=2",), ("backbone.placement=replicated",)])
def test_weights_in_8_bits_train_nearly_alike(more: tuple[str, ...], shards: Path, tmp_path: Path) -> None:
    ranks = 4 if "zero.hpz=2" in more else 2  # 4: two nodes of two
    settings = ("steps=3", f"micro_batch={4 // ranks}", "zero.persistence_threshold=1000", *more)
    losses = {}
    for name, ends in {"whole": (), "rounded": (WEIGHTS,)}.items():
        ended = ranked.run(trained, ranks, runs.arguments(shards, tmp_path / name, *settings, *ends)[2:])
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
        assert (ended[0].value > 0) == (name == "rounded")
        losses[name] = runs.losses(tmp_path / name / "tiny-mllm")
    assert losses["rounded"] != losses["whole"]
    np.testing.assert_allclose(losses["rounded"], losses["whole"], rtol=0.02)


def test_the_ranks_of_a_cpu_refuse_in_one_line(shards: Path, tmp_path: Path) -> None:
    (ended,) = ranked.bifrost(1, *runs.arguments(shards, tmp_path, "steps=1", WEIGHTS))
    assert ended.code == 2 and "only on CUDA, not on cpu" in ended.err, ended.err
    assert len([line for line in ended.err.splitlines() if line.startswith("error:")]) == 1
    assert not list(tmp_path.rglob("metrics.jsonl")), "nothing was begun"


def without_a_compiler() -> str:
    import_deepspeed(join().device)
    from deepspeed.ops import op_builder

    class Broken:
        def load(self) -> Any:
            raise RuntimeError("nvcc: not found\nand much more")

    vars(op_builder)["QuantizerBuilder"] = Broken
    try:
        require_quantizer(load_recipe("tiny-mllm", [WEIGHTS]).zero, torch.device("cuda"))
    except RunError as error:
        return str(error)
    return ""


def test_no_compiler_is_one_line() -> None:
    (rank,) = ranked.run(without_a_compiler, 1)
    assert re.fullmatch(r"zero\.quantized_weights: .* \(nvcc: not found\); install .*", rank.value), rank.err


def handed_over() -> list[str]:
    """Types of the gradients that DeepSpeed's quantizing kernel gets for fp32 ones."""
    import_deepspeed(join().device)
    from deepspeed.runtime.comm import coalesced_collectives as module

    seen = []

    class Kernels:
        Symmetric = 0

        def swizzle_quant(self, tensor: torch.Tensor, *rest: object) -> Any:
            seen.append(str(tensor.dtype))
            raise InterruptedError

    module.quantizer_module = Kernels()
    with contextlib.suppress(InterruptedError):
        module.all_to_all_quant_reduce([torch.ones(4, 4)], {})
    return seen


def test_deepspeed_still_hands_gradients_over_as_they_are() -> None:
    """The reason for the refusal: the kernel takes whatever it gets for fp16. When this fails, see whether that has
    changed."""
    (rank,) = ranked.run(handed_over, 1)
    assert rank.value == ["torch.float32"], rank.err


def test_slices_that_are_no_whole_blocks_are_named(shards: Path, tmp_path: Path) -> None:
    settings = ("steps=1", "global_batch=3", "micro_batch=1", WEIGHTS, "zero.persistence_threshold=0")
    ended = ranked.run(trained, 3, runs.arguments(shards, tmp_path, *settings)[2:])
    assert all(rank.code != 0 and "not a multiple of 8 on each of 3 ranks" in rank.err for rank in ended), ended[0].err
