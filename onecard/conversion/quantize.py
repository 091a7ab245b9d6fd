"""A model in fewer bits: GPTQ and AWQ by gptqmodel, 8 and 4 bits by bitsandbytes; in the folders others load.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) and AWQ (Lin et al. 2023, arXiv 2306.00978) look at rows, one
layer at a time: the others wait outside of the card.
"""

import contextlib
import gc
import math
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from onecard.config import options as config_options
from onecard.config.tools import QuantizeConfig
from onecard.errors import CHECKPOINT, UserError, is_out_of_memory
from onecard.evaluation import eval_rows
from onecard.evaluation.eval_rows import EvalRow
from onecard.hub import locate, model_files, revisions
from onecard.inference import resolve
from onecard.models import base_model, quantized, tensor_files
from onecard.models import memory as model_memory
from onecard.models import tokenizer as models_tokenizer
from onecard.system import build_lock, console, hardware, output_folder
from onecard.system import files as system_files
from onecard.system.console import say

BNB = "bnb"
FLAG = "--output_path"
FIGURES = "quantize.json"  # in the new folder: what it cost
WAITING, LOGS = ".waiting", "logs"  # of gptqmodel, in the new folder until it is done
BITS = {quantized.GPTQ: (2, 3, 4, 8), quantized.AWQ: (4,), BNB: (4, 8)}
GROUPS = (128, 64, 32)
OUTPUTS = {quantized.GPTQ: 32, quantized.AWQ: 64}  # a layer's outputs are a multiple of this


def run(options: QuantizeConfig) -> Path:
    """Make the folder and tell what it cost; raises UserError."""
    if not options.model_path:
        raise UserError("--model_path is needed.", "Name a folder, a hub name, or demo.")
    if options.bits not in BITS[options.method]:
        known = ", ".join(map(str, BITS[options.method]))
        raise UserError(f"--bits {options.bits}: {options.method} has {known}.", "Choose one of them.")
    _check_used(options)
    name = Path(options.model_path).name
    target = Path(options.output_path or f"{name}-{options.method}-{options.bits}bit")
    source = Path(locate.fetch_model(options.model_path))
    output_folder.check_apart(source, target, ("--model_path", FLAG))
    config = base_model.load_config(str(source))
    if quantized.method(config):
        problem = f"--model_path {options.model_path}: is quantised already ({quantized.method(config)})."
        raise UserError(problem, "Name the model in 16 bits.")
    group = _group(options, _layers(source, config))
    if options.method != BNB:
        quantized.require(f"--method {options.method} needs")
    files, versions = _read(options, source), {"model_path": revisions.of(source)}
    made_of = output_folder.record("quantize", _settings(options, group), files, versions)
    if output_folder.is_made(target, made_of, FLAG):
        say(f"{target} is there already, made of the same.")
        _tell_figures(system_files.read_json(target / FIGURES), options.report_rows)
        return target
    size = _size(source)
    needed = size if options.method == BNB else 2 * size  # layers that wait lie beside those that are done
    with output_folder.making(target, needed, made_of, FLAG) as (place, _):  # first of all the disk's room
        seen, others = _rows(options, source)
        device = hardware.choose_device(options.device).value
        _check_weights(source)
        before = _perplexity(source, others, device, "perplexity before")
        if options.method == BNB:
            _by_bitsandbytes(source, place, options.bits, device)
        else:
            _tell_errors(_by_gptqmodel(source, place, options, group, seen, device))
        models_tokenizer.load_tokenizer(str(source)).save_pretrained(place)
        # under its hidden name: what can be seen has been measured, whenever this is killed
        after = _perplexity_after(place, others, device)
        figures = {"bytes": [size, _size(place)], "perplexity": after and [before, after]}
        figures |= {"rows": len(others), "data_path": options.data_path}
        system_files.write_json(place / FIGURES, figures)
    _tell_figures(figures, options.report_rows)
    return target


def _perplexity_after(place: Path, others: list[EvalRow], device: str) -> float | None:
    """Of the new model; None without rows, or without the memory: the work of hours is worth more."""
    try:
        return _perplexity(place, others, device, "perplexity after")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        say("perplexity  the memory was not enough to measure the new model")
        return None


def _check_used(options: QuantizeConfig) -> None:
    """Raise UserError for options that the method makes no use of."""
    idle = {}
    if options.method != quantized.GPTQ:
        idle |= dict.fromkeys(("act_order", "damp"), "for --method gptq")
    if options.method == BNB:
        idle |= dict.fromkeys(("group_size", "rows"), "for --method gptq or awq")
    config_options.refuse_idle(options, idle)


def _tell_figures(figures: dict[str, Any] | None, report_rows: int) -> None:
    """What the new folder cost, as it was measured when it was made; None: an earlier version made it."""
    if not figures:
        say(f"It has no {FIGURES}: an earlier version made it.")
        return
    size, now = figures["bytes"]
    say(f"size        {size / 2**20:.1f} -> {now / 2**20:.1f} MiB ({now / size:.2f} of it)")
    if figures["perplexity"]:
        before, after = figures["perplexity"]
        of = f"of {figures['rows']} rows not looked at, of {figures['data_path']}"
        say(f"perplexity  {before:.3f} -> {after:.3f} (ratio {after / before:.3f}) {of}")
    elif report_rows:
        say("perplexity  not measured when it was made")


def _size(folder: Path) -> int:
    """Bytes of a model's weights."""
    return sum(path.stat().st_size for path in model_files.files_of(folder))


def _settings(options: QuantizeConfig, group: int) -> dict[str, Any]:
    """What decides what the folder holds."""
    names = ("method", "bits")
    if options.method != BNB:
        names += ("act_order", "damp", "template", "rows", "cutoff_len", "seed", "report_rows")
    return {"group_size": group, **{name: getattr(options, name) for name in names}}


def _read(options: QuantizeConfig, source: Path) -> list[Path]:
    """All files that decide it."""
    found = base_model.identity_files(str(source))
    rows = [] if options.method == BNB else eval_rows.files(options.data_path)
    return [*found["weights"], *found["tokenizer"], *rows]


def _layers(source: Path, config: Any) -> dict[str, tuple[int, int]]:
    """Name -> (outputs, inputs) of the layers that are quantised: all linear ones but the head."""
    bare = base_model.skeleton(str(source), config)
    head = bare.get_output_embeddings()
    found = {name: layer for name, layer in bare.named_modules() if isinstance(layer, torch.nn.Linear)}
    return {name: tuple(layer.weight.shape) for name, layer in found.items() if layer is not head}


def _group(options: QuantizeConfig, layers: dict[str, tuple[int, int]]) -> int:
    """Weights that share a scale, -1 for a row of each layer; raises UserError for shapes that do not fit."""
    if options.method == BNB:
        return -1
    if not layers:
        problem = f"--model_path {options.model_path}: has no linear layers."
        raise UserError(problem, "Use --method bnb, or another model.")
    fitting = [group for group in GROUPS if all(inputs % group == 0 for _, inputs in layers.values())]
    wanted = options.group_size if options.group_size != "auto" else (fitting or [-1])[0]
    for name, (outputs, inputs) in layers.items():
        if wanted != -1 and inputs % wanted:
            problem = f"--group_size {wanted}: {name} has {inputs} inputs, no multiple of it."
            raise UserError(problem, f"Use {' or '.join(map(str, [*fitting, -1]))}, or auto.")
        step = OUTPUTS[options.method]
        if outputs % step or inputs % 32:
            problem = f"--method {options.method}: {name} has {inputs} inputs and {outputs} outputs;"
            raise UserError(f"{problem} they have to be multiples of 32 and {step}.", "Use --method bnb.")
    return wanted


def _check_weights(source: Path) -> None:
    """Raise UserError (exit 4) for weights that are no numbers: nothing computed from them would be one."""
    tensors, done = tensor_files.of_folder(source), 0
    total = sum(tensor.size for tensor in tensors.values())
    with tensor_files.Files() as files, console.over_bytes("looking at weights") as progress:
        for name, tensor in tensors.items():
            for first, last in tensor.blocks():
                block = files.read(tensor, first, last)
                done += block.nbytes
                progress(done, total)
                if block.is_floating_point() and not torch.isfinite(block).all():
                    problem = f"{tensor.file}: {name} holds numbers that are not finite."
                    raise UserError(problem, "Download or convert the model again.", CHECKPOINT)
    say("weights     all finite")


def _rows(options: QuantizeConfig, source: Path) -> tuple[list[EvalRow], list[EvalRow]]:
    """(rows to look at, other rows to tell the perplexity of), chosen by the seed."""
    if options.method == BNB and not options.report_rows:
        return [], []
    tokenizer = models_tokenizer.load_tokenizer(str(source))
    form, _ = resolve.choose_template(options.template, [], tokenizer)
    found = eval_rows.some(options.data_path, options.cutoff_len, form, tokenizer)
    random.Random(options.seed).shuffle(found)
    apart = min(options.report_rows, len(found) // 4)
    others, found = found[:apart], found[apart:]
    if options.method == BNB:
        return [], others
    seen = found[: options.rows]
    tokens = sum(len(ids) for ids, _ in seen)
    say(f"rows        {len(seen)} of {options.data_path} are looked at, {tokens} tokens ({form.name})")
    return seen, others


def _by_gptqmodel(
    source: Path, place: Path, options: QuantizeConfig, group: int, seen: list[EvalRow], device: str
) -> list[dict[str, Any]]:
    """Fill the folder; what the library noted about each module."""
    library = quantized.library()
    from gptqmodel.quantization.config import AWQConfig, GPTQConfig

    shared = {"bits": options.bits, "group_size": group, "device": device}
    shared["offload_to_disk_path"] = str(place / WAITING)  # layers that wait
    if options.method == quantized.AWQ:
        settings, backend = AWQConfig(**shared), library.BACKEND.AWQ_TORCH
    else:
        grouped = group != -1 and not options.act_order  # the library's other order is one of groups
        order = {"desc_act": options.act_order, "act_group_aware": grouped}
        settings, backend = GPTQConfig(damp_percent=options.damp, **order, **shared), library.BACKEND.AUTO
    given = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids, _ in seen]
    source, place = source.resolve(), place.resolve()
    with contextlib.chdir(place):  # it writes a log into the working folder, and draws bars of its own
        with build_lock.alone():
            made = library.GPTQModel.load(str(source), settings)
        noted = made.quantize(given, batch_size=1, backend=backend, calibration_data_min_length=1)
        made.save(str(place))
    for name in (WAITING, LOGS):
        shutil.rmtree(place / name, ignore_errors=True)
    return [entry for entries in noted.values() for entry in entries]


def _tell_errors(noted: list[dict[str, Any]]) -> None:
    """One line for each layer: the squared error of its outputs for the rows, as the library counts it.

    Where it is no number, no row reached the module, and its weights were rounded.
    """
    layers: dict[int, list[tuple[float, str]]] = {}
    for entry in noted:
        try:
            error = float(entry["loss"])
        except ValueError:
            say(f"layer {entry['layer']:<5} {entry['module']}: {entry['loss']}")
            continue
        layers.setdefault(entry["layer"], []).append((error, entry["module"]))
    for number, errors in sorted(layers.items()):
        most, name = max(errors)
        say(f"layer {number:<5} squared error {sum(each for each, _ in errors):.2e}, {most:.2e} in {name}")


def _by_bitsandbytes(source: Path, place: Path, bits: int, device: str) -> None:
    dtype = hardware.choose_dtype("auto", device).value
    made = base_model.load_base(str(source), bits, dtype, device)
    made.save_pretrained(place)


def _perplexity(folder: Path, rows: list[EvalRow], device: str, title: str) -> float | None:
    """Of these rows, None without; by the processor when the whole model does not fit on the card.

    Raises UserError (exit 4) when it is no finite number.
    """
    if not rows:
        return None
    size = _size(folder)
    if device != "cpu" and size > model_memory.SAFETY * (hardware.free_memory_bytes(device) or 0):
        say(f"{title}: by the processor, as {size / 2**30:.1f} GiB do not fit on {device}")
        device = "cpu"
    dtype = hardware.choose_dtype("auto", device).value
    made = base_model.load_base(str(folder), 16, dtype, device).eval()
    try:
        found = eval_rows.perplexity(made, rows, device, title)
    finally:
        del made
        gc.collect()
        hardware.forget_cached_memory(device)
    if not math.isfinite(found):
        problem = f"{title}: {found}, computed in {dtype} on {device}. No model was kept."
        fix = "Look for damaged weights in --model_path, or try more --bits, another --method or --device."
        raise UserError(problem, fix, CHECKPOINT)
    return found
