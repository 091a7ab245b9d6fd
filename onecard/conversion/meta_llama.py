"""LLaMA folders from the original layout to transformers', back, and into other numbers of shards.

The files are read by a child process with limits, in blocks: hostile ones run nothing, and memory is a few
blocks whatever the size of the model. This process checks what came out and makes it visible, as a whole.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from onecard.config import options as config_options
from onecard.config.tools import ConvertConfig
from onecard.conversion import meta_layout, meta_tokenizer
from onecard.conversion.meta_layout import TO_HF
from onecard.errors import CHECKPOINT, UserError
from onecard.hub import model_files
from onecard.system import files as system_files
from onecard.system import output_folder, sandbox
from onecard.system import safetensors as safetensors_file
from onecard.system.console import Progress, say

FLAG = "--output_dir"
WEIGHTS, TOKENIZER = "weights", "tokenizer"
# each a process; the first is not imported here, as it brings torch
MODULES = {WEIGHTS: "onecard.conversion.meta_weights", TOKENIZER: meta_tokenizer.__name__}
SMALL = 64 << 20  # bytes for tokenizer and settings
Work = Callable[[dict[str, Any], Callable[[dict[str, Any]], None], int], None]


def in_child(request: dict[str, Any], told: Callable[[dict[str, Any]], None], keep: int) -> None:
    sandbox.work(MODULES[request["step"]], request, told, keep)


def run(options: ConvertConfig, progress: Progress, work: Work = in_child) -> None:
    """Convert a folder; progress(done, all) in bytes; work: how the files are read.

    Raises UserError: exit 2 for options and folders, 4 for files that are damaged, missing or do not fit, 6
    without memory, 7 without room, 8 for a file that would run code.
    """
    if options.tokenizer_only:
        config_options.refuse_idle(options, {"num_shards": "for weights, not for --tokenizer_only"})
    source, target = Path(options.input_dir), Path(options.output_dir)
    if not source.is_dir():
        raise UserError(f"--input_dir {source}: no such folder.", "Name the folder of a LLaMA model.")
    output_folder.check_apart(source, target, ("--input_dir", FLAG))
    if options.num_shards and options.to == TO_HF:
        raise UserError("--num_shards is for --to meta.", "transformers' files are cut by their size.")
    if not options.tokenizer_only and meta_layout.layout_of(source) == options.to == TO_HF:
        raise UserError(f"--input_dir {source}: is in that layout already.", "Use --to meta.")
    files = [] if options.tokenizer_only else meta_layout.weight_files(source)
    shards = (options.num_shards or 1) if options.to != TO_HF else None
    settings = {"to": options.to, "num_shards": shards, "tokenizer_only": options.tokenizer_only}
    small = [meta_layout.PARAMS, model_files.MODEL_CONFIG, "tokenizer.model", "original/tokenizer.model"]
    beside = [path for path in map(source.joinpath, [*small, "../tokenizer.model"]) if path.is_file()]
    made_of = output_folder.record("convert_llama", settings, [*files, *beside])
    if output_folder.is_made(target, made_of, FLAG):
        say(f"{target} is there already, made of the same files, by sizes and times: nothing to do.")
        return
    # a tied head is written once more in the original layout; twice the embedding would be far too much
    needed = sum(path.stat().st_size for path in files) * 5 // 4 + SMALL
    with output_folder.making(target, needed, made_of, FLAG) as (place, lock):
        request = {
            "source": str(source.resolve()),
            "folder": str(place),
            "to": options.to,
            "num_shards": shards,
            # of address space: the largest file is mapped to read its table of contents, or to write it
            "limit": max([path.stat().st_size for path in files] + [needed // (shards or needed)]),
        }
        _fill(request, place, options.tokenizer_only, lock, progress, work)
    say(f"{target} is whole.")


def _fill(
    request: dict[str, Any],
    place: Path,
    tokenizer_only: bool,
    lock: int,
    progress: Progress,
    work: Work,
) -> None:
    to, told, tokens = request["to"], {}, {}
    if tokenizer_only:
        source = Path(request["source"])
        path = meta_tokenizer.find(source, beside=not (source / model_files.MODEL_CONFIG).is_file())
        say(f"tokenizer   {path} ({meta_tokenizer.kind(path)})")
        alone = {"step": TOKENIZER, "tokenizer": str(path), "length": None, "later": False}
        work({**request, **alone}, tokens.update, lock)
        return

    def report(news: dict[str, Any]) -> None:
        told.update(news)
        if "done" in news:
            progress(news["done"], told["size"])
        if "shape" in news:
            _say_found(news, to)
            length, later = news["shape"]["length"], bool(news["shape"]["scaling"])
            more = {"step": TOKENIZER, "tokenizer": news["tokenizer"], "length": length, "later": later}
            told["waiting"] = beside.submit(work, {**request, **more}, tokens.update, lock)

    with ThreadPoolExecutor(1) as beside:  # the tokenizer's process, while the weights go by
        work({**request, "step": WEIGHTS}, report, lock)
        told["waiting"].result()
    shape = meta_layout.Shape(**told["shape"])
    if to == TO_HF:
        _check_headers(place, shape, told["tied"])
        settings = meta_layout.to_config(shape, told["dtype"], told["tied"], tokens["ids"])
        system_files.write_json(place / model_files.MODEL_CONFIG, settings)
        ids = {name: tokens["ids"][name] for name in ("bos_token_id", "eos_token_id")}
        system_files.write_json(place / "generation_config.json", {"_from_model_config": True, **ids})
    else:
        system_files.write_json(place / meta_layout.PARAMS, meta_layout.to_params(shape))
    say(f"written     {told['written'] / 2**30:.2f} GiB of weights")


def _say_found(news: dict[str, Any], to: str) -> None:
    say(f"tokenizer   {news['tokenizer']} ({news['kind']})")
    for line in news["said"]:
        say(f"found       {line}")
    if to == TO_HF and not news["length_is_said"]:
        length = news["shape"]["length"]
        say(f"context     {length} tokens: by its other settings, {meta_layout.PARAMS} does not say it")
    if to != TO_HF:
        say(f"embedding   cut along its {'tokens, as LLaMA 3 has it' if news['cut'] == 0 else 'width'}")


def _check_headers(place: Path, shape: meta_layout.Shape, tied: bool) -> None:
    """Whether the child wrote the tensors that config.json promises; this process trusts only the headers."""
    wanted = {weight.hf: list(weight.shape) for weight in meta_layout.weights(shape, 0)}
    if tied:
        del wanted["lm_head.weight"]
    found = {}
    for path in model_files.files_of(place):
        found |= {name: entry["shape"] for name, entry in safetensors_file.read(path)[1].items()}
    if found != wanted:
        raise UserError(f"{place}: other tensors were written than planned.", "Check the disk.", CHECKPOINT)
