"""The plan of a run: everything about it that can be known and checked before weights are loaded.

prepare makes the plan and writes nothing into the run folder. describe prints it with the reason of each
automatic choice.
"""

import dataclasses
import importlib.metadata
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onecard import errors
from onecard.config import declaration
from onecard.config import options as config_options
from onecard.config.training import FinetuneConfig
from onecard.config.training_adapter import LORA
from onecard.data import dataset, markers, reader, run_data
from onecard.data import encode as data_encode
from onecard.data import examples as data_examples
from onecard.data import template as data_template
from onecard.data.run_data import RunData
from onecard.errors import UserError
from onecard.hub import remote_code
from onecard.models import base_model, lora_shape, quantized, trainable
from onecard.models import tokenizer as models_tokenizer
from onecard.models.lora_shape import LoraShape
from onecard.system import files as system_files
from onecard.system import hardware, hashing, openmp
from onecard.system import processes as system_processes
from onecard.system.console import say
from onecard.training import sharded, wandb_run
from onecard.training.recorded_names import NEW_NAMES, Names
from onecard.training.schedule import Anchor, learning_rate

SHORT_RUN = 5  # the warm-up takes at most one of this many steps
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "numpy")
LEAST_ROOM = 16 << 20  # bytes on the disk for the log, the plot and the like


@dataclasses.dataclass
class Plan:
    """All that is known about a run before its weights are loaded."""

    options: FinetuneConfig
    base_path: str  # folder that transformers loads
    base_config: Any
    tokenizer: Any
    template: data_template.Template  # the first of several; the validation prompts are written in it
    device: str
    dtype: str
    checkpointing: bool
    shape: LoraShape
    data: RunData
    fingerprints: dict[str, str]  # SHA-256 of what must be the same when the run continues
    reasons: dict[str, str]  # why device, dtype and checkpointing are as they are
    total_steps: int
    warmup_steps: int
    anchor: Anchor | None = None  # where the schedule was stretched, in a run that began from another one
    code: remote_code.TrustedCode | None = None  # the user's consent to run Python code of the base model

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last one may be smaller."""
        return data_examples.steps_per_epoch(len(self.data.train_rows), self.options.batch_size)

    def learning_rate(self, updates: int) -> float:
        """Learning rate of the update after `updates` others."""
        return learning_rate(self.options, updates, self.total_steps, self.warmup_steps, self.anchor)

    def rows_after(self, steps: int, rows_seen: int = 0) -> int:
        """Rows seen after `steps` more steps; the last step of an epoch may be smaller."""
        count, batch = len(self.data.train_rows), self.options.batch_size
        epochs, rows = divmod(rows_seen, count)
        epochs, steps = divmod(epochs * self.steps_per_epoch + rows // batch + steps, self.steps_per_epoch)
        return epochs * count + min(steps * batch, count)


def prepare(
    options: FinetuneConfig,
    hub_names: Names = NEW_NAMES,
    resolved: dict[str, Any] | None = None,
    again: bool = False,
) -> Plan:
    """Check everything that can be checked before weights are loaded. Writes nothing into the run folder.

    hub_names: the folders that names on the hub mean in this run; resolved: what `auto` became when the run
    began, to be used again; again: read rows and base in full, even where sizes and times are as they were.
    Raises UserError with the exit code of what is wrong.
    """
    _check_options(options)
    files_of_rows = [
        *reader.locate_files(options.data_path, hub_names.rows),
        *reader.locate_validation_files(options.eval_data_path, hub_names.rows),
    ]
    if options.wandb:
        wandb_run.check()
    device, dtype, checkpointing = _choices(options, resolved or {})
    sharded.check(options, dtype.value)
    system_files.check_room(Path(options.output_path), LEAST_ROOM)

    base_path, code = _base(options, hub_names)
    base_config = base_model.load_config(base_path, code)
    check_quantised(options, base_config)
    shape = LoraShape.of(options)
    parameters = base_model.check_architecture(options.model_path, base_config, shape, code)
    # weights and two moments in fp32, for three checkpoints: the best, the newest, one that is being written
    system_files.check_room(Path(options.output_path), LEAST_ROOM + 3 * 3 * 4 * parameters)
    tokenizer = models_tokenizer.load_tokenizer(base_path, code)

    base_model.fetch_weights(base_path)
    files = base_model.identity_files(base_path)
    tokenizer_print = hashing.of_folder(files["tokenizer"], again)
    templates = [data_template.load(name, tokenizer) for name in _templates(options)]
    tokenizer = data_template.tokenizer_for(tokenizer, *templates)
    data = run_data.prepare(options, files_of_rows, templates, tokenizer, tokenizer_print, again)
    doubt = models_tokenizer.check_vocabulary(options.model_path, base_config, tokenizer, data.examples.ids)
    if doubt:
        say(f"warning: {doubt}; the model learns the one of the tokenizer.")
    base_model.check_window(options.model_path, base_config, int(data.examples.lengths.max()))
    total_steps, warmup_steps = _steps(options, len(data.train_rows))
    weights_print = hashing.of_folder(files["weights"], again)
    return Plan(
        options=options,
        base_path=base_path,
        base_config=base_config,
        tokenizer=tokenizer,
        template=templates[0],
        device=device.value,
        dtype=dtype.value,
        checkpointing=checkpointing.value,
        shape=shape,
        data=data,
        fingerprints=_fingerprints(options, data, tokenizer_print, weights_print, code),
        reasons={"device": device.reason, "dtype": dtype.reason, "checkpointing": checkpointing.reason},
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        code=code,
    )


def _check_options(options: FinetuneConfig) -> None:
    """Raise UserError for options that exclude each other."""
    if options.train_what == trainable.FULL and options.bits != 16:
        problem = f"--train_what full: weights of {options.bits} bits cannot be trained."
        raise UserError(problem, "Add --bits 16, or train an adapter: --train_what lora.")
    if options.overlap >= options.cutoff_len:
        problem = f"--overlap {options.overlap} must be less than --cutoff_len {options.cutoff_len}."
        raise UserError(problem, "Use a smaller --overlap.")
    for name in _templates(options):
        data_template.check(name)


def _templates(options: FinetuneConfig) -> list[str]:
    return [name.strip() for name in options.template.split(",")]


def _choices(
    options: FinetuneConfig, resolved: dict[str, Any]
) -> tuple[hardware.Choice, hardware.Choice, hardware.Choice]:
    """Device, dtype and gradient checkpointing, each with its reason; `auto` stays what it became before."""
    with errors.remedy(hardware.ON_CPU, beside=True):
        device = hardware.choose_device(options.device, system_processes.local_rank())
    devices = hardware.devices_together(device.value, system_processes.local_world_size())
    dtype = _as_before(resolved.get("dtype")) or hardware.choose_dtype(options.dtype, *devices)
    checkpointing = _as_before(resolved.get("gradient_checkpointing")) or hardware.choose_checkpointing(
        options.gradient_checkpointing, device.value
    )
    hardware.check_optimizer(options.optimizer, device.value)
    return device, dtype, checkpointing


def _as_before(value: Any) -> hardware.Choice | None:
    return None if value is None else hardware.Choice(value, "as when the run began")


def _base(options: FinetuneConfig, hub_names: Names) -> tuple[str, remote_code.TrustedCode | None]:
    """Folder of the base, and the user's consent to run its Python code, if it has some.

    Raises UserError when the consent is for other code.
    """
    path = remote_code.locate_with_code(options.model_path, options.remote_code)
    path = path or hub_names.base(options.model_path)
    if options.remote_code and options.train_what == trainable.FULL:
        problem = "--train_what full: a model with its own Python code could not be loaded again afterwards."
        raise UserError(problem, "Train an adapter: --train_what lora.")
    code = remote_code.verify_commit(path, options.remote_code)
    return (str(code.folder) if code else path), code


def _fingerprints(
    options: FinetuneConfig,
    data: RunData,
    tokenizer_print: str,
    weights_print: str,
    code: remote_code.TrustedCode | None,
) -> dict[str, str]:
    """SHA-256 of what must be the same when the run continues; of code, its commit."""
    prints = {
        "rows": data.fingerprint,
        "encoded rows": data.encoding.sha256,
        "tokenizer": tokenizer_print,
        "base model": weights_print,
    }
    for name, option in declaration.declared(type(options)).items():
        if option.content and option.content not in prints and getattr(options, name):
            prints[option.content] = hashing.of_file(Path(getattr(options, name)))
    if code:
        prints[remote_code.PRINT] = code.commit
    return prints


def _steps(options: FinetuneConfig, train_rows: int) -> tuple[int, int]:
    """Optimizer steps of the run, and how many of them are the warm-up."""
    per_epoch = data_examples.steps_per_epoch(train_rows, options.batch_size)
    total = options.max_steps or round_up(options.num_epochs * per_epoch)
    if options.warmup_ratio is None:
        return total, min(options.warmup_steps, total // SHORT_RUN)
    return total, round_up(options.warmup_ratio * total)


def check_quantised(options: FinetuneConfig, base_config: Any) -> None:
    """Raise UserError when options ask to train quantised weights in a way that is not possible."""
    kind = quantized.method(base_config)
    if kind and options.train_what == trainable.FULL:
        problem = f"--train_what full: the {kind} weights of {options.model_path} cannot be trained."
        raise UserError(problem, "Train an adapter: --train_what lora; or take the model in 16 bits.")
    if kind and sharded.launched_kind():
        problem = f"--model_path {options.model_path}: {kind} weights cannot be sharded over processes."
        raise UserError(problem, "Use torchrun: each GPU then holds the whole base model.")


def round_up(number: float) -> int:
    """The next whole number, without errors of floating point: 0.07 * 100 gives 7."""
    return math.ceil(round(number, 6))


def versions() -> dict[str, str]:
    """Installed version of each package that a run's numbers depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def describe(plan: Plan) -> None:
    """Print what was chosen and why, what happened to the rows, and three of them."""
    options, reasons, data, encoding = plan.options, plan.reasons, plan.data, plan.data.encoding
    lengths = data.examples.lengths
    say(f"device      {plan.device}: {reasons['device']}")
    openmp.say_once(plan.device)
    say(f"dtype       computation in {plan.dtype}: {reasons['dtype']}; trained weights and optimizer in fp32")
    if options.train_what in (trainable.FULL, lora_shape.EMBEDDINGS):
        unused = config_options.set_without_effect(options, [LORA])
        if unused:
            flags = ", ".join(config_options.flag(options, name) for name in unused)
            say(f"warning: these options have no effect without LoRA: {flags}.")
    say(f"base        {_describe_base(plan)}")
    state = "on" if plan.checkpointing else "off"
    say(f"activations gradient checkpointing is {state}: {reasons['checkpointing']}")
    training_files = [file for file in data.files if not file.validation]
    if len(data.files) > 1:
        weights = "".join(f", {f.path.name} x {f.weight:g}" for f in training_files if f.weight != 1)
        validation = len(data.files) - len(training_files)
        say(f"files       {len(training_files)} to train on, {validation} for validation{weights}")
    unit = "blocks of raw text" if data.task == dataset.PRETRAIN else "rows"
    say(
        f"{unit:<11} {len(data.train_rows)} to train on, {len(data.validation_rows)} for validation; "
        f"{int(lengths.sum())} tokens, median {int(np.median(lengths))}, longest {int(lengths.max())}"
    )
    say(
        f"            of {encoding.read} rows, {encoding.cut} were cut at {options.cutoff_len} tokens, "
        f"{encoding.dropped} were dropped (no target left) and {len(encoding.rejected)} rejected"
    )
    if encoding.cut:
        say("            an answer that is cut short has no end token; --long_rows drop leaves such rows out")
    for text in describe_marked(data.marked, options):
        say(text)
    if options.overlap and data.task != dataset.PRETRAIN:
        say("warning: --overlap is for raw text; these rows have none.")
    if data.overlapping:
        say(f"warning: {data.overlapping} validation rows are training rows too.")
    say(
        f"steps       {plan.total_steps} of {options.batch_size} rows ({plan.steps_per_epoch} an epoch), "
        f"learning rate {options.learning_rate:g} {options.lr_scheduler}, warm-up {plan.warmup_steps} steps"
    )
    if options.warmup_ratio is None and plan.warmup_steps < options.warmup_steps:
        say(
            f"            a short run: {plan.warmup_steps} warm-up steps, not {options.warmup_steps} "
            f"(at most one step in {SHORT_RUN})"
        )
    if options.learning_rate == 0:
        say("warning: --learning_rate is 0, so nothing will be learned.")
    say("\nThree rows as the model sees them. It learns to write the text between « and »:")
    for row in data.train_rows[:3]:
        ids, is_target = data.examples[row]
        say("-" * 60 + "\n" + data_encode.show(plan.tokenizer, ids.tolist(), is_target.tolist()))
    say("-" * 60)


def describe_marked(marked: list[tuple[markers.MarkedRows, str]], options: FinetuneConfig) -> Iterator[str]:
    """Lines on rows that carry a template's markers already."""
    for rows, location in marked:
        template, kind = rows.marked.template, rows.marked.kind
        where = f"{rows.rows} rows (the first is {location})"
        if rows.marked.is_whole and options.marked_rows == markers.KEEP:
            yield f"warning: {where} carry the markers of {template}. This run keeps them"
            yield "         (--marked_rows keep), so these questions are wrapped twice."
        elif rows.marked.is_whole:
            yield f"markers     {where} carried the markers of {template}; the markers were taken off"
            if kind == markers.TURNS and options.train_on == "all":
                yield "            they became conversations, and every answer of a conversation is learned;"
                yield "            --train_on last learns only the last one"
        elif kind == markers.PART:
            yield f"warning: {where} hold markers of {template} but are not a whole prompt of it; they stay."
        else:
            yield f"warning: {where} are raw text with the markers of {template}: questions are learned too."


def _describe_base(plan: Plan) -> str:
    kind = quantized.method(plan.base_config)
    if kind:
        bits = quantized.bits(plan.base_config)
        return f"{bits} bits by {kind}" if bits else kind
    how = "" if plan.options.bits == 16 else " by bitsandbytes, dequantised for each product"
    return f"{plan.options.bits} bits{how}"
