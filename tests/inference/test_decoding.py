"""The choice of the next token, compared with transformers' generate, exact probabilities and plain rules."""

import collections
import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from onecard.config.generation import BEAM, BEAM_SAMPLE, GREEDY, MODES, SAMPLE, Generation
from onecard.inference import decoding
from onecard.inference.decoding import BANNED, END, GOES, LENGTH, STOP, STOPS
from onecard.inference.transformers_engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 48
SCORES = torch.rand(8, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)).argsort(-1) / 4
PLAIN = Generation(GREEDY, 1.0, 1.0, 0, 4, 1.0, 0, 0, 16)


def with_(**changes) -> Generation:
    """Return settings that change no probability, except by these changes."""
    return Generation(**{**vars(PLAIN), **changes})


@pytest.fixture(scope="module")
def engines() -> list[Engine]:
    """Three tiny random models with very uneven probabilities: end tokens come early and late."""
    all_engines = []
    for seed, spread in enumerate((0.15, 0.3, 0.6)):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=spread,
        )
        model = LlamaForCausalLM(config).eval()
        all_engines.append(Engine(model, None, 256))
    return all_engines


class Table:
    """A stream without a model: scores depend on place and last token, and are a quarter apart."""

    def __init__(self, prompt: list[int]):
        self.rows = [list(prompt)]

    def first(self) -> torch.Tensor:
        return torch.stack([SCORES[len(row) % 8, row[-1]] for row in self.rows])

    def advance(self, parents: list[int], tokens: list[int]) -> torch.Tensor:
        self.rows = [[*self.rows[p], token] for p, token in zip(parents, tokens, strict=True)]
        return self.first()


class Memory:
    """A stream whose scores come in the same tensor each time, as llama.cpp's do, or in a new one."""

    def __init__(self, rows: torch.Tensor, kind: torch.dtype, one_tensor: bool):
        self.rows, self.one_tensor = iter(rows.to(kind)), one_tensor
        self.tensor = torch.empty((1, rows.shape[-1]), dtype=kind)

    def first(self) -> torch.Tensor:
        self.tensor[0] = next(self.rows)
        return self.tensor if self.one_tensor else self.tensor.clone()

    def advance(self, parents: list[int], tokens: list[int]) -> torch.Tensor:
        return self.first()


def answer(engine: Engine, prompt: list[int], settings: Generation, ends, watch=None) -> list[decoding.Step]:
    stream = engine.open(prompt)
    list(stream.read())
    return list(decoding.decode(stream, prompt, settings, ends, settings.max_new_tokens, watch))


def said(prompt: list[int], settings: Generation, ends=(0,), watch=None) -> list[decoding.Step]:
    """Return the steps of an answer whose scores come from the table."""
    return list(decoding.decode(Table(prompt), prompt, settings, ends, settings.max_new_tokens, watch))


@torch.no_grad()
def reference(engine: Engine, prompt: list[int], settings: Generation, ends: list[int]) -> list[list[int]]:
    """Return all beams of transformers' generate, without prompt, end tokens and padding."""
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens or None,
        num_beams=settings.width,
        num_return_sequences=settings.width,
        do_sample=False,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    ids = torch.tensor([prompt])
    rows = engine.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
    )[:, len(prompt) :].tolist()
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]


def case(number: int, width: int) -> tuple[list[int], Generation, list[int]]:
    """Return a random question: prompt, settings, end tokens."""
    chance = random.Random(number)
    longest = chance.choice([1, 2, 5, 9, 14, 20])
    settings = with_(
        mode=GREEDY if width == 1 else BEAM,
        num_beams=max(2, width),
        repetition_penalty=chance.choice([1.0, 1.0, 0.7, 1.1, 1.5, 2.0]),
        no_repeat_ngram_size=chance.choice([0, 0, 1, 2, 3]),
        min_new_tokens=min(longest, chance.choice([0, 0, 1, 3, 8])),
        max_new_tokens=longest,
    )
    prompt = [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 12))]
    return prompt, settings, chance.sample(range(VOCABULARY), chance.randint(1, 8))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6])
def test_greedy_and_beams_are_those_of_transformers(engines, width):
    """All beams and their order are equal, token for token, over 40 random cases of each width."""
    endings = collections.Counter()
    for number in range(40):
        engine = engines[number % len(engines)]
        prompt, settings, ends = case(number, width)
        steps = answer(engine, prompt, settings, ends)
        expected = reference(engine, prompt, settings, ends)
        assert steps[-1].beams == expected, (number, settings)
        assert [bool(step.finished) for step in steps] == [False] * (len(steps) - 1) + [True]
        endings[steps[-1].finished, len(expected[0]) < settings.max_new_tokens] += 1
    assert endings[END, True] >= 8, endings  # both kinds of endings occurred
    assert endings[LENGTH, False] >= 8, endings


@pytest.mark.parametrize("one_tensor", [True, False])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_the_short_way_to_the_highest_score_is_the_long_one(kind, one_tensor):
    """A watch that forbids nothing forces the long way; ties, -inf and no possible token are tried too."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(-6, 6, (400, 40), generator=generator).float()
    rows[torch.rand(rows.shape, generator=generator) < 0.3] = -torch.inf
    for most in (150, 400):
        rows[300] = -torch.inf
        settings = with_(min_new_tokens=20)
        answers = [
            list(decoding.decode(Memory(rows, kind, one_tensor), [1], settings, [3], most, watch))
            for watch in (None, lambda ids: GOES)
        ]
        assert answers[0] == answers[1]
        assert len(answers[0]) > 20
    rows[:, 3] = -torch.inf  # no end token
    rows[300] = -torch.inf
    assert len(list(decoding.decode(Memory(rows, kind, one_tensor), [1], PLAIN, [3], 400))) == 301


@pytest.mark.parametrize("mode", MODES)
def test_a_step_has_one_token_more(engines, mode):
    """Nothing is computed ahead of the step that is given out, so a caller may stop after any token."""
    engine = engines[0]
    stream = engine.open([1, 2, 3])
    list(stream.read())
    calls = []
    plain = stream.advance
    stream.advance = lambda *arguments: calls.append(1) or plain(*arguments)
    steps = decoding.decode(stream, [1, 2, 3], with_(mode=mode, seed=1), [0], 12)
    for number, step in enumerate(steps):
        assert len(calls) == number
        assert step.finished or {len(ids) for ids in step.beams} == {number + 1}


@pytest.mark.parametrize("mode", [SAMPLE, BEAM_SAMPLE])
def test_a_seed_repeats_exactly(mode):
    """The same seed gives one answer twenty times; other seeds, and none, give others."""

    def one(seed: int | None) -> tuple[int, ...]:
        return tuple(said([3, 4], with_(mode=mode, seed=seed, max_new_tokens=10))[-1].beams[0])

    assert len({one(7) for _ in range(20)}) == 1
    assert len({one(seed) for seed in range(20)}) >= 10
    assert len({one(None) for _ in range(10)}) >= 5


def exact(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Compute plainly the probabilities after the three options."""
    weights = [math.exp(value / temperature) for value in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    candidates = order[: top_k or len(order)]
    total, share, nucleus = sum(weights[i] for i in candidates), 0.0, []
    for i in candidates:
        nucleus.append(i)
        share += weights[i] / total
        if share >= top_p:
            break
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(weights))]


def variation(counts: collections.Counter, expected: dict) -> float:
    """Return the total variation between drawn and expected shares."""
    total = sum(counts.values())
    return sum(abs(counts[key] / total - expected.get(key, 0)) for key in {*counts, *expected}) / 2


LOGITS = [2.0, 1.5, 1.4, 0.5, 0.0, -0.7, -1.0, -3.0]
DRAWS = 4000


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.6), (0.7, 5, 0.8)],
)
def test_sampled_tokens_have_the_exact_probabilities(temperature, top_k, top_p):
    """In 4000 draws the variation from the right shares is below 0.03, and from the plain ones above it."""
    settings = with_(mode=SAMPLE, temperature=temperature, top_k=top_k, top_p=top_p)
    pick = decoding._Picker(dataclasses.replace(settings, seed=0), [], [0], None)
    scores = torch.tensor([LOGITS])
    drawn = collections.Counter(pick.best(scores, [[]], [0.0], 1)[0][2] for _ in range(DRAWS))
    expected = dict(enumerate(exact(LOGITS, temperature, top_k, top_p)))
    assert variation(drawn, expected) < 0.03
    assert {token for token, share in expected.items() if share == 0}.isdisjoint(drawn)
    if settings != with_(mode=SAMPLE):
        assert variation(drawn, dict(enumerate(exact(LOGITS, 1.0, 0, 1.0)))) > 0.03


@pytest.mark.parametrize("shortlist", [1, 2, 5])
@pytest.mark.parametrize("top_k", [0, 4])
def test_a_draw_depends_on_seed_step_and_token_alone(monkeypatch, shortlist, top_k):
    """Neither the length of the shortlist nor the order of equal tokens changes what is drawn."""
    settings = with_(mode=SAMPLE, top_k=top_k, seed=3)
    scores = torch.tensor([[0.5, 1.0, 0.5, 1.0, -1.0, 0.5, 1.0, 0.0]])

    def drawn(noise: float) -> list[int]:
        pick = decoding._Picker(settings, [], [0], None)
        jitter = torch.Generator().manual_seed(1)
        moved = [scores + noise * torch.rand(scores.shape, generator=jitter) for _ in range(50)]
        return [pick.best(each, [[]], [0.0], 1)[0][2] for each in moved]

    whole = drawn(0.0)
    assert len(set(whole)) > 4
    monkeypatch.setattr(decoding, "SHORTLIST", shortlist)
    assert drawn(0.0) == whole
    if not top_k:
        assert drawn(1e-6) == whole  # differences like another device's rounding


def test_uniform_numbers():
    """Numbers of different seeds, steps and places are even, uncorrelated and never 0 or 1."""
    grid = np.array(
        [[decoding.uniforms(seed, step, np.arange(500)) for step in range(4)] for seed in range(5)]
    )
    flat = grid.reshape(-1)
    assert 0 < flat.min() < flat.max() < 1
    shares = np.histogram(flat, 10, (0, 1))[0] / len(flat)
    assert abs(shares - 0.1).max() < 0.02
    together = np.corrcoef(grid.reshape(20, 500)) - np.eye(20)
    assert abs(together).max() < 0.2
    assert (
        decoding.uniforms(2**63 - 1, 1, np.array([7])) == decoding.uniforms(2**63 - 1, 1, np.arange(9))[7]
    ).all()


def splitmix64(seed: int) -> int:
    """The first number of the generator with this seed, as Steele, Lea and Flood (2014) print it."""
    bits = (seed + 0x9E3779B97F4A7C15) % 2**64
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return bits ^ bits >> 31


def number(seed: int, step: int, index: int) -> float:
    """What decoding.uniforms gives for one index, in whole numbers of Python."""
    state = seed
    for part in (step, index):
        state = (splitmix64(state) + part * 0x9E3779B97F4A7C15) % 2**64
    return ((splitmix64(state) >> 11) + 0.5) / 2**53


def test_numbers_are_those_of_splitmix64():
    """Whoever gives a seed gets the same answer from every version, so the numbers may never change."""
    assert splitmix64(1234567) == 6457827717110365317  # the first output of the reference program
    for seed, step in ((0, 1), (7, 2), (2**63 - 1, 40), (123456789, 1000)):
        indices = np.array([0, 1, 47, 151_935])
        expected = [number(seed, step, int(index)) for index in indices]
        assert decoding.uniforms(seed, step, indices).tolist() == expected


@pytest.mark.parametrize("seed", [0, 7])
def test_the_n_th_token_is_drawn_with_the_numbers_of_step_n(seed):
    """It is the one with the largest sum of score and Gumbel noise."""
    ids = said([3, 4], with_(mode=SAMPLE, seed=seed, max_new_tokens=6), [])[-1].beams[0]
    table = Table([3, 4])
    for step, token in enumerate(ids, start=1):
        noisy = [
            score - math.log(-math.log(number(seed, step, index)))
            for index, score in enumerate(table.first()[0].tolist())
        ]
        assert token == max(range(VOCABULARY), key=noisy.__getitem__)
        table.advance([0], [token])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_beam_sampling_is_without_replacement(temperature):
    """Pairs from two beams of four tokens come as often as two draws without putting back."""
    settings = with_(mode=BEAM_SAMPLE, num_beams=2, temperature=temperature)
    pick = decoding._Picker(dataclasses.replace(settings, seed=0), [], [0], None)
    scores, totals = torch.tensor([LOGITS[:4], LOGITS[3:7]]), [-0.5, -1.2]
    weights = (torch.log_softmax(scores, -1) / temperature + torch.tensor(totals)[:, None]).exp().flatten()
    p = (weights / weights.sum()).tolist()
    pairs = {
        frozenset(pair): p[pair[0]] * p[pair[1]] * (1 / (1 - p[pair[0]]) + 1 / (1 - p[pair[1]]))
        for pair in itertools.combinations(range(8), 2)
    }
    assert sum(pairs.values()) == pytest.approx(1)
    drawn = collections.Counter()
    for _ in range(DRAWS):
        picks = pick.best(scores, [[1], [2]], totals, 2)
        assert picks[0][0] >= picks[1][0]
        for value, beam, token, _ in picks:
            assert value == pytest.approx(math.log(weights[4 * beam + token]), abs=1e-5)
        drawn[frozenset(4 * beam + token for _, beam, token, _ in picks)] += 1
    assert variation(drawn, pairs) < 0.05


@pytest.mark.parametrize("mode", MODES)
def test_lengths_are_kept(mode):
    """No answer is shorter or longer than the options allow; with no least length some are shorter."""

    def lengths(least: int) -> list[int]:
        options = {"mode": mode, "min_new_tokens": least, "max_new_tokens": 9}
        return [len(said([5, n], with_(**options, seed=n), range(8))[-1].beams[0]) for n in range(30)]

    assert min(lengths(0)) < 6
    assert min(lengths(6)) >= 6
    assert max(lengths(0)) == max(lengths(6)) == 9


@pytest.mark.parametrize("mode", MODES)
def test_repetition_is_avoided(mode):
    """No n-gram comes twice, and a high penalty leaves fewer tokens that came before."""
    repeats = collections.Counter()
    for number in range(20):
        prompt = [5, 6, 5, number]
        for size in (0, 1, 2, 3):
            ids = prompt + said(prompt, with_(mode=mode, seed=number, no_repeat_ngram_size=size))[-1].beams[0]
            for n in (1, 2, 3):
                grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
                ends = range(max(0, len(prompt) - n + 1), len(grams))
                repeats[size, n] += sum(grams[i] in grams[:i] for i in ends)
        for penalty in (1.0, 5.0):
            ids = (
                prompt + said(prompt, with_(mode=mode, seed=number, repetition_penalty=penalty))[-1].beams[0]
            )
            repeats["penalty", penalty] += len(ids) - len(set(ids))
    assert all(repeats[size, size] == 0 for size in (1, 2, 3)), repeats
    assert repeats[0, 1] > 0
    assert repeats["penalty", 5.0] < repeats["penalty", 1.0]


@pytest.mark.parametrize("narrow", [{"temperature": 0.01}, {"top_k": 1}, {"top_p": 0.0}])
def test_the_narrowest_sampling_is_greedy(narrow):
    """Each of the three options does this alone; without them other tokens come."""
    greedy = [said([9, n], with_())[-1].beams for n in range(20)]
    assert [said([9, n], with_(mode=SAMPLE, seed=n, **narrow))[-1].beams for n in range(20)] == greedy
    assert [said([9, n], with_(mode=SAMPLE, seed=n))[-1].beams for n in range(20)] != greedy


def test_more_beams_find_likelier_answers(engines):
    """At fixed length the mean log probability rises from greedy to two and six beams, over 20 prompts."""

    @torch.no_grad()
    def likelihood(prompt: list[int], ids: list[int]) -> float:
        logits = engines[0].model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits, -1)[range(len(ids)), ids].mean().item()

    means = []
    for options in ({"mode": GREEDY}, {"mode": BEAM, "num_beams": 2}, {"mode": BEAM, "num_beams": 6}):
        settings = with_(**options, min_new_tokens=8, max_new_tokens=8)
        likelihoods = [
            likelihood([n, 2], answer(engines[0], [n, 2], settings, [0])[-1].beams[0]) for n in range(20)
        ]
        means.append(sum(likelihoods) / 20)
    assert means == sorted(set(means)), means


@pytest.mark.parametrize("mode", MODES)
def test_a_watch_bans_and_stops(mode):
    """Banned tokens never come, however likely; a stop ends the answer with the token that completes it."""
    for number in range(30):
        prompt, settings = [7, number], with_(mode=mode, seed=number, min_new_tokens=4, max_new_tokens=8)
        free = said(prompt, settings)[-1].beams[0]
        banned = {free[0], free[2]}
        steps = said(prompt, settings, watch=lambda ids, b=banned: BANNED if ids[-1] in b else GOES)
        assert all(banned.isdisjoint(ids) for step in steps for ids in step.beams)
        assert len(steps[-1].beams[0]) >= 4
        last = said(prompt, settings, watch=lambda ids, b=free[2]: STOPS if ids[-1] == b else GOES)[-1]
        assert all(free[2] not in ids[:-1] for ids in last.beams)
        if mode in (GREEDY, SAMPLE):
            assert last.finished == STOP
            assert last.beams[0] == free[: free.index(free[2]) + 1]


@pytest.mark.parametrize("mode", MODES)
def test_when_everything_is_banned_the_answer_ends(mode):
    """This is tried at the first and the third token; the tokens before stay."""
    for length in (1, 3):
        watch = {True: BANNED, False: GOES}
        steps = said([4, 4], with_(mode=mode, seed=1), watch=lambda ids, n=length, w=watch: w[len(ids) >= n])
        assert steps[-1].finished in (STOP, END)
        assert all(len(ids) < length for step in steps for ids in step.beams)


@pytest.mark.parametrize("mode", [GREEDY, BEAM])
def test_equal_scores_lose_no_candidate(mode):
    """Of sixteen tokens with one score all but one are banned: that one is picked, and none twice."""
    for allowed in range(16):
        pick = decoding._Picker(
            with_(mode=mode), [], [99], lambda ids, allowed=allowed: GOES if ids[-1] == allowed else BANNED
        )
        picks = pick.best(torch.zeros(1, 16), [[]], [0.0], 1 if mode == GREEDY else 8)
        assert [token for _, _, token, _ in picks] == [allowed]
    pick = decoding._Picker(with_(mode=mode), [], [99], lambda ids: GOES if ids[-1] % 2 else BANNED)
    picks = pick.best(torch.zeros(1, 64), [[]], [0.0], 20)
    assert len({token for _, _, token, _ in picks}) == 20


def test_least_length_is_kept_on_the_scores_own_device():
    """An end token for which there is no score is ignored."""
    ids = decoding._scored([1, 2, 7], torch.zeros(1, 5, device="meta"))
    assert (ids.device.type, ids.shape) == ("meta", (2,))
    pick = decoding._Picker(with_(min_new_tokens=2), [0, 0], [1, 2, 7], None)
    scores = torch.tensor([[0.0, 3.0, 2.0, 1.0, 0.0]])
    assert [pick.best(scores, [[0] * length], [0.0], 1)[0][2] for length in range(4)] == [3, 3, 1, 1]
    assert decoding._Picker(with_(min_new_tokens=2), [0], [7], None).best(scores, [[]], [0.0], 1)[0][2] == 1


@pytest.mark.parametrize("top_p", [1.0, 0.6])
@pytest.mark.parametrize("top_k", [0, 5, 60])
def test_a_shortlist_draws_what_all_tokens_would(monkeypatch, top_k, top_p):
    """The draws do not depend on how many tokens are compared; of equal scores --top_p cuts off any."""
    settings = with_(mode=SAMPLE, top_k=top_k, top_p=top_p, temperature=0.7, seed=3)
    luck = torch.Generator().manual_seed(0)
    digits = 1 if top_p == 1 else 6
    scores = [(4 * torch.randn(1, 2000, generator=luck)).round(decimals=digits) for _ in range(100)]
    draws = []
    for shortlist in (2000, 256, 16):
        monkeypatch.setattr(decoding, "SHORTLIST", shortlist)
        pick = decoding._Picker(settings, [], [0], None)
        draws.append([pick.best(each, [[]], [0.0], 1)[0][1:3] for each in scores])
    assert draws[0] == draws[1] == draws[2]
    assert len(set(draws[0])) > 20


@pytest.mark.parametrize("mode", [BEAM, BEAM_SAMPLE])
def test_stable_tokens_of_beams_are_never_taken_back(mode):
    """Over 200 prompts they begin every later best beam and the answer, and grow before the end."""
    shares = []
    for number in range(200):
        prompt, settings, ends = case(number, 2 + number % 5)
        settings = Generation(**{**vars(settings), "mode": mode, "seed": number, "max_new_tokens": 16})
        steps = said(prompt, settings, ends)
        for one, later in itertools.combinations(steps, 2):
            assert one.stable <= later.stable
            assert all(ids[: one.stable] == one.beams[0][: one.stable] for ids in later.beams)
        if len(steps) > 1 and steps[-1].beams[0]:
            shares.append(steps[-2].stable / len(steps[-1].beams[0]))
    assert sum(shares) / len(shares) > 0.2
