"""Who gets in, what is answered, and what is refused by the whole application, with a fake chat."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from onecard.errors import UserError
from onecard.inference.controls import Controls
from onecard.serving.access import OPEN
from onecard.serving.app import Settings
from onecard.serving.database import BUSY, StoreUnavailableError
from onecard.serving.keys import Refusal
from tests.support.serving_fakes import ADMIN, GOOD, KEYS, POOR, Setting, events, question


@pytest.fixture
def setting():
    return Setting()


@pytest.fixture
def client(setting):
    return setting.client()


def routes(setting: Setting) -> list[tuple[str, str]]:
    """Each method and path of the OpenAPI document, with a value in place of a parameter."""
    paths = setting.app.openapi()["paths"]
    result = [(method.upper(), path.replace("{name}", "demo")) for path in paths for method in paths[path]]
    assert len(result) > 10
    return result


SECRETS = {  # A1: what a request comes with instead of a valid key
    "missing": [],
    "empty": [("authorization", "Bearer ")],
    "unknown": [("authorization", "Bearer oc-unknown")],
    "expired or revoked": [("authorization", "Bearer oc-gone")],  # Keys.find answers as for an unknown one
    "other scheme": [("authorization", f"Basic {GOOD}")],
    "no scheme": [("authorization", GOOD)],
    "two headers": [("authorization", f"Bearer {GOOD}"), ("authorization", f"Bearer {GOOD}")],
    "two keys": [("authorization", f"Bearer {GOOD} {GOOD}")],
    "too long": [("authorization", "Bearer " + "x" * 5000)],
    "in the query": [("x-api-key", GOOD)],
}


def test_no_route_is_open_without_a_key(setting):
    """A1: every route but four answers each way of having no valid key with the same 401."""
    client, bodies, count = setting.client(None), set(), 0
    for method, path in [*routes(setting), ("GET", "/nowhere"), ("GET", "/v1/"), ("POST", "/docs/x")]:
        for headers in SECRETS.values():
            answer = client.request(method, path, headers=headers, content=b"{")
            if path in OPEN:
                assert answer.status_code == 200
                continue
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            body = answer.json()
            bodies.add(json.dumps(body.get("error", body)))
            count += 1
    assert count >= 10 * 8
    assert len(bodies) == 2  # OpenAI's form and TigerBot's
    assert not setting.chat.asked


def test_the_open_routes_are_these():
    assert {"/docs", "/openapi.json", "/health", "/ready"} == OPEN


def test_a_key_without_the_scope_gets_403(setting):
    """A key for other things reaches only the figures; one with all scopes is never refused."""
    poor, admin = setting.client(POOR), setting.client(ADMIN)
    setting.doors.keys[POOR] = dataclasses.replace(KEYS[POOR], scopes=frozenset({"jobs", "knowledge"}))
    for method, path in routes(setting):
        if path in OPEN or path == "/metrics":
            continue
        assert poor.request(method, path, content=b"{").status_code == 403, path
        assert admin.request(method, path).status_code != 403, path
    assert poor.get("/metrics").status_code == 200


def test_a_revoked_key_ends_at_once(setting, client):
    assert client.get("/v1/models").status_code == 200
    bodies = set()
    for refusal in Refusal:
        setting.doors.keys[GOOD] = refusal
        answer = client.get("/v1/models")
        assert answer.status_code == 401
        bodies.add(answer.text)
    assert len(bodies) == 1
    assert [line.get("refused") for line in setting.lines] == [None, "unknown", "expired", "revoked"]


def test_keys_that_cannot_be_read(setting, client):
    """A12: 503 with a time, and not 401."""
    setting.doors.failure = StoreUnavailableError(Path("onecard.db"), BUSY)
    answer = client.get("/v1/models")
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert "onecard.db" not in answer.text


def test_rate_limits(setting, client):
    """A8: a key over its limit gets 429 with Retry-After, and others are unharmed."""
    setting.doors.wait_seconds["k1"] = 1.2
    refused = client.get("/v1/models", headers={"x-forwarded-for": "9.9.9.9"})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert setting.client(ADMIN).get("/v1/models").status_code == 200


def test_wrong_keys_are_slowed_down_and_right_ones_are_not(setting, client):
    """A8: 1,000 wrong keys, each with another forged address."""
    setting.doors.most_unknown = 20
    bad = setting.client("oc-guess")
    statuses = [
        bad.get("/v1/models", headers={"x-forwarded-for": f"9.9.9.{number}"}).status_code
        for number in range(1000)
    ]
    assert statuses == [401] * 20 + [429] * 980
    assert len(setting.doors.unknown) == 1
    assert client.get("/v1/models").status_code == 200


def test_chat(setting, client):
    answer = client.post("/v1/chat/completions", json=question(seed=3)).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "demo"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "one two three", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert setting.chat.asked[0][2] == (("demo", 1.0),)


def test_the_stream_is_the_answer(client):
    """I4: the pieces of a stream are the whole answer, and it ends with usage and [DONE]."""
    text = "é 漢字 😀 “x” \u2028 data: [DONE] red"
    body = question(text, stream=True, stream_options={"include_usage": True})
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(answer.text)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(text.split())
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in chunks) == " ".join(
        text.split()
    )
    assert [each["choices"][0]["finish_reason"] for each in chunks][-2:] == [None, "stop"]
    assert all(each["usage"] is None for each in chunks)
    assert len({each["id"] for each in chunks}) == 1
    whole = client.post("/v1/chat/completions", json=question(text)).json()
    assert whole["choices"][0]["message"]["content"] == " ".join(text.split())


def test_several_choices_with_seeds_of_their_own(setting, client):
    body = question(n=3, seed=5, max_tokens=2)
    answer = client.post("/v1/chat/completions", json=body).json()
    assert [each["index"] for each in answer["choices"]] == [0, 1, 2]
    assert [each["finish_reason"] for each in answer["choices"]] == ["length"] * 3
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}
    assert [settings.seed for _, settings, _ in setting.chat.asked] == [5, 6, 7]
    chunks = events(client.post("/v1/chat/completions", json=body | {"stream": True}).text)[:-1]
    roles = [each["choices"][0]["index"] for each in chunks if "role" in each["choices"][0]["delta"]]
    assert roles == [0, 1, 2]


def test_penalties_biases_and_stops_reach_the_decoder(setting, client):
    body = question(frequency_penalty=0.5, logit_bias={"299": 1}, stop="x|y")
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert setting.chat.controls == Controls(0.5, 0.0, {299: 1}, ("x|y",))
    refused = client.post("/v1/chat/completions", json=question(logit_bias={"300": 1}))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logit_bias")


def test_completions(setting, client):
    body = {"model": "base", "prompt": ["red green", "blue"], "max_tokens": 1}
    answer = client.post("/v1/completions", json=body).json()
    assert answer["object"] == "text_completion"
    assert [(each["text"], each["finish_reason"]) for each in answer["choices"]] == [
        ("red", "length"),
        ("blue", "stop"),
    ]
    assert all(conversation.is_raw for conversation, _, _ in setting.chat.asked)
    *chunks, done = events(client.post("/v1/completions", json=body | {"stream": True}).text)
    assert done == "[DONE]"
    assert "".join(each["choices"][0]["text"] for each in chunks) == "redblue"


def test_models(setting, client):
    listed = client.get("/v1/models").json()
    assert [each["id"] for each in listed["data"]] == ["base", "demo", "other"]
    assert client.get("/v1/models/demo").json() == listed["data"][1]
    assert client.get("/v1/models/demo+0.5*other").json()["id"] == "demo+0.5*other"
    setting.chat.engine.adapters.append("new/one")
    assert client.get("/v1/models/new/one").status_code == 200


@pytest.mark.parametrize(
    ("name", "active"),
    [
        ("base", ()),
        ("demo", (("demo", 1.0),)),
        ("demo+0.5*other", (("demo", 1.0), ("other", 0.5))),
        ("0.25*demo", (("demo", 0.25),)),
    ],
)
def test_model_names(setting, client, name, active):
    assert client.post("/v1/chat/completions", json=question() | {"model": name}).status_code == 200
    assert setting.chat.asked[0][2] == active


@pytest.mark.parametrize(
    "name",
    [
        "gpt-4o",
        "Demo",
        "demo+",
        "demo+demo",
        "-1*demo",
        "1e9*demo",
        "nan*demo",
        "demo*0.5",
        "+".join("ab" * 50),
        "../x",
    ],
)
def test_unknown_models(setting, client, name):
    answer = client.post("/v1/chat/completions", json=question() | {"model": name})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "base, demo, other" in error["message"]
    assert not setting.chat.asked


def test_too_long_is_refused_with_counts(setting, client):
    """I3: 400 with both numbers, in a stream too; at the limit it is answered, and nothing is left out."""
    for words, most, fits in [
        (199, None, True),
        (200, None, False),
        (190, 10, True),
        (190, 11, False),
        (2000, 1, False),
    ]:
        for stream in (False, True):
            body = question("word " * words, stream=stream, max_tokens=most)
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == (200 if fits else 400), (words, most)
            if not fits:
                error = answer.json()["error"]
                assert error["code"] == "context_length_exceeded"
                assert "200 tokens" in error["message"]
                assert str(words) in error["message"]
    assert all(settings.max_new_tokens <= 10 for _, settings, _ in setting.chat.asked)


def test_calls_that_do_not_exist(client):
    for path in ("/v1/responses", "/v1/embeddings"):
        answer = client.post(path, json={"model": "base", "input": "x"})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_available"
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert client.get("/v1/chat/completions").status_code == 405


def test_tigerbot(setting, client):
    """Its envelope, its errors with a true status, and unknown fields refused."""
    answer = client.post("/bot-service/ai_service/gpt", json={"text": "red green", "modelVersion": "base"})
    assert answer.json() == {"code": 200, "msg": "操作成功", "data": {"result": ["red green"]}}
    assert setting.chat.asked[-1][2] == ()
    assert client.post("/bot-service/ai_service/gpt", json={"text": "red"}).status_code == 200
    assert setting.chat.asked[-1][2] == (("demo", 1.0),)
    wrong = [
        ({"text": "x", "modelVersion": "no"}, 404),
        ({}, 400),
        ({"text": "x", "a": 1}, 400),
        ({"text": 7}, 400),
    ]
    wrong += [({"text": "word " * 500}, 400)]
    for body, status in wrong:
        answer = client.post("/bot-service/ai_service/gpt", json=body)
        assert (answer.status_code, answer.json()["code"], answer.json()["data"]) == (status, status, None)
        assert answer.json()["msg"]


def test_failures_show_nothing(setting, client):
    """A17: no stack trace, no text of the exception, neither in the answer nor in the log."""
    setting.chat.failure = ValueError("oc-good-0123456789 in /home/ann")
    answer = client.post("/v1/chat/completions", json=question())
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    *_, error = events(client.post("/v1/chat/completions", json=question(stream=True)).text)
    assert error["error"]["code"] == "internal_error"
    shown = answer.text + json.dumps(setting.lines)
    assert "ann" not in shown
    assert "Traceback" not in shown
    assert setting.lines[0]["error"] == "ValueError"
    assert any("serving_fakes.py" in place for place in setting.lines[0]["places"])


@pytest.mark.parametrize("failure", [MemoryError(), UserError("/home/ann/model.gguf was removed.")])
def test_what_the_caller_cannot_help_is_no_bad_request(setting, client, failure):
    """Too little memory, and a model that is gone: 503, and the log names the kind of error."""
    setting.chat.failure = failure
    answer = client.post("/v1/chat/completions", json=question())
    assert answer.status_code == 503
    assert "model.gguf" not in answer.text
    assert setting.lines[0]["error"] == type(failure).__name__


def test_log_lines(setting, client):
    """A17, A14: who, what and how long, without prompt or secret, and no text that leaves its line."""
    hostile = "a\nb\x1b[31m\u2028" + "c" * 20
    client.post("/v1/chat/completions", json=question("secret-prompt", user=hostile))
    client.post("/v1/chat/completions", json=question() | {hostile: 1})
    client.get(f"/v1/models/{GOOD}")
    client.get(f"/nowhere/{GOOD}?key={GOOD}")
    lines = [json.dumps(line) for line in setting.lines]
    assert len(lines) == 4
    assert not any(character in "".join(lines) for character in "\n\x1b\u2028")
    assert not any(secret in "".join(lines) for secret in ("secret-prompt", GOOD, "secret"))
    assert setting.lines[0] | {"seconds": 0, "request": "", "time": ""} == {
        "time": "",
        "request": "",
        "key": "k1",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "seconds": 0,
        "model": "demo",
        "user": hostile,
        "prompt_tokens": 1,
        "completion_tokens": 1,
    }
    assert [line["status"] for line in setting.lines] == [200, 400, 404, 404]
    assert setting.lines[2]["route"] == "/v1/models/{name}" or ":path" in setting.lines[2]["route"]
    assert setting.lines[3]["route"] == "none"


def test_prompts_are_logged_when_asked_for():
    setting = Setting(settings=Settings(names=["testserver"], log_prompts=True))
    setting.client().post("/v1/chat/completions", json=question("red"))
    assert setting.lines[0]["prompts"] == [["red"]]


def test_metrics(setting, client):
    client.post("/v1/chat/completions", json=question())
    client.get("/v1/models/" + "x" * 50)
    text = client.get("/metrics").text
    assert 'onecard_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'onecard_tokens_total{kind="completion"} 3.0' in text
    assert "onecard_waiting 0.0" in text
    assert "xxxx" not in text


def test_health_and_readiness(setting):
    client = setting.client(None)
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").status_code == 200
    setting.chat.engine.is_loaded = False
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200


def test_the_page_of_the_calls_loads_nothing(setting):
    page = setting.client(None).get("/docs")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not any(word in page.text for word in ("<script", "src=", "http://", "https://", "<link"))
    for path in setting.app.openapi()["paths"]:
        assert f"{path}</code>" in page.text
    assert "integer from 1 to 16" in page.text


def test_control_characters_reach_no_header(setting):
    """A14: a header that is split, and SQL as a key and as a model, are texts like others."""
    client = setting.client(None)
    for secret in ("x\r\nx-evil: 1", "' OR 1=1 --", "%0d%0ax"):
        answer = client.get("/v1/models", headers={"authorization": f"Bearer {secret}".encode()})
        assert answer.status_code == 401
        assert "x-evil" not in answer.headers
    answer = setting.client().post(
        "/v1/chat/completions", json=question() | {"model": "'; DROP TABLE keys --"}
    )
    assert answer.status_code == 404


def test_hostile_bodies_never_crash(setting, client: TestClient):
    """A7, I5: raw bodies of all kinds; each gets a status below 500 and a JSON body."""
    bodies = [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": NaN}',
        b'"' * 9,
        b"[" * 10_000,
        b'{"a":' * 10_000,
    ]
    bodies += [b"9" * 5000, b'{"model":1e999}', b'{"model":"\\ud800"}', b"\0", b'{"n":' + b"9" * 5000 + b"}"]
    for path in ("/v1/chat/completions", "/v1/completions", "/bot-service/ai_service/gpt"):
        for body in bodies:
            for kind in ("application/json", "text/plain", "multipart/form-data; boundary=x", ""):
                answer = client.post(path, content=body, headers={"content-type": kind})
                assert answer.status_code == 400, (path, body[:20])
                assert answer.json()
    for text in ("", " ", "\0", "\n" * 100, "a" * 10**6, "\u202e", "<|im_end|>"):
        assert client.post("/v1/chat/completions", json=question(text)).status_code in (200, 400)


def test_random_requests_never_fail(client):
    """A7 through the whole application: 500 random bodies, none is answered with 5xx."""
    rng, names = (
        random.Random(1),
        ["n", "max_tokens", "stop", "temperature", "seed", "model", "messages", "stream"],
    )
    values = [-1, 0, 1, 1e9, "1", None, [], {}, True, [1], "demo", 0.5, [{"role": "user", "content": "x"}]]
    for _ in range(500):
        body = question() | {name: rng.choice(values) for name in rng.sample(names, rng.randrange(1, 4))}
        assert client.post("/v1/chat/completions", json=body).status_code < 500
