"""Several users of one GGUF file at once: computed together, answered as if each were alone.

Weights, keys and values are in fp32, so tokens differ from those of a cold engine only where its two best
are nearly equal.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from onecard.config.generation import GREEDY, Generation
from onecard.conversion import gguf
from onecard.data import conversation as data_conversation
from onecard.data import template as data_template
from onecard.errors import UserError
from onecard.inference import llama_cpp_process
from onecard.inference.chat import Chat
from onecard.inference.engine import Sequence
from onecard.inference.llama_cpp_engine import Engine
from tests.support import cold_answers, tiny
from tests.support.cold_answers import first_difference

pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra of its own: bash tools/setup.sh cpu")

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 16  # tokens of an answer
CLIENTS, SEQUENCES = 8, 5
MIXTURES = ((), (("a", 1.0),), (("b", 1.0),), (("a", 0.5), ("b", 0.7)))
SHARED = [5, 6, 7, 8, 9, 10, 11, 12]  # a beginning that all prompts have, so that caches could be confused
PROMPTS = [[*SHARED[:n], 20 + n, 30 + n, 40 + n] for n in range(2, 8)] + [SHARED * 6 + [3]]
LONG = [2 + number % 200 for number in range(400)]
QUICK = Generation(GREEDY, repetition_penalty=1.0, min_new_tokens=40, max_new_tokens=40, seed=1)


def make(tiny_gguf, sequences: int) -> Engine:
    base, files = tiny_gguf
    return Engine(base, tiny.tokenizer(), 512, files, threads=1, exact=True, sequences=sequences)


@pytest.fixture(scope="module")
def engine(tiny_gguf) -> Iterator[Engine]:
    new_engine = make(tiny_gguf, SEQUENCES)
    yield new_engine
    new_engine.close()


@pytest.fixture(scope="module")
def cold(tiny_gguf) -> dict[tuple[int, tuple], list[tuple[int, float]]]:
    """(prompt, mixture) -> tokens of the answer of an engine that holds nothing else, and their margins."""
    alone, answers = make(tiny_gguf, 1), {}
    for number, prompt in enumerate(PROMPTS):
        for mixture in MIXTURES:
            alone.forget()
            answers[number, mixture] = []
            for token, margin in answer(alone, prompt, mixture):
                answers[number, mixture].append((token, margin))
    alone.close()
    return answers


def answer(engine: Engine, prompt: list[int], mixture, count: int = COUNT) -> cold_answers.Answer:
    return cold_answers.answer(engine, prompt, mixture, count)


def in_threads(works) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)


def is_at_rest(engine: Engine) -> bool:
    turns, slots = engine.batching, engine.memory.slots
    return not (turns.wakes or turns.arrivals or turns.busy or any(slot.is_open for slot in slots))


def test_eight_clients_get_the_answers_of_one(engine, cold, monkeypatch):
    """I10: prompts with the same beginning under A, B, both and none, at once, with what was kept in use.

    There are fewer sequences than clients, so some wait. Most steps are computed together.
    """
    for number in range(len(PROMPTS)):
        texts = [tuple(token for token, _ in cold[number, mixture]) for mixture in MIXTURES]
        assert len(set(texts)) == len(MIXTURES)
    wrong, sizes, process = [], [], engine.process
    decode = process.decode
    monkeypatch.setattr(process, "decode", lambda parts, to: sizes.append(len(parts)) or decode(parts, to))
    copies, copy = [], process.copy
    monkeypatch.setattr(process, "copy", lambda *what: copies.append(what) or copy(*what))

    def client(seed: int) -> None:
        jobs = [(number, mixture) for number in range(len(PROMPTS)) for mixture in MIXTURES]
        random.Random(seed).shuffle(jobs)
        for number, mixture in jobs:
            tokens = answer(engine, PROMPTS[number], mixture)
            wrong.append(first_difference(tokens, cold[number, mixture]))

    in_threads([lambda seed=seed: client(seed) for seed in range(CLIENTS)])
    assert len(wrong) == CLIENTS * len(cold)
    assert [difference for difference in wrong if difference] == []
    assert sum(size > 1 for size in sizes) > len(sizes) / 4
    assert len(copies) > 10, "prompts begin with what others have read"
    assert is_at_rest(engine)


def test_a_batch_gives_the_scores_of_single_steps(engine):
    """All scores, not only the best ones, and each sequence gets its own."""
    mixture, alone = MIXTURES[1], []
    engine.forget()
    for prompt in PROMPTS[:3]:
        sequence = engine.open(prompt, mixture)
        list(sequence.read())
        alone.append([sequence.first().clone()] + [sequence.advance([0], [t]).clone() for t in (3, 4, 5)])
        sequence.close()
        engine.forget()
    together: list[list[torch.Tensor]] = [[] for _ in alone]

    def work(number: int) -> None:
        sequence = engine.open(PROMPTS[number], mixture)
        list(sequence.read())
        together[number].append(sequence.first().clone())
        together[number] += [sequence.advance([0], [token]).clone() for token in (3, 4, 5)]
        sequence.close()

    in_threads([lambda number=number: work(number) for number in range(3)])
    for ours, expected in zip(together, alone, strict=True):
        assert torch.allclose(torch.cat(ours), torch.cat(expected), rtol=0, atol=1e-4)


def test_the_next_turn_of_each_conversation_is_kept(engine):
    """Three conversations by turns, each with an adapter of its own: all reuse what they have read."""
    prompts = [[50 + n, *SHARED] for n in range(3)]
    engine.forget()
    for length in (8, 9):
        for prompt, mixture in zip(prompts, MIXTURES, strict=False):
            sequence = engine.open(prompt[:length], mixture)
            list(sequence.read())
            assert sequence.reused == (7 if length == 9 else 0) + (length == 9)
            sequence.close()
    sequence = engine.open(prompts[0], MIXTURES[1])
    list(sequence.read())
    assert sequence.reused == 0, "read with another adapter"
    sequence.close()


def test_cancelling_works_in_the_queue_and_in_the_prompt(engine):
    opened = [engine.open(LONG[:20]) for _ in range(SEQUENCES)]
    for sequence in opened:
        list(sequence.read())
    waiting = engine.open(LONG)
    reading = waiting.read()
    assert next(reading) == 0, "no sequence is free"
    waiting.cancel()
    assert list(reading) == []
    opened.pop().close()
    half = engine.open(LONG)
    progress = half.read()
    place = next(progress)
    assert place < len(LONG)
    half.cancel()
    assert list(progress) == []
    with pytest.raises(RuntimeError, match="cancelled"):
        half.first()
    for sequence in (waiting, half, *opened):
        sequence.close()
    assert is_at_rest(engine)


def test_a_hundred_cancelled_answers_leave_nothing(engine, cold):
    """They end in the queue, in the prompt and in the answer, whoever closes them."""
    generator, ended = random.Random(3), []

    def go_on(sequence: Sequence) -> None:
        for _ in sequence.read():
            pass
        sequence.first()
        while True:
            sequence.advance([0], [3])

    def client(seed: int) -> None:
        for _ in range(13):
            sequence = engine.open(LONG[: generator.randrange(2, 300)], MIXTURES[seed % 4])
            timer = threading.Timer(generator.random() * 0.05, sequence.cancel)
            timer.start()
            with pytest.raises(RuntimeError, match="cancelled"):
                go_on(sequence)
            timer.join()
            sequence.close()
            ended.append(seed)

    in_threads([lambda seed=seed: client(seed) for seed in range(CLIENTS)])
    assert len(ended) == 13 * CLIENTS
    assert is_at_rest(engine)
    for mixture in MIXTURES:
        assert first_difference(answer(engine, PROMPTS[0], mixture), cold[0, mixture]) == ""


def test_a_step_that_fails_costs_only_its_own_sequence(engine, cold):
    """One of two that are computed together asks for a token that the model does not have."""
    mixture, barrier, outcome = MIXTURES[2], threading.Barrier(2), []
    engine.forget()

    def bad() -> None:
        sequence = engine.open(PROMPTS[1], mixture)
        list(sequence.read())
        barrier.wait(30)
        with pytest.raises(RuntimeError, match=r"llama\.cpp: "):
            sequence.advance([0], [1 << 20])
        sequence.close()
        outcome.append("failed")

    def good() -> None:
        sequence = engine.open(PROMPTS[0], mixture)
        list(sequence.read())
        barrier.wait(30)
        tokens = [int(sequence.first().argmax())]
        while len(tokens) < COUNT:
            tokens.append(int(sequence.advance([0], tokens[-1:]).argmax()))
        sequence.close()
        outcome.append(tokens)

    engine.batching.patience = 0.5
    in_threads([bad, good])
    outcome.remove("failed")
    assert first_difference([(token, 1.0) for token in outcome[0]], cold[0, mixture]) == ""
    assert is_at_rest(engine)


def test_a_whole_text_is_measured_beside_answers(engine, cold):
    rows: list[torch.Tensor] = []

    def measure() -> None:
        rows.extend(row for part in engine.each(LONG) for row in part)

    in_threads([measure, *[lambda: answer(engine, PROMPTS[6], MIXTURES[1]) for _ in range(3)]])
    assert len(rows) == len(LONG)
    alone = torch.cat(list(engine.each(LONG)))
    assert torch.allclose(torch.stack(rows), alone, rtol=0, atol=1e-3)


def test_sequences_interleave_in_one_thread(engine, cold):
    """A caller may advance several by turns; beams stay refused."""
    assert engine.capabilities.interleaves
    assert "beam" in engine.capabilities.lacks
    opened = [engine.open(PROMPTS[0], mixture) for mixture in MIXTURES]
    for sequence in opened:
        list(sequence.read())
    tokens = [[int(sequence.first().argmax())] for sequence in opened]
    for _ in range(COUNT - 1):
        for sequence, ids in zip(opened, tokens, strict=True):
            ids.append(int(sequence.advance([0], ids[-1:]).argmax()))
    for sequence, ids, mixture in zip(opened, tokens, MIXTURES, strict=True):
        sequence.close()
        assert first_difference([(token, 1.0) for token in ids], cold[0, mixture]) == ""


@pytest.fixture
def talk(tiny_gguf) -> Iterator[Chat]:
    new_engine = make(tiny_gguf, SEQUENCES)
    yield Chat(new_engine, new_engine.tokenizer, data_template.load("alpaca", new_engine.tokenizer))
    new_engine.close()


def reply(talk: Chat, word: str, mixture=()) -> str:
    *_, last = talk.stream(data_conversation.single(f"Say {word}"), QUICK, mixture)
    return last.text.whole


def pid_of(talk: Chat) -> int:
    return talk.engine.process.process.pid


def test_a_killed_child_costs_each_answer_one_message(talk):
    """kill -9 under eight streams: those in progress fail once, a new child answers those that wait."""
    words = tiny.WORDS[:CLIENTS]
    alone = {word: reply(talk, word, MIXTURES[n % 4]) for n, word in enumerate(words)}
    died, pid, failed, answered = threading.Event(), pid_of(talk), [], {}

    def client(number: int, word: str) -> None:
        texts = []
        try:
            for one in talk.stream(data_conversation.single(f"Say {word}"), QUICK, MIXTURES[number % 4]):
                texts.append(one.text.whole)
                if one.text.tokens == 10 and not died.is_set():
                    died.set()
                    os.kill(pid, signal.SIGKILL)
        except UserError as error:
            failed.append(error)
        else:
            answered[word] = texts[-1]

    in_threads([lambda number=number, word=word: client(number, word) for number, word in enumerate(words)])
    assert len(failed) + len(answered) == CLIENTS
    assert failed
    assert all("SIGKILL" in error.problem for error in failed)
    assert answered == {word: alone[word] for word in answered}
    assert {word: reply(talk, word, MIXTURES[n % 4]) for n, word in enumerate(words)} == alone
    assert pid_of(talk) != pid
    assert is_at_rest(talk.engine)
    assert not Path(f"/proc/{pid}").exists()


def test_a_child_that_hangs_is_found_and_ended(talk, monkeypatch):
    """I8: SIGSTOP. It is killed after a time that is generous for a step; the next question is answered."""
    expected, pid = reply(talk, "red"), pid_of(talk)
    monkeypatch.setattr(llama_cpp_process, "STEP", 1.0)
    monkeypatch.setattr(llama_cpp_process, "TOKEN", 0.01)
    started, failed = time.monotonic(), []

    def client(word: str) -> None:
        try:
            for one in talk.stream(data_conversation.single(f"Say {word}"), QUICK):
                if word == "red" and one.text.tokens == 5:
                    os.kill(pid, signal.SIGSTOP)
        except UserError as error:
            failed.append(error.problem)

    in_threads([lambda word=word: client(word) for word in ("red", "blue", "green")])
    assert 1 <= len(failed) <= 3
    assert all("did not answer within" in problem for problem in failed)
    assert 0.9 < time.monotonic() - started < 20
    assert not Path(f"/proc/{pid}").exists()
    assert reply(talk, "red") == expected


def test_a_state_that_cannot_be_cut(tmp_path):
    """Mamba: a prompt with another end is read anew, a conversation that goes on is not."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "state_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3}
    ids = {"vocab_size": 304, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    MambaForCausalLM(MambaConfig(**sizes, **ids)).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    file = gguf.base(tmp_path / "model", tmp_path / "mamba.gguf", any_tokenizer=True, kind="f32")
    engine = Engine(file, tiny.tokenizer(), 256, threads=1, exact=True, sequences=3)
    prompts, cold, wrong = [[*SHARED, number] for number in range(20, 26)], [], []
    for prompt in prompts:
        engine.forget()
        cold.append(answer(engine, prompt, ()))
    assert len({tuple(token for token, _ in tokens) for tokens in cold}) > 1

    def client(seed: int) -> None:
        for number in random.Random(seed).choices(range(len(prompts)), k=12):
            wrong.append(first_difference(answer(engine, prompts[number], ()), cold[number]))

    in_threads([lambda seed=seed: client(seed) for seed in range(5)])
    assert len(wrong) == 5 * 12
    assert not any(wrong)
    turn = [*prompts[0], *(token for token, _ in answer(engine, prompts[0], ())), 9]
    sequence = engine.open(turn)
    list(sequence.read())
    assert sequence.reused == len(turn) - 2, "all but the last token of the answer, which was not read, and 9"
    sequence.close()
    engine.close()
