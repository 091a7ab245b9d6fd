"""Options -> a plan: everything about a run that can be known and checked before weights are loaded.

Nothing is written into the run folder here.
"""

import dataclasses
import importlib.metadata
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from onecard import (
    adapter,
    config,
    data,
    fingerprint,
    hardware,
    lock,
    model,
    parallel,
    prompt,
    quantised,
    reader,
    remote_code,
    rows,
    runfolder,
    sharded,
    template,
    weights,
)
from onecard.config import FinetuneConfig
from onecard.errors import CHECKPOINT, DATA, UserError
from onecard.journal import check_wandb, say

HELD_OUT_PROMPTS = 8
STARTING = "starting adapter"  # a fingerprint
SHORT_RUN = 5  # --warmup_steps takes at most one of this many steps
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "numpy")
LEAST_ROOM = 16 << 20  # bytes on the disk for log, picture and the like


@dataclasses.dataclass
class Plan:
    """All that is known about a run before its weights are loaded."""

    options: FinetuneConfig
    base_path: str  # folder that transformers loads
    base_config: Any
    tokenizer: Any
    template: prompt.Template  # of several the first, which asks the held-out prompts
    device: str
    dtype: str
    checkpointing: bool
    examples: data.Examples
    sources: list[reader.Source]
    task: str  # sft or pretrain
    train_rows: np.ndarray  # places in examples; as often as its weight in an epoch
    validation_rows: np.ndarray
    overlapping: int  # validation rows that are training rows too
    held_out: list[prompt.Conversation]
    encoding: data.Encoding
    fingerprints: dict[str, str]  # what must be the same when the run goes on -> SHA-256
    reasons: dict[str, str]  # of automatic choices
    total_steps: int
    warmup_steps: int
    code: remote_code.Consent | None = None  # to run Python code of the base's own

    @property
    def steps_per_epoch(self) -> int:
        return data.steps_per_epoch(len(self.train_rows), self.options.batch_size)

    def rows_after(self, steps: int, rows_seen: int = 0) -> int:
        """Rows seen when `steps` more steps were made; the last step of an epoch may be smaller."""
        count, batch = len(self.train_rows), self.options.batch_size
        epochs, here = divmod(rows_seen, count)
        epochs, steps = divmod(epochs * self.steps_per_epoch + here // batch + steps, self.steps_per_epoch)
        return epochs * count + min(steps * batch, count)


def finished_before(options: FinetuneConfig, folder: Path, weights_print: str | None = None) -> bool:
    """Whether this very run is finished; raises UserError when the folder holds another or an unfinished.

    weights_print: fingerprint of the weights of --lora_path.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_path {folder}: this is a file.", "Name a folder.")
    lock.check_free(folder)
    whole = options.train_what == weights.FULL
    if whole and (folder / runfolder.MODEL).exists() and not runfolder.trained_all(folder):
        problem = f"{folder} holds {runfolder.MODEL}/, which did not come from a run."
        raise UserError(problem, "Choose another --output_path.")
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
        before = {**dataclasses.asdict(FinetuneConfig()), **stored["options"]}  # options that came later
    except (KeyError, TypeError):
        problem = f"{folder / runfolder.CONFIG}: damaged (no options)."
        raise UserError(problem, ways, CHECKPOINT) from None
    learned = [name for name, role in config.roles(FinetuneConfig).items() if role == config.LEARNED]
    now = dataclasses.asdict(options)
    changed = [f"{name} {before[name]} -> {now[name]}" for name in learned if before[name] != now[name]]
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
    prints = stored.get("fingerprints", {})
    if weights_print and prints.get(STARTING, weights_print) != weights_print:
        raise UserError(f"{folder} holds a finished run, and {options.lora_path} has changed since.", ways)
    before_rows = prints.get("rows")
    if before_rows and before_rows != _rows_now(options, before_rows):
        problem = f"{folder} holds a finished run, and {options.data_path} has changed since."
        raise UserError(problem, ways)
    say_finished(folder, finished)
    return True


def _rows_now(options: FinetuneConfig, before: str) -> str:
    """The fingerprint of the rows as they are; rows that are gone have not changed."""
    try:
        return rows.fingerprint_of(reader.sources(options.data_path, options.eval_data_path))
    except UserError:
        return before


def say_finished(folder: Path, finished: dict[str, Any]) -> None:
    """Say that a run is finished, where its adapter is, and the ways on."""
    loss = finished["eval_loss_after"]
    say(
        f"This run is finished: {finished['steps']} steps"
        + (f", validation loss {loss:.4f}." if loss is not None else ".")
    )
    say(f"What was trained is in {folder}, with the log {runfolder.LOG} and the picture loss.png.")
    say("To train it longer: finetune_continue.py with a larger --num_epochs.")
    say("To train it again: --overwrite. To train another: other --output_path, --data_path, --model_path.")


def prepare(
    options: FinetuneConfig,
    locate: Callable[[str], str],
    fetch_data: reader.Fetch | None = None,
    resolved: dict[str, Any] | None = None,
    again: bool = False,
) -> Plan:
    """Check everything that can be checked before weights are loaded; writes nothing into the run folder.

    locate, fetch_data: name of a model, of a dataset on the hub -> folder; resolved: what `auto` became when
    the run began, taken as it was; again: read all of rows and base anew.
    """
    resolved = resolved or {}
    if options.train_what == weights.FULL and options.bits != 16:
        problem = f"--train_what full: weights of {options.bits} bits cannot be trained."
        raise UserError(problem, "Add --bits 16, or train an adapter: --train_what lora.")
    if options.overlap >= options.cutoff_len:
        raise UserError(
            f"--overlap {options.overlap}: must be below --cutoff_len {options.cutoff_len}.", "Lower it."
        )
    names = [name.strip() for name in options.template.split(",")]
    for name in names:
        template.check(name)
    sources = reader.sources(options.data_path, options.eval_data_path, fetch_data)
    if options.wandb:
        check_wandb()
    device = hardware.choose_device(options.device, parallel.local_rank())
    dtype = _as_before(resolved.get("dtype")) or hardware.choose_dtype(options.dtype, device.value)
    recompute = _as_before(resolved.get("gradient_checkpointing")) or hardware.choose_checkpointing(
        options.gradient_checkpointing, device.value
    )
    hardware.check_optimizer(options.optimizer, device.value)
    sharded.check(options, dtype.value)
    runfolder.check_room(Path(options.output_path), LEAST_ROOM)
    base_path = remote_code.place(options.model_path, options.remote_code, locate, say)
    code = _ask(options, base_path)
    base_path = str(code.folder) if code else base_path
    base_config = model.load_config(base_path, code)
    check_quantised(options, base_config)
    parameters = model.check_architecture(options.model_path, base_config, lora_shape(options), code)
    # weights and two moments in fp32, for the best and the newest checkpoint and for one being written
    runfolder.check_room(Path(options.output_path), LEAST_ROOM + 3 * 3 * 4 * parameters)
    tokenizer = model.load_tokenizer(base_path, code)

    templates = [template.load(name, tokenizer) for name in names]
    files = model.identity_files(base_path)
    tokenizer_print = fingerprint.of_folder(files["tokenizer"], again)
    found = rows.encode(options, sources, templates, tokenizer, tokenizer_print, again)
    examples = found.encoding.examples
    doubt = model.check_vocabulary(options.model_path, base_config, tokenizer, examples.ids)
    if doubt:
        say(f"warning: {doubt}; the tokenizer's is trained.")
    model.check_window(options.model_path, base_config, int(examples.lengths.max()))
    train_rows, validation_rows = _split(options, found)
    is_double = np.isin(examples.hashes[validation_rows], examples.hashes[train_rows])
    asked = validation_rows[:HELD_OUT_PROMPTS] if found.task == rows.SFT else validation_rows[:0]
    held_out = rows.picked(found, asked, options.schema)
    per_epoch = data.steps_per_epoch(len(train_rows), options.batch_size)
    total_steps = options.max_steps or round_up(options.num_epochs * per_epoch)
    if options.warmup_ratio is None:
        warmup = min(options.warmup_steps, total_steps // SHORT_RUN)
    else:
        warmup = round_up(options.warmup_ratio * total_steps)
    prints = {
        "rows": found.fingerprint,
        "encoded rows": found.encoding.sha256,
        "tokenizer": tokenizer_print,
        "base model": fingerprint.of_folder(files["weights"], again),
    }
    if options.peft_config:
        prints["adapter settings"] = fingerprint.of_file(Path(options.peft_config))
    if code:
        prints[remote_code.PRINT] = code.commit
    return Plan(
        options=options,
        base_path=base_path,
        base_config=base_config,
        tokenizer=tokenizer,
        template=templates[0],
        device=device.value,
        dtype=dtype.value,
        checkpointing=recompute.value,
        examples=examples,
        sources=sources,
        task=found.task,
        train_rows=train_rows,
        validation_rows=validation_rows,
        overlapping=int(is_double.sum()),
        held_out=held_out,
        encoding=found.encoding,
        fingerprints=prints,
        reasons={"device": device.reason, "arithmetic": dtype.reason, "recompute": recompute.reason},
        total_steps=total_steps,
        warmup_steps=warmup,
        code=code,
    )


def _ask(options: FinetuneConfig, base_path: str) -> remote_code.Consent | None:
    """The consent to run code of the base's own; raises UserError when it does not cover what is there."""
    if options.remote_code and options.train_what == weights.FULL:
        problem = "--train_what full: what a model with code of its own becomes could not be loaded again."
        raise UserError(problem, "Train an adapter: --train_what lora.")
    return remote_code.ask(base_path, options.remote_code, say)


def check_quantised(options: FinetuneConfig, base_config: Any) -> None:
    """Raise UserError for what cannot be trained of weights that come quantised."""
    kind = quantised.method(base_config)
    if kind and options.train_what == weights.FULL:
        problem = f"--train_what full: the {kind} weights of {options.model_path} cannot be trained."
        raise UserError(problem, "Train an adapter: --train_what lora; or take the model in 16 bits.")
    if kind and sharded.wanted():
        problem = f"--model_path {options.model_path}: {kind} weights cannot be spread over processes."
        raise UserError(problem, "Use torchrun: each card then holds the whole base.")


def _split(options: FinetuneConfig, found: rows.Rows) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) places: from files of their own, or by --test_size; weights are training's."""
    apart = found.for_validation
    ours, validation = np.flatnonzero(~apart), np.flatnonzero(apart)
    if not options.eval_data_path:
        chosen, held = data.split(len(ours), options.test_size, options.seed)
        ours, validation = ours[chosen], ours[held]
    elif not len(ours) or not len(validation):
        which = "--eval_data_path" if len(ours) else "--data_path"
        raise UserError(f"{which}: no usable row is in it.", "Raise --cutoff_len or check the rows.", DATA)
    training = data.repeated(ours, found.weights[ours], options.seed)
    if not len(training):
        raise UserError(f"--data_path {options.data_path}: no row is left.", "Raise the weights.", DATA)
    return training, validation


def _as_before(value: Any) -> hardware.Choice | None:
    return None if value is None else hardware.Choice(value, "as when the run began")


def round_up(number: float) -> int:
    """The next whole number, not taken in by floating point: 0.07 * 100 is 7."""
    return math.ceil(round(number, 6))


def learning_rate(options: FinetuneConfig, updates: int, total: int, warmup: int) -> float:
    """Rate of the update that follows `updates` others; the schedules of transformers.get_scheduler."""
    if updates < warmup:
        return options.learning_rate * updates / warmup
    done = (updates - warmup) / max(1, total - warmup)
    shapes = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}
    return options.learning_rate * max(0.0, shapes[options.lr_scheduler])


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def lora_shape(options: FinetuneConfig) -> adapter.LoraShape:
    return adapter.LoraShape(
        options.lora_r,
        options.lora_alpha,
        options.lora_dropout,
        options.lora_target_modules,
        adapter.read_extras(options.peft_config, options.rslora),
        options.train_what,
    )
