"""The loop: options -> a run folder with log, checkpoints and the best adapter.

Reads top to bottom: plan, load, then one optimizer step after the other (step.py), then the finished
adapter. Fetching models, answering prompts and drawing are other verbs' work and are passed in.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from onecard import checkpoint, data, hardware, model, parallel, prompt, step
from onecard.batching import PackedBatch, micro_batches
from onecard.config import FinetuneConfig
from onecard.errors import NON_FINITE, UserError
from onecard.journal import say
from onecard.plan import finished_before, prepare
from onecard.trainer import Trainer, load, versions

Locate = Callable[[str], str]
Sample = Callable[[Any, Any, prompt.Template, list[prompt.Conversation], int], list[str]]
Draw = Callable[[list[dict[str, Any]], Path], None]
ANSWER_TOKENS = 128
MOST_SKIPS = 20  # steps in a row that the fp16 scaler may skip


def run(options: FinetuneConfig, locate: Locate, sample: Sample, draw: Draw) -> None:
    """Fine-tune as the options say; raises UserError with the exit code of what went wrong.

    locate: model name -> folder or hub name; sample: answers prompts; draw: log records -> picture.
    """
    folder = Path(options.output_path)
    if finished_before(options, folder):
        return
    plan = prepare(options, locate)
    parallel.start(torch.device(plan.device))
    try:
        trainer = load(plan, folder)
        try:
            train(trainer, sample, draw)
        finally:
            trainer.journal.close()
    finally:
        parallel.stop()


def train(trainer: Trainer, sample: Sample, draw: Draw) -> None:
    """All steps of a run, evaluations and checkpoints between them, and the finished adapter."""
    plan, options, progress, journal = trainer.plan, trainer.plan.options, trainer.progress, trainer.journal
    before = answers(trainer, sample)
    if len(plan.validation_rows):
        evaluate(trainer)
    journal.begin()
    while progress.step < plan.total_steps:
        one_step(trainer)
        last = progress.step == plan.total_steps
        if len(plan.validation_rows) and (last or progress.step % options.eval_steps == 0):
            improved = evaluate(trainer)
        else:
            improved = False
        if improved or last or progress.step % options.save_steps == 0:
            save(trainer)
    journal.end()
    if parallel.is_main():
        finish(trainer, before, answers(trainer, sample), draw)
    parallel.barrier()


def one_step(trainer: Trainer) -> None:
    """One optimizer step over batch_size rows and its line in the log."""
    plan, options, progress = trainer.plan, trainer.plan.options, trainer.progress
    started = time.monotonic()
    places = data.rows_at(options.seed, progress.rows_seen, options.batch_size, len(plan.train_rows))
    rows = plan.train_rows[places]
    targets = int(plan.examples.target_counts[rows].sum())
    rate = learning_rate(options, progress.updates, plan.total_steps, plan.warmup_steps)
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate
    # dropout's randomness is a function of (seed, step, process), so nothing else can disturb it
    torch.manual_seed(
        int(np.random.SeedSequence([options.seed, progress.step, parallel.rank()]).generate_state(1)[0])
    )
    packed = on_device(trainer, rows)
    try:
        with model.without_casts(trainer.model):
            result = step.optimizer_step(
                trainer.step_model,
                packed,
                targets,
                trainer.optimizer,
                trainer.scaler,
                options.max_grad_norm,
                trainer.journal.advance,
            )
    except step.NonFiniteError as problem:
        raise stop_non_finite(trainer, problem) from None

    hardware.release_free_memory(plan.device)
    seconds = time.monotonic() - started
    progress.step += 1
    progress.updates += result.updated
    progress.rows_seen += len(rows)
    progress.tokens += int(plan.examples.lengths[rows].sum())
    progress.seconds += seconds
    progress.skipped_steps += not result.updated
    progress.skipped_in_a_row = 0 if result.updated else progress.skipped_in_a_row + 1
    record = {
        "step": progress.step,
        "loss": result.loss,
        "learning_rate": rate,
        "grad_norm": result.grad_norm if result.updated else str(result.grad_norm),
        "rows": len(rows),
        "tokens": int(plan.examples.lengths[rows].sum()),
        "target_tokens": targets,
        "rows_seen": progress.rows_seen,
        "epoch": progress.rows_seen / len(plan.train_rows),
        "seconds": round(seconds, 4),
        "peak_memory_bytes": hardware.peak_memory_bytes(plan.device),
    }
    if trainer.scaler.is_enabled():
        record |= {"loss_scale": trainer.scaler.get_scale(), "skipped_steps": progress.skipped_steps}
    trainer.journal.step(record)
    if result.loss == 0:
        trainer.journal.say(f"warning: the loss of step {progress.step} is exactly 0; are the targets right?")
    scale = trainer.scaler.get_scale()
    if progress.skipped_in_a_row >= MOST_SKIPS or (trainer.scaler.is_enabled() and scale < 1):
        problem = f"fp16 overflows: {progress.skipped_in_a_row} steps skipped in a row, loss scale {scale:g}."
        raise UserError(problem, "Use --dtype fp32 or bf16, or a lower --learning_rate.", NON_FINITE)


def learning_rate(options: FinetuneConfig, updates: int, total: int, warmup: int) -> float:
    """Rate of the update that follows `updates` others; the schedules of transformers.get_scheduler."""
    if updates < warmup:
        return options.learning_rate * updates / warmup
    done = (updates - warmup) / max(1, total - warmup)
    shapes = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}
    return options.learning_rate * max(0.0, shapes[options.lr_scheduler])


def evaluate(trainer: Trainer) -> bool:
    """Validation loss and accuracy into the log; whether the adapter is the best so far."""
    plan, progress = trainer.plan, trainer.progress
    with tqdm(
        total=len(plan.validation_rows),
        desc="validation",
        unit="row",
        leave=False,
        disable=not trainer.journal.show_bars,
    ) as bar:
        rows = on_device(trainer, plan.validation_rows)
        with model.without_casts(trainer.model):
            loss, accuracy = step.evaluate(trainer.step_model, rows, bar.update)
    hardware.release_free_memory(plan.device)
    if not math.isfinite(loss):
        trainer.journal.event({"step": progress.step, "eval_loss": str(loss), "stopped": "validation loss"})
        problem = f"Step {progress.step}: the validation loss is {loss}."
        raise UserError(problem, "Lower --learning_rate, or use --dtype fp32 or bf16.", NON_FINITE)
    trainer.journal.evaluation({"step": progress.step, "eval_loss": loss, "eval_token_accuracy": accuracy})
    improved = progress.step > 0 and (progress.best_loss is None or loss < progress.best_loss)
    if improved:
        progress.best_step, progress.best_loss = progress.step, loss
    return improved


def save(trainer: Trainer) -> None:
    if parallel.is_main():
        # the first update of a warm-up has a rate of zero
        was_updated = trainer.progress.updates > (1 if trainer.plan.warmup_steps else 0)
        checkpoint.save(
            trainer.folder,
            trainer.progress,
            lambda folder: model.save_adapter(trainer.model, folder, was_updated),
            trainer.optimizer,
            trainer.scaler,
        )
        checkpoint.prune(trainer.folder, trainer.plan.options.save_total_limit, trainer.progress.best_step)
    parallel.barrier()


def finish(trainer: Trainer, before: list[str], after: list[str], draw: Draw) -> None:
    """The best adapter, the picture, the answers, and finished.json last."""
    plan, progress, folder = trainer.plan, trainer.progress, trainer.folder
    best = progress.best_step or progress.step
    sha256 = checkpoint.publish(folder / f"checkpoint-{best}", folder)
    records = [
        json.loads(line) for line in (folder / checkpoint.LOG).read_text(encoding="utf-8").splitlines()
    ]
    draw(records, folder / checkpoint.PICTURE)
    evaluations = [record for record in records if "eval_loss" in record]
    first = evaluations[0]["eval_loss"] if evaluations else None
    checkpoint.write_json(
        folder / checkpoint.FINISHED,
        {
            "steps": progress.step,
            "best_step": best,
            "eval_loss_before": first,
            "eval_loss_after": progress.best_loss,
            "tokens": progress.tokens,
            "training_seconds": round(progress.seconds, 2),
            "tokens_per_second": round(progress.tokens / progress.seconds, 1),
            "peak_memory_bytes": hardware.peak_memory_bytes(plan.device),
            "skipped_steps": progress.skipped_steps,
            "adapter_sha256": sha256,
            "data_sha256": plan.data_record["sha256"],
            "answers": [
                {"instruction": question.instruction, "input": question.input, "before": old, "after": new}
                for question, old, new in zip(plan.held_out, before, after, strict=False)
            ],
            "versions": versions(),
            "machine": hardware.describe_machine(),
        },
    )
    for question, old, new in zip(plan.held_out, before, after, strict=False):
        asked = question.instruction + (f" | {question.input}" if question.input else "")
        say(f"\n? {asked}\n  before: {indent(old)}\n  after:  {indent(new)}")
    speed = progress.tokens / progress.seconds
    say(
        f"\n{progress.step} steps, {progress.tokens} tokens, {progress.seconds:.0f} s ({speed:.0f} tokens/s)."
    )
    if first is not None:
        say(f"Validation loss {first:.4f} before, {progress.best_loss:.4f} after (best at step {best}).")
        if progress.best_loss > first:
            say("warning: the validation loss is higher than before training. Try a lower --learning_rate.")
    say(f"The adapter lies in {folder}: {checkpoint.ADAPTER_WEIGHTS} and {checkpoint.ADAPTER_CONFIG}.")
    say(f"Its log is {folder / checkpoint.LOG}, its picture {folder / 'loss.png'}.")


def answers(trainer: Trainer, sample: Sample) -> list[str]:
    """Answers to the held-out prompts with the adapter as it is; empty without validation rows."""
    plan = trainer.plan
    if not plan.held_out or not parallel.is_main():
        return []
    trainer.journal.say(f"answering {len(plan.held_out)} held-out prompts ...")
    return sample(
        trainer.model,
        plan.tokenizer,
        plan.template,
        plan.held_out,
        min(ANSWER_TOKENS, plan.options.cutoff_len),
    )


def on_device(trainer: Trainer, rows: np.ndarray) -> list[PackedBatch]:
    """This process's micro-batches of these rows."""
    packed = micro_batches(
        trainer.plan.examples, rows.tolist(), trainer.budget, parallel.rank(), parallel.world_size()
    )
    return [batch.to(torch.device(trainer.plan.device)) for batch in packed]


def stop_non_finite(trainer: Trainer, problem: step.NonFiniteError) -> UserError:
    """Log the raw value; the error that ends the run before the update."""
    at = trainer.progress.step + 1
    key = "loss" if problem.what == "loss" else "grad_norm"
    trainer.journal.event(
        {"step": at, key: str(problem.value), "stopped": str(problem), "row_numbers": problem.rows}
    )
    shown = ", ".join(map(str, problem.rows[:20])) + (" ..." if len(problem.rows) > 20 else "")
    where = f"rows {shown} of {trainer.plan.options.data_path}"
    fix = "Look at these rows; try a lower --learning_rate or --dtype fp32. Nothing was updated with it."
    return UserError(f"Step {at}: {problem} ({where}).", fix, NON_FINITE)


def indent(text: str) -> str:
    return text.replace("\n", "\n          ")
