#!/usr/bin/env python3
"""What the chat engine costs: time to the first token and tokens/s, compared with transformers alone.

    .venv/bin/python benchmarks/chat_speed.py [--pairs 5] [--tokens 256] [--model_path demo] [--device auto]

A pair is OneCard's stream, with every snapshot taken as a window does, and model.generate with the same
settings and prompt. The two run one after the other in this process, in alternating order. Both write the
same number of tokens, and their texts must be equal, except for sampling, where each side draws its own
random numbers. The dtype is fp32, because in 16 bits four beams that read the prompt are rounded
differently from one. tools.py measures the llama.cpp engine.
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from onecard.config.chat import ChatConfig
from onecard.config.generation import BEAM, GREEDY, SAMPLE, Generation
from onecard.conversion import gguf_cache
from onecard.data import conversation as data_conversation
from onecard.data import encode as data_encode
from onecard.inference import chat
from onecard.system import hardware
from onecard.training import plan

QUESTION = "Write a long story about a lighthouse keeper who finds a letter in a bottle."
Run = tuple[float, float, str]  # seconds to the first token, seconds of the whole answer, text


class First(BaseStreamer):
    """A streamer that records when the first new token came."""

    def __init__(self) -> None:
        self.calls, self.at = 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call brings the prompt
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


def our_tokens(talk: chat.Chat, settings: Generation) -> Iterator[str]:
    """Yield an empty text for each token of OneCard's answer, and the whole text at the end."""
    for reply in talk.stream(conversation(), settings):
        if reply.text.tokens:
            yield ""
    talk.engine.forget()  # the next run starts without a cache, like the other side
    yield reply.text.stable


def ours(talk: chat.Chat, settings: Generation) -> Run:
    started, tokens = time.perf_counter(), our_tokens(talk, settings)
    next(tokens)
    first = time.perf_counter() - started
    *_, text = tokens
    return first, time.perf_counter() - started, text


def transformers_alone(talk: chat.Chat, settings: Generation) -> Run:
    engine = talk.engine
    ids = data_encode.encode(conversation(), talk.template, talk.tokenizer)[0]
    generation = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        do_sample=settings.samples,
        temperature=settings.temperature if settings.samples else None,
        top_p=settings.top_p if settings.samples else None,
        top_k=settings.top_k if settings.samples else None,
        num_beams=settings.width,
        eos_token_id=talk.eos_ids,
        pad_token_id=talk.eos_ids[0],
    )
    prompt = torch.tensor([ids], device=engine.device)
    watch = First() if settings.width == 1 else None  # transformers streams no beams
    started = time.perf_counter()
    output = engine.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), generation_config=generation, streamer=watch
    )
    text = data_encode.decode(talk.tokenizer, output[0, len(ids) :].tolist())
    return (watch.at - started if watch else float("nan")), time.perf_counter() - started, text


def conversation() -> data_conversation.Conversation:
    return data_conversation.single(QUESTION)


@dataclasses.dataclass
class Compared:
    """Results of two ways to the same answer, run in pairs. The first of two values is ours."""

    speeds: tuple[float, float]  # tokens/s, medians
    firsts: tuple[float, float]  # seconds to the first token, medians
    takes: list[float]  # our seconds divided by the other side's, for each pair
    same: bool  # all texts are equal


def compared(mine: Callable[[], Run], other: Callable[[], Run], tokens: int, pairs: int) -> Compared:
    """Run both sides in pairs, after one run each to warm up; tokens: the number that each side writes."""
    sides, runs = (mine, other), ([], [])
    for side in sides:  # once to warm up
        side()
    for number in range(pairs):
        for which in (0, 1) if number % 2 else (1, 0):
            runs[which].append(sides[which]())
    return summed_up(runs, tokens)


def compared_in_turns(
    mine: Callable[[], Iterator[str]], other: Callable[[], Iterator[str]], tokens: int, pairs: int
) -> Compared:
    """Compare two sides that write at the same time, one token each in turn."""
    runs: tuple[list[Run], list[Run]] = ([], [])
    for number in range(-1, pairs):  # once to warm up
        sides, seconds, firsts, texts = (mine(), other()), [0.0, 0.0], [0.0, 0.0], ["", ""]
        for step in range(tokens + 1):
            for side in (0, 1) if step % 2 else (1, 0):
                started = time.perf_counter()
                texts[side] = next(sides[side])
                seconds[side] += time.perf_counter() - started
                firsts[side] = firsts[side] or seconds[side]
        assert all(texts), "another number of tokens"
        for side in (0, 1) if number >= 0 else ():
            runs[side].append((firsts[side], seconds[side], texts[side]))
    return summed_up(runs, tokens)


def summed_up(runs: tuple[list[Run], list[Run]], tokens: int) -> Compared:
    return Compared(
        tuple(statistics.median(tokens / seconds for _, seconds, _ in side) for side in runs),
        tuple(statistics.median(first for first, _, _ in side) for side in runs),
        [one[1] / two[1] for one, two in zip(*runs, strict=True)],
        len({text for side in runs for *_, text in side}) == 1,
    )


def compare(name: str, talk: chat.Chat, settings: Generation, pairs: int) -> None:
    figures = compared(
        lambda: ours(talk, settings),
        lambda: transformers_alone(talk, settings),
        settings.max_new_tokens,
        pairs,
    )
    same = "-" if settings.samples else "yes" if figures.same else "NO"
    first, direct = figures.firsts
    alone = "-" if direct != direct else f"{direct * 1000:.0f} ms"
    print(
        f"| {name} | {figures.speeds[0]:.1f} | {figures.speeds[1]:.1f} "
        f"| {100 * (statistics.median(figures.takes) - 1):+.1f} % "
        f"| {first * 1000:.0f} ms | {alone} | {same} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--model_path", default="demo")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions().items())
    print(f"{date.today().isoformat()}; {hardware.describe_machine()}; {versions}.\n")
    print("| | OneCard, tokens/s | direct, tokens/s | OneCard takes | first token | direct | same text |")
    print("|---|---:|---:|---:|---:|---:|---|")
    lengths = {"min_new_tokens": args.tokens, "max_new_tokens": args.tokens, "repetition_penalty": 1.0}
    settings = {"model_path": args.model_path, "device": args.device, "dtype": "fp32"}
    options = ChatConfig(engine="transformers", context=1024, **settings)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
        talk = chat.start(options, gguf_cache.for_llama)
    modes = {
        "greedy": Generation(mode=GREEDY, **lengths),
        "sampling": Generation(mode=SAMPLE, seed=1, **lengths),
        "4 beams": Generation(mode=BEAM, num_beams=4, **lengths),
    }
    for name, mode in modes.items():
        compare(name, talk, mode, args.pairs)


if __name__ == "__main__":
    main()
