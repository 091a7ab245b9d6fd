"""Exported files beside the model they were made of: equal ones agree, and planted faults are found."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from onecard.conversion import gguf
from onecard.data import template as data_template
from onecard.evaluation import parity, probe_texts
from onecard.models import tokenizer as models_tokenizer
from tests.support import tiny
from tests.support.adapters import save_adapter
from tests.support.tokenizers import chatty

pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra of its own: bash tools/setup.sh cpu")
from tests.support.exports import run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("parity") / "model", chatty(), vocab_size=301)


@pytest.fixture(scope="module")
def adapter(base) -> Path:
    return save_adapter(base, base.parent / "adapter")


@pytest.fixture(scope="module")
def exported(base, adapter) -> Path:
    """The folder of an export that no test has compared yet."""
    return run(model_path=base, lora_path=adapter, type="f16", check=False)[0]


def rows_of(folder: Path, base: Path, adapter: Path | None, kind: str = "f16") -> dict[str, parity.ParityRow]:
    """Compare the files of a folder with a model, and return the rows by name."""
    tokenizer = models_tokenizer.load_tokenizer(str(base))
    form = data_template.load("auto" if tokenizer.chat_template else "alpaca", tokenizer)
    expected = parity.reference(base, adapter, form, tokenizer)
    files = folder / f"base-{kind}.gguf", folder / "adapter.gguf" if adapter else None
    return {row.name: row for row in parity.compare(expected, kind, *files, form, tokenizer, 1)}


def test_planted_faults_are_found(exported, base, adapter, tmp_path):
    """A renamed token, slightly changed weights, another adapter and another end token are found."""
    good, plant = (exported / "base-f16.gguf").read_bytes(), tmp_path / "plant"
    shutil.copytree(exported, plant)
    assert not any(row.failed for row in rows_of(plant, base, adapter).values())

    token = good.index(b"\x05\x00\x00\x00\x00\x00\x00\x00quick")  # a text is its length, then its bytes
    (plant / "base-f16.gguf").write_bytes(good[: token + 8] + b"quicq" + good[token + 13 :])
    assert rows_of(plant, base, adapter)["token ids"].failed

    end = good.index(b"tokenizer.ggml.eos_token_id") + 27 + 4  # then the type, then the value
    (plant / "base-f16.gguf").write_bytes(good[:end] + b"\x07\x00\x00\x00" + good[end + 4 :])
    assert rows_of(plant, base, adapter)["end token"].failed

    (plant / "base-f16.gguf").write_bytes(good.replace(b"<turn>{{ m.role }}", b"<turn>{{ m.rule }}"))
    assert rows_of(plant, base, adapter)["chat template"].failed

    (plant / "base-f16.gguf").write_bytes(good[:-9000] + bytes(8000) + good[-1000:])
    assert rows_of(plant, base, adapter)["largest logit gap"].failed

    (plant / "base-f16.gguf").write_bytes(good)
    gguf.adapter(save_adapter(base, tmp_path / "other", 1), base, plant / "adapter.gguf")
    assert rows_of(plant, base, adapter)["largest logit gap"].failed


def test_a_terminal_sees_how_far_the_comparison_is(exported, base, capsys, monkeypatch):
    """There is a bar for the answers and the text of each side; a pipe gets none."""
    titles = [
        f"{part} by {side}:" for side in ("transformers", "llama.cpp") for part in ("answers", "a text")
    ]
    rows_of(exported, base, None)
    assert not [title for title in titles if title in capsys.readouterr().err]
    monkeypatch.setattr(sys, "stderr", tiny.Screen())
    rows_of(exported, base, None)
    assert [title for title in titles if title not in sys.stderr.getvalue()] == []


@pytest.mark.parametrize("kind", ["f16", "q4_k_m"])
def test_logits_that_are_no_numbers_fail(monkeypatch, kind):
    """They fail at any type, although max() would ignore them."""
    answers = [parity.Answer([1], [2], torch.zeros(1, 4))] * 2
    monkeypatch.setattr(parity, "_greedy", lambda *_: [2])
    scores = iter([torch.zeros(1, 4), torch.full((1, 4), float("nan"))])
    monkeypatch.setattr(parity, "_scores", lambda *_: next(scores))
    assert parity._answers(None, answers, kind, (), [])[1].failed


def test_texts_are_a_thousand_different_ones():
    texts = probe_texts.texts(["<turn>"])
    assert len(texts) == len(set(texts)) == probe_texts.COUNT
    assert texts == probe_texts.texts(["<turn>"]) != probe_texts.texts()
    assert sum("<turn>" in text for text in texts) > 50
