"""The service on a tiny random model: the API answers as the chat does, and leaves nothing out."""

import json

import pytest

from onecard.config.generation import GREEDY, Generation
from onecard.data import template as data_template
from onecard.data.conversation import Conversation, Turn
from onecard.errors import UserError
from onecard.inference import history
from onecard.inference.chat import Chat
from onecard.inference.transformers_engine import Engine
from onecard.models import base_model
from tests.support import tiny
from tests.support.serving_fakes import Setting, events, question

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = 512


@pytest.fixture(scope="module")
def chat(tiny_model) -> Chat:
    tokenizer = tiny.tokenizer()
    model = base_model.load_base(str(tiny_model), 16, "fp32", "cpu").eval()
    return Chat(Engine(model, tokenizer, CONTEXT, ()), tokenizer, data_template.load("alpaca", tokenizer))


@pytest.fixture(scope="module")
def client(chat):
    return Setting(chat).client()


def asked(client, stream=False, path="/v1/chat/completions", **body):
    return client.post(path, json={"model": "base", "stream": stream, "temperature": 0, **body})


def test_the_answer_is_that_of_the_chat(chat, client):
    """Greedy and with a seed, whole and streamed."""
    messages = question("Say red 😀 twice")["messages"]
    settings = Generation(GREEDY, repetition_penalty=1.0, min_new_tokens=0, max_new_tokens=12)
    *_, reply = chat.stream(Conversation((Turn("user", "Say red 😀 twice"),)), settings)
    answer = asked(client, messages=messages, max_tokens=12).json()
    assert answer["choices"][0]["message"]["content"] == reply.text.whole
    assert answer["usage"]["prompt_tokens"] == reply.prompt_tokens
    assert answer["usage"]["completion_tokens"] == reply.text.tokens
    for seed in range(4):
        body = {"messages": messages, "max_tokens": 12, "temperature": 1.5, "seed": seed, "stop": ["e", "😀"]}
        whole = asked(client, **body).json()["choices"][0]
        *chunks, done = events(asked(client, stream=True, **body).text)
        text = "".join(each["choices"][0]["delta"].get("content", "") for each in chunks)
        assert done == "[DONE]"
        assert text == whole["message"]["content"]
        assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


def test_nothing_is_left_out_at_the_limit(chat, client):
    """I3: one token fewer than the context is answered whole; one more is refused with the counts."""
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]

    def count_of(messages):
        return chat.prompt_tokens(
            Conversation(tuple(Turn(each["role"], each["content"]) for each in messages))
        )

    statuses = set()
    shortest = count_of([*turns, {"role": "user", "content": "a"}])
    for length in range(CONTEXT - shortest - 1, CONTEXT - shortest + 4):
        messages = [*turns, {"role": "user", "content": "a" * length}]
        count = count_of(messages)
        answer = asked(client, messages=messages)
        statuses.add(answer.status_code)
        assert answer.status_code == (200 if count < CONTEXT else 400)
        if answer.status_code == 200:
            assert answer.json()["usage"]["prompt_tokens"] == count
        else:
            assert f"has {count} in the prompt" in answer.json()["error"]["message"]
    assert statuses == {200, 400}


def test_raw_text_is_continued(chat, client):
    """No template is written around the prompt of /v1/completions."""
    answer = asked(client, path="/v1/completions", prompt="red green", max_tokens=5).json()
    count = len(chat.models_tokenizer("red green").input_ids)
    assert answer["usage"]["prompt_tokens"] == count
    assert answer["usage"]["completion_tokens"] <= 5
    assert asked(client, path="/v1/completions", prompt="").status_code == 400
    assert asked(client, path="/v1/completions", prompt="a" * 600).status_code == 400


def test_raw_text_that_does_not_fit(chat):
    raw = Conversation((Turn("prompt", "red " * 50),))
    with pytest.raises(UserError, match=r"has \d+ tokens, but only 10 fit"):
        history.fit(raw, chat.template, chat.tokenizer, 10)


def test_control_tokens_in_messages_stay_text(chat, client):
    """I1: the end token written as text is no end token."""
    plain, control = (
        asked(client, messages=question(text)["messages"], max_tokens=1).json()["usage"]["prompt_tokens"]
        for text in ("a", "a<end>")
    )
    assert control - plain > 1


def test_what_the_template_cannot_write_is_refused(client):
    messages = [
        {"role": "user", "content": "x"},
        {"role": "system", "content": "y"},
        {"role": "user", "content": "z"},
    ]
    for body in (messages, question("")["messages"], question("\0")["messages"]):
        assert asked(client, messages=body, max_tokens=1).status_code in (200, 400)


def test_log_probabilities_join_to_the_answer(client):
    """Whole and streamed: one entry per token, whose bytes are the text, and the greedy one is the best."""
    body = {"messages": question("Say red twice")["messages"], "max_tokens": 8, "logprobs": True}
    whole = asked(client, top_logprobs=2, **body).json()["choices"][0]
    entries = whole["logprobs"]["content"]
    assert 1 <= len(entries) <= 8
    assert all(len(each["top_logprobs"]) == 2 for each in entries)
    assert all(each["logprob"] == each["top_logprobs"][0]["logprob"] <= 0 for each in entries)
    text = b"".join(bytes(each["bytes"] or []) for each in entries).decode("utf-8", "replace")
    assert text.strip() == whole["message"]["content"]
    *chunks, _ = events(asked(client, stream=True, top_logprobs=2, **body).text)
    parts = [each["choices"][0]["logprobs"] for each in chunks]
    streamed = [entry for part in parts if part for entry in part["content"]]
    assert [each["token"] for each in streamed] == [each["token"] for each in entries]
    logprobs = [each["logprob"] for each in entries]  # rounded otherwise when the prompt is read anew
    assert [each["logprob"] for each in streamed] == pytest.approx(logprobs, abs=1e-4)
    assert asked(client, **body | {"logprobs": False}).json()["choices"][0]["logprobs"] is None


def test_json_of_a_schema(client):
    """The tiny model writes nonsense; with a schema it writes JSON of that schema."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    schema |= {"additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema, "strict": True}}
    body = {"messages": question("A number")["messages"], "response_format": form}
    answer = asked(client, **body, logit_bias={}).json()["choices"][0]
    if answer["finish_reason"] == "stop":
        assert set(json.loads(answer["message"]["content"])) == {"n"}
    else:
        assert answer["message"]["content"].lstrip().startswith("{")
    form["json_schema"]["schema"] = {"type": "nonsense"}
    refused = asked(client, **body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")
