"""What the phantom GPU is for: a mistake that only a GPU would show, or a plan that no longer fits, is found."""

from __future__ import annotations

from typing import Any

import pytest

import phantoms
from bifrost.recipes import load_recipe
from bifrost.trainer.phantom.check import Row, pass_problems, pass_rows
from bifrost.trainer.planner import parts, workload

SETTINGS = ["micro_batch=64", "global_batch=128", "branch.draws=16"]
"""With many masks per image, so that the branch's activations are the peak, as in a large model."""
TEXT = 64


def mistakes() -> dict[str, Any]:
    """In a process with the phantom GPU: what each of these changes does to the counts of a pass of tiny-mllm."""
    import torch

    from bifrost.trainer.models.branch import GenerationBranch
    from bifrost.trainer.models.elementwise import GatedDown, _GatedDown
    from bifrost.trainer.models.layers import BranchLayer
    from bifrost.trainer.phantom.passes import count_pass
    from bifrost.trainer.stages.patch_latent_model import PatchLatentModel

    forward, branch = BranchLayer.forward, GenerationBranch.forward
    backward, gated = _GatedDown.backward, GatedDown.forward

    def wrapped(change: Any) -> Any:
        return lambda self, hidden, *rest: forward(self, change(hidden), *rest)

    def reading(hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 1 if hidden.sum().item() else hidden

    def wasteful(ctx: Any, gradient: torch.Tensor) -> Any:
        exact = [x.double() for x in (*ctx.saved_tensors, gradient)]
        result = backward(ctx, gradient)
        exact.clear()
        return result

    def twice(self: Any, *rest: Any, **named: Any) -> Any:
        self.layers.append(self.layers[-1])
        try:
            return branch(self, *rest, **named)
        finally:
            del self.layers[-1]

    def on_host(hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros(hidden.shape[-1], dtype=hidden.dtype)

    def in_bf16(model: PatchLatentModel) -> None:
        model.backbone.text.rotary_emb.bfloat16()

    changes = {
        "none": (BranchLayer, "forward", forward),
        "host tensor": (BranchLayer, "forward", wrapped(lambda hidden: hidden + on_host(hidden))),
        "copy": (BranchLayer, "forward", wrapped(lambda hidden: hidden + on_host(hidden).to(hidden.device))),
        "host index": (BranchLayer, "forward", wrapped(lambda hidden: hidden[:, torch.arange(hidden.shape[1])])),
        "wait": (BranchLayer, "forward", wrapped(reading)),
        "data-dependent shape": (BranchLayer, "forward", wrapped(lambda hidden: hidden[:, hidden[0, :, 0] > 0])),
        "rotary tables in bf16": (PatchLatentModel, "restore_rotary", in_bf16),
        "a layer twice": (GenerationBranch, "forward", twice),
        "SwiGLU by autograd": (GatedDown, "forward", lambda self, gate, up, _: gated(self, gate, up, True)),
        "fp64 in the backward pass": (_GatedDown, "backward", staticmethod(wasteful)),
    }
    found: dict[str, Any] = {}
    for name, (owner, attribute, value) in changes.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, attribute, value)
            try:
                found[name] = count_pass(load_recipe("tiny-mllm", SETTINGS), TEXT).as_json()
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return phantoms.run_once(tmp_path_factory, mistakes)


def rows(counts: dict[str, Any]) -> dict[str, Row]:
    recipe = load_recipe("tiny-mllm", SETTINGS)
    return {row.what: row for row in pass_rows(parts(recipe, TEXT, TEXT), workload(recipe), counts)}


def test_without_a_mistake_nothing_is_found(found: dict[str, Any]) -> None:
    assert pass_problems(found["none"]) == []
    assert all(row.agrees for row in rows(found["none"]).values())


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        ("host tensor", "FakeTensorDeviceMismatchError: Expected all tensors to be on the same device"),
        ("data-dependent shape", "DynamicOutputShapeException: aten.nonzero"),
    ],
)
def test_a_step_that_a_gpu_would_refuse_fails(mistake: str, error: str, found: dict[str, Any]) -> None:
    assert error in found[mistake]


@pytest.mark.parametrize(
    ("mistake", "problem"),
    [
        ("copy", "the host waits for a copy"),
        ("host index", "(index)"),
        ("wait", "the host waits for a value"),
        ("rotary tables in bf16", "buffer backbone.text.rotary_emb.inv_freq: torch.bfloat16"),
    ],
)
def test_a_wait_or_a_wrong_type_is_named(mistake: str, problem: str, found: dict[str, Any]) -> None:
    assert problem in "\n".join(pass_problems(found[mistake]))


@pytest.mark.parametrize(
    ("mistake", "what"),
    [
        ("a layer twice", "FLOPs per sample"),
        ("SwiGLU by autograd", "kept per sample"),
        ("fp64 in the backward pass", "peak of a pass"),
    ],
)
def test_a_figure_that_is_not_as_planned_is_found(mistake: str, what: str, found: dict[str, Any]) -> None:
    assert not rows(found[mistake])[what].agrees
