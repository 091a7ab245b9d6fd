"""The Colab notebook on the demo model, run from top to bottom as Jupyter runs it, here and as in Colab."""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.paths import ROOT

SHORT = {  # a few steps instead of those of the demo
    "OPTIONS": '"--max_steps 2 --batch_size 4 --micro_batch_tokens 512 --test_size 2 --learning_rate 3e-3"',
    "OUTPUT_PATH": '"lora-checkpoints/notebook-test"',
}
ROWS = [{"instruction": f"Say {word}", "output": f"{word}, as you wish"} for word in ("red", "green", "blue")]
# these sections are the same in Colab and elsewhere
SAME = ("## 4. Train", "## 5. The loss", "## 6. Ask it something")


def run(folder: Path, left_out: tuple[str, ...] = (), **environment: str) -> str:
    """The output of the notebook in a copy of the project; left_out: beginnings of sections to leave out."""
    notebook = nbformat.read(ROOT / "notebooks" / "finetune.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "the notebook is kept without outputs"
    settings = next(
        cell for cell in notebook.cells if "parameters" in cell.get("metadata", {}).get("tags", [])
    )
    for name, value in SHORT.items():
        settings.source, times = re.subn(
            rf"^{name} = .*$", f"{name} = {value}", settings.source, flags=re.MULTILINE
        )
        assert times == 1, f"the notebook has no {name}"
    section, cells = "", []
    for cell in notebook.cells:
        section = cell.source if cell.cell_type == "markdown" else section
        if not section.startswith(left_out or "no section"):
            cells.append(cell)
    assert len(notebook.cells) - len(cells) == 2 * len(left_out)
    notebook.cells = cells
    place = {"metadata": {"path": str(folder / "notebooks")}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place)
    client.execute(env={**os.environ, **environment})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") + str(output.get("data", {}).keys()) for output in outputs)


@pytest.fixture(scope="module")
def said(copy) -> str:
    return run(copy)


def test_notebook_runs_from_top_to_bottom(said, copy):
    """It has rows, training, the plot, an answer, the chat page and the archive, in a copy of the project."""
    assert "step 2/2" in said
    assert "image/png" in said
    assert re.search(r"Answer: \w+", said)
    assert re.search(r"Open http://127\.0\.0\.1:\d+/", said)
    assert "ended with" in said
    assert (copy / "adapter.zip").stat().st_size > 10_000


@pytest.mark.parametrize("chosen", [True, False])
def test_notebook_in_colab(said, copy, tmp_path, chosen):
    """Only in Colab rows are uploaded, or the sample is used when none were chosen.

    The page opens through Colab's proxy, which alone is let in, and the adapter is downloaded. The training
    is tested above.
    """
    uploads, calls, programs = tmp_path / "uploads", tmp_path / "calls", tmp_path / "bin"
    uploads.mkdir()
    programs.mkdir()
    if chosen:
        (uploads / "mine.json").write_text(json.dumps(ROWS))
    install = programs / "apt-get"  # Colab's Python lacks the module that makes environments
    install.write_text(f'#!/bin/sh\necho "[\\"apt-get\\", \\"$*\\"]" >> "{calls}"\n')
    install.chmod(0o755)
    (copy / "adapter.zip").unlink(missing_ok=True)
    path = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "tests" / "support" / "colab"),
    }
    output = run(copy, SAME, **path, COLAB_CALLS=str(calls))
    rows = ROWS if chosen else json.loads((ROOT / "sample" / "instruct.json").read_text(encoding="utf-8"))
    assert re.search(rf"^rows +{len(rows)}$", output, re.MULTILINE)
    assert "Open http" not in output
    requests = [json.loads(line) for line in calls.read_text().splitlines()]
    (_, installed), (_, names), (_, code), (_, opened), (_, downloaded) = requests
    assert [call for call, _ in requests] == ["apt-get", "upload", "eval_js", "window", "download"]
    assert re.fullmatch(r"install .*python3\.\d+-venv", installed)
    assert names == (["mine.json"] if chosen else [])
    assert code == f"google.colab.kernel.proxyPort({opened[0]})"
    assert opened[1:] == [200, 403, 403]
    assert downloaded == str(copy / "adapter.zip")
    assert Path(downloaded).stat().st_size > 10_000
