"""finetune.py from end to end on wrong input: one message, its exit code, and nothing is written."""

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from onecard.config import options as config_options
from onecard.config import training as config_training
from onecard.data import template as data_template
from onecard.errors import CHECKPOINT, DATA, DISK, USAGE, UserError, run_program
from onecard.inference import chat
from onecard.programs import finetune
from onecard.runs import folder as runs_folder
from onecard.training import loop, metrics
from tests.support import tiny

QUICK = ("--device", "cpu", "--bits", "16", "--dtype", "fp32", "--max_steps", "2", "--batch_size", "4")
Result = namedtuple("Result", "code out err")
Finetune = Callable[..., Result]


@pytest.fixture
def run(monkeypatch, capsys) -> Finetune:
    """A function that runs finetune.py in this process and returns its exit code and output."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_program(lambda: finetune.main([*map(str, arguments)]))
        return Result(caught.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def folder(tmp_path) -> Path:
    """The output path of the run, which does not exist yet."""
    return tmp_path / "runs" / "mine"


@pytest.fixture
def own_model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def check(result: Result, code: int, *words: object) -> None:
    """There is one message of one line on stderr with all words and the exit code, and no traceback."""
    assert result.code == code, result.err
    assert "Traceback" not in result.out + result.err
    assert len(result.err.strip().splitlines()) == 1, result.err
    assert result.err.startswith("error: ")
    for word in words:
        assert str(word) in result.err


@pytest.fixture
def bad_run(run, tiny_model, tiny_rows, folder) -> Finetune:
    """Run finetune.py on good rows and the tiny model with the test's options; nothing may be written."""

    def call(*arguments: object) -> Result:
        defaults = ("--data_path", tiny_rows, "--model_path", tiny_model, "--output_path", folder)
        result = run(*defaults, *QUICK, *arguments)
        assert not folder.exists()
        assert not folder.parent.exists()
        return result

    return call


def save_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_missing_data_file(bad_run, tmp_path):
    """The exit code is 3, with the path and what it should be."""
    check(
        bad_run("--data_path", tmp_path / "none.json"), DATA, "--data_path", tmp_path / "none.json", "Name a"
    )


def test_empty_directory_as_data(bad_run, tmp_path):
    """A folder is read file by file, and one without files of rows is named."""
    (tmp_path / "nothing").mkdir()
    check(bad_run("--data_path", tmp_path / "nothing"), DATA, "--data_path", "nothing", "no file of rows")


def test_overlap_as_long_as_a_block(bad_run):
    """The exit code is 2, because no block would have new text."""
    check(bad_run("--overlap", 256), USAGE, "--overlap 256", "--cutoff_len")


def test_weights_that_leave_no_row(bad_run, tiny_rows):
    """D18: the exit code is 3."""
    check(bad_run("--data_path", f"{tiny_rows}:0.0001"), DATA, "no row is left", "weights")


@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_what_is_no_file_is_refused_at_once(bad_run, tmp_path, kind):
    """D4: such a path is refused at once and nothing is read from it."""
    path = Path("/dev/zero")
    if kind == "pipe":
        path = tmp_path / "pipe.json"
        os.mkfifo(path)
    check(bad_run("--data_path", path), DATA, "--data_path", path, "not a regular file")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_data_file(bad_run, tmp_path, text):
    """The exit code is 3, with the path and what rows look like."""
    path = save_text(tmp_path / "empty.json", text)
    check(bad_run("--data_path", path), DATA, path, "empty", "instruction, input, output")


def test_data_file_without_rows(bad_run, tmp_path):
    """A file with `[]` gives exit code 3 and the path."""
    path = save_text(tmp_path / "none.json", "[]")
    check(bad_run("--data_path", path), DATA, path, "no usable row")


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_broken_row(bad_run, tmp_path, kind):
    """The exit code is 3, with the file, the line and column of the fault, and both ways out."""
    texts = [json.dumps(row) for row in tiny.rows(10)]
    texts[7] = '{"instruction": "a" "output": "b"}'
    text = "\n".join(texts) if kind == "jsonl" else "[\n" + ",\n".join(texts) + "\n]"
    path = save_text(tmp_path / f"broken.{kind}", text)
    line = 8 if kind == "jsonl" else 9
    check(bad_run("--data_path", path), DATA, f"{path}:{line}:21: ", "Mend", "--skip_bad_rows")


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_row_of_wrong_types(bad_run, tmp_path, kind):
    """The exit code is 3, with the file, line and column of the row, the key, and both ways out."""
    texts = [json.dumps(row) for row in [*tiny.rows(3), {"instruction": "a", "output": 5}]]
    text = "\n".join(texts) if kind == "jsonl" else "[" + ",\n".join(texts) + "]"
    path = save_text(tmp_path / f"types.{kind}", text)
    check(
        bad_run("--data_path", path), DATA, f"{path}:4:1: ", "'output'", "number", "Mend", "--skip_bad_rows"
    )


def test_no_row_left_after_the_cut(bad_run, tiny_rows):
    """Exit code 3, with the number of rows that lost all targets, the length, and what to raise."""
    check(bad_run("--cutoff_len", 8), DATA, tiny_rows, "without a target", "8 tokens: 24", "--cutoff_len")


def test_no_row_left_without_the_bad_ones(bad_run, tmp_path):
    """--skip_bad_rows on a file of only bad rows gives exit code 3 and their number."""
    path = save_text(tmp_path / "bad.jsonl", '{"instruction": "a"}\n{"output": 5}\n')
    check(bad_run("--data_path", path, "--skip_bad_rows"), DATA, path, "rejected: 2")


@pytest.mark.parametrize("size", [24, 25, 1000])
def test_no_row_left_to_train_on(bad_run, size):
    """A test_size of all rows or more gives exit code 3 and both numbers."""
    check(bad_run("--test_size", size), DATA, f"--test_size {size}", "24 usable rows", "Leave some")


def test_unknown_template(bad_run):
    """The exit code is 2, with the templates that exist."""
    check(
        bad_run("--template", "alpacca"),
        USAGE,
        "There is no template called 'alpacca'",
        "Choose from",
        *data_template.names(),
    )


@pytest.mark.parametrize("names", ["query_key_value", "q_proj,w_proj", "proj", "lm_head", ",", ""])
def test_unknown_target_modules(bad_run, own_model, names):
    """Exit code 2 with the existing names, before any weight is read: there are no weights here."""
    (own_model / "model.safetensors").unlink()
    result = bad_run("--model_path", own_model, "--lora_target_modules", names)
    check(result, USAGE, "--lora_target_modules", "all-linear")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert name in result.err
    wrong = {"q_proj,w_proj": "w_proj"}.get(names, names)
    words = f"names {wrong}, which this model does not have." if wrong.strip(",") else "names no module."
    assert words in result.err


def test_model_without_weights(bad_run, own_model):
    """The exit code is 2 with the folder, and nothing is written although the rows are good."""
    (own_model / "model.safetensors").unlink()
    check(bad_run("--model_path", own_model), USAGE, f"{own_model}: cannot load", "weights", "Give")


def test_model_without_tokenizer(bad_run, own_model):
    """The exit code is 2, with the folder and the files that it needs."""
    for path in own_model.glob("tokenizer*"):
        path.unlink()
    check(
        bad_run("--model_path", own_model),
        USAGE,
        f"{own_model}: the folder has no tokenizer",
        "tokenizer.json",
    )


def test_model_without_end_token(bad_run, own_model):
    """The exit code is 2, with the folder and where to set the end token."""
    path = own_model / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    save_text(path, json.dumps({key: value for key, value in settings.items() if key != "eos_token"}))
    check(
        bad_run("--model_path", own_model), USAGE, f"{own_model}: the tokenizer has no end token", path.name
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("rest", [0, 40], ids=["emptied", "cut short"])
def test_damaged_model_file(bad_run, own_model, name, rest):
    """A download that broke off gives exit code 4 and the folder, and no traceback of a library."""
    content = (own_model / name).read_bytes()
    (own_model / name).write_bytes(content[:rest])
    check(bad_run("--model_path", own_model), CHECKPOINT, own_model, "again")


@pytest.mark.parametrize("kind", ["folder", "hub name", "file"])
def test_model_that_does_not_exist(bad_run, tmp_path, tiny_rows, kind):
    """The exit code is 2, with the name as the user wrote it and what it may be."""
    name = {"folder": tmp_path / "none", "hub name": "onecard-tests/no-such-model", "file": tiny_rows}[kind]
    check(
        bad_run("--model_path", name),
        USAGE,
        name,
        "Give a model folder, a hub name, or demo",
    )


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--bits", "5"), ("--test_size", "-1"), ("--lr_scheduler", "step"), ("--device", "gpu"), ("--bit", "4")],
)
def test_wrong_option_value(bad_run, flag, value):
    """The exit code is 2 with the flag."""
    check(bad_run(flag, value), USAGE, flag, "See " if flag != "--device" else "Choose auto, cpu")


def test_paged_optimizer_on_the_cpu(bad_run):
    """The exit code is 2, with the reason and the optimizer to use instead."""
    check(bad_run("--optimizer", "paged_adamw_8bit"), USAGE, "--optimizer paged_adamw_8bit", "Use adamw_8bit")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch that sees no card")
def test_card_asked_for_but_not_there(bad_run):
    """--device cuda without a GPU gives exit code 2 and says what to use instead."""
    check(bad_run("--device", "cuda"), USAGE, "There is no device cuda", "Use --device cpu.")


def test_output_path_is_a_file(bad_run, tmp_path):
    """The exit code is 2, and the file does not change."""
    path = save_text(tmp_path / "file", "mine")
    check(bad_run("--output_path", path), USAGE, f"--output_path {path}", "file", "Name a folder")
    assert path.read_text(encoding="utf-8") == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_output_path_that_cannot_be_written(bad_run):
    """The exit code is 7, with the path and the advice to choose another."""
    check(
        bad_run("--output_path", "/proc/x"), DISK, "--output_path /proc/x", "cannot write", "Choose another"
    )


def test_no_space_on_the_disk(bad_run, monkeypatch, folder):
    """Exit code 7 with the space that is needed and free comes before any weight is read."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, (1 << 30) - (5 << 20), 5 << 20))
    check(bad_run(), DISK, f"--output_path {folder}", "free: 5 MiB", "Make room")


def test_missing_rows_are_told_before_the_model_is_looked_for(bad_run, tmp_path):
    """If rows and model are both missing, the rows come first: fetching a model may take hours."""
    check(
        bad_run("--model_path", tmp_path / "none", "--data_path", tmp_path / "none.json"), DATA, "--data_path"
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def run_before(tiny_model, tmp_path_factory) -> tuple[Path, tuple[object, ...]]:
    """The folder of a finished run of two steps, each saved, and its arguments without the output path."""
    folder = tmp_path_factory.mktemp("before")
    rows = tiny.save_rows(folder / "rows.json", 24)
    arguments = ("--data_path", rows, "--model_path", tiny_model, *QUICK, "--test_size", 0, "--save_steps", 1)
    options = config_options.parse(
        config_training.FinetuneConfig, [*map(str, arguments), "--output_path", str(folder / "run")]
    )
    loop.run(options, sample=chat.reply, draw=metrics.loss_curve)
    return folder / "run", arguments


@pytest.mark.parametrize(
    ("finished", "arguments", "words"),
    [
        (True, ("--lora_r", "4"), ("other options", "lora_r 8 -> 4")),
        (True, ("--seed", "1", "--lora_alpha", "8"), ("seed 42 -> 1", "lora_alpha 16.0 -> 8.0")),
        (False, ("--lora_r", "4"), ("other options", "lora_r 8 -> 4")),
        (False, (), ("unfinished", "saved up to step 1")),
    ],
)
def test_folder_with_another_run(run, run_before, folder, finished, arguments, words):
    """Exit code 2 with the differences and how to continue; the existing run does not change."""
    shutil.copytree(run_before[0], folder)
    if not finished:
        (folder / runs_folder.FINISHED).unlink()
        shutil.rmtree(folder / "checkpoint-2")
    before = tree(folder)
    check(run(*run_before[1], "--output_path", folder, *arguments), USAGE, folder, "--overwrite", *words)
    assert tree(folder) == before


def test_folder_with_the_same_run_finished(run, run_before, folder):
    """The same command again is no mistake: exit code 0, a message that all is done, and no change."""
    shutil.copytree(run_before[0], folder)
    before = tree(folder)
    # this changes the log and not the training
    result = run(*run_before[1], "--output_path", folder, "--log_steps", 5)
    assert (result.code, result.err) == (0, "")
    assert "finished: 2 steps" in result.out
    assert tree(folder) == before


def test_damaged_record_of_a_run(run, tiny_model, tiny_rows, folder):
    """A run folder whose options cannot be read gives exit code 4 with the file, and does not change."""
    folder.mkdir(parents=True)
    path = save_text(folder / runs_folder.CONFIG, '{"options": ')
    base = ("--data_path", tiny_rows, "--model_path", tiny_model, "--output_path", folder, *QUICK)
    check(run(*base), CHECKPOINT, path, "--overwrite")
    assert list(folder.iterdir()) == [path]


def test_overwrite_gets_past_a_damaged_record(run, tiny_model, tiny_rows, folder):
    """The advice in the message about a damaged run works."""
    folder.mkdir(parents=True)
    save_text(folder / runs_folder.CONFIG, '{"options": ')
    save_text(folder / "notes.txt", "mine")
    base = ("--data_path", tiny_rows, "--model_path", tiny_model, "--output_path", folder, *QUICK)
    result = run(*base, "--test_size", 0, "--overwrite")
    assert result.code == 0, result.err
    assert (folder / runs_folder.FINISHED).is_file()
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_bad_rows_are_left_out_and_written_down(run, tiny_model, tmp_path, folder):
    """--skip_bad_rows trains on the good rows and keeps the bad ones with place, reason and text."""
    texts = [json.dumps(row) for row in tiny.rows(12)]
    texts[2] = '{"instruction": "a" "output": "b"}'
    texts[5] = json.dumps({"instruction": "a"})
    texts[9] = '{"instruction": "caf@", "output": "b"}'
    path = tmp_path / "rows.json"
    path.write_bytes(("[\n" + ",\n".join(texts) + "\n]").encode().replace(b"@", b"\xe9"))
    base = ("--data_path", path, "--model_path", tiny_model, "--output_path", folder, *QUICK)
    result = run(*base, "--test_size", 0, "--skip_bad_rows", "--overlap", 5)
    assert result.code == 0, result.err
    assert "3 rejected" in result.out
    assert "warning: --overlap is for raw text" in result.out
    text = (folder / runs_folder.REJECTED).read_text(encoding="utf-8")
    rejected = [json.loads(line) for line in text.splitlines()]
    assert [(row["line"], row["column"]) for row in rejected] == [(4, 21), (7, 1), (11, 1)]
    assert all(row["reason"] for row in rejected)
    assert '"a" "output"' in rejected[0]["text"]
    assert "caf" in rejected[2]["text"]
    record = json.loads((folder / runs_folder.CONFIG).read_text(encoding="utf-8"))["data"]
    counts = {key: record[key] for key in ("train_rows", "validation_rows", "dropped", "rejected")}
    assert counts == {"train_rows": 9, "validation_rows": 0, "dropped": 0, "rejected": 3}
    assert json.loads((folder / runs_folder.FINISHED).read_text(encoding="utf-8"))["steps"] == 2


@pytest.fixture
def card_without_torch(monkeypatch, tmp_path) -> Callable[[str], None]:
    """Put an nvidia-smi on the path that reports a GPU which torch cannot use."""

    def install(answer: str) -> None:
        script = save_text(tmp_path / "bin" / "nvidia-smi", f"#!/bin/sh\n{answer}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(script.parent), prepend=":")

    (tmp_path / "bin").mkdir()
    return install


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch that sees no card")
class TestCardThatTorchCannotUse:
    """There is a GPU with its driver, and a torch without support for it."""

    CARD = 'echo "NVIDIA GeForce RTX 2080 Ti, 550.54"'

    @pytest.mark.parametrize("device", ["auto", "cuda"])
    def test_it_is_not_passed_over(self, bad_run, card_without_torch, device):
        """Exit code 2 with GPU, driver, torch's build and the pip line, instead of hours on the CPU."""
        card_without_torch(self.CARD)
        words = ("NVIDIA GeForce RTX 2080 Ti", "550.54", torch.__version__, "pip install", "torch==")
        check(bad_run("--device", device), USAGE, *words)

    def test_auto_tells_of_the_cpu(self, bad_run, card_without_torch):
        """The message names the way to train without the GPU."""
        card_without_torch(self.CARD)
        check(bad_run("--device", "auto"), USAGE, "--device cpu")

    @pytest.mark.parametrize(
        ("driver", "words"),
        [
            ("580.65", ["pip install"]),
            ("550.54", ["Update the driver to 580", "pip install"]),
            ("470.82", ["pip install", "Update the driver"]),
        ],
    )
    def test_advice_fits_the_driver(self, bad_run, card_without_torch, driver, words):
        """The pip line is always there; a driver that is too old for it gets the advice to update."""
        card_without_torch(f'echo "Tesla T4, {driver}"')
        check(bad_run("--device", "auto"), USAGE, "Tesla T4", driver, *words)

    def test_cpu_goes_on(self, run, card_without_torch, tiny_model, tiny_rows, folder):
        """--device cpu trains, whatever the GPU is."""
        card_without_torch(self.CARD)
        base = ("--data_path", tiny_rows, "--model_path", tiny_model, "--output_path", folder, *QUICK)
        result = run(*base, "--test_size", 0)
        assert result.code == 0, result.err
        assert (folder / runs_folder.FINISHED).is_file()

    @pytest.mark.parametrize("answer", ["exit 9", 'echo "No devices were found"', "true"])
    def test_driver_without_a_card_is_no_card(self, bad_run, card_without_torch, answer):
        """An nvidia-smi that lists no GPU does not keep a machine from training on its CPU."""
        card_without_torch(answer)
        # the rows are read after that check
        check(bad_run("--device", "auto", "--cutoff_len", 8), DATA, "no usable row")


@pytest.mark.parametrize(
    ("problem", "fix", "told"),
    [
        ("It failed: [Errno -2] unknown", "Check it.", "It failed: [Errno -2] unknown. Check it."),
        ("It failed.", "Check it.", "It failed. Check it."),
        ("Is it there?", "Look.", "Is it there? Look."),
        ("It is not there, as in 3.1", "", "It is not there, as in 3.1"),
    ],
)
def test_problem_and_advice_are_two_sentences(problem, fix, told):
    """Words of a library or a server at the end of a problem often lack a full stop."""
    assert str(UserError(problem, fix)) == told
