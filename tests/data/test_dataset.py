"""Files of every format, folders, weights; raw text in blocks; the cache of encoded rows."""

import csv
import dataclasses
import datetime
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from benchmarks.memory_rise import memory_rise
from onecard.config import training as config_training
from onecard.data import conversation as data_conversation
from onecard.data import dataset, reader, run_data, tables
from onecard.data import encode as data_encode
from onecard.data import examples as data_examples
from onecard.data import template as data_template
from onecard.data.schemas import BadRow
from onecard.errors import DATA, UNSAFE, UserError
from onecard.system import sandbox
from tests.support import fake_hub, tiny
from tests.support.encoded_rows import encode, options
from tests.support.faults import Touch
from tests.support.paths import ROOT

SAMPLES = sorted(path for path in (ROOT / "sample").iterdir() if path.suffix in config_training.FORMATS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def as_files(folder: Path, values: list[dict]) -> list[Path]:
    """Write the same rows in every format."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"rows{ending}" for ending in (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".pkl")]
    paths[0].write_text(json.dumps(values, ensure_ascii=False))
    paths[1].write_text("".join(json.dumps(value) + "\n" for value in values))
    for path, delimiter in ((paths[2], ","), (paths[3], "\t")):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(values[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(values)
    parquet.write_table(pyarrow.Table.from_pylist(values), paths[4])
    paths[5].write_bytes(pickle.dumps(values))
    return paths


def test_every_format_gives_the_same_tokens(tmp_path):
    """D19: JSON, JSONL, CSV, TSV, Parquet and pickle agree, with quotes, line breaks and Chinese too."""
    values = tiny.rows(20)
    values[3]["output"] = 'a "quoted", text\nover two lines\t答案'
    digests = {path.suffix: encode(path).encoding.sha256 for path in as_files(tmp_path / "r", values)}
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_sample_files_are_whole(path):
    """Every row of every sample file is used, and some but not all of its tokens are targets."""
    encoded = encode(path, cutoff_len=2000)
    assert encoded.encoding.read > 30
    assert (encoded.encoding.dropped, encoded.encoding.rejected) == (0, [])
    assert encoded.encoding.cut == 0
    targets = encoded.encoding.examples.target_counts.sum()
    assert 0 < targets < encoded.encoding.examples.lengths.sum()
    raw = path.stem in ("text", "content", "context_completion")
    assert encoded.task == ("pretrain" if raw else "sft")


@pytest.mark.parametrize(
    ("content", "line", "word"),
    [
        ("instruction,output\na,b\nc\n", 3, "1 fields, the header 2"),
        ('instruction,output\n"a\nb",c\nd,e,f\n', 4, "3 fields"),
        ('instruction,output\na,"b"c\nd,e\n', 2, "not valid CSV"),
        ("instruction,output\na,caf\udce9\n", 2, "UTF-8"),
        ("instruction,answer\na,b\n", 2, "no 'output'"),
    ],
)
def test_a_broken_row_of_a_table_is_named(tmp_path, content, line, word):
    """D1: the error names file and line, and the other rows are read."""
    path = tmp_path / "rows.csv"
    path.write_bytes(content.encode(errors="surrogateescape"))
    rows = list(reader.read_rows(path))
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [row.line for row in bad] == [line]
    assert word in bad[0].reason
    assert bad[0].text.strip()
    with pytest.raises(UserError, match=f"rows.csv:{line}:1") as caught:
        encode(path)
    assert caught.value.code == DATA
    if len(rows) > 1:
        encoding = encode(path, skip_bad_rows=True).encoding
        assert encoding.read == len(encoding.examples) + len(encoding.rejected) == len(rows)


@pytest.mark.parametrize("content", ["", "a,a\n1,2\n", "\n"])
def test_a_table_without_a_header_is_named(tmp_path, content):
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(UserError, match=r"rows\.csv") as caught:
        encode(tmp_path / "rows.csv")
    assert caught.value.code == DATA


def test_damaged_parquet_is_named_and_crashes_nothing(tmp_path):
    """D11: a cut file, a footer of zeros or flipped bytes give exit 3 or the same rows, never a crash."""
    path = as_files(tmp_path, tiny.rows(30))[4]
    content, generator = path.read_bytes(), np.random.default_rng(1)
    whole = list(reader.read_rows(path))
    damaged = [content[:n] for n in (0, 1, 8, len(content) // 2, len(content) - 1)]
    damaged.append(content[:-8] + bytes(8))
    for _ in range(12):
        raw = bytearray(content)
        raw[generator.integers(len(raw))] ^= 1 << int(generator.integers(8))
        damaged.append(bytes(raw))
    refused = 0
    for raw in damaged:
        path.write_bytes(raw)
        code, count = outcome(path)
        refused += code == DATA
        assert (code, count) in ((DATA, 0), (0, len(whole)))
    assert refused > 5


def test_a_parquet_reader_that_crashes_takes_nothing_with_it(tmp_path, monkeypatch):
    """A crash of the Parquet library gives exit 3, and the error says how many rows were read before it."""
    path = as_files(tmp_path, tiny.rows(5))[4]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # another pyarrow is there, which a reader does not get
    monkeypatch.setattr(sandbox, "ENVIRONMENT", (*sandbox.ENVIRONMENT, "PYTHONPATH"))
    (tmp_path / "pyarrow").mkdir()
    (tmp_path / "pyarrow" / "__init__.py").write_text("import os; os.abort()")
    with pytest.raises(UserError, match=r"rows\.parquet.*after row 0: its reader crashed") as caught:
        list(reader.read_rows(path))
    assert caught.value.code == DATA


def test_what_is_no_text_in_a_parquet_file(tmp_path):
    """Times become text; bytes are an error that names them."""
    values = [{"instruction": "a", "output": b"x", "at": datetime.datetime(2026, 1, 2)}]
    values.append({"instruction": "b", "output": None, "at": None})
    parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "rows.parquet")
    rows = list(reader.read_rows(tmp_path / "rows.parquet"))
    assert [row.reason for row in rows] == [
        "'output' must be text, but is an object",
        "the row has no 'output'",
    ]
    assert "2026-01-02" in rows[0].text


def test_what_becomes_of_long_rows(tmp_path, harness, tiny_model):
    """D6: long rows are cut, rejected or an error; the rows used and reported add up to the rows read."""
    values = [{"instruction": "say", "output": "word " * (200 if i % 3 == 0 else 5)} for i in range(12)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(values))
    limit = {"cutoff_len": 400}
    cut = encode(path, **limit).encoding
    assert (cut.read, cut.cut, len(cut.examples), len(cut.rejected)) == (12, 4, 12, 0)
    end = tiny.tokenizer().eos_token_id
    last = [int(cut.examples[i][0][-1]) == end for i in range(12)]
    assert last == [i % 3 != 0 for i in range(12)]  # the rule: an answer cut short has no end token
    dropped = encode(path, long_rows="drop", **limit).encoding
    assert (dropped.read, len(dropped.examples), len(dropped.rejected)) == (12, 8, 4)
    assert [row.line for row in dropped.rejected] == [1, 4, 7, 10]
    with pytest.raises(
        UserError, match=r"rows.json: row 1: longer than --cutoff_len 400.*--long_rows"
    ) as caught:
        encode(path, long_rows="stop", **limit)
    assert caught.value.code == DATA
    flags = {"model_path": tiny_model, "data_path": path, "output_path": tmp_path / "run", "bits": 16}
    more = {"max_steps": 1, "test_size": 2, "device": "cpu", "long_rows": "drop", **limit}
    answer = harness.run("finetune", {**flags, **more})
    assert answer["code"] == 0, answer["said"]
    rejected = (tmp_path / "run" / "rejected_rows.jsonl").read_text().splitlines()
    assert len(rejected) == 4
    assert "longer than --cutoff_len 400" in rejected[0]


def outcome(path: Path) -> tuple[int, int]:
    """Return the exit code and the number of rows of reading a file."""
    try:
        return 0, len(list(reader.read_rows(path)))
    except UserError as error:
        return error.code, 0


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda canary: pickle.dumps([Touch(canary)]), UNSAFE),
        (lambda canary: pickle.dumps([{"instruction": Touch(canary), "output": "x"}], protocol=0), UNSAFE),
        (lambda _: pickle.dumps([{"instruction": Path("x"), "output": "x"}]), UNSAFE),
        (lambda _: pickle.dumps({"rows": 1}), DATA),
        (lambda _: pickle.dumps(tiny.rows(3))[:-20], DATA),
        (lambda _: b"", DATA),
        (lambda _: b"\x80\x04" + b"(" * 5_000_000 + b".", DATA),
        (lambda _: b"\x80\x04\x8d" + (1 << 33).to_bytes(8, "little") + b"x.", DATA),  # claims 8 GiB
        (lambda _: b"\x80\x04" + b"]\x94" * 1 + b"(" * 3 + b"e." * 9, DATA),
    ],
)
def test_a_pickle_is_data_or_refused(tmp_path, make, code):
    """D12: only containers, texts and numbers are read; anything else is exit 8, and neither run nor kept."""
    canary, path = tmp_path / "canary", tmp_path / "rows.pkl"
    path.write_bytes(make(canary))
    with pytest.raises(UserError, match=r"rows\.pkl") as caught:
        encode(path)
    assert caught.value.code == code
    assert not canary.exists()
    assert not list((tmp_path / "cache" / "pickles").glob("*"))


def test_a_dialogue_pickle_is_converted_once(tmp_path, capsys):
    """CuteGPT's own kind of pickle is a list of lists."""
    values = [tiny.rows(2), tiny.rows(3)]
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(values))
    (tmp_path / "rows.json").write_text(json.dumps(values))
    one, other = (encode(tmp_path / name, cutoff_len=999) for name in ("rows.pkl", "rows.json"))
    assert one.encoding.sha256 == other.encoding.sha256
    assert capsys.readouterr().out.count("Converting") == 1
    encode(tmp_path / "rows.pkl", cutoff_len=500)
    assert "Converting" not in capsys.readouterr().out


def test_folders_several_files_and_weights(tmp_path):
    """Files are read in the order of their names; a weight repeats rows, a half takes every second one."""
    place = tmp_path / "rows"
    place.mkdir()
    first, second = place / "a.json", place / "b.jsonl"
    tiny.save_rows(first, 10)
    second.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(30)[10:]))
    (place / ".hidden.json").write_text("{")
    (place / "notes.txt").write_text("not rows")
    together, folder = encode(f"{first},{second}"), encode(place)
    assert together.encoding.sha256 == folder.encoding.sha256
    assert together.encoding.read == 30
    weighted = encode(f"{first}:2, {second}:0.5")
    places = data_examples.repeated(np.arange(30), weighted.weights, seed=1)
    counts = np.bincount(places, minlength=30)
    assert set(counts[:10]) == {2}
    assert set(counts[10:]) == {0, 1}
    assert 3 < counts[10:].sum() < 17
    assert np.array_equal(places, data_examples.repeated(np.arange(30), weighted.weights, seed=1))
    assert weighted.fingerprint != together.fingerprint
    odd = place / "x,y:3.json"
    odd.write_text(first.read_text())
    assert [source.path for source in reader.locate_files(str(odd))] == [odd]


@pytest.mark.parametrize("path", ["none.json", "a.json,none.json", "a.json:0", "empty", "nobody/nothing"])
def test_what_is_not_there_is_named(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    tiny.save_rows(tmp_path / "a.json", 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=path.rpartition(",")[2].partition(":")[0]) as caught:
        reader.locate_files(path)
    assert caught.value.code == DATA


def test_validation_rows_of_their_own(tmp_path):
    """The file of --eval_data_path has another schema, and its rows alone are for validation."""
    tiny.save_rows(tmp_path / "train.json", 12)
    (tmp_path / "eval.jsonl").write_text('{"input": ["q"], "output": ["a"]}\n' * 3)
    encoded = encode(tmp_path / "train.json", eval_data_path=str(tmp_path / "eval.jsonl"))
    assert encoded.is_validation.tolist() == [False] * 12 + [True] * 3


def test_mixed_tasks_need_a_word(tmp_path):
    """The task is not guessed when raw text stands among conversations."""
    (tmp_path / "a.jsonl").write_text('{"instruction": "q", "output": "a"}\n{"text": "raw"}\n')
    with pytest.raises(UserError, match="choose --task"):
        encode(tmp_path / "a.jsonl")
    encoding = encode(tmp_path / "a.jsonl", task="sft").encoding
    assert len(encoding.examples) == 2
    with pytest.raises(UserError, match="choose --task sft"):
        encode(tmp_path / "a.jsonl", task="pretrain")


def blocks(
    stream: list[tuple[int, bool, int]], length: int, overlap: int
) -> list[tuple[list[int], list[bool]]]:
    """Compute the blocks plainly: (id, trained, document) of all documents -> (ids, flags) of each block."""
    cut, at, again = [], 0, 0
    while at < len(stream):
        block = stream[at - again : at - again + length]
        flags = [trained and place >= max(again, 1) for place, (_, trained, _) in enumerate(block)]
        cut.append(([token for token, _, _ in block], flags))
        at += len(block) - again
        again = min(overlap, len(block)) if at < len(stream) else 0
        while again and stream[at - again][2] != stream[at][2]:
            again -= 1
    return [block for block in cut if any(block[1])]


@pytest.mark.parametrize(("length", "overlap"), [(16, 0), (16, 5), (8, 6), (1000, 0), (1000, 10)])
def test_raw_text_becomes_whole_blocks(tmp_path, length, overlap):
    """Blocks are full, context and repetitions are not trained, and documents end with the end token."""
    texts = [{"context": "ctx " * (i % 3), "completion": f"text {i} " * (i % 4 + 1)} for i in range(12)]
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    tokenizer, stream = tiny.tokenizer(), []
    for number, row in enumerate(reader.read_rows(path)):
        ids, is_target = data_encode.encode(row, data_template.load("alpaca", tokenizer), tokenizer)
        assert ids[-1] == tokenizer.eos_token_id
        stream += [(token, flag, number) for token, flag in zip(ids, is_target, strict=True)]
    encoded = encode(path, tokenizer, cutoff_len=length, overlap=overlap)
    assert encoded.task == "pretrain"
    examples = encoded.encoding.examples
    pairs = [(ids.tolist(), flags.tolist()) for ids, flags in (examples[i] for i in range(len(examples)))]
    assert pairs == blocks(stream, length, overlap)
    assert examples.numbers.tolist() == sorted(examples.numbers.tolist())


def test_blocks_do_not_cross_into_validation(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "training text"}\n' * 5)
    (tmp_path / "b.jsonl").write_text('{"text": "other"}\n' * 5)
    encoded = encode(tmp_path / "a.jsonl", eval_data_path=str(tmp_path / "b.jsonl"), cutoff_len=8)
    tokenizer, lengths = tiny.tokenizer(), encoded.encoding.examples.lengths
    sides = [
        "".join(
            tokenizer.decode(encoded.encoding.examples[place][0], skip_special_tokens=True)
            for place in np.flatnonzero(encoded.is_validation == side)
        )
        for side in (False, True)
    ]
    assert sides == ["training text" * 5, "other" * 5]
    borders = [np.flatnonzero(~encoded.is_validation)[-1], len(lengths) - 1]
    assert all(length == 8 for place, length in enumerate(lengths) if place not in borders)


def test_dialogues_one_a_line(tmp_path):
    """Lines of lists are dialogues, and so is an array of lists; what --clean writes of them is read back."""
    dialogues = [[row, other] for row, other in zip(tiny.rows(6), tiny.rows(12)[6:], strict=True)]
    (tmp_path / "a.json").write_text(json.dumps(dialogues))
    digests = set()
    for name, count in (("b.jsonl", 6), ("c.txt", 6)):
        path = tmp_path / name
        path.write_text("".join(json.dumps(dialogue) + "\n" for dialogue in dialogues[:count]))
        rows = list(reader.read_rows(path))
        assert len(rows) == count
        assert all(len(row.turns) == 4 for row in rows)
        digests.add(encode(path, cutoff_len=999).encoding.sha256)
    assert digests == {encode(tmp_path / "a.json", cutoff_len=999).encoding.sha256}


def test_rows_that_change_while_they_are_read_are_not_kept(tmp_path, monkeypatch, cache):
    """D13, D17: a change during reading is exit 3, and nothing is stored under the key of the old content."""
    path = tiny.save_rows(tmp_path / "rows.json", 20)
    plain = reader.read_rows

    def edited(*arguments):
        yield from plain(*arguments)
        path.write_text(path.read_text().replace("red", "reb", 1))

    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_rows", edited)
        with pytest.raises(UserError, match="changed while it was read") as caught:
            encode(path, task="sft")
    assert caught.value.code == DATA
    assert list((cache / "rows").iterdir()) == []


def test_a_row_that_only_its_template_refuses_is_named_in_its_file(tmp_path):
    first = tiny.save_rows(tmp_path / "a.json", 3)
    call = {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "tool", "assistant")]}
    (tmp_path / "b.jsonl").write_text(json.dumps(call) + "\n")
    with pytest.raises(UserError, match=r"b\.jsonl: row 1: the template alpaca cannot write function turns"):
        encode(f"{first},{tmp_path / 'b.jsonl'}")


def test_folders_with_odd_things_in_them(tmp_path):
    """D4: pipes, and folders that are called like files, are ignored."""
    place = tmp_path / "rows"
    (place / "folder.json").mkdir(parents=True)
    os.mkfifo(place / "pipe.jsonl")
    tiny.save_rows(place / "a.json", 3)
    assert [source.path.name for source in reader.locate_files(str(place))] == ["a.json"]
    with pytest.raises(UserError, match="validation rows have no weight") as caught:
        reader.locate_validation_files(f"{place / 'a.json'}:2")
    assert caught.value.code == DATA
    with pytest.raises(UserError, match="validation rows have no weight"):  # before anything is fetched
        reader.locate_validation_files("nobody/rows:2", lambda name: pytest.fail(f"{name} was fetched"))
    with pytest.raises(UserError, match="at most 1000"):
        reader.locate_files(f"{place / 'a.json'}:5000")


def test_templates_are_chosen_by_seed_and_row(tmp_path):
    """With several templates each row gets one, which depends only on the seed and the row."""
    path = tiny.save_rows(tmp_path / "rows.json", 60)
    names = "alpaca,tigerbot,cutegpt"
    alone = {name: encode(path, template=name, cutoff_len=999).encoding.examples for name in names.split(",")}
    mixed = encode(path, template=names, cutoff_len=999).encoding.examples
    used = [
        [name for name, one in alone.items() if np.array_equal(one[place][0], mixed[place][0])]
        for place in range(60)
    ]
    assert all(len(matches) == 1 for matches in used)
    assert len({matches[0] for matches in used}) == 3
    other = encode(path, template=names, cutoff_len=999, seed=7).encoding
    assert other.sha256 != encode(path, template=names, cutoff_len=999).encoding.sha256


def test_rows_are_encoded_once(tmp_path, monkeypatch, cache):
    """The second time nothing is read or encoded, and the arrays are mapped instead of loaded."""
    path = tiny.save_rows(tmp_path / "rows.json", 20)
    first = encode(path)
    monkeypatch.setattr(data_encode, "encode_many", None)
    monkeypatch.setattr(data_examples, "encode_rows", None)
    again = encode(path)
    assert again.encoding.sha256 == first.encoding.sha256
    assert isinstance(again.encoding.examples.ids, np.memmap)
    assert dataclasses.asdict(again.encoding)["read"] == 20
    assert len(list((cache / "rows").iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"cutoff_len": 250},
        {"template": "tigerbot"},
        {"train_on": "last"},
        {"train_on_inputs": True},
        {"task": "sft", "schema": "alpaca"},
        {"rows": True},
        {"tokenizer": True},
    ],
    ids=str,
)
def test_nothing_stale_is_used(tmp_path, change, cache):
    """D17: all that the tokens depend on is part of the key; a copy of the file has the same key."""
    path = tiny.save_rows(tmp_path / "rows.json", 20)
    encode(path)
    moved = tmp_path / "moved.json"
    moved.write_bytes(path.read_bytes())
    encode(moved)
    assert len(list((cache / "rows").iterdir())) == 1
    if change.pop("rows", None):
        stamp = path.stat()
        path.write_text(path.read_text().replace("red", "reb", 1))
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # D13: its times are set back
    if change.pop("tokenizer", None):
        dataset.encode(
            options(path),
            reader.locate_files(str(path)),
            [data_template.load("alpaca", None)],
            tiny.tokenizer(),
            "2",
        )
    else:
        encode(path, **change)
    assert len(list((cache / "rows").iterdir())) == 2


def test_rows_that_change_during_a_run_do_not_reach_it(tmp_path):
    """D14: the run holds its own copy."""
    path = tiny.save_rows(tmp_path / "rows.json", 20)
    examples = encode(path).encoding.examples
    before = examples.ids.copy()
    path.write_text("[]")
    assert np.array_equal(examples.ids, before)


def test_damaged_and_foreign_entries_are_made_again(tmp_path, cache):
    path = tiny.save_rows(tmp_path / "rows.json", 20)
    first = encode(path).encoding.sha256
    entry = next((cache / "rows").iterdir())
    for name in ("ids", data_examples.RECORD, dataset.ENDS):
        (entry / name).write_bytes(b"x")
        assert encode(path).encoding.sha256 == first
        assert data_examples.load(entry).sha256 == first


def test_only_their_owner_can_read_the_kept_rows(tmp_path, cache):
    """The file of rows may be private, so no copy of it becomes readable for others."""
    umask = os.umask(0o022)
    try:
        encode(tiny.save_rows(tmp_path / "rows.json", 20))
    finally:
        os.umask(umask)
    assert [entry.stat().st_mode & 0o777 for entry in (cache / "rows").iterdir()] == [0o700]


def test_a_failed_encoding_leaves_nothing(tmp_path, cache):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "q", "output": "a"}\nbroken\n')
    with pytest.raises(UserError):
        encode(path)
    assert list((cache / "rows").iterdir()) == []


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    monkeypatch.setenv("ONECARD_CACHE", "/proc/none")
    encoded = encode(tiny.save_rows(tmp_path / "rows.json", 20))
    assert len(encoded.encoding.examples) == 20


def test_the_cache_has_a_limit(tmp_path, monkeypatch, cache):
    """The entry that was not used for the longest time is deleted first."""
    paths = [tiny.save_rows(tmp_path / f"{n}.json", 10 + n) for n in range(4)]
    encode(paths[0])
    size = sum(file.stat().st_size for file in next((cache / "rows").iterdir()).iterdir())
    monkeypatch.setattr(dataset, "ROOM", 3 * size)
    for number, path in enumerate([*paths[:2], paths[0], *paths[2:]]):
        encode(path)
        for folder in (cache / "rows").iterdir():
            if folder.stat().st_mtime > 1e9:  # just used
                os.utime(folder, (number, number))
    assert 1 <= len(list((cache / "rows").iterdir())) <= 3


def test_rows_of_a_hub_dataset(tmp_path):
    """Of a dataset of the hub only the files of rows are fetched; a missing one is one clear error."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    tiny.save_rows(folder / "train.json", 12)
    (folder / "load.py").write_text("raise SystemExit")
    encoded = encode("someone/rows", fetch=lambda name: str(folder) if name == "someone/rows" else "")
    assert encoded.encoding.read == 12
    with fake_hub.serving("someone/rows", folder, "datasets") as address:
        output = fake_hub.fetch(address, tmp_path / "home", "fetch_dataset", "someone/rows")
        missing = fake_hub.fetch(address, tmp_path / "home", "fetch_dataset", "someone/none")
    line, place = output.splitlines()
    assert line.endswith(f"someone/rows is commit {fake_hub.COMMIT}")
    assert [path.name for path in Path(place).iterdir()] == ["train.json"]
    assert "as a dataset of the hub it cannot be fetched" in missing


def test_a_million_rows_stay_on_the_disk(tmp_path):
    """Memory does not grow with the rows: with twenty times as many the process hardly needs more."""
    tokenizer, template = tiny.tokenizer(), data_template.load("tigerbot", None)

    def many(count: int):
        return (data_conversation.single(f"Say {n}", "", "red") for n in range(count))

    def work(count: int) -> None:
        folder = tmp_path / str(count)
        folder.mkdir()
        one = tiny.one_by_one(lambda row, _: (*data_encode.encode(row, template, tokenizer), False))
        encoding = data_examples.encode_rows(many(count), one, folder)
        assert len(encoding.examples) == count

    work(200)
    assert memory_rise(lambda: work(1000)) < 8 << 20
    assert memory_rise(lambda: work(20_000)) < 16 << 20


def test_json_to_parquet_streams_and_gives_the_same_rows(tmp_path):
    """The table has the columns that any row has, and the rows are the same."""
    values = tiny.rows(50)
    values[40]["system"] = "Be kind."
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(values))
    count, columns = tables.write_parquet([source], reader.values, tmp_path / "out.parquet")
    assert (count, columns) == (50, ["instruction", "input", "output", "system"])
    one, other = (encode(path, cutoff_len=999) for path in (source, tmp_path / "out.parquet"))
    assert one.encoding.sha256 == other.encoding.sha256
    (tmp_path / "bad.jsonl").write_text('{"a": "x"}\n{"a": 7}\n')
    with pytest.raises(UserError, match="different types") as caught:
        tables.write_parquet([tmp_path / "bad.jsonl"], reader.values, tmp_path / "bad.parquet")
    assert caught.value.code == DATA
    assert not list(tmp_path.glob("*bad.parquet*"))


def test_an_array_on_one_line_is_an_array(tmp_path):
    """What json.dump writes is rows, not one long conversation, whatever the file is called."""
    for name in ("a.json", "a.jsonl", "a.txt"):
        (tmp_path / name).write_text(json.dumps(tiny.rows(5)))
        assert [len(row.turns) for row in reader.read_rows(tmp_path / name)] == [2] * 5


def test_a_quote_that_is_never_closed_takes_one_row(tmp_path):
    """The rows behind it are read; the rows used and reported add up to the rows of the file."""
    lines = ["instruction,output", *(f"say {i},word {i}" for i in range(50))]
    lines[10] = '"say 9,word 9'
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    rows = list(reader.read_rows(tmp_path / "rows.csv"))
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [(row.line, row.text) for row in bad] == [(11, '"say 9,word 9\n')]
    assert len(rows) == 50
    assert rows[-1].turns[-1].text == "word 49"


@pytest.mark.parametrize(("name", "content"), [("a.csv", "instruction,output\n"), ("a.parquet", None)])
def test_a_table_without_rows_is_exit_3(tmp_path, name, content):
    path = tmp_path / name
    if content:
        path.write_text(content)
    else:
        parquet.write_table(pyarrow.table({"instruction": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(UserError, match="no usable row") as caught:
        encode(path)
    assert caught.value.code == DATA


@pytest.mark.parametrize(
    "content", ["instruction,output\na,b\n".encode("utf-16"), b"\0" * 40, b"[\0]", b'{"text": "a\0b"}']
)
def test_bytes_that_are_no_text_are_named(tmp_path, content):
    """D3: UTF-16 tables as Excel writes them, and NUL bytes; never a traceback."""
    path = tmp_path / ("rows.csv" if content[:2] == b"\xff\xfe" else "rows.json")
    path.write_bytes(content)
    with pytest.raises(UserError, match=path.name) as caught:
        encode(path)
    assert caught.value.code == DATA


def test_an_empty_name_is_exit_3():
    for text in ("", ",", " "):
        with pytest.raises(UserError, match="--data_path is empty") as caught:
            reader.locate_files(text)
        assert caught.value.code == DATA


@pytest.mark.parametrize("order", [1, -1])
def test_mixed_kinds_are_refused_in_any_order(tmp_path, order):
    """D2: neither --skip_bad_rows nor what --task sft left in the cache decides which kind is meant."""
    rows = ['{"instruction": "q", "output": "a"}', '{"text": "raw"}'][::order]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    encode(tmp_path / "a.jsonl", task="sft")
    encode(tmp_path / "a.jsonl", task="sft", skip_bad_rows=True)
    for skip in (False, True):
        with pytest.raises(UserError, match="choose --task"):
            encode(tmp_path / "a.jsonl", skip_bad_rows=skip)


def test_weights_of_raw_text_are_those_of_its_file(tmp_path):
    """All documents of a block have the same weight."""
    for name, count in (("small", 3), ("large", 30)):
        lines = [json.dumps({"text": f"{name} text {i}"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = tiny.tokenizer()
    encoded = encode(f"{tmp_path}/small.jsonl:10,{tmp_path}/large.jsonl", tokenizer, cutoff_len=64)
    examples = encoded.encoding.examples
    for place, weight in enumerate(encoded.weights):
        text = tokenizer.decode(examples[place][0])
        assert ("small" in text, "large" in text) == (weight == 10, weight == 1)


def test_rejected_rows_name_their_file(tmp_path):
    """Rows of several files that are rejected in reading or encoding have the line of their own file."""
    broken = [{"instruction": "a"}, {"instruction": "say", "output": "word " * 300}]
    for name in ("a", "b"):
        values = [*tiny.rows(4), *broken]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    encoding = encode(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", skip_bad_rows=True, long_rows="drop").encoding
    places = [(Path(row.file).name, row.line) for row in encoding.rejected]
    assert places == [("a.jsonl", 5), ("a.jsonl", 6), ("b.jsonl", 5), ("b.jsonl", 6)]


def test_held_out_rows_are_read_once(tmp_path, monkeypatch):
    """They are stored beside the encoded rows, so the next start reads no file for them."""
    path = tiny.save_rows(tmp_path / "rows.json", 20)
    first = run_data.read_conversations(encode(path), np.array([3, 11]), None)
    monkeypatch.setattr(reader, "pick_rows", None)
    assert run_data.read_conversations(encode(path), np.array([3, 11]), None) == first
    assert first[0].turns[0].text == tiny.rows(20)[3]["instruction"]


def test_a_flipped_bit_of_kept_rows_is_found_when_asked(tmp_path, cache):
    """--verify compares every byte and encodes the rows anew."""
    path = tiny.save_rows(tmp_path / "rows.json", 20)
    whole = encode(path).encoding.examples.ids.tolist()
    (stored,) = cache.glob("rows/*/ids")
    raw = bytearray(stored.read_bytes())
    raw[40] ^= 1
    stored.write_bytes(bytes(raw))
    settings = options(path)
    row_templates = [data_template.load(settings.template, tiny.tokenizer())]
    arguments = (settings, reader.locate_files(str(path)), row_templates, tiny.tokenizer(), "tokenizer 1")
    assert dataset.encode(*arguments, again=True).encoding.examples.ids.tolist() == whole


@pytest.mark.parametrize("schema", ["openai", "sharegpt"])
def test_nested_rows_are_the_same_in_parquet(tmp_path, schema):
    """D19: lists of objects, null columns and keys that only some rows have."""
    kinds = {"openai": ("messages", "role", "content"), "sharegpt": ("conversations", "from", "value")}
    outer, role, text = kinds[schema]
    names = ("user", "assistant") if schema == "openai" else ("human", "gpt")
    values = []
    for number in range(6):
        turns = [{role: names[i % 2], text: f"text {number} {i}"} for i in range(2 + 2 * (number % 2))]
        values.append({outer: turns, "source": None if number % 2 else "x", "instruction": None})
    (tmp_path / "rows.json").write_text(json.dumps(values))
    tables.write_parquet([tmp_path / "rows.json"], reader.values, tmp_path / "rows.parquet")
    digests = [
        encode(tmp_path / name, cutoff_len=999).encoding.sha256 for name in ("rows.json", "rows.parquet")
    ]
    assert digests[0] == digests[1]


def test_validation_rows_that_are_training_rows_are_counted(harness, tiny_model, tmp_path):
    """D8: one row in ten is copied, and one in ten is reported."""
    values = tiny.rows(40)
    (tmp_path / "train.json").write_text(json.dumps(values))
    copies = values[:4] + [{"instruction": f"other {i}", "output": "x"} for i in range(36)]
    (tmp_path / "eval.json").write_text(json.dumps(copies))
    flags = {"model_path": tiny_model, "data_path": tmp_path / "train.json", "output_path": tmp_path / "run"}
    more = {"eval_data_path": tmp_path / "eval.json", "bits": 16, "max_steps": 1, "device": "cpu"}
    answer = harness.run("finetune", {**flags, **more})
    assert "warning: 4 validation rows are training rows too" in answer["said"]


def test_one_row_is_enough(harness, tiny_model, tmp_path):
    """D18: a single row, fewer than a batch and with none left for validation, can be trained on."""
    flags = {"model_path": tiny_model, "data_path": tiny.save_rows(tmp_path / "rows.json", 1)}
    flags |= {"output_path": tmp_path / "run", "bits": 16, "num_epochs": 2, "device": "cpu"}
    assert "--test_size 0" in harness.run("finetune", flags)["said"]
    answer = harness.run("finetune", {**flags, "test_size": 0})
    assert answer["code"] == 0, answer["said"]


def test_processes_of_one_machine_encode_once(tmp_path, capfd):
    """The first process takes the lock; the others use the rows that it encoded."""
    path = tiny.save_rows(tmp_path / "rows.json", 400)
    work = """
import sys
from onecard.data import reader
from tests.support.encoded_rows import encode
plain, calls = reader.read_rows, []
reader.read_rows = lambda *given: (calls.append(1), plain(*given))[1]
encode(sys.argv[1])
print("read", len(calls), "times")
"""
    command = [sys.executable, "-c", work, str(path)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 3
    counts = re.findall(r"read (\d) times", capfd.readouterr().out)
    assert sorted(counts) == ["1", "1", "2"]  # each process looks at the first row
    assert len(list((tmp_path / "cache" / "rows").glob("*/encoding.json"))) == 1
