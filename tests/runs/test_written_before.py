"""What was written before the modules of OneCard were regrouped is read, continued and answered as before.

There are two kinds of evidence. The files in written_before/ were written by that commit's programs
(tests/support/written_before.py says how), and any later version must still read them. And where git has the
commit, its programs run here beside today's: on one machine their results must be equal to the last bit.
"""

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from tests.support import written_before as before

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parent / "written_before"
WRITTEN = json.loads((FIXTURES / "written.json").read_text(encoding="utf-8"))
CHAT = {"dtype": "fp32", "terminal": True}
needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama-cpp-python is an extra of its own: bash tools/setup.sh cpu",
)


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the fixtures, in which programs may write."""
    return Path(shutil.copytree(FIXTURES, tmp_path / "copy"))


@pytest.fixture
def today(copy, tmp_path):
    """Run today's program in the copy and return what it wrote to stdout."""

    def run(program: str, options: dict[str, Any], lines=()) -> str:
        return before.run(ROOT, program, options, copy, tmp_path / "cache", lines)

    return run


def test_a_stopped_run_goes_on(copy, today):
    """It ends with the adapter, optimizer state and log that the earlier commit itself reached.

    They are equal bit for bit where the processor, torch's kernels and the packages are those of the machine
    that wrote the fixture. Elsewhere sums are added up in another order: then numbers may differ by 1e-5, and
    the log may say which versions changed. test_both_versions_continue_a_run_alike compares bits on every
    machine.
    """
    today("finetune_continue.py", {"output_path": "run"})
    expected, result = before.outcome(copy / "finished"), before.outcome(copy / "run")
    if before.machine() == WRITTEN["machine"]:
        assert before.differences(expected, result) == []
    else:
        assert_close(expected, result)


def assert_close(expected: dict[str, Any], result: dict[str, Any]) -> None:
    """Names and shapes are equal, and numbers agree to 1e-5."""
    assert expected.keys() == result.keys()
    for name, value in expected.items():
        if name.endswith(".safetensors"):
            one, other = load(value), load(result[name])
            assert one.keys() == other.keys()
            for key in one:
                np.testing.assert_allclose(other[key], one[key], rtol=1e-5, atol=1e-5, err_msg=key)
    steps = [record for record in result["log.jsonl"] if "continued" not in record]
    assert len(steps) == len(expected["log.jsonl"])
    for one, other in zip(expected["log.jsonl"], steps, strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-5)


def test_a_finished_run_is_known_as_finished(copy, today):
    """Nothing is trained again and no file changes."""
    shutil.rmtree(copy / "run")
    (copy / "finished").rename(copy / "run")
    files = contents(copy / "run")
    assert "This run is finished" in today("finetune.py", before.TRAINING)
    assert contents(copy / "run") == files


def test_an_adapter_and_a_saved_chat_answer_as_before(copy, today):
    """The adapter's folder is enough; the chat has its options, and its question is asked again."""
    chat = {**before.ANSWER, **CHAT, "lora_path": "adapter", "model_path": "base"}
    answer = WRITTEN["answers"]["transformers"]
    lines = [WRITTEN["question"], "/clear", "/load chat.jsonl", "/retry", "/save again.jsonl"]
    assert today("interaction.py", {**chat, "seed": 1}, lines) == answer * 2
    saved, again = (json.loads((copy / name).read_text()) for name in ("chat.jsonl", "again.jsonl"))
    assert {**again, "time": ""} == {**saved, "time": ""}


@needs_llama
def test_an_export_answers_as_before(today):
    """The base model and the adapter are GGUF files, and llama.cpp answers."""
    chat = {**before.ANSWER, "lora_path": "gguf"}
    lines = [WRITTEN["question"], "/clear", "/load chat.jsonl", "/retry"]
    assert today("tools/cpu_chat.py", chat, lines) == WRITTEN["answers"]["llama.cpp"] * 2


@needs_llama
def test_an_export_is_known_as_made(copy, today):
    """The same export again changes no file: export.json still says from what it was made."""
    installed = f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"
    if json.loads((copy / "gguf" / "export.json").read_text())["made_with"] != installed:
        pytest.skip(f"the export was made with another version than {installed}, which would make another")
    files = contents(copy / "gguf")
    export = {"model_path": "base", "lora_path": "adapter", "output_path": "gguf"}
    assert "nothing to do" in today("tools/export_gguf.py", export)
    assert contents(copy / "gguf") == files


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    """The files of the earlier commit."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    place = tmp_path_factory.mktemp("earlier")
    command = ["git", "archive", "--output", place / "files.tar", before.COMMIT]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        pytest.skip(f"commit {before.COMMIT[:7]} is not in this clone: {ended.stderr.strip()}")
    with tarfile.open(place / "files.tar") as files:
        files.extractall(place / "checkout", filter="data")
    return place / "checkout"


def test_both_versions_continue_a_run_alike(earlier, tmp_path):
    """Each version begins a run that SIGTERM stops, and the versions continue these runs alike.

    Both continue the run of the earlier version, and the earlier one also continues today's. The results must
    be equal: options, log, adapter and optimizer state, bit for bit. Where the runs were stopped makes no
    difference, as test_resume.py shows.
    """
    checkouts, cache = {"earlier": earlier, "today": ROOT}, tmp_path / "cache"
    options = {**before.TRAINING, "max_steps": 24, "test_size": 2}

    def begin_run(writer: str) -> Path:
        folder = tmp_path / writer
        shutil.copytree(FIXTURES / "base", folder / "base")
        shutil.copy(FIXTURES / "rows.json", folder)
        before.stop_a_run(checkouts[writer], folder, cache, options, after=8)
        return folder

    def continued(folder: Path, reader: str) -> dict[str, Any]:
        duplicate = Path(shutil.copytree(folder, tmp_path / f"{folder.name}-{reader}"))
        before.run(checkouts[reader], "finetune_continue.py", {"output_path": "run"}, duplicate, cache)
        return before.outcome(duplicate / "run")

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(begin_run, checkouts)
        pairs = [(first, "earlier"), (first, "today"), (second, "earlier")]
        expected, *others = pool.map(continued, *zip(*pairs, strict=True))
    steps = [record["step"] for record in expected["log.jsonl"] if "loss" in record]
    assert steps == list(range(1, options["max_steps"] + 1))
    assert [before.differences(expected, other) for other in others] == [[], []]


def test_a_merged_folder_is_known_as_made(earlier, copy, today, tmp_path):
    """Its record names files by place and time, so it is made here; the same merge again does nothing."""
    merge = {"model_path": "base", "lora_path": "adapter", "output_path": "merged"}
    before.run(earlier, "tools/merge_lora.py", merge, copy, tmp_path / "cache")
    files = contents(copy / "merged")
    assert "nothing to do" in today("tools/merge_lora.py", merge)
    assert contents(copy / "merged") == files
