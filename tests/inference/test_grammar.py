"""Models that know nothing write JSON that parses and fits its schema, as the package jsonschema judges."""

import dataclasses
import importlib.util
import json

import jsonschema
import llguidance.hf
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from onecard.config import generation
from onecard.config.generation import BEAM, GREEDY, SAMPLE
from onecard.data import template as data_template
from onecard.data.conversation import Conversation, Turn
from onecard.errors import UserError
from onecard.inference import decoding, grammar
from onecard.inference.chat import Chat, Reply
from onecard.inference.controls import Controls
from onecard.inference.detokenizer import final
from onecard.inference.logprobs import TokenBytes
from onecard.inference.transformers_engine import Engine
from onecard.models import base_model
from tests.support import tiny
from tests.support.score_table import ScoreTable
from tests.support.tokenizers import TOKENIZERS

pytestmark = pytest.mark.usefixtures("one_thread")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["红", "a|b", 'q"', None]}, "maxItems": 3},
        "size": {"anyOf": [{"type": "boolean"}, {"const": "large"}]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMAS = {
    "person": PERSON,
    "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,4}(-[0-9])?$"},
    "number": {"type": "integer", "minimum": -20, "maximum": 3000},
    "reference": {"$defs": {"leaf": {"enum": [1, "two", [3]]}}, "$ref": "#/$defs/leaf"},
    "any object": dict(grammar.JSON_OBJECT),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def answer(tokenizer, vocabulary, schema, options, seed: int) -> tuple[str, str]:
    """The text and the reason of its end, of an answer with random scores."""
    rule = vocabulary.grammar(schema)
    ends, table = [tokenizer.eos_token_id], ScoreTable(seed, len(tokenizer) + 3, [3])  # scores without tokens
    *_, last = decoding.decode(table, [3], options, ends, options.max_new_tokens, None, [rule])
    return final(tokenizer, last.beams[0], []), last.finished


@pytest.mark.parametrize("name", SCHEMAS)
def test_finished_answers_parse_and_fit(tokenizer, name):
    """Greedy and sampled, over seeds; what max_tokens cuts off has another reason."""
    vocabulary = grammar.Vocabulary(tokenizer, [tokenizer.eos_token_id])
    finished, cut = [], 0
    for seed in range(6):
        for mode in (GREEDY, SAMPLE):
            options = dataclasses.replace(generation.of_request(1.5, seed=seed, max_tokens=90), mode=mode)
            text, reason = answer(tokenizer, vocabulary, SCHEMAS[name], options, seed)
            if reason == decoding.LENGTH:
                cut += 1
                continue
            assert reason == decoding.END
            jsonschema.validate(json.loads(text), SCHEMAS[name])
            finished.append(text)
    if name == "any object":  # strings without end are of such JSON too
        assert cut + len(finished) == 12
    else:
        assert len(set(finished)) >= 2, finished


def test_max_tokens_cuts_off(tokenizer):
    """The reason is the length for each number of tokens that is too small, and for no larger one."""
    vocabulary = grammar.Vocabulary(tokenizer, [tokenizer.eos_token_id])
    whole = dataclasses.replace(generation.of_request(0), max_new_tokens=400)
    text, reason = answer(tokenizer, vocabulary, SCHEMAS["list"], whole, 0)
    assert reason == decoding.END
    for count in range(1, 400):
        options = dataclasses.replace(whole, max_new_tokens=count)
        short, reason = answer(tokenizer, vocabulary, SCHEMAS["list"], options, 0)
        assert text.startswith(short)
        if reason == decoding.END:
            break
        assert reason == decoding.LENGTH
    assert short == text
    assert count > 3


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_llguidance_itself_reads_the_same_bytes(name):
    """Its own way of reading a tokenizer shares no code with ours; others have a sign for blanks."""
    tokenizer = TOKENIZERS[name]()
    token_bytes = TokenBytes(tokenizer)
    shown = [token for token in range(len(tokenizer)) if token_bytes.of(token) not in (None, b"\xff")]
    tokens = llguidance.hf.from_tokenizer(tokenizer)
    assert len(shown) > 250
    assert {t: tokens.decode_bytes([t]) for t in shown} == {t: token_bytes.of(t) for t in shown}


def test_only_what_fits_may_come_next(tokenizer):
    """Each token is tried against the few texts that the schema allows; all others are impossible."""
    end, count = tokenizer.eos_token_id, len(tokenizer)
    rule = grammar.Vocabulary(tokenizer, [end]).grammar({"enum": [10, 15, True]})
    scores, ids, token_bytes = torch.zeros(1, count + 7), [], TokenBytes(tokenizer)
    while end not in ids:
        text = b"".join(token_bytes.of(token) for token in ids)
        possible = set(torch.nonzero(rule(ids, scores)[0] == 0).flatten().tolist())
        texts = (b"10", b"15", b"true")
        fits = {
            token
            for token in range(count)
            if token_bytes.of(token) and any(each.startswith(text + token_bytes.of(token)) for each in texts)
        }
        if len([each for each in texts if each.startswith(text) and each != text]) > 1:
            assert possible == fits
        elif text in texts:
            assert possible == {end}
        else:  # what has to come is taken in the tokenizer's own tokens
            assert possible <= fits
            assert possible
        ids.append(max(possible))
    assert text in texts
    assert torch.equal(scores, torch.zeros_like(scores))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "text"}, "The JSON schema cannot be followed: Invalid type: text"),
        ({"type": "string", "pattern": "("}, "regex parse error: .* unclosed group"),
        ({"not": {}}, "Unimplemented keys: ..not.."),
        ({"$ref": "http://localhost/x"}, "does not fetch resources"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable schema"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "cannot be followed"),
        ({"const": float("nan")}, "The JSON schema cannot be read"),
        ({"description": "x" * 100_001}, r"has 1000\d\d characters. It may have 100000 at most"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_with_the_reason(schema, words):
    vocabulary = grammar.Vocabulary(tiny.tokenizer(), [1])
    with pytest.raises(UserError, match=words) as refused:
        vocabulary.grammar(schema)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_deep_schema_is_refused():
    schema: dict = {"type": "string"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(UserError, match=r"cannot be (read|followed)"):
        grammar.Vocabulary(tiny.tokenizer(), [1]).grammar(schema)


def test_a_schema_that_grows_too_complex_ends_with_the_reason():
    """It seems right at first, and its second token leaves too many ways to go on."""
    ways = {f"p{n}": {"type": "string", "pattern": f"a{{1,{n + 1}}}"} for n in range(800)}
    rule = grammar.Vocabulary(tiny.tokenizer(), [1]).grammar({"type": "object", "properties": ways})
    scores, brace = torch.zeros(1, 300), tiny.tokenizer().encode("{", add_special_tokens=False)
    rule([], scores)
    with pytest.raises(UserError, match=r"cannot be followed any further: .* max is 2000") as refused:
        rule(brace, scores)
    assert len(str(refused.value)) < 400


def test_a_tokenizer_that_cannot_write_every_character_is_refused():
    """Its model would leave out what it cannot write, and the text would be no JSON."""
    letters = {letter: n for n, letter in enumerate(["<unk>", "<end>", *map(chr, range(0x20, 0x7F))])}
    core = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>")
    with pytest.raises(UserError, match="needs another tokenizer: this cannot write every character"):
        grammar.Vocabulary(tokenizer, [1])


def test_a_model_without_scores_for_the_text_is_refused():
    """The answer does not just end within the JSON."""
    rule = grammar.Vocabulary(tiny.tokenizer(), [1]).grammar({"type": "object"})
    brace = tiny.tokenizer().encode("{", add_special_tokens=False)[0]
    with pytest.raises(UserError, match="for which the model has no tokens"):
        rule([], torch.zeros(1, brace))


def test_a_tokenizer_that_llguidance_cannot_take_is_refused():
    with pytest.raises(UserError, match=r"JSON of a schema needs another tokenizer: .*out of range"):
        grammar.Vocabulary(tiny.tokenizer(), [1, 300])


def test_without_the_package_its_set_up_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llguidance" else find(name)
    )
    with pytest.raises(UserError, match=r"the package llguidance is not installed.*serve"):
        grammar.Vocabulary(tiny.tokenizer(), [1])


@pytest.fixture(scope="module")
def talk(tiny_model) -> Chat:
    model = base_model.load_base(str(tiny_model), 16, "fp32", "cpu").eval()
    tokenizer = tiny.tokenizer()
    return Chat(Engine(model, tokenizer, 512), tokenizer, data_template.load("alpaca", tokenizer))


def last(talk: Chat, controls: Controls, settings, *more: Turn, **how) -> Reply:
    conversation = Conversation((Turn("user", "Who are you?"), *more))
    *_, reply = talk.stream(conversation, settings, controls=controls, **how)
    return reply


@pytest.mark.parametrize("template_name", ["", "tigerbot"])
def test_a_chat_answers_in_the_format(talk, template_name):
    """Together with penalties, bias and log-probabilities; the weights are random."""
    brace = talk.tokenizer.encode("}", add_special_tokens=False)[0]
    controls = Controls(json_schema=PERSON, frequency_penalty=1, logit_bias={brace: -50}, top_logprobs=2)
    for seed in range(4):
        settings = generation.of_request(1.0, seed=seed, max_tokens=200)
        reply = last(talk, controls, settings, template_name=template_name)
        assert reply.finish_reason == "stop"
        jsonschema.validate(json.loads(reply.text.whole), PERSON)
        assert b"".join(c.content for c in reply.logprobs).decode() == reply.text.whole
        cut = last(
            talk, controls, dataclasses.replace(settings, max_new_tokens=5), template_name=template_name
        )
        assert (cut.finish_reason, cut.completion_tokens) == ("length", 5)
    assert sorted(talk.vocabularies) in ([""], ["", "tigerbot"])


def test_a_least_length_cannot_break_the_format(talk):
    settings = dataclasses.replace(generation.of_request(0, max_tokens=200), min_new_tokens=150)
    reply = last(talk, Controls(json_schema={"enum": [1, 25]}), settings)
    assert reply.finish_reason == "stop"
    assert json.loads(reply.text.whole) in (1, 25)


def test_an_answer_that_is_continued_has_begun_the_format(talk):
    controls = Controls(json_schema=PERSON)
    settings = generation.of_request(1.0, seed=1, max_tokens=200)
    reply = last(talk, controls, settings, Turn("assistant", '{"name": "Ad'))
    assert reply.text.whole.startswith('{"name": "Ad')
    jsonschema.validate(json.loads(reply.text.whole), PERSON)
    with pytest.raises(UserError, match="no beginning of JSON"):
        last(talk, controls, settings, Turn("assistant", "My name is"))


def test_what_cannot_stand_beside_a_format_is_refused(talk):
    controls, plain = Controls(json_schema=PERSON), generation.of_request()
    talk.check(plain, controls)
    for changes in ({"banned": "a"}, {"no_repeat_ngram_size": 2}, {"mode": BEAM}):
        with pytest.raises(UserError, match="json_schema: "):
            talk.check(dataclasses.replace(plain, **changes), controls)
    with pytest.raises(UserError, match="Invalid type: text"):
        talk.check(plain, Controls(json_schema={"type": "text"}))
