"""Checks that nothing is lost. The tests run them on the code as it is, test_mutation.py on broken code."""

import itertools
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.memory_rise import memory_rise
from onecard.errors import UserError
from onecard.models import adapter as models_adapter
from onecard.models import lora_shape, trainable
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from onecard.runs.checkpoint import Progress
from onecard.system import lock
from tests.support import faults, tiny
from tests.support.harness import Harness
from tests.support.power_failure import save
from tests.support.resume_cases import differences, flags, outcome


def in_child(work: Callable[[], object]) -> int:
    """The exit code of work() in a forked child; it is negative for a signal."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # a fork has no pool of threads
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def until_untouched(place: Path, before, attempt):
    """(folder, exit code) of attempt(folder, number) for number 1, 2, ... until an attempt is not killed.

    before(folder) writes the checkpoints that exist before each attempt.
    """
    for number in itertools.count(1):
        folder = place / str(number)
        folder.mkdir()
        before(folder)
        code = attempt(folder, number)
        assert code in (0, -signal.SIGKILL)
        yield folder, code
        if code == 0:
            return


def killed_at_operation(work):
    """A function attempt(folder, number): work(folder) in a child that dies before operation `number`."""

    def attempt(folder: Path, number: int) -> int:
        def dying() -> None:
            faults.kill_at_operation(number)
            work(folder)

        return in_child(dying)

    return attempt


def check_old_or_new(folder: Path) -> str:
    """The name of the newest checkpoint after a save of step 3 on top of step 2; it must be complete."""
    newest, problems = runs_checkpoint.newest(folder)
    assert newest is not None
    assert newest.name in ("checkpoint-2", "checkpoint-3")
    assert problems == []
    return newest.name


def a_kill_at_any_file_operation_leaves_a_whole_checkpoint(place: Path, keep: int) -> None:
    """A kill leaves the old checkpoint or the new one, never a mixture or none. The next save cleans up."""

    def before(folder: Path) -> None:
        save(folder, 1)
        save(folder, 2, keep)

    killed, attempt = 0, killed_at_operation(lambda folder: save(folder, 3, keep))
    for folder, code in until_untouched(place, before, attempt):
        name = check_old_or_new(folder)
        if code:
            killed += 1
            runs_folder.go_back(folder, 3)
            save(folder, 4, keep)
            assert not list(folder.glob(".*"))
            assert runs_checkpoint.newest(folder)[0].name == "checkpoint-4"
    assert name == "checkpoint-3"
    assert killed >= 15


def every_flipped_bit_is_found(run: Path) -> None:
    """After a bit is flipped, at each of 300 random positions, the checkpoint before is used."""
    files = [path for path in sorted((run / "checkpoint-10").iterdir()) if path.is_file()]
    generator = random.Random(3)
    missed = []
    for _ in range(300):
        path = generator.choice(files)
        damaged = bytearray(path.read_bytes())
        position, bit = generator.randrange(len(damaged)), generator.randrange(8)
        damaged[position] ^= 1 << bit
        original = path.read_bytes()
        path.write_bytes(damaged)
        newest, problems = runs_checkpoint.newest(run)
        if newest.name != "checkpoint-5" or "checkpoint-10" not in problems[0]:
            missed.append((path.name, position, bit))
        path.write_bytes(original)
    assert missed == []
    assert runs_checkpoint.newest(run) == (run / "checkpoint-10", [])


def cut_missing_and_mixed_files_are_found(run: Path) -> None:
    """After cut, missing and mixed files the checkpoint before is used."""
    last = run / "checkpoint-10"
    for path in sorted(last.iterdir()):
        content = path.read_bytes()
        for length in {0, 1, len(content) // 2, len(content) - 1}:
            path.write_bytes(content[:length])
            assert runs_checkpoint.newest(run)[0].name == "checkpoint-5", (path, length)
        path.unlink()
        assert runs_checkpoint.newest(run)[0].name == "checkpoint-5"
        shutil.copy(run / "checkpoint-5" / path.name, path)
        assert runs_checkpoint.newest(run)[0].name == "checkpoint-5", path
        path.write_bytes(content)


def saving_needs_no_memory_for_the_base(place: Path, gather: Callable | None = None) -> None:
    """Saving copies neither the base of 130 MB nor the adapter and its moments; gather(model) is a fault."""

    def work() -> None:
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=512,
                intermediate_size=512,
                num_hidden_layers=1,
                num_attention_heads=8,
            )
        )
        adapted = models_adapter.add_adapter(base, lora_shape.LoraShape(64, 16, 0.0, "q_proj,v_proj"), seed=1)
        optimizer = torch.optim.AdamW(trainable.trainable(adapted))
        scaler = torch.amp.GradScaler("cpu", enabled=False)

        def saved() -> None:
            gathered = gather and gather(adapted)
            runs_checkpoint.save(
                place,
                Progress(step=1),
                lambda target: trainable.save(adapted, None, target, False),
                optimizer,
                scaler,
            )
            del gathered

        saved()  # first do the imports and allocate the buffers
        shutil.rmtree(place / "checkpoint-1")
        assert memory_rise(saved) < 32 << 20

    assert in_child(work) == 0


def a_lock_dies_with_its_owner(place: Path) -> None:
    """A lock names the pid of its living owner, is free after a kill, and its file is deleted at the end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with lock.owned(place):
            os.write(writer, b"x")
            signal.pause()
        os._exit(0)
    os.read(reader, 1)
    try:
        for attempt in (lambda: lock.check_free(place), lambda: lock.owned(place).__enter__()):
            with pytest.raises(UserError, match=f"process {pid} is training there") as caught:
                attempt()
            assert caught.value.code == 2
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    lock.check_free(place)
    with lock.owned(place):
        assert (place / ".lock").read_text() == str(os.getpid())
    assert not (place / ".lock").exists()
    with lock.owned(place / "new" / "run"):
        pass
    assert not (place / "new").exists()


def a_signal_within_an_update_waits_for_its_end(
    harness: Harness, whole: Path, model: Path, rows: Path, place: Path, **fault: object
) -> None:
    """A run stops only after an update is recorded, and then continues to the same bytes as `whole`."""
    run = place / "run"
    settings = flags(model, rows, run, save_steps=100)
    assert harness.run("finetune", settings, signal_in_update=3, **fault)["code"] == 143
    assert max(runs_folder.checkpoint_steps(run)) == 3
    assert harness.run("finetune_continue", {"output_path": run})["code"] == 0
    assert differences(outcome(whole), outcome(run)) == []


SMALL_STEPS = {
    "bits": 16,
    "dtype": "fp32",
    "device": "cpu",
    "batch_size": 6,
    "micro_batch_tokens": 400,
    "num_epochs": 1,
    "learning_rate": 1e-2,
    "lora_dropout": 0,
    "test_size": 4,
    "warmup_steps": 0,
}


def records(run: Path) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def untroubled_run(harness: Harness, model: Path, place: Path) -> tuple[dict, Path]:
    """The options and the run folder of a training that never ran out of memory."""
    settings = {**SMALL_STEPS, "model_path": model, "data_path": tiny.save_rows(place / "rows.json", 24)}
    answer = harness.run("finetune", {**settings, "output_path": place / "run"})
    assert answer["code"] == 0, answer["said"]
    return settings, place / "run"


def the_step_is_redone_with_the_same_gradient(
    harness: Harness, untroubled: tuple[dict, Path], place: Path, fault: dict
) -> None:
    """Losses, gradient norms and adapter of a run with `fault` agree with the untroubled run to 1e-6."""
    settings, whole = untroubled
    run = place / "run"
    answer = harness.run("finetune", {**settings, "output_path": run}, **fault)
    assert answer["code"] == 0, answer["said"]
    assert "out of memory with micro-batches of 400 tokens: now " in answer["said"]
    steps = [[record for record in records(folder) if "loss" in record] for folder in (whole, run)]
    for mine, other in zip(*steps, strict=True):
        assert other["loss"] == pytest.approx(mine["loss"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-5)
        assert other["rows"] == mine["rows"]
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (whole, run)]
    assert all(torch.allclose(tensors[0][name], tensors[1][name], atol=1e-6) for name in tensors[0])
    last = json.loads((run / "checkpoint-4" / "progress.json").read_text())
    assert last["progress"]["micro_batch_tokens"] < 400
