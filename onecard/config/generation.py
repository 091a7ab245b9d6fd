"""The options of one answer, and what they may be: modes, active adapters, phrases."""

import dataclasses
import secrets
from typing import TypeVar

from onecard.config.options import EXECUTION, at_least, between, option

GREEDY, SAMPLE, BEAM, BEAM_SAMPLE = "greedy", "sample", "beam", "beam_sample"
MODES = (GREEDY, SAMPLE, BEAM, BEAM_SAMPLE)
SEEDS = 2**32  # that are drawn from: short enough to be typed again
LONGEST_PHRASE = 200  # characters of a stop word or banned phrase
ActiveAdapters = tuple[tuple[str, float], ...]  # active adapters and their weights; () is the base alone
TRAINED = ""  # name of the template that was saved with the adapter, or is usual without one
BASE, MIX = "base", "mix"  # what a picker offers besides adapters


def phrases(text: str) -> list[str]:
    r"""Texts with | between; \n in them is a new line."""
    return [part for part in text.replace("\\n", "\n").split("|") if part]


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
