#!/usr/bin/env python3
"""What the tools cost: GB/s compared with a plain copy, peak memory, and tokens/s of the llama.cpp
engine.

    .venv/bin/python benchmarks/tools.py weights [FOLDER] [--layers 32]
    .venv/bin/python benchmarks/tools.py engine [--pairs 5] [--tokens 256]

weights: a model in LLaMA 7B's shape, in files of 500 MiB, is converted in both directions and merged with
an adapter on all linear layers. Each tool takes turns with a plain copy of the same bytes to the same
disk; both are synced, start-up is included, and the best try counts. "Start-up alone" is the same work on
a model with the same tokenizer and the same number of layers, but hardly any weights; a part of start-up
overlaps with the work. Peak memory is that of the largest process. FOLDER is on the disk that is measured
and needs room for two such models: 28 GB, or 16 GB with 18 layers.

engine: the demo model in GGUF files of several types, with and without an adapter. OneCard's stream, with
every snapshot taken as the terminal does, is compared with llama.cpp's own C interface in the shortest
possible loop: decode, take the largest logit, repeat. File, context, batch, threads, prompt and number of
tokens are the same. Both sides write in this process at the same time, one token each in alternating
order, so that a slow moment meets both. The texts must be equal.

Each section prints the date, the machine and a Markdown table. On a busy machine the figures mean
nothing.
"""

import argparse
import contextlib
import ctypes
import functools
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import chat_speed  # beside this file
import numpy as np
import random_llama

from onecard.config.chat import ChatConfig
from onecard.config.generation import GREEDY, Generation
from onecard.conversion import gguf, meta_layout
from onecard.data import encode as data_encode
from onecard.hub import locate
from onecard.inference import chat
from onecard.inference import llama_cpp as inference_llama_cpp
from onecard.system import hardware
from onecard.training import plan

ROOT = Path(__file__).resolve().parent.parent
NARROW = 128  # width of the model that measures start-up alone
BYTES = 2  # size of a weight
# Goals: at least this share of a copy's speed, at most this share of the model's size, and at least this
# share of the speed of llama.cpp alone.
SPEED, MEMORY, ENGINE = 0.5, 0.25, 0.97
CONTEXT, BATCH = 1024, 256  # tokens
# This runs a program and writes the peak memory of its largest process (KiB) into a file. It imports nothing
# large, because its own memory also counts.
WITH_PEAK = """import resource, subprocess, sys
ended = subprocess.run(sys.argv[2:])
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(ended.returncode)"""
MAKE = {"original": random_llama.make_meta, "transformers": random_llama.make_hf}
MERGE = "merge, r 16 on all linear layers"
WORK = {  # layout of the source -> {name: options of convert_llama}
    "original": {"original -> transformers": []},
    "transformers": {
        "transformers -> original, 2 shards": ["--to", "meta", "--num_shards", "2"],
        MERGE: [],
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    sections = parser.add_subparsers(required=True, metavar="weights|engine")
    one = sections.add_parser("weights", help="GB/s and peak memory of converting and merging")
    one.add_argument(
        "folder", nargs="?", type=Path, default=Path(), help="a folder on the disk that is measured"
    )
    one.add_argument(
        "--layers", type=int, default=32, help="layers of the model, 0.4 GB each; the rest of it has 0.5 GB"
    )
    one.add_argument(
        "--width", type=int, default=4096, help="width of the model; change it only to try this program"
    )
    one.add_argument("--repeats", type=int, default=3, help="tries, of which the best counts")
    one.set_defaults(section=weights)
    two = sections.add_parser("engine", help="tokens/s compared with llama.cpp alone")
    two.add_argument("--pairs", type=int, default=5)
    two.add_argument("--tokens", type=int, default=256, help="tokens of an answer")
    two.add_argument("--types", default="f16,q8_0", help="types of the weights of the base model")
    two.set_defaults(section=engine)
    args = parser.parse_args()
    installed = plan.versions()
    if args.section is engine:
        inference_llama_cpp.library()  # raises UserError with the command that installs it
        installed["llama-cpp-python"] = importlib.metadata.version("llama-cpp-python")
    versions = ", ".join(f"{name} {version}" for name, version in installed.items())
    load = os.getloadavg()[0]
    print(f"{date.today().isoformat()}; {hardware.describe_machine()}, load average {load:.1f}; {versions}.")
    args.section(args)


def weights(args: argparse.Namespace) -> None:
    """Compare conversion and merge with a plain copy."""
    whole = random_llama.shape_of(args.width, args.layers)
    parameters = sum(np.prod(weight.shape, dtype=int) for weight in meta_layout.weights(whole, 1))
    free = shutil.disk_usage(args.folder).free
    if 2.1 * BYTES * parameters > free:
        problem = f"{args.folder} has {free / 1e9:.0f} GB free, which is not enough."
        sys.exit(f"error: {problem} Name another folder, or use fewer --layers.")
    print(f"{args.layers} layers of width {args.width}, best of {args.repeats}.\n")
    print("| work | size | plain copy | tool | ratio | peak memory | of the size | start-up alone |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    verdicts, shares = [], []
    for layout, works in WORK.items():
        with tempfile.TemporaryDirectory(prefix="onecard-tools-", dir=args.folder) as name:
            place = Path(name)
            make(place, layout, random_llama.shape_of(NARROW, args.layers))
            starts = {
                work: min(ran(command(work, place, options), place) for _ in range(args.repeats))
                for work, options in works.items()
            }
            make(place, layout, whole)
            for work, options in works.items():
                size, plain, tool, peak = measure(work, place, options, args.repeats)
                verdicts.append(f"{work}: {plain / tool:.2f} of a copy's speed, {goal(plain / tool, SPEED)}")
                shares.append(peak / size)
                seconds, memory = starts[work]
                print(
                    f"| {work} | {size / 1e9:.2f} GB | {size / plain / 1e9:.2f} GB/s "
                    f"| {size / tool / 1e9:.2f} GB/s | {plain / tool:.2f} | {peak / 2**20:.0f} MiB "
                    f"| {peak / size:.3f} | {seconds:.1f} s, {memory / 2**20:.0f} MiB |",
                    flush=True,
                )
    met = "met" if max(shares) < MEMORY else "NOT met"
    verdicts.append(f"peak memory: at most {max(shares):.3f} of the size, goal below {MEMORY}: {met}")
    print("\n" + "\n".join(f"- {verdict}" for verdict in verdicts))


def goal(value: float, least: float) -> str:
    return f"goal at least {least}: {'met' if value >= least else 'NOT met'}"


def make(place: Path, layout: str, shape: meta_layout.Shape) -> None:
    for name in ("source", "adapter"):
        shutil.rmtree(place / name, ignore_errors=True)
    MAKE[layout](place / "source", shape)
    random_llama.make_adapter(place / "adapter", shape)


def command(work: str, place: Path, options: list[str]) -> list[str | Path]:
    source, target = place / "source", place / "out"
    if work == MERGE:
        options_of_merge = ["--model_path", source, "--lora_path", place / "adapter", "--output_path", target]
        return [ROOT / "tools/merge_lora.py", *options_of_merge]
    return [ROOT / "tools/convert_llama.py", "--input_dir", source, "--output_dir", target, *options]


def measure(work: str, place: Path, options: list[str], repeats: int) -> tuple[int, float, float, int]:
    """Return size, seconds of a plain copy and of the tool, and peak bytes, from the best of some tries."""
    source = place / "source"
    size = sum(path.stat().st_size for path in source.iterdir())
    plain, tool, peaks = [], [], []
    for _ in range(repeats):  # in turns, so that the state of the disk is the same for both
        plain.append(copied(source, place / "out"))
        seconds, peak = ran(command(work, place, options), place)
        tool.append(seconds)
        peaks.append(peak)
    return size, min(plain), min(tool), max(peaks)


def copied(source: Path, target: Path) -> float:
    """Return the seconds of a plain copy with sync."""
    started = time.monotonic()
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def ran(command: list[str | Path], place: Path) -> tuple[float, int]:
    """Return the seconds of a tool with its start, and the peak bytes of its largest process."""
    started = time.monotonic()
    watched = [sys.executable, "-c", WITH_PEAK, place / "peak", sys.executable, *command]
    subprocess.run(list(map(str, watched)), check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    shutil.rmtree(place / "out")
    return seconds, 1024 * int((place / "peak").read_text(encoding="utf-8"))


def engine(args: argparse.Namespace) -> None:
    """Compare the tokens/s of the llama.cpp engine with llama.cpp alone."""
    base, ratios = Path(locate.locate("demo")), []
    with tempfile.TemporaryDirectory(prefix="onecard-tools-") as name:
        place = Path(name)
        shape = meta_layout.from_config(json.loads((base / "config.json").read_text(encoding="utf-8")), base)
        random_llama.make_adapter(place / "adapter", shape)
        with contextlib.redirect_stdout(sys.stderr):  # the converter prints its progress
            adapter = gguf.adapter(place / "adapter", base, place / "adapter.gguf")
            files = {
                kind: gguf.base(base, place / f"{kind}.gguf", any_tokenizer=True, kind=kind)
                for kind in args.types.split(",")
            }
        print(f"SmolLM2-135M-Instruct, {args.tokens} tokens, {args.pairs} pairs, medians.\n")
        print("| | OneCard, tokens/s | llama.cpp, tokens/s | ratio | of the pairs | same text |")
        print("|---|---:|---:|---:|---:|---|")
        for kind, file in files.items():
            for added in (None, adapter):
                title = f"{kind}, adapter of rank {random_llama.RANK} on all linear layers" if added else kind
                figures = beside_bare(file, added, str(place / "adapter") if added else "", args)
                pairs = [1 / takes for takes in figures.takes]
                ratios.append(statistics.median(pairs))
                print(
                    f"| {title} | {figures.speeds[0]:.1f} | {figures.speeds[1]:.1f} | {ratios[-1]:.3f} "
                    f"| {min(pairs):.3f} to {max(pairs):.3f} | {'yes' if figures.same else 'NO'} |",
                    flush=True,
                )
    print(f"\n- the smallest ratio is {min(ratios):.3f}, {goal(min(ratios), ENGINE)}")


def beside_bare(
    file: Path, adapter: Path | None, lora_path: str, args: argparse.Namespace
) -> chat_speed.Compared:
    """Run one GGUF file, with or without an adapter, in OneCard's chat and in llama.cpp alone."""
    options = ChatConfig(engine="llama.cpp", model_path="demo", lora_path=lora_path, context=CONTEXT)

    def to_gguf(_: Path, folders: dict[str, Path]) -> tuple[Path, dict[str, Path]]:
        return file, dict.fromkeys(folders, adapter)

    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
        talk = chat.start(options, to_gguf)
    talk.eos_ids = []  # so that no token ends the answer, and both write the same number
    settings = Generation(mode=GREEDY, repetition_penalty=1.0, max_new_tokens=args.tokens)
    bare = Bare(file, adapter, talk.engine.threads)
    ids = data_encode.encode(chat_speed.conversation(), talk.template, talk.tokenizer)[0]
    decode = functools.partial(data_encode.decode, talk.tokenizer)
    try:
        return chat_speed.compared_in_turns(
            lambda: chat_speed.our_tokens(talk, settings),
            lambda: bare.tokens(ids, args.tokens, decode),
            args.tokens,
            args.pairs,
        )
    finally:
        bare.close()
        talk.engine.close()


class Bare:
    """llama.cpp through its C interface, with only the calls that every program needs."""

    def __init__(self, file: Path, adapter: Path | None, threads: int):
        self.api = api = inference_llama_cpp.library()  # the package's own module with its log turned off
        self.model = api.llama_model_load_from_file(os.fsencode(file), api.llama_model_default_params())
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT, BATCH, BATCH
        settings.n_threads = settings.n_threads_batch = threads
        self.state = api.llama_init_from_model(self.model, settings)
        self.entries = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        if adapter:
            loaded = api.llama_adapter_lora_init(self.model, os.fsencode(adapter))
            api.llama_set_adapters_lora(
                self.state, (api.llama_adapter_lora_p_ctypes * 1)(loaded), 1, (ctypes.c_float * 1)(1.0)
            )

    def tokens(self, prompt: list[int], count: int, decode: Callable[[list[int]], str]) -> Iterator[str]:
        """Yield an empty text for each of `count` most probable tokens, and the whole text at the end."""
        api, answer = self.api, []
        api.llama_memory_clear(api.llama_get_memory(self.state), False)
        while len(answer) < count:
            tokens = (api.llama_token * len(prompt))(*prompt)
            code = api.llama_decode(self.state, api.llama_batch_get_one(tokens, len(prompt)))
            assert code == 0, code
            scores = np.ctypeslib.as_array(api.llama_get_logits_ith(self.state, -1), (self.entries,))
            prompt = [int(scores.argmax())]
            answer += prompt
            yield ""
        yield decode(answer)

    def close(self) -> None:
        self.api.llama_free(self.state)
        self.api.llama_model_free(self.model)


if __name__ == "__main__":
    main()
