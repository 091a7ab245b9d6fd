"""Everything that the programs write, made from tiny inputs in this process: WRITERS, by name.

A writer gets Inputs and a place, and writes below place/new. Work that a program gives to a child process is
done in this process (the conversion of LLaMA layouts), or by a converter that writes a few bytes (GGUF): what
a child wrote, the program syncs itself.
"""

import dataclasses
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onecard.config import options as config_options
from onecard.config.chat import ChatConfig
from onecard.config.conversion import ConvertConfig
from onecard.config.training import ContinueConfig, FinetuneConfig
from onecard.conversion import gguf_cache, llama_cpp_converter, meta_llama, meta_tokenizer, meta_weights
from onecard.data import pickled_rows
from onecard.hub import demo, download, manifest
from onecard.inference import llama_cpp_engine
from onecard.programs import (
    check_data,
    export_gguf,
    extend_vocab,
    json_to_parquet,
    merge_lora,
    prepare_base_model,
    quantize,
)
from onecard.runs import folder as runs_folder
from onecard.runs import jobs
from onecard.training import loop, metrics, wandb_run
from onecard.ui import terminal_commands
from tests.support import bad_hub, chat_fakes, meta_llama_reference, small_runs, tiny

NEW = "new"  # all outputs are below this folder
OLDER = b"older"  # the content of files that a program replaces
HUB = {"config.json": b'{"model_type": "llama"}', "a/b/model.safetensors": bytes(3000), "README.md": b"hello"}


@dataclasses.dataclass
class Inputs:
    """What the programs read."""

    model: Path
    adapter: Path
    rows: Path
    text: Path
    original: Path  # a LLaMA model in its original layout
    patch: pytest.MonkeyPatch


@dataclasses.dataclass(frozen=True)
class Writer:
    """A program, and how its output is recognised as whole.

    run: gets the inputs and place/new. folders: folder -> the file that makes it whole, None where the folder
    itself does. lines: files that grow by whole lines. older: files that are there before, and are replaced;
    before: writes more that is there before.
    """

    run: Callable[[Inputs, Path], None]
    folders: dict[str, str | None] = dataclasses.field(default_factory=dict)
    lines: tuple[str, ...] = ()
    older: tuple[str, ...] = ()
    before: Callable[[Inputs, Path], None] | None = None


def inputs(folder: Path, model: Path, patch: pytest.MonkeyPatch) -> Inputs:
    """Write the inputs into `folder`, and put the stand-ins in the place of the children."""
    patch.setenv("ONECARD_CACHE", str(folder / "cache"))
    patch.setattr(llama_cpp_converter, "run", few_bytes)
    patch.setattr(llama_cpp_converter, "home", Path)
    patch.setattr(llama_cpp_engine, "Engine", NoEngine)
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    patch.setattr(jobs.commands, "child", lambda _: (["true"], None))
    rows, text = folder / "rows.json", folder / "text.txt"
    rows.write_text(json.dumps([*tiny.rows(24), {"instruction": "", "input": "", "output": ""}]))
    text.write_text("红红红红红 red" * 9, encoding="utf-8")
    adapter = small_runs.trained(model, rows, folder / "run", no_answers, max_steps=1, skip_bad_rows=True)
    original = folder / "original"
    vocabulary = meta_llama_reference.sentencepiece(folder / "tokenizer.model", 392)
    settings = meta_llama_reference.params(vocab=vocabulary)
    weights = meta_llama_reference.weights(settings, vocabulary, torch.bfloat16, False)
    meta_llama_reference.save(original, settings, meta_llama_reference.cut(weights, 2, 1))
    (folder / "tokenizer.model").rename(original / "tokenizer.model")
    return Inputs(model, adapter, rows, text, original, patch)


def no_answers(*_: Any) -> list[str]:
    return []


def one_answer(_model: Any, _tokenizer: Any, _template: Any, prompts: list[Any], _longest: int) -> list[str]:
    return ["red"] * len(prompts)


def few_bytes(arguments: list[Any], *_: Any) -> None:
    """A converter whose file nothing reads."""
    Path(arguments[arguments.index("--outfile") + 1]).write_bytes(b"GGUF" * 2000)


class NoEngine:
    """An engine that opens every file."""

    def __init__(self, *_: Any):
        self.close = lambda: None


def train(given: Inputs, new: Path) -> None:
    small_runs.trained(
        given.model,
        given.rows,
        new / "runs/first",
        one_answer,
        **{"max_steps": 2, "sample_steps": 1, "save_total_limit": 1, "skip_bad_rows": True},
    )


def train_all(given: Inputs, new: Path) -> None:
    small_runs.trained(
        given.model, given.rows, new / "runs/first", no_answers, **{**ALL, "max_steps": 2, "num_epochs": 1}
    )


def go_on_earlier(given: Inputs, new: Path) -> None:
    """From step 2 of a run that has log lines, answers and a checkpoint of later steps."""
    options = {"resume_from_checkpoint": str(new / "runs/first/checkpoint-2")}
    loop.go_on(
        config_options.build(ContinueConfig, options),
        frozenset({"resume_from_checkpoint"}),
        sample=one_answer,
        draw=metrics.loss_curve,
    )


def stopped_run(given: Inputs, new: Path) -> None:
    """A run of 4 steps that a kill has stopped after its last checkpoint, before it published anything."""
    steps = {"max_steps": 4, "save_steps": 2, "sample_steps": 3, "skip_bad_rows": True}
    run = small_runs.trained(given.model, given.rows, new / "runs/first", one_answer, **steps)
    for name in (runs_folder.FINISHED, "adapter_config.json", "adapter_model.safetensors"):
        (run / name).unlink()


def begin_wandb(given: Inputs, new: Path) -> None:
    """The id of a W&B run, without the package and its service."""
    run = SimpleNamespace(define_metric=lambda *_, **__: None, summary={})
    module = SimpleNamespace(init=lambda **_: run, errors=SimpleNamespace(Error=OSError))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", module)
        patch.setattr(wandb_run, "check", lambda: None)
        wandb_run.start(new, {})


def make_demo(given: Inputs, new: Path) -> None:
    """The demo model in the cache, without pip and a conversion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_download_gguf", lambda place: place)
        patch.setattr(demo, "_convert", lambda gguf, place: shutil.copytree(given.model, place))
        demo.make_demo(new / "models/demo")


def go_on(name: str, given: Inputs, new: Path) -> None:
    """The same command once more, or for a run that has begun the one that continues it."""
    run = new / "runs/first"
    if name == "train" and (run / runs_folder.CONFIG).exists():
        options = config_options.build(ContinueConfig, {"output_path": str(run)})
        loop.go_on(options, frozenset(), sample=one_answer, draw=metrics.loss_curve)
    else:
        WRITERS[name].run(given, new)


def convert(source: Path, target: Path, to: str) -> None:
    def work(request: dict[str, Any], report: Any, _: int) -> None:
        module = meta_weights if request["step"] == meta_llama.WEIGHTS else meta_tokenizer
        module.work({**request, "limit": 0}, lambda **message: report(message))

    options = ConvertConfig(input_dir=str(source), output_dir=str(target), to=to)
    meta_llama.run(options, lambda done, total: None, work)


def to_original(given: Inputs, new: Path) -> None:
    """From a folder of transformers that is no output of this test."""
    source = given.original.with_name("converted")
    if not source.is_dir():
        convert(given.original, source, "hf")
    convert(source, new / "original", "meta")


def check(given: Inputs, new: Path) -> None:
    names = {"clean": "clean.jsonl", "html": "report.html", "png": "lengths.png"}
    given_paths = [f"--{name}={new / file}" for name, file in names.items()]
    check_data.main([f"--data_path={given.rows}", f"--model_path={given.model}", *given_paths])


def fetch(given: Inputs, new: Path) -> None:
    with bad_hub.serving(bad_hub.hub_of(HUB)) as hub:
        bad_hub.download(hub, new / "hub/model", files="*")


def convert_pickle(given: Inputs, new: Path) -> None:
    source = given.rows.with_name("rows.pkl")
    source.write_bytes(pickle.dumps(tiny.rows(9)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONECARD_CACHE", str(new / "cache"))
        pickled_rows.convert_to_jsonl(source)


def convert_for_chat(given: Inputs, new: Path) -> None:
    """The GGUF files that a chat with llama.cpp keeps in the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONECARD_CACHE", str(new / "cache"))
        gguf_cache.for_llama(given.model, {"one": given.adapter})


def save_chat(given: Inputs, new: Path) -> None:
    chat = chat_fakes.Scripted(lambda _: iter(()))
    session = SimpleNamespace(
        turns=[{"question": "?", "answer": "!"}],
        settings=ChatConfig(),
        chat=chat,
        active_adapters=chat.active_adapters,
        template_name="",
    )
    for _ in range(2):
        terminal_commands.save(session, str(new / "chat.jsonl"))


def start_job(given: Inputs, new: Path) -> None:
    rows = jobs.keep_upload(given.rows, new / "workspace")
    options = config_options.build(FinetuneConfig, {"data_path": str(rows)})
    jobs.start(new / "workspace", "first", options)


def by_main(program: Any, *names: str, **fixed: Any) -> Callable[[Inputs, Path], None]:
    """A writer that calls a program with options; names: inputs, as OPTION=FIELD; fixed: OPTION=VALUE.

    The option output_path is fixed["output_path"] below place/new.
    """

    def run(given: Inputs, new: Path) -> None:
        fields = dict(name.split("=") for name in names)
        values = {option: getattr(given, field) for option, field in fields.items()}
        values |= {**fixed, "output_path": new / fixed["output_path"]}
        program.main([f"--{option}={value}" for option, value in values.items()])

    return run


ALL = {"train_what": "full", "skip_bad_rows": True, "learning_rate": 1e-3}
ADAPTED = ("model_path=model", "lora_path=adapter")
WRITERS = {
    "train": Writer(train, {"runs/first": runs_folder.FINISHED}, ("log.jsonl", "samples.jsonl")),
    "train all weights": Writer(train_all, {"runs/first": runs_folder.FINISHED}),
    "go on from an earlier step": Writer(
        go_on_earlier, {"runs/first": runs_folder.FINISHED}, before=stopped_run
    ),
    "begin a W&B run": Writer(begin_wandb),
    "make the demo": Writer(make_demo, {"models/demo": None}),
    "merge": Writer(by_main(merge_lora, *ADAPTED, output_path="a/merged"), {"a/merged": None}),
    "convert to transformers": Writer(
        lambda given, new: convert(given.original, new / "a/converted", "hf"), {"a/converted": None}
    ),
    "convert to the original layout": Writer(to_original, {"original": None}),
    "quantize": Writer(
        by_main(
            quantize, "model_path=model", output_path="a/quantized", method="bnb", device="cpu", report_rows=0
        ),
        {"a/quantized": None},
    ),
    "export": Writer(
        by_main(export_gguf, *ADAPTED, output_path="a/gguf", check="false", template="alpaca"),
        {"a/gguf": None},
    ),
    "extend the vocabulary": Writer(
        by_main(extend_vocab, "model_path=model", "characters=text", output_path="a/vocabulary"),
        {"a/vocabulary": None},
    ),
    "prepare a base": Writer(
        by_main(prepare_base_model, "model_path=model", output_path="a/prepared"), {"a/prepared": None}
    ),
    "download": Writer(fetch, {"hub/model": manifest.NAME}),
    "copy the demo": Writer(
        lambda given, new: download._demo(given.model, new / "a/demo", False), {"a/demo": manifest.NAME}
    ),
    "write Parquet": Writer(
        by_main(json_to_parquet, "data_path=rows", output_path="rows.parquet"), older=("rows.parquet",)
    ),
    "check": Writer(check, older=("clean.jsonl", "clean.dropped.jsonl", "report.html", "lengths.png")),
    "convert a pickle": Writer(convert_pickle),
    "convert for a chat": Writer(convert_for_chat),
    "save a chat": Writer(save_chat, lines=("chat.jsonl",)),
    "start a job": Writer(start_job, lines=(".console-first.txt",)),
}


TRAININGS = ("train", "train all weights", "go on from an earlier step")
CHATS = ("save a chat",)
PROGRAMS: dict[str, tuple[str, ...]] = {  # sub-command -> its writers; () for one that writes no output
    "finetune": ("train", "train all weights", "begin a W&B run", "convert a pickle", "make the demo"),
    "continue": TRAININGS,
    "generate": CHATS,
    "interaction": (*CHATS, "start a job"),
    # SQLite syncs the database of keys itself, and tests/serving/test_blobs.py has the files beside it
    "serve": ("convert for a chat",),
    "keys": (),
    "chat": (*CHATS, "convert for a chat"),
    "check-data": ("check",),
    "download": ("download", "copy the demo", "make the demo"),
    "convert": ("convert to transformers", "convert to the original layout"),
    "merge": ("merge",),
    "quantize": ("quantize",),
    "export-gguf": ("export",),
    "perplexity": (),
    "extend-vocab": ("extend the vocabulary",),
    "prepare-base": ("prepare a base",),
    "json-to-parquet": ("write Parquet",),
}


def prepare(name: str, place: Path, given: Inputs) -> Path:
    """Write what is there before the program runs; returns place/new."""
    new = place / NEW
    if before := WRITERS[name].before:
        before(given, new)
    if WRITERS[name].older or name in ("save a chat", "begin a W&B run"):  # these programs create no folder
        new.mkdir()
    for file in WRITERS[name].older:
        (new / file).write_bytes(OLDER)
    return new
