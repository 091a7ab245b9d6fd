#!/usr/bin/env python3
"""What the child process of the llama.cpp engine costs: tokens/s, compared with the same code in here.

    .venv/bin/python benchmarks/engine_child.py [--pairs 9] [--tokens 64] [--threads 1] [--model_path demo]

Both sides read the same prompt and choose the most probable token, one step at a time. They run one after the
other in alternating order, and must choose the same tokens.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.conversion import gguf_cache
from onecard.hub import locate
from onecard.inference import llama_cpp, llama_cpp_engine, llama_cpp_model
from onecard.system import hardware

CONTEXT = 512
PROMPT = 64  # tokens


def in_child(engine: llama_cpp_engine.Engine, prompt: list[int], count: int) -> list[int]:
    engine.forget()
    sequence = engine.open(prompt)
    for _ in sequence.read():
        pass
    scores, ids = sequence.first(), []
    for _ in range(count):
        ids.append(int(scores.numpy().argmax()))
        scores = sequence.advance([0], ids[-1:])
    sequence.close()
    return ids


def in_process(model: llama_cpp_model.Model, prompt: list[int], count: int) -> list[int]:
    length, added, ids = model.cut(0, 0), prompt, []
    while True:
        (scores,) = model.decode([llama_cpp_model.Part(0, length, added, 1)])
        if len(ids) == count:
            return ids
        length += len(added)
        ids.append(int(scores.argmax()))
        added = ids[-1:]


def speed(work: Callable[[], list[int]], answers: list[list[int]]) -> float:
    started = time.perf_counter()
    answers.append(work())
    return len(answers[-1]) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--threads", type=int, help="of llama.cpp; usually one per physical core")
    parser.add_argument("--model_path", default="demo", help="a model, or a .gguf file with a tokenizer")
    args = parser.parse_args()
    path = Path(args.model_path)
    if path.suffix != ".gguf":
        path, _ = gguf_cache.for_llama(Path(locate.locate(args.model_path)), {})
    threads = hardware.choose_threads(args.threads).value
    engine = llama_cpp_engine.Engine(path, llama_cpp.tokenizer_of(path), CONTEXT, {}, threads)
    model = llama_cpp_model.Model(path, CONTEXT, {}, threads)
    prompt = [number * 7 % 250 + 2 for number in range(PROMPT)]
    sides = [
        lambda answers: speed(lambda: in_child(engine, prompt, args.tokens), answers),
        lambda answers: speed(lambda: in_process(model, prompt, args.tokens), answers),
    ]
    answers: list[list[int]] = []
    for side in sides:
        side(answers)  # the first answers only warm up
    speeds: list[list[float]] = [[], []]
    for pair in range(args.pairs):
        for number in (0, 1) if pair % 2 else (1, 0):
            speeds[number].append(sides[number](answers))
    assert all(answer == answers[0] for answer in answers), "the two sides chose different tokens"
    ratios = [child / plain for child, plain in zip(*speeds, strict=True)]
    child, plain, ratio = map(statistics.median, (*speeds, ratios))
    print(f"{hardware.describe_machine()}; {path.name}, {threads} threads, {args.pairs} pairs, medians")
    print(f"child {child:.1f} tokens/s, in this process {plain:.1f} tokens/s, ratio {ratio:.3f}")
    model.close()
    engine.close()


if __name__ == "__main__":
    main()
