"""The options of chatting, declared once for command lines, JSON and the inputs of the windows.

Those of one answer are in generation.py; here are those of the programs. Which options a mode, a program or
an engine does not use is said here too, so that none silently does nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from onecard.config.generation import BASE, BEAM, GREEDY, MIX, SAMPLE, Generation
from onecard.config.options import (
    EXECUTION,
    RUNS_CODE,
    at_least,
    between,
    card_memory,
    commit_option,
    inherited,
    login,
    option,
    refuse_idle,
)
from onecard.errors import UserError


def _is_bits(value: Any) -> str | None:
    return None if value in ("auto", 16, 8, 4) else "choose from auto, 16, 8, 4"


IN_CHINESE = {BASE: "基座模型", MIX: "加权混合"}
WINDOW_ONLY = ("studio", "lang", "server_name", "server_port", "origin", "share", "auth", "queue")
TURNS_ONLY = ("studio", "max_memory", "last_turns")
SAMPLING_ONLY = ("temperature", "top_p", "top_k", "seed")


ONE_SEQUENCE = "one sequence"
LACKS = {  # why an engine, of that name, lacks an option or a mode -> English and Chinese
    ONE_SEQUENCE: ("{} follows one sequence: no beam search", "{} 一次只跟踪一个序列：不支持束搜索"),
}


def unused_by(engine: str, lacks: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Option or mode -> why an engine of this name lacks it, English and Chinese; lacks: keys of LACKS."""
    return {what: (LACKS[why][0].format(engine), LACKS[why][1].format(engine)) for what, why in lacks.items()}


def unused(mode: str) -> dict[str, tuple[str, str]]:
    """Option -> why this mode does not use it, English and Chinese."""
    found: dict[str, tuple[str, str]] = {}
    if mode in (GREEDY, BEAM):
        why = ("only for sampling", "仅用于采样")
        found |= dict.fromkeys(SAMPLING_ONLY, why)
    if mode in (GREEDY, SAMPLE):
        found["num_beams"] = ("only for beam search", "仅用于束搜索")
    return found


@dataclasses.dataclass(frozen=True)
class ChatConfig(Generation):
    """Options of interaction.py."""

    model_path: str | None = option(
        None, EXECUTION, "base model: a folder, a hub name, a .gguf file, demo; none: what the adapter names"
    )
    lora_path: str | None = option(
        None,
        EXECUTION,
        "adapter: its folder, a run, an older checkpoint, a hub name; several with commas between, "
        "each as NAME=PATH:WEIGHT if you like",
    )
    checkpoint: str = option(
        "best", EXECUTION, "which checkpoint of a run that is not finished", choices=("best", "newest")
    )
    template: str | None = option(
        None,
        EXECUTION,
        "prompt template: a name, a .json file, auto; none: the one it was trained with",
    )
    system: str = option("", EXECUTION, "system prompt", label=("System prompt", "系统提示"))
    bits: int | str = option(
        "auto", EXECUTION, "bits of a base weight: 16, 8, 4; auto: the most that fit", check=_is_bits
    )
    load_8bit: bool = option(False, EXECUTION, "the same as --bits 8")
    engine: str = option(
        "auto",
        EXECUTION,
        "auto: llama.cpp for a .gguf file, else transformers",
        choices=("auto", "transformers", "llama.cpp"),
    )
    device: str = option("auto", EXECUTION, "auto, cpu, cuda, cuda:N or mps; all: spread over all cards")
    dtype: str = option(
        "auto", EXECUTION, "floating point type of 16 bits", choices=("auto", "fp32", "fp16", "bf16")
    )
    card_memory: str | None = option(
        None,
        EXECUTION,
        "most memory per card with --device all, as 0:10GiB,1:10GiB,cpu:20GiB",
        check=card_memory,
    )
    context: int | None = option(
        None,
        EXECUTION,
        "tokens of prompt and answer together; none: what the model has, llama.cpp 2048 of it",
        check=at_least(32),
    )
    rope_scaling: str = option(
        "none", EXECUTION, "for longer contexts than the model's own", choices=("none", "yarn", "dynamic")
    )
    rope_factor: float = option(
        4.0, EXECUTION, "how many times longer with --rope_scaling", check=between(1, 64)
    )
    threads: int | None = option(
        None,
        EXECUTION,
        "processor threads; none: torch's own, llama.cpp one a physical core",
        check=at_least(1),
    )
    remote_code: str | None = commit_option(RUNS_CODE)
    terminal: bool = option(False, EXECUTION, "talk in this terminal instead of a browser")
    studio: bool = option(False, EXECUTION, "with a tab for training")
    lang: str = option("en", EXECUTION, "language of the windows", choices=("en", "zh"))
    server_name: str = option("127.0.0.1", EXECUTION, "address to listen at; others than this need --auth")
    server_port: int | None = option(
        None, EXECUTION, "port to listen at; none: the first free from 7860", check=between(1, 65535)
    )
    origin: str | None = option(
        None, EXECUTION, "address of a proxy whose page may use this window, as a notebook's https://..."
    )
    share: bool = option(False, EXECUTION, "a public link through gradio's servers; needs --auth")
    auth: str | None = option(None, EXECUTION, "user:password that the window asks for", check=login)
    queue: int = option(
        16, EXECUTION, "questions that may wait; others are told to come back", check=at_least(1)
    )


@dataclasses.dataclass(frozen=True)
class SingleConfig(ChatConfig):
    """Options of generate.py."""

    mode: str = inherited(Generation, "mode", BEAM)


@dataclasses.dataclass(frozen=True)
class CpuConfig(ChatConfig):
    """Options of tools/cpu_chat.py."""

    engine: str = inherited(ChatConfig, "engine", "llama.cpp")


def check_used(options: ChatConfig) -> None:
    """Raise UserError for options that the program of these does not use, unless they ask for nothing."""
    idle: dict[str, str] = {}
    if isinstance(options, SingleConfig):
        idle |= dict.fromkeys(TURNS_ONLY, "for chats of several turns")
    if options.terminal or isinstance(options, CpuConfig):
        idle |= dict.fromkeys(WINDOW_ONLY, "for a window, not for a terminal")
    if options.rope_scaling == "none":
        idle["rope_factor"] = "for --rope_scaling yarn or dynamic"
    if options.device != "all":
        idle["card_memory"] = "for --device all"
    refuse_idle(options, idle)
    if options.load_8bit and options.bits not in ("auto", 8):
        raise UserError(f"--load_8bit and --bits {options.bits} contradict each other.", "Give one of them.")
