"""Every engine fulfils engine.Engine: each of these tests is for all engines and uses only this Protocol.

Weights, keys and values are in fp32, so that earlier contents of the cache change no token.
"""

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onecard.config import chat as config_chat
from onecard.config import options as config_options
from onecard.config.chat import ChatConfig
from onecard.errors import UserError
from onecard.inference import chat as inference_chat
from onecard.inference import llama_cpp_engine, transformers_engine
from onecard.inference.engine import Engine, Sequence
from onecard.models import adapter as models_adapter
from onecard.models import base_model
from tests.support import tiny
from tests.support.adapters import save_adapter

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 10  # tokens of an answer
MODULES = {"a": ["q_proj", "v_proj"], "b": ["down_proj"]}
JOBS = [  # prompts whose beginnings are equal, so that an engine could confuse what it keeps
    ([5, 6, 7, 8, 9, 10], ()),
    ([5, 6, 7, 8, 9, 10], (("a", 1.0),)),
    ([5, 6, 7, 8, 9, 10], (("b", 1.0),)),
    ([5, 6, 7, 20, 21], (("a", 0.5), ("b", 0.7))),
]


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(tiny_model, place / name, seed, r=8, lora_alpha=64, target_modules=modules)
        for seed, (name, modules) in enumerate(MODULES.items())
    }


@pytest.fixture(scope="module", params=["transformers", "llama.cpp", "lazy"])
def make(request, tiny_model, adapters) -> Callable[[], Engine]:
    """A function that makes an engine of one kind, with the adapters a and b."""

    def of_transformers() -> Engine:
        model = base_model.load_base(str(tiny_model), 16, "fp32", "cpu").eval()
        for name, folder in adapters.items():
            model = models_adapter.attach(model, folder, name)
        return transformers_engine.Engine(model, tiny.tokenizer(), 512, list(adapters))

    def lazily() -> Engine:
        named = ",".join(f"{name}={folder}" for name, folder in adapters.items())
        settings = {"model_path": str(tiny_model), "lora_path": named, "dtype": "fp32", "device": "cpu"}
        options = config_options.build(ChatConfig, settings)
        return inference_chat.later(options, None, lambda device: ["run-7"]).engine

    if request.param != "llama.cpp":
        return of_transformers if request.param == "transformers" else lazily
    pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is an extra of its own: bash tools/setup.sh cpu"
    )
    base, files = request.getfixturevalue("tiny_gguf")
    return lambda: llama_cpp_engine.Engine(base, tiny.tokenizer(), 512, files, threads=1, exact=True)


@pytest.fixture(scope="module")
def engine(make) -> Iterator[Engine]:
    new_engine = make()
    yield new_engine
    new_engine.close()


def growing(sequence: Sequence) -> Iterator[int]:
    """Yield the most probable tokens, one for each step."""
    for _ in sequence.read():
        pass
    scores = sequence.first()
    while True:
        token = int(scores.argmax())
        yield token
        scores = sequence.advance([0], [token])


def answer(engine: Engine, prompt: list[int], active_adapters) -> list[int]:
    sequence = engine.open(prompt, active_adapters)
    tokens = list(itertools.islice(growing(sequence), COUNT))
    sequence.close()
    return tokens


def test_open_sequences_keep_to_their_adapters(engine):
    """All are open at once, and they are advanced by turns if the engine can do that."""
    alone = []
    for job in JOBS:
        alone.append(answer(engine, *job))
        engine.forget()
    assert len({tuple(tokens) for tokens in alone}) == len(JOBS)
    opened = [engine.open(*job) for job in JOBS]
    if engine.capabilities.interleaves:
        steps = itertools.islice(zip(*map(growing, opened), strict=True), COUNT)
        together = [list(tokens) for tokens in zip(*steps, strict=True)]
        for sequence in opened:
            sequence.close()
    else:
        together = []
        for sequence, following in itertools.zip_longest(opened, opened[1:]):
            tokens = growing(sequence)
            beginning = [next(tokens)]
            if following is not None:
                assert next(iter(following.read())) == 0  # it waits for its turn
            together.append(beginning + list(itertools.islice(tokens, COUNT - 1)))
            sequence.close()
    assert together == alone


def test_beams_are_advanced_together(engine):
    """Where an engine has beams, two beams of one sequence are like two sequences."""
    if "beam" in engine.capabilities.lacks:
        assert engine.capabilities.lacks["beam"] in config_chat.LACKS
        return
    prompt, active_adapters = JOBS[1]
    expected = [answer(engine, [*prompt, token], active_adapters)[0] for token in (30, 31)]
    sequence = engine.open(prompt, active_adapters)
    assert list(sequence.read())[-1] == len(prompt)
    scores = sequence.advance([0, 0], [30, 31])
    assert scores.argmax(-1).tolist() == expected
    again = sequence.advance([1, 0], expected[::-1])
    assert again.shape == scores.shape
    sequence.close()


def test_what_was_read_is_kept_for_the_next_turn(engine):
    prompt, active_adapters = JOBS[0]
    engine.forget()
    answer(engine, prompt, active_adapters)
    sequence = engine.open([*prompt, 40, 41], active_adapters)
    list(sequence.read())
    assert sequence.reused == len(prompt)
    sequence.close()


def test_a_cancelled_sequence_is_free_for_others(engine):
    """It is cancelled unread, between two steps, and while it waits; close() may be called twice."""
    alone = answer(engine, *JOBS[0])
    engine.forget()
    unread, running = engine.open(*JOBS[1]), None
    unread.cancel()
    list(unread.read())
    with pytest.raises(RuntimeError, match="cancelled"):
        unread.first()
    unread.close()
    running = engine.open(*JOBS[2])
    token = next(growing(running))
    waiting, finished = engine.open(*JOBS[3]), threading.Event()
    thread = threading.Thread(target=lambda: [list(waiting.read()), finished.set()])
    thread.start()
    waiting.cancel()
    assert finished.wait(30)
    waiting.close()
    running.cancel()
    with pytest.raises(RuntimeError, match="cancelled"):
        running.advance([0], [token])
    running.close()
    running.close()
    with pytest.raises(RuntimeError, match="closed"):
        running.advance([0], [token])
    assert answer(engine, *JOBS[0]) == alone


def test_adapters_that_are_not_there_are_refused(engine):
    engine.check_active_adapters((("a", 0.5), ("b", 0.7)))
    with pytest.raises(UserError, match=r"No adapter is called c\. Loaded: a, b"):
        engine.check_active_adapters((("a", 1.0), ("c", 1.0)))


def test_asking_reads_no_weights(make):
    """What a page needs before a question loads none; load() does, and close() frees them for good."""
    new_engine = make()
    loaded = new_engine.is_loaded
    assert (new_engine.name, list(new_engine.adapters)) == (new_engine.name, ["a", "b"])
    assert new_engine.capabilities.interleaves == ("beam" not in new_engine.capabilities.lacks)
    assert new_engine.placement.device == "cpu"
    new_engine.check_active_adapters((("a", 1.0),))
    new_engine.forget()
    assert new_engine.is_loaded == loaded
    if not loaded:
        assert new_engine.placement.beside == ("run-7",)
        with pytest.raises(RuntimeError, match="before the weights are loaded"):
            _ = new_engine.context
    new_engine.load()
    assert new_engine.is_loaded
    assert new_engine.context > len(JOBS[0][0])
    new_engine.close()
    new_engine.close()
    for work in (lambda: answer(new_engine, *JOBS[0]), lambda: list(new_engine.each(*JOBS[0]))):
        with pytest.raises(RuntimeError, match="closed"):
            work()


def test_scores_of_each_token_are_those_of_the_steps(engine):
    prompt, active_adapters = JOBS[3]
    rows = [row for part in engine.each(prompt, active_adapters) for row in part]
    assert len(rows) == len(prompt)
    assert int(rows[-1].argmax()) == answer(engine, prompt, active_adapters)[0]
