"""Shared by all tests: the tree is tested as installed, never as the working directory's loose folders."""

import os
import sys
from pathlib import Path

# `python -m pytest` puts the checkout first on the path, where `kernels/` would shadow the distribution of that name.
sys.path[:] = [entry for entry in sys.path if entry not in ("", str(Path(__file__).parents[1]))]
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser):
    parser.addoption("--cases", help="folder of conformance cases to run instead of the committed ones")
