"""How the next token is chosen: greedy, sampling, beam search and beam sampling, one step at a time.

All engines decode here; an engine only says how probable each next token is. The caller takes one step after
the other and may stop after any of them. The results are those of generate in transformers (length penalty 1,
early_stopping off); the tests compare them. rules.py says in which order the scores of a step are changed.

A sampled token depends on its scores, the seed and the number of the step, and on nothing else. So the same
seed gives the same answer, whichever answers the engine computes beside it, as long as the scores are the
same. A batch may round scores otherwise; that changes a token only where two noisy scores lie within the
rounding, or where a token lies that close to the edge of top_k or top_p.

Legend: B beams, V entries of the vocabulary, T tokens of prompt and answer.
"""

import dataclasses
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from onecard.config.generation import Generation
from onecard.inference import engine as inference_engine
from onecard.inference import rules as inference_rules

GOES, STOPS, BANNED = "goes", "stops", "banned"  # what a watch says of an answer so far
END, STOP, LENGTH = "end", "stop", "length"  # why an answer is finished
CANCELLED, NO_MEMORY = "cancelled", "out of memory"  # why an answer stopped before its end
SHORTLIST = 256  # the most probable tokens, among which one is drawn first: --top_k rarely leaves more
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's step
LEAST_LOGPROB = -9999.0  # OpenAI's API writes this for tokens that are less probable still; JSON has no -inf
IMPOSSIBLE = -1e8  # lower scores belong to tokens that a rule forbids


class Scored(NamedTuple):
    """A token with its log-probability, and the most probable tokens at its place, the best first.

    The distribution is the model's own: softmax of the engine's scores in fp32, before every rule and filter.
    """

    token: int
    logprob: float  # natural logarithm, at least LEAST_LOGPROB
    top: list[tuple[int, float]]  # (token, logprob)


class Step(NamedTuple):
    """An answer after one more token: token ids without the prompt and without EOS ids."""

    beams: list[list[int]]  # the best first; only one without beam search
    stable: int  # so many tokens at the start of beams[0] are never taken back
    finished: str = ""  # END, STOP or LENGTH: beams[0] is the answer
    scored: Scored | None = None  # the token that this step added, where log-probabilities were asked for


@dataclasses.dataclass
class Hypothesis:
    """A finished beam."""

    ids: list[int]
    score: float  # mean log probability of its tokens
    finished: str  # END, STOP or LENGTH


def decode(
    sequence: inference_engine.Sequence,
    prompt: list[int],
    settings: Generation,
    eos_ids: Sequence[int],
    limit: int,
    watch: Callable[[list[int]], str] | None = None,
    rules: Sequence[inference_rules.AnswerRule] = (),
    top_logprobs: int | None = None,
) -> Iterator[Step]:
    """The growing answer, step by step; the last step has `finished`.

    sequence: its prompt has been read; limit: the most new tokens; watch: token ids of an answer so far ->
    GOES, STOPS or BANNED; rules: further ones, not for beams; top_logprobs: how many of the most probable
    tokens each step lists, None for no log-probabilities at all, not for beams.
    """
    pick = _Picker(settings, prompt, eos_ids, watch, rules)
    if settings.width > 1:
        assert not rules, "they follow one answer, not beams"
        assert top_logprobs is None, "beams have none"
        return _beams(sequence, pick, settings.width, set(eos_ids), limit)
    return _single(sequence, pick, set(eos_ids), limit, top_logprobs)


def _single(
    sequence: inference_engine.Sequence,
    pick: "_Picker",
    eos_ids: set[int],
    limit: int,
    top_logprobs: int | None,
) -> Iterator[Step]:
    ids: list[int] = []
    scores = sequence.first()
    while True:
        candidates = pick.best(scores, [ids], [0.0], 1)
        if not candidates:  # every token is banned here
            yield Step([ids], len(ids), STOP)
            return
        _, _, token, verdict = candidates[0]
        if token in eos_ids:
            yield Step([ids], len(ids), END)
            return
        ids = [*ids, token]
        finished = STOP if verdict == STOPS else LENGTH if len(ids) == limit else ""
        scored = None if top_logprobs is None else _scored_token(scores, token, top_logprobs)
        yield Step([ids], len(ids), finished, scored)
        if finished:
            return
        scores = sequence.advance([0], [token])


def _scored_token(scores: torch.Tensor, token: int, count: int) -> Scored:
    """A token of scores [1, V] with its log-probability and the `count` most probable tokens."""
    logprobs = torch.log_softmax(scores[0].float(), dim=-1).clamp(min=LEAST_LOGPROB)
    best = torch.topk(logprobs, min(count, len(logprobs)))
    top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Scored(token, float(logprobs[token]), top)


def _beams(
    sequence: inference_engine.Sequence, pick: "_Picker", width: int, eos_ids: set[int], limit: int
) -> Iterator[Step]:
    live: list[list[int]] = [[]]
    totals = [0.0]  # log probability of each live beam
    done: list[Hypothesis] = []  # the best `width`, best first
    scores, stable = sequence.first(), 0
    while True:
        candidates = pick.best(scores, live, totals, (1 + max(1, len(eos_ids))) * width)
        length = len(live[0]) + 1
        going = []
        for rank, (total, parent, token, verdict) in enumerate(candidates):
            is_end = token in eos_ids
            ids = live[parent] if is_end else [*live[parent], token]
            finished = END if is_end else STOP if verdict == STOPS else LENGTH if length == limit else ""
            if not finished:
                going.append((total, parent, token, ids))
            elif rank < width:  # those that rank lower would not have become beams either
                done.append(Hypothesis(ids, total / length, finished))
        done = sorted(done, key=lambda one: -one.score)[:width]  # the sort is stable: older ones win a tie
        going = going[:width]
        improves = going and (len(done) < width or going[0][0] / length > done[-1].score)
        if not improves:
            best = done[0] if done else Hypothesis(live[0], 0.0, STOP)
            yield Step([one.ids for one in done] or [best.ids], len(best.ids), best.finished)
            return
        parents = [parent for _, parent, _, _ in going]
        live, totals = [ids for *_, ids in going], [total for total, *_ in going]
        stable = _common([*live, *(one.ids for one in done)], stable)
        yield Step(live, stable)
        scores = sequence.advance(parents, [token for _, _, token, _ in going])


def shared_beginning(one: list[int], other: list[int]) -> int:
    """How many tokens two lists begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _common(sequences: list[list[int]], least: int) -> int:
    """The length of the prefix that all share; they are known to share `least` tokens."""
    shortest = min(map(len, sequences))
    while least < shortest and len({ids[least] for ids in sequences}) == 1:
        least += 1
    return least


class _Picker:
    """Chooses the best continuations, after all rules and filters of the settings."""

    def __init__(
        self,
        settings: Generation,
        prompt: list[int],
        eos_ids: Sequence[int],
        watch: Callable[[list[int]], str] | None,
        answer_rules: Sequence[inference_rules.AnswerRule] = (),
    ):
        self.watch, self.width, self.step = watch, settings.width, 0
        self.seed = secrets.randbits(63) if settings.seed is None else settings.seed
        self.prompt, self.settings, self.eos_ids = prompt, settings, eos_ids
        self.rules = list(inference_rules.of_settings(settings))
        self.answer_rules = list(answer_rules)
        self.warpers = list(inference_rules.warpers(settings, eos_ids))
        self.greedy = not (settings.samples or self.width > 1 or self.rules or self.answer_rules or watch)
        self.last_row: tuple[torch.Tensor | None, Any] = None, None  # the scores and their view, of _highest
        self.scored_eos_ids: torch.Tensor | None = None

    def best(
        self, scores: torch.Tensor, beams: list[list[int]], totals: list[float], count: int
    ) -> list[tuple[float, int, int, str]]:
        """Up to `count` tuples (total score, beam, token, verdict), the best first; drawn when sampling.

        scores: [B, V] from the engine; totals: the score of each beam so far.
        """
        if self.greedy and len(beams[0]) >= self.settings.min_new_tokens:
            return self._highest(scores)
        scores = scores.float()
        if self.width > 1:
            scores = torch.log_softmax(scores, dim=-1)
        if self.rules:
            ids = torch.tensor([self.prompt + beam for beam in beams], device=scores.device)  # [B, T]
            for rule in self.rules:
                scores = rule(ids, scores)
        for answer_rule in self.answer_rules:
            scores = answer_rule(beams[0], scores)
        if len(beams[0]) < self.settings.min_new_tokens:
            if self.scored_eos_ids is None:
                self.scored_eos_ids = _scored(self.eos_ids, scores)
            scores = scores.index_fill(1, self.scored_eos_ids, -torch.inf)
        if self.width > 1:
            scores = self._warped(scores) + torch.tensor(totals, device=scores.device)[:, None]
        flat = scores.reshape(-1)
        indices, values, ranked = self._drawn(flat) if self.settings.samples else (None, flat, flat)
        candidates: list[tuple[float, int, int, str]] = []
        tries, tried = count, set()
        while len(ranked):
            tries = min(tries, len(ranked))
            for index, value in _largest(ranked, values, indices, tries):
                if value < IMPOSSIBLE:  # a rule forbids this token and all that follow
                    tries = len(ranked)
                    break
                if index in tried:  # equal scores may come in another order than before
                    continue
                tried.add(index)
                beam, token = divmod(index, scores.shape[-1])
                verdict = self.watch([*beams[beam], token]) if self.watch else GOES
                if verdict != BANNED:
                    candidates.append((value, beam, token, verdict))
            if len(candidates) >= count or tries == len(ranked):
                return sorted(candidates[:count], key=lambda one: -one[0])
            tries *= 4  # banned phrases took some candidates away
        return []

    def _highest(self, scores: torch.Tensor) -> list[tuple[float, int, int, str]]:
        """The result of best() when the settings ask only for the token with the highest score.

        A call of torch costs more than this search. llama.cpp's scores come in the same tensor for every
        token, so its view in numpy is kept.
        """
        tensor, row = self.last_row
        if scores is not tensor or scores.dtype != torch.float32:
            row = _quick(scores.float())
            self.last_row = scores, row
        token = int(row.argmax())
        value = float(row[0, token])
        return [] if value < IMPOSSIBLE else [(value, 0, token, GOES)]

    def _drawn(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(index in flat, score, score with Gumbel noise) of each possible token, on the CPU.

        The largest scores with noise are a sample without replacement (Kool et al. 2019, arXiv 1903.06059).
        """
        count = min(len(flat), SHORTLIST)
        values, indices = (part.cpu() for part in torch.topk(flat, count))
        if self.width == 1 and self.warpers:
            scaled, keep = values / self.settings.temperature, self.settings.top_k
            if count == len(flat) or (0 < keep < count and scaled[keep - 1] > scaled[-1]):
                values = self._warped(values[None])[0]  # these hold all that --top_k leaves, ties included
            else:
                flat = self._warped(flat[None])[0]
                values, indices = (part.cpu() for part in torch.topk(flat, count))
        while count < len(flat) and values[-1] >= IMPOSSIBLE:
            count = min(len(flat), 8 * count)
            values, indices = (part.cpu() for part in torch.topk(flat, count))
        possible = values >= IMPOSSIBLE
        values, indices = values[possible], indices[possible]
        self.step += 1
        uniform = torch.from_numpy(uniforms(self.seed, self.step, indices.numpy()))
        return indices, values, values - torch.log(-torch.log(uniform)).float()

    def _warped(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] after --temperature, --top_k and --top_p, which depend on no earlier token."""
        for warp in self.warpers:
            scores = warp(None, scores)
        return scores


def uniforms(seed: int, step: int, indices: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """A random number in (0, 1) for each index, fp64; it depends only on seed, step and index.

    So a score that another device rounds differently changes no other token's number. SplitMix64 (Steele,
    Lea and Flood 2014).
    """
    state = np.array([seed], dtype=np.uint64)
    for number in (np.array([step], dtype=np.uint64), indices.astype(np.uint64)):
        state = _mixed(state) + number * GOLDEN
    return ((_mixed(state) >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53


def _mixed(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = state + GOLDEN
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _largest(
    ranked: torch.Tensor, values: torch.Tensor, indices: torch.Tensor | None, count: int
) -> list[tuple[int, float]]:
    """(index, value) of the `count` entries that rank highest; indices: of the entries, None for 0, 1, ..."""
    if count == 1:
        first = int(_quick(ranked).argmax())
        return [(first if indices is None else int(indices[first]), float(values[first]))]
    order = torch.topk(ranked, count).indices
    chosen = order if indices is None else indices[order]
    return list(zip(chosen.tolist(), values[order].tolist(), strict=True))


def _quick(scores: torch.Tensor) -> Any:
    """On a CPU the same memory as a numpy array, whose calls cost less: this runs for every token."""
    return scores.numpy() if scores.device.type == "cpu" else scores


def _scored(eos_ids: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
    """The EOS ids that have a score, on the device of the scores."""
    scored = [token for token in eos_ids if token < scores.shape[-1]]
    return torch.tensor(scored, dtype=torch.long, device=scores.device)
