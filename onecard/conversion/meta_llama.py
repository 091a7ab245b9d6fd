"""Converts LLaMA folders between the original layout and that of transformers, and between numbers of files.

A child process with limits reads the files in blocks. So a hostile file cannot run code, and the memory is a
few blocks for a model of any size. This process checks the result and then makes the folder visible at once.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from onecard.config import declaration
from onecard.config import options as config_options
from onecard.config.conversion import NOT_TOKENIZER_ONLY, TO_HF, ConvertConfig
from onecard.conversion import meta_files, meta_layout, meta_tokenizer
from onecard.errors import CHECKPOINT, UserError
from onecard.hub import model_files
from onecard.system import files as system_files
from onecard.system import output_folder, sandbox
from onecard.system import safetensors as system_safetensors
from onecard.system.console import Progress, say

FLAG = "--output_dir"
WEIGHTS, TOKENIZER = "weights", "tokenizer"
# modules of the child processes; the first is not imported here, because it imports torch
MODULES = {WEIGHTS: "onecard.conversion.meta_weights", TOKENIZER: meta_tokenizer.__name__}
SMALL = 64 << 20  # bytes for tokenizer and settings
Work = Callable[[dict[str, Any], Callable[[dict[str, Any]], None], int], None]


def in_child(request: dict[str, Any], report: Callable[[dict[str, Any]], None], keep: int) -> None:
    """Do one step, WEIGHTS or TOKENIZER, in a child process; report(message) takes what it says on the way.

    keep: a file descriptor that stays open in the child.
    """
    sandbox.work(MODULES[request["step"]], request, report, keep)


def run(options: ConvertConfig, progress: Progress, work: Work = in_child) -> None:
    """Convert a folder. progress(done, total) gets bytes; work: does one step, as in_child does.

    Raises UserError: exit 2 for wrong options and folders, 4 for files that are damaged, missing or do not
    fit, 6 when the memory does not suffice, 7 when the disk does not, 8 for a file that could run code.
    """
    if options.tokenizer_only:
        config_options.refuse_unused(options, NOT_TOKENIZER_ONLY)
    source, target = Path(options.input_dir), Path(options.output_dir)
    if not source.is_dir():
        raise UserError(f"--input_dir {source}: no such folder.", "Name the folder of a LLaMA model.")
    output_folder.check_apart(source, target, ("--input_dir", FLAG))
    if options.num_shards and options.to == TO_HF:
        raise UserError("--num_shards only works with --to meta.", "Leave it out.")
    if not options.tokenizer_only and meta_files.layout_of(source) == options.to == TO_HF:
        raise UserError(f"--input_dir {source} has the layout of transformers already.", "Use --to meta.")
    files = [] if options.tokenizer_only else meta_files.weight_files(source)
    shards = (options.num_shards or 1) if options.to != TO_HF else None
    settings = {"num_shards": shards, **declaration.recorded(options, options.to)}
    small = [meta_files.PARAMS, model_files.MODEL_CONFIG, "tokenizer.model", "original/tokenizer.model"]
    beside = [path for path in map(source.joinpath, [*small, "../tokenizer.model"]) if path.is_file()]
    made_of = output_folder.record("convert_llama", settings, [*files, *beside])
    if output_folder.is_made(target, made_of, FLAG):
        say(f"{target} was made from the same files (by size and time), so there is nothing to do.")
        return
    # the original layout holds a tied head once more; a quarter of the weights is more than enough for it
    needed = sum(path.stat().st_size for path in files) * 5 // 4 + SMALL
    with output_folder.making(target, needed, made_of, FLAG) as (place, lock):
        request = {
            "source": str(source.resolve()),
            "folder": str(place),
            "to": options.to,
            "num_shards": shards,
            # bytes of address space: the largest file is mapped when its table of contents is read or written
            "limit": max([path.stat().st_size for path in files] + [needed // (shards or needed)]),
        }
        _fill(request, place, options.tokenizer_only, lock, progress, work)
    say(f"The converted model is in {target}.")


def _fill(
    request: dict[str, Any],
    place: Path,
    tokenizer_only: bool,
    lock: int,
    progress: Progress,
    work: Work,
) -> None:
    to, state, tokenizer_report = request["to"], {}, {}
    if tokenizer_only:
        source = Path(request["source"])
        path = meta_tokenizer.find(source, beside=not (source / model_files.MODEL_CONFIG).is_file())
        say(f"tokenizer   {path} ({meta_tokenizer.kind(path)})")
        step = {"step": TOKENIZER, "tokenizer": str(path), "length": None, "later": False}
        work({**request, **step}, tokenizer_report.update, lock)
        return

    def report(message: dict[str, Any]) -> None:
        state.update(message)
        if "done" in message:
            progress(message["done"], state["size"])
        if "shape" in message:
            _say_found(message, to)
            length, later = message["shape"]["length"], bool(message["shape"]["scaling"])
            step = {"step": TOKENIZER, "tokenizer": message["tokenizer"], "length": length, "later": later}
            state["waiting"] = beside.submit(work, {**request, **step}, tokenizer_report.update, lock)

    with ThreadPoolExecutor(1) as beside:  # for the tokenizer's process, while the weights are written
        work({**request, "step": WEIGHTS}, report, lock)
        state["waiting"].result()
    shape = meta_layout.Shape(**state["shape"])
    if to == TO_HF:
        _check_headers(place, shape, state["tied"])
        settings = meta_layout.to_config(shape, state["dtype"], state["tied"], tokenizer_report["ids"])
        system_files.write_json(place / model_files.MODEL_CONFIG, settings)
        ids = {name: tokenizer_report["ids"][name] for name in ("bos_token_id", "eos_token_id")}
        system_files.write_json(place / "generation_config.json", {"_from_model_config": True, **ids})
    else:
        system_files.write_json(place / meta_files.PARAMS, meta_layout.to_params(shape))
    say(f"written     {state['written'] / 2**30:.2f} GiB of weights")


def _say_found(message: dict[str, Any], to: str) -> None:
    say(f"tokenizer   {message['tokenizer']} ({message['kind']})")
    for line in message["notes"]:
        say(f"note        {line}")
    if to == TO_HF and not message["length_is_said"]:
        length = message["shape"]["length"]
        reason = f"derived from other settings, because {meta_files.PARAMS} does not say it"
        say(f"context     {length} tokens ({reason})")
    if to != TO_HF:
        say(f"embedding   cut along its {'tokens, as in LLaMA 3' if message['cut'] == 0 else 'width'}")


def _check_headers(place: Path, shape: meta_layout.Shape, tied: bool) -> None:
    """Raise UserError (exit 4) unless the files hold the tensors that config.json promises.

    The child process may have read a hostile file, so its word is not trusted.
    """
    expected = {weight.hf: list(weight.shape) for weight in meta_layout.weights(shape, 0)}
    if tied:
        del expected["lm_head.weight"]
    written = {}
    for path in model_files.files_of(place):
        written |= {name: entry["shape"] for name, entry in system_safetensors.read(path)[1].items()}
    if written != expected:
        problem = f"{place}: the files do not hold the tensors that were planned."
        raise UserError(problem, "Check the disk, and the model's files.", CHECKPOINT)
