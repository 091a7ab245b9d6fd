"""Several people use one GGUF file: whoever is answered with which adapters, each gets their own answer.

Weights, keys and values are in fp32. In 16 bits a prompt that is read anew is rounded in another way than
one whose beginning is reused, so texts may differ where two tokens are nearly equal (docs/chat.md says how
often).
"""

import dataclasses
import itertools
import threading
from collections.abc import Iterator

import pytest

from onecard.config.generation import GREEDY, SAMPLE, Generation
from onecard.data import conversation as data_conversation
from onecard.data import template as data_template
from onecard.inference import llama_cpp_engine
from onecard.inference.chat import Chat
from tests.support import tiny

pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra of its own: bash tools/setup.sh cpu")

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = Generation(GREEDY, repetition_penalty=1.0, min_new_tokens=0, max_new_tokens=24, seed=1)
DRAWN = dataclasses.replace(QUICK, mode=SAMPLE, temperature=1.5, top_p=1.0, seed=12)
CHOICES = ((), (("a", 1.0),), (("b", 1.0),), (("a", 0.5), ("b", 0.7)))


@pytest.fixture(scope="module")
def talk(tiny_gguf) -> Iterator[Chat]:
    """The tiny model in llama.cpp with two adapters."""
    base, files = tiny_gguf
    engine = llama_cpp_engine.Engine(base, tiny.tokenizer(), 512, files, threads=1, exact=True)
    yield Chat(engine, engine.tokenizer, data_template.load("alpaca", engine.tokenizer))
    engine.close()


def answer(talk: Chat, word: str, settings: Generation, active=()) -> str:
    *_, reply = talk.stream(data_conversation.single(f"Say {word}"), settings, active)
    return reply.text.whole


def test_four_answers_at_once_keep_to_their_adapters(talk, monkeypatch):
    """I10: four threads ask at once, and each gets the answers that it gets alone.

    They use the base, two adapters, and both with weights, so the adapters change from answer to answer.
    """
    words = tiny.WORDS[:4]

    def answers(word: str, active) -> tuple[str, ...]:
        return tuple(answer(talk, word, settings, active) for settings in (QUICK, DRAWN))

    alone = {(word, active): answers(word, active) for word, active in itertools.product(words, CHOICES)}
    assert all(len({alone[word, active] for active in CHOICES}) == 4 for word in words)
    together, changes, process = {}, [], talk.engine.process
    activate = process.activate
    monkeypatch.setattr(process, "activate", lambda active: changes.append(active) or activate(active))
    starts = threading.Barrier(4)

    def work(active) -> None:
        for word in words:
            starts.wait(60)
            together[word, active] = answers(word, active)

    threads = [threading.Thread(target=work, args=(active,)) for active in CHOICES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert together == alone
    assert len(changes) >= 3 * len(words)


def test_a_seed_gives_the_same_answer_twenty_times(talk):
    """I11: the answers are equal, alone and while another user is answered all the time."""
    alone = {answer(talk, "red", DRAWN) for _ in range(20)}
    assert len(alone) == 1
    stop, others = threading.Event(), []

    def other() -> None:
        while not stop.is_set():
            others.append(answer(talk, f"blue {len(others)}", dataclasses.replace(DRAWN, seed=len(others))))

    thread = threading.Thread(target=other)
    thread.start()
    together = {answer(talk, "red", DRAWN) for _ in range(20)}
    stop.set()
    thread.join(60)
    assert together == alone
    assert len(set(others)) > 1
