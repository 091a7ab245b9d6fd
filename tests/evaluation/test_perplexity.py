"""Perplexity is the plain sum over every token once, and equal in both engines."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onecard.config.tools import PerplexityConfig
from onecard.conversion import gguf, gguf_cache
from onecard.errors import DATA, UserError
from onecard.evaluation import eval_rows, likelihood, merge_fidelity, perplexity, probe_texts
from onecard.inference import transformers_engine
from onecard.models import base_model
from onecard.models import tokenizer as models_tokenizer
from tests.support import tiny
from tests.support.adapters import save_adapter
from tests.support.paths import ROOT
from tests.support.tokenizers import chatty

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("perplexity") / "model", chatty(), vocab_size=301)


@pytest.fixture(scope="module")
def adapter(base) -> Path:
    return save_adapter(base, base.parent / "adapter")


@pytest.fixture(scope="module")
def files(base, adapter) -> tuple[Path, Path]:
    """The model and the adapter as GGUF files."""
    pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is an extra of its own: bash tools/setup.sh cpu"
    )
    model_file = gguf.base(base, base.parent / "base.gguf", any_tokenizer=True)
    return model_file, gguf.adapter(adapter, base, base.parent / "adapter.gguf")


@pytest.mark.parametrize("length", [0, 1])
def test_windows_that_do_not_move_on_are_refused(length):
    with pytest.raises(AssertionError):
        perplexity.windows(4, length)


def test_a_context_too_short_to_measure(tmp_path):
    """It is refused with words instead of running forever; llama.cpp's context may be below the option's."""
    folder = tiny.save_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("red green blue")
    options = PerplexityConfig(data_path=str(tmp_path / "text.txt"), model_path=str(folder), context=2)
    with pytest.raises(UserError, match="context of 2 tokens"):
        perplexity.perplexity(options, gguf_cache.for_llama)


def test_windows_score_every_token_once():
    for count, length in ((5, 8), (8, 8), (9, 8), (100, 7), (1000, 64)):
        for unscored in (0, 1):
            windows = perplexity.windows(count, length, unscored)
            scored = [place for window in windows for place in range(window.scored, window.end)]
            assert scored == list(range(unscored, count))
            assert all(window.end - window.start <= length for window in windows)
            assert all(window.scored - window.start >= length // 2 for window in windows[1:])


def test_score_is_the_plain_sum(base):
    """It is compared with transformers' own logits, one forward pass for each window."""
    tokenizer = models_tokenizer.load_tokenizer(str(base))
    model = base_model.load_base(str(base), 16, "fp32", "cpu").eval()
    text = perplexity.encode(tokenizer, "red green été 🙂 " * 20, most=150)
    score = perplexity.score(transformers_engine.Engine(model, tokenizer, 64), text, 64)
    nats = 0.0
    for start, end, scored in perplexity.windows(150, 64):
        ids = torch.tensor(text.ids[start:end])
        with torch.inference_mode():
            chances = torch.log_softmax(model(ids[None], use_cache=False).logits[0, :-1].double(), -1)
        nats -= chances.gather(1, ids[1:, None])[scored - start - 1 :].sum().item()
    assert (score.tokens, score.nats) == (149, pytest.approx(nats, rel=1e-6))
    scored_text = text.text[text.ends[0] : text.ends[-1]]
    assert (score.characters, score.bytes) == (len(scored_text), len(scored_text.encode()))
    assert score.perplexity == pytest.approx(math.exp(nats / 149), rel=1e-6)


def test_rows_and_texts_have_the_same_perplexity(base):
    """A text in one window and a row with the same tokens as targets give exactly one figure."""
    tokenizer = models_tokenizer.load_tokenizer(str(base))
    model = base_model.load_base(str(base), 16, "fp32", "cpu").eval()
    text = perplexity.encode(tokenizer, "red green été 🙂 " * 20, most=60)
    score = perplexity.score(transformers_engine.Engine(model, tokenizer, 64), text, 64)
    rows = [(text.ids, [False] + [True] * 59)]
    assert eval_rows.perplexity(model, rows, "") == score.perplexity
    assert merge_fidelity.outcome(model, rows)[0] == score.perplexity


@pytest.mark.parametrize("nats", [0.0, 3.5, 1e9, math.inf, math.nan])
def test_a_score_and_rows_agree_on_extreme_figures(nats):
    """An infinite loss is an infinite perplexity, not the largest finite one."""
    figures = [perplexity.Score(nats, 2, 5, 7).perplexity, likelihood.perplexity(nats, 2)]
    assert figures[0] == figures[1] or all(map(math.isnan, figures))
    assert math.isfinite(figures[0]) == math.isfinite(nats)


def test_perplexity_is_the_same_in_both_engines(files, base, adapter, tmp_path):
    """Ids and windows are the same for base and adapter as folders, as files, and with a weight."""
    file = tmp_path / "text.txt"
    file.write_text(probe_texts.TEXT[:600], encoding="utf-8")

    def measured(**options):
        settings = PerplexityConfig(data_path=str(file), context=64, **options)
        return perplexity.perplexity(settings, gguf_cache.for_llama)

    base_file, file_of_adapter = str(files[0]), files[1]
    for weight in (1, 0.5):
        ours, text, _ = measured(model_path=str(base), lora_path=f"{adapter}:{weight}")
        theirs, same, _ = measured(model_path=base_file, lora_path=f"{file_of_adapter}:{weight}")
        assert text.fingerprint == same.fingerprint
        assert theirs.perplexity == pytest.approx(ours.perplexity, rel=1e-3)
    assert measured(model_path=str(base))[0].perplexity != pytest.approx(ours.perplexity, rel=1e-2)
    assert measured(model_path=str(base), max_tokens=50)[0].tokens == 49


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "bad").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").write_bytes(b"")
    for path, message in ((tmp_path / "bad", "not UTF-8"), (tmp_path / "none", "No such file")):
        with pytest.raises(UserError, match=message) as caught:
            perplexity.read(str(path))
        assert caught.value.code == DATA
    command = [sys.executable, ROOT / "tools" / "perplexity.py", "--help"]
    assert "--data_path" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
