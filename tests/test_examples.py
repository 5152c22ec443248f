"""The notebooks of examples/, executed."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "recover.ipynb"


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """Return what each cell that printed has printed."""
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
    return ["".join(output.text for output in of_cell) for of_cell in outputs]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path_factory.mktemp("work"))}}
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(variable, str(tmp_path_factory.mktemp("jupyter")))
        return NotebookClient(notebook, timeout=300, resources=where).execute()


def test_the_notebook_recovers_the_base(executed):
    streams = {output.get("name") for cell in executed.cells if "outputs" in cell for output in cell.outputs}
    assert streams == {"stdout"}, "nothing on stderr, and no cell that failed"
    counts, certificate, errors, two, loras, outputs = printed(executed)
    assert counts.splitlines() == [
        " 91 tensors shared",
        " 12 tensors to the storage floor",
        "ranks [[8], [12], [16]]",
    ]
    rows = [line.split() for line in certificate.splitlines()[1:]]
    assert len(rows) == 12
    assert all(abs(float(predicted) - float(true)) < 0.3 for predicted, true, _ in rows)
    tuned, recovered = (float(line.split()[-1]) for line in errors.splitlines())
    assert recovered < -16 < tuned
    assert two == "not determined: the difference has rank 20; a third model is needed to split it\n"
    assert loras.splitlines()[0] == "merged-0: 12 layers of rank [8]"
    assert float(outputs.split()[-1]) < 1e-4


def test_the_notebook_is_stored_with_what_it_prints(executed):
    """So that it can be read without being run: jupyter execute --inplace examples/recover.ipynb."""
    stored = printed(nbformat.read(NOTEBOOK, as_version=4))
    assert [text.splitlines()[0].split(":")[0] for text in stored] == [
        text.splitlines()[0].split(":")[0] for text in printed(executed)
    ]
