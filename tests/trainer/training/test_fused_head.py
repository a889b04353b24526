"""The fused head under real ZeRO-3: two ranks train it to the same bits as one process with plain torch."""

import pytest
import torch
from torch import Tensor, nn

import opened
import ranked
from bifrost.kernels import PatchLatentHead
from bifrost.recipes import Recipe, load_recipe
from bifrost.trainer.stages import StageModel

STEPS, TOKENS, WIDTH = 4, 40, 72


class Trunk(StageModel):
    """A layer below the head, so that a gradient leaves it, as in the branch."""

    def __init__(self, provider: str) -> None:
        super().__init__()
        self.below = nn.Linear(WIDTH, WIDTH)
        self.head = PatchLatentHead(WIDTH, provider)

    def forward(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(torch.tanh(self.below(hidden)), target, None, TOKENS)


def recipe() -> Recipe:
    settings = ("precision=fp32", "global_batch=2", "micro_batch=1", "optimizer.clip=1e9", "optimizer.lr=0.01")
    return load_recipe("tiny-mllm", settings)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def initial(name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    return draw(*shape, seed=len(name)) * 0.1


def sharded(provider: str) -> list[list[float]]:
    """On each of two ranks: its loss of every step, then the trained weights."""
    from bifrost.trainer.distributed.process_group import join
    from bifrost.trainer.optim.engine import Engine, partitioned

    ranks = join()
    config = opened.deepspeed(recipe(), 2)
    with partitioned(config, ranks.device):
        model = Trunk(provider)
    for name, parameter in model.named_parameters():
        whole = initial(name, tuple(parameter.ds_shape)).flatten()
        slice_ = parameter.ds_tensor
        whole = torch.nn.functional.pad(whole, (0, slice_.numel() * 2 - whole.numel()))
        slice_.data.copy_(whole[ranks.rank * slice_.numel() :][: slice_.numel()])
    assert model.head.weight.numel() == 0, "nothing is gathered outside of a pass"
    engine = Engine(model, recipe().optimizer, config, ranks)
    losses = []
    for step in range(STEPS):
        seed = 2 * step + ranks.rank
        inputs = {"hidden": draw(TOKENS, WIDTH, seed=seed), "target": draw(TOKENS, WIDTH, seed=100 + seed)}
        loss, _ = engine.forward(inputs)
        engine.backward(loss)
        engine.step(0.01, skip=False)
        losses.append(loss.item())
    return [losses, *(slice_.flatten().tolist() for slice_ in engine.masters().values())]


def single(provider: str) -> tuple[list[list[float]], list[Tensor]]:
    """Losses of both micro-batches at every step, and the trained weights, without DeepSpeed."""
    from bifrost.trainer.optim.optimizers import parameter_groups

    model = Trunk(provider)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial(name, parameter.shape))
    settings = recipe().optimizer
    groups = parameter_groups(model, settings)
    optimizer = torch.optim.AdamW(groups, 0.01, settings.betas, settings.eps, fused=True)
    losses = []
    for step in range(STEPS):
        parts = []
        for seed in (2 * step, 2 * step + 1):
            loss, _ = model(draw(TOKENS, WIDTH, seed=seed), draw(TOKENS, WIDTH, seed=100 + seed))
            (loss / 2).backward()
            parts.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parts)
    return losses, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.multi
@pytest.mark.parametrize("provider", ["triton", "in-place", "triton-tma"])
def test_two_ranks_equal_one_process_to_the_bit(provider: str) -> None:
    torch.set_num_threads(1)
    ended = ranked.run(sharded, 2, provider)
    assert all(rank.code in (0, None) for rank in ended), ended[0].err
    losses, weights = single(provider)
    assert [list(pair) for pair in zip(*(rank.value[0] for rank in ended), strict=True)] == losses
    for index, wanted in enumerate(weights, start=1):
        found = [value for rank in ended for value in rank.value[index]]
        assert found[: wanted.numel()] == wanted.flatten().tolist()
