"""Options of chatting -> an engine with its model and adapters in memory.

It chooses bits, device and dtype, and says why; it does not know conversations.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onecard import adapter, engine_hf, hardware, model, sources
from onecard.chat_config import ChatConfig, Mixture, memory_of_cards
from onecard.errors import UserError
from onecard.hardware import Choice
from onecard.prompt import Template
from onecard.sources import Source

ToGguf = Callable[[Path, dict[str, Path]], tuple[Path, dict[str, Path]]]
DEMO, GGUF = "demo", ".gguf"
TRANSFORMERS, LLAMA = "transformers", "llama.cpp"
USABLE = 0.8  # share of a card's free memory for weights; the rest is for keys, values and activations


def load(
    options: ChatConfig,
    locate: Callable[[str], str],
    fetch: Callable[[str], str],
    to_gguf: ToGguf,
    say: Callable[[str], None],
) -> tuple[Any, Template, Mixture]:
    """An engine, the template, and the adapters that answer unless told otherwise.

    locate: model name -> folder or hub name; fetch: name of an adapter on the hub -> folder; to_gguf: model
    and adapter folders -> files for llama.cpp.
    """
    listed = sources.read_list(options.lora_path)
    with tempfile.TemporaryDirectory(prefix="onecard-adapters-") as keep:  # read into memory, then not needed
        found = [sources.find(path, name, options.checkpoint, fetch, Path(keep)) for name, path, _ in listed]
        base = _base(options, found, locate)
        for note in [note for source in found for note in source.notes]:
            say(note)
        adapters = [source for source in found if not source.whole]
        wanted = options.engine
        if wanted == "auto":
            wanted = LLAMA if base.endswith(GGUF) else TRANSFORMERS
        if wanted == LLAMA:
            engine, tokenizer = _llama(options, base, adapters, to_gguf, say)
        else:
            engine, tokenizer = _transformers(options, base, adapters, say)
        for source in adapters:
            say(f"adapter     {source.name}: {source.folder}")
        template, why = sources.choose_template(options.template, found, tokenizer)
    say(f"template    {template.name}: {why}")
    if not adapters:
        return engine, template, ()
    mixture = tuple((name, weight) for name, _, weight in listed)
    # several are there to choose from; weights that are given say that they answer together
    together = any(weight != 1 for _, weight in mixture)
    return engine, template, mixture if together else mixture[:1]


def _base(options: ChatConfig, found: list[Source], locate: Callable[[str], str]) -> str:
    """The base model: asked for, trained whole, or what an adapter was trained on."""
    whole = [source for source in found if source.whole]
    if whole and (len(found) > 1 or options.model_path):
        problem = f"--lora_path {whole[0].folder}: a whole model, no adapter."
        raise UserError(problem, "Give it alone, as --model_path or --lora_path.")
    if whole:
        return str(whole[0].folder)
    named = next((source.base for source in found if source.base), None)
    name = options.model_path or named or DEMO
    if (
        not options.model_path
        and named
        and "/" in name
        and Path(name).is_absolute()
        and not Path(name).exists()
    ):
        problem = f"{found[0].name} was trained on {name}, which is not there any more."
        raise UserError(problem, "Name its base with --model_path.")
    return locate(name)


def _transformers(
    options: ChatConfig, base: str, adapters: list[Source], say: Callable[[str], None]
) -> tuple[engine_hf.Engine, Any]:
    import torch

    if base.endswith(GGUF):
        raise UserError(f"--engine transformers: {base} is for llama.cpp.", "Use --engine llama.cpp.")
    device = _device(options.device)
    if options.card_memory and options.device != "all":
        raise UserError("--card_memory is for --device all.", "Add --device all.")
    dtype = Choice("fp16", "Apple's cards") if device.value == "mps" and options.dtype == "auto" else None
    dtype = dtype or hardware.choose_dtype(options.dtype, "cuda:0" if device.value == "all" else device.value)
    config = model.load_config(base)
    bits = _bits(options, base, config, device.value)
    say(f"base        {base}, {bits.value} bits: {bits.reason}")
    say(f"device      {device.value} ({device.reason}), arithmetic {dtype.value}: {dtype.reason}")
    if options.rope_scaling != "none":
        config = model.stretched(base, config, options.rope_scaling, options.rope_factor)
    tokenizer = model.load_tokenizer(base)
    if options.threads:
        torch.set_num_threads(options.threads)
    cards = memory_of_cards(options.card_memory)
    made = model.load_base(base, bits.value, dtype.value, device.value, config, cards).eval()
    for source in adapters:
        made = adapter.attach(made, source.folder, source.name)
    own = getattr(config.get_text_config(), "max_position_embeddings", None) or 2048
    if options.context and options.context > own:
        problem = f"--context {options.context}: the model has {own}."
        raise UserError(problem, "Use less, or --rope_scaling yarn.")
    names = [source.name for source in adapters]
    return engine_hf.Engine(made, tokenizer, options.context or own, names), tokenizer


def _llama(
    options: ChatConfig, base: str, adapters: list[Source], to_gguf: ToGguf, say: Callable[[str], None]
) -> tuple[Any, Any]:
    from onecard import engine_llama  # its package is an extra of its own

    if options.rope_scaling != "none":
        problem = "--rope_scaling is for the transformers engine."
        raise UserError(problem, "A GGUF file carries its own scaling; --context makes use of it.")
    if not base.endswith(GGUF):
        tokenizer = model.load_tokenizer(base)
        path, files = to_gguf(Path(base), {source.name: source.folder for source in adapters})
    elif adapters:
        problem = f"{base}: an adapter is put on a model folder, not on a .gguf file."
        raise UserError(problem, "Name the folder with --model_path; it is converted once.")
    elif not Path(base).is_file():
        raise UserError(f"--model_path {base}: no such file.", "Name a .gguf file.")
    else:
        path, files = Path(base), {}
        tokenizer = engine_llama.tokenizer_of(path)
    say(f"base        {path} in llama.cpp, on the processor")
    return engine_llama.Engine(path, tokenizer, options.context or 2048, files, options.threads), tokenizer


def _device(wanted: str) -> Choice:
    import torch

    if wanted == "all" and not torch.cuda.is_available():
        raise UserError("--device all: torch sees no card.", "Use --device cpu.")
    if wanted == "all":
        return Choice("all", f"{torch.cuda.device_count()} cards and the processor's memory")
    has_mps = torch.backends.mps.is_available()
    if wanted == "mps" and not has_mps:
        raise UserError("--device mps: torch sees no Apple card.", "Use --device cpu.")
    if wanted == "mps" or (wanted == "auto" and has_mps):
        return Choice("mps", "an Apple card")
    return hardware.choose_device(wanted)


def _bits(options: ChatConfig, base: str, config: Any, device: str) -> Choice:
    """Bits of a weight; auto: the most of 16, 8 and 4 that fit into the card's free memory."""
    import torch

    if getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method", "quantised")
        return Choice(16, f"{method} weights stay as they are")
    asked = 8 if options.load_8bit else options.bits
    if asked != "auto":
        return Choice(asked, "asked for")
    if device == "all":
        return Choice(16, "spread over the cards; --bits 8 or 4 needs fewer of them")
    if not device.startswith("cuda"):
        return Choice(16, "a processor multiplies 16 bits faster than it unpacks fewer")
    with torch.device("meta"):
        weights = sum(p.numel() for p in model.skeleton(base, config).parameters())
    free = torch.cuda.mem_get_info(device)[0] * USABLE
    for bits in (16, 8, 4):
        if weights * bits / 8 <= free or bits == 4:
            return Choice(
                bits, f"{weights * bits / 8 / 2**30:.1f} GiB of weights, {free / 2**30:.1f} GiB can be used"
            )
    raise AssertionError
