"""Log-probabilities of an answer, compared with those of the model's own scores, and the bytes of tokens."""

import dataclasses
import math
import random

import pytest
import torch

from onecard.config import generation
from onecard.config.generation import GREEDY, SAMPLE
from onecard.data import template as data_template
from onecard.data.conversation import Conversation, Turn
from onecard.inference import decoding, logprobs
from onecard.inference import rules as inference_rules
from onecard.inference.chat import Chat, Reply
from onecard.inference.controls import Controls
from onecard.inference.detokenizer import final
from onecard.inference.transformers_engine import Engine
from onecard.models import base_model
from tests.support import tiny
from tests.support.score_table import ScoreTable
from tests.support.tokenizers import TOKENIZERS

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, PROMPT = 24, [3, 5]
QUICK = dataclasses.replace(generation.of_request(0, max_tokens=24), min_new_tokens=24)
QUESTION = Conversation((Turn("user", "Say red"),))


def plain_logprobs(row: list[float]) -> list[float]:
    total = math.log(math.fsum(math.exp(score) for score in row))
    return [score - total for score in row]


@pytest.mark.parametrize("mode", [GREEDY, SAMPLE])
def test_they_are_those_of_the_models_own_scores(mode):
    """Neither temperature, filters, penalties nor bias change them, however much they change the choice."""
    options = dataclasses.replace(
        generation.of_request(0.5, 0.8, 20, seed=3), mode=mode, top_k=5, repetition_penalty=1.3
    )
    rules = [inference_rules.penalties(1.0, 1.0), inference_rules.bias({4: 5.0, 7: -100.0})]
    table = ScoreTable(0, VOCABULARY, PROMPT)
    steps = list(decoding.decode(table, PROMPT, options, [], 20, None, rules, 3))
    for step, row in zip(steps, table.rows, strict=True):
        expected = plain_logprobs(row)
        best = sorted(range(VOCABULARY), key=lambda token: -expected[token])[:3]
        assert step.scored.token == step.beams[0][-1]
        assert step.scored.logprob == pytest.approx(expected[step.scored.token], abs=1e-5)
        assert [token for token, _ in step.scored.top] == best
        assert [value for _, value in step.scored.top] == pytest.approx([expected[t] for t in best], abs=1e-5)
    unasked = list(decoding.decode(ScoreTable(0, VOCABULARY, PROMPT), PROMPT, options, [], 20, None, rules))
    assert [step.beams for step in unasked] == [step.beams for step in steps]
    assert {step.scored for step in unasked} == {None}


def test_impossible_tokens_have_a_number_that_json_can_hold():
    scores = torch.tensor([[0.0, -torch.inf, 1.0]])
    scored = decoding._scored_token(scores, 1, 20)
    assert scored.logprob == decoding.LEAST_LOGPROB
    assert scored.top[-1] == (1, decoding.LEAST_LOGPROB)
    assert len(scored.top) == 3


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_of_the_tokens_are_the_text(name):
    """The tokens of a text, characters of several tokens among them, join to its bytes."""
    tokenizer = TOKENIZERS[name]()
    token_bytes = logprobs.TokenBytes(tokenizer)
    for text in ("red green", "答案：水在一百度沸腾。", "a 😀 b\n\tc", "x  y", "\ufffd!", "é|é"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(token_bytes.of(token) for token in ids)
        assert joined.decode().strip() == final(tokenizer, ids, [])
        assert text in joined.decode() or name == "unigram"  # which has no token for some characters
    assert token_bytes.of(tokenizer.eos_token_id) is None
    assert token_bytes.text(tokenizer.eos_token_id) == tokenizer.eos_token
    assert token_bytes.of(len(tokenizer)) is None
    parts = [token_bytes.text(token) for token in tokenizer.encode("😀", add_special_tokens=False)]
    if len(parts) > 2:
        assert "\\xf0" in "".join(parts)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_of_random_tokens_are_what_a_reader_sees(name):
    """Where the bytes are whole characters, they are the text that the detokenizer writes."""
    tokenizer = TOKENIZERS[name]()
    token_bytes, chance, compared = logprobs.TokenBytes(tokenizer), random.Random(0), 0
    for _ in range(300):
        ids = [chance.randrange(len(tokenizer)) for _ in range(chance.randint(1, 4))]
        joined = b"".join(token_bytes.of(token) or b"" for token in ids)
        try:
            text = joined.decode()
        except UnicodeDecodeError:
            continue
        assert text.strip() == final(tokenizer, ids, [])
        compared += 1
    assert compared > 30


@pytest.fixture(scope="module")
def talk(tiny_model) -> Chat:
    model = base_model.load_base(str(tiny_model), 16, "fp32", "cpu").eval()
    tokenizer = tiny.tokenizer()
    return Chat(Engine(model, tokenizer, 512), tokenizer, data_template.load("alpaca", tokenizer))


def replies(talk: Chat, controls: Controls, settings=QUICK, question=QUESTION, **how) -> list[Reply]:
    return list(talk.stream(question, settings, controls=controls, **how))


def joined(reply: Reply) -> bytes:
    return b"".join(choice.content or b"" for choice in reply.logprobs)


def test_a_reply_has_them_only_when_they_are_asked_for(talk):
    assert {reply.logprobs for reply in replies(talk, Controls())} == {None}
    every = replies(talk, Controls(top_logprobs=0))
    assert [len(reply.logprobs) for reply in every] == [reply.completion_tokens for reply in every]
    assert all(choice.top == () for choice in every[-1].logprobs)
    top = replies(talk, Controls(top_logprobs=5))[-1]
    for choice, plain in zip(top.logprobs, every[-1].logprobs, strict=True):
        assert dataclasses.replace(choice, top=()) == plain
        assert len(choice.top) == 5
        assert (choice.top[0].token, choice.top[0].logprob) == (choice.token, choice.logprob)
    assert joined(top).decode("utf-8", "ignore").strip() == top.text.whole.replace("\ufffd", "")


def bars(talk: Chat, **fields) -> Controls:
    """Controls with which the answer is a|a|a and so on."""
    a, bar = (talk.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "a|")
    return Controls(logit_bias={a: 100, bar: 99}, frequency_penalty=1, top_logprobs=1, **fields)


def test_tokens_of_a_stop_text_are_left_out(talk):
    """While the answer grows, those that may become one wait; the text and its tokens always agree."""
    whole = replies(talk, bars(talk))[-1]
    text = whole.text.whole
    assert set(text) == {"a", "|"}
    assert joined(whole).decode() == text
    for stop in (text[5:8], text[20:24], text[5:8] + "x", "|", text[:2]):
        every = replies(talk, bars(talk, stop=(stop,)))
        for reply in every:
            shown = reply.text.whole if reply.finished else reply.text.stable
            assert joined(reply).decode() == shown, stop
        counts = [len(reply.logprobs) for reply in every]
        assert counts == sorted(counts)
        assert (every[-1].finish_reason == "stop") is (stop in text)


def test_a_stop_text_may_begin_in_the_answer_that_is_continued(talk):
    continued = Conversation((*QUESTION.turns, Turn("assistant", "xa")))
    text = replies(talk, bars(talk), question=continued)[-1].text.whole
    last = replies(talk, bars(talk, stop=(text[1:4],)), question=continued)[-1]
    assert (last.text.whole, last.logprobs) == ("x", ())
    inside = replies(talk, bars(talk, stop=("xa",)), question=continued)[-1]
    assert inside.text.whole == text
    assert joined(inside).decode() == text[2:]


def test_a_cancelled_answer_keeps_all(talk):
    calls = iter(range(100))
    stop = "a|a|a|a|a|a|a|a|a|a|a|a|!"
    last = replies(talk, bars(talk, stop=(stop,)), cancelled=lambda: next(calls) > 4)[-1]
    assert last.finish_reason is None
    assert joined(last).decode() == last.text.whole
    assert len(last.logprobs) == last.completion_tokens > 0
