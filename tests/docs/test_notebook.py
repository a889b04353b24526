"""The notebook runs from its first cell to its last, and is stored without outputs."""

import os
from pathlib import Path
from typing import Any

import pytest

nbformat: Any = pytest.importorskip("nbformat", reason="installed with the extra `test`")
FILE = Path(__file__).parents[2] / "notebooks" / "walkthrough.ipynb"


def test_it_is_stored_without_outputs() -> None:
    notebook: Any = nbformat.read(FILE, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}, "nothing of the machine it was written on"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two trainings, on a machine that may be busy
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client_of: Any = pytest.importorskip("nbclient").NotebookClient
    for name in [name for name in os.environ if name.startswith("BIFROST_") or name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    notebook: Any = nbformat.read(FILE, as_version=nbformat.NO_CONVERT)
    client = client_of(notebook, timeout=1500, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    tables = [output["data"]["text/html"] for output in shown if "text/html" in output["data"]]
    images = [output["data"]["image/png"] for output in shown if "image/png" in output["data"]]
    assert len(tables) == 1 and "loss_masked" in tables[0]
    assert len(images) == 3, "the plot, the image, the contact sheet"
    assert "reconstruction" in shown[-2]["data"]["text/plain"]
    for run in ("walk-mllm", "walk-controlnet"):
        assert (tmp_path / "runs" / run / "metrics.jsonl").is_file()
