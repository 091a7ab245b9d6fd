"""A new run from an adapter made elsewhere: its weights alone, or an older checkpoint with its optimizer."""

import dataclasses
from pathlib import Path
from typing import Any

from onecard import checkpoint, legacy, runfolder
from onecard.checkpoint import Progress
from onecard.config import ContinueConfig, FinetuneConfig
from onecard.errors import CHECKPOINT, UserError
from onecard.journal import say
from onecard.plan import finished_before
from onecard.start import Start

# of adapter_config.json: what changes scale or tensors
OTHER_KINDS = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "modules_to_save", "lora_bias")


def from_adapter(source: Path, wish: ContinueConfig, given: frozenset[str]) -> Start | None:
    """Weights only, everything else fresh; None when that run is finished."""
    options = with_shape(source, read_shape(source), wish, given)
    if finished_before(options, Path(wish.output_path)):
        return None
    if (source / checkpoint.MANIFEST).is_file():  # outside of its run its options and rows are not known
        checkpoint.verify(source)
    tensors = checkpoint.read_tensors(source / runfolder.ADAPTER_WEIGHTS)
    say(f"Warm start: the weights of {source}; optimizer, rate and rows start anew.")
    return Start(options, Progress(), adapter=tensors, begun_from=str(source))


def from_older(source: Path, wish: ContinueConfig, given: frozenset[str]) -> Start | None:
    """What an older checkpoint has of weights, optimizer, scaler, place in schedule and rows."""
    _refuse_other_kinds(source, runfolder.read_json(source / runfolder.ADAPTER_CONFIG))
    old = legacy.read(source)
    shape = {"lora_r": old.rank, "lora_target_modules": old.targets}
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
    """Module names in any order are the same."""
    return sorted(name.strip() for name in value.split(",")) if isinstance(value, str) else value


def with_shape(
    source: Path, shape: dict[str, Any], wish: ContinueConfig, given: frozenset[str]
) -> FinetuneConfig:
    """The options with the adapter's own shape; raises UserError (exit 4) when another was asked for."""
    wrong = [
        f"{name} {value} -> {getattr(wish, name)}"
        for name, value in shape.items()
        if name in given and _plain(getattr(wish, name)) != _plain(value)
    ]
    if wrong:
        raise UserError(f"{source}: the adapter has another shape: {'; '.join(wrong)}.", "", CHECKPOINT)
    values = {field.name: getattr(wish, field.name) for field in dataclasses.fields(FinetuneConfig)}
    return FinetuneConfig(**{**values, **shape})


def read_shape(source: Path) -> dict[str, Any]:
    """lora_r, lora_alpha and lora_target_modules of an adapter folder."""
    values = runfolder.read_json(source / runfolder.ADAPTER_CONFIG)
    if values is None or not (source / runfolder.ADAPTER_WEIGHTS).is_file():
        problem = f"{source}: no checkpoint and no adapter ({runfolder.ADAPTER_WEIGHTS}) is there."
        raise UserError(problem, "Name a checkpoint folder, a run folder or an adapter folder.", CHECKPOINT)
    _refuse_other_kinds(source, values)
    try:
        rank, alpha, targets = int(values["r"]), float(values["lora_alpha"]), values["target_modules"]
        names = targets if isinstance(targets, str) else ",".join(sorted(map(str, targets)))
        return {"lora_r": rank, "lora_alpha": alpha, "lora_target_modules": names}
    except (KeyError, TypeError, ValueError) as error:
        problem = f"{source / runfolder.ADAPTER_CONFIG}: not a LoRA adapter's ({error!r})."
        raise UserError(problem, "", CHECKPOINT) from None


def _refuse_other_kinds(source: Path, values: Any) -> None:
    other = [name for name in OTHER_KINDS if values.get(name)] if isinstance(values, dict) else []
    if other:
        path = source / runfolder.ADAPTER_CONFIG
        problem = f"{path}: adapters with {', '.join(other)} are of another kind."
        raise UserError(problem, "Only plain LoRA adapters can be trained further.", CHECKPOINT)
