"""Penalties and bias, compared with plain arithmetic and with transformers; seeds of answers side by side."""

import collections
import dataclasses
import math

import pytest
import torch
from transformers import SequenceBiasLogitsProcessor

from onecard.config import generation
from onecard.config.generation import GREEDY, SAMPLE, Generation
from onecard.inference import decoding
from onecard.inference import rules as inference_rules
from tests.support.score_table import ScoreTable

VOCABULARY, PROMPT = 24, [3, 5, 3]


def settings(mode: str, **changes) -> Generation:
    return dataclasses.replace(generation.of_request(seed=7, max_tokens=20), mode=mode, **changes)


def answer(seed: int, options: Generation, rules=(), **how) -> tuple[list[int], ScoreTable]:
    table = ScoreTable(seed, VOCABULARY, PROMPT)
    *_, last = decoding.decode(table, PROMPT, options, [], options.max_new_tokens, rules=rules, **how)
    return last.beams[0], table


@pytest.mark.parametrize(("frequency", "presence"), [(0.5, 0.0), (0.0, 1.5), (2.0, -2.0), (-1.0, 0.5)])
@pytest.mark.parametrize("before", [[], [4, 4, 9]])
def test_penalties_are_those_of_openai(frequency, presence, before):
    """Each greedy token has the best of score - count * frequency - (count > 0) * presence."""
    differs = 0
    for seed in range(8):
        rules = [inference_rules.penalties(frequency, presence, before)]
        ids, table = answer(seed, settings(GREEDY), rules)
        for place, token in enumerate(ids):
            counts = collections.Counter([*before, *ids[:place]])
            penalized = [
                score - counts[t] * frequency - (presence if counts[t] else 0)
                for t, score in enumerate(table.rows[place])
            ]
            assert token == max(range(VOCABULARY), key=penalized.__getitem__)
        differs += ids != answer(seed, settings(GREEDY))[0]
    assert differs >= 3


def test_bias_is_that_of_transformers():
    """With 100 the token comes always, with -100 never; small amounts are added as they are."""
    scores = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    amounts = {4: 1.5, 0: -100.0, 9: 100.0, 11: -0.25}
    processor = SequenceBiasLogitsProcessor([[[token], amount] for token, amount in amounts.items()])
    expected = processor(torch.tensor([PROMPT]), scores)
    kept = scores.clone()
    assert torch.equal(inference_rules.bias({**amounts, VOCABULARY: 5.0})([1], scores), expected)
    assert torch.equal(scores, kept), "the engine may show the same tensor again"
    for mode in (GREEDY, SAMPLE):
        free = answer(1, settings(mode))[0]
        assert set(answer(1, settings(mode), [inference_rules.bias({6: 100.0})])[0]) == {6} != set(free)
        banned = answer(1, settings(mode), [inference_rules.bias(dict.fromkeys(free, -100.0))])[0]
        assert banned
        assert set(free).isdisjoint(banned)


def test_the_order_of_all_rules():
    """The repetition penalty sees the model's scores; what is added follows, then temperature and filters."""
    options = settings(SAMPLE, repetition_penalty=1.7, temperature=0.6, top_k=9, top_p=0.8)
    added = {2: 1.25, 8: -0.75}
    rules = [inference_rules.penalties(0.8, 0.3), inference_rules.bias(added)]
    for seed in range(6):
        ids, table = answer(seed, options, rules)
        for step, token in enumerate(ids, start=1):
            row = list(table.rows[step - 1])
            for seen in {*PROMPT, *ids[: step - 1]}:
                row[seen] = row[seen] * 1.7 if row[seen] < 0 else row[seen] / 1.7
            for seen, count in collections.Counter(ids[: step - 1]).items():
                row[seen] -= 0.8 * count + 0.3
            for biased, amount in added.items():
                row[biased] += amount
            assert token == drawn([score / 0.6 for score in row], step, 9, 0.8)


def drawn(row: list[float], step: int, top_k: int, top_p: float) -> int:
    """The token with the largest sum of score and Gumbel noise among those that the two filters leave."""
    order = sorted(range(len(row)), key=lambda token: -row[token])[:top_k]
    total, share, nucleus = sum(math.exp(row[token]) for token in order), 0.0, []
    for token in order:
        nucleus.append(token)
        share += math.exp(row[token]) / total
        if share >= top_p:
            break
    noise = {
        t: -math.log(-math.log(decoding.uniforms(7, step, torch.tensor([t]).numpy())[0])) for t in nucleus
    }
    return max(nucleus, key=lambda token: row[token] + noise[token])


def test_rules_that_ask_for_nothing_change_nothing():
    rules = [inference_rules.penalties(0.0, 0.0), inference_rules.bias({})]
    for mode in (GREEDY, SAMPLE):
        for seed in range(4):
            assert answer(seed, settings(mode), rules)[0] == answer(seed, settings(mode))[0]


def test_a_seed_gives_the_same_answer_beside_others():
    """Sampled answers that take turns, in two orders, are those that come alone."""
    options = [settings(SAMPLE, seed=seed) for seed in range(5)]
    alone = [answer(number, each)[0] for number, each in enumerate(options)]
    for order in (1, -1):
        streams = {
            number: decoding.decode(ScoreTable(number, VOCABULARY, PROMPT), PROMPT, each, [], 20)
            for number, each in list(enumerate(options))[::order]
        }
        ends: dict[int, list[int]] = {}
        while len(ends) < len(options):
            for number, stream in streams.items():
                step = next(stream, None)
                if step and step.finished:
                    ends[number] = step.beams[0]
        assert [ends[number] for number in range(5)] == alone
