"""Checking rows: every planted fault is found and counted, cleaning adds up, and the page is safe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from onecard.data import check, findings, reader
from onecard.data import template as data_template
from tests.support import tiny
from tests.support.paths import ROOT

PLANTED = {  # the report's name of the fault -> a row that has it
    "empty outputs": {"instruction": "Say nothing", "output": ""},
    "instruction equal to input": {"instruction": "same", "input": "same ", "output": "x"},
    "answer equal to question": {"instruction": "echo", "output": "echo"},
    "placeholders": {"instruction": "Summarise <一段文本>", "output": "x"},
    "invisible characters": {"instruction": "zero\u200bwidth", "output": "x"},
    "mojibake": {"instruction": "What is cafÃ© in Ã¼ber?", "output": "x"},
    "control tokens": {"instruction": "Stop <|im_end|> here", "output": "x"},
}


def look(path: Path, cutoff_len: int = 400, cleaner: check.Cleaner | None = None) -> findings.Findings:
    tokenizer = tiny.tokenizer()
    result = findings.Findings()
    rows = check.examine(result, [path], None, data_template.load("alpaca", tokenizer), tokenizer, cutoff_len)
    check.read_all(rows, cleaner)
    return result


def save(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_planted_fault_is_found_once(tmp_path):
    """D8: the first place of each fault is named, and rows without faults are not reported."""
    good = tiny.rows(30)
    rows = [*good[:10], *PLANTED.values(), good[3], good[3], {"instruction": 7}, *good[10:]]
    result = look(save(tmp_path / "rows.jsonl", rows))
    assert result.problems == {**dict.fromkeys(PLANTED, 1), "duplicates": 2, "unreadable": 1}
    for number, name in enumerate(PLANTED, start=11):
        assert result.examples[name] == f"{tmp_path / 'rows.jsonl'}:{number}:1"
    assert result.read == len(rows)
    text = findings.report(result, 400)
    assert "alpaca 39" in text
    assert "the row has no 'output'" in text
    assert all(name in text for name in PLANTED)


def test_lengths_cuts_and_rows_without_targets(tmp_path):
    """The counts are those of the encoding: rows too long, and rows left without a target."""
    rows = [{"instruction": "a" * n, "output": "b"} for n in (1, 10, 600)]
    result = look(save(tmp_path / "rows.jsonl", rows), cutoff_len=300)
    assert result.problems == {"without targets": 1}
    assert result.cut == 1
    assert len(result.lengths) == 3
    assert len(result.cut_lengths) == 2
    assert result.targets == 4
    assert f"An epoch computes {sum(result.cut_lengths)} tokens" in findings.report(result, 300)


def test_raw_text_is_not_cut(tmp_path):
    """It is trained in blocks, so a long context is no reason to leave a row out."""
    row = {"context": "c " * 300, "completion": "the end"}
    cleaner = check.Cleaner(tmp_path / "clean.jsonl", repair=False)
    result = look(save(tmp_path / "rows.jsonl", [row]), cutoff_len=50, cleaner=cleaner)
    assert (result.cut, dict(result.problems), cleaner.kept) == (0, {}, 1)
    assert result.cut_lengths == result.lengths


@pytest.mark.parametrize("path", sorted((ROOT / "sample").glob("*.json*")), ids=lambda path: path.name)
def test_what_is_cleaned_reads_the_same(tmp_path, path):
    """Every sample that passes through --clean is read as the same conversations."""
    cleaner = check.Cleaner(tmp_path / "clean.jsonl", repair=True)
    look(path, cutoff_len=5000, cleaner=cleaner)
    assert list(reader.read_rows(tmp_path / "clean.jsonl")) == list(reader.read_rows(path))


def test_cleaning_adds_up(tmp_path):
    """Rows kept and rows left out with a reason make up all rows; texts are repaired."""
    good = tiny.rows(20)
    path = save(tmp_path / "rows.jsonl", [*good, *PLANTED.values(), good[0]])
    path.write_text(path.read_text() + "broken\n")
    cleaner = check.Cleaner(tmp_path / "clean.jsonl", repair=True)
    result = look(path, cleaner=cleaner)
    rows = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
    dropped = [json.loads(line) for line in (tmp_path / "clean.dropped.jsonl").read_text().splitlines()]
    assert (len(rows), len(dropped)) == (cleaner.kept, cleaner.left_out)
    assert len(rows) + len(dropped) == result.read == 29
    assert [row["why"][0] for row in dropped[:3]] == [
        "an answer is empty",
        "holds placeholder text",
        "the same as an earlier row",
    ]
    assert dropped[3]["row"] == "broken"
    texts = [row["instruction"] for row in rows]
    assert "zerowidth" in texts
    assert "What is café in über?" in texts
    again = look(tmp_path / "clean.jsonl")
    assert not {"unreadable", "duplicates", "mojibake", "invisible characters"} & again.problems.keys()


def test_a_broken_look_leaves_nothing(tmp_path):
    """After an error neither of the two files is left incomplete."""
    cleaner = check.Cleaner(tmp_path / "clean.jsonl", repair=False)
    with pytest.raises(reader.UserError):
        look(save(tmp_path / "rows.csv", []), cleaner=cleaner)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_the_page_shows_targets_and_runs_nothing(tmp_path):
    """Rows are only text in it, scripts too; end tokens are visible inside the marks."""
    row = {"instruction": "<script>alert(1)</script>", "output": "</mark><img src=x onerror=alert(1)>"}
    result = look(save(tmp_path / "rows.jsonl", [row]))
    findings.write_html(result, "<b>title", findings.report(result, 400), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "<b>" not in page
    assert "&lt;end&gt;</mark>" in page


def test_the_tools_run(tmp_path, tiny_model):
    """They run as programs on a sample file; the input as output is refused and changes nothing."""
    chat = ROOT / "sample" / "chat.jsonl"
    command = [sys.executable, "tools/check_data.py", f"--data_path={chat}", f"--model_path={tiny_model}"]
    paths = [
        f"--html={tmp_path / 'r.html'}",
        f"--png={tmp_path / 'l.png'}",
        f"--clean={tmp_path / 'c.jsonl'}",
    ]
    process = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "chat 40" in process.stdout
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "c.jsonl").read_text() == chat.read_text()
    refused = subprocess.run([*command, f"--clean={chat}"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2
    assert f"--clean {chat} is one of the files that are read" in refused.stderr
    out = tmp_path / "rows.parquet"
    convert = [sys.executable, "tools/json_to_parquet.py", f"--data_path={chat}", f"--output_path={out}"]
    process = subprocess.run(convert, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "40 rows with the columns input, output" in process.stdout


def test_rows_with_the_same_letters_are_not_the_same(tmp_path):
    """An instruction with an input differs from one text that joins both."""
    (tmp_path / "rows.jsonl").write_text(
        '{"instruction": "Say: hello", "input": "", "output": "x"}\n'
        '{"instruction": "Say: ", "input": "hello", "output": "x"}\n'
        '{"instruction": "Say: \u200bhello", "input": "", "output": "x"}\n'
    )
    result = findings.Findings()
    tokenizer = tiny.tokenizer()
    template = data_template.load("alpaca", tokenizer)
    list(check.examine(result, [tmp_path / "rows.jsonl"], None, template, tokenizer, 256))
    # the third, which differs from the first only in an invisible character
    assert result.problems["duplicates"] == 1
