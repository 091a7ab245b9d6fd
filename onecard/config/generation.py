"""The options of one answer, and what they may be: modes, active adapters, phrases."""

import dataclasses
import secrets
from typing import TypeVar

from onecard.config.checks import at_least, between
from onecard.config.declaration import (
    ANSWERS,
    EXECUTION,
    NO_UNIT,
    TOKENS,
    TURNS,
    Place,
    Use,
    window_option,
)

GREEDY, SAMPLE, BEAM, BEAM_SAMPLE = "greedy", "sample", "beam", "beam_sample"
MODES = (GREEDY, SAMPLE, BEAM, BEAM_SAMPLE)
SEEDS = 2**32  # that are drawn from: short enough to be typed again
NO_LIMIT = 2**31 - 1  # of new tokens: the context of the model ends an answer
COLDEST = 1e-4  # a lower temperature is greedy: scores that it divides would leave the range of fp32
MOST_PHRASES, LONGEST_PHRASE = 50, 200  # stop words or banned phrases; characters of one
ActiveAdapters = tuple[tuple[str, float], ...]  # active adapters and their weights; () is the base alone
TRAINED = ""  # name of the template that was saved with the adapter, or is usual without one
BASE, MIX = "base", "mix"  # what a picker offers besides adapters

SAMPLING = Use(("only for sampling", "仅用于采样"))
BEAMS = Use(("only for beam search", "仅用于束搜索"))
SEVERAL_TURNS = Use(("for chats of several turns", "仅用于多轮对话"))


def phrases(text: str) -> list[str]:
    r"""Texts with | between; \n in them is a new line."""
    return [part for part in text.replace("\\n", "\n").split("|") if part]


def few_short_phrases(text: str) -> str | None:
    parts = phrases(text)
    fits = len(parts) <= MOST_PHRASES and all(len(part) <= LONGEST_PHRASE for part in parts)
    problem = f"must be at most {MOST_PHRASES} texts of {LONGEST_PHRASE} characters each, separated by |"
    return None if fits else problem


@dataclasses.dataclass(frozen=True)
class Generation:
    """Options of one answer."""

    mode: str = window_option(
        SAMPLE,
        EXECUTION,
        ("Mode", "生成方式"),
        (
            "greedy: always the most probable token; sample: draw tokens at random by their probability; "
            "beam: search for the most probable whole answer; beam_sample: both",
            "greedy 每步取概率最高的词元；sample 按概率随机抽取；beam 寻找整体概率最高的回答；"
            "beam_sample 两者结合",
        ),
        choices=MODES,
        place=Place.COMMON,
    )
    temperature: float = window_option(
        0.7,
        EXECUTION,
        ("Temperature", "温度"),
        ("above 1 more varied, below 1 more predictable", "大于 1 更多样，小于 1 更稳定"),
        unit=NO_UNIT,
        check=between(0.01, 10),
        slider=(0.05, 2, 0.05),
        only=(SAMPLING,),
        place=Place.COMMON,
    )
    top_p: float = window_option(
        0.9,
        EXECUTION,
        ("Top-p", "核采样 Top-p"),
        (
            "sample only from the most probable tokens that together have this probability",
            "只从累计概率达到此值的最可能词元中抽取",
        ),
        unit=NO_UNIT,
        check=between(0, 1),
        slider=(0, 1, 0.05),
        only=(SAMPLING,),
        place=Place.COMMON,
    )
    top_k: int = window_option(
        60,
        EXECUTION,
        ("Top-k", "候选数 Top-k"),
        (
            "sample only from this many most probable tokens; 0 = all",
            "只从概率最高的 k 个词元中抽取；0 表示全部",
        ),
        unit=TOKENS,
        check=at_least(0),
        slider=(0, 100, 1),
        only=(SAMPLING,),
        place=Place.COMMON,
    )
    num_beams: int = window_option(
        4,
        EXECUTION,
        ("Beams", "束宽"),
        ("answers that beam search follows at the same time", "束搜索同时保留的候选回答数"),
        unit=ANSWERS,
        check=between(2, 16),
        slider=(2, 10, 1),
        only=(BEAMS,),
        place=Place.COMMON,
    )
    repetition_penalty: float = window_option(
        1.1,
        EXECUTION,
        ("Repetition penalty", "重复惩罚"),
        ("above 1 avoids tokens that occurred before", "大于 1 时避免重复已出现的词元"),
        unit=NO_UNIT,
        check=between(0.1, 10),
        slider=(0.5, 3, 0.05),
        place=Place.COMMON,
    )
    no_repeat_ngram_size: int = window_option(
        0,
        EXECUTION,
        ("No repeated n-gram", "禁止重复 n 元组"),
        (
            "a sequence of this many tokens never occurs twice; 0 = no limit",
            "相同的连续 n 个词元不会出现两次；0 表示不限制",
        ),
        unit=TOKENS,
        check=at_least(0),
        slider=(0, 10, 1),
    )
    min_new_tokens: int = window_option(
        1,
        EXECUTION,
        ("Min new tokens", "最少新词元"),
        ("fewest tokens of an answer", "回答至少包含的词元数"),
        unit=TOKENS,
        check=at_least(0),
        slider=(0, 300, 1),
    )
    max_new_tokens: int = window_option(
        256,
        EXECUTION,
        ("Max new tokens", "最多新词元"),
        ("most tokens of an answer", "回答至多包含的词元数"),
        unit=TOKENS,
        check=at_least(1),
        slider=(1, 2000, 1),
        place=Place.COMMON,
    )
    stop: str = window_option(
        "",
        EXECUTION,
        ("Stop at", "停止词"),
        (
            "the answer ends before any of these texts (separated by |, \\n for a new line)",
            "回答在出现其中任一文字之前结束（用 | 分隔，\\n 表示换行）",
        ),
        check=few_short_phrases,
    )
    banned: str = window_option(
        "",
        EXECUTION,
        ("Banned phrases", "禁用短语"),
        (
            "texts that the answer never contains (separated by |, \\n for a new line)",
            "回答中不会出现的文字（用 | 分隔，\\n 表示换行）",
        ),
        check=few_short_phrases,
    )
    seed: int | None = window_option(
        None,
        EXECUTION,
        ("Seed", "随机种子"),
        (
            "seed of sampling: the same seed gives the same answer; none: another answer each time",
            "采样的随机种子：种子相同，回答相同；留空则每次不同",
        ),
        unit=NO_UNIT,
        check=between(0, 2**63 - 1),
        only=(SAMPLING,),
    )
    max_memory: int = window_option(
        2048,
        EXECUTION,
        ("Max memory", "记忆词元上限"),
        (
            "most tokens of the conversation that the model sees; the oldest whole turns are left out first; "
            "0 = as many as fit",
            "模型最多能看到的对话词元数，超出时先整轮去掉最早的；0 表示能放下多少就保留多少",
        ),
        unit=TOKENS,
        check=at_least(0),
        slider=(0, 8192, 64),
        only=(SEVERAL_TURNS,),
    )
    last_turns: int = window_option(
        0,
        EXECUTION,
        ("Turns remembered", "记忆轮数"),
        (
            "most earlier turns that the model sees; 0 = as many as fit",
            "模型最多能看到多少轮之前的对话；0 表示能放下多少就保留多少",
        ),
        unit=TURNS,
        check=at_least(0),
        slider=(0, 50, 1),
        only=(SEVERAL_TURNS,),
    )

    @property
    def samples(self) -> bool:
        return self.mode in (SAMPLE, BEAM_SAMPLE)

    @property
    def width(self) -> int:
        return self.num_beams if self.mode in (BEAM, BEAM_SAMPLE) else 1


Settings = TypeVar("Settings", bound=Generation)


def absent_uses(mode: str) -> list[Use]:
    """The uses of options that do not apply in a mode."""
    by_mode = {SAMPLING: (SAMPLE, BEAM_SAMPLE), BEAMS: (BEAM, BEAM_SAMPLE)}
    return [use for use, modes in by_mode.items() if mode not in modes]


def seeded(settings: Settings) -> Settings:
    """The same settings, with a drawn seed where one is needed and none is set: it makes the answer again."""
    if not settings.samples or settings.seed is not None:
        return settings
    return dataclasses.replace(settings, seed=secrets.randbelow(SEEDS))


def of_request(
    temperature: float = 1.0, top_p: float = 1.0, max_tokens: int = NO_LIMIT, seed: int | None = None
) -> Generation:
    """The options of an answer to a request of OpenAI's API: what it does not ask for changes nothing.

    temperature: 0 means greedy there, while --temperature, which is for people, does not take it; seed: any
    whole number. The caller has checked the ranges.
    """
    return Generation(
        mode=GREEDY if temperature < COLDEST else SAMPLE,
        temperature=max(temperature, COLDEST),
        top_p=top_p,
        top_k=0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        max_new_tokens=max_tokens,
        stop="",
        banned="",
        seed=None if seed is None else seed % 2**63,
        max_memory=0,
        last_turns=0,
    )
