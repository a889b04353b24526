"""On a GPU machine that has the kernels' few packages alone, `make test-gpu` leaves these tests out."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

NEEDED = ("deepspeed", "diffusers", "hypothesis", "mlflow", "transformers", "webdataset")

collect_ignore_glob = [] if all(find_spec(name) for name in NEEDED) else ["*"]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On tiny tensors, the synchronisation of torch's threads takes longest."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
