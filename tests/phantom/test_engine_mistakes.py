"""Mistakes around the engine's step that the phantom GPU finds: bytes that stay, waits, tensors of the host."""

from __future__ import annotations

from typing import Any

import pytest

import phantoms
from bifrost.recipes import load_recipe
from bifrost.trainer.phantom.check import engine_problems, held_row
from bifrost.trainer.planner import parts, workload

pytestmark = pytest.mark.slow
RANKS, TEXT = 8, 64
SETTINGS = ["zero.reduce_bucket=1000000"]
"""The bucket would otherwise be nearly all that so small a model holds."""


def engine_mistakes() -> dict[str, Any]:
    """In a process with the phantom GPU: what each of these changes does to the counts of the engine for tiny-mllm."""
    import torch

    from bifrost.trainer.optim.ema import Ema
    from bifrost.trainer.optim.engine import Engine
    from bifrost.trainer.phantom.engine import count_engine

    step, update, create, moments = Engine.step, Ema.update, Ema.__init__, Engine._create_moments

    def reading(self: Engine, lr: float, skip: bool) -> bool:
        return step(self, lr * (1 + 0 * self.grad_norm().item()), skip)

    def on_host(self: Ema, masters: Any, statistics: Any) -> None:
        update(self, {name: master + torch.zeros(len(master)) for name, master in masters.items()}, statistics)

    def copied(self: Ema, masters: Any, statistics: Any) -> None:
        update(self, {name: master + torch.zeros(1).to(master.device) for name, master in masters.items()}, statistics)

    def double(self: Any, *arguments: Any) -> None:
        create(self, *arguments)
        self.exact = {name: average.double() for name, average in self.slices.items()}

    def twice(self: Any) -> None:
        moments(self)
        self.former = [state["exp_avg"].clone() for state in self._engine.optimizer.optimizer.state.values()]

    changes = {
        "none": (Engine, "step", step),
        "a wait": (Engine, "step", reading),
        "no update": (Engine, "step", lambda self, lr, skip: step(self, lr, skip) and False),
        "a host tensor": (Ema, "update", on_host),
        "a copy": (Ema, "update", copied),
        "averages in fp64, too": (Ema, "__init__", double),
        "moments twice": (Engine, "_create_moments", twice),
    }
    found: dict[str, Any] = {}
    for name, (owner, attribute, value) in changes.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, attribute, value)
            try:
                found[name] = count_engine(load_recipe("tiny-mllm", SETTINGS), RANKS, TEXT).as_json()
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return phantoms.run_once(tmp_path_factory, engine_mistakes)


def held_agrees(counts: dict[str, Any]) -> bool:
    recipe = load_recipe("tiny-mllm", SETTINGS)
    return held_row(parts(recipe, TEXT), workload(recipe), RANKS, counts).agrees


def test_without_a_mistake_nothing_is_found(found: dict[str, Any]) -> None:
    assert engine_problems(found["none"]) == [] and held_agrees(found["none"])


@pytest.mark.parametrize("mistake", ["averages in fp64, too", "moments twice"])
def test_bytes_that_are_not_planned_are_found(mistake: str, found: dict[str, Any]) -> None:
    assert engine_problems(found[mistake]) == []
    assert not held_agrees(found[mistake])


@pytest.mark.parametrize(
    ("mistake", "problem"),
    [
        ("a wait", "the host waits for a value, 1 x: phantom/test_engine_mistakes.py: reading"),
        ("a copy", "the host waits for a copy"),
        ("no update", "a step did not update the weights"),
    ],
)
def test_a_wait_or_a_missing_update_is_named(mistake: str, problem: str, found: dict[str, Any]) -> None:
    assert problem in "\n".join(engine_problems(found[mistake]))


def test_a_tensor_of_the_host_fails(found: dict[str, Any]) -> None:
    assert "FakeTensorDeviceMismatchError" in found["a host tensor"]
