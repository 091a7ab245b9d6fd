"""Options -> a plan: everything about a run that can be known and checked before weights are loaded.

Nothing is written into the run folder here.
"""

import dataclasses
import importlib.metadata
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from onecard import config, data, fingerprint, hardware, lock, model, parallel, prompt, reader, runfolder
from onecard.config import FinetuneConfig
from onecard.errors import CHECKPOINT, DATA, UserError
from onecard.journal import check_wandb, say

HELD_OUT_PROMPTS = 8
SHORT_RUN = 5  # --warmup_steps takes at most one of this many steps
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "numpy")
LEAST_ROOM = 16 << 20  # bytes on the disk for log, picture and the like


@dataclasses.dataclass
class Plan:
    """All that is known about a run before its weights are loaded."""

    options: FinetuneConfig
    base_path: str  # folder or hub name that transformers loads
    base_config: Any
    tokenizer: Any
    template: prompt.Template
    device: str
    dtype: str
    checkpointing: bool
    examples: data.Examples
    train_rows: np.ndarray  # places in examples
    validation_rows: np.ndarray
    held_out: list[prompt.Conversation]
    encoding: data.Encoding
    fingerprints: dict[str, str]  # what must be the same when the run goes on -> SHA-256
    reasons: dict[str, str]  # of automatic choices
    total_steps: int
    warmup_steps: int

    @property
    def steps_per_epoch(self) -> int:
        return data.steps_per_epoch(len(self.train_rows), self.options.batch_size)

    def rows_after(self, steps: int, rows_seen: int = 0) -> int:
        """Rows seen when `steps` more steps were made; the last step of an epoch may be smaller."""
        count, batch = len(self.train_rows), self.options.batch_size
        epochs, here = divmod(rows_seen, count)
        epochs, steps = divmod(epochs * self.steps_per_epoch + here // batch + steps, self.steps_per_epoch)
        return epochs * count + min(steps * batch, count)


def finished_before(options: FinetuneConfig, folder: Path) -> bool:
    """Whether this very run is finished; raises UserError when the folder holds another or an unfinished."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_path {folder}: this is a file.", "Name a folder.")
    lock.check_free(folder)
    if options.overwrite:
        return False
    ways = "Choose another --output_path, or start anew with --overwrite."
    stored = runfolder.read_json(folder / runfolder.CONFIG)
    if stored is None:
        found = runfolder.contents(folder)
        if found:
            raise UserError(f"{folder} holds {found[0].name}, which this run would write over.", ways)
        return False
    try:
        before = stored["options"]
    except (KeyError, TypeError):
        problem = f"{folder / runfolder.CONFIG}: damaged (no options)."
        raise UserError(problem, ways, CHECKPOINT) from None
    learned = [name for name, role in config.roles(FinetuneConfig).items() if role == config.LEARNED]
    now = dataclasses.asdict(options)
    changed = [
        f"{name} {before.get(name)} -> {now[name]}" for name in learned if before.get(name) != now[name]
    ]
    if changed:
        raise UserError(f"{folder} holds a run with other options: {'; '.join(changed)}.", ways)
    finished = runfolder.read_json(folder / runfolder.FINISHED)
    if finished is None:
        steps = runfolder.checkpoint_steps(folder)
        if not steps and not runfolder.has_log(folder):
            return False  # it stopped before its first step: nothing is lost by starting
        at = f"saved up to step {max(steps)}" if steps else "with nothing saved"
        go_on = f"Continue it: .venv/bin/python finetune_continue.py --output_path {folder}"
        raise UserError(f"{folder} holds an unfinished run, {at}.", f"{go_on} Or: {ways}")
    data_path = Path(options.data_path)
    rows = fingerprint.of_files([data_path])[data_path] if data_path.is_file() else None
    if rows and rows != stored.get("fingerprints", {}).get("rows", rows):
        raise UserError(f"{folder} holds a finished run, and {data_path} has changed since.", ways)
    say_finished(folder, finished)
    return True


def say_finished(folder: Path, finished: dict[str, Any]) -> None:
    """Say that a run is finished, where its adapter is, and the ways on."""
    loss = finished["eval_loss_after"]
    say(
        f"This run is finished: {finished['steps']} steps"
        + (f", validation loss {loss:.4f}." if loss is not None else ".")
    )
    say(f"The adapter is in {folder}, with the log {runfolder.LOG} and the picture loss.png.")
    say("To train it longer: finetune_continue.py with a larger --num_epochs.")
    say("To train it again: --overwrite. To train another: other --output_path, --data_path, --model_path.")


def prepare(
    options: FinetuneConfig,
    locate: Callable[[str], str],
    resolved: dict[str, Any] | None = None,
    again: bool = False,
) -> Plan:
    """Check everything that can be checked before weights are loaded; writes nothing into the run folder.

    resolved: what `auto` became when the run began, taken as it was; again: read all of rows and base anew.
    """
    resolved = resolved or {}
    template = prompt.load_template(options.template)
    if not Path(options.data_path).is_file():
        raise UserError(
            f"--data_path {options.data_path}: no such file.", "Name a JSON or JSONL file of rows.", DATA
        )
    if options.wandb:
        check_wandb()
    device = hardware.choose_device(options.device, parallel.local_rank())
    dtype = _as_before(resolved.get("dtype")) or hardware.choose_dtype(options.dtype, device.value)
    recompute = _as_before(resolved.get("gradient_checkpointing")) or hardware.choose_checkpointing(
        options.gradient_checkpointing, device.value
    )
    hardware.check_optimizer(options.optimizer, device.value)
    runfolder.check_room(Path(options.output_path), LEAST_ROOM)
    base_path = locate(options.model_path)
    base_config = model.load_config(base_path)
    parameters = model.check_architecture(options.model_path, base_config, lora_shape(options))
    # weights and two moments in fp32, for the best and the newest checkpoint and for one being written
    runfolder.check_room(Path(options.output_path), LEAST_ROOM + 3 * 3 * 4 * parameters)
    tokenizer = model.load_tokenizer(base_path)

    encoding = read_examples(options, template, tokenizer)
    examples = encoding.examples
    model.check_window(options.model_path, base_config, int(examples.lengths.max()))
    train_rows, validation_rows = data.split(len(examples), options.test_size, options.seed)
    held_out = reader.pick_rows(
        options.data_path, examples.numbers[validation_rows[:HELD_OUT_PROMPTS]].tolist()
    )
    per_epoch = data.steps_per_epoch(len(train_rows), options.batch_size)
    total_steps = options.max_steps or round_up(options.num_epochs * per_epoch)
    if options.warmup_ratio is None:
        warmup = min(options.warmup_steps, total_steps // SHORT_RUN)
    else:
        warmup = round_up(options.warmup_ratio * total_steps)
    files = model.identity_files(base_path)
    prints = {
        "rows": fingerprint.of_files([Path(options.data_path)], again)[Path(options.data_path)],
        "encoded rows": examples.sha256(),
        "tokenizer": fingerprint.of_folder(files["tokenizer"], again),
        "base model": fingerprint.of_folder(files["weights"], again),
    }
    return Plan(
        options=options,
        base_path=base_path,
        base_config=base_config,
        tokenizer=tokenizer,
        template=template,
        device=device.value,
        dtype=dtype.value,
        checkpointing=recompute.value,
        examples=examples,
        train_rows=train_rows,
        validation_rows=validation_rows,
        held_out=held_out,
        encoding=encoding,
        fingerprints=prints,
        reasons={"device": device.reason, "arithmetic": dtype.reason, "recompute": recompute.reason},
        total_steps=total_steps,
        warmup_steps=warmup,
    )


def _as_before(value: Any) -> hardware.Choice | None:
    return None if value is None else hardware.Choice(value, "as when the run began")


def round_up(number: float) -> int:
    """The next whole number, not taken in by floating point: 0.07 * 100 is 7."""
    return math.ceil(round(number, 6))


def describe(plan: Plan) -> None:
    """Say what was chosen and why, what happened to the rows, and show three of them."""
    options, lengths, reasons, encoding = plan.options, plan.examples.lengths, plan.reasons, plan.encoding
    say(f"device      {plan.device}: {reasons['device']}")
    say(f"arithmetic  {plan.dtype}: {reasons['arithmetic']}; adapter weights and optimizer in fp32")
    say(
        f"base        {options.bits} bits"
        + ("" if options.bits == 16 else " by bitsandbytes, multiplied by frozen products")
    )
    say("attention   one causal call per row of a packed micro-batch: no mask, no padding")
    recompute = "on" if plan.checkpointing else "off"
    say(f"recompute   {recompute} (gradient checkpointing): {reasons['recompute']}")
    say(
        f"rows        {len(plan.train_rows)} to train on, {len(plan.validation_rows)} for validation; "
        f"{int(lengths.sum())} tokens, median row {int(np.median(lengths))}, longest {int(lengths.max())}"
    )
    say(
        f"            {encoding.cut} cut at {options.cutoff_len} tokens (they lose their end token), "
        f"{encoding.dropped} dropped (no target left), {len(encoding.rejected)} rejected"
    )
    say(
        f"steps       {plan.total_steps} of {options.batch_size} rows ({plan.steps_per_epoch} an epoch), "
        f"rate {options.learning_rate:g} {options.lr_scheduler}, warm-up {plan.warmup_steps} steps"
    )
    asked = options.warmup_steps
    if options.warmup_ratio is None and plan.warmup_steps < asked:
        say(f"            a short run: {plan.warmup_steps} warm-up steps, not {asked} (at most a fifth)")
    if options.learning_rate == 0:
        say("warning: --learning_rate is 0, so nothing will be learned.")
    say("\nThree rows as the model sees them; what it learns to say stands between « and »:")
    for row in plan.train_rows[:3]:
        ids, is_target = plan.examples[row]
        say("-" * 60 + "\n" + prompt.show(plan.tokenizer, ids.tolist(), is_target.tolist()))
    say("-" * 60)


def read_examples(options: FinetuneConfig, template: prompt.Template, tokenizer: Any) -> data.Encoding:
    """Encode the rows of --data_path; raises UserError (exit 3) at a bad row or when none is usable."""

    def encode(conversation: prompt.Conversation) -> tuple[list[int], list[bool]]:
        return prompt.encode(conversation, template, tokenizer, options.train_on_inputs)

    rows = reader.read_rows(options.data_path)
    if not options.skip_bad_rows:
        rows = stop_at_bad_row(rows, options.data_path)
    rows = tqdm(rows, desc="reading rows", unit="row", disable=None if parallel.is_main() else True)
    encoding = data.encode_rows(rows, encode, options.cutoff_len)
    if not len(encoding.examples):
        problem = (
            f"{options.data_path}: no usable row: {len(encoding.rejected)} rejected, "
            f"{encoding.dropped} with no target left after the cut at {options.cutoff_len} tokens."
        )
        raise UserError(problem, "Raise --cutoff_len or check the rows.", DATA)
    return encoding


def stop_at_bad_row(rows: Iterator[Any], path: str) -> Iterator[prompt.Conversation]:
    for row in rows:
        if isinstance(row, reader.BadRow):
            raise UserError(
                f"{row.describe(Path(path))}.",
                "Mend the row, or leave bad rows out with --skip_bad_rows.",
                DATA,
            )
        yield row


def learning_rate(options: FinetuneConfig, updates: int, total: int, warmup: int) -> float:
    """Rate of the update that follows `updates` others; the schedules of transformers.get_scheduler."""
    if updates < warmup:
        return options.learning_rate * updates / warmup
    done = (updates - warmup) / max(1, total - warmup)
    shapes = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}
    return options.learning_rate * max(0.0, shapes[options.lr_scheduler])


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def lora_shape(options: FinetuneConfig) -> model.LoraShape:
    return model.LoraShape(
        options.lora_r, options.lora_alpha, options.lora_dropout, options.lora_target_modules
    )
