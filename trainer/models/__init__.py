"""Models: the frozen backbone, the generation branch, prompts, masks, weights."""

# Before transformers, whose Qwen2.5-VL imports Triton: on a CPU, Triton's interpreter must be enabled first.
from ...kernels import runtime  # noqa: F401
