"""Tests in processes that have a phantom GPU; without a compiler, or with torch's build for CUDA, all are skipped."""

import pytest

from bifrost.trainer.phantom.device import build, unavailable


@pytest.fixture(scope="session", autouse=True)
def device() -> None:
    if reason := unavailable():
        pytest.skip(reason)
    build()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An engine of real size takes minutes on one core, and several times as long next to others."""
    for item in items:
        if item.get_closest_marker("real_size"):
            item.add_marker(pytest.mark.timeout(1800))
