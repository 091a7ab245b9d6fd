"""The Colab notebook on the demo model, run from top to bottom as Jupyter runs it, here and as in Colab."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support import tiny
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


class Session:
    """The cells of the rows and of the training in a session of Colab, with trainings of the harness."""

    def __init__(self, harness, monkeypatch, folder: Path, **parameters: str):
        """folder: the disk of the session; parameters: what the user sets in the first cell."""
        folder.mkdir()
        monkeypatch.chdir(folder)
        self.harness, self.folder, self.started = harness, folder, []
        self.values = {"IN_COLAB": True, "BITS": 16, "run": self.run, "Path": Path, **parameters}
        self.values |= {"json": json, "shlex": shlex, "shutil": shutil}

    def run(self, _: str, program: str, *arguments: str) -> None:
        if program == "tools/check_data.py":
            return
        names, values = arguments[::2], arguments[1::2]
        flags = {name.removeprefix("--"): value for name, value in zip(names, values, strict=True)}
        ended = self.harness.run(Path(program).stem, flags)
        self.started.append((program, ended["said"]))
        if ended["code"]:
            raise SystemExit(ended["said"])

    def execute(self, section: str, **changes: str) -> None:
        """Run the code below a heading of the notebook; changes: what the user sets anew."""
        self.values.update(changes)
        cells = nbformat.read(ROOT / "notebooks" / "finetune.ipynb", as_version=4).cells
        place = next(number for number, cell in enumerate(cells) if cell.source.startswith(section))
        exec(cells[place + 1].source, self.values)


def test_a_run_on_the_drive_outlives_the_session(harness, monkeypatch, tmp_path, tiny_model):
    """After the disk of the session is gone, all cells again go on with the run, on the rows of before."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "support" / "colab")
    monkeypatch.setenv("COLAB_CALLS", str(tmp_path / "calls"))
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "mine.json").write_text(json.dumps(tiny.rows(12)))
    options = "--batch_size 4 --test_size 2 --save_steps 1 --device cpu --dtype fp32 --max_steps "
    settings = {"MODEL_PATH": str(tiny_model), "OUTPUT_PATH": "run", "DRIVE": str(tmp_path / "drive")}
    first = Session(harness, monkeypatch, tmp_path / "one", DATA_PATH="", OPTIONS=options + "2", **settings)
    first.execute("## 3. Your rows")
    first.execute("## 4. Train")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "one")
    (tmp_path / "uploads" / "mine.json").unlink()
    second = Session(harness, monkeypatch, tmp_path / "two", DATA_PATH="", OPTIONS=options + "3", **settings)
    second.execute("## 3. Your rows")
    second.execute("## 4. Train")
    [(program, said)] = second.started
    assert program == "finetune_continue.py"
    assert "(step 2 of 2)" in said
    assert "step 3/3" in said
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls == [["mount", "/content/drive"], ["upload", ["mine.json"]], ["mount", "/content/drive"]]
    with pytest.raises(SystemExit, match="learning_rate"):  # one that cannot change
        second.execute("## 4. Train", OPTIONS=options + "3 --learning_rate 0.01")
    with pytest.raises(SystemExit, match="began with --save_steps, --test_size"):
        second.execute("## 4. Train", OPTIONS=options.replace("--test_size 2 --save_steps 1", "") + "3")
    second.execute("## 4. Train", OPTIONS=options + "3")
    assert "This run is finished" in second.started[-1][1]


def test_the_drive_is_for_colab(harness, monkeypatch, tmp_path):
    session = Session(harness, monkeypatch, tmp_path / "one", DATA_PATH="", OUTPUT_PATH="run", DRIVE="drive")
    with pytest.raises(SystemExit, match="DRIVE is for Colab"):
        session.execute("## 3. Your rows", IN_COLAB=False)
