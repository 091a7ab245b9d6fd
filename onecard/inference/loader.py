"""Options of chatting -> an engine with its model and adapters in memory.

It chooses bits, device and dtype, and says why; it does not know conversations.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from onecard import errors
from onecard.config.chat import ChatConfig
from onecard.config.generation import BASE, ActiveAdapters
from onecard.config.options import flag, memory_of_cards
from onecard.data import template as templates
from onecard.data.template import Template
from onecard.errors import UserError
from onecard.hub import locate, remote_code, revisions
from onecard.hub.manifest import DEMO
from onecard.inference import engine as engines
from onecard.inference import llama_cpp as llama_cpp_library
from onecard.inference import llama_cpp_engine, resolve, transformers_engine
from onecard.models import adapter as models_adapter
from onecard.models import base_model, quantized
from onecard.models import memory as model_memory
from onecard.models import tokenizer as models_tokenizer
from onecard.runs import adapters as run_adapters
from onecard.runs.adapters import GGUF, Adapter
from onecard.system import commands, hardware
from onecard.system.console import say
from onecard.system.hardware import Choice

ToGguf = Callable[[Path, dict[str, Path]], tuple[Path, dict[str, Path]]]
LLAMA = "llama.cpp"
UNUSED_BY_LLAMA = {  # option -> values that ask for nothing
    "bits": ("auto",),
    "load_8bit": (False,),
    "device": ("auto", "cpu"),
    "dtype": ("auto",),
    "card_memory": (None,),
}


@dataclasses.dataclass
class Found:
    """What is known before a weight is read: enough to lay out a page."""

    options: ChatConfig
    kind: type[transformers_engine.Engine] | type[llama_cpp_engine.Engine]
    base: str
    device: Choice
    adapters: list[Adapter]
    tokenizer: PreTrainedTokenizerBase
    template: Template
    active_adapters: ActiveAdapters  # those that answer unless a question names others
    keep: tempfile.TemporaryDirectory[str]  # of adapters that were written in peft's form
    code: remote_code.Consent | None = None  # to run Python code of the base's own
    versions: dict[str, str] = dataclasses.field(default_factory=dict)  # of base and adapters of the hub


class Loaded(NamedTuple):
    """What a Chat is made of."""

    engine: engines.Engine
    tokenizer: PreTrainedTokenizerBase
    template: Template
    active_adapters: ActiveAdapters  # those that answer unless a question names others
    versions: dict[str, str]  # owner/name@COMMIT of the base and of adapters that come from the hub


def load(options: ChatConfig, to_gguf: ToGguf, exact: bool = False) -> Loaded:
    """An engine with its model in memory, and what it is used with; raises UserError.

    to_gguf: model and adapter folders -> files for llama.cpp; exact: for measuring, in fp32 where that is
    free to choose.
    """
    found = look(options)
    engine = engine_of(found, to_gguf, exact)
    return Loaded(engine, found.tokenizer, found.template, found.active_adapters, found.versions)


def look(options: ChatConfig) -> Found:
    """Find and check what the options name, without reading weights of the base; raises UserError."""
    listed = run_adapters.read_list(options.lora_path)
    keep = tempfile.TemporaryDirectory(prefix="onecard-adapters-")
    found = [run_adapters.find(path, name, options.checkpoint, Path(keep.name)) for name, path, _ in listed]
    base = _base(options, found)
    for note in [note for source in found for note in source.notes]:
        say(note)
    adapters = [source for source in found if not source.whole]
    is_llama = options.engine == LLAMA or (options.engine == "auto" and base.endswith(GGUF))
    kind = llama_cpp_engine.Engine if is_llama else transformers_engine.Engine
    device = Choice("cpu", "llama.cpp's") if is_llama else _device(options.device)
    _check(options, base, adapters, is_llama)
    code = remote_code.ask(base, options.remote_code)
    base = str(code.folder) if code else base
    is_file = base.endswith(GGUF)
    tokenizer = (
        llama_cpp_library.tokenizer_of(Path(base)) if is_file else models_tokenizer.load_tokenizer(base, code)
    )
    for recorded in dict.fromkeys(source.record for source in found):
        revisions.compare(recorded, base)
    for source in adapters:
        say(f"adapter     {source.name}: {source.origin}")
    template, why = resolve.choose_template(options.template, found, tokenizer)
    say(f"template    {template.name}: {why}")
    weighed = tuple((name, 1.0 if weight is None else weight) for name, _, weight in listed)
    active_adapters = weighed if adapters else ()
    # several are there to choose from; weights that are given say that they answer together
    together = any(weight is not None for _, _, weight in listed)
    active_adapters = active_adapters if together else active_adapters[:1]
    places = {BASE: Path(base), **{source.name: source.origin for source in adapters}}
    versions = {name: str(version) for name, path in places.items() if (version := revisions.of(path))}
    return Found(
        options, kind, base, device, adapters, tokenizer, template, active_adapters, keep, code, versions
    )


def engine_of(found: Found, to_gguf: ToGguf, exact: bool = False) -> engines.Engine:
    """The engine with its model and adapters in memory; raises UserError."""
    is_llama = found.kind is llama_cpp_engine.Engine
    engine: engines.Engine = _llama(found, to_gguf, exact) if is_llama else _transformers(found, exact)
    found.keep.cleanup()  # read into memory, then not needed
    return engine


def _check(options: ChatConfig, base: str, adapters: list[Adapter], is_llama: bool) -> None:
    """Raise UserError for options that this engine or file cannot have."""
    for path in (base, *(str(source.folder) for source in adapters)):
        if not is_llama and path.endswith(GGUF):
            raise UserError(f"--engine transformers: {path} is for llama.cpp.", "Use --engine llama.cpp.")
    if is_llama and options.rope_scaling != "none":
        problem = "llama.cpp has no rope scaling of its own."
        raise UserError(problem, "Leave it out: a GGUF file carries its own, and --context makes use of it.")
    if is_llama and options.remote_code:
        problem = "--remote_code is for the transformers engine: llama.cpp runs no code of a model."
        raise UserError(problem, "Leave it out.")
    for name, plain in UNUSED_BY_LLAMA.items():
        if is_llama and getattr(options, name) not in plain:
            problem = f"{flag(options, name)}: llama.cpp takes the file as it is, on the processor."
            raise UserError(
                problem, f"Leave it out; {commands.name('export-gguf')} --type makes files of fewer bits."
            )
    for source in adapters:
        with errors.remedy(remote_code.READ_FIRST):
            remote_code.check_same(str(source.origin), source.fingerprints, options.remote_code)
    folders = [source.folder for source in adapters if not source.is_gguf]
    if base.endswith(GGUF) and folders:
        problem = f"{base}: the adapter {folders[0]} is no .gguf file."
        fix = f"Make it one with {commands.name('export-gguf')}, or name the base's folder with --model_path."
        raise UserError(problem, fix)
    if base.endswith(GGUF) and not Path(base).is_file():
        raise UserError(f"--model_path {base}: no such file.", "Name a .gguf file.")


def _base(options: ChatConfig, found: list[Adapter]) -> str:
    """The base model: asked for, trained whole, or what an adapter was trained on."""
    whole = [source for source in found if source.whole]
    if whole and (len(found) > 1 or options.model_path):
        problem = f"--lora_path {whole[0].folder}: a whole model, no adapter."
        raise UserError(problem, "Give it alone, as --model_path or --lora_path.")
    if whole:
        return str(whole[0].folder)
    named = [source for source in found if source.base]
    if not options.model_path and len({_place(str(source.base), options.engine) for source in named}) > 1:
        told = ", ".join(f"{source.name} on {source.base}" for source in named)
        problem = f"--lora_path: the adapters were trained on different base models: {told}."
        raise UserError(problem, "Talk with one of them, or say with --model_path which base they share.")
    if not (options.model_path or named) and any(source.is_gguf for source in found):
        problem = f"--lora_path {found[0].folder}: a GGUF adapter does not say its base model."
        raise UserError(problem, "Name it with --model_path.")
    name = resolve.base_of(named[0] if named else None, options.model_path) or DEMO
    return remote_code.place(name, options.remote_code) or locate.for_engine(options.engine)(name)


def _place(base: str, engine: str) -> str:
    """Two names of one folder are the same base; nothing is fetched to find out."""
    find = locate.for_engine(engine)
    at_hand = None if base == DEMO or Path(base).exists() else revisions.at_hand(base)
    folder = Path(at_hand or (find(base) if resolve.is_here(base) else base)).expanduser()
    return str(folder.resolve()) if folder.is_dir() else base


def _transformers(found: Found, exact: bool) -> transformers_engine.Engine:
    import torch

    options, base, device = found.options, found.base, found.device
    dtype = Choice("fp16", "Apple's cards") if device.value == "mps" and options.dtype == "auto" else None
    if exact and device.value == "cpu" and options.dtype == "auto":
        dtype = Choice("fp32", "to be compared")
    dtype = dtype or hardware.choose_dtype(options.dtype, "cuda:0" if device.value == "all" else device.value)
    config = base_model.load_config(base, found.code)
    bits = _bits(found, config, device.value, dtype.value)
    say(f"base        {base}, {bits.value} bits: {bits.reason}")
    say(f"device      {device.value} ({device.reason}), arithmetic {dtype.value}: {dtype.reason}")
    if options.rope_scaling != "none":
        config = base_model.stretched(base, config, options.rope_scaling, options.rope_factor)
    own = getattr(config.get_text_config(), "max_position_embeddings", None) or 2048
    if options.context and options.context > own and not exact:
        problem = f"--context {options.context}: the model's context has {own} tokens."
        raise UserError(problem, "Use fewer, or stretch the context by rope scaling.")
    if options.threads:
        torch.set_num_threads(options.threads)
    cards = memory_of_cards(options.card_memory)
    with errors.remedy("Use fewer --bits, or allow more memory of each GPU."):
        made = base_model.load_base(
            base, bits.value, dtype.value, device.value, config, cards, code=found.code
        ).eval()
    for source in found.adapters:
        made = models_adapter.attach(made, source.folder, source.name)
    names = [source.name for source in found.adapters]
    return transformers_engine.Engine(made, found.tokenizer, min(options.context or own, own), names)


def _llama(found: Found, to_gguf: ToGguf, exact: bool) -> llama_cpp_engine.Engine:
    options, path = found.options, Path(found.base)
    files: dict[str, Path] = {}
    if not found.base.endswith(GGUF):
        folders = {source.name: source.folder for source in found.adapters if not source.is_gguf}
        path, files = to_gguf(path, folders)
    files |= {source.name: source.folder for source in found.adapters if source.is_gguf}
    threads = hardware.choose_threads(options.threads)
    say(f"base        {path} in llama.cpp, on the processor")
    say(f"threads     {threads.value}: {threads.reason}")
    context = options.context or 2048
    tokenizer = templates.tokenizer_for(found.tokenizer, found.template)
    with errors.remedy("Use a smaller model, or a smaller --context."):
        engine = llama_cpp_engine.Engine(path, tokenizer, context, files, threads.value, exact=exact)
    if options.context and engine.context < options.context and not exact:
        engine.close()
        raise UserError(
            f"--context {options.context}: the model's context has {engine.context} tokens.", "Use fewer."
        )
    return engine


def _device(wanted: str) -> Choice:
    import torch

    if wanted == "all" and not torch.cuda.is_available():
        raise UserError("--device all: torch sees no CUDA GPU.", hardware.ON_CPU)
    if wanted == "all":
        return Choice("all", f"{torch.cuda.device_count()} cards and the processor's memory")
    has_mps = torch.backends.mps.is_available()
    if wanted == "mps" and not has_mps:
        raise UserError("--device mps: torch sees no Apple GPU.", hardware.ON_CPU)
    if wanted == "mps" or (wanted == "auto" and has_mps):
        return Choice("mps", "an Apple card")
    with errors.remedy(hardware.ON_CPU, beside=True):
        return hardware.choose_device(wanted)


def _bits(found: Found, config: Any, device: str, dtype: str) -> Choice:
    """Bits of a weight; auto: the most of 16, 8 and 4 that fit into the card's free memory."""
    import torch

    if quantized.method(config):
        return Choice(quantized.bits(config) or 16, f"{quantized.method(config)} weights stay as they are")
    asked = 8 if found.options.load_8bit else found.options.bits
    if asked != "auto":
        return Choice(asked, "asked for")
    if device == "all":
        return Choice(16, "spread over the cards; --bits 8 or 4 needs fewer of them")
    if not device.startswith("cuda"):
        return Choice(16, "a processor multiplies 16 bits faster than it unpacks fewer")
    bare = base_model.skeleton(found.base, config, found.code).to(base_model.DTYPES[dtype])
    free = (
        torch.cuda.mem_get_info(device)[0] * model_memory.SAFETY
    )  # the rest is for keys, values and activations
    for bits in (16, 8, 4):
        needed = model_memory.weight_bytes(bare, bits)
        if needed <= free or bits == 4:
            return Choice(bits, f"{needed / 2**30:.1f} GiB of weights, {free / 2**30:.1f} GiB can be used")
    raise AssertionError
