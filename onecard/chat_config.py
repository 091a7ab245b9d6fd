"""The options of chatting, declared once for command lines, JSON and the inputs of the windows.

Those of one answer (Generation) and those of the programs. Which of them a mode or a program does not use is
said here too, so that none silently does nothing.
"""

import dataclasses
import secrets
from typing import Any, TypeVar

from onecard.parsing import (
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

GREEDY, SAMPLE, BEAM, BEAM_SAMPLE = "greedy", "sample", "beam", "beam_sample"
MODES = (GREEDY, SAMPLE, BEAM, BEAM_SAMPLE)
SEEDS = 2**32  # that are drawn from: short enough to be typed again
LONGEST_PHRASE = 200  # characters of a stop word or banned phrase


def phrases(text: str) -> list[str]:
    r"""Texts with | between; \n in them is a new line."""
    return [part for part in text.replace("\\n", "\n").split("|") if part]


def _is_bits(value: Any) -> str | None:
    return None if value in ("auto", 16, 8, 4) else "choose from auto, 16, 8, 4"


def few_short_phrases(text: str) -> str | None:
    found = phrases(text)
    if len(found) > 50 or any(len(part) > LONGEST_PHRASE for part in found):
        return f"at most 50 texts of {LONGEST_PHRASE} characters, with | between"
    return None


@dataclasses.dataclass(frozen=True)
class Generation:
    """Options of one answer."""

    mode: str = option(
        SAMPLE,
        EXECUTION,
        (
            "greedy: always the most probable token; sample: by chance; "
            "beam: the most probable whole answer; beam_sample: both",
            "greedy 每步取概率最高的词元；sample 按概率随机抽取；"
            "beam 寻找整体概率最高的回答；beam_sample 两者结合",
        ),
        choices=MODES,
        label=("Mode", "生成方式"),
    )
    temperature: float = option(
        0.7,
        EXECUTION,
        ("above 1 more daring, below 1 more careful", "大于 1 更大胆，小于 1 更谨慎"),
        check=between(0.01, 10),
        label=("Temperature", "温度"),
        slider=(0.05, 2, 0.05),
    )
    top_p: float = option(
        0.9,
        EXECUTION,
        (
            "sample from the likeliest tokens that together have this probability",
            "只从累计概率达到此值的最可能词元中抽取",
        ),
        check=between(0, 1),
        label=("Top-p", "核采样 Top-p"),
        slider=(0, 1, 0.05),
    )
    top_k: int = option(
        60,
        EXECUTION,
        ("sample from this many likeliest tokens; 0 = all", "只从概率最高的 k 个词元中抽取；0 表示全部"),
        check=at_least(0),
        label=("Top-k", "候选数 Top-k"),
        slider=(0, 100, 1),
    )
    num_beams: int = option(
        4,
        EXECUTION,
        ("answers that beam search follows at once", "束搜索同时保留的候选回答数"),
        check=between(2, 16),
        label=("Beams", "束宽"),
        slider=(2, 10, 1),
    )
    repetition_penalty: float = option(
        1.1,
        EXECUTION,
        ("above 1 avoids tokens that were already there", "大于 1 时避免重复已出现的词元"),
        check=between(0.1, 10),
        label=("Repetition penalty", "重复惩罚"),
        slider=(0.5, 3, 0.05),
    )
    no_repeat_ngram_size: int = option(
        0,
        EXECUTION,
        ("no run of this many tokens comes twice; 0 = off", "相同的连续 n 个词元不会出现两次；0 表示不限制"),
        check=at_least(0),
        label=("No repeated n-gram", "禁止重复 n 元组"),
        slider=(0, 10, 1),
    )
    min_new_tokens: int = option(
        1,
        EXECUTION,
        ("fewest tokens of an answer", "回答至少包含的词元数"),
        check=at_least(0),
        label=("Min new tokens", "最少新词元"),
        slider=(0, 300, 1),
    )
    max_new_tokens: int = option(
        256,
        EXECUTION,
        ("most tokens of an answer", "回答至多包含的词元数"),
        check=at_least(1),
        label=("Max new tokens", "最多新词元"),
        slider=(1, 2000, 1),
    )
    stop: str = option(
        "",
        EXECUTION,
        (
            "the answer ends before any of these texts (| between, \\n for a new line)",
            "回答在出现其中任一文字之前结束（用 | 分隔，\\n 表示换行）",
        ),
        check=few_short_phrases,
        label=("Stop at", "停止词"),
    )
    banned: str = option(
        "",
        EXECUTION,
        (
            "texts the answer never contains (| between, \\n for a new line)",
            "回答中不会出现的文字（用 | 分隔，\\n 表示换行）",
        ),
        check=few_short_phrases,
        label=("Banned phrases", "禁用短语"),
    )
    seed: int | None = option(
        None,
        EXECUTION,
        (
            "of sampling: the same seed gives the same answer; none: another each time",
            "用于采样：种子相同，回答相同；留空则每次不同",
        ),
        check=between(0, 2**63 - 1),
        label=("Seed", "随机种子"),
    )
    max_memory: int = option(
        2048,
        EXECUTION,
        (
            "most tokens of the conversation the model is shown; oldest whole turns go first; "
            "0 = as many as fit",
            "模型最多能看到的对话词元数，超出时先整轮去掉最早的；0 表示能放下多少就保留多少",
        ),
        check=at_least(0),
        label=("Max memory", "记忆词元上限"),
        slider=(0, 8192, 64),
    )
    last_turns: int = option(
        0,
        EXECUTION,
        (
            "show at most this many earlier turns; 0 = as many as fit",
            "最多让模型看到多少轮之前的对话；0 表示能放下多少就保留多少",
        ),
        check=at_least(0),
        label=("Turns remembered", "记忆轮数"),
        slider=(0, 50, 1),
    )

    @property
    def samples(self) -> bool:
        return self.mode in (SAMPLE, BEAM_SAMPLE)

    @property
    def width(self) -> int:
        return self.num_beams if self.mode in (BEAM, BEAM_SAMPLE) else 1


Settings = TypeVar("Settings", bound=Generation)


def seeded(settings: Settings) -> Settings:
    """The same with a seed where one is used and none was given, so that the answer can be repeated."""
    if not settings.samples or settings.seed is not None:
        return settings
    return dataclasses.replace(settings, seed=secrets.randbelow(SEEDS))


Mixture = tuple[tuple[str, float], ...]  # active adapters and their weights; () is the base alone
TRAINED = ""  # name of the template that was saved with the adapter, or is usual without one
BASE, MIX = "base", "mix"  # what a picker offers besides adapters
IN_CHINESE = {BASE: "基座模型", MIX: "加权混合"}
WINDOW_ONLY = ("studio", "lang", "server_name", "server_port", "origin", "share", "auth", "queue")
TURNS_ONLY = ("studio", "max_memory", "last_turns")
SAMPLING_ONLY = ("temperature", "top_p", "top_k", "seed")


def unused(mode: str) -> dict[str, tuple[str, str]]:
    """Option -> why this mode does not use it, English and Chinese."""
    found = {}
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
    idle = {}
    if isinstance(options, SingleConfig):
        idle |= dict.fromkeys(TURNS_ONLY, "for interaction.py")
    if options.terminal or isinstance(options, CpuConfig):
        idle |= dict.fromkeys(WINDOW_ONLY, "for a window, not for a terminal")
    if options.rope_scaling == "none":
        idle["rope_factor"] = "for --rope_scaling yarn or dynamic"
    refuse_idle(options, idle)


@dataclasses.dataclass(frozen=True)
class PerplexityConfig:
    """Options of tools/perplexity.py."""

    data_path: str | None = option(None, EXECUTION, "text file (UTF-8)", positional=True)
    model_path: str | None = option(
        None, EXECUTION, "base model: a folder, a hub name, a .gguf file, demo; none: what the adapter names"
    )
    lora_path: str | None = option(
        None, EXECUTION, "adapter: a folder, a run, a .gguf file; several with weights as PATH:0.5,PATH:0.5"
    )
    checkpoint: str = inherited(ChatConfig, "checkpoint")
    bits: int | str = inherited(ChatConfig, "bits")
    engine: str = inherited(ChatConfig, "engine")
    device: str = inherited(ChatConfig, "device")
    dtype: str = option(
        "auto",
        EXECUTION,
        "floating point type of 16 bits; auto: fp32 on a processor, so that results can be compared",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    context: int = option(1024, EXECUTION, "tokens of a window, at most the model's", check=at_least(32))
    max_tokens: int | None = option(
        None, EXECUTION, "only this many tokens of the text; none: all", check=at_least(2)
    )
    threads: int | None = inherited(ChatConfig, "threads")
    remote_code: str | None = inherited(ChatConfig, "remote_code")
