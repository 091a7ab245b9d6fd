#!/usr/bin/env python3
"""What another busy process costs: the speed of training and chat beside one, as a share of the quiet speed.

    .venv/bin/python benchmarks/busy_machine.py [--rounds 3]

Training, chat with transformers and chat with llama.cpp are measured on two sides: with the waiting threads
as the libraries bring them, and with OneCard's setting (onecard/system/openmp.py). Each side is a
process that loads the demo model once and then works for a few seconds at a time: an optimizer step of 8
rows, or up to 48 tokens of an answer. The sides take turns, once while nothing else runs and once while one
other process computes without a pause, so that what happens on the machine meanwhile meets all of them. The
medians count. With the default number of rounds this takes about five minutes on two cores; it needs a quiet
machine.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.system import openmp  # torch is imported later, by the processes of the sides

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.6  # the speed beside one busy process, as a share of the quiet speed
SETTLED = 0.5  # seconds until the busy process has its share of the cores, or has left them
ROWS = 8  # of a training step
TOKENS, SECONDS = 48, 5.0  # an answer ends with whichever comes first
QUESTION = "Write a long story about a lighthouse keeper who finds a letter in a bottle."
GO, HOLD = b"g", b"h"
COMPUTE = f"""import os, select
while order := os.read(0, 1):
    while order == {GO!r} and not select.select([0], [], [], 0)[0]:
        sum(range(10_000))
"""
LIBRARIES, OURS = "the libraries' default", "OneCard's setting"
Burst = Callable[[], float]  # works for a few seconds and returns tokens/s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements of each kind, whose median counts [3]"
    )
    parser.add_argument("--work", choices=WORK, action="append", help="measure only this; all by default")
    parser.add_argument("--spins", help=f"try this {openmp.SPINS} instead of OneCard's [{openmp.OURS}]")
    parser.add_argument("--side", choices=(LIBRARIES, OURS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    works = args.work or list(WORK)
    if args.side:
        serve(works[0], args.side, args.spins)
        return
    print_head()
    print("| work | waiting threads | quiet, tokens/s | busy, tokens/s | busy / quiet |")
    print("|---|---|---:|---:|---:|")
    verdicts = []
    with busy_process() as other:
        for work in works:
            speeds = measure(work, other, args.rounds, args.spins)
            for side, (quiet, busy) in speeds.items():
                print(f"| {work} | {side} | {quiet:.1f} | {busy:.2f} | {busy / quiet:.2f} |", flush=True)
            before, (quiet, busy) = speeds[LIBRARIES][0], speeds[OURS]
            share = busy / max(quiet, before)  # so that a slow quiet speed is no way to the goal
            met = "met" if share >= GOAL else "NOT met"
            verdicts.append(
                f"- {work}: {share:.2f} of the best quiet speed is left beside a busy process (goal at least "
                f"{GOAL}: {met}); on the quiet machine OneCard's setting has {quiet / before:.2f} of the "
                "speed with the libraries' own"
            )
    print("\n" + "\n".join(verdicts))


def print_head() -> None:
    """Print date, machine and versions, as the other benchmarks do."""
    import importlib.metadata

    from onecard.system import hardware
    from onecard.training import plan

    installed = {**plan.versions(), "llama-cpp-python": importlib.metadata.version("llama-cpp-python")}
    versions = ", ".join(f"{name} {version}" for name, version in installed.items())
    load = os.getloadavg()[0]
    print(
        f"{date.today().isoformat()}; {hardware.describe_machine()}, load average {load:.1f}; {versions}.\n"
    )


class Other:
    """A process that computes without a pause whenever it is let go. It ends with this one."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", COMPUTE]
        # in a session of its own, as a program in another terminal is
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def hold(self) -> None:
        self._tell(HOLD)

    def let_go(self) -> None:
        self._tell(GO)

    def _tell(self, order: bytes) -> None:
        self.process.stdin.write(order)
        self.process.stdin.flush()
        time.sleep(SETTLED)


@contextlib.contextmanager
def busy_process() -> Iterator[Other]:
    other = Other()
    try:
        yield other
    finally:
        other.process.stdin.close()
        other.process.wait()


class Side:
    """A process that has loaded a model and works when it is told to."""

    def __init__(self, work: str, side: str, spins: str | None):
        variables = {name: value for name, value in os.environ.items() if name not in openmp.USERS}
        command = [sys.executable, __file__, "--work", work, "--side", side]
        command += ["--spins", spins] if spins else []
        self.process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        self.burst()  # loads the model, and warms up

    def burst(self) -> float:
        """Tokens/s of a few seconds of work."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"error: the process that measures ended with exit code {self.process.wait()}.")
        return float(answer)

    def close(self) -> None:
        self.process.stdin.close()  # ends it
        self.process.wait()
        self.process.stdout.close()


def measure(work: str, other: Other, rounds: int, spins: str | None) -> dict[str, tuple[float, float]]:
    """Side -> tokens/s on the quiet machine and beside the busy process; medians."""
    sides = {name: Side(work, name, spins) for name in (LIBRARIES, OURS)}
    speeds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in sides}
    try:
        for _ in range(rounds):
            for name, side in sides.items():
                speeds[name][0].append(side.burst())
            other.let_go()
            for name, side in sides.items():
                speeds[name][1].append(side.burst())
            other.hold()
    finally:
        for side in sides.values():
            side.close()
    return {
        name: (statistics.median(quiet), statistics.median(busy)) for name, (quiet, busy) in speeds.items()
    }


def serve(work: str, side: str, spins: str | None) -> None:
    """In a process of one side: load the model, then work once for each line of stdin, and print tokens/s."""
    if side == OURS and spins:
        os.environ[openmp.SPINS] = spins
    elif side == OURS:
        openmp.choose()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the libraries print does not go among the answers
    with WORK[work]() as burst:
        for _ in sys.stdin:
            answers.write(f"{burst()}\n")
            answers.flush()


@contextlib.contextmanager
def training() -> Iterator[Burst]:
    """A burst is one optimizer step of the demo model on the first rows of sample/instruct.json."""
    from onecard.config import options as config_options
    from onecard.config import training as config_training
    from onecard.training import loop, plan, strategy, trainer

    with tempfile.TemporaryDirectory(prefix="onecard-busy-") as folder:
        lines = json.loads((ROOT / "sample" / "instruct.json").read_text(encoding="utf-8"))[:ROWS]
        rows = Path(folder) / "rows.json"
        rows.write_text(json.dumps(lines, ensure_ascii=False), encoding="utf-8")
        run = Path(folder) / "run"
        values = {"model_path": "demo", "data_path": str(rows), "output_path": str(run), "batch_size": ROWS}
        values |= {"num_epochs": 1000, "test_size": 0, "device": "cpu"}  # the program ends long before
        options = config_options.build(config_training.FinetuneConfig, values)
        session = trainer.load(plan.prepare(options), run, strategy.choose(options.max_grad_norm))
        session.metrics.begin(rows_seen=0)

        def burst() -> float:
            tokens, started = session.progress.tokens, time.perf_counter()
            loop.one_step(session)
            return (session.progress.tokens - tokens) / (time.perf_counter() - started)

        try:
            yield burst
        finally:
            session.metrics.close()


@contextlib.contextmanager
def chatting(engine: str) -> Iterator[Burst]:
    """A burst is the beginning of an answer, without the time that reading the prompt takes."""
    from onecard.config.chat import ChatConfig
    from onecard.config.generation import GREEDY, Generation
    from onecard.conversion import gguf_cache
    from onecard.data import conversation
    from onecard.inference import chat

    talk = chat.start(ChatConfig(engine=engine, model_path="demo", device="cpu"), gguf_cache.for_llama)
    talk.eos_ids = []  # so that no token ends the answer
    settings = Generation(mode=GREEDY, max_new_tokens=TOKENS)

    def burst() -> float:
        stream = talk.stream(conversation.single(QUESTION), settings)
        with contextlib.closing(stream):
            for reply in stream:
                if reply.first is not None and reply.seconds - reply.first > SECONDS:
                    break
        return reply.speed

    try:
        yield burst
    finally:
        talk.engine.close()


WORK: dict[str, Callable[[], contextlib.AbstractContextManager[Burst]]] = {
    "training": training,
    "chat, transformers": lambda: chatting("transformers"),
    "chat, llama.cpp": lambda: chatting("llama.cpp"),
}

if __name__ == "__main__":
    main()
