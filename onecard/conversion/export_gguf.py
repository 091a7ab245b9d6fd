"""A model and its adapter -> a folder of GGUF files with a Modelfile, compared with the model itself.

The folder is made under another name and renamed when it is complete and has passed the comparison.
export.json records what it holds and what it was made from, so that the same command does nothing again.
"""

import dataclasses
from pathlib import Path
from typing import Any

from onecard import errors
from onecard.config.conversion import PLAIN_TYPES, ExportConfig
from onecard.conversion import export_manifest, gguf, gguf_cache, llama_cpp_converter, modelfile
from onecard.data import encode as data_encode
from onecard.data import template as data_template
from onecard.data.template import Template
from onecard.errors import CHECKPOINT, UserError
from onecard.evaluation import parity
from onecard.inference import llama_cpp_engine, resolve
from onecard.inference.resolve import ModelRequest, ResolvedModel
from onecard.models import base_model
from onecard.runs import adapters as runs_adapters
from onecard.runs import folder as runs_folder
from onecard.runs.adapters import AdapterPath
from onecard.system import commands, hardware, hashing, output_folder, whole_folder
from onecard.system import files as system_files
from onecard.system.console import say

MODELFILE, ADAPTER = "Modelfile", "adapter.gguf"
BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.1}  # per weight; the other types need less
TALK = f"{commands.name('interaction')} can talk with it without llama.cpp."
CONTEXT = 64  # tokens of a context; loading it shows whether llama.cpp accepts the files


@dataclasses.dataclass(frozen=True)
class ExportJob:
    """What is exported, and where it goes."""

    base: Path
    adapter: Path | None
    template: Template
    tokenizer: Any
    kind: str
    output: Path
    place: Path  # the output folder, links followed
    is_own: bool  # whether it lies in the folder of the adapter, under the usual name
    eos_ids: list[int]  # tokens that end an answer, the tokenizer's first
    versions: dict[str, str]  # model_path, lora_path -> the hub's commit, where it is one

    @property
    def base_name(self) -> str:
        return f"base-{self.kind}.gguf"


def run(options: ExportConfig) -> Path:
    """Export, and return the folder with the files.

    Raises UserError: exit 2 when something else is in that folder, 4 when the files do not answer as the
    model does.
    """
    if options.output_path:  # a first look, before a model is fetched
        export_manifest.find(Path(options.output_path))
    with resolve.resolve(request(options)) as model:
        job = _job(options, model)
        say(f"base        {job.base} as {job.kind}")
        if job.adapter is None:
            say("adapter     none")
        say(f"template    {job.template.name}: {model.chosen_template[1]}")
        say(f"end tokens  {_named(job)}")
        made_from = _made_from(job)
        earlier = export_manifest.find(job.output)
        if earlier is not None and export_manifest.is_done(job.place, earlier, made_from, options.check):
            say(f"{job.output} was made from the same files before: nothing to do.")
            for name in export_manifest.edited(job.place, earlier):
                say(f"{name} was changed since then, and stays as it is.")
            say(earlier.get("check") or "It was not compared with the model.")
            return job.output
        if earlier is not None:
            say(export_manifest.replaced(job.output, earlier, made_from, job.is_own))
        _check_room(job, options)
        with output_folder.converting(job.place, job.base) as (place, _):
            folder = place / "made"
            folder.mkdir()
            with errors.remedy(TALK):
                _make(job, folder)
            with errors.remedy("Choose a --type of fewer bits, or end other programs."):
                checked = _check(job, folder, options)
            _describe(job, folder, made_from, checked)
            earlier = export_manifest.find(job.output)  # again, as others may have written there meanwhile
            if earlier is not None:
                export_manifest.replaced(job.output, earlier, made_from, job.is_own)
            whole_folder.put(folder, job.place, replaced=None if earlier is None else place / "before")
    return job.output


def request(options: ExportConfig) -> ModelRequest:
    """What resolve.py is asked for; raises UserError for several adapters."""
    listed = runs_adapters.read_list(options.lora_path)
    if len(listed) > 1:
        problem = f"--lora_path names {len(listed)} adapters, but an export takes one."
        raise UserError(problem, "Export them one after the other.")
    return ModelRequest(
        options.model_path,
        listed,
        resolve.EXPORT,
        resolve.find_folder,
        gguf_remedy=f"Name the folder that it was made from, or talk with it: {commands.name('chat')}.",
        code_remedy="Exporting runs no code of a model; training, chat and perplexity can.",
        checkpoint=options.checkpoint,
        template=options.template,
    )


def _job(options: ExportConfig, model: ResolvedModel) -> ExportJob:
    base = Path(model.base)
    adapter = model.adapters[0] if model.adapters else None
    named = _check_tokenizer(base, model.tokenizer)
    tokenizer = data_template.tokenizer_for(model.tokenizer, model.template)
    listed, kind = model.request.adapters, options.type
    output = Path(options.output_path) if options.output_path else _place(listed, model.name, kind)
    return ExportJob(
        base=base,
        adapter=adapter and adapter.folder,
        template=model.template,
        tokenizer=tokenizer,
        kind=kind,
        output=output,
        place=output_folder.find(output, export_manifest.FLAG),
        is_own=not options.output_path and output.parent == _folder(listed),
        eos_ids=list(dict.fromkeys([*data_encode.eos_ids(model.template, tokenizer), *named])),
        versions={option: str(version) for option, version in model.versions_by_option.items()},
    )


def _place(listed: list[AdapterPath], base: str, kind: str) -> Path:
    """The folder for an export that has no --output_path: inside the adapter's folder, or here."""
    folder = _folder(listed)
    if folder:
        return folder / f"{gguf.FOLDER}-{kind}"
    name = listed[0].name if listed else Path(base).name
    return Path(f"{name}-{gguf.FOLDER}-{kind}")


def _folder(listed: list[AdapterPath]) -> Path | None:
    """The adapter's folder; None for an adapter of the hub, or without one."""
    folder = Path(listed[0].path).expanduser() if listed else None
    return folder if folder and folder.is_dir() else None


def _check_tokenizer(base: Path, tokenizer: Any) -> list[int]:
    """The EOS ids in the model's settings; raises UserError (exit 4) when the tokenizer is another model's.

    The settings of a chat model often name another EOS than the tokenizer does: the end of a turn, or both.
    """
    config = base_model.load_config(str(base)).get_text_config()
    ids = set(tokenizer.get_vocab().values())
    generation = system_files.read_json(base / "generation_config.json", "Fetch or convert the model again.")
    written = [generation.get("eos_token_id")] if isinstance(generation, dict) else []
    named = [
        end for ends in [config.eos_token_id, *written] for end in (ends if type(ends) is list else [ends])
    ]
    named = [end for end in named if end is not None]
    missing = [end for end in named if type(end) is not int or end not in ids]
    problem = ""
    if max(ids) >= config.vocab_size:
        problem = f"its ids go up to {max(ids)}, but the model has {config.vocab_size} tokens"
    elif missing:
        problem = f"it has no token {missing[0]}, which the model's settings name as an end token"
    if problem:
        fix = "Put the model's own tokenizer files back, or correct config.json and generation_config.json."
        raise UserError(f"{base}: the tokenizer belongs to another model: {problem}.", fix, CHECKPOINT)
    return named


def _named(job: ExportJob) -> str:
    """The end tokens with the keys that name them in the file, for the user."""
    names = job.tokenizer.convert_ids_to_tokens(job.eos_ids)
    keys = [f"as {key}" for key in llama_cpp_converter.END_KEYS] + ["not in the file"] * len(names)
    first, *others = [" ".join(map(str, entry)) for entry in zip(job.eos_ids, names, keys, strict=False)]
    source = " (the others are the template's or the model's)" if others else ""
    return f"{first}: the tokenizer's{''.join(f', {entry}' for entry in others)}{source}"


def _made_from(job: ExportJob) -> dict[str, Any]:
    """Everything that decides what the files contain."""
    of_base, of_adapter = gguf_cache.keys(job.base, job.adapter)
    return {
        "type": job.kind,
        "of_base": of_base,
        "of_adapter": of_adapter,
        "template": job.template.texts(),
        "ends": job.eos_ids,
    }


def _check_room(job: ExportJob, options: ExportConfig) -> None:
    """Raise UserError when memory is short for the comparison, or the disk for all files at once."""
    if options.check:
        parity.check_memory(job.base)
    stored = sum(path.stat().st_size for path in job.base.glob("model*.safetensors"))
    bits16 = stored / (2 if base_model.load_config(str(job.base)).dtype == base_model.DTYPES["fp32"] else 1)
    needed = bits16 / 2 * BYTES.get(job.kind, 0.9) + (0 if job.kind in PLAIN_TYPES else bits16)
    system_files.check_room(job.place, int(needed * 1.05) + (64 << 20))


def _make(job: ExportJob, folder: Path) -> None:
    if job.kind in PLAIN_TYPES:
        gguf.base(job.base, folder / job.base_name, kind=job.kind, eos_ids=job.eos_ids)
    else:
        whole = gguf.base(job.base, folder / "whole.gguf", kind="auto", eos_ids=job.eos_ids)
        gguf.quantize(whole, folder / job.base_name, job.kind)
        whole.unlink()
    if job.adapter:
        gguf.adapter(job.adapter, job.base, folder / ADAPTER)
    text = modelfile.modelfile(job.template, job.tokenizer, job.base_name, ADAPTER if job.adapter else None)
    system_files.replace(folder / MODELFILE, text.encode())


def _check(job: ExportJob, folder: Path, options: ExportConfig) -> str | None:
    """The table of the comparison, None with --check false; raises UserError (exit 4) when a row failed."""
    threads = hardware.choose_threads(options.threads).value
    path, adapter = folder / job.base_name, folder / ADAPTER if job.adapter else None
    if not options.check:
        adapters = {"adapter": adapter} if adapter else {}
        llama_cpp_engine.Engine(path, job.tokenizer, CONTEXT, adapters, threads).close()
        say("Not compared with the model (--check false).")
        return None
    say("Comparing with transformers in fp32 ...")
    expected = parity.reference(job.base, job.adapter, job.template, job.tokenizer)
    rows = parity.compare(expected, job.kind, path, adapter, job.template, job.tokenizer, threads)
    text = parity.table(rows)
    say(text)
    failed = [row.name for row in rows if row.failed]
    if failed:
        problem = f"As {job.kind} the files differ too much from the model: {', '.join(failed)}."
        problem += " Nothing was kept."
        fix = "Use a larger --type" if failed == ["perplexity"] else "Keep it nevertheless"
        raise UserError(
            problem, f"{fix}{', or' if failed == ['perplexity'] else ''} with --check false.", CHECKPOINT
        )
    return text


def _describe(job: ExportJob, folder: Path, made_from: dict[str, Any], checked: str | None) -> None:
    """Write export.json, the last file."""
    files = {path.name: hashing.sha256(path) for path in sorted(folder.iterdir())}
    values = {
        "base": job.base_name,
        "adapter": ADAPTER if job.adapter else None,
        **made_from,
        "made_with": export_manifest.made_with(),
        "check": checked,
        "versions": job.versions,
        "files": files,
    }
    system_files.write_json(folder / runs_folder.EXPORT, values)
