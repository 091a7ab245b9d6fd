"""A new run from an adapter made elsewhere: its weights alone, or an older checkpoint with its optimizer."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from onecard.config.training import ContinueConfig, FinetuneConfig
from onecard.errors import CHECKPOINT, UserError
from onecard.hub import locate, model_files, revisions
from onecard.models import adapter as models_adapter
from onecard.models import trainable
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as run_folder
from onecard.runs import legacy
from onecard.runs.checkpoint import Progress
from onecard.system import commands, hashing
from onecard.system import files as system_files
from onecard.system import safetensors as safetensors_file
from onecard.system.console import say
from onecard.training.starting_point import Start, finished_before

ANOTHER_COPY = "Take another copy of the adapter."
# of adapter_config.json: tensors that no option of ours makes
OTHER_KINDS = ("lora_bias", "trainable_token_indices", "target_parameters", "layer_replication")


def from_lora_path(options: FinetuneConfig, given: frozenset[str]) -> Start:
    """finetune.py --lora_path: an adapter's weights alone, in the options' run.

    given: names of the options that the user gave.
    """
    if options.train_what == trainable.FULL:
        fix = "Merge it into the base first, or train it further: --train_what lora."
        raise UserError("--lora_path with --train_what full: an adapter is not all weights.", fix)
    name = options.lora_path
    source = Path(name if Path(name).is_dir() else locate.fetch_adapter(name))
    if not (source / model_files.ADAPTER_WEIGHTS).is_file():
        _refuse_without_adapter(source)
    start = _start_from(source, options, given)
    start.fingerprint = hashing.of_file(source / model_files.ADAPTER_WEIGHTS)
    return start


def _refuse_without_adapter(source: Path) -> None:
    """Say what lies there instead."""
    if (source / run_folder.MODEL).is_dir() or (source / model_files.MODEL_WEIGHTS).is_file():
        whole = source / run_folder.MODEL if (source / run_folder.MODEL).is_dir() else source
        raise UserError(f"--lora_path {source}: all weights, no adapter.", f"Use --model_path {whole}.")
    if (source / run_folder.CONFIG).is_file():
        problem = f"--lora_path {source}: this run is not finished."
        raise UserError(problem, "Finish it, or name one of its checkpoints.")
    if legacy.is_legacy(source):
        fix = f"Go on from it with {commands.name('continue')} --resume_from_checkpoint."
        raise UserError(f"--lora_path {source}: an older checkpoint.", fix)


def from_adapter(source: Path, wish: ContinueConfig, given: frozenset[str]) -> Start | None:
    """Weights only, everything else fresh; None when that run is finished."""
    start = _start_from(source, wish, given)
    return None if finished_before(start.options, Path(wish.output_path)) else start


def _start_from(source: Path, wish: FinetuneConfig, given: frozenset[str]) -> Start:
    options = with_shape(source, read_shape(source, wish), wish, given)
    if (source / runs_checkpoint.MANIFEST).is_file():  # outside of its run its options and rows are not known
        runs_checkpoint.verify(source)
    tensors = safetensors_file.read_tensors(source / model_files.ADAPTER_WEIGHTS)
    say(f"Warm start: the weights of {source}; optimizer, rate and rows start anew.")
    base = revisions.of_settings(
        system_files.read_json(source / model_files.ADAPTER_CONFIG, ANOTHER_COPY) or {}
    )
    begun_from = str(revisions.of(source) or source)
    return Start(options, Progress(), adapter=tensors, begun_from=begun_from, base=base)


def from_older(source: Path, wish: ContinueConfig, given: frozenset[str]) -> Start | None:
    """What an older checkpoint has of weights, optimizer, scaler, place in schedule and rows."""
    values = system_files.read_json(source / model_files.ADAPTER_CONFIG, ANOTHER_COPY) or {}
    if values.get("modules_to_save"):
        problem = f"{source}: older checkpoints with modules_to_save are not read."
        raise UserError(problem, "", CHECKPOINT)
    _check_kind(source, values, wish)
    old = legacy.read(source)
    rslora = bool(values.get("use_rslora"))
    shape = {"lora_r": old.rank, "lora_target_modules": old.targets, "rslora": rslora}
    if old.alpha is not None:
        shape["lora_alpha"] = float(old.alpha)
    else:
        say(f"{source}: its alpha is nowhere written; --lora_alpha {wish.lora_alpha:g} is taken.")
    if old.optimizer is not None and legacy.is_bitsandbytes(old.optimizer) and "optimizer" not in given:
        shape["optimizer"] = "adamw_8bit"
    options = with_shape(source, shape, wish, given)
    if finished_before(options, Path(wish.output_path)):
        return None
    for note in old.notes:
        say(f"{source}: {note}.")
    found = {
        "optimizer": old.optimizer is not None,
        "loss scale": old.scale is not None,
        "step": old.step > 0,
    }
    there = ", ".join(["weights", *(name for name, is_there in found.items() if is_there)])
    missing = ", ".join(name for name, is_there in found.items() if not is_there)
    say(f"Older checkpoint {source}: {there} go on" + (f"; {missing} start anew." if missing else "."))
    say(f"Its rank {old.rank} and targets {old.targets} come from its tensors.")
    if old.step:
        say(f"It stood at step {old.step}: as many batches of our own order of the rows count as seen.")
    return Start(
        options,
        Progress(step=old.step, updates=old.step),
        adapter=old.tensors,
        moments=old.optimizer,
        scale=old.scale,
        planned_steps=old.planned_steps,
        begun_from=str(source),
    )


def _plain(value: Any) -> Any:
    """Names in any order are the same."""
    names = value.split(",") if isinstance(value, str) else value
    return sorted(str(name).strip() for name in names) if isinstance(names, list) else value


def _is_same(name: str, wished: Any, has: Any) -> bool:
    """all-linear stands for any list of names; whether it is right the tensors show."""
    return _plain(wished) == _plain(has) or (
        name == "lora_target_modules" and wished == models_adapter.ALL_LINEAR
    )


def with_shape(
    source: Path, shape: dict[str, Any], wish: FinetuneConfig, given: frozenset[str]
) -> FinetuneConfig:
    """The options with the adapter's own shape; raises UserError (exit 4) when another was asked for.

    More than the adapter has may be trained, such as LoRA after its embeddings, but not less.
    """
    wrong = [
        f"{name} {value} -> {getattr(wish, name)}"
        for name, value in shape.items()
        if name in given and name != "train_what" and not _is_same(name, getattr(wish, name), value)
    ]
    has, wanted = shape.get("train_what", models_adapter.LORA), wish.train_what
    if "train_what" in given and not set(has.split("+")) <= set(wanted.split("+")):
        wrong.append(f"train_what {has} -> {wanted}")
    if wrong:
        raise UserError(f"{source}: the adapter has another shape: {'; '.join(wrong)}.", "", CHECKPOINT)
    values = {field.name: getattr(wish, field.name) for field in dataclasses.fields(FinetuneConfig)}
    kept = {name: value for name, value in shape.items() if name not in given}
    return FinetuneConfig(**{**values, **kept})


def read_shape(source: Path, wish: FinetuneConfig) -> dict[str, Any]:
    """The options that make an adapter like the one in this folder; raises UserError."""
    values = system_files.read_json(source / model_files.ADAPTER_CONFIG, ANOTHER_COPY)
    if values is None or not (source / model_files.ADAPTER_WEIGHTS).is_file():
        problem = f"{source}: no checkpoint and no adapter ({model_files.ADAPTER_WEIGHTS}) is there."
        raise UserError(problem, "Name a checkpoint folder, a run folder or an adapter folder.", CHECKPOINT)
    try:
        rank, alpha, targets = int(values["r"]), float(values["lora_alpha"]), values["target_modules"]
        names = targets if isinstance(targets, str) else ",".join(sorted(map(str, targets)))
        whole = list(values.get("modules_to_save") or [])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"{source / model_files.ADAPTER_CONFIG}: not a LoRA adapter's ({error!r})."
        raise UserError(problem, "", CHECKPOINT) from None
    _check_kind(source, values, wish)
    if names == models_adapter.NO_TARGETS:
        return {"train_what": models_adapter.EMBEDDINGS}
    return {
        "train_what": models_adapter.BOTH if whole else models_adapter.LORA,
        "lora_r": rank,
        "lora_alpha": alpha,
        "lora_target_modules": names,
        "rslora": bool(values.get("use_rslora")),
    }


def _check_kind(source: Path, values: dict[str, Any], wish: FinetuneConfig) -> None:
    """Raise UserError (exit 4) for adapters that these options cannot make."""
    path = source / model_files.ADAPTER_CONFIG
    other = [name for name in OTHER_KINDS if values.get(name)]
    if other:
        problem = f"{path}: adapters with {', '.join(other)} are of another kind."
        raise UserError(problem, "Adapters that OneCard makes can be trained further.", CHECKPOINT)
    plain = ("use_rslora", "init_lora_weights")  # an option of its own; how it once began
    has = {name: values[name] for name in models_adapter.EXTRAS if name not in plain and values.get(name)}
    wanted = models_adapter.read_extras(wish.peft_config, rslora=False)
    asked = {name: value for name, value in wanted.items() if name not in plain and value}
    also = wanted.get("use_rslora") and not values.get("use_rslora")
    if also or {k: _plain(v) for k, v in has.items()} != {k: _plain(v) for k, v in asked.items()}:
        problem = f"{path}: the adapter was made with {json.dumps(has)}, and --peft_config says otherwise."
        raise UserError(problem, "Write these settings into the file of --peft_config.", CHECKPOINT)
