"""Faults for trainings of the tests: kills at a chosen point, lack of memory, and mutants of our own code.

A mutant breaks one property that the code must have; the tests show that they notice it.
"""

import builtins
import contextlib
import dataclasses
import io
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.support import fake_gpus


class Touch:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return (open, (str(self.canary), "w"))


@contextlib.contextmanager
def planted(fault: dict[str, Any]) -> Iterator[None]:
    """Plant the faults that a request names in this child process; nothing is undone."""
    for name, value in fault.items():
        PLANT[name](value)
    yield


def kill_in_step(where: list[int]) -> None:
    """Send SIGKILL in gradient number where[0] (the dry run is number 1) after where[1] micro-batches."""
    from onecard.training import step as training_step

    original, position = training_step.gradient, {"step": 0, "micro_batch": 0}

    def gradient(step_model: Any, micro_batches: Any, *rest: Any) -> Any:
        position["step"] += 1
        position["micro_batch"] = 0
        forward = step_model.forward

        def counted(packed: Any) -> Any:
            if [position["step"], position["micro_batch"]] == where:
                os.kill(os.getpid(), signal.SIGKILL)
            position["micro_batch"] += 1
            return forward(packed)

        step_model.forward = counted
        try:
            return original(step_model, micro_batches, *rest)
        finally:
            step_model.forward = forward

    training_step.gradient = gradient


def kill_at_operation(number: int) -> None:
    """Send SIGKILL right before file operation `number` of this process, counted from 1."""
    done = {"count": 0}

    def before() -> None:
        done["count"] += 1
        if done["count"] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    watch_operations(before)


def watch_operations(before: Callable[[], None]) -> None:
    """Call `before` ahead of every file operation: open for writing, sync, rename, mkdir, delete."""
    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        plain = getattr(os, name)

        def counted(*arguments: Any, plain: Any = plain, **keywords: Any) -> Any:
            before()
            return plain(*arguments, **keywords)

        setattr(os, name, counted)
    plain_open = io.open

    def counted_open(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        if set(mode) & set("wax+"):
            before()
        return plain_open(file, mode, *arguments, **keywords)

    builtins.open = io.open = counted_open  # pathlib uses io.open


def no_memory_above(tokens: int) -> None:
    """Every micro-batch of more than `tokens` tokens runs out of memory in its backward pass."""
    from onecard.training import step as training_step

    original = training_step.StepModel.forward

    def forward(self: Any, packed: Any) -> Any:
        loss_sum, targets, correct = original(self, packed)
        if packed.input_ids.numel() > tokens and loss_sum.requires_grad:
            loss_sum.register_hook(_no_memory)
        return loss_sum, targets, correct

    training_step.StepModel.forward = forward


def no_memory_at(calls: list[int]) -> None:
    """The forward passes with these numbers, counted from 1 after the dry run, run out of memory."""
    from onecard.training import out_of_memory
    from onecard.training import step as training_step

    original, dry_run = training_step.StepModel.forward, out_of_memory.dry_run
    state = {"count": 0, "dry": False}

    def forward(self: Any, packed: Any) -> Any:
        if not state["dry"] and self.training:
            state["count"] += 1
            if state["count"] in calls:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(self, packed)

    def dry(trainer: Any) -> bool:
        state["dry"] = True
        fits = dry_run(trainer)
        state["dry"] = False
        return fits

    training_step.StepModel.forward, out_of_memory.dry_run = forward, dry


def signal_in_update(number: int) -> None:
    """SIGTERM arrives when update `number` has changed the adapter, before the run has recorded it."""
    from onecard.training import step as training_step

    original, calls = training_step.update, {"count": 0}

    def update(*arguments: Any) -> Any:
        result = original(*arguments)
        calls["count"] += 1
        if calls["count"] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    training_step.update = update


def overflow_in_update(number: int) -> None:
    """In update `number` an element of the gradient is infinite, as after an overflow in fp16."""
    from onecard.training import step as training_step

    original, calls = training_step.update, {"count": 0}

    def update(optimizer: Any, *rest: Any) -> Any:
        calls["count"] += 1
        if calls["count"] == number:
            optimizer.param_groups[0]["params"][-1].grad[0, 0] = math.inf
        return original(optimizer, *rest)

    training_step.update = update


def plain_gloo(_: Any) -> None:
    """DeepSpeed sums by gloo, and not by code of its own for CPUs, which it would compile for minutes."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def address_space(more: int) -> None:
    """From the first dry run on, limit the address space to `more` bytes beyond those in use (RLIMIT_AS)."""
    import resource

    from onecard.training import out_of_memory

    original = out_of_memory.dry_run

    def dry_run(trainer: Any) -> bool:
        with open("/proc/self/statm", encoding="utf-8") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))
        return original(trainer)

    out_of_memory.dry_run = dry_run


def torn_updates(_: Any) -> None:
    """A mutant: signals do not wait for the end of an update or a save."""
    from onecard.system import signals as system_signals

    system_signals.later = contextlib.nullcontext


def partial_gradients(_: Any) -> None:
    """A mutant: the gradient from before the lack of memory is kept when the step is repeated."""
    from onecard.training import distributed
    from onecard.training import step as training_step

    original, original_drop, skipped = distributed.all_processes, training_step._drop_gradient, {"times": 0}

    def all_processes(flag: bool) -> bool:
        skipped["times"] = 0 if flag else 2  # at the end of this try and at the beginning of the next
        return original(flag)

    def drop_gradient(parameters: Any) -> None:
        skipped["times"] -= 1
        if skipped["times"] < 0:
            original_drop(parameters)

    distributed.all_processes, training_step._drop_gradient = all_processes, drop_gradient


def slow_save(seconds: float) -> None:
    """From the second checkpoint on, saving takes this many seconds longer."""
    from onecard.models import trainable

    original, saves = trainable.save, []

    def slow(*arguments: Any) -> None:
        saves.append(1)
        if len(saves) > 1:
            print("saving slowly", flush=True)
            time.sleep(seconds)
        original(*arguments)

    trainable.save = slow


def _no_memory(_: Any) -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")


def mutate(name: str) -> None:
    """Apply the mutant of this name."""
    MUTANTS[name]()


def _mutant_no_seed() -> None:
    """Dropout depends on the current state of the random generator, as if the state were not restored."""
    from onecard.training import loop

    class Deaf:
        def __init__(self, *_: Any) -> None:
            self.generate_state = lambda _: [torch.initial_seed() % 2**32]

    loop.np.random.SeedSequence = Deaf


def _mutant_no_moments() -> None:
    """The optimizer starts without its saved state."""
    from onecard.runs import checkpoint as runs_checkpoint

    runs_checkpoint.restore_optimizer = lambda *_: None


def _mutant_fresh_rows() -> None:
    """A resumed run starts again with the first row."""
    _change_progress(rows_seen=0)


def _mutant_rate_restarts() -> None:
    """A resumed run starts the learning rate schedule again."""
    _change_progress(updates=0)


def _mutant_off_by_one() -> None:
    """A resumed run counts one step twice."""
    from onecard.training import resume

    original = resume.decide

    def decide(*arguments: Any) -> Any:
        start = original(*arguments)
        start.progress.step += 1
        return start

    resume.decide = decide


def _mutant_no_adapter() -> None:
    """A resumed run starts with a new adapter."""
    from onecard.models import trainable

    trainable.load = lambda *_: None


def _mutant_log_kept() -> None:
    """The log keeps the lines that were written after the checkpoint."""
    from onecard.runs import folder as runs_folder

    runs_folder.cut_log = lambda *_: 0


def _change_progress(**changes: Any) -> None:
    from onecard.runs import checkpoint as runs_checkpoint

    original = runs_checkpoint.read_progress
    runs_checkpoint.read_progress = lambda path: dataclasses.replace(original(path), **changes)


MUTANTS = {
    name.removeprefix("_mutant_"): made
    for name, made in list(globals().items())
    if name.startswith("_mutant_")
}
PLANT = {
    "signals": lambda _: None,  # sent by the harness
    "kill_in_step": kill_in_step,
    "kill_at_operation": kill_at_operation,
    "no_memory_above": no_memory_above,
    "no_memory_at": no_memory_at,
    "mutant": mutate,
    "signal_in_update": signal_in_update,
    "address_space": address_space,
    "environment": os.environ.update,
    "gpus": fake_gpus.plant,
    "overflow_in_update": overflow_in_update,
    "plain_gloo": plain_gloo,
    "torn_updates": torn_updates,
    "partial_gradients": partial_gradients,
    "slow_save": slow_save,
}
