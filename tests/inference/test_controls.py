"""What a request asks for beyond the options for people: what is refused, stop texts, reasons and counts."""

import dataclasses

import pytest

from onecard.config import generation
from onecard.config.generation import BEAM, GREEDY, SAMPLE
from onecard.data import template as data_template
from onecard.data.conversation import Conversation, Turn
from onecard.errors import UserError
from onecard.inference.chat import Chat, Reply
from onecard.inference.controls import Controls
from onecard.inference.transformers_engine import Engine
from onecard.models import base_model
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = dataclasses.replace(generation.of_request(0, max_tokens=24), min_new_tokens=24)


@pytest.fixture(scope="module")
def talk(tiny_model) -> Chat:
    model = base_model.load_base(str(tiny_model), 16, "fp32", "cpu").eval()
    tokenizer = tiny.tokenizer()
    return Chat(Engine(model, tokenizer, 512), tokenizer, data_template.load("alpaca", tokenizer))


def last(talk: Chat, text: str, settings=QUICK, controls=Controls()) -> Reply:  # noqa: B008  # it is frozen
    *_, reply = talk.stream(Conversation((Turn("user", text),)), settings, controls=controls)
    return reply


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"frequency_penalty": 2.01}, "frequency_penalty must be from -2 to 2, not 2.01."),
        ({"presence_penalty": float("nan")}, "presence_penalty must be from -2 to 2, not nan."),
        ({"logit_bias": {300: 1.0}}, "logit_bias: the tokenizer has no token 300; ids go to 299."),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: the tokenizer has no token -1; ids go to 299."),
        ({"logit_bias": {5: -101}}, "logit_bias of token 5 must be from -100 to 100, not -101."),
        ({"stop": tuple("abcde")}, "stop must be at most 4 texts, not 5."),
        ({"stop": ("",)}, "stop: each text must have 1 to 200 characters."),
        ({"top_logprobs": 21}, "top_logprobs must be from 0 to 20, not 21."),
    ],
)
def test_wrong_values_are_named(talk, fields, words):
    """The check needs no answer, and the stream refuses the same before its first token."""
    with pytest.raises(UserError) as refused:
        talk.check(QUICK, Controls(**fields))
    assert str(refused.value) == words
    with pytest.raises(UserError):
        last(talk, "Say red", QUICK, Controls(**fields))


def test_all_mistakes_come_at_once(talk):
    with pytest.raises(UserError, match=r"presence_penalty .* stop must"):
        talk.check(QUICK, Controls(presence_penalty=3, stop=tuple("abcde")))


@pytest.mark.parametrize(
    "fields",
    [{"frequency_penalty": 1}, {"presence_penalty": -1}, {"logit_bias": {1: 1}}, {"top_logprobs": 0}],
)
def test_beams_refuse_what_follows_one_answer(talk, fields):
    """Stop texts are for beams too."""
    beams = dataclasses.replace(QUICK, mode=BEAM)
    with pytest.raises(UserError, match=f"{next(iter(fields))}: beam search cannot apply this"):
        talk.check(beams, Controls(**fields))
    for mode in (GREEDY, SAMPLE):
        talk.check(dataclasses.replace(QUICK, mode=mode), Controls(**fields))
    talk.check(beams, Controls(stop=("a",)))


def test_a_stop_text_is_taken_as_it_is(talk):
    r"""A | in it separates nothing, a new line is one, and \n stays two characters."""
    bars = talk.tokenizer.encode("a|b", add_special_tokens=False)
    ids = [talk.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in ("|", "\n", "\\", "n")]
    text = last(talk, "Say red", controls=Controls(logit_bias={ids[0]: 100})).text.whole
    assert text == "|" * 24
    for stop, length in (("||", 0), ("|x", 24), ("x|y", 24), ("|", 0)):
        reply = last(talk, "Say red", controls=Controls(stop=("xyz", stop), logit_bias={ids[0]: 100}))
        assert (len(reply.text.whole), reply.finish_reason) == (length, "stop" if length == 0 else "length")
    people = dataclasses.replace(QUICK, stop="x||y")  # three parts, of which one is empty
    assert last(talk, "Say red", people, Controls(logit_bias={ids[0]: 100})).text.whole == "|" * 24
    assert (
        last(talk, "Say red", controls=Controls(stop=("\n",), logit_bias={ids[1]: 100})).completion_tokens
        == 1
    )
    literal = Controls(stop=("\\n",), logit_bias={ids[1]: 100})
    assert last(talk, "Say red", controls=literal).completion_tokens == 24
    assert len(bars) == 3


def test_both_kinds_of_stop_texts_hold(talk):
    """A stop of the options and one of the request: whichever comes first ends the answer."""
    whole = last(talk, "Say blue").text.whole
    early, late = whole[4:6], whole[12:14]
    assert whole.find(late) > whole.find(early)
    people = dataclasses.replace(QUICK, stop=generation_text(late))
    assert (
        last(talk, "Say blue", people, Controls(stop=(early,))).text.whole
        == whole[: whole.find(early)].strip()
    )
    people = dataclasses.replace(QUICK, stop=generation_text(early))
    assert (
        last(talk, "Say blue", people, Controls(stop=(late,))).text.whole
        == whole[: whole.find(early)].strip()
    )


def generation_text(stop: str) -> str:
    assert generation.phrases(stop) == [stop]
    return stop


def test_reasons_and_counts(talk):
    """Every reply counts the tokens so far; the end token is not counted, those of a stop text are."""
    turns = Conversation((Turn("user", "Say red"),))
    replies = [reply for reply in talk.stream(turns, QUICK) if reply.completion_tokens]
    assert [reply.completion_tokens for reply in replies] == list(range(1, 25))
    assert [reply.finish_reason for reply in replies] == [None] * 23 + ["length"]
    prompt = replies[-1].prompt_tokens
    continued = Conversation((*turns.turns, Turn("assistant", "red")))
    *_, reply = talk.stream(continued, QUICK)
    assert reply.prompt_tokens == prompt + len(talk.tokenizer.encode("red", add_special_tokens=False))
    end = next(iter(talk.eos_ids))
    ended = last(talk, "Say red", generation.of_request(0), Controls(logit_bias={end: 100}))
    assert (ended.finish_reason, ended.completion_tokens, ended.text.whole) == ("stop", 0, "")
    *_, cancelled = talk.stream(turns, QUICK, None, lambda: True)
    assert cancelled.finish_reason is None


def test_a_continued_answer_counts_for_the_penalties(talk):
    """What stands there already is as unwelcome as what the model adds; the question is not."""
    letter = talk.tokenizer.encode("z", add_special_tokens=False)[0]
    near = Controls(logit_bias={letter: 30.0}, presence_penalty=0.0)
    question = (Turn("user", "zzzz"),)
    assert last(talk, "zzzz", controls=near).text.whole.startswith("z")

    def begins(frequency: float, turns) -> str:
        controls = dataclasses.replace(near, frequency_penalty=frequency)
        *_, reply = talk.stream(
            Conversation(turns), dataclasses.replace(QUICK, max_new_tokens=1), controls=controls
        )
        return reply.text.whole

    assert begins(2.0, question) == "z"
    assert begins(2.0, (*question, Turn("assistant", "z" * 40))) != "z" * 41
    assert begins(0.0, (*question, Turn("assistant", "z" * 40))) == "z" * 41


def test_without_max_tokens_the_answer_takes_what_the_prompt_leaves(talk):
    """More than half of the context is read; one token less than the context is the most."""
    end = next(iter(talk.eos_ids))
    controls, settings = Controls(logit_bias={end: -100}), generation.of_request(0)
    empty = last(talk, "", settings, controls).prompt_tokens
    for count in (300, 511 - empty):
        text = "z" * count
        assert len(talk.tokenizer.encode(text, add_special_tokens=False)) == count
        reply = last(talk, text, settings, controls)
        assert (reply.prompt_tokens, reply.finish_reason) == (empty + count, "length")
        assert reply.completion_tokens == 512 - empty - count
    with pytest.raises(UserError):
        last(talk, "z" * (512 - empty), settings, controls)
    limited = dataclasses.replace(settings, max_new_tokens=256)
    with pytest.raises(UserError):
        last(talk, "z" * 300, limited, controls)
