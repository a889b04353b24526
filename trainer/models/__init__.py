"""Models: the frozen backbone, the generation branch, prompts, masks, weights."""

# Before transformers, whose Qwen2.5-VL imports Triton: on a CPU it must be told first that it interprets.
from ...kernels import runtime  # noqa: F401
