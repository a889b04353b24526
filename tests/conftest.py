"""Shared by all tests: the tree is tested as installed, never as the working directory's loose folders."""

import io
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# `python -m pytest` puts the checkout first on the path, where `kernels/` would shadow the distribution of that name.
sys.path[:] = [entry for entry in sys.path if entry not in ("", str(ROOT))]
# For processes that tests start: what they import, and that nothing is asked of the network.
os.environ["PYTHONPATH"] = str(ROOT / "tests" / "support")
os.environ["PYTHONSAFEPATH"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Whichever test imports Triton first, kernels are interpreted; tests that compile them start processes of their own.
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--cases", help="folder of conformance cases to run instead of the committed ones")
    parser.addoption("--kills", type=int, default=3, help="SIGKILLs in a row that the kill test sends")


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder with 60 small image-caption pairs in four shards, train-00000.tar …"""
    # Imported here: the tests on a GPU run without them.
    import numpy as np
    from PIL import Image

    from bifrost.data import write_shard

    folder = tmp_path_factory.mktemp("shards")
    for shard in range(4):
        samples = []
        for number in range(shard * 15, shard * 15 + 15):
            pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(file, "PNG")
            caption = f"pattern number {number} " + "of many colours " * (number % 3)
            samples.append((f"pattern-{number:03d}", {"png": file.getvalue(), "txt": caption.encode()}))
        write_shard(folder / f"train-{shard:05d}.tar", samples)
    return folder
