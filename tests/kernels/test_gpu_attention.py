"""Every attention backend on a GPU against dense scores in fp64. Needs only torch and pytest."""

import pytest
import torch

from bifrost.kernels import PrefixLayout, prefix_attention, segment_attention
from bifrost.kernels.attention import BACKENDS, unavailable

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS, PATCHES, SCALE = [80, 1, 300, 37], 256, 128**-0.5


def run(backend: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The results of both calls and the gradients of all inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    query, key, value, text_query, text_key, text_value = leaves
    layout = PrefixLayout.of(LENGTHS, PATCHES, query.device)
    image = prefix_attention(query, key, value, text_key, text_value, layout, SCALE, backend)
    text = segment_attention(text_query, text_key, text_value, layout.text, layout.text, True, SCALE, backend)
    (image.double().square().sum() + text.double().square().sum()).backward()
    return [image.detach(), text.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("heads", [(28, 4), (16, 2)], ids=["7b", "3b"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_at_most_twice_dense_pytorchs(backend: str, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    device = torch.device("cuda")
    if reason := unavailable(backend, device, dtype):
        pytest.skip(reason)
    torch.manual_seed(0)
    rows, texts = len(LENGTHS) * PATCHES, sum(LENGTHS)
    shapes = [(n, h, 128) for n in (rows, texts) for h in (heads[0], heads[1], heads[1])]
    tensors = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    exact = run("reference", [t.double() for t in tensors])
    eager = run("sdpa", tensors)
    found = run(backend, tensors)
    for ours, theirs, wanted in zip(found, eager, exact, strict=True):
        error = (ours.double() - wanted).norm() / wanted.norm()
        assert error <= 2 * (theirs.double() - wanted).norm() / wanted.norm() + 1e-4
