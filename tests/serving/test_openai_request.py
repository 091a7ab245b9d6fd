"""Each parameter of OpenAI's schema is applied or refused by name; hostile bodies get an error, no crash."""

import json
import math
import random
import typing

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from pydantic import BaseModel, ValidationError

from onecard.config.generation import GREEDY, SAMPLE
from onecard.inference.controls import Controls
from onecard.serving import refusals
from onecard.serving.openai_request import (
    CHAT_REFUSED,
    COMPLETION_REFUSED,
    ChatRequest,
    CompletionRequest,
    Refusal,
    StreamOptions,
)
from onecard.serving.refusals import RequestError

QUESTION = {"model": "base", "messages": [{"role": "user", "content": "Say red"}]}
BEGINNING = {"model": "base", "prompt": "Say red"}
CASES = [
    (ChatRequest, QUESTION, CHAT_REFUSED, chat_create_params.CompletionCreateParamsStreaming),
    (
        CompletionRequest,
        BEGINNING,
        COMPLETION_REFUSED,
        completion_create_params.CompletionCreateParamsStreaming,
    ),
]
KINDS = pytest.mark.parametrize(("kind", "body", "refused", "official"), CASES, ids=["chat", "completions"])
REFUSED = [
    (kind, body, name, refusal) for kind, body, refused, _ in CASES for name, refusal in refused.items()
]


def refusal_of(kind: type[BaseModel], body: object) -> RequestError | None:
    """What a body is refused with, as the service answers it; None where it is accepted."""
    try:
        kind.model_validate(body)
    except ValidationError as error:
        return refusals.of_validation(error.errors())
    return None


@KINDS
def test_each_official_parameter_is_applied_or_refused(kind, body, refused, official):
    """No parameter is in neither table, or in both, and none is there that OpenAI does not have."""
    names = set(typing.get_type_hints(official))
    assert len(names) > 15
    assert set(kind.model_fields) | set(refused) == names
    assert not set(kind.model_fields) & set(refused)
    assert all(refusal.reason for refusal in refused.values())


@KINDS
def test_null_asks_for_nothing(kind, body, refused, official):
    """Clients that write out all parameters with null are answered."""
    names = set(typing.get_type_hints(official)) - set(body)
    assert refusal_of(kind, body | dict.fromkeys(names)) is None


@pytest.mark.parametrize(("kind", "body", "name", "refusal"), REFUSED)
def test_refused_parameters(kind, body, name, refusal):
    """A value that asks for something is refused with the name and the reason, others pass."""
    assert all(refusal_of(kind, body | {name: value}) is None for value in refusal.asks_nothing)
    for value in ("something", 7, True, [1], {"a": 1}, 1.5):
        if value not in refusal.asks_nothing:
            refused = refusal_of(kind, body | {name: value})
            assert refused is not None
            assert (refused.status, refused.param) == (400, name)
            assert refusal.reason in refused.message


@KINDS
def test_unknown_parameters_are_refused(kind, body, refused, official):
    for name in ("top_k", "min_p", "Temperature", "n_discard", "__class__", "model_config", "a" * 5000):
        refusal = refusal_of(kind, body | {name: 1})
        assert refusal.status == 400
        assert refusal.param == name[:100]


def test_stream_options():
    names = set(typing.get_type_hints(ChatCompletionStreamOptionsParam))
    assert names == {*StreamOptions.model_fields, "include_obfuscation"}
    streamed = QUESTION | {"stream": True}
    assert ChatRequest.model_validate(streamed | {"stream_options": {"include_usage": True}}).include_usage
    assert refusal_of(ChatRequest, streamed | {"stream_options": {"include_obfuscation": False}}) is None
    refused = refusal_of(ChatRequest, streamed | {"stream_options": {"include_obfuscation": True}})
    assert refused.param == "stream_options.include_obfuscation"
    assert refusal_of(ChatRequest, QUESTION | {"stream_options": {}}).param == "stream_options"


def test_applied_parameters_reach_the_settings():
    body = QUESTION | {"temperature": 0.5, "top_p": 0.25, "seed": 11}
    settings = ChatRequest.model_validate(body).settings()
    assert (settings.mode, settings.temperature, settings.top_p, settings.seed) == (SAMPLE, 0.5, 0.25, 11)
    wishes = {
        "frequency_penalty": -1,
        "presence_penalty": 2.0,
        "logit_bias": {"7": -100},
        "stop": ["|", "\\n"],
    }
    controls = ChatRequest.model_validate(QUESTION | wishes).controls()
    assert (controls.frequency_penalty, controls.presence_penalty) == (-1, 2)
    assert (controls.logit_bias, controls.stop) == ({7: -100}, ("|", "\\n"))
    assert ChatRequest.model_validate(QUESTION | {"stop": "a"}).controls().stop == ("a",)
    assert ChatRequest.model_validate(QUESTION).controls() == Controls()


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "null"}}}, {"type": "null"}),
        ({"type": "json_schema", "json_schema": {"name": "a", "strict": True}}, {"type": "object"}),
    ],
)
def test_response_formats(form, schema):
    assert ChatRequest.model_validate(QUESTION | {"response_format": form}).controls().json_schema == schema


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "text", "json_schema": {"name": "a"}},
        {"type": "json_schema", "json_schema": {"schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": []}},
        {"type": "text", "other": 1},
    ],
)
def test_wrong_response_formats(form):
    assert refusal_of(ChatRequest, QUESTION | {"response_format": form}).param.startswith("response_format")


def test_log_probabilities_are_asked_for():
    body = QUESTION | {"logprobs": True}
    assert ChatRequest.model_validate(body).controls().top_logprobs == 0
    assert ChatRequest.model_validate(body | {"top_logprobs": 5}).controls().top_logprobs == 5
    assert ChatRequest.model_validate(QUESTION | {"logprobs": False}).controls().top_logprobs is None
    assert refusal_of(ChatRequest, QUESTION | {"top_logprobs": 5}).param == "top_logprobs"
    assert ChatRequest.model_validate(QUESTION | {"temperature": 0}).settings().mode == GREEDY
    usual = ChatRequest.model_validate(QUESTION).settings()
    assert (usual.mode, usual.temperature, usual.top_p, usual.top_k) == (SAMPLE, 1.0, 1.0, 0)
    assert (usual.repetition_penalty, usual.no_repeat_ngram_size, usual.min_new_tokens) == (1.0, 0, 0)


def test_token_limits():
    assert ChatRequest.model_validate(QUESTION).most_tokens is None
    assert ChatRequest.model_validate(QUESTION | {"max_completion_tokens": 5}).most_tokens == 5
    assert (
        ChatRequest.model_validate(QUESTION | {"max_tokens": 5, "max_completion_tokens": 5}).most_tokens == 5
    )
    both = QUESTION | {"max_tokens": 4, "max_completion_tokens": 5}
    assert refusal_of(ChatRequest, both).param == "max_tokens"
    assert CompletionRequest.model_validate(BEGINNING).most_tokens == 16  # OpenAI's default


def test_parts_of_type_text_are_joined():
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "红"}]
    request = ChatRequest.model_validate(QUESTION | {"messages": [{"role": "user", "content": parts}]})
    assert request.conversations[0].turns[0].text == "Say 红"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal", "x" * 1000, None, 7, []])
def test_other_parts_are_refused_by_name(kind):
    content = [
        {"type": "text", "text": "What is this?"},
        {"type": kind, kind if isinstance(kind, str) else "x": {}},
    ]
    refused = refusal_of(ChatRequest, QUESTION | {"messages": [{"role": "user", "content": content}]})
    assert (refused.status, refused.param) == (400, "messages[0].content")
    assert len(refused.message) < 200
    assert not isinstance(kind, str) or kind[:40] in refused.message


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        [{"role": "user", "content": "x", "name": "Ann"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        [{"role": "assistant", "tool_calls": [{}], "content": "x"}, {"role": "user", "content": "x"}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": "x", "other": 1}],
        [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}],
    ],
)
def test_wrong_messages(messages):
    refused = refusal_of(ChatRequest, QUESTION | {"messages": messages})
    assert refused.status == 400
    assert refused.param.startswith("messages")


def test_an_answer_of_the_client_library_can_be_sent_back():
    """The openai client writes an answer out with these fields, and users append it to their messages."""
    answer = {"role": "assistant", "content": "red", "refusal": None, "annotations": None, "audio": None}
    answer |= {"function_call": None, "tool_calls": None}
    body = QUESTION | {"messages": [*QUESTION["messages"], answer, {"role": "user", "content": "Why?"}]}
    assert refusal_of(ChatRequest, body) is None


HOSTILE = [
    -1,
    1e9,
    10**400,
    math.nan,
    math.inf,
    -math.inf,
    "1",
    "",
    [],
    {},
    [None],
    True,
    "x" * 10**5,
    "\0",
    -(2**70),
]
RIGHT = {  # values of these that are as they should be
    "stop": ["'1'", "'\\x00'", "[]"],
    "user": ["'1'", "''", "'\\x00'"],
    "model": ["'1'", "'\\x00'"],
    "stream": ["True"],
    "frequency_penalty": ["-1"],
    "presence_penalty": ["-1"],
    "logit_bias": ["{}"],
    "seed": ["-1"],
    "logprobs": ["True"],
}
NUMBERS = (
    "n",
    "max_tokens",
    "max_completion_tokens",
    "seed",
    "temperature",
    "top_p",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "stop",
    "stream",
    "user",
)


@pytest.mark.parametrize(
    "name", [*NUMBERS, "model", "messages", "stream_options", "best_of", "top_k", "logprobs"]
)
@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:12])
def test_hostile_values(name, value):
    """Each is refused by name, but for the few that are right where they stand."""
    refused = refusal_of(ChatRequest, QUESTION | {name: value})
    assert (refused is None) == (repr(value) in RIGHT.get(name, [])), refused
    if refused:
        assert refused.param.split("[")[0].split(".")[0] == name
        assert len(refused.message) < 400


def test_schema_fuzz():
    """5,000 random bodies give a request or one refusal with a short text, and never another error."""
    rng = random.Random(0)
    names = [
        *ChatRequest.model_fields,
        *CHAT_REFUSED,
        *CompletionRequest.model_fields,
        "role",
        "content",
        "x",
    ]

    def value(depth: int) -> object:
        kinds = [*HOSTILE, None, 0, 1, 0.5, "user", "text", "\ud800", "base", False]
        choice = rng.randrange(4 if depth < 4 else 2)
        if choice < 2:
            return rng.choice(kinds)
        if choice == 2:
            return [value(depth + 1) for _ in range(rng.randrange(4))]
        return {rng.choice([*names, "type", "text"]): value(depth + 1) for _ in range(rng.randrange(4))}

    accepted = 0
    for number in range(5000):
        kind, body = ((ChatRequest, QUESTION), (CompletionRequest, BEGINNING))[number % 2]
        body = dict(body) if rng.random() < 0.9 else {}
        for _ in range(rng.randrange(3)):
            body[rng.choice(names)] = value(0)
        refused = refusal_of(kind, body if rng.random() < 0.95 else value(0))
        accepted += refused is None
        if refused:
            assert refused.status == 400
            assert len(refused.message) < 400
            json.dumps(refused.as_openai(), allow_nan=False)
    assert 1000 < accepted < 4000


def test_a_refusal_never_repeats_the_value():
    refused = refusal_of(ChatRequest, QUESTION | {"temperature": "sk-secret", "n": "sk-secret"})
    assert "sk-secret" not in json.dumps(refused.as_openai())


def test_refusals_say_why():
    assert isinstance(CHAT_REFUSED["tools"], Refusal)
    assert "templates" in refusal_of(ChatRequest, QUESTION | {"tools": [{"type": "function"}]}).message
