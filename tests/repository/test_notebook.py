"""The notebook of docs/notebooks: stored without outputs, and its cells run one after another."""

import json
from pathlib import Path

import numpy
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))


def cells(path):
    """Code of the cells in order."""
    return [
        "".join(cell["source"])
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


def test_own_dataset_runs_from_first_to_last_cell(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    import matplotlib

    monkeypatch.chdir(tmp_path)
    before = matplotlib.get_backend()
    matplotlib.use("agg")
    names: dict = {"__name__": "notebook"}
    try:
        for code in cells(NOTEBOOKS[0]):
            exec(compile(code, "own_dataset.ipynb", "exec"), names)
    finally:
        matplotlib.pyplot.close("all")
        matplotlib.use(before)
    assert names["result"]["status"] == names["own"]["status"] == "complete"
    assert (tmp_path / "runs" / "figures" / "reports" / "knn_step_00000012.json").is_file()
    vectors = names["vectors"]
    assert vectors.shape == (30, names["encoder"].dim) and numpy.isfinite(vectors).all()
    direct = names["maskwise"].Embedder(names["encoder"]).transform([image for image, _ in names["test_set"]])
    numpy.testing.assert_allclose(vectors, direct, rtol=1e-5, atol=1e-5)
    assert 0 <= names["report"].numbers["top1"] <= 100 and 0 <= names["accuracy"] <= 1
    heads = names["heads"]
    assert heads.shape[1:] == names["features"].grid and len(names["axes"]) == 1 + len(heads)
