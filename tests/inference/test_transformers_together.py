"""Several users of one model in transformers: steps of one mixture are computed at once, with equal answers.

Everything is in fp32, so that tokens differ from those of one user only where the two best are nearly equal.
"""

import random
import threading
from collections.abc import Iterator

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from onecard.inference import joined_caches, transformers_engine
from onecard.inference.transformers_engine import Engine
from onecard.models import adapter as models_adapter
from onecard.models import base_model, trainable
from tests.support import cold_answers, tiny
from tests.support.adapters import save_adapter
from tests.support.cold_answers import first_difference

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, CLIENTS = 12, 8  # tokens; threads
MIXTURES = ((), (("a", 1.0),), (("b", 1.0),), (("a", 0.5), ("b", 0.7)))
SHARED = [5, 6, 7, 8, 9, 10, 11, 12]
PROMPTS = [[*SHARED[:n], 20 + n, 30 + n, 40 + n] for n in range(2, 6)] + [SHARED * 6 + [3]]


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> tuple[torch.nn.Module, list[str]]:
    module = base_model.load_base(str(tiny_model), 16, "fp32", "cpu").eval()
    for seed, (name, modules) in enumerate({"a": ["q_proj", "v_proj"], "b": ["down_proj"]}.items()):
        place = tmp_path_factory.mktemp("adapters") / name
        folder = save_adapter(tiny_model, place, seed, r=8, lora_alpha=64, target_modules=modules)
        module = models_adapter.attach(module, folder, name)
    return module, ["a", "b"]


@pytest.fixture
def engine(model) -> Iterator[Engine]:
    """An engine that computes steps together, and counts the rows of each."""
    new_engine = Engine(model[0], tiny.tokenizer(), 512, model[1], together=True)
    new_engine.rows, logits = [], new_engine._logits
    new_engine._logits = lambda ids, *rest, **beside: (
        new_engine.rows.append(len(ids)) or logits(ids, *rest, **beside)
    )
    yield new_engine
    new_engine.forget()


@pytest.fixture(scope="module")
def cold(model) -> dict[tuple[int, tuple], list[tuple[int, float]]]:
    """(prompt, mixture) -> tokens of one user's answer, and their margins."""
    alone, answers = Engine(model[0], tiny.tokenizer(), 512, model[1]), {}
    for number, prompt in enumerate(PROMPTS):
        for mixture in MIXTURES:
            alone.forget()
            answers[number, mixture] = answer(alone, prompt, mixture)
    return answers


def answer(engine: Engine, prompt: list[int], mixture) -> cold_answers.Answer:
    return cold_answers.answer(engine, prompt, mixture, COUNT)


def clients(engine: Engine, cold) -> list[bool]:
    equal: list[bool] = []

    def client(seed: int) -> None:
        jobs = list(cold)
        random.Random(seed).shuffle(jobs)
        for number, mixture in jobs:
            equal.append(
                first_difference(answer(engine, PROMPTS[number], mixture), cold[number, mixture]) == ""
            )

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(equal) == CLIENTS * len(cold), "a thread has failed"
    return equal


def test_eight_clients_get_the_answers_of_one(engine, cold):
    """Prompts of different lengths, with the same beginnings, under A, B, both and none, at once."""
    assert all(clients(engine, cold))
    assert sum(rows > 1 for rows in engine.rows) > len(engine.rows) / 8
    assert not engine.sequences


def test_a_window_that_moves_is_not_joined(model):
    """Its layers no longer hold the first tokens, so padding would be in the wrong place."""
    row = torch.zeros(1, 4, 3, 8)
    plain, window = (DynamicCache() for _ in range(2))
    plain.layers, window.layers = [DynamicLayer()], [DynamicSlidingWindowLayer(sliding_window=4)]
    for cache in (plain, window):
        cache.update(row, row, 0)
    base = trainable.base_of(model[0])
    assert joined_caches.can_be_joined(base, [plain, plain])
    assert not joined_caches.can_be_joined(base, [plain, window])


@pytest.mark.parametrize("why", ["the model", "the memory"])
def test_what_cannot_be_joined_takes_turns(engine, cold, monkeypatch, why):
    def no_room(caches):
        raise torch.OutOfMemoryError

    if why == "the model":
        monkeypatch.setattr(joined_caches, "can_be_joined", lambda *_: False)
    else:
        monkeypatch.setattr(joined_caches, "join", no_room)
    assert all(clients(engine, cold))
    assert set(engine.rows) == {1}


def test_scores_of_rows_of_different_lengths(engine):
    """All scores, not only the best ones."""
    sequences = [engine.open(prompt, MIXTURES[1]) for prompt in PROMPTS]
    for sequence in sequences:
        list(sequence.read())
    expected = []
    for prompt in PROMPTS:
        engine.caches.clear()
        alone = Engine(engine.model, None, 512, engine.adapters).open([*prompt, 9, 10], MIXTURES[1])
        list(alone.read())
        expected.append(alone.first())
    engine.batching.patience = 5.0
    scores: dict[int, torch.Tensor] = {}

    def go_on(number: int) -> None:
        for token in (9, 10):
            scores[number] = sequences[number].advance([0], [token])

    threads = [threading.Thread(target=go_on, args=(number,)) for number in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(PROMPTS) in engine.rows
    for number, right in enumerate(expected):
        assert torch.allclose(scores[number], right, rtol=0, atol=1e-4)
        sequences[number].close()
    for _, _, cache in engine.caches:
        for layer in cache.layers:
            assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes, "it keeps memory of other rows"


def test_beams_beside_answers(engine, cold):
    """A sequence that becomes several rows has steps of its own, and holds nobody up."""
    beams = engine.open(PROMPTS[0], MIXTURES[1])
    list(beams.read())
    assert beams.advance([0, 0], [30, 31]).shape[0] == 2
    assert beams.advance([1, 0], [7, 8]).shape[0] == 2
    engine.batching.patience = 5.0
    done = []
    thread = threading.Thread(target=lambda: done.append(answer(engine, PROMPTS[1], MIXTURES[1])))
    thread.start()
    thread.join(4)
    assert done
    assert first_difference(done[0], cold[1, MIXTURES[1]]) == ""
    beams.close()


def test_a_cancelled_sequence_holds_nobody_up(engine, cold):
    sequence = engine.open(PROMPTS[0], MIXTURES[2])
    list(sequence.read())
    sequence.cancel()
    with pytest.raises(RuntimeError, match="cancelled"):
        sequence.advance([0], [3])
    sequence.close()
    assert first_difference(answer(engine, PROMPTS[0], MIXTURES[2]), cold[0, MIXTURES[2]]) == ""
    assert not engine.sequences


def test_one_user_has_no_batches(model):
    """Chat windows promise that an answer does not depend on other answers."""
    assert Engine(model[0], tiny.tokenizer(), 512, model[1]).batching is None
    assert transformers_engine.Engine.capabilities.interleaves
