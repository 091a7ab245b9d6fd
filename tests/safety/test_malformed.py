"""Damaged and hostile headers never end or hang OneCard's own process (tests/support/hostile_files.py)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

from onecard.conversion import gguf, lora_delta
from onecard.errors import CHECKPOINT, UserError
from onecard.inference import gguf_check
from onecard.models import adapter as models_adapter
from onecard.models import base_model, pth_files, tensor_files
from onecard.system import safetensors as system_safetensors
from onecard.system import sandbox
from tests.support import hostile_files
from tests.support.paths import ROOT

WHOLE = {"gguf": 3400, "safetensors": 3300, "pth": 3300, "original": 1000}  # more than 10,000 files together


def survey(kind: str, count: int, seed: int) -> dict:
    if kind == "gguf":
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra of its own")
    command = [sys.executable, "-m", "tests.support.hostile_files", kind, str(count), str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


def hold(found: dict, count: int) -> None:
    assert found["files"] >= count
    assert sum(found["outcomes"].values()) == found["files"]
    assert found["wrong"] == []
    assert found["outcomes"]["refused"] > found["files"] / 3  # bad files are noticed
    assert found["outcomes"]["loaded"] > 0  # and whole files are read


@pytest.mark.parametrize("kind", WHOLE)
def test_no_mutant_crashes_or_hangs_us(kind):
    """Some hundred random mutants and all targeted ones are refused with a message, or are loaded."""
    hold(survey(kind, 150, 0), 150)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHOLE)
def test_none_of_ten_thousand_does(kind):
    results = survey(kind, WHOLE[kind], 10_000)
    print(json.dumps(results))
    hold(results, WHOLE[kind])


def test_the_survey_sees_crashes_hangs_and_tracebacks(monkeypatch):
    """The reader does all three, and the survey continues after each."""
    monkeypatch.setattr(hostile_files, "SECONDS", 0.5)

    def read(number: int) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while number == 2:
            pass
        if number == 3:
            raise ValueError("odd")
        if number == 4:
            raise UserError("bad")

    outcomes = hostile_files.survey(6, lambda _: None, read, {})
    assert list(outcomes.values()) == [
        "loaded",
        "crash",
        "hang",
        "escaped ValueError: odd",
        "refused",
        "loaded",
    ]


def test_hostile_headers_are_refused(tmp_path, tiny_model, monkeypatch):
    """Each reader names the file with exit code 4, and checks the header before a library reads it."""
    seen, look = [], system_safetensors.read
    monkeypatch.setattr(system_safetensors, "read", lambda path: seen.append(path) or look(path))
    for path in tiny_model.glob("*.json"):
        shutil.copy(path, tmp_path)
    config = '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}'
    (tmp_path / "adapter_config.json").write_text(config)
    paths = [tmp_path / name for name in ("model.safetensors", "adapter_model.safetensors")]
    readers = {
        "checkpoint": lambda: system_safetensors.read_tensors(paths[0]),
        "shards": lambda: tensor_files.of_folder(tmp_path),
        "merging": lambda: lora_delta.read(tmp_path),
        "gguf": lambda: gguf.check_adapter(tmp_path),
        "attach": lambda: models_adapter.attach(torch.nn.Linear(2, 2), tmp_path, "x"),
        "base": lambda: base_model.load_base(str(tmp_path), 16, "fp32", "cpu"),
    }
    for fault, header, body in hostile_files.hostile():
        raw = header.encode()
        for path in paths:
            path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)
        for name, read in readers.items():
            with pytest.raises(UserError) as caught:
                read()
            assert caught.value.code == CHECKPOINT, (fault, name)
            assert str(tmp_path) in str(caught.value), (fault, name)
            assert seen, (fault, name)
            seen.clear()


@pytest.mark.parametrize("length", [system_safetensors.MOST + 1, 100 << 20, (1 << 63) + 5, (1 << 64) - 1])
def test_a_large_header_costs_nothing(tmp_path, length):
    """None of it is read, whether or not the file is as long as its header says."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{")
    os.truncate(path, min(length, 200 << 20) + 8)
    tracemalloc.start()
    with pytest.raises(UserError, match=f"its header would have {length} bytes") as caught:
        system_safetensors.read(path)
    assert (caught.value.code, tracemalloc.get_traced_memory()[1] < 1 << 20) == (CHECKPOINT, True)
    tracemalloc.stop()


def test_odd_directories_of_a_pth_file(tmp_path):
    """Another version or several disks mean a damaged file: exit code 4, whatever zipfile calls it."""
    path = tmp_path / "consolidated.00.pth"
    torch.save({"w": torch.ones(4)}, path)
    whole = path.read_bytes()
    entry, locator = whole.index(b"PK\1\2"), whole.index(b"PK\6\7")
    for place, value in ((entry + 6, 255), (locator + 4, 1), (locator + 16, 2)):
        odd = bytearray(whole)
        odd[place] = value
        path.write_bytes(odd)
        with pytest.raises(UserError, match="damaged") as caught:
            pth_files.of_file(path)
        assert caught.value.code == CHECKPOINT


def test_every_mutant_differs():
    data = bytes(range(256)) * 20
    variants = {hostile_files.mutate(data, 1000, seed) for seed in range(500)}
    assert len(variants) > 480
    assert all(each[3000:4000] == data[3000:4000] or len(each) != len(data) for each in variants)


def test_a_file_is_tried_once(tmp_path, monkeypatch):
    """A file that passed is not tried again until it changes; one that failed is tried again."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra of its own")
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    path, adapter, tried = tmp_path / "x.gguf", tmp_path / "a.gguf", []
    path.write_bytes(b"GGUF")
    adapter.write_bytes(b"GGUF")

    def run(base: Path, adapters: list[Path]) -> None:
        tried.append([base, *adapters])
        if b"bad" in path.read_bytes():
            raise UserError("bad")

    monkeypatch.setattr(gguf_check, "_try", run)
    gguf_check.check(path, [])
    gguf_check.check(path, [adapter])
    gguf_check.check(path, [adapter])
    assert tried == [[path], [path, adapter]]
    path.write_bytes(b"GGUF bad")
    for _ in range(2):
        with pytest.raises(UserError):
            gguf_check.check(path, [])
    assert len(tried) == 4


def test_a_trial_that_takes_too_long(tmp_path, monkeypatch):
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra of its own")
    monkeypatch.setattr(gguf_check, "SECONDS", 0.01)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="did not finish reading it within 0 s") as caught:
        gguf_check.check(tmp_path / "x.gguf", [])
    assert caught.value.code == CHECKPOINT


@pytest.mark.parametrize("code", [-6, 4])
@pytest.mark.parametrize("words", ["7", "llama", "-1", "9" * 5000, "", "1"])
def test_whatever_a_crashing_trial_says(tmp_path, monkeypatch, code, words):
    """llama.cpp may write between the child's words; the child sees no secret."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    environments: list[dict[str, str]] = []

    def ended(command, env, **_):
        environments.append(env)
        return subprocess.CompletedProcess(command, code, words, f"{words} it is bad")

    monkeypatch.setattr(subprocess, "run", ended)
    paths = [tmp_path / "x.gguf", tmp_path / "a.gguf"]
    for path in paths:
        path.write_bytes(b"GGUF")
    with pytest.raises(UserError) as caught:
        gguf_check._try(paths[0], paths[1:])
    assert str(paths[words == "1"]) in str(caught.value)
    assert "HF_TOKEN" not in environments[0]
    with pytest.raises(UserError):
        sandbox.convert("onecard.runs.legacy", paths[0], paths[1], 1, damaged=4, late=8)
    assert "HF_TOKEN" not in environments[1]
