"""Shared by all tests: the tree is tested as installed, never as the working directory's loose folders."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

# `python -m pytest` puts the checkout first on the path, where `kernels/` would shadow the distribution of that name.
sys.path[:] = [entry for entry in sys.path if entry not in ("", str(ROOT))]
# For processes that tests start: what they import, and that nothing is asked of the network.
os.environ["PYTHONPATH"] = str(ROOT / "tests" / "support")
os.environ["PYTHONSAFEPATH"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Whichever test imports Triton first, kernels are interpreted; tests that compile them start processes of their own.
if os.environ.setdefault("TRITON_INTERPRET", "1") != "0":
    # On a GPU machine too, the suite is that of a CPU; `make test-gpu` runs the tests that need a GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["DS_ACCELERATOR"] = "cpu"


def pytest_addoption(parser):
    parser.addoption("--cases", help="folder of conformance cases to run instead of the committed ones")
    parser.addoption("--real-size", action="store_true", help="also count every shipped recipe at its real size")


def _required(report):
    """With REQUIRE_TESTS set, as in CI, a skipped test is a failed one, unless it needs a GPU, root, or an optional
    package that changes what every process prints and imports (bitsandbytes, which diffusers loads wherever it is
    found)."""
    if report.skipped and os.environ.get("REQUIRE_TESTS") and isinstance(report.longrepr, tuple):
        file, line, reason = report.longrepr
        if not re.search("CUDA|GPU|optional package|need root", reason):
            report.outcome = "failed"
            report.longrepr = f"{file}:{line}: {reason} (REQUIRE_TESTS is set: this may not be skipped)"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return _required((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _required((yield))


def pytest_collection_modifyitems(config, items):
    """Tests on a Slurm cluster first: they wait for minutes, and all go to xdist's first worker, which has the time of
    the whole run for them, since the others take over its remaining tests.
    Those of `make test-phantom` are left out."""
    items.sort(key=lambda item: "cluster" not in item.fixturenames)
    if not config.getoption("--real-size"):
        left_out = [item for item in items if item.get_closest_marker("real_size")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def _replaceable() -> dict[str, Any]:
    """The constants and functions of the product's loaded modules, by dotted name."""
    return {
        f"{module.__name__}.{name}": value
        for module in list(sys.modules.values())
        if module and module.__name__.startswith("bifrost.")  # None hides a package: see `versions.hide`
        for name, value in vars(module).items()
        if name.isupper() or (callable(value) and not name.startswith("__"))  # torch.compile adds __compiled_fn_…
    }


@pytest.fixture(scope="module", autouse=True)
def product_is_unchanged() -> Iterator[None]:
    """A test module that replaces a constant or a function of the product puts it back: the next module of the same
    process would be run with the replacement."""
    before = _replaceable()
    yield
    after = _replaceable()
    assert [name for name, value in before.items() if after.get(name) is not value] == []


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Iterator[Path]:
    """A folder with 60 small image-caption pairs in four shards, train-00000.tar …, for every test to read and none to
    write in: one that does fails the last test of its process."""
    import small_shards  # here, not above: the tests on a GPU run without what it imports

    folder = small_shards.save(tmp_path_factory.mktemp("shards"))
    made = sorted(folder.rglob("*"))
    yield folder
    assert sorted(folder.rglob("*")) == made
