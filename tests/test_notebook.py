"""The Colab notebook, run from top to bottom on the demo model, as Jupyter runs it."""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
SHORT = {  # a few steps instead of the demo's
    "OPTIONS": '"--max_steps 2 --batch_size 4 --micro_batch_tokens 512 --test_size 2 --learning_rate 3e-3"',
    "OUTPUT_PATH": '"lora-checkpoints/notebook-test"',
}


def test_notebook_runs_from_top_to_bottom(copy):
    """Rows, training, the picture, an answer, the chat page and the archive, in a copy of the project."""
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
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(copy / "notebooks")}},
    )
    client.execute()
    shown = [
        output.get("text", "") + str(output.get("data", {}).keys())
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    ]
    said = "\n".join(shown)
    assert "step 2/2" in said
    assert "image/png" in said
    assert re.search(r"Answer: \w+", said)
    assert re.search(r"Open http://127\.0\.0\.1:\d+/", said)
    assert "ended with" in said
    assert (copy / "adapter.zip").stat().st_size > 10_000
