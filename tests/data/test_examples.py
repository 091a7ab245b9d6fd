"""Rows: what is read, what is refused and at which place, and the order and packing of the others."""

import json
import random
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks.memory_rise import memory_rise
from onecard.data import examples as data_examples
from onecard.data import json_rows, packing, reader
from onecard.data import schemas as data_schemas
from onecard.data.conversation import Conversation, single
from onecard.data.schemas import BadRow
from onecard.errors import DATA, UserError
from tests.support import tiny

GOOD = [
    {"instruction": "Say red", "input": "", "output": "red"},
    {"instruction": "说绿色 😀", "input": "再说一次", "output": "绿色\n绿色"},
    {"instruction": 'Braces } , { in "text"', "output": "a\\b"},
    {"instruction": "Say nothing", "input": None, "output": ""},
]
FAULTS = {  # a broken row, and where in it the fault begins
    "no comma": ('{"instruction": "蓝", "input": "" "output": "b"}', '"output"'),
    "no colon": ('{"instruction": "蓝", "output" "b"}', '"b"'),
    "no quotes": ('{"instruction": "蓝", output: "b"}', "output"),
    "raw tab": ('{"instruction": "a\tb", "output": "b"}', "\t"),
    "bad escape": (r'{"instruction": "a\x", "output": "b"}', r"\x"),
}


def read(path: Path, content: str | bytes) -> list[Conversation | BadRow]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(reader.read_rows(path))


def conversation(row: dict) -> Conversation:
    return single(row["instruction"], row.get("input") or "", row["output"])


def layout(texts: list[str], kind: str) -> str:
    """Return the texts of rows as a file: one row a line (jsonl, array) or all rows in one line."""
    joined = {"jsonl": "\n".join(texts) + "\n", "array": "[\n  " + ",\n  ".join(texts) + "\n]\n"}
    return joined.get(kind) or "[" + ", ".join(texts) + "]"


def place(content: str, position: int) -> tuple[int, int]:
    before = content[:position]
    return before.count("\n") + 1, position - before.rfind("\n")


def texts_of(rows: list[dict]) -> list[str]:
    return [json.dumps(row, ensure_ascii=False) for row in rows]


def as_letters(row: Conversation, number: int = 0, limit: int = 10**6) -> tuple[list[int], list[bool], bool]:
    """An encoding to count by hand: a token for each character; targets are the output and its end."""
    question = row.turns[0]
    prompt, response = question.text + question.input, row.turns[-1].text + "\0"
    ids, is_target = [ord(c) for c in prompt + response], [False] * len(prompt) + [True] * len(response)
    return ids[:limit], is_target[:limit], len(ids) > limit


def random_rows(count: int, seed: int = 0) -> list[Conversation]:
    draw = random.Random(seed)
    return [single(f"{i}" * draw.randint(1, 6), "", "x" * draw.randint(0, 20)) for i in range(count)]


@pytest.mark.parametrize("kind", ["jsonl", "array", "one line"])
def test_each_file_form_gives_the_same_conversations(tmp_path, kind):
    """A JSON array over several lines, one on a single line, and JSONL hold the same rows."""
    assert read(tmp_path / "rows", layout(texts_of(GOOD), kind)) == [conversation(row) for row in GOOD]


def test_indented_array_is_read_as_json_reads_it(tmp_path):
    """Rows that stretch over several lines are read whole."""
    assert read(tmp_path / "rows", json.dumps(GOOD, indent=4)) == [conversation(row) for row in GOOD]


@pytest.mark.parametrize("kind", ["jsonl", "array"])
@pytest.mark.parametrize("chunk", [16, 1 << 20])
def test_byte_order_mark_and_crlf_change_nothing(tmp_path, monkeypatch, kind, chunk):
    """A file saved by a Windows editor holds the same rows at the same places."""
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    content = layout([*texts_of(GOOD), FAULTS["no comma"][0]], kind)
    plain = read(tmp_path / "rows", content)
    assert isinstance(plain[-1], BadRow)
    assert read(tmp_path / "rows", b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode()) == plain


@pytest.mark.parametrize("kind", ["jsonl", "array"])
def test_escapes_are_the_characters_they_stand_for(tmp_path, monkeypatch, kind):
    """Escaped characters, also surrogate pairs, are read as plain ones across any chunk border."""
    content = layout([json.dumps(row, ensure_ascii=True) for row in GOOD], kind)
    assert r"\ud83d\ude00" in content
    for chunk in range(2, len(content) + 2, 3):
        monkeypatch.setattr(json_rows, "CHUNK", chunk)
        assert read(tmp_path / "rows", content) == [conversation(row) for row in GOOD]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_refused(tmp_path, encoding):
    """UTF-16 text ends with exit code 3 and the advice to save it as UTF-8."""
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    with pytest.raises(UserError, match="UTF-8") as caught:
        read(tmp_path / "rows", mark + layout(texts_of(GOOD), "array").encode(encoding))
    assert caught.value.code == DATA


@pytest.mark.parametrize("where", [0, 2, 4], ids=["first", "middle", "last"])
@pytest.mark.parametrize("kind", ["jsonl", "array", "one line"])
@pytest.mark.parametrize("fault", FAULTS)
def test_broken_row_is_named_by_file_line_and_column(tmp_path, monkeypatch, fault, kind, where):
    """The message names the exact character, and the other rows are kept at any chunk border."""
    path, (text, part) = tmp_path / "rows", FAULTS[fault]
    content = layout([*texts_of(GOOD)[:where], text, *texts_of(GOOD)[where:]], kind)
    line, column = place(content, content.index(text) + text.index(part))
    for chunk in [*range(2, len(content) + 2, 11), 1 << 20]:
        monkeypatch.setattr(json_rows, "CHUNK", chunk)
        rows = read(path, content)
        bad = [row for row in rows if isinstance(row, BadRow)]
        assert [row.describe(path).split(": ")[0] for row in bad] == [f"{path}:{line}:{column}"]
        assert [row for row in rows if row not in bad] == [conversation(row) for row in GOOD]
        assert rows.index(bad[0]) == where


def test_broken_row_across_the_real_chunk_border_is_placed(tmp_path):
    """A fault behind the first million characters, in a row across the border, is placed exactly."""
    long = {"instruction": "长" * 300_000, "input": "", "output": "b"}
    broken = json.dumps(long, ensure_ascii=False).replace(', "output"', ' "output"')
    content = layout([*texts_of([long] * 3), broken, *texts_of([long] * 3)], "array")
    start = content.index(broken)
    assert start < json_rows.CHUNK < start + len(broken)
    rows = read(tmp_path / "rows", content)
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert len(rows) == 7
    assert [(row.line, row.column) for row in bad] == [place(content, start + broken.index('"output"'))]


@pytest.mark.parametrize("kind", ["jsonl", "array", "one line"])
def test_truncated_row_is_named_at_its_end(tmp_path, kind):
    """A last row that breaks off is reported where it breaks off, not where it begins."""
    cut = '{"instruction": "a", "output": "b"'
    content = layout([*texts_of(GOOD), cut], kind)
    end = content.index(cut) + len(cut)
    [bad] = [row for row in read(tmp_path / "rows", content) if isinstance(row, BadRow)]
    # inside an array the next character that is not blank is the one that is wrong
    expected = place(content, end if kind == "jsonl" else content.index("]"))
    assert (bad.line, bad.column) == expected


@pytest.mark.parametrize(
    "content",
    [
        "[{a}, \n{b}]\n",
        "[{a},   \n\n{b}{a}]",
        "[{a}, \n{b}",
        "[{a}, \n",
        '[{a}{{"a": 1, "b": [{{"c": 2}}, {{"d": 3}}]}}, {b}] tail',
        '[{a}, {{"instruction": NaN, "output": "b"}}, {b}]',
        '[{a}, {{"instruction": "\\u4e00\\u4e00\\u4e00\\u4e00\\u4e00", "output": "b" , , }}, {b}]',
        "[{a}, null, [1, 2], true, {b}]",
        "[{a}, 1234567890, -1.5e-10, {b}]",
    ],
    ids=[
        "whole",
        "no comma",
        "no bracket",
        "comma last",
        "tail",
        "NaN",
        "two commas",
        "no objects",
        "numbers",
    ],
)
def test_reading_does_not_depend_on_the_chunk(tmp_path, monkeypatch, content):
    """Whatever is wrong with a file, a chunk border anywhere in it changes nothing."""
    a, b = texts_of(GOOD[:2])
    content = content.format(a=a, b=b)

    def rows() -> list:
        return [
            (r.line, r.column, r.reason) if isinstance(r, BadRow) else r
            for r in read(tmp_path / "r", content)
        ]

    whole = rows()
    for chunk in range(1, len(content) + 1):
        monkeypatch.setattr(json_rows, "CHUNK", chunk)
        assert rows() == whole, f"with {chunk} characters at a time: {content}"


@pytest.mark.parametrize("where", [1, 2, 3])
@pytest.mark.parametrize("braces", [False, True], ids=["plain text", "braces in the text"])
def test_missing_comma_is_named_between_its_rows(tmp_path, where, braces):
    """The place is where the comma should have been, and only the row behind it is lost."""
    rows = [{"instruction": f"Say {i}", "output": "[{}, {}]" if braces else "yes"} for i in range(4)]
    texts = texts_of(rows)
    first, second = ",\n".join(texts[:where]), ",\n".join(texts[where:])
    results = read(tmp_path / "rows", f"[\n{first}\n{second}\n]")
    [bad] = [row for row in results if isinstance(row, BadRow)]
    assert "comma" in bad.reason
    assert (bad.line, bad.column) == (where + 2, 1)
    assert [row for row in results if row is not bad] == [
        conversation(rows[i]) for i in range(4) if i != where
    ]


def test_missing_closing_bracket_is_named_at_the_end(tmp_path):
    """A file that breaks off gives its whole rows and one complaint at its end."""
    content = layout(texts_of(GOOD), "array").removesuffix("]\n")
    *rows, bad = read(tmp_path / "rows", content)
    assert rows == [conversation(row) for row in GOOD]
    assert "closing bracket" in bad.reason
    assert (bad.line, bad.column) == (6, 1)


@pytest.mark.parametrize("tail", ["more", "]", '{"instruction": "a", "output": "b"}', ", []"])
def test_text_behind_the_closing_bracket_is_named(tmp_path, tail):
    """Nothing behind the array is passed over in silence."""
    content = layout(texts_of(GOOD), "array") + "  " + tail
    *rows, bad = read(tmp_path / "rows", content)
    assert rows == [conversation(row) for row in GOOD]
    assert (bad.line, bad.column) == (7, 3)


@pytest.mark.parametrize("kind", ["jsonl", "array"])
@pytest.mark.parametrize(
    ("row", "word"),
    [
        (["instruction", "output"], "list"),
        ("text", "text"),
        (7, "number"),
        (None, "null"),
        (True, "true or false"),
        ({}, "instruction"),
        ({"output": "b"}, "instruction"),
        ({"instruction": "a"}, "output"),
        ({"instruction": 1, "output": "b"}, "instruction"),
        ({"instruction": " \n", "output": "b"}, "instruction"),
        ({"instruction": "a", "output": None}, "output"),
        ({"instruction": "a", "output": ["b"]}, "output"),
        ({"instruction": "a", "input": 1, "output": "b"}, "input"),
        ({"instruction": "a", "input": {"b": 1}, "output": "b"}, "input"),
        ({"instruction": "a", "input": 0, "output": "b"}, "input"),
        ({"instruction": "a", "input": False, "output": "b"}, "input"),
        ({"instruction": "a", "input": [], "output": "b"}, "input"),
        ({"instruction": "a \ud83d", "output": "b"}, "instruction"),
        ({"instruction": "a", "input": "\ude00\ud83d", "output": "b"}, "input"),
        ({"instruction": "a", "output": "\udfff b"}, "output"),
    ],
    ids=lambda value: None if isinstance(value, str) else ascii(value),
)
def test_row_of_the_wrong_shape_is_rejected_at_its_line(tmp_path, row, word, kind):
    """Wrong types, missing keys and half surrogate pairs name the key and the line; the others are kept."""
    content = layout([*texts_of(GOOD[:2]), json.dumps(row), *texts_of(GOOD[2:])], kind)
    rows = read(tmp_path / "rows", content)
    bad = rows.pop(2)
    assert rows == [conversation(row) for row in GOOD]
    assert isinstance(bad, BadRow)
    assert word in bad.reason
    assert (bad.line, bad.column) == ((3, 1) if kind == "jsonl" else (4, 3))


@pytest.mark.parametrize("kind", ["jsonl", "array"])
@pytest.mark.parametrize("key", ["instruction", "input", "output"])
def test_bytes_that_are_not_utf8_are_rejected_at_their_line(tmp_path, key, kind):
    """A damaged byte is never read as some other character."""
    row = json.dumps({"instruction": "a", "input": "b", "output": "c", key: "caf@"})
    content = layout([*texts_of(GOOD[:2]), row, *texts_of(GOOD[2:])], kind).encode().replace(b"@", b"\xe9")
    rows = read(tmp_path / "rows", content)
    bad = rows.pop(2)
    assert rows == [conversation(row) for row in GOOD]
    assert "UTF-8" in bad.reason
    assert key in bad.reason
    assert bad.line == (3 if kind == "jsonl" else 4)


@pytest.mark.parametrize("kind", ["jsonl", "array"])
@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_words_that_are_not_json_are_rejected(tmp_path, word, kind):
    """NaN and Infinity, which Python's reader accepts, are not JSON."""
    row = f'{{"instruction": "a", "output": "b", "score": {word}}}'
    rows = read(tmp_path / "rows", layout([*texts_of(GOOD), row], kind))
    bad = rows.pop()
    assert rows == [conversation(row) for row in GOOD]
    assert word in bad.reason
    assert bad.line == (5 if kind == "jsonl" else 6)


@pytest.mark.parametrize("kind", ["jsonl", "array"])
def test_deep_nesting_is_rejected_not_a_crash(tmp_path, kind):
    """Brackets without end are one bad row."""
    rows = read(tmp_path / "rows", layout([*texts_of(GOOD), "[" * 100_000], kind))
    assert rows[:4] == [conversation(row) for row in GOOD]
    assert isinstance(rows[4], BadRow)


def test_endless_row_is_rejected_not_a_crash(tmp_path, monkeypatch):
    """A row beyond the limit, such as after a lost quote, is one bad row with its place."""
    monkeypatch.setattr(json_rows, "CHUNK", 64)
    monkeypatch.setattr(json_rows, "LONGEST_ROW", 1000)
    content = layout([*texts_of(GOOD), '{"instruction": "' + "a" * 5000], "array")
    rows = read(tmp_path / "rows", content)
    assert rows[:4] == [conversation(row) for row in GOOD]
    assert [(row.line, row.column) for row in rows[4:]] == [(6, 3)]


@pytest.mark.parametrize("content", [b"", b" \r\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_empty_file_is_an_error_that_says_so(tmp_path, content):
    """A file without bytes, or with only blanks or a byte order mark, is exit code 3."""
    with pytest.raises(UserError, match="empty") as caught:
        read(tmp_path / "rows", content)
    assert caught.value.code == DATA


def test_empty_array_has_no_rows(tmp_path):
    """`[]` is a file of no rows."""
    assert read(tmp_path / "rows", "[]") == read(tmp_path / "rows", " [ \n ] ") == []


@pytest.mark.parametrize("content", ["instruction,output\na,b\n", '"text"', "PK\x03\x04"])
def test_another_kind_of_file_is_an_error_with_its_start(tmp_path, content):
    """What is neither an array nor JSONL is exit code 3, and the error shows its beginning."""
    with pytest.raises(UserError, match=":1:1: ") as caught:
        read(tmp_path / "rows", content)
    assert caught.value.code == DATA
    assert content[:5] in str(caught.value) or repr(content[:2])[1:-1] in str(caught.value)


@pytest.mark.parametrize("name", [".", "missing.json", "/dev/null"])
def test_what_is_no_file_is_an_error_that_names_it(tmp_path, name):
    """A directory, a device and a missing file are exit code 3, with the path."""
    path = tmp_path / name
    with pytest.raises(UserError) as caught:
        list(reader.read_rows(path))
    assert caught.value.code == DATA
    assert str(path) in str(caught.value)


def test_picked_rows_are_the_rows_of_those_numbers(tmp_path):
    """Rows are picked by their number in the file, in any order; rejected rows have a number too."""
    texts = texts_of([{"instruction": f"i{n}", "input": "", "output": f"o{n}"} for n in range(1, 31)])
    texts[6] = FAULTS["no comma"][0]
    rows = read(tmp_path / "rows", layout(texts, "array"))
    for numbers in ([1], [30, 2, 8], [29, 9, 8, 1], []):
        assert reader.pick_rows([tmp_path / "rows"], numbers) == [rows[number - 1] for number in numbers]


@pytest.mark.parametrize("kind", ["jsonl", "array"])
def test_rows_read_are_kept_dropped_or_rejected(tmp_path, kind):
    """No row is lost or counted twice, and each kept row keeps its number and its tokens."""
    draw = random.Random(1)
    texts, expected = [], {"kept": [], "dropped": 0, "rejected": 0, "cut": 0}
    for number in range(1, 201):
        fate = draw.choice(["kept", "cut", "dropped", "rejected", "broken"])
        row = {"instruction": "ab" * 10, "output": "c" * {"kept": 19, "cut": 20}.get(fate, 5)}
        if fate == "dropped":
            row["instruction"] = "ab" * 20
        texts.append(FAULTS["no comma"][0] if fate == "broken" else json.dumps(row))
        if fate == "rejected":
            texts[-1] = json.dumps({"instruction": "a"})
        expected["rejected"] += fate in ("rejected", "broken")
        expected["dropped"] += fate == "dropped"
        expected["cut"] += fate in ("dropped", "cut")  # 21 + 20 tokens are one too many, 20 + 20 are not
        if fate in ("kept", "cut"):
            expected["kept"].append((number, conversation(row)))
    rows = read(tmp_path / "rows", layout(texts, kind))
    encoding = data_examples.encode_rows(rows, tiny.one_by_one(partial(as_letters, limit=40)), tmp_path)
    examples = encoding.examples
    assert len(rows) == 200 == len(examples) + encoding.dropped + len(encoding.rejected)
    assert (encoding.dropped, len(encoding.rejected)) == (expected["dropped"], expected["rejected"])
    assert encoding.cut == expected["cut"]
    assert examples.numbers.tolist() == [number for number, _ in expected["kept"]]
    for i, (_, row) in enumerate(expected["kept"]):
        ids, is_target, _ = as_letters(row)
        assert examples[i][0].tolist() == ids[:40]
        assert examples[i][1].tolist() == is_target[:40]
        assert examples.lengths[i] == len(ids[:40])
        assert examples.target_counts[i] == sum(is_target[:40])


def test_no_usable_row_gives_no_examples(tmp_path):
    """Rows that are all dropped or rejected leave empty arrays, not an error."""
    rows = [single("a" * 50, "", "b"), BadRow(1, 1, "why", "text")]
    encoding = data_examples.encode_rows(rows, tiny.one_by_one(partial(as_letters, limit=20)), tmp_path)
    assert (len(encoding.examples), encoding.dropped, encoding.rejected) == (0, 1, rows[1:])
    assert len(encoding.examples.lengths) == len(encoding.examples.target_counts) == 0


@pytest.mark.parametrize(
    ("count", "size"), [(2, 1), (10, 0), (10, 0.05), (10, 0.3), (1000, 0.5), (1000, 300)]
)
def test_split_is_deterministic_and_disjoint(count, size):
    """Every row is in exactly one part, and the same arguments give the same parts."""
    train, validation = data_examples.split(count, size, seed=7)
    assert sorted([*train, *validation]) == list(range(count))
    again = data_examples.split(count, size, seed=7)
    assert np.array_equal(train, again[0])
    assert np.array_equal(validation, again[1])


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (100, 0, 0),
        (2, 0.05, 1),
        (100, 0.05, 5),
        (4000, 0.05, 200),
        (4001, 0.05, 200),
        (9000, 0.9, 200),
        (900, 300, 300),
    ],
)
def test_split_gives_the_validation_rows_asked_for(count, size, expected):
    """A fraction gives at least one and at most 200 rows; a number gives that number."""
    assert len(data_examples.split(count, size, seed=0)[1]) == expected


def test_split_depends_on_the_seed():
    """With another seed other rows are for validation."""
    assert not np.array_equal(
        data_examples.split(100, 20, seed=0)[1], data_examples.split(100, 20, seed=1)[1]
    )


@pytest.mark.parametrize(("count", "size"), [(10, 10), (10, 11), (1, 0.05), (0, 0)])
def test_split_that_leaves_no_training_row_is_an_error(count, size):
    """test_size of all rows or more ends with exit code 3 and the numbers."""
    with pytest.raises(UserError, match=f"--test_size {size}.*{count} usable") as caught:
        data_examples.split(count, size, seed=0)
    assert caught.value.code == DATA


def epoch_of_steps(seed: int, epoch: int, batch: int, count: int) -> list[list[int]]:
    steps, seen = [], epoch * count
    while seen < (epoch + 1) * count:
        steps.append(data_examples.rows_at(seed, seen, batch, count).tolist())
        seen += len(steps[-1])
    return steps


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (10, 3), (12, 4), (7, 7), (5, 128), (1000, 128)])
def test_every_epoch_is_a_permutation_with_a_smaller_last_step(count, batch):
    """No row comes twice in an epoch, none is left out, and no step crosses the end of the epoch."""
    for epoch in range(4):
        steps = epoch_of_steps(3, epoch, batch, count)
        assert sorted(chain(*steps)) == list(range(count))
        assert len(steps) == data_examples.steps_per_epoch(count, batch)
        assert [len(step) for step in steps[:-1]] == [batch] * (len(steps) - 1)
        assert len(steps[-1]) == (count % batch or batch if count >= batch else count)


def test_epochs_and_seeds_have_orders_of_their_own():
    """The order is drawn anew for every epoch and every seed."""
    orders = {
        tuple(data_examples.rows_at(seed, epoch * 50, 50, 50)) for seed in range(3) for epoch in range(5)
    }
    assert len(orders) == 15


def test_rows_of_a_step_do_not_depend_on_the_calls_before():
    """Steps give the same rows in any order of calls, so a run can continue at any step."""
    arguments = [(seed, seen, batch) for seed in (0, 1) for seen in range(0, 60, 7) for batch in (1, 4, 20)]
    data_examples._order.cache_clear()
    forward = {each: data_examples.rows_at(*each, 20).tolist() for each in arguments}
    random.Random(0).shuffle(arguments)
    for each in arguments:
        data_examples._order.cache_clear()
        assert data_examples.rows_at(*each, 20).tolist() == forward[each]
    whole = [place for step in range(20) for place in forward.get((0, step, 1), [])]
    assert whole == [forward[0, 0, 20][step] for step in range(0, 20, 7)]


@pytest.mark.parametrize("budget", [1, 20, 64, 1000])
def test_plan_is_a_partition_within_the_budget(budget):
    """Every row is in one group; no group is above the budget unless it is one row that is longer."""
    draw = random.Random(budget)
    for count in (0, 1, 7, 200):
        lengths = [draw.randint(1, 90) for _ in range(count)]
        groups = packing.plan(lengths, budget)
        assert sorted(chain(*groups)) == list(range(count))
        assert all(sum(lengths[i] for i in group) <= budget or len(group) == 1 for group in groups)
        sums = [sum(lengths[i] for i in group) for group in groups]
        assert all(a + b > budget for a, b in pairwise(sums))  # no two neighbours fit into one group


def test_packed_rows_are_the_rows(tmp_path):
    """Tokens, positions, row numbers, and what predicts which target, agree with each row's is_target."""
    rows = [BadRow(1, 1, "why", ""), *random_rows(12)]
    examples = data_examples.encode_rows(
        rows, tiny.one_by_one(partial(as_letters, limit=15)), tmp_path
    ).examples
    order = [3, 0, 11, 7]
    packed = packing.pack(examples, order)
    start, pairs = 0, []
    for row, length in zip(order, packed.document_lengths, strict=True):
        ids, is_target = examples[row]
        assert packed.input_ids[0, start : start + length].tolist() == ids.tolist()
        assert packed.position_ids[0, start : start + length].tolist() == list(range(length))
        pairs += [(start + t - 1, int(ids[t])) for t in range(length) if is_target[t]]
        assert not is_target[0]  # so that no token of another row predicts it
        start += length
    assert packed.input_ids.shape == (1, start)
    assert list(zip(packed.predicts.tolist(), packed.targets.tolist(), strict=True)) == pairs
    assert packed.row_numbers == tuple(row + 2 for row in order)


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_processes_share_the_rows_of_a_step(tmp_path, world):
    """Over all processes every row of the step is in one micro-batch, and no target is lost."""
    examples = data_examples.encode_rows(
        random_rows(30), tiny.one_by_one(partial(as_letters, limit=20)), tmp_path
    ).examples
    rows = [1, 4, 5, 9, 20, 21, 29]
    shares = [packing.micro_batches(examples, rows, 40, rank, world) for rank in range(world)]
    packed = [batch for share in shares for batch in share]
    assert sorted(number for batch in packed for number in batch.row_numbers) == [row + 1 for row in rows]
    assert sum(len(batch.targets) for batch in packed) == examples.target_counts[rows].sum()
    counts = [sum(len(batch.row_numbers) for batch in share) for share in shares]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("kind", ["jsonl", "array"])
@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"instruction": "a", "output": "b", "output": "c"}', "'output' occurs twice"),
        ('{"instruction": "a", "output": "b", "score": 1e400}', "1e400 is too large"),
        ('{"instruction": "a", "output": "b", "more": [{"x": 1, "x": 1}]}', "'x' occurs twice"),
    ],
)
def test_doubtful_json_is_rejected_by_line(tmp_path, kind, text, word):
    """D10: of two equal keys one would be lost, and some numbers are too large to be read."""
    rows = read(tmp_path / "rows", layout([*texts_of(GOOD[:2]), text, *texts_of(GOOD[2:])], kind))
    bad = rows.pop(2)
    assert word in bad.reason
    assert bad.line == (3 if kind == "jsonl" else 4)
    assert rows == [conversation(row) for row in GOOD]


def test_a_huge_line_is_rejected_without_being_held(tmp_path):
    """D9: after 200 million characters on a line the next row is read, with little memory."""
    path, row = tmp_path / "rows.jsonl", json.dumps(GOOD[0])
    with path.open("w") as file:
        file.write(row + "\n" + '{"instruction": "')
        for _ in range(200):
            file.write("x" * 1_000_000)
        file.write('", "output": "b"}\n' + row + "\n")
    rows = []
    assert memory_rise(lambda: rows.extend(reader.read_rows(path))) < 200 << 20
    assert "more than 32 million characters" in rows.pop(1).reason
    assert rows == [conversation(GOOD[0])] * 2


ROLES = [(role, number) for number in (1, 2) for role in ("user", "assistant")]
NESTED = {
    "openai": {"messages": [{"role": role, "content": f"{role} {number}"} for role, number in ROLES]},
    "sharegpt": {"conversations": [{"from": role, "value": f"{role} {number}"} for role, number in ROLES]},
    "chitchat": {"history": [{"input": "a", "output": "b"}], "input": "c", "output": "d"},
    "chat": {"input": ["a", "b"], "output": ["c", "d"]},
    "dialogue": [{"instruction": f"a {i}", "input": "", "output": f"b {i}"} for i in range(3)],
}
# a dialogue without its last bracket would also hold the rows behind it, so that case is left out
LOST = [(name, mark) for name in NESTED for mark in ',"{}]' if (name, mark) != ("dialogue", "]")]
NESTED_LAYOUTS = {
    "indented": lambda texts: "[\n  " + ",\n  ".join(t.replace("\n", "\n  ") for t in texts) + "\n]",
    "a line each": lambda texts: "[" + ",\n".join(texts) + "\n]",
    "one line": lambda texts: "[" + ", ".join(t.replace("\n", "") for t in texts) + "]",
}


@pytest.mark.parametrize("where", [0, 2, 4], ids=["first", "middle", "last"])
@pytest.mark.parametrize("kind", NESTED_LAYOUTS)
@pytest.mark.parametrize(("schema", "mark"), LOST)
def test_a_broken_row_of_turns_takes_no_other_with_it(tmp_path, mark, schema, kind, where):
    """One character is missing inside a row: no part becomes a row, and all rows behind it are read."""
    rows = [NESTED[schema] for _ in range(5)]
    texts = [json.dumps(row, indent=2 if kind == "indented" else None) for row in rows]
    text = texts[where]
    place = text.index(mark, text.index('"') + 1) if mark in text[3:] else len(text) - 1
    texts[where] = texts[where][:place] + texts[where][place + 1 :]
    results = read(tmp_path / "rows.json", NESTED_LAYOUTS[kind](texts))
    bad = [row for row in results if isinstance(row, BadRow)]
    good = data_schemas.conversation(NESTED[schema])
    assert [row for row in results if row not in bad] == [good] * 4
    assert len(bad) == 1


def test_rows_behind_an_endless_row_of_an_array_are_read(tmp_path, monkeypatch):
    """The error names the one bad row, the others are rows, and little of it was in memory."""
    monkeypatch.setattr(json_rows, "LONGEST_ROW", 5000)
    monkeypatch.setattr(json_rows, "CHUNK", 500)
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    long = {"messages": [{"role": "user", "content": "q" * 60_000}, {"role": "assistant", "content": "a"}]}
    for layout_ in (NESTED_LAYOUTS["a line each"], NESTED_LAYOUTS["one line"]):
        rows = read(tmp_path / "rows.json", layout_([json.dumps(r) for r in (row, long, row, row)]))
        assert [isinstance(one, BadRow) for one in rows] == [False, True, False, False]
        assert "characters" in rows[1].reason


FLAT = [{"instruction": f"a{i}", "output": "b"} for i in range(6)]
INSIDE = [json.dumps(row)[1:-1] for row in FLAT]


@pytest.mark.parametrize(
    ("content", "bad", "good"),
    [
        # rows that begin behind the brace of the one before
        (
            "[\n  {\n"
            + "\n  }, {\n".join(json.dumps(row)[1:-1] for row in FLAT).replace(":", "", 1)
            + "\n  }\n]",
            1,
            5,
        ),
        # several rows on the broken row's line
        ("[\n" + ", ".join(map(json.dumps, FLAT)).replace(":", "", 1) + "\n]", 1, 5),
        # a key that only the first row has
        (json.dumps([{**FLAT[0], "history": []}, *FLAT[1:]]).replace('"a1"', '"a1', 1), 1, 5),
        # a column called role
        (json.dumps([{"role": "x", **row} for row in FLAT]).replace('"a0"', '"a0', 1), 1, 5),
        # two broken rows one after the other
        (
            "[" + ",\n".join(json.dumps(row)[: None if i > 1 else -1] for i, row in enumerate(FLAT)) + "]",
            2,
            4,
        ),
    ],
    ids=["behind a brace", "one line of several", "another key", "a column called role", "two in a row"],
)
def test_odd_layouts_lose_no_row(tmp_path, content, bad, good):
    rows = read(tmp_path / "rows.json", content)
    assert [sum(isinstance(row, BadRow) for row in rows), len(rows)] == [bad, bad + good]


def test_many_broken_rows_on_one_line_are_looked_at_once(tmp_path, monkeypatch):
    """Work grows with the file, not its square: each possible row is tried a few times at most."""
    row, calls = json.dumps(NESTED["openai"]).replace("]", ""), []
    plain = json_rows._Window._is_row
    monkeypatch.setattr(json_rows._Window, "_is_row", lambda *arguments: calls.append(1) or plain(*arguments))
    path = tmp_path / "rows.json"
    path.write_text("[" + ", ".join([row] * 10_000) + "]")
    assert all(isinstance(one, BadRow) for one in reader.read_rows(path))
    assert len(calls) <= 10 * 10_000
