"""Rows of every schema become the same conversation, or the error names the reason."""

import json

import pytest

from onecard.config import training_rows
from onecard.data import schemas as data_schemas
from onecard.data.conversation import Conversation, Turn, single

TWO = Conversation((Turn("user", "q1"), Turn("assistant", "a1"), Turn("user", "q2"), Turn("assistant", "a2")))
WITH_SYSTEM = Conversation((Turn("system", "s"), *TWO.turns))
PAIRS = [{"instruction": "q1", "output": "a1"}, {"instruction": "q2", "input": "", "output": "a2"}]
GOOD = [
    ("alpaca", {"instruction": "q", "input": "i", "output": "a"}, single("q", "i", "a")),
    ("alpaca", {"instruction": "q", "input": None, "output": "a", "extra": 7}, single("q", "", "a")),
    (
        "alpaca",
        {"system": "s", "instruction": "q", "output": "a"},
        Conversation((Turn("system", "s"), *single("q", "", "a").turns)),
    ),
    ("alpaca", {"instruction": "q2", "output": "a2", "history": [["q1", "a1"]]}, TWO),
    (
        "openai",
        {"system": "s", "messages": [{"role": t.role, "content": t.text} for t in TWO.turns]},
        WITH_SYSTEM,
    ),
    ("dialogue", PAIRS, TWO),
    ("chat", {"input": ["q1", "q2"], "output": ["a1", "a2"]}, TWO),
    ("chitchat", {"history": [{"input": "q1", "output": "a1"}], "input": "q2", "output": "a2"}, TWO),
    ("chitchat", {"history": [["q1", "a1"]], "input": "q2", "output": "a2"}, TWO),
    ("chitchat", {"history": [], "input": "q", "output": "a"}, single("q", "", "a")),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": r, "value": v}
                for r, v in zip(("human", "gpt") * 2, ("q1", "a1", "q2", "a2"), strict=True)
            ]
        },
        TWO,
    ),
    (
        "sharegpt",
        {"conversations": [{"from": t.role, "value": t.text} for t in WITH_SYSTEM.turns]},
        WITH_SYSTEM,
    ),
    ("openai", {"messages": [{"role": t.role, "content": t.text} for t in WITH_SYSTEM.turns]}, WITH_SYSTEM),
    (
        "openai",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "1"}]},
                {"role": "assistant", "content": "call"},
                {"role": "tool", "content": "42"},
                {"role": "assistant", "content": "a"},
            ]
        },
        Conversation(
            (Turn("user", "q1"), Turn("assistant", "call"), Turn("function", "42"), Turn("assistant", "a"))
        ),
    ),
    ("text", {"text": "t"}, Conversation((Turn("text", "t"),))),
    ("content", {"content": "t", "source": "x"}, Conversation((Turn("text", "t"),))),
    (
        "context_completion",
        {"context": "c", "completion": "t"},
        Conversation((Turn("context", "c"), Turn("text", "t"))),
    ),
    ("context_completion", {"context": "", "completion": "t"}, Conversation((Turn("text", "t"),))),
    (
        "prompt_completion",
        {"prompt": "p", "completion": "c"},
        Conversation((Turn("prompt", "p"), Turn("completion", "c"))),
    ),
]
BAD = [  # D16 among them
    (7, "a number"),
    ({}, "keys none"),
    ({"a": 1}, "keys a"),
    ([], "must be one of"),
    ({"instruction": "q"}, "no 'output'"),
    ({"instruction": "", "output": "a"}, "'instruction' is empty"),
    ({"input": ["q"], "output": ["a", "b"]}, "'input' has 1 turns, 'output' has 2"),
    ({"input": [], "output": []}, "'input' is empty"),
    ({"input": [" "], "output": ["a"]}, "turn 1, the user's, is empty"),
    ({"input": ["q", "r"], "output": ["a", " "]}, "turn 4, the assistant's, is empty"),
    ({"messages": []}, "'messages' is empty"),
    ({"messages": "hi"}, "'messages' must be a list"),
    ({"messages": [{"role": "user", "content": "q"}]}, "nothing to learn"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "turn 1 is the assistant's"),
    ({"messages": [{"role": "user", "content": "q"}] * 2}, "turn 2 is the user's"),
    ({"messages": [{"role": "system", "content": "s"}] * 2}, "turn 1 is the system's"),
    ({"messages": [{"role": "wizard", "content": "s"}]}, "role 'wizard' is not known"),
    ({"messages": [{"role": "user"}]}, "no 'content'"),
    ({"messages": [{"role": "user", "content": None}]}, "must be text, but is null"),
    ({"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "a"}]}, "is empty"),
    (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": [1]},
            ]
        },
        "tool_calls",
    ),
    ({"conversations": [{"from": "function", "value": "42"}, {"from": "gpt", "value": "a"}]}, "function's"),
    ({"text": ""}, "'text' is empty"),
    ({"text": "caf\udce9"}, "UTF-8"),
    ({"history": [["q"]], "input": "q", "output": "a"}, "must be an object"),
    ({"context": 1, "completion": "t"}, "'context' must be text"),
]


@pytest.mark.parametrize(("name", "value", "wanted"), GOOD)
def test_every_schema_is_recognised_by_looking(name, value, wanted):
    assert data_schemas.recognise(value) == name
    assert data_schemas.conversation(value) == wanted
    assert data_schemas.conversation(value, name) == wanted
    assert data_schemas.conversation(json.loads(json.dumps(value))) == wanted


@pytest.mark.parametrize(("value", "word"), BAD)
def test_what_is_no_conversation_is_named(value, word):
    with pytest.raises(data_schemas.RowError, match=word):
        data_schemas.conversation(value)


def test_schema_can_be_given():
    """--schema text uses the text of a row that looks like one of another schema."""
    value = {"instruction": "q", "output": "a", "text": "t"}
    assert data_schemas.conversation(value, "text") == Conversation((Turn("text", "t"),))
    assert sorted(training_rows.SCHEMAS) == sorted(data_schemas.SCHEMAS)
