"""Writes a model in fewer bits: GPTQ and AWQ with gptqmodel, 8 and 4 bits with bitsandbytes.

The folder can be loaded by transformers and by other programs. GPTQ (Frantar et al. 2022, arXiv 2210.17323)
and AWQ (Lin et al. 2023, arXiv 2306.00978) use calibration rows and quantise one layer at a time, while the
other layers wait outside of the GPU.
"""

import gc
import math
import random
from pathlib import Path
from typing import Any

import torch

from onecard import errors
from onecard.config import declaration
from onecard.config import options as config_options
from onecard.config.conversion import (
    BNB,
    CALIBRATION,
    GPTQ_ONLY,
    OWN_ROWS,
    PUBLISHED_TEXT,
    QuantizeConfig,
)
from onecard.conversion import calibration, gptq_awq
from onecard.errors import CHECKPOINT, UserError, is_out_of_memory
from onecard.evaluation import eval_rows
from onecard.evaluation.eval_rows import EvalRow
from onecard.hub import model_files, revisions
from onecard.inference import resolve
from onecard.models import base_model, quantized, tensor_files
from onecard.models import memory as models_memory
from onecard.models import tokenizer as models_tokenizer
from onecard.system import console, gpus, hardware, openmp, output_folder
from onecard.system import files as system_files
from onecard.system.console import say

FLAG = "--output_path"
FIGURES = "quantize.json"  # in the new folder: sizes and perplexities before and after
BITS = {quantized.GPTQ: (2, 3, 4, 8), quantized.AWQ: (4,), BNB: (4, 8)}
GROUPS = (128, 64, 32)  # group sizes that --group_size auto tries
OUTPUTS = {quantized.GPTQ: 32, quantized.AWQ: 64}  # the outputs of a layer must be a multiple of this


def run(options: QuantizeConfig) -> Path:
    """Write the quantised model and print its size and perplexity; returns its folder.

    Raises UserError: exit 2 for wrong options, 3 for unusable rows, 4 for damaged weights and for a
    perplexity that is not finite, 7 when the disk has not enough room.
    """
    if not options.model_path:
        raise UserError("--model_path is missing.", "Name a folder, a hub name, or demo.")
    if options.bits not in BITS[options.method]:
        allowed = ", ".join(map(str, BITS[options.method]))
        raise UserError(
            f"--bits {options.bits}: {options.method} can have {allowed} bits.", "Choose one of them."
        )
    _refuse_unused_options(options)
    name = Path(options.model_path).name
    target = Path(options.output_path or f"{name}-{options.method}-{options.bits}bit")
    source = resolve.base_folder(options.model_path)
    output_folder.check_apart(source, target, ("--model_path", FLAG))
    config = base_model.load_config(str(source))
    if quantized.method(config):
        kind = quantized.method(config)
        problem = f"--model_path {options.model_path}: this model is quantised already ({kind})."
        raise UserError(problem, "Name the model in 16 bits.")
    group = _group(options, _layers(source, config))
    if options.method != BNB:
        quantized.require(f"--method {options.method} needs")
    published = _published(options)
    files, versions = _input_files(options, source, published), {"model_path": revisions.of(source)}
    versions |= {"calibration": revisions.of(published)} if published else {}
    made_of = output_folder.record("quantize", _settings(options, group), files, versions)
    if output_folder.is_made(target, made_of, FLAG):
        say(f"{target} was made from the same files and options, so there is nothing to do.")
        fix = "Name a new folder, or delete this one to make it again."
        _print_figures(system_files.read_json(target / FIGURES, fix), options.report_rows)
        return target
    size = _weight_bytes(source)
    # gptqmodel keeps the waiting layers beside the finished ones
    needed = size if options.method == BNB else 2 * size
    with output_folder.making(target, needed, made_of, FLAG) as (folder, _):
        calibration_rows, report_rows = _rows(options, source, published)
        with errors.remedy(hardware.ON_CPU, beside=True):
            device = hardware.choose_device(options.device).value
        openmp.say_once(device)
        _check_weights(source)
        before = _perplexity(source, report_rows, device, "perplexity before")
        if options.method == BNB:
            _by_bitsandbytes(source, folder, options.bits, device)
        else:
            gptq_awq.print_errors(gptq_awq.write(source, folder, options, group, calibration_rows, device))
        models_tokenizer.load_tokenizer(str(source)).save_pretrained(folder)
        # measured while the folder has its hidden name: even after a kill, a visible folder has its figures
        after = _perplexity_after(folder, report_rows, device)
        figures = {"bytes": [size, _weight_bytes(folder)], "perplexity": after and [before, after]}
        figures |= {"rows": len(report_rows), "data_path": options.data_path}
        if options.method != BNB:
            figures |= {"calibration": options.calibration, "calibration_rows": len(calibration_rows)}
        system_files.write_json(folder / FIGURES, figures)
    _print_figures(figures, options.report_rows)
    return target


def _perplexity_after(folder: Path, report_rows: list[EvalRow], device: str) -> float | None:
    """The perplexity of the new model; None without rows.

    It is also None when the memory does not suffice, because the quantised model may be the work of hours.
    """
    try:
        return _perplexity(folder, report_rows, device, "perplexity after")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        say("perplexity  not measured for the new model, because the memory did not suffice")
        return None


def _refuse_unused_options(options: QuantizeConfig) -> None:
    """Raise UserError for options that the method does not use."""
    absent = [GPTQ_ONLY] if options.method != quantized.GPTQ else []
    absent += [CALIBRATION] if options.method == BNB else []
    absent += [PUBLISHED_TEXT] if options.calibration == OWN_ROWS else []
    config_options.refuse_unused(options, *absent)


def _print_figures(figures: dict[str, Any] | None, report_rows: int) -> None:
    """Print sizes and perplexities that were measured when the folder was written.

    figures: the content of FIGURES; None for a folder of an earlier version, which has none.
    """
    if not figures:
        say(f"The folder has no {FIGURES}, because an earlier version wrote it.")
        return
    size, now = figures["bytes"]
    say(f"size        {size / 2**20:.1f} -> {now / 2**20:.1f} MiB ({now / size:.2f} of it)")
    if figures["perplexity"]:
        before, after = figures["perplexity"]
        of = f"on {figures['rows']} rows of {figures['data_path']} that were not calibration rows"
        say(f"perplexity  {before:.3f} -> {after:.3f} (ratio {after / before:.3f}) {of}")
    elif report_rows:
        say("perplexity  not measured when the folder was written")


def _weight_bytes(folder: Path) -> int:
    """Bytes of the weights in a model folder."""
    return sum(path.stat().st_size for path in model_files.files_of(folder))


def _settings(options: QuantizeConfig, group: int) -> dict[str, Any]:
    """The options that determine the content of the folder."""
    settings = declaration.recorded(options, options.method)
    if options.calibration == OWN_ROWS:  # folders of earlier versions do not record it
        settings.pop("calibration", None)
    return {"group_size": group, **settings}


def _published(options: QuantizeConfig) -> Path | None:
    """The file of the published text that --calibration names; None for rows of the user's own."""
    if options.calibration == OWN_ROWS:
        return None
    return calibration.file_of(options.calibration, options.calibration_path)


def _input_files(options: QuantizeConfig, source: Path, published: Path | None) -> list[Path]:
    """The files that determine the content of the folder; published: of --calibration."""
    base_files = base_model.identity_files(str(source))
    files = [*base_files["weights"], *base_files["tokenizer"]]
    if published:
        return [*files, published]
    return files if options.method == BNB else [*files, *eval_rows.files(options.data_path)]


def _layers(source: Path, config: Any) -> dict[str, tuple[int, int]]:
    """Name -> (outputs, inputs) of the layers that are quantised: all linear layers except the head."""
    bare = base_model.skeleton(str(source), config)
    head = bare.get_output_embeddings()
    linear = {name: layer for name, layer in bare.named_modules() if isinstance(layer, torch.nn.Linear)}
    return {name: tuple(layer.weight.shape) for name, layer in linear.items() if layer is not head}


def _group(options: QuantizeConfig, layers: dict[str, tuple[int, int]]) -> int:
    """How many weights share a scale; -1 means a whole row of a layer.

    Raises UserError for layers whose shapes do not fit the method or the group size.
    """
    if options.method == BNB:
        return -1
    if not layers:
        problem = f"--model_path {options.model_path}: has no linear layers."
        raise UserError(problem, "Use --method bnb, or another model.")
    fitting = [group for group in GROUPS if all(inputs % group == 0 for _, inputs in layers.values())]
    group = options.group_size if options.group_size != "auto" else (fitting or [-1])[0]
    for name, (outputs, inputs) in layers.items():
        if group != -1 and inputs % group:
            problem = f"--group_size {group}: {name} has {inputs} inputs, which is not a multiple of it."
            raise UserError(problem, f"Use {' or '.join(map(str, [*fitting, -1]))}, or auto.")
        step = OUTPUTS[options.method]
        if outputs % step or inputs % 32:
            problem = f"--method {options.method}: {name} has {inputs} inputs and {outputs} outputs;"
            raise UserError(f"{problem} they have to be multiples of 32 and {step}.", "Use --method bnb.")
    return group


def _check_weights(source: Path) -> None:
    """Raise UserError (exit 4) for weights that are not finite, with which every result would be useless."""
    tensors, done = tensor_files.of_folder(source), 0
    total = sum(tensor.size for tensor in tensors.values())
    with tensor_files.Files() as files, console.over_bytes("checking the weights") as progress:
        for name, tensor in tensors.items():
            for first, last in tensor.blocks():
                block = files.read(tensor, first, last)
                done += block.nbytes
                progress(done, total)
                if block.is_floating_point() and not torch.isfinite(block).all():
                    problem = f"{tensor.file}: {name} holds values that are not finite."
                    raise UserError(problem, "Download or convert the model again.", CHECKPOINT)
    say("weights     all values are finite")


def _rows(
    options: QuantizeConfig, source: Path, published: Path | None
) -> tuple[list[list[int]], list[EvalRow]]:
    """(token ids of the calibration rows, other rows for the perplexity), chosen by the seed.

    published: the file of --calibration, which replaces the calibration rows of --data_path.
    """
    if options.method == BNB and not options.report_rows:
        return [], []
    tokenizer = models_tokenizer.load_tokenizer(str(source))
    windows: list[list[int]] = []
    if published:
        length, count = options.cutoff_len, options.rows
        windows = calibration.windows(options.calibration, published, tokenizer, length, count, options.seed)
        title = calibration.CORPORA[options.calibration].title
        fewer = f" (not {count}: no more documents are as long)" if len(windows) < count else ""
        say(f"rows        {len(windows)} windows{fewer} of {length} tokens of {title}, from {published}")
        if not options.report_rows:
            return windows, []
    template, _ = resolve.choose_template(options.template, [], tokenizer)
    rows = eval_rows.some(options.data_path, options.cutoff_len, template, tokenizer)
    random.Random(options.seed).shuffle(rows)
    report_count = min(options.report_rows, len(rows) // 4)
    report_rows, rows = rows[:report_count], rows[report_count:]
    if published or options.method == BNB:
        return windows, report_rows
    calibration_rows = [ids for ids, _ in rows[: options.rows]]
    tokens = sum(map(len, calibration_rows))
    rows_of = f"{len(calibration_rows)} calibration rows of {options.data_path}"
    say(f"rows        {rows_of}, {tokens} tokens (template {template.name})")
    return calibration_rows, report_rows


def _by_bitsandbytes(source: Path, folder: Path, bits: int, device: str) -> None:
    dtype = hardware.choose_dtype("auto", device).value
    model = base_model.load_base(str(source), bits, dtype, device)
    model.save_pretrained(folder)


def _perplexity(folder: Path, rows: list[EvalRow], device: str, title: str) -> float | None:
    """The perplexity of these rows; None without rows. title: of the progress bar.

    A model that does not fit on the GPU as a whole is measured on the CPU. Raises UserError (exit 4) when the
    perplexity is not finite.
    """
    if not rows:
        return None
    size = _weight_bytes(folder)
    if device != "cpu" and size > models_memory.SAFETY * gpus.named(device).free_bytes():
        say(f"{title}: measured on the CPU, because {size / 2**30:.1f} GiB do not fit on {device}")
        device = "cpu"
        openmp.say_once(device)
    dtype = hardware.choose_dtype("auto", device).value
    model = base_model.load_base(str(folder), 16, dtype, device).eval()
    try:
        result = eval_rows.perplexity(model, rows, title)
    finally:
        del model
        gc.collect()
        hardware.forget_cached_memory(device)
    if not math.isfinite(result):
        problem = f"{title}: {result}, computed in {dtype} on {device}. No model was kept."
        fix = "Look for damaged weights in --model_path, or try more --bits, another --method or --device."
        raise UserError(problem, fix, CHECKPOINT)
    return result
