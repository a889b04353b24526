"""Tests in processes that have a phantom GPU; without a compiler, or with torch's build for CUDA, all are skipped."""

import pytest

from bifrost.trainer.phantom.device import build, unavailable


@pytest.fixture(scope="session", autouse=True)
def device() -> None:
    if reason := unavailable():
        pytest.skip(reason)
    build()
