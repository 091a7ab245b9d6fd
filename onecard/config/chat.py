"""The options of chatting, declared once for command lines, JSON and the inputs of the windows.

Those of one answer are in generation.py; here are those of the programs. Each option says what it is for, so
that a program can refuse those that would silently do nothing.
"""

import dataclasses
import re
from collections.abc import Mapping

from onecard.config.checks import at_least, between, one_of
from onecard.config.declaration import (
    BITS,
    EXECUTION,
    NO_UNIT,
    THREADS,
    TOKENS,
    Place,
    Text,
    Use,
    inherited,
    option,
    window_option,
    without_effect,
)
from onecard.config.generation import BASE, BEAM, MIX, SEVERAL_TURNS, Generation, absent_uses
from onecard.config.options import refuse_unused
from onecard.config.training import FinetuneConfig
from onecard.errors import UserError

IN_CHINESE = {BASE: "基座模型", MIX: "加权混合"}

WINDOW = Use(("for a window, not for a terminal", "仅用于窗口，不用于终端"))
LONGER_CONTEXT = Use(("for --rope_scaling yarn or dynamic", "仅用于 --rope_scaling yarn 或 dynamic"))
ENGINES = ("auto", "transformers", "llama.cpp")
ALL_DEVICES = "all"  # a value of --device
SEVERAL_DEVICES = Use(("for --device all", "仅用于 --device all"))
TRANSFORMERS = Use(("for the transformers engine", "仅用于 transformers 引擎"))

ONE_SEQUENCE = "one sequence"
LACKS = {  # why an engine, of that name, lacks an option or a mode -> English and Chinese
    ONE_SEQUENCE: ("{} follows one sequence: no beam search", "{} 一次只跟踪一个序列：不支持束搜索"),
}


def unused_by(engine: str, lacks: Mapping[str, str]) -> dict[str, Text]:
    """Option or mode -> why an engine of this name lacks it; lacks: keys of LACKS."""
    return {what: (LACKS[why][0].format(engine), LACKS[why][1].format(engine)) for what, why in lacks.items()}


def unused(mode: str) -> dict[str, Text]:
    """Option -> why this mode does not use it."""
    return without_effect(Generation, absent_uses(mode))


def memory_by_device(text: str | None) -> dict[int | str, str] | None:
    """{0: "10GiB", "cpu": "20GiB"} of "0:10GiB,cpu:20GiB"; raises ValueError for anything else."""
    if not text:
        return None
    sizes: dict[int | str, str] = {}
    for part in text.split(","):
        device, _, size = part.strip().partition(":")
        is_device = device.isdecimal() or device == "cpu"
        if not is_device or not re.fullmatch(r"\d+(\.\d+)?(GiB|MiB|GB|MB)", size):
            raise ValueError(f"{part!r} is not NUMBER:SIZE or cpu:SIZE, such as 0:10GiB")
        sizes[int(device) if device.isdecimal() else device] = size
    return sizes


def sizes_by_device(text: str) -> str | None:
    try:
        memory_by_device(text)
    except ValueError as error:
        return str(error)
    return None


def user_and_password(text: str) -> str | None:
    user, colon, password = text.partition(":")
    return None if user and colon and password else "must be user:password"


@dataclasses.dataclass(frozen=True)
class ChatConfig(Generation):
    """Options of interaction.py."""

    model_path: str | None = option(
        None,
        EXECUTION,
        "base model: a folder, a hub name, a .gguf file, or demo; none: the one that the adapter names",
    )
    lora_path: str | None = option(
        None,
        EXECUTION,
        "adapter: its folder, a run, an older checkpoint or a hub name; several are separated by commas, "
        "each may be written NAME=PATH:WEIGHT",
    )
    checkpoint: str = option(
        "best", EXECUTION, "which checkpoint of a run that is not finished", choices=("best", "newest")
    )
    template: str | None = option(
        None,
        EXECUTION,
        "prompt template: a name, a .json file, or auto; none: the one that the adapter was trained with",
    )
    system: str = window_option(
        "",
        EXECUTION,
        ("System prompt", "系统提示"),
        ("system prompt, which stands before the conversation", "系统提示，位于对话之前"),
        place=Place.TOP,
    )
    bits: int | str = option(
        "auto",
        EXECUTION,
        "bits of each weight of the base model: 16, 8 or 4; auto: the most that fit into memory",
        unit=BITS,
        check=one_of("auto", 16, 8, 4),
        only=(TRANSFORMERS,),
        saves_memory=True,
    )
    load_8bit: bool = option(False, EXECUTION, "the same as --bits 8", only=(TRANSFORMERS,))
    engine: str = option(
        "auto",
        EXECUTION,
        "auto: llama.cpp for a .gguf file, otherwise transformers",
        choices=ENGINES,
    )
    device: str = option(
        "auto",
        EXECUTION,
        "auto, cpu, cuda, cuda:N or mps; all: share the model among all GPUs and the CPU",
        only=(TRANSFORMERS,),
        idle_values=("cpu",),
    )
    dtype: str = option(
        "auto",
        EXECUTION,
        "compute dtype of 16-bit weights",
        choices=("auto", "fp32", "fp16", "bf16"),
        only=(TRANSFORMERS,),
    )
    card_memory: str | None = option(
        None,
        EXECUTION,
        "most memory per GPU with --device all, such as 0:10GiB,1:10GiB,cpu:20GiB",
        check=sizes_by_device,
        only=(SEVERAL_DEVICES, TRANSFORMERS),
    )
    context: int | None = option(
        None,
        EXECUTION,
        "most tokens of prompt and answer together; none: the model's own limit, with llama.cpp at most 2048",
        unit=TOKENS,
        check=at_least(32),
        saves_memory=True,
    )
    rope_scaling: str = option(
        "none",
        EXECUTION,
        "method for contexts longer than the model's own",
        choices=("none", "yarn", "dynamic"),
        only=(TRANSFORMERS,),
    )
    rope_factor: float = option(
        4.0,
        EXECUTION,
        "how many times longer the context becomes with --rope_scaling",
        unit=NO_UNIT,
        check=between(1, 64),
        only=(LONGER_CONTEXT,),
    )
    threads: int | None = option(
        None,
        EXECUTION,
        "CPU threads; none: torch's own choice, with llama.cpp one thread per physical core",
        unit=THREADS,
        check=at_least(1),
    )
    remote_code: str | None = inherited(FinetuneConfig, "remote_code", only=(TRANSFORMERS,))
    terminal: bool = option(False, EXECUTION, "talk in this terminal instead of a browser")
    studio: bool = option(False, EXECUTION, "add a tab for training", only=(SEVERAL_TURNS, WINDOW))
    lang: str = option("en", EXECUTION, "language of the windows", choices=("en", "zh"), only=(WINDOW,))
    server_name: str = option(
        "127.0.0.1",
        EXECUTION,
        "address to listen at; one that others can reach needs --auth",
        only=(WINDOW,),
    )
    server_port: int | None = option(
        None,
        EXECUTION,
        "port to listen at; none: the first free one from 7860",
        unit=NO_UNIT,
        check=between(1, 65535),
        only=(WINDOW,),
    )
    origin: str | None = option(
        None,
        EXECUTION,
        "address of a proxy whose page may use this window, such as a notebook's https://...",
        only=(WINDOW,),
    )
    share: bool = option(
        False, EXECUTION, "make a public link through gradio's servers; needs --auth", only=(WINDOW,)
    )
    auth: str | None = option(
        None,
        EXECUTION,
        "user:password that the window asks for",
        check=user_and_password,
        only=(WINDOW,),
    )
    queue: int = option(
        16,
        EXECUTION,
        "questions that may wait; further ones are refused until one is answered",
        unit=("questions", "个问题"),
        check=at_least(1),
        only=(WINDOW,),
    )


@dataclasses.dataclass(frozen=True)
class SingleConfig(ChatConfig):
    """Options of generate.py."""

    mode: str = inherited(Generation, "mode", BEAM)


@dataclasses.dataclass(frozen=True)
class CpuConfig(ChatConfig):
    """Options of tools/cpu_chat.py."""

    engine: str = inherited(ChatConfig, "engine", "llama.cpp")


def check_used(options: ChatConfig, *others: Use) -> None:
    """Raise UserError for options that this program does not use and that ask for something.

    others: uses that the program does not have either.
    """
    absent: list[Use] = [*others]
    if isinstance(options, SingleConfig):
        absent.append(SEVERAL_TURNS)
    if options.terminal or isinstance(options, CpuConfig):
        absent.append(WINDOW)
    if options.rope_scaling == "none":
        absent.append(LONGER_CONTEXT)
    if options.device != ALL_DEVICES:
        absent.append(SEVERAL_DEVICES)
    refuse_unused(options, *absent)
    if options.load_8bit and options.bits not in ("auto", 8):
        raise UserError(f"--load_8bit and --bits {options.bits} contradict each other.", "Give one of them.")
