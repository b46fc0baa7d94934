"""The notebooks run from top to bottom, here with small budgets, and are kept without outputs."""

import os
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
# What the cell tagged "parameters" is replaced by, and how many pictures there must be.
SMALL = {
    "quickstart": (
        'answers, new_tokens, training = 40, 12, {"max_steps": 4}\nscore_prompts, gammas = 4, [2]',
        1,
    ),
    "compare": ("answers, new_tokens, train_seconds, score_prompts = 40, 12, 3.0, 4", 2),
    "kernels": ("rows = 4_000", 2),
}

pytestmark = pytest.mark.skipif(not NOTEBOOKS.is_dir(), reason="the wheel has no notebooks")


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def test_every_notebook_is_here() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == SMALL.keys()


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_is_valid_and_has_no_outputs(name: str) -> None:
    notebook = read(NOTEBOOKS / f"{name}.ipynb")
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


@pytest.mark.parametrize(
    "name",
    [
        "kernels",
        *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL if name != "kernels"),
    ],
)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = read(NOTEBOOKS / f"{name}.ipynb")
    small, pictures = SMALL[name]
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    parameters.source = small
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    root = str(NOTEBOOKS.parent)
    paths = [root, os.path.join(root, "kernels"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()  # a cell's error ends the test with its traceback
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    drawn = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(drawn) == pictures
    assert all(len(output.data["image/png"]) > 5_000 for output in drawn)
