#!/usr/bin/env python3
"""What the chat engine costs: time to first token and tokens/s against the engines called directly.

    .venv/bin/python benchmarks/chat_speed.py [--pairs 5] [--tokens 256] [--model_path demo] [--device auto]

Each pair runs one after the other in this process, in changing order, on the same prompt: onecard.chat's
stream, every snapshot taken as a window would, and model.generate or llama.cpp's own generate with the same
settings. Both write exactly as many tokens, and the texts must be equal, but for sampling, where each draws
its own numbers; in fp32, as 16 bits round another way when four beams read the prompt instead of one.
llama.cpp runs on the processor, and is left out where it is not installed.
"""

import argparse
import functools
import importlib.util
import statistics
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from onecard import chat, gguf, hardware, hub, plan, prompt
from onecard.chat_config import BEAM, GREEDY, SAMPLE, ChatConfig, Generation

QUESTION = "Write a long story about a lighthouse keeper who finds a letter in a bottle."
ENGINES = ("transformers", "llama.cpp")


class First(BaseStreamer):
    """When the first new token came."""

    def __init__(self) -> None:
        self.calls, self.at = 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call holds the prompt
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


def ours(talk: chat.Chat, settings: Generation) -> tuple[float, float, str]:
    """(seconds to the first token, seconds in all, text)."""
    started, first = time.perf_counter(), None
    for reply in talk.stream(conversation(), settings):
        if first is None and reply.text.tokens:
            first = time.perf_counter() - started
    talk.engine.forget()  # the next run begins as cold as the other side's
    return first, time.perf_counter() - started, reply.text.stable


def transformers_alone(talk: chat.Chat, settings: Generation) -> tuple[float, float, str]:
    engine = talk.engine
    ids = prompt.encode(conversation(), talk.template, talk.tokenizer)[0]
    asked = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        do_sample=settings.samples,
        temperature=settings.temperature if settings.samples else None,
        top_p=settings.top_p if settings.samples else None,
        top_k=settings.top_k if settings.samples else None,
        num_beams=settings.width,
        eos_token_id=talk.ends,
        pad_token_id=talk.ends[0],
    )
    given = torch.tensor([ids], device=engine.device)
    watch = First() if settings.width == 1 else None  # transformers streams no beams
    started = time.perf_counter()
    made = engine.model.generate(
        given, attention_mask=torch.ones_like(given), generation_config=asked, streamer=watch
    )
    text = prompt.decode(talk.tokenizer, made[0, len(ids) :].tolist())
    return (watch.at - started if watch else float("nan")), time.perf_counter() - started, text


def llama_alone(path: str, talk: chat.Chat, settings: Generation) -> tuple[float, float, str]:
    import llama_cpp

    llama = direct(talk.engine.threads, path)
    ids = prompt.encode(conversation(), talk.template, talk.tokenizer)[0]
    llama.reset()
    ends = {token: float("-inf") for token in talk.ends}

    def no_end(_, scores):
        for token in ends:
            scores[token] = float("-inf")
        return scores

    made, first, started = [], None, time.perf_counter()
    rules = llama_cpp.LogitsProcessorList([no_end])
    for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0, logits_processor=rules):
        first = first or time.perf_counter() - started
        made.append(token)
        if len(made) == settings.max_new_tokens:
            break
    text = prompt.decode(talk.tokenizer, made)
    taken = time.perf_counter() - started
    talk.engine.forget()
    return first, taken, text


@functools.cache
def direct(threads: int, path: str):
    """llama.cpp on the same file, by its own Python interface."""
    import llama_cpp

    return llama_cpp.Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)


def conversation() -> prompt.Conversation:
    return prompt.single(QUESTION)


def compare(name: str, talk: chat.Chat, settings: Generation, alone, pairs: int) -> None:
    sides = {"ours": lambda: ours(talk, settings), "alone": lambda: alone(talk, settings)}
    runs: dict[str, list[tuple[float, float, str]]] = {side: [] for side in sides}
    for side in sides:  # once to warm up
        sides[side]()
    for number in range(pairs):
        for side in list(sides) if number % 2 else reversed(list(sides)):
            runs[side].append(sides[side]())
    firsts = {side: statistics.median(first for first, _, _ in found) for side, found in runs.items()}
    speeds = {
        side: statistics.median(settings.max_new_tokens / taken for _, taken, _ in found)
        for side, found in runs.items()
    }
    ratio = statistics.median(
        mine[1] / theirs[1] for mine, theirs in zip(runs["ours"], runs["alone"], strict=True)
    )
    same = "yes" if len({text for found in runs.values() for *_, text in found}) == 1 else "NO"
    same = "-" if settings.samples else same
    direct = "-" if firsts["alone"] != firsts["alone"] else f"{firsts['alone'] * 1000:.0f} ms"
    print(
        f"| {name} | {speeds['ours']:.1f} | {speeds['alone']:.1f} | {100 * (ratio - 1):+.1f} % "
        f"| {firsts['ours'] * 1000:.0f} ms | {direct} | {same} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--model_path", default="demo")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions().items())
    print(f"{date.today().isoformat()}; {hardware.describe_machine()}; {versions}.\n")
    print("| | OneCard, tokens/s | direct, tokens/s | OneCard takes | first token | direct | same text |")
    print("|---|---:|---:|---:|---:|---:|---|")
    lengths = {"min_new_tokens": given.tokens, "max_new_tokens": given.tokens, "repetition_penalty": 1.0}
    for engine in ENGINES:
        if engine == "llama.cpp" and importlib.util.find_spec("llama_cpp") is None:
            print("llama.cpp is not installed (bash tools/setup.sh cpu): not measured.")
            continue
        settings = {"model_path": given.model_path}
        if engine == "transformers":
            settings |= {"device": given.device, "dtype": "fp32"}
        options = ChatConfig(engine=engine, context=1024, **settings)
        talk = chat.start(options, hub.locate, hub.fetch_adapter, gguf.for_llama, lambda _: None)
        alone = transformers_alone
        if engine == "llama.cpp":
            path = gguf.for_llama(Path(hub.locate(given.model_path)), {})[0]
            alone = functools.partial(llama_alone, str(path))
        compare(f"{engine}, greedy", talk, Generation(mode=GREEDY, **lengths), alone, given.pairs)
        if engine == "transformers":
            sample = Generation(mode=SAMPLE, seed=1, **lengths)
            compare(f"{engine}, sampling", talk, sample, alone, given.pairs)
            beam = Generation(mode=BEAM, num_beams=4, **lengths)
            compare(f"{engine}, 4 beams", talk, beam, alone, given.pairs)


if __name__ == "__main__":
    main()
