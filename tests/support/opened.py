"""What a run makes of its recipe when it is opened, for tests that need only a part of a run."""

from functools import partial
from typing import Any

from bifrost.recipes import Recipe


def inputs(recipe: Recipe) -> Any:
    """Data, plan and stage."""
    from bifrost.trainer.training.inputs import open_inputs
    from bifrost.trainer.training.run_context import open_run_stage

    return open_inputs(recipe.data, recipe.seed, recipe.global_batch, partial(open_run_stage, recipe))


def deepspeed(recipe: Recipe, ranks: int) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    from bifrost.trainer.optim.deepspeed_config import deepspeed_config

    return deepspeed_config(recipe.split(ranks), recipe.precision, recipe.zero, recipe.optimizer.clip, on_cpu=True)
