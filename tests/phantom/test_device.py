"""The phantom device itself: its figures are those computed by hand, its absence is one line."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

import phantoms
from bifrost.trainer.errors import RunError
from bifrost.trainer.phantom import device


def operations() -> dict[str, Any]:
    """In a process with the phantom GPU: FLOPs, bytes and waits of a few operations."""
    import torch
    from torch.nn import functional as F
    from torch.nn.attention.varlen import varlen_attn

    from bifrost.trainer.phantom.mode import Phantom

    mode = Phantom()
    memory, flops = mode.memory, mode.flops
    found: dict[str, Any] = {}

    def counted() -> list[int]:
        now = [int(flops.total), memory.live, memory.peak]
        mode.restart()
        return now

    with mode:
        a, b = torch.empty(100, 200, device="cuda"), torch.empty(200, 300, device="cuda", requires_grad=True)
        found["two matrices"] = counted()
        product = (a @ b).sum()
        found["product"] = counted()
        product.backward()
        found["its gradient"] = counted()
        del product, a, b
        found["nothing"] = counted()
        heads = torch.empty(2, 4, 60, 64, device="cuda", dtype=torch.bfloat16)
        F.scaled_dot_product_attention(heads, heads, heads)
        found["attention"] = [dict(flops.counts), counted()[0]]
        F.scaled_dot_product_attention(heads, heads, heads, attn_mask=torch.zeros(60, 60, device="cuda").bfloat16())
        found["masked attention"] = [dict(flops.counts), counted()[0]]
        packed = torch.empty(60, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        ends = torch.tensor([0, 20, 60], dtype=torch.int32).to("cuda", non_blocking=True)
        for window in ((-1, -1), (-1, 0)):
            varlen_attn(packed, packed, packed, ends, ends, 40, 40, window_size=window).sum().backward()
            found[f"packed attention {window}"] = counted()[0]
        found["waits before"] = [sum(mode.reads.values()), sum(mode.copies.values())]
        found["read"] = [packed.sum().item(), bool((packed > 0).any()), packed.cpu().device.type]
        torch.tensor([1.0, 2.0], device="cuda") + torch.tensor(1.0)
        found["waits after"] = [sum(mode.reads.values()), sum(mode.copies.values())]
        found["host"] = torch.arange(5).tolist()
    return found


def test_counts_are_those_computed_by_hand() -> None:
    found = phantoms.run(operations)
    a, b, c = (-(-4 * n // 512) * 512 for n in (100 * 200, 200 * 300, 100 * 300))
    assert found["two matrices"] == [0, a + b, a + b]
    assert found["product"] == [2 * 100 * 200 * 300, a + b + 512, a + b + c + 512]
    # Of two products only the one for b is computed; its gradient is kept, the expanded one of the sum is a view.
    assert found["its gradient"][:2] == [2 * 100 * 200 * 300, a + 2 * b + 512]
    assert found["nothing"][1] == 0
    pairs = 2 * 4 * 60 * 60 * 64
    assert found["attention"] == [{"aten::_scaled_dot_product_flash_attention": 4 * pairs}, 4 * pairs]
    assert found["masked attention"] == [{"aten::_scaled_dot_product_efficient_attention": 4 * pairs}, 4 * pairs]
    # Two products forward, five backward, of 4 heads of 64, over the pairs of a query and a key that it sees.
    assert found["packed attention (-1, -1)"] == 7 * 2 * 4 * 64 * (20 * 20 + 40 * 40)
    assert found["packed attention (-1, 0)"] == 7 * 2 * 4 * 64 * (20 * 21 // 2 + 40 * 41 // 2)
    assert found["waits before"] == [0, 0]
    assert found["read"] == [1.0, False, "cpu"]
    assert found["waits after"] == [3, 1]
    assert found["host"] == [0, 1, 2, 3, 4]


def test_without_a_compiler_one_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RunError, match=r"^the phantom GPU needs g\+\+, which is not installed; install it$"):
        device.build()


def test_a_torch_for_cuda_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    monkeypatch.setattr(device, "_torch", lambda: tmp_path)
    with pytest.raises(RunError, match=r"needs torch's CPU build, this is one with CUDA; .*TORCH=cpu"):
        device.build()


def test_a_build_that_fails_names_the_compilers_line(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (source := tmp_path / "cuda.cpp").write_text("int broken() { return missing; }\n")
    monkeypatch.setattr(device, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(RunError, match="'missing' was not declared"):
        device.build()
    assert list((tmp_path / "cache" / "bifrost").iterdir()) == []
