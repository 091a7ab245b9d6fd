"""What a request of OpenAI's API means in the options of an answer."""

import dataclasses

import pytest

from onecard.config import generation
from onecard.config.generation import GREEDY, SAMPLE


def test_temperature_0_is_greedy_and_others_are_kept():
    assert generation.of_request(temperature=0).mode == GREEDY
    assert generation.of_request(temperature=1e-9).mode == GREEDY
    for temperature in (1e-4, 0.001, 0.7, 1, 2):
        options = generation.of_request(temperature=temperature)
        assert (options.mode, options.temperature) == (SAMPLE, temperature)
    assert generation.of_request(top_p=0.3).top_p == 0.3
    assert generation.of_request(max_tokens=5).max_new_tokens == 5


def test_a_request_that_asks_for_nothing_changes_no_score():
    """Neither the defaults for people nor an option that is added later applies unless a request names it."""
    neutral = {
        "top_p": 1,
        "top_k": 0,
        "repetition_penalty": 1,
        "no_repeat_ngram_size": 0,
        "min_new_tokens": 0,
    }
    neutral |= {"temperature": 1, "stop": "", "banned": "", "seed": None, "max_memory": 0, "last_turns": 0}
    options = vars(generation.of_request())
    assert {name: options[name] for name in neutral} == neutral
    known = {*neutral, "mode", "num_beams", "max_new_tokens"}
    assert {field.name for field in dataclasses.fields(generation.Generation)} == known


@pytest.mark.parametrize("seed", [0, 7, -1, -(2**63), 2**63 - 1, 2**64])
def test_any_whole_number_is_a_seed(seed):
    drawn = generation.of_request(seed=seed).seed
    assert 0 <= drawn < 2**63
    assert drawn == seed or not 0 <= seed < 2**63
