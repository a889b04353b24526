"""DeepSpeed's configuration of a run."""

from __future__ import annotations

from typing import Any

from ...recipes import BatchSplit
from ...recipes.schema import Zero

CPU_SUB_GROUP = 1_000_000
"""Parameters that a CPU clips, updates and rounds before the next: in its caches, in two thirds of the time."""


def deepspeed_config(
    batch: BatchSplit, precision: str, zero: Zero, clip: float, on_cpu: bool = False
) -> dict[str, Any]:
    """DeepSpeed's configuration; written to the run folder as `ds_config.json`. precision: `bf16` or `fp32`; clip:
    global gradient norm; on_cpu: whether the ranks have no GPU."""
    return {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.passes,
        "gradient_clipping": clip,
        "bf16": {"enabled": precision == "bf16"},
        # Sums over micro-batches and ranks lose too much in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero.stage,
            "overlap_comm": zero.overlap_comm,
            "contiguous_gradients": True,
            "reduce_bucket_size": zero.reduce_bucket,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket,
            "stage3_max_live_parameters": zero.max_live_parameters,
            "stage3_param_persistence_threshold": zero.persistence_threshold,
            # On one node the secondary partition would equal the primary one.
            "zero_hpz_partition_size": zero.hpz if zero.hpz and zero.hpz < batch.ranks else 1,
            "zero_quantized_weights": zero.quantized_weights,
            # It would replace torch's linear layers in the whole process; see models/linear.py.
            "memory_efficient_linear": False,
            **({"sub_group_size": CPU_SUB_GROUP} if on_cpu else {}),
        },
    }
