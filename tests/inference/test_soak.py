"""What many answers leave behind: nothing of another adapter or user (I9), no memory and no open files (I13).

Each test is for both engines, on the tiny model with two adapters.
"""

import ctypes
import gc
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from onecard.config.generation import GREEDY, Generation
from onecard.data import template as data_template
from onecard.data.conversation import Conversation, Turn
from onecard.errors import UserError
from onecard.inference import llama_cpp_engine, transformers_engine
from onecard.inference.chat import Chat
from onecard.inference.engine import Engine
from onecard.models import adapter as models_adapter
from onecard.models import base_model
from tests.support import tiny

pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra of its own: bash tools/setup.sh cpu")

pytestmark = pytest.mark.usefixtures("one_thread")

LIBC = ctypes.CDLL(None)
SWAPS, TURNS, WARM_UP = 1000, 500, 150
LONG, FEW = 36, 6  # words of a question, each at least a token
BEGINNING, CANARY, PROBE = [5, 6, 7, 8, 9, 10], 77, [11, 12]
SHORT = Generation(GREEDY, repetition_penalty=1.0, min_new_tokens=3, max_new_tokens=3, seed=1)
TEMPLATE = {"user": "{text}\n", "user_with_input": "{text} {input}\n"}
TEMPLATE |= {"assistant": "{text}{end}", "between": "\n"}
GROWTH = 4 << 20  # bytes of memory after the warm-up; keys and values of all turns are twice as much
CHILD_GROWTH = 16 << 20  # bytes; the memory of llama.cpp goes up and down by some MiB


@pytest.fixture(scope="module", params=["transformers", "llama.cpp"])
def engine(request, tiny_model, tiny_gguf) -> Iterator[Engine]:
    base, files = tiny_gguf
    new_engine: Engine
    if request.param == "llama.cpp":
        new_engine = llama_cpp_engine.Engine(base, tiny.tokenizer(), 512, files, threads=1, exact=True)
    else:
        model = base_model.load_base(str(tiny_model), 16, "fp32", "cpu").eval()
        for name, file in files.items():
            model = models_adapter.attach(model, file.with_suffix(""), name)
        new_engine = transformers_engine.Engine(model, tiny.tokenizer(), 512, list(files))
    yield new_engine
    new_engine.close()


def first_scores(engine: Engine, prompt: list[int], active) -> tuple[torch.Tensor, int]:
    """The scores after a prompt, and how many of its tokens were still in the cache."""
    sequence = engine.open(prompt, active)
    list(sequence.read())
    scores = sequence.first()[0].clone()
    sequence.close()
    return scores, sequence.reused


def test_a_thousand_swaps_leak_nothing(engine):
    """I9: A's prompt has a canary in the middle of what it shares with B's; B's scores never show it.

    Keys and values are kept from turn to turn. The scores of B, which nobody asked before, are the reference.
    """
    a, b = (("a", 1.0),), (("b", 1.0),)
    engine.forget()
    alone, _ = first_scores(engine, BEGINNING + PROBE, b)
    others = {  # what B's scores would be if something of A were left
        "the canary": first_scores(engine, [*BEGINNING[:3], CANARY, *BEGINNING[4:], *PROBE], b)[0],
        "A's adapter": first_scores(engine, BEGINNING + PROBE, a)[0],
        "both adapters": first_scores(engine, BEGINNING + PROBE, a + b)[0],
    }
    assert all((alone - scores).abs().max() > 0.01 for scores in others.values())
    generator, leaks, reused = random.Random(9), 0, 0
    for _ in range(SWAPS // 2):
        place = generator.randrange(1, len(BEGINNING))
        first_scores(engine, [*BEGINNING[:place], CANARY, *BEGINNING[place + 1 :], *PROBE], a)
        if generator.random() < 0.2:  # a turn of B's own, so that something can be used again
            first_scores(engine, BEGINNING, b)
        scores, again = first_scores(engine, BEGINNING + PROBE, b)
        leaks += not torch.allclose(scores, alone, rtol=0, atol=1e-4)
        reused += again > 0
    assert leaks == 0
    assert reused > SWAPS // 20


def resident(pid: int | str) -> int:
    """Bytes of memory that a process uses by itself, without files that it maps."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["RssAnon"].split()[0]) << 10


def used(engine: Engine) -> dict[str, int]:
    """What this process and the child of the engine have in use now."""
    gc.collect()
    LIBC.malloc_trim(
        0
    )  # free memory that the C library keeps is not in use; how much it is depends on other tests
    children = [engine.process.process.pid] if isinstance(engine, llama_cpp_engine.Engine) else []
    numbers = {"memory": resident("self"), "objects": len(gc.get_objects())}
    for kind in ("fd", "task"):
        numbers[kind] = len(os.listdir(f"/proc/self/{kind}"))  # noqa: PTH208 (the names are enough)
    for pid in children:
        numbers |= {
            "child's memory": resident(pid),
            "child's fd": len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208
            "child's task": len(os.listdir(f"/proc/{pid}/task")),  # noqa: PTH208
        }
    return numbers


def test_memory_and_descriptors_stay_flat_over_500_turns(engine, tmp_path):
    """I13: conversations grow and begin anew, adapters change, some answers are stopped, some fail."""
    template = tmp_path / "short.json"  # because most turns have another adapter and read the whole prompt
    template.write_text(json.dumps(TEMPLATE))
    talk = Chat(engine, tiny.tokenizer(), data_template.load(str(template), tiny.tokenizer()))
    generator, before, failed, tokens = random.Random(13), {}, 0, 0
    turns: tuple[Turn, ...] = ()
    is_child = isinstance(engine, llama_cpp_engine.Engine)
    words = FEW if is_child else LONG
    for number in range(TURNS):
        if number == WARM_UP:
            before = used(engine)
        if number % 5 == 0:
            turns = ()
        length = 600 if number % 50 == 49 else words  # tokens; 600 are too many
        question = Turn("user", " ".join(generator.choices(tiny.WORDS, k=length)))
        tokens += words * (len(turns) // 2 + 1) if number >= WARM_UP else 0
        active = generator.choice([(), (("a", 1.0),), (("a", 0.5), ("b", 0.7))])
        stream = talk.stream(Conversation((*turns, question)), SHORT, active)
        try:
            for reply in stream:
                if reply.text.tokens == 2 and number % 7 == 3:  # a reader that leaves in the middle
                    break
        except UserError:
            failed += 1
            continue
        stream.close()
        turns = (*turns, question, Turn("assistant", reply.text.whole))
    after = used(engine)
    assert failed == TURNS // 50
    growth = {name: after[name] - before[name] for name in before}
    print(growth)
    shape = tiny.config()
    bytes_of_token = 2 * 4 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    # llama.cpp has room for keys and values from the start, so its questions may be short
    assert is_child or tokens * bytes_of_token > 2 * GROWTH, "so few keys and values would not be noticed"
    assert growth.pop("memory") < GROWTH
    assert growth.pop("child's memory", 0) < CHILD_GROWTH
    assert growth.pop("objects") < 2 * (TURNS - WARM_UP)  # of the whole process, pytest too
    assert all(value <= 0 for value in growth.values()), growth
