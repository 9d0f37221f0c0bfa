"""docs/quickstart.ipynb: every cell runs, and shows tables with titles and pictures."""

import re
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
QUICK = {
    "epochs": 1, "hidden_size": 16, "inner_size": 16, "head_dim": 16, "d_state": 4, "n_layers": 1,
    "MAX_ITEM_LIST_LENGTH": 10, "text_width": 16, "topk": [10], "gate": "softmax", "train_batch_size": 1024,
}  # fmt: skip


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outputs of the cells by id, after a quick run in an empty folder."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = f"settings = {QUICK}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
        client.execute()
    assert (folder / "quickstart-model" / "model.safetensors").is_file()
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def get_html(outputs: Any) -> str:
    """The only output of a cell."""
    (output,) = outputs
    return str(output.data["text/html"])


def test_every_table_has_titles(cells: dict[str, Any]):
    for name, columns in (
        ("users", ("user", "rank", "item", "score", "title")),
        ("history", ("rank", "item", "title", "score")),
        ("similar", ("rank", "item", "title", "score")),
        ("reasons", ("item", "title", "reason", "because of", "its title", "value")),
        ("weights", ("item", "title", "temporal", "frequency", "semantic")),
        ("save", ("rank", "item", "title", "score")),
    ):
        html = get_html(cells[name])
        assert all(f"<th>{column}</th>" in html for column in columns), name
    assert "Star Wars" in get_html(cells["weights"]) and "Return of the Jedi" in get_html(cells["weights"])
    assert get_html(cells["history"]).count("<tr>") == 6
    best = re.search(r"<td>1</td><td>(\d+)</td>", get_html(cells["history"]))
    assert best and best[0] in get_html(cells["save"]) and f"<td>{best[1]}</td>" in get_html(cells["reasons"])
    assert "items with a title" in get_html(cells["fit"]) and "1,682" in get_html(cells["fit"])


def test_metrics_and_pictures_are_those_of_the_report(cells: dict[str, Any]):
    assert "test_unseen" in get_html(cells["metrics"]) and "ndcg@10" in get_html(cells["metrics"])
    assert "TransitionGraph" in get_html(cells["baselines"])
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', get_html(cells["plots"]))
    assert len(pictures) == 9 and all(b"<svg" in b64decode(picture) for picture in pictures)


def test_nothing_but_results_is_shown(cells: dict[str, Any]):
    """No warning, no progress bar, no path of the machine."""
    for name, outputs in cells.items():
        assert [output.output_type for output in outputs] in ([], ["execute_result"]), name
        assert str(ROOT) not in str(outputs), name
        assert " at 0x" not in str(outputs), name


def test_the_page_is_as_it_was_run_from_top_to_bottom():
    """Its outputs are small, name no folder of a machine, and its links lead somewhere."""
    assert NOTEBOOK.stat().st_size < 400_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type == "execute_result" for cell in code for output in cell.outputs)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/|C:\\\\", NOTEBOOK.read_text())
    for cell in notebook.cells:
        assert cell.outputs or "settings" in cell.source if cell.cell_type == "code" else True
        for target in (
            re.findall(r"\]\((?!https?:)([^)#]+)", cell.source) if cell.cell_type == "markdown" else ()
        ):
            assert (NOTEBOOK.parent / target).exists(), target
