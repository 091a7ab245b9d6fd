"""Starts a new run from an adapter: its weights alone, or an older checkpoint with its optimizer."""

import json
from pathlib import Path
from typing import Any

from onecard.config import declaration
from onecard.config.training import ContinueConfig, FinetuneConfig
from onecard.errors import CHECKPOINT, UserError
from onecard.hub import locate, model_files, revisions
from onecard.models import lora_shape, trainable
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from onecard.runs import legacy
from onecard.runs.checkpoint import Progress
from onecard.system import commands, hashing
from onecard.system import files as system_files
from onecard.system import safetensors as system_safetensors
from onecard.system.console import say
from onecard.training.starting_point import StartingPoint, finished_before

ANOTHER_COPY = "Take another copy of the adapter."
# keys of adapter_config.json for tensors that no option of OneCard makes
OTHER_KINDS = ("lora_bias", "trainable_token_indices", "target_parameters", "layer_replication")


def from_lora_path(options: FinetuneConfig, explicit: frozenset[str]) -> StartingPoint:
    """The weights of the adapter in --lora_path, for a new run with these options (finetune.py).

    explicit: names of the options that the user gave. Raises UserError when there is no adapter, or when
    its shape contradicts these options.
    """
    if options.train_what == trainable.FULL:
        fix = "Merge it into the base first, or train it further: --train_what lora."
        raise UserError("--lora_path with --train_what full: an adapter cannot be trained in full.", fix)
    name = options.lora_path
    source = Path(name if Path(name).is_dir() else locate.fetch_adapter(name))
    if not (source / model_files.ADAPTER_WEIGHTS).is_file():
        _refuse_without_adapter(source)
    start = _start_from(source, options, explicit)
    start.fingerprint = hashing.of_file(source / model_files.ADAPTER_WEIGHTS)
    return start


def _refuse_without_adapter(source: Path) -> None:
    """Raise UserError when the folder holds something else that can be trained further in another way."""
    if (source / runs_folder.MODEL).is_dir() or (source / model_files.MODEL_WEIGHTS).is_file():
        whole = source / runs_folder.MODEL if (source / runs_folder.MODEL).is_dir() else source
        raise UserError(
            f"--lora_path {source}: this is a whole model, not an adapter.", f"Use --model_path {whole}."
        )
    if (source / runs_folder.CONFIG).is_file():
        problem = f"--lora_path {source}: this run is not finished."
        raise UserError(problem, "Finish it, or name one of its checkpoints.")
    if legacy.is_legacy(source):
        fix = f"Continue from it with {commands.name('continue')} --resume_from_checkpoint."
        raise UserError(f"--lora_path {source}: this is a checkpoint of an older program.", fix)


def from_adapter(source: Path, request: ContinueConfig, explicit: frozenset[str]) -> StartingPoint | None:
    """The weights of an adapter for a new run, everything else fresh; None when that run is finished."""
    start = _start_from(source, request, explicit)
    return None if finished_before(start.options, Path(request.output_path)) else start


def _start_from(source: Path, request: FinetuneConfig, explicit: frozenset[str]) -> StartingPoint:
    options = with_shape(source, read_shape(source, request), request, explicit)
    if (source / runs_checkpoint.MANIFEST).is_file():  # a checkpoint that was taken out of its run
        runs_checkpoint.verify(source)
    tensors = system_safetensors.read_tensors(source / model_files.ADAPTER_WEIGHTS)
    say(f"Warm start: the weights of {source}; optimizer, learning rate and rows start anew.")
    base = revisions.of_settings(
        system_files.read_json(source / model_files.ADAPTER_CONFIG, ANOTHER_COPY) or {}
    )
    begun_from = str(revisions.of(source) or source)
    return StartingPoint(options, Progress(), adapter=tensors, begun_from=begun_from, base=base)


def from_older(source: Path, request: ContinueConfig, explicit: frozenset[str]) -> StartingPoint | None:
    """What an older checkpoint holds: weights, and perhaps optimizer, loss scale and step.

    None when the run that it starts is finished. Raises UserError when it cannot be read or trained further.
    """
    values = system_files.read_json(source / model_files.ADAPTER_CONFIG, ANOTHER_COPY) or {}
    if values.get("modules_to_save"):
        problem = f"{source}: older checkpoints with modules_to_save cannot be read."
        raise UserError(problem, "Use a checkpoint without modules_to_save.", CHECKPOINT)
    _check_kind(source, values, request)
    old = legacy.read(source)
    rslora = bool(values.get("use_rslora"))
    shape = {"lora_r": old.rank, "lora_target_modules": old.targets, "rslora": rslora}
    if old.alpha is not None:
        shape["lora_alpha"] = float(old.alpha)
    else:
        say(f"{source} does not say its alpha; --lora_alpha {request.lora_alpha:g} is used.")
    if old.optimizer is not None and legacy.is_bitsandbytes(old.optimizer) and "optimizer" not in explicit:
        shape["optimizer"] = "adamw_8bit"
    options = with_shape(source, shape, request, explicit)
    if finished_before(options, Path(request.output_path)):
        return None
    for note in old.notes:
        say(f"{source}: {note}.")
    parts = {
        "optimizer": old.optimizer is not None,
        "loss scale": old.scale is not None,
        "step": old.step > 0,
    }
    present = ", ".join(["weights", *(name for name, is_present in parts.items() if is_present)])
    missing = ", ".join(name for name, is_present in parts.items() if not is_present)
    say(f"Older checkpoint {source}: {present} go on" + (f"; {missing} start anew." if missing else "."))
    say(f"Its rank {old.rank} and targets {old.targets} come from its tensors.")
    if old.updates < old.step:
        say(f"{old.step - old.updates} of its {old.step} steps were skipped, as fp16 does when it overflows.")
    if old.step:
        say(f"It was saved at step {old.step}: the rows of so many steps, in OneCard's order, count as seen.")
    return StartingPoint(
        options,
        Progress(step=old.step, updates=old.updates),
        adapter=old.tensors,
        moments=old.optimizer,
        scale=old.scale,
        planned_steps=old.planned_steps,
        next_rate=old.next_rate,
        begun_from=str(source),
    )


def _plain(value: Any) -> Any:
    """A value in which lists of names can be compared whatever their order."""
    names = value.split(",") if isinstance(value, str) else value
    return sorted(str(name).strip() for name in names) if isinstance(names, list) else value


def _is_same(name: str, option: Any, stored: Any) -> bool:
    """Whether an option has the adapter's value; all-linear may be any list, and the tensors show which."""
    return _plain(option) == _plain(stored) or (
        name == "lora_target_modules" and option == lora_shape.ALL_LINEAR
    )


def with_shape(
    source: Path, shape: dict[str, Any], request: FinetuneConfig, explicit: frozenset[str]
) -> FinetuneConfig:
    """The options with the adapter's own shape. Raises UserError (exit 4) when the user gave another.

    A run may train more than the adapter has, such as LoRA after embeddings, but not less.
    """
    wrong = [
        f"{name} {value} -> {getattr(request, name)}"
        for name, value in shape.items()
        if name in explicit and name != "train_what" and not _is_same(name, getattr(request, name), value)
    ]
    before, now = shape.get("train_what", lora_shape.LORA), request.train_what
    if "train_what" in explicit and not set(before.split("+")) <= set(now.split("+")):
        wrong.append(f"train_what {before} -> {now}")
    if wrong:
        problem = f"{source}: the options contradict the shape of the adapter: {'; '.join(wrong)}."
        raise UserError(problem, "Leave these options out: the adapter has its own.", CHECKPOINT)
    settings = request.run_settings()
    values = {name: getattr(request, name) for name in declaration.declared(settings)}
    inherited = {name: value for name, value in shape.items() if name not in explicit}
    return settings(**{**values, **inherited})


def read_shape(source: Path, request: FinetuneConfig) -> dict[str, Any]:
    """The options that make an adapter of the shape of the one in this folder.

    Raises UserError (exit 4) when there is none, or when no options make one like it.
    """
    values = system_files.read_json(source / model_files.ADAPTER_CONFIG, ANOTHER_COPY)
    if values is None or not (source / model_files.ADAPTER_WEIGHTS).is_file():
        problem = f"{source} holds neither a checkpoint nor an adapter ({model_files.ADAPTER_WEIGHTS})."
        raise UserError(problem, "Name a checkpoint folder, a run folder or an adapter folder.", CHECKPOINT)
    try:
        rank, alpha, targets = int(values["r"]), float(values["lora_alpha"]), values["target_modules"]
        names = targets if isinstance(targets, str) else ",".join(sorted(map(str, targets)))
        whole = list(values.get("modules_to_save") or [])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"{source / model_files.ADAPTER_CONFIG} does not describe a LoRA adapter ({error!r})."
        raise UserError(problem, "Name the folder of a LoRA adapter.", CHECKPOINT) from None
    _check_kind(source, values, request)
    if names == lora_shape.NO_TARGETS:
        return {"train_what": lora_shape.EMBEDDINGS}
    return {
        "train_what": lora_shape.BOTH if whole else lora_shape.LORA,
        "lora_r": rank,
        "lora_alpha": alpha,
        "lora_target_modules": names,
        "rslora": bool(values.get("use_rslora")),
    }


def _check_kind(source: Path, values: dict[str, Any], request: FinetuneConfig) -> None:
    """Raise UserError (exit 4) for an adapter that these options cannot make."""
    path = source / model_files.ADAPTER_CONFIG
    other = [name for name in OTHER_KINDS if values.get(name)]
    if other:
        problem = f"{path}: the adapter has {', '.join(other)}, which OneCard cannot train."
        raise UserError(problem, "Use an adapter without it, such as one that OneCard has made.", CHECKPOINT)
    plain = ("use_rslora", "init_lora_weights")  # an option of its own; and what only matters at the start
    settings = {name: values[name] for name in lora_shape.EXTRAS if name not in plain and values.get(name)}
    extras = lora_shape.read_extras(request.peft_config, rslora=False)
    requested = {name: value for name, value in extras.items() if name not in plain and value}
    adds_rslora = extras.get("use_rslora") and not values.get("use_rslora")
    before, now = ({name: _plain(value) for name, value in one.items()} for one in (settings, requested))
    if adds_rslora or before != now:
        made_with = json.dumps(settings)
        problem = f"{path}: the adapter was made with {made_with}, and --peft_config says otherwise."
        raise UserError(problem, "Write these settings into the file of --peft_config.", CHECKPOINT)
