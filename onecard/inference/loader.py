"""Options of chatting -> an engine with its model and adapters in memory.

resolve.py says what belongs together; here bits, device and dtype are chosen, and the reasons are said. This
file knows no conversations.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from onecard import errors
from onecard.config import options as config_options
from onecard.config.chat import TRANSFORMERS, ChatConfig, memory_by_device
from onecard.config.generation import ActiveAdapters
from onecard.config.options import flag
from onecard.data import template as data_template
from onecard.data.template import Template
from onecard.errors import UserError
from onecard.hub import locate, remote_code
from onecard.hub import session as hub_session
from onecard.hub.remote_code import TrustedCode
from onecard.inference import engine as inference_engine
from onecard.inference import llama_cpp_engine, resolve, transformers_engine
from onecard.inference.resolve import ModelRequest, ResolvedModel
from onecard.models import adapter as models_adapter
from onecard.models import base_model, quantized
from onecard.models import memory as models_memory
from onecard.runs import adapters as runs_adapters
from onecard.runs.adapters import GGUF
from onecard.system import commands, gpus, hardware, openmp
from onecard.system.console import say
from onecard.system.hardware import Choice

ToGguf = Callable[[Path, dict[str, Path]], tuple[Path, dict[str, Path]]]


@dataclasses.dataclass(frozen=True)
class EnginePlan:
    """A resolved model and the engine for it: enough to lay out a page, before any weight is read."""

    options: ChatConfig
    model: ResolvedModel
    kind: type[transformers_engine.Engine] | type[llama_cpp_engine.Engine]
    device: Choice


class Loaded(NamedTuple):
    """What a Chat is made of."""

    engine: inference_engine.Engine
    tokenizer: PreTrainedTokenizerBase
    template: Template
    active_adapters: ActiveAdapters  # those that answer unless a question names others
    versions: dict[str, str]  # owner/name@COMMIT of the base and of adapters that come from the hub


def load(options: ChatConfig, to_gguf: ToGguf, exact: bool = False, sequences: int = 1) -> Loaded:
    """An engine with its model in memory, and what it is used with; raises UserError.

    to_gguf: folders of a model and of adapters -> files for llama.cpp; exact: for measuring, so computed in
    fp32 where the options leave that open; sequences: answers that are computed together, each with room for
    a whole context. transformers has no limit to their number, and with 1 they take turns.
    """
    with hub_session.session():
        plan = prepare(options)
        return loaded(plan, engine_of(plan, to_gguf, exact, sequences))


def loaded(plan: EnginePlan, engine: inference_engine.Engine) -> Loaded:
    """The engine of a plan with the rest that a Chat is made of."""
    model = plan.model
    versions = {name: str(version) for name, version in model.versions.items()}
    return Loaded(engine, model.tokenizer, model.template, model.active_adapters, versions)


def prepare(options: ChatConfig) -> EnginePlan:
    """Find and check what the options name, without reading weights of the base; raises UserError."""
    _check_options(options, resolve.engine_for(options.engine, options.model_path or ""))
    listed = runs_adapters.read_list(options.lora_path)
    request = ModelRequest(
        options.model_path,
        listed,
        options.engine,
        functools.partial(_find_base, options),
        gguf_remedy="Use --engine llama.cpp.",
        code_remedy=remote_code.READ_FIRST,
        checkpoint=options.checkpoint,
        template=options.template,
        remote_code=options.remote_code,
    )
    model = resolve.resolve(request)
    is_llama = resolve.engine_for(options.engine, model.base) == resolve.LLAMA
    _check_options(options, resolve.LLAMA if is_llama else resolve.TRANSFORMERS)
    kind = llama_cpp_engine.Engine if is_llama else transformers_engine.Engine
    device = Choice("cpu", "llama.cpp runs there") if is_llama else _device(options.device)
    say(f"template    {model.template.name}: {model.chosen_template[1]}")
    return EnginePlan(options, model, kind, device)


def _find_base(options: ChatConfig, name: str) -> tuple[str, TrustedCode | None]:
    """The folder or file of a base, and the consent to run its code; raises UserError."""
    engine = resolve.engine_for(options.engine, name)
    base = remote_code.locate_with_code(name, options.remote_code) or locate.for_engine(engine)(name)
    code = remote_code.verify_commit(base, options.remote_code)
    return (str(code.folder) if code else base), code


def engine_of(
    plan: EnginePlan, to_gguf: ToGguf, exact: bool = False, sequences: int = 1
) -> inference_engine.Engine:
    """The engine with its model and adapters in memory; the arguments are those of load. Raises UserError."""
    engine: inference_engine.Engine
    if plan.kind is llama_cpp_engine.Engine:
        engine = _llama(plan, to_gguf, exact, sequences)
    else:
        engine = _transformers(plan, exact, together=sequences > 1)
    plan.model.close()  # copies of adapters are in memory now
    return engine


def _check_options(options: ChatConfig, engine: str) -> None:
    """Raise UserError for options that this engine cannot have."""
    is_llama = engine == resolve.LLAMA
    if is_llama and options.rope_scaling != "none":
        problem = "llama.cpp has no rope scaling of its own."
        raise UserError(problem, "Leave it out: a GGUF file carries its own, and --context makes use of it.")
    if is_llama and options.remote_code:
        problem = "--remote_code is for the transformers engine: llama.cpp runs no Python code of a model."
        raise UserError(problem, "Leave the option out.")
    if is_llama:
        for name in config_options.set_without_effect(options, [TRANSFORMERS]):
            problem = f"{flag(options, name)}: llama.cpp takes the weights as they are, and runs on the CPU."
            fix = f"Leave the option out. {commands.name('export-gguf')} --type makes files of fewer bits."
            raise UserError(problem, fix)


def _transformers(plan: EnginePlan, exact: bool, together: bool) -> transformers_engine.Engine:
    import torch

    options, model, device = plan.options, plan.model, plan.device
    dtype = _dtype(options.dtype, device.value, exact)
    config = base_model.load_config(model.base, model.code)
    bits = _bits(plan, config, dtype.value)
    say(f"base        {model.base}, {bits.value} bits: {bits.reason}")
    say(f"device      {device.value} ({device.reason}), compute dtype {dtype.value}: {dtype.reason}")
    openmp.say_once(device.value)
    if options.rope_scaling != "none":
        config = base_model.stretched(model.base, config, options.rope_scaling, options.rope_factor)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 2048
    if options.context and options.context > longest and not exact:
        problem = f"--context {options.context}: the model's context has {longest} tokens."
        raise UserError(problem, "Use fewer, or stretch the context by rope scaling.")
    if options.threads:
        torch.set_num_threads(options.threads)
    memory = memory_by_device(options.card_memory)
    with errors.remedy("Use fewer --bits, or allow more memory of each GPU."):
        module = base_model.load_base(
            model.base, bits.value, dtype.value, device.value, config, memory, code=model.code
        ).eval()
    for adapter in model.adapters:
        module = models_adapter.attach(module, adapter.folder, adapter.name)
    names = [adapter.name for adapter in model.adapters]
    context = min(options.context or longest, longest)
    return transformers_engine.Engine(module, model.tokenizer, context, names, together)


def _llama(plan: EnginePlan, to_gguf: ToGguf, exact: bool, sequences: int) -> llama_cpp_engine.Engine:
    options, model, path = plan.options, plan.model, Path(plan.model.base)
    files: dict[str, Path] = {}
    if not model.base.endswith(GGUF):
        folders = {adapter.name: adapter.folder for adapter in model.adapters if not adapter.is_gguf}
        path, files = to_gguf(path, folders)
    files |= {adapter.name: adapter.folder for adapter in model.adapters if adapter.is_gguf}
    threads = hardware.choose_threads(options.threads)
    say(f"base        {path} in llama.cpp, on the CPU")
    say(f"threads     {threads.value}: {threads.reason}")
    openmp.say_once("cpu")
    context = options.context or 2048
    tokenizer = data_template.tokenizer_for(model.tokenizer, model.template)
    with errors.remedy("Use a smaller model, or a smaller --context."):
        engine = llama_cpp_engine.Engine(
            path, tokenizer, context, files, threads.value, exact=exact, sequences=sequences
        )
    if options.context and engine.context < options.context and not exact:
        engine.close()
        raise UserError(
            f"--context {options.context}: the model's context has {engine.context} tokens.", "Use fewer."
        )
    return engine


def _dtype(name: str, device: str, exact: bool) -> Choice:
    """The compute dtype, by the option --dtype; exact: fp32 where a CPU leaves the choice."""
    if name == "auto" and device == "mps":
        return Choice("fp16", "usual on Apple GPUs")
    if name == "auto" and device == "cpu" and exact:
        return Choice("fp32", "so that results can be compared")
    devices = [gpu.device for gpu in gpus.cuda().gpus] if device == "all" else [device]
    return hardware.choose_dtype(name, *devices)


def _device(name: str) -> Choice:
    """The device, by the option --device; raises UserError when it is not there."""
    import torch

    if name == "all":
        cards = gpus.cuda().gpus
        if not cards:
            raise UserError("--device all: torch sees no CUDA GPU.", hardware.ON_CPU)
        return Choice("all", f"sharded over {len(cards)} GPUs and the CPU's memory")
    has_mps = torch.backends.mps.is_available()
    if name == "mps" and not has_mps:
        raise UserError("--device mps: torch sees no Apple GPU.", hardware.ON_CPU)
    if name == "mps" or (name == "auto" and has_mps):
        return Choice("mps", "an Apple GPU")
    with errors.remedy(hardware.ON_CPU, beside=True):
        return hardware.choose_device(name)


def _bits(plan: EnginePlan, config: Any, dtype: str) -> Choice:
    """Bits of a weight; auto: the most of 16, 8 and 4 that fit into the free memory of the GPU."""
    options, device = plan.options, plan.device.value
    if quantized.method(config):
        return Choice(quantized.bits(config) or 16, f"the weights are {quantized.method(config)} already")
    if options.load_8bit or options.bits != "auto":
        return Choice(8 if options.load_8bit else options.bits, "asked for")
    if device == "all":
        return Choice(16, "sharded over all GPUs; --bits 8 or 4 needs fewer of them")
    if not device.startswith("cuda"):
        return Choice(16, "a CPU multiplies 16 bits faster than it unpacks fewer")
    skeleton = base_model.skeleton(plan.model.base, config, plan.model.code).to(base_model.DTYPES[dtype])
    # the rest of the memory is for keys, values and activations
    free = gpus.named(device).free_bytes() * models_memory.SAFETY
    for bits in (16, 8, 4):
        needed = models_memory.weight_bytes(skeleton, bits)
        if needed <= free or bits == 4:
            return Choice(bits, f"{needed / 2**30:.1f} GiB of weights, {free / 2**30:.1f} GiB can be used")
    raise AssertionError
