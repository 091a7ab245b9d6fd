"""Answers to fixed prompts on the way, and the published result: adapter, plot, finished.json last.

Everything here can be done again: a run that was killed on the way goes on with it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onecard.data import conversation as data_conversation
from onecard.data import template as templates
from onecard.data.dataset import PRETRAIN
from onecard.errors import CHECKPOINT, UserError, is_out_of_memory
from onecard.hub import model_files
from onecard.models import trainable
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as run_folder
from onecard.system import files as system_files
from onecard.system import hardware, signals
from onecard.system import processes as system_processes
from onecard.system.console import say
from onecard.training.plan import versions
from onecard.training.trainer import Trainer

Draw = Callable[[list[dict[str, Any]], Path], None]
Sample = Callable[[Any, Any, templates.Template, list[data_conversation.Conversation], int], list[str]]
ANSWER_TOKENS = 128


def answers(trainer: Trainer, sample: Sample, asked: list[data_conversation.Conversation]) -> list[str]:
    """Answers with the adapter as it is; empty without prompts, or when no process has the whole model."""
    plan = trainer.plan
    if not asked or not can_answer(trainer):
        return []
    trainer.journal.say(f"answering prompts: {len(asked)} ...")
    longest = min(ANSWER_TOKENS, plan.options.cutoff_len)
    with trainer.step_model.arithmetic():
        return sample(trainer.model, plan.tokenizer, plan.template, asked, longest)


def can_answer(trainer: Trainer) -> bool:
    """Whether this process has the whole model and writes what it answers."""
    return trainer.strategy.has_whole_model and system_processes.is_main()


def samples_are_due(trainer: Trainer) -> bool:
    """At the start, every sample_steps and at the end, once per step; only where answers() gives some."""
    plan, step, every = trainer.plan, trainer.progress.step, trainer.plan.options.sample_steps
    asked = plan.data.validation_prompts or plan.options.sample_prompts
    if not every or not asked or not can_answer(trainer) or trainer.sampled == step:
        return False
    return trainer.sampled < 0 or step % every == 0 or step == plan.total_steps


def note_answers(trainer: Trainer, sample: Sample, held_out: list[str] | None = None) -> None:
    """Answers to the fixed prompts into samples.jsonl; held_out: those given at this step already."""
    plan, step = trainer.plan, trainer.progress.step
    role = "prompt" if plan.data.task == PRETRAIN else "user"  # after raw text no template
    texts = [text.strip() for text in (plan.options.sample_prompts or "").split("|")]
    own = [data_conversation.Conversation((data_conversation.Turn(role, text),)) for text in texts if text]
    try:
        given = answers(trainer, sample, plan.data.validation_prompts) if held_out is None else held_out
        pairs = [*zip(plan.data.validation_prompts, given, strict=False)]
        pairs += zip(own, answers(trainer, sample, own), strict=False)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        hardware.forget_cached_memory(plan.device)
        trainer.journal.say(f"warning: not enough memory for the answers at step {step}.")
        trainer.sampled = step  # not again at each step
        return
    hardware.release_free_memory(plan.device)
    turns = [(conversation.question.turns[-1], text) for conversation, text in pairs]
    made = [{"instruction": turn.text, "input": turn.input, "answer": text} for turn, text in turns]
    with signals.later():
        trainer.journal.samples({"step": step, "answers": made})
        trainer.sampled = step


def finish(trainer: Trainer, after: list[str], draw: Draw) -> None:
    """The best adapter, the picture, the answers, and finished.json last."""
    plan, progress, folder = trainer.plan, trainer.progress, trainer.folder
    before = progress.answers or []  # asked before the first step
    best = progress.best_step or progress.step
    try:
        sha256 = runs_checkpoint.publish(folder / f"checkpoint-{best}", folder)
    except UserError as error:
        if best == progress.step or error.code != CHECKPOINT:
            raise
        say(f"warning: {error.problem} It was the best; the last one is taken instead.")
        best = progress.step
        sha256 = runs_checkpoint.publish(folder / f"checkpoint-{best}", folder)
    records = [
        json.loads(line) for line in (folder / run_folder.LOG).read_text(encoding="utf-8").splitlines()
    ]
    draw(records, folder / run_folder.PICTURE)
    questions = [conversation.question.turns[-1] for conversation in plan.data.validation_prompts]
    losses = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    first, last = next(iter(losses.values()), None), losses.get(best)
    system_files.write_json(
        folder / run_folder.FINISHED,
        {
            "steps": progress.step,
            "best_step": best,
            "eval_loss_before": first,
            "eval_loss_after": last,
            "tokens": progress.tokens,
            "training_seconds": round(progress.seconds, 2),
            "tokens_per_second": round(progress.tokens / progress.seconds, 1),
            "peak_memory_bytes": hardware.peak_memory_bytes(plan.device),
            "skipped_steps": progress.skipped_steps,
            "adapter_sha256": sha256,
            "data_sha256": plan.fingerprints["rows"],
            "answers": [
                {"instruction": asked.text, "input": asked.input, "before": old, "after": new}
                for asked, old, new in zip(questions, before, after, strict=False)
            ],
            "versions": versions(),
            "machine": hardware.describe_machine(),
        },
    )
    for asked, old, new in zip(questions, before, after, strict=False):
        question = asked.text + (f" | {asked.input}" if asked.input else "")
        say(f"\n? {question}\n  before: {indent(old)}\n  after:  {indent(new)}")
    speed = progress.tokens / progress.seconds
    say(
        f"\n{progress.step} steps, {progress.tokens} tokens, {progress.seconds:.0f} s ({speed:.0f} tokens/s)."
    )
    if first is not None:
        say(f"Validation loss {first:.4f} before, {last:.4f} after (best at step {best}).")
        if last > first:
            say("warning: the validation loss is higher than before training. Try a lower --learning_rate.")
    if plan.options.train_what == trainable.FULL:
        say(f"The model lies in {folder / run_folder.MODEL}; use it as --model_path.")
    else:
        say(f"The adapter lies in {folder}: {model_files.ADAPTER_WEIGHTS} and {model_files.ADAPTER_CONFIG}.")
    say(f"Its log is {folder / run_folder.LOG}, its picture {folder / 'loss.png'}.")


def indent(text: str) -> str:
    return text.replace("\n", "\n          ")
