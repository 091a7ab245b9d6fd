"""Whole runs on the tiny model: the contents of the run folder, causes of a stop, and refusals."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from onecard.config import options as config_options
from onecard.config.training import ContinueConfig, FinetuneConfig
from onecard.data import examples as data_examples
from onecard.data import reader
from onecard.data import template as data_template
from onecard.errors import UserError
from onecard.inference import chat, transformers_engine
from onecard.models import adapter as models_adapter
from onecard.models import base_model, lora_shape, trainable
from onecard.models import tokenizer as models_tokenizer
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from onecard.training import loop, metrics, out_of_memory, step, trainer
from tests.support import tiny
from tests.support.paths import ROOT
from tests.support.small_runs import QUICK, options, short_reply


def run(settings: FinetuneConfig) -> Path:
    loop.run(settings, sample=chat.reply, draw=metrics.loss_curve)
    return Path(settings.output_path)


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> tuple[FinetuneConfig, Path]:
    """A finished run that other tests only read."""
    folder = tmp_path_factory.mktemp("finished")
    settings = options(tiny_model, tiny.save_rows(folder / "rows.json", 24), folder / "run", save_steps=2)
    return settings, run(settings)


def test_run_folder_holds_what_is_promised(finished):
    """The folder has configuration, log, checkpoints, adapter, picture and finished.json as documented."""
    settings, folder = finished
    names = {path.name for path in folder.iterdir()}
    assert {"finetune_config.json", "log.jsonl", "loss.png", "finished.json"} <= names
    assert {"adapter_config.json", "adapter_model.safetensors", "checkpoint-2", "checkpoint-8"} <= names
    assert not any(name.startswith(".") for name in names)
    steps = [record for record in log(folder) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 9))  # 19 rows: 6 + 6 + 6 + 1, twice
    assert [record["rows"] for record in steps] == [6, 6, 6, 1] * 2
    fields = "step loss learning_rate grad_norm rows tokens target_tokens rows_seen epoch seconds"
    assert set(steps[0]) == {*fields.split(), "peak_memory_bytes"}
    assert steps[-1]["rows_seen"] == 38
    assert steps[-1]["epoch"] == 2
    evaluations = [record for record in log(folder) if "eval_loss" in record]
    assert [record["step"] for record in evaluations] == [0, 3, 6, 8]
    assert set(evaluations[0]) == {"step", "eval_loss", "eval_token_accuracy"}
    stored = json.loads((folder / "finetune_config.json").read_text())
    assert stored["resolved"]["micro_batch_tokens"] == 2048
    assert stored["options"]["data_path"] == settings.data_path
    report = json.loads((folder / "finished.json").read_text())
    assert (
        report["adapter_sha256"]
        == hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    )
    assert report["eval_loss_after"] == min(record["eval_loss"] for record in evaluations[1:])
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_rows_of_a_run_are_those_of_the_plan(finished):
    """Tokens and target tokens of every step are those of the rows that rows_at names."""
    settings, folder = finished
    rows = reader.read_rows(settings.data_path)
    examples = tiny.encoded(rows, models_tokenizer.load_tokenizer(settings.model_path))
    training, _ = data_examples.split(24, settings.test_size, settings.seed)
    seen = 0
    for record in (record for record in log(folder) if "loss" in record):
        chosen = training[data_examples.rows_at(settings.seed, seen, settings.batch_size, len(training))]
        assert record["tokens"] == examples.lengths[chosen].sum()
        assert record["target_tokens"] == examples.target_counts[chosen].sum()
        seen += len(chosen)
    assert seen == 38


def test_peft_loads_the_adapter_as_it_is(finished, tiny_model):
    """In peft the published adapter gives the logits of the best checkpoint, and B @ A is not zero."""
    _, folder = finished
    best = folder / f"checkpoint-{json.loads((folder / 'finished.json').read_text())['best_step']}"
    ids = torch.arange(10)[None]
    logits = {}
    for name in ("plain", folder, best):
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        adapted = base if name == "plain" else PeftModel.from_pretrained(base, name)
        with torch.no_grad():
            logits[name] = adapted(ids).logits
    assert torch.equal(logits[folder], logits[best])
    assert not torch.allclose(logits[folder], logits["plain"], atol=1e-3)
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (sorted(name for name in tensors if key in name) for key in ("lora_A", "lora_B"))
    assert len(a) == len(b) == 4
    assert all((tensors[y] @ tensors[x]).norm() > 0 for x, y in zip(a, b, strict=True))


def test_saved_adapter_has_the_logits_of_the_one_in_memory(tiny_model, tmp_path):
    """T20: the saved file, read by peft on a plain base, gives the logits of the trained model."""
    adapted = models_adapter.add_adapter(
        base_model.load_base(str(tiny_model), 16, "fp32", "cpu"),
        lora_shape.LoraShape(4, 8, 0, "q_proj,o_proj"),
        0,
    )
    for parameter in trainable.trainable(adapted):
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        memory = adapted(ids).logits
        trainable.save(adapted, None, tmp_path, was_updated=True)
        read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path)(
            ids
        ).logits
    assert torch.allclose(memory, read, atol=1e-6)


def test_the_same_command_again_changes_nothing(finished, capsys):
    """The command says that the run is finished and how to go on, and changes no file."""
    settings, folder = finished
    before = tree(folder)
    run(settings)
    output = capsys.readouterr().out
    assert "finished" in output
    assert "--overwrite" in output
    assert tree(folder) == before


def test_other_options_are_refused(finished, tiny_model):
    """Exit code 2 names the option with both values and ways to go on; the folder is not changed."""
    settings, folder = finished
    before = tree(folder)
    other = options(tiny_model, settings.data_path, folder, save_steps=2, learning_rate=0.5)
    with pytest.raises(UserError, match=r"learning_rate 0.01 -> 0.5.*--overwrite") as caught:
        run(other)
    assert caught.value.code == 2
    assert tree(folder) == before


def test_unfinished_run_is_refused_and_overwrite_clears_only_the_run(tiny_model, tiny_rows, tmp_path):
    """--overwrite deletes the files of a run and keeps a file of the user."""
    settings = options(tiny_model, tiny_rows, tmp_path / "run", max_steps=2)
    folder = run(settings)
    (folder / "notes.txt").write_text("mine")
    (folder / "finished.json").unlink()
    with pytest.raises(UserError, match="unfinished run, saved up to step 2"):
        run(settings)
    first = log(folder)
    run(options(tiny_model, tiny_rows, tmp_path / "run", max_steps=1, overwrite=True))
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(runs_folder.checkpoint_steps(folder)) == [0, 1]
    assert len(log(folder)) < len(first)


@pytest.mark.parametrize(
    ("limit", "steps"),
    [({}, [0, 1, 2, 3, 4, 8]), ({"save_total_limit": 1}, [3, 8])],
    ids=["all kept", "one kept"],
)
def test_the_best_adapter_is_published(tiny_model, tiny_rows, tmp_path, monkeypatch, limit, steps):
    """The adapter with the lowest validation loss after step 0 is published, whatever came later.

    steps: of the checkpoints at the end: step 0, improving steps and the ends of epochs, or the best and the
    last one when --save_total_limit deletes all others.
    """
    losses = iter([1.0, 5.0, 4.0, 2.0, 3.0, 2.0, 6.0, 7.0, 8.0])  # the losses of steps 0 to 8
    monkeypatch.setattr(step, "evaluate", lambda *_: (next(losses), 0.5))
    folder = run(options(tiny_model, tiny_rows, tmp_path / "run", eval_steps=1, **limit))
    finished = json.loads((folder / "finished.json").read_text())
    assert (finished["best_step"], finished["eval_loss_after"], finished["eval_loss_before"]) == (3, 2.0, 1.0)
    assert sorted(runs_folder.checkpoint_steps(folder)) == steps
    published = (folder / "adapter_model.safetensors").read_bytes()
    assert published == (folder / "checkpoint-3" / "adapter_model.safetensors").read_bytes()
    assert published != (folder / "checkpoint-8" / "adapter_model.safetensors").read_bytes()


def test_without_validation_rows_the_last_adapter_is_published(tiny_model, tiny_rows, tmp_path):
    """With test_size 0 nothing is evaluated, the last adapter counts, and older checkpoints are deleted."""
    folder = run(
        options(tiny_model, tiny_rows, tmp_path / "run", test_size=0, save_steps=1, save_total_limit=2)
    )
    assert all("eval_loss" not in record for record in log(folder))
    assert sorted(runs_folder.checkpoint_steps(folder)) == [7, 8]
    assert json.loads((folder / "finished.json").read_text())["best_step"] == 8


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_two_fresh_processes_give_the_same_bytes(tiny_model, tiny_rows, tmp_path, bits):
    """The same run with dropout gives equal adapters and losses both times (T24)."""
    started = []
    for name in ("one", "two"):  # they run side by side with one thread each
        flags = {**QUICK, "bits": bits, "model_path": tiny_model, "data_path": tiny_rows, "test_size": 0}
        flags |= {"output_path": tmp_path / name, "max_steps": 3, "lora_dropout": 0.1}
        command = [sys.executable, "finetune.py", *(f"--{key}={value}" for key, value in flags.items())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL))
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    outcomes = [
        (
            [record["loss"] for record in log(tmp_path / name)],
            (tmp_path / name / "adapter_model.safetensors").read_bytes(),
        )
        for name in ("one", "two")
    ]
    assert outcomes[0] == outcomes[1]


def test_two_processes_train_like_one(tiny_model, tiny_rows, tmp_path):
    """A run under torchrun with two gloo processes gives the losses and the adapter of one process."""
    flags = {**QUICK, "model_path": tiny_model, "data_path": tiny_rows, "test_size": 4, "lora_dropout": 0}
    start = [
        [sys.executable],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    ]
    for number, command in enumerate(start, start=1):
        arguments = [
            f"--{key}={value}" for key, value in {**flags, "output_path": tmp_path / str(number)}.items()
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*command, "finetune.py", *arguments], check=True, cwd=ROOT, env=environment, timeout=300
        )
    one, two = log(tmp_path / "1"), log(tmp_path / "2")
    assert [record["step"] for record in one] == [record["step"] for record in two]
    for mine, other in zip(one, two, strict=True):
        key = "loss" if "loss" in mine else "eval_loss"
        assert other[key] == pytest.approx(mine[key], rel=1e-4)
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "12"]
    assert all(torch.allclose(tensors[0][name], tensors[1][name], atol=1e-4) for name in tensors[0])


def poison(monkeypatch, at_step: int, value: float, gradient_only: bool = False, times: int = 1) -> None:
    """Make loss or gradient of optimizer step `at_step` (and the next times - 1) equal `value`."""
    plain, seen = step.gradient, []

    def poisoned(step_model, micro_batches, targets, *rest):
        seen.append(1)
        if not at_step <= len(seen) < at_step + times:
            return plain(step_model, micro_batches, targets, *rest)
        if gradient_only:
            hook = next(iter(trainable.trainable(step_model))).register_hook(lambda g: g * value)
            try:
                return plain(step_model, micro_batches, targets, *rest)
            finally:
                hook.remove()
        forward = step_model.forward
        with monkeypatch.context() as patch:
            patch.setattr(step_model, "forward", lambda packed: (forward(packed)[0] * value, 1, None))
            return plain(step_model, micro_batches, targets, *rest)

    monkeypatch.setattr(step, "gradient", poisoned)
    monkeypatch.setattr(out_of_memory, "dry_run", lambda _: True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize("log_steps", [1, 100])
def test_a_loss_that_is_no_number_stops_before_the_update(
    tiny_model, tiny_rows, tmp_path, monkeypatch, value, gradient_only, log_steps
):
    """T15: exit code 5 names step and rows, the log has the raw value, and no checkpoint contains it."""
    poison(monkeypatch, 3, value, gradient_only)
    settings = options(
        tiny_model, tiny_rows, tmp_path / "run", save_steps=1, log_steps=log_steps, test_size=0
    )
    with pytest.raises(UserError, match=r"Step 3: .*rows \d+") as caught:
        run(settings)
    assert caught.value.code == 5
    folder = tmp_path / "run"
    assert runs_folder.checkpoint_steps(folder) and max(runs_folder.checkpoint_steps(folder)) == 2  # noqa: PT018
    for path in folder.glob("checkpoint-*/*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())
    last = log(folder)[-1]
    assert last["step"] == 3
    if gradient_only:  # the norm of a gradient with an infinite part is inf, or nan after inf * 0
        assert last["grad_norm"] in ("nan", str(value))
    else:
        assert last["loss"] == str(value)
    rows = data_examples.rows_at(settings.seed, 12, 6, 24)
    assert set(last["row_numbers"]) <= {int(row) + 1 for row in rows}
    assert last["row_numbers"]
    assert not (folder / "finished.json").exists()
    assert not (folder / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(("count", "end"), [(3, "1, 2, 3 of"), (20, "19, 20 of"), (21, "19, 20 ... of")])
def test_at_most_twenty_bad_rows_are_named(count, end):
    trainer = types.SimpleNamespace(
        progress=types.SimpleNamespace(step=4),
        metrics=types.SimpleNamespace(event=lambda record: None),
        plan=types.SimpleNamespace(options=types.SimpleNamespace(data_path="x.json")),
    )
    problem = step.NonFiniteError("loss", float("nan"), list(range(1, count + 1)))
    assert f"{end} x.json" in loop.stop_non_finite(trainer, problem).problem


def test_fp16_overflow_skips_the_step(tiny_model, tiny_rows, tmp_path, monkeypatch):
    """T16: the scaler skips the update, halves its scale, keeps the rate and counts the rows."""
    poison(monkeypatch, 3, float("inf"), gradient_only=True)
    folder = run(options(tiny_model, tiny_rows, tmp_path / "run", dtype="fp16", test_size=0, save_steps=1))
    records = log(folder)
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [record["loss_scale"] for record in records[:4]] == [1024, 1024, 512, 512]
    rates = [record["learning_rate"] for record in records]
    assert rates[2] == rates[3]  # the schedule has not advanced
    assert rates[1] > rates[2]
    assert [record["rows_seen"] for record in records] == [6, 12, 18, 24, 30, 36, 42, 48]
    before, after = (
        load_file(folder / f"checkpoint-{number}" / "adapter_model.safetensors") for number in (2, 3)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((folder / "finished.json").read_text())["skipped_steps"] == 1


def test_fp16_gives_up_when_it_only_overflows(tiny_model, tiny_rows, tmp_path, monkeypatch):
    """A scale below 1 or 20 skipped steps in a row end the run with exit code 5."""
    poison(monkeypatch, 1, float("inf"), gradient_only=True, times=99)
    settings = options(tiny_model, tiny_rows, tmp_path / "run", dtype="fp16", test_size=0, max_steps=40)
    with pytest.raises(UserError, match="fp16 overflows") as caught:
        run(settings)
    assert caught.value.code == 5
    assert len(log(tmp_path / "run")) == 11  # 1024 halved eleven times is below 1

    monkeypatch.setattr(trainer, "FIRST_SCALE", 2.0**60)
    with pytest.raises(UserError, match="20 steps skipped in a row"):
        run(options(tiny_model, tiny_rows, tmp_path / "other", dtype="fp16", test_size=0, max_steps=40))


def test_adapter_weights_are_fp32_for_every_dtype(tiny_model):
    """The scaler and the optimizer never work on weights in half precision."""
    for dtype in ("fp16", "bf16", "fp32"):
        adapted = models_adapter.add_adapter(
            base_model.load_base(str(tiny_model), 8, dtype, "cpu"),
            lora_shape.LoraShape(4, 8, 0, "all-linear"),
            0,
        )
        assert {parameter.dtype for parameter in trainable.trainable(adapted)} == {torch.float32}


def test_a_loss_of_exactly_zero_is_warned_about(tiny_model, tiny_rows, tmp_path, monkeypatch, capsys):
    """T17: the warning comes at once."""
    poison(monkeypatch, 1, 0.0)
    run(options(tiny_model, tiny_rows, tmp_path / "run", test_size=0, max_steps=2))
    assert "loss of step 1 is exactly 0" in capsys.readouterr().out


def test_a_rate_of_zero_is_warned_about_and_never_saved(tiny_model, tiny_rows, tmp_path, capsys):
    """T17, T20: nothing is learned, so neither a new checkpoint nor an adapter is saved."""
    with pytest.raises(UserError, match="learned nothing") as caught:
        run(options(tiny_model, tiny_rows, tmp_path / "run", learning_rate=0, max_steps=2))
    assert caught.value.code == 4
    assert "--learning_rate is 0" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"finetune_config.json", "log.jsonl", "checkpoint-0"}


def test_a_validation_loss_that_is_no_number_stops(tiny_model, tiny_rows, tmp_path, monkeypatch):
    """Exit code 5, with the raw value as text in the log and no finished.json."""
    losses = iter([3.0, 2.0, float("nan")])
    monkeypatch.setattr(step, "evaluate", lambda *_: (next(losses), 0.5))
    with pytest.raises(UserError, match="Step 2: the validation loss is nan") as caught:
        run(options(tiny_model, tiny_rows, tmp_path / "run", eval_steps=1))
    assert caught.value.code == 5
    assert log(tmp_path / "run")[-1] == {"step": 2, "eval_loss": "nan", "stopped": "validation loss"}
    assert sorted(runs_folder.checkpoint_steps(tmp_path / "run")) == [0, 1]
    assert not (tmp_path / "run" / "finished.json").exists()


@pytest.mark.parametrize("fault", ["empty", "renamed", "no-op", "nan"])
def test_a_bad_adapter_is_not_saved(tiny_model, tiny_rows, tmp_path, monkeypatch, fault):
    """T20: an empty state dict, wrong keys, a zero B or NaN are refused with exit code 4 and not saved."""
    faults = {
        "empty": lambda name, tensor: None,
        "renamed": lambda name, tensor: ("base_model." + name, tensor),
        "no-op": lambda name, tensor: (name, tensor * (".lora_B" not in name)),
        "nan": lambda name, tensor: (name, tensor * float("nan")),
    }
    plain = models_adapter.adapter_tensors

    def faulty(*arguments):
        return dict(filter(None, (faults[fault](*item) for item in plain(*arguments).items())))

    monkeypatch.setattr(models_adapter, "adapter_tensors", faulty)
    with pytest.raises(UserError) as caught:
        run(options(tiny_model, tiny_rows, tmp_path / "run", save_steps=1, test_size=0))
    assert caught.value.code == 4
    expected = ["checkpoint-0"] if fault == "no-op" else []  # the first adapter may have no effect yet
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == expected
    assert list((tmp_path / "run").glob(".saving-*")) == []


@pytest.mark.parametrize(
    "name", ["checkpoint-2/model.bin", "adapter_model.safetensors", "log.jsonl", "finished.json", "loss.png"]
)
def test_what_another_program_left_is_not_written_over(tiny_model, tiny_rows, tmp_path, name):
    """A folder with files that this run would overwrite is refused with exit code 2 and not changed."""
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("theirs")
    with pytest.raises(UserError, match="--overwrite") as caught:
        run(options(tiny_model, tiny_rows, tmp_path / "run"))
    assert caught.value.code == 2
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "theirs"


def test_overwrite_leaves_what_no_run_writes(tiny_model, tiny_rows, tmp_path):
    """Folders and files that only look like those of a run are kept."""
    folder = tmp_path / "run"
    for name in ("checkpoint-mine/x", "wandb/x", "checkpoint-notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    run(options(tiny_model, tiny_rows, folder, overwrite=True, max_steps=1, test_size=0))
    assert (folder / "checkpoint-mine/x").exists()
    assert (folder / "wandb/x").exists()
    assert (folder / "checkpoint-notes.txt").exists()


def test_a_run_that_stopped_before_its_first_save_starts_again(tiny_model, tiny_rows, tmp_path, monkeypatch):
    """A new start loses nothing here, so it needs no --overwrite."""
    settings = options(tiny_model, tiny_rows, tmp_path / "run", max_steps=1)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs_checkpoint, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    monkeypatch.undo()
    assert (tmp_path / "run" / "finetune_config.json").exists()
    assert (run(settings) / "finished.json").exists()


def test_a_full_disk_is_exit_7(tiny_model, tiny_rows, tmp_path):
    """On a small real file system there is one message and no half-written checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    flags = {
        **QUICK,
        "model_path": tiny_model,
        "data_path": tiny_rows,
        "test_size": 0,
        "output_path": disk / "run",
    }
    flags |= {"lora_r": 1000, "lora_target_modules": "all-linear", "max_steps": 4, "save_steps": 1}
    command = " ".join(["finetune.py", *(f"--{key}={value}" for key, value in flags.items())])
    # The disk has room for the three checkpoints that the check at the start needs; then it is filled.
    script = f"""
        mount -t tmpfs -o size=130m none {disk} || exit 99
        ({sys.executable} {command} & echo $! > {disk}/pid; wait $!; echo code $?) &
        until [ -e {disk}/run/log.jsonl ]; do sleep 0.05; done
        head -c 122m /dev/zero > {disk}/filler
        wait
        ls -a {disk}/run
    """
    result = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    if result.returncode == 99:
        pytest.skip("mounting a small disk is not allowed here")
    assert "code 7" in result.stdout, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    assert "could not be written" in result.stderr or "MiB, free: " in result.stderr
    assert ".saving" not in result.stdout


def test_a_damaged_checkpoint_is_named(finished, tmp_path):
    """verify notices a flipped bit, a missing file and a missing manifest."""
    _, folder = finished
    copy = tmp_path / "checkpoint-8"
    shutil.copytree(folder / "checkpoint-8", copy)
    runs_checkpoint.verify(copy)
    for path in sorted(copy.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        with pytest.raises(UserError) as caught:
            runs_checkpoint.verify(copy)
        assert caught.value.code == 4
        path.unlink()
        with pytest.raises(UserError):
            runs_checkpoint.verify(copy)
        path.write_bytes(content)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_optimizers_lower_the_loss(tiny_model, tiny_rows, tmp_path, optimizer):
    """Every optimizer that runs here learns these rows."""
    folder = run(
        options(tiny_model, tiny_rows, tmp_path / "run", optimizer=optimizer, num_epochs=6, test_size=0)
    )
    losses = [record["loss"] for record in log(folder)]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_wandb_offline_keeps_the_run_on_this_machine(tiny_model, tiny_rows, tmp_path, monkeypatch):
    """--wandb with WANDB_MODE=offline writes an offline run into the output folder and talks to nobody.

    A run that goes on writes another part of the same W&B run, which `wandb sync` joins.
    """
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = run(options(tiny_model, tiny_rows, tmp_path / "run", wandb=True, max_steps=2))
    runs = list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1
    assert runs[0].stat().st_size > 1000
    assert (folder / "finished.json").exists()
    longer = config_options.build(ContinueConfig, {"output_path": str(folder), "max_steps": "3"})
    loop.go_on(longer, frozenset({"output_path", "max_steps"}), short_reply, metrics.loss_curve)
    parts = [path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")]
    assert parts == [json.loads((folder / "wandb_run.json").read_text())["id"]] * 2


def test_all_linear_and_inputs_as_targets(tiny_model, tiny_rows, tmp_path):
    """all-linear reaches seven modules a layer; --train_on_inputs has more targets."""
    few = run(options(tiny_model, tiny_rows, tmp_path / "few", max_steps=1))
    many = run(
        options(tiny_model, tiny_rows, tmp_path / "many", max_steps=1, lora_target_modules="all-linear",
                train_on_inputs=True, gradient_checkpointing="on", micro_batch_tokens=64)
    )  # fmt: skip
    count = [len(load_file(folder / "adapter_model.safetensors")) for folder in (few, many)]
    assert count == [2 * 2 * 2, 2 * 7 * 2]
    assert log(many)[1]["target_tokens"] == log(many)[1]["tokens"] - 6 > log(few)[1]["target_tokens"]


def test_what_chat_asks_is_the_beginning_of_what_training_saw(tiny_model, tiny_rows, tmp_path, monkeypatch):
    """The token ids that reach the model are compared, not only those that encode returns."""
    trained, questions = [], []
    plain_step, plain_greedy = step.gradient, transformers_engine.greedy

    def spy_step(step_model, micro_batches, *rest):
        micro_batches = list(micro_batches)
        for packed in micro_batches:
            documents = packed.input_ids[0].split(packed.document_lengths)
            trained.extend(zip(packed.row_numbers, (ids.tolist() for ids in documents), strict=True))
        return plain_step(step_model, micro_batches, *rest)

    def spy_greedy(adapted, prompts, *rest):
        questions.extend(prompts)
        return plain_greedy(adapted, prompts, *rest)

    monkeypatch.setattr(step, "gradient", spy_step)
    monkeypatch.setattr(out_of_memory, "dry_run", lambda _: True)
    monkeypatch.setattr(transformers_engine, "greedy", spy_greedy)
    settings = options(tiny_model, tiny_rows, tmp_path / "run", test_size=0, num_epochs=1)
    run(settings)
    base = base_model.load_base(str(tiny_model), 16, "fp32", "cpu")
    numbers = [number for number, _ in trained]
    chat.reply(
        base,
        models_tokenizer.load_tokenizer(str(tiny_model)),
        data_template.load("alpaca", None),
        reader.pick_rows([tiny_rows], numbers),
        2,
    )
    assert sorted(numbers) == list(range(1, 25))
    for (_, ids), question in zip(trained, questions, strict=True):
        assert ids[: len(question)] == question
        assert len(question) < len(ids)


def test_greedy_is_the_most_probable_token_each_time(tiny_model):
    """Batched, padded and cached generation equals full forward passes for one prompt at a time."""
    base = base_model.load_base(str(tiny_model), 16, "fp32", "cpu")
    prompts = [[5, 9, 17], [4], [30, 31, 32, 33, 34, 35, 36]]
    answers = transformers_engine.greedy(base, prompts, 6, eos_ids=[1])
    for question, answer in zip(prompts, answers, strict=True):
        ids = list(question)
        with torch.no_grad():
            while len(ids) < len(question) + 6:
                ids.append(base(torch.tensor([ids])).logits[0, -1].argmax().item())
        expected = ids[len(question) :]
        assert answer == (expected[: expected.index(1)] if 1 in expected else expected)


def test_fp16_with_a_process_that_has_no_row(tiny_model, tiny_rows, tmp_path):
    """With two processes and one row a step, the scaler and gradient of the idle one stay in step."""
    flags = {**QUICK, "model_path": tiny_model, "data_path": tiny_rows, "test_size": 0, "dtype": "fp16"}
    flags |= {"batch_size": 1, "max_steps": 2, "output_path": tmp_path / "run"}
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "finetune.py",
    ]
    arguments = [f"--{key}={value}" for key, value in flags.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*start, *arguments], check=True, cwd=ROOT, env=environment, timeout=300)
    assert (tmp_path / "run" / "finished.json").exists()


def test_a_model_with_other_logits_is_refused(tiny_model, tiny_rows, tmp_path):
    """A config that scales or caps logits is refused before weights are read, as its loss would be wrong."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    values = json.loads((folder / "config.json").read_text())
    for name, value in (("logits_scaling", 8.0), ("logit_scale", 0.0625), ("final_logit_softcapping", 30.0)):
        (folder / "config.json").write_text(json.dumps({**values, name: value}))
        with pytest.raises(UserError, match=name) as caught:
            run(options(folder, tiny_rows, tmp_path / "run"))
        assert caught.value.code == 2
    (folder / "config.json").write_text(json.dumps({**values, "logits_scaling": 1.0}))
    assert run(options(folder, tiny_rows, tmp_path / "run", max_steps=1))


@pytest.mark.parametrize(
    ("flags", "warmup"),
    [({"warmup_steps": 100}, 2), ({"warmup_steps": 1}, 1), ({"warmup_ratio": 0.5}, 5)],
)
def test_warmup_of_a_short_run(tiny_model, tiny_rows, tmp_path, capsys, flags, warmup):
    """--warmup_steps is limited to a fifth of the steps with a note; --warmup_ratio is not limited."""
    folder = run(options(tiny_model, tiny_rows, tmp_path / "run", test_size=0, max_steps=10, **flags))
    rates = [record["learning_rate"] for record in log(folder)]
    assert rates.index(max(rates)) == warmup
    assert ("a short run" in capsys.readouterr().out) == (flags.get("warmup_steps") == 100)
