"""Answers to the validation prompts during a run; and its result: the adapter, the plot and finished.json.

Everything here can be repeated, so a run that was killed meanwhile continues with it. finished.json is
written last.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from onecard.data import conversation as data_conversation
from onecard.data import template as data_template
from onecard.data.dataset import PRETRAIN
from onecard.errors import CHECKPOINT, UserError, is_out_of_memory
from onecard.hub import model_files
from onecard.models import trainable
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from onecard.runs import log as runs_log
from onecard.system import files as system_files
from onecard.system import hardware, signals
from onecard.system import processes as system_processes
from onecard.system.console import say
from onecard.training.plan import versions
from onecard.training.trainer import Trainer

Draw = Callable[[list[dict[str, Any]], Path], None]
Sample = Callable[[Any, Any, data_template.Template, list[data_conversation.Conversation], int], list[str]]
ANSWER_TOKENS = 128


def answers(trainer: Trainer, sample: Sample, prompts: list[data_conversation.Conversation]) -> list[str]:
    """Answers of the adapter as it is now: none where can_answer is false.

    prompts: conversations; the answer that one may end with is not shown to the model.
    """
    plan = trainer.plan
    if not prompts or not can_answer(trainer):
        return []
    trainer.metrics.say(f"answering {len(prompts)} prompts ...")
    longest = min(ANSWER_TOKENS, plan.options.cutoff_len)
    with trainer.step_model.autocast():
        return sample(trainer.model, plan.tokenizer, plan.template, prompts, longest)


def can_answer(trainer: Trainer) -> bool:
    """Whether this is the main process and has the whole model."""
    return trainer.strategy.has_whole_model and system_processes.is_main()


def samples_are_due(trainer: Trainer) -> bool:
    """Whether to answer now: at the start, every sample_steps and at the end, once in a step."""
    plan, step, every = trainer.plan, trainer.progress.step, trainer.plan.options.sample_steps
    has_prompts = plan.data.validation_prompts or plan.options.sample_prompts
    if not every or not has_prompts or not can_answer(trainer) or trainer.sampled == step:
        return False
    return trainer.sampled < 0 or step % every == 0 or step == plan.total_steps


def note_answers(trainer: Trainer, sample: Sample, validation_answers: list[str] | None = None) -> None:
    """Append answers to the validation prompts and to --sample_prompts to samples.jsonl.

    validation_answers: those of this step, if there are any yet.
    """
    plan, step = trainer.plan, trainer.progress.step
    role = "prompt" if plan.data.task == PRETRAIN else "user"  # raw text has no template
    texts = [text.strip() for text in (plan.options.sample_prompts or "").split("|")]
    own = [data_conversation.Conversation((data_conversation.Turn(role, text),)) for text in texts if text]
    try:
        if validation_answers is None:
            validation_answers = answers(trainer, sample, plan.data.validation_prompts)
        pairs = [*zip(plan.data.validation_prompts, validation_answers, strict=False)]
        pairs += zip(own, answers(trainer, sample, own), strict=False)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        hardware.forget_cached_memory(plan.device)
        trainer.metrics.say(f"warning: there is not enough memory to answer the prompts at step {step}.")
        trainer.sampled = step  # so that it is not tried again at each step
        return
    hardware.release_free_memory(plan.device)
    turns = [(conversation.question.turns[-1], text) for conversation, text in pairs]
    records = [{"instruction": turn.text, "input": turn.input, "answer": text} for turn, text in turns]
    with signals.later():
        trainer.metrics.samples({"step": step, "answers": records})
        trainer.sampled = step


def finish(trainer: Trainer, after: list[str], draw: Draw) -> None:
    """Publish the best adapter, draw the plot, print the answers, and write finished.json last.

    after: answers to the validation prompts after the last step.
    """
    plan, progress, folder = trainer.plan, trainer.progress, trainer.folder
    before = progress.answers or []  # answered before the first step
    best = progress.best_step or progress.step
    try:
        sha256 = runs_checkpoint.publish(folder / f"checkpoint-{best}", folder)
    except UserError as error:
        if best == progress.step or error.code != CHECKPOINT:
            raise
        say(f"warning: {error.problem} It was the best checkpoint; the last one is used instead.")
        best = progress.step
        sha256 = runs_checkpoint.publish(folder / f"checkpoint-{best}", folder)
    records = runs_log.records(folder / runs_folder.LOG)
    draw(records, folder / runs_folder.PLOT)
    questions = [conversation.question.turns[-1] for conversation in plan.data.validation_prompts]
    losses = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    first, last = next(iter(losses.values()), None), losses.get(best)
    system_files.write_json(
        folder / runs_folder.FINISHED,
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
                {"instruction": question.text, "input": question.input, "before": old, "after": new}
                for question, old, new in zip(questions, before, after, strict=False)
            ],
            "versions": versions(),
            "machine": hardware.describe_machine(),
        },
    )
    for question, old, new in zip(questions, before, after, strict=False):
        text = question.text + (f" | {question.input}" if question.input else "")
        say(f"\n? {text}\n  before: {indent(old)}\n  after:  {indent(new)}")
    speed = progress.tokens / progress.seconds
    say(
        f"\n{progress.step} steps, {progress.tokens} tokens, {progress.seconds:.0f} s ({speed:.0f} tokens/s)."
    )
    if first is not None:
        say(f"Validation loss {first:.4f} before, {last:.4f} after (best at step {best}).")
        if last > first:
            say("warning: the validation loss is higher than before training. Try a lower --learning_rate.")
    if plan.options.train_what == trainable.FULL:
        say(f"The model is in {folder / runs_folder.MODEL}; use it as --model_path.")
    else:
        say(f"The adapter is in {folder}: {model_files.ADAPTER_WEIGHTS} and {model_files.ADAPTER_CONFIG}.")
    say(f"The log is {folder / runs_folder.LOG}, and the plot of the loss is {folder / runs_folder.PLOT}.")


def indent(text: str) -> str:
    """The text with its further lines below the first, for the answers that finish prints."""
    return text.replace("\n", "\n          ")
