"""The training loop: turns options into a run folder with a log, checkpoints and the best adapter.

It reads from top to bottom: plan, load, one optimizer step after the other (training/step.py), and the
finished adapter. The functions that answer prompts and draw the plot are passed in: the first belongs to a
room that training does not import, and the loop needs no plotting library.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from onecard import errors
from onecard.config.training import ContinueConfig, FinetuneConfig
from onecard.data import examples as data_examples
from onecard.data.packing import PackedBatch, micro_batches
from onecard.errors import CHECKPOINT, NON_FINITE, Stopped, UserError
from onecard.hub import revisions
from onecard.hub import session as hub_session
from onecard.models import trainable
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from onecard.system import commands, gpus, hardware, lock, signals
from onecard.system import processes as system_processes
from onecard.training import distributed, out_of_memory, resume, step, warm_start
from onecard.training.plan import Plan, describe, prepare
from onecard.training.samples import Draw, Sample, answers, finish, note_answers, samples_are_due
from onecard.training.starting_point import BUSY, STARTING, StartingPoint, finished_before
from onecard.training.strategy import choose
from onecard.training.trainer import Trainer, load

SAVE_SECONDS = 600  # a checkpoint is saved at least this often
MOST_SKIPS = 20  # so many steps in a row may be skipped by the fp16 loss scaler


def run(options: FinetuneConfig, sample: Sample, draw: Draw, explicit: frozenset[str] = frozenset()) -> None:
    """Fine-tune as the options say. Raises UserError with the exit code of what went wrong.

    sample: answers prompts; draw: plots the log; explicit: names of the options that the user gave.
    """
    with signals.watch(), hub_session.session():
        start = warm_start.from_lora_path(options, explicit) if options.lora_path else None
        options, weights_print = (start.options, start.fingerprint) if start else (options, None)
        if not finished_before(options, Path(options.output_path), weights_print):
            plan = prepare(options)
            plan.fingerprints |= {STARTING: weights_print} if weights_print else {}
            revisions.compare(start.base if start else None, plan.base_path)
            carry_out(plan, start, sample, draw)


def go_on(request: ContinueConfig, explicit: frozenset[str], sample: Sample, draw: Draw) -> None:
    """Continue a run, or start one from a checkpoint or an adapter (resume.py); otherwise like run."""
    with signals.watch(), hub_session.session():
        start = resume.decide(request, explicit)
        if start is not None:
            carry_out(resume.make_plan(start, request, explicit), start, sample, draw)


def carry_out(plan: Plan, start: StartingPoint | None, sample: Sample, draw: Draw) -> None:
    """Lock the run folder, load the model and train it."""
    folder, strategy = Path(plan.options.output_path), choose(plan.options.max_grad_norm)
    describe(plan)
    strategy.start(torch.device(gpus.torch_name(plan.device)))
    try:
        if not distributed.agree(plan.dtype):
            problem = f"The GPUs of this run have different dtypes: {plan.device} here has {plan.dtype}."
            raise UserError(problem, "Give all processes the same --dtype: fp16, if one GPU has no bf16.")
        if not distributed.agree(json.dumps(plan.fingerprints, sort_keys=True)):
            problem = "The processes of this run do not have the same base model, tokenizer or rows."
            raise UserError(problem, "Give all of them the same files, or owner/name@COMMIT.", CHECKPOINT)
        with _owned(folder) if system_processes.is_main() else contextlib.nullcontext():
            is_new = not (start and start.same_run) and not plan.options.overwrite
            if is_new and (folder / runs_folder.FINISHED).exists():
                problem = f"{folder}: another process has just finished a run there."
                raise UserError(problem, "Give the same command again to see where its result is.")
            trainer = load(plan, folder, strategy, start)
            try:
                with strategy.deferring_signals():
                    train(trainer, sample, draw)
            finally:
                trainer.metrics.close()
    finally:
        strategy.stop()


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Hold the lock of the run folder; raises UserError when another process has it."""
    with contextlib.ExitStack() as stack:
        with errors.remedy(BUSY):
            stack.enter_context(lock.owned(folder))
        yield


def train(trainer: Trainer, sample: Sample, draw: Draw) -> None:
    """Make all steps of a run, with evaluations and checkpoints between them, and publish the adapter."""
    plan, progress, metrics = trainer.plan, trainer.progress, trainer.metrics
    try:
        save(trainer)  # before anything that takes time, so that from here on a killed run can continue
        before = None
        if progress.answers is None:
            before = progress.answers = answers(trainer, sample, plan.data.validation_prompts)
        if samples_are_due(trainer):
            note_answers(trainer, sample, before)
        if evaluation_is_due(trainer):
            evaluate(trainer)
        if progress.step < plan.total_steps and not out_of_memory.dry_run(trainer):
            save(trainer)  # again, with the token budget that fits
        metrics.begin(progress.rows_seen)
        while progress.step < plan.total_steps:
            one_step(trainer)
            improved = evaluate(trainer) if evaluation_is_due(trainer) else False
            if improved or save_is_due(trainer):
                save(trainer)
            if progress.step < plan.total_steps and samples_are_due(trainer):
                note_answers(trainer, sample)
            trainer.strategy.stop_together()
        metrics.end()
        if system_processes.is_main():
            after = answers(trainer, sample, plan.data.validation_prompts)
            if samples_are_due(trainer):
                note_answers(trainer, sample, after)
            finish(trainer, after, draw)
    except Stopped:
        save(trainer)
        metrics.say(
            f"Stopped after step {progress.step}: all of it is saved. "
            f"Continue with: {commands.line('continue')} --output_path {trainer.folder}"
        )
        raise
    distributed.barrier()


def one_step(trainer: Trainer) -> None:
    """Make one optimizer step over batch_size rows, and log it."""
    plan, options, progress = trainer.plan, trainer.plan.options, trainer.progress
    examples, train_rows = plan.data.examples, plan.data.train_rows
    started = time.monotonic()
    indices = data_examples.rows_at(options.seed, progress.rows_seen, options.batch_size, len(train_rows))
    rows = train_rows[indices]
    targets, tokens = int(examples.target_counts[rows].sum()), int(examples.lengths[rows].sum())
    rate = plan.learning_rate(progress.updates)
    for group in trainer.strategy.optimizer.param_groups:
        group["lr"] = rate
    try:
        loss = gradient(trainer, rows, targets)
        with signals.later():  # a signal must not come between an update and its record
            norm, updated = trainer.strategy.update(trainer.scaler, examples.numbers[rows].tolist())
            hardware.release_free_memory(plan.device)
            seconds = time.monotonic() - started
            progress.step += 1
            progress.updates += updated
            progress.rows_seen += len(rows)
            progress.tokens += tokens
            progress.seconds += seconds
            progress.skipped_steps += not updated
            progress.skipped_in_a_row = 0 if updated else progress.skipped_in_a_row + 1
            record = {
                "step": progress.step,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": norm if updated else str(norm),
                "rows": len(rows),
                "tokens": tokens,
                "target_tokens": targets,
                "rows_seen": progress.rows_seen,
                "epoch": progress.rows_seen / len(train_rows),
                "seconds": round(seconds, 4),
                "peak_memory_bytes": hardware.peak_memory_bytes(plan.device),
            }
            if trainer.scaler.is_enabled():
                record |= {
                    "loss_scale": trainer.scaler.get_scale(),
                    "skipped_steps": progress.skipped_steps,
                }
            trainer.metrics.step(record)
    except step.NonFiniteError as error:
        raise stop_non_finite(trainer, error) from None
    if loss == 0:
        trainer.metrics.say(
            f"warning: the loss of step {progress.step} is exactly 0. Check the rows: are the targets right?"
        )
    scale = trainer.scaler.get_scale()
    if progress.skipped_in_a_row >= MOST_SKIPS or (trainer.scaler.is_enabled() and scale < 1):
        problem = f"fp16 overflows: {progress.skipped_in_a_row} steps skipped in a row, loss scale {scale:g}."
        raise UserError(problem, "Use --dtype fp32 or bf16, or a lower --learning_rate.", NON_FINITE)


def gradient(trainer: Trainer, rows: NDArray[np.int64], targets: int) -> float:
    """The loss of these rows, after their gradient was computed; micro-batches get smaller until they fit.

    targets: target tokens of the step, over all processes.
    """
    entropy = [trainer.plan.options.seed, trainer.progress.step, system_processes.rank()]
    while True:
        # the dropout masks are a function of (seed, step, process) and of nothing else
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        packed = on_device(trainer, rows)
        with trainable.without_casts(trainer.model):
            loss = trainer.strategy.gradient(packed, targets, trainer.scaler, trainer.metrics.advance)
        if loss is not None:
            return loss
        out_of_memory.halve_budget(trainer, rows)


def save_is_due(trainer: Trainer) -> bool:
    """Whether to save now: every save_steps, at the end of an epoch and of the run, and every ten minutes."""
    progress, plan = trainer.progress, trainer.plan
    is_regular = progress.step % plan.options.save_steps == 0 or progress.step == plan.total_steps
    epoch_ends = progress.rows_seen % len(plan.data.train_rows) == 0
    is_late = time.monotonic() - trainer.saved > SAVE_SECONDS
    return trainer.strategy.in_any(is_late) or is_regular or epoch_ends


def evaluation_is_due(trainer: Trainer) -> bool:
    """Whether to evaluate now: before the first step, every eval_steps and at the end, once in a step."""
    progress, plan = trainer.progress, trainer.plan
    if not len(plan.data.validation_rows) or progress.evaluated == progress.step:
        return False
    is_regular = progress.step % plan.options.eval_steps == 0 or progress.step == plan.total_steps
    return is_regular or progress.evaluated < 0


def evaluate(trainer: Trainer) -> bool:
    """Log the validation loss and accuracy; returns whether the adapter is the best so far."""
    plan, progress = trainer.plan, trainer.progress
    settings = {"desc": "validation", "unit": "row", "leave": False, "disable": not trainer.metrics.show_bars}
    rows = on_device(trainer, plan.data.validation_rows)
    with (
        tqdm(total=len(plan.data.validation_rows), **settings) as bar,
        trainable.without_casts(trainer.model),
    ):
        loss, accuracy = step.evaluate(trainer.step_model, rows, bar.update)
    hardware.release_free_memory(plan.device)
    if not math.isfinite(loss):
        trainer.metrics.event({"step": progress.step, "eval_loss": str(loss), "stopped": "validation loss"})
        problem = f"Step {progress.step}: the validation loss is {loss}."
        raise UserError(problem, "Lower --learning_rate, or use --dtype fp32 or bf16.", NON_FINITE)
    record = {"step": progress.step, "eval_loss": loss, "eval_token_accuracy": accuracy}
    with signals.later():
        trainer.metrics.evaluation(record)
        progress.evaluated = progress.step
        improved = progress.step > 0 and (progress.best_loss is None or loss < progress.best_loss)
        if improved:
            progress.best_step, progress.best_loss = progress.step, loss
    return improved


def save(trainer: Trainer) -> None:
    """Save a checkpoint of the last finished step, unless there is one."""
    gathered, optimizer = trainer.strategy.gather()
    trainer.saved = time.monotonic()
    if not system_processes.is_main():
        return
    with signals.later():
        # the first update of a warm-up has a learning rate of zero
        was_updated = trainer.progress.updates > (1 if trainer.plan.warmup_steps else 0)
        trainer.metrics.sync()  # so that no checkpoint has steps that the log lacks
        runs_checkpoint.save(
            trainer.folder,
            trainer.progress,
            lambda folder: trainable.save(
                trainer.model, trainer.plan.tokenizer, folder, was_updated, gathered
            ),
            optimizer,
            trainer.scaler,
        )
        runs_checkpoint.prune(
            trainer.folder, trainer.plan.options.save_total_limit, trainer.progress.best_step
        )


def on_device(trainer: Trainer, rows: NDArray[np.int64]) -> Iterator[PackedBatch]:
    """This process's micro-batches of these rows; each is moved to the device when its turn comes."""
    examples, budget = trainer.plan.data.examples, trainer.progress.micro_batch_tokens
    processes = (system_processes.rank(), system_processes.world_size())
    share = micro_batches(examples, rows.tolist(), budget, *processes)
    packed = trainer.strategy.level(share, examples, int(rows[0]))
    return (batch.to(trainer.device) for batch in packed)


def stop_non_finite(trainer: Trainer, problem: step.NonFiniteError) -> UserError:
    """Log the value that is not finite; returns the error that ends the run before the update."""
    number = trainer.progress.step + 1
    key = "loss" if problem.what == "loss" else "grad_norm"
    trainer.metrics.event(
        {"step": number, key: str(problem.value), "stopped": str(problem), "row_numbers": problem.rows}
    )
    row_list = ", ".join(map(str, problem.rows[:20])) + (" ..." if len(problem.rows) > 20 else "")
    where = f"rows {row_list} of {trainer.plan.options.data_path}"
    fix = "Check these rows; try a lower --learning_rate or --dtype fp32. This step has changed nothing."
    return UserError(f"Step {number}: {problem} ({where}).", fix, NON_FINITE)
