"""The notebook is stored without outputs, and runs from its first cell to its last."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "tutorial.ipynb"
NOT_COPIED = (".*", "runs", "datasets", "__pycache__", "*.egg-info", "venv", "tests", "benchmarks", "build")


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_has_eleven_cells_and_no_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) == 11
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None
        ast.parse(cell.source)


def test_the_gates_its_last_words_insert_can_be_inserted() -> None:
    from models.gates.insert import insert, parse

    end = nbformat.read(NOTEBOOK, as_version=4).cells[-1].source
    specs = ast.literal_eval(re.findall(r"insert=(\[.*?\])", end)[0])
    for size in "ns":
        text = insert(f"yolov5{size}.yaml", [parse(spec) for spec in specs])
        assert text.count("1, CBAM, [") == 3 and text.count("1, ECA, [") == 1
    assert "models/insert.py --cfg yolov5n.yaml --list-places" in end


@pytest.mark.slow
def test_the_notebook_runs_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    copy = tmp_path / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
    monkeypatch.setenv("EPOCHS", "1")
    monkeypatch.setenv("IMG", "64")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the notebook's own choice
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(copy)}}).execute()

    assert all(cell.outputs for cell in code_cells(notebook)[1:]), "a cell after the set-up showed nothing"
    for name in ("plain", "se-last", "se-before"):
        folder = copy / "runs/train" / name
        assert (folder / "weights/best.pt").is_file()
        assert len((folder / "results.csv").read_text(encoding="utf-8").splitlines()) == 2
    assert any((copy / "runs/detect/se-last").glob("*.*g"))
    shown = [output for output in code_cells(notebook)[5].outputs if "image/png" in str(output.get("data", {}).keys())]
    assert shown, "the pictures were not displayed"
    compared, used = ("".join(o.get("text", "") for o in cell.outputs) for cell in code_cells(notebook)[-2:])
    assert "SE after SPPF" in compared and "SE before SPPF" in compared and "no SE" in compared
    assert "image 1/2: " in used and "image 2/2: " in used
    weights = copy / "runs/train/se-last/weights"
    assert (weights / "best.torchscript").is_file() and (weights / "best-yolov5.pt").is_file()
