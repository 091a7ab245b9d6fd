#!/usr/bin/env python3
"""What several users at once gain: tokens/s of 8 answers against one, beside llama.cpp's own server.

    .venv/bin/python benchmarks/serving_speed.py [--clients 8] [--tokens 64] [--rounds 3] [--types f16,q4_1]

Both sides answer the same prompts of the demo model greedily, each client another one, and write the same
number of tokens. A round measures one client and all clients on each side, in alternating order. OneCard's
side is the stream of inference/chat.py. The other side is the server of llama.cpp from the wheel xllamacpp
(`pip install xllamacpp`, in this environment or another one that --python names), over HTTP on this machine;
without it only OneCard is measured, and the last line says so. The demo model comes in q4_1.
"""

import argparse
import contextlib
import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PROMPTS = [
    f"Write a long story about {thing}." for thing in ("a lighthouse", "a clock", "the sea", "a violin")
]
PROMPTS += [f"Explain in detail how {thing} works." for thing in ("a bicycle", "a radio", "a bank", "snow")]
GOAL, SHARE = 2.5, 0.9  # of one client's speed; of the gain of llama.cpp's server
CONTEXT = 512
START = 60  # seconds for the server to listen
Answer = Callable[[int], int]  # number of a client -> tokens of its answer


def tokens_a_second(answer: Answer, clients: int) -> float:
    """All clients ask at once; tokens of all answers in the time until the last one is complete."""
    counts: list[int] = []
    threads = [
        threading.Thread(target=lambda number=number: counts.append(answer(number)))
        for number in range(clients)
    ]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    assert len(counts) == clients, "an answer failed"
    return sum(counts) / seconds


@contextlib.contextmanager
def onecard(file: Path, args: argparse.Namespace) -> Iterator[tuple[Answer, list[list[int]]]]:
    """OneCard's side, and the token ids of the prompts."""
    from onecard.config.chat import ChatConfig
    from onecard.config.generation import GREEDY, Generation
    from onecard.data import conversation as data_conversation
    from onecard.data import encode as data_encode
    from onecard.inference import chat

    options = ChatConfig(engine="llama.cpp", model_path="demo", context=CONTEXT, threads=args.threads)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
        talk = chat.start(options, lambda *_: (file, {}), sequences=args.clients)
    talk.eos_ids = []  # so that no token ends an answer
    settings = Generation(mode=GREEDY, repetition_penalty=1.0, max_new_tokens=args.tokens)
    questions = [data_conversation.single(PROMPTS[n % len(PROMPTS)]) for n in range(args.clients)]

    def answer(number: int) -> int:
        *_, last = talk.stream(questions[number], settings)
        return last.text.tokens

    try:
        yield answer, [data_encode.encode(one, talk.template, talk.tokenizer)[0] for one in questions]
    finally:
        talk.engine.close()


@contextlib.contextmanager
def llama_server(file: Path, prompts: list[list[int]], args: argparse.Namespace) -> Iterator[Answer]:
    """The side of llama.cpp's own server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [args.python, __file__, "--serve", str(file), str(port), str(args.clients), str(args.threads)]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def post(prompt: list[int], count: int) -> int:
        body = {
            "prompt": prompt,
            "n_predict": count,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": True,
        }
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        with contextlib.closing(link):
            link.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            return int(json.load(link.getresponse())["tokens_predicted"])

    try:
        until = time.monotonic() + START
        while True:
            try:
                post([1], 1)
                break
            except (ConnectionError, KeyError):  # it does not listen yet, or is loading the model
                assert server.poll() is None, f"the server ended with {server.returncode}"
                assert time.monotonic() < until, f"the server did not listen within {START} s"
                time.sleep(0.2)
        yield lambda number: post(prompts[number], args.tokens)
    finally:
        server.kill()
        server.wait()


def serve(file: str, port: str, clients: str, threads: str) -> None:
    """In a child: run the server until the parent ends it."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.port = file, int(port)
    settings.n_parallel, settings.n_ctx = int(clients), CONTEXT * int(clients)
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = int(threads)
    settings.n_gpu_layers = 0
    server = xllamacpp.Server(settings)
    sys.stdin.read()
    del server


def has_wheel(python: str) -> bool:
    return (
        subprocess.run([python, "-c", "import xllamacpp"], capture_output=True, check=False).returncode == 0
    )


def gains(answers: list[Answer], clients: int, rounds: int) -> list[list[tuple[float, float]]]:
    """For each side, (one client, all clients) in tokens/s for each round."""
    speeds: list[list[tuple[float, float]]] = [[] for _ in answers]
    for answer in answers:  # once to warm up
        tokens_a_second(answer, clients)
    for number in range(rounds):
        order = range(len(answers)) if number % 2 else reversed(range(len(answers)))
        for side in order:
            speeds[side].append((tokens_a_second(answers[side], 1), tokens_a_second(answers[side], clients)))
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--types", default="f16,q4_1", help="types of the weights")
    parser.add_argument("--threads", type=int, help="of llama.cpp; usually one per physical core")
    parser.add_argument("--python", default=sys.executable, help="the Python that has the wheel xllamacpp")
    parser.add_argument("--serve", nargs=4, metavar=("FILE", "PORT", "CLIENTS", "THREADS"), help="(internal)")
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve)
        return
    from onecard.conversion import gguf, gguf_cache
    from onecard.hub import locate
    from onecard.system import hardware

    args.threads = hardware.choose_threads(args.threads).value
    has_server = has_wheel(args.python)
    print(
        f"{hardware.describe_machine()}, {args.threads} threads, {args.tokens} tokens, {args.rounds} rounds\n"
    )
    print(f"| weights | side | 1 client, tokens/s | {args.clients} clients, tokens/s | gain |")
    print("|---|---|---:|---:|---:|")
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="onecard-serving-") as name:
        with contextlib.redirect_stdout(sys.stderr):
            base, _ = gguf_cache.for_llama(Path(locate.locate("demo")), {})
        for kind in args.types.split(","):
            with contextlib.redirect_stdout(sys.stderr):
                file = base if kind == "f16" else gguf.quantize(base, Path(name) / f"{kind}.gguf", kind)
            with contextlib.ExitStack() as stack:
                answer, prompts = stack.enter_context(onecard(file, args))
                answers = [answer]
                if has_server:
                    answers.append(stack.enter_context(llama_server(file, prompts, args)))
                speeds = gains(answers, args.clients, args.rounds)
            factors = []
            for side, rounds in zip(("OneCard", "llama.cpp's server"), speeds, strict=False):
                one, many = (statistics.median(values) for values in zip(*rounds, strict=True))
                factors.append(statistics.median(after / before for before, after in rounds))
                print(f"| {kind} | {side} | {one:.1f} | {many:.1f} | {factors[-1]:.2f} |", flush=True)
            verdicts.append(f"{kind}: gain {factors[0]:.2f}, goal {GOAL}: {met(factors[0] >= GOAL)}")
            if has_server:
                share = factors[0] / factors[1]
                verdicts.append(
                    f"{kind}: {share:.2f} of the server's gain, goal {SHARE}: {met(share >= SHARE)}"
                )
    if not has_server:
        verdicts.append("llama.cpp's own server was not measured: the wheel xllamacpp is not installed")
    print("\n" + "\n".join(f"- {verdict}" for verdict in verdicts))


def met(is_met: bool) -> str:
    return "met" if is_met else "NOT met"


if __name__ == "__main__":
    main()
