"""How the next token is chosen: greedy, sampling, beam search and beam sampling, one step at a time.

All engines decode here; an engine only says how probable each next token is. The caller takes step after
step and may stop after any. Results are those of transformers' generate (length penalty 1, early_stopping
off), which the tests compare with.

Legend: B beams, V entries of the vocabulary, T tokens of prompt and answer.
"""

import dataclasses
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from onecard.config.generation import Generation
from onecard.inference import engine as engines

GOES, STOPS, BANNED = "goes", "stops", "banned"  # what a text watch says of an answer so far
END, STOP, LENGTH = "end", "stop", "length"  # why an answer is finished
CANCELLED, NO_MEMORY = "cancelled", "out of memory"  # and why one stopped before
SHORTLIST = 256  # tokens looked at first when one is drawn: with --top_k there are hardly ever more
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's step
Rule = Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]  # tokens so far [B, T], scores -> scores
IMPOSSIBLE = -1e8  # scores below are of beams that do not exist (transformers starts them at -1e9)


class Step(NamedTuple):
    """An answer after one more token; token ids without the prompt and without end tokens."""

    beams: list[list[int]]  # the best first; one without beam search
    stable: int  # leading tokens of beams[0] that no later step takes back
    finished: str = ""  # END, STOP or LENGTH: beams[0] is the answer


@dataclasses.dataclass
class Hypothesis:
    """A finished beam."""

    ids: list[int]
    score: float  # log probability of a token, on average
    why: str


def decode(
    sequence: engines.Sequence,
    prompt: list[int],
    settings: Generation,
    ends: Sequence[int],
    limit: int,
    watch: Callable[[list[int]], str] | None = None,
) -> Iterator[Step]:
    """The answer, growing; the last step has `finished`.

    sequence: read already; ends: end tokens; limit: most new tokens; watch: what the stop
    words and banned phrases say of an answer.
    """
    pick = _Picker(settings, prompt, ends, watch)
    if settings.width > 1:
        return _beams(sequence, pick, settings.width, set(ends), limit)
    return _single(sequence, pick, set(ends), limit)


def _single(sequence: engines.Sequence, pick: "_Picker", ends: set[int], limit: int) -> Iterator[Step]:
    ids: list[int] = []
    scores = sequence.first()
    while True:
        found = pick.best(scores, [ids], [0.0], 1)
        if not found:  # every token is banned here
            yield Step([ids], len(ids), STOP)
            return
        _, _, token, verdict = found[0]
        if token in ends:
            yield Step([ids], len(ids), END)
            return
        ids = [*ids, token]
        why = STOP if verdict == STOPS else LENGTH if len(ids) == limit else ""
        yield Step([ids], len(ids), why)
        if why:
            return
        scores = sequence.advance([0], [token])


def _beams(
    sequence: engines.Sequence, pick: "_Picker", width: int, ends: set[int], limit: int
) -> Iterator[Step]:
    live: list[list[int]] = [[]]
    totals = [0.0]  # log probability of each live beam
    done: list[Hypothesis] = []  # the best `width`, best first
    scores, stable = sequence.first(), 0
    while True:
        found = pick.best(scores, live, totals, (1 + max(1, len(ends))) * width)
        length = len(live[0]) + 1
        going = []
        for rank, (total, parent, token, verdict) in enumerate(found):
            ids = live[parent] if token in ends else [*live[parent], token]
            why = END if token in ends else STOP if verdict == STOPS else LENGTH if length == limit else ""
            if not why:
                going.append((total, parent, token, ids))
            elif rank < width:  # the others would not have been kept either
                done.append(Hypothesis(ids, total / length, why))
        done = sorted(done, key=lambda one: -one.score)[:width]  # a stable sort: of equals the older
        going = going[:width]
        improves = going and (len(done) < width or going[0][0] / length > done[-1].score)
        if not improves:
            best = done[0] if done else Hypothesis(live[0], 0.0, STOP)
            yield Step([one.ids for one in done] or [best.ids], len(best.ids), best.why)
            return
        parents = [parent for _, parent, _, _ in going]
        live, totals = [ids for *_, ids in going], [total for total, *_ in going]
        stable = _common([*live, *(one.ids for one in done)], stable)
        yield Step(live, stable)
        scores = sequence.advance(parents, [token for _, _, token, _ in going])


def shared_beginning(one: list[int], other: list[int]) -> int:
    """How many tokens two lists begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _common(sequences: list[list[int]], known: int) -> int:
    """Length of the prefix that all share, which is at least `known`."""
    shortest = min(map(len, sequences))
    while known < shortest and len({ids[known] for ids in sequences}) == 1:
        known += 1
    return known


class _Picker:
    """The best continuations, after everything the settings ask for."""

    def __init__(
        self,
        settings: Generation,
        prompt: list[int],
        ends: Sequence[int],
        watch: Callable[[list[int]], str] | None,
    ):
        self.watch, self.width, self.step = watch, settings.width, 0
        self.seed = secrets.randbits(63) if settings.seed is None else settings.seed
        self.prompt, self.settings, self.ends = prompt, settings, ends
        self.rules, self.warpers = list(_rules(settings)), list(_warpers(settings, ends))
        self.greedy = not (settings.samples or self.width > 1 or self.rules or watch)
        self.seen: tuple[torch.Tensor | None, Any] = None, None  # of _highest
        self.within: torch.Tensor | None = None  # of _within, for the first scores

    def best(
        self, scores: torch.Tensor, beams: list[list[int]], totals: list[float], count: int
    ) -> list[tuple[float, int, int, str]]:
        """Up to `count` of (total score, beam, token, verdict), the best first; sampled ones by chance.

        scores: [B, V] of the engine; totals: of each beam so far.
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
        if len(beams[0]) < self.settings.min_new_tokens:
            if self.within is None:
                self.within = _within(self.ends, scores)
            scores = scores.index_fill(1, self.within, -torch.inf)
        if self.width > 1:
            scores = self._warped(scores) + torch.tensor(totals, device=scores.device)[:, None]
        flat = scores.reshape(-1)
        places, values, ranked = self._drawn(flat) if self.settings.samples else (None, flat, flat)
        found: list[tuple[float, int, int, str]] = []
        wanted, tried = count, set()
        while len(ranked):
            wanted = min(wanted, len(ranked))
            for place, value in _largest(ranked, values, places, wanted):
                if value < IMPOSSIBLE:  # forbidden by a rule, as are all that follow
                    wanted = len(ranked)
                    break
                if place in tried:  # equal scores may come in another order than before
                    continue
                tried.add(place)
                beam, token = divmod(place, scores.shape[-1])
                verdict = self.watch([*beams[beam], token]) if self.watch else GOES
                if verdict != BANNED:
                    found.append((value, beam, token, verdict))
            if len(found) >= count or wanted == len(ranked):
                return sorted(found[:count], key=lambda one: -one[0])
            wanted *= 4  # banned phrases took some away
        return []

    def _highest(self, scores: torch.Tensor) -> list[tuple[float, int, int, str]]:
        """What best() finds when nothing is asked for but the token with the highest score.

        At every token a call of torch costs more than that search; llama.cpp's scores come in the same tensor
        each time, and its view is kept.
        """
        known, row = self.seen
        if scores is not known or scores.dtype != torch.float32:
            row = _quick(scores.float())
            self.seen = scores, row
        token = int(row.argmax())
        value = float(row[0, token])
        return [] if value < IMPOSSIBLE else [(value, 0, token, GOES)]

    def _drawn(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(place in flat, score, score with Gumbel noise) of each possible token, on the processor.

        The largest scores with noise are a sample without replacement (Kool et al. 2019, arXiv 1903.06059).
        """
        count = min(len(flat), SHORTLIST)
        values, places = (part.cpu() for part in torch.topk(flat, count))
        if self.width == 1 and self.warpers:
            scaled, keep = values / self.settings.temperature, self.settings.top_k
            if count == len(flat) or (0 < keep < count and scaled[keep - 1] > scaled[-1]):
                values = self._warped(values[None])[0]  # all that --top_k leaves, equal ones too, is here
            else:
                flat = self._warped(flat[None])[0]
                values, places = (part.cpu() for part in torch.topk(flat, count))
        while count < len(flat) and values[-1] >= IMPOSSIBLE:
            count = min(len(flat), 8 * count)
            values, places = (part.cpu() for part in torch.topk(flat, count))
        possible = values >= IMPOSSIBLE
        values, places = values[possible], places[possible]
        self.step += 1
        uniform = torch.from_numpy(uniforms(self.seed, self.step, places.numpy()))
        return places, values, values - torch.log(-torch.log(uniform)).float()

    def _warped(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] after --temperature, --top_k and --top_p; they look at no token before."""
        for warp in self.warpers:
            scores = warp(None, scores)
        return scores


def uniforms(seed: int, step: int, places: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """A number in (0, 1) for each place, fp64; it depends on nothing but seed, step and place.

    So a score that another device rounds in another way changes no other token's number. SplitMix64 (Steele,
    Lea and Flood 2014).
    """
    state = np.array([seed], dtype=np.uint64)
    for more in (np.array([step], dtype=np.uint64), places.astype(np.uint64)):
        state = _mixed(state) + more * GOLDEN
    return ((_mixed(state) >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53


def _mixed(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = state + GOLDEN
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _largest(
    ranked: torch.Tensor, values: torch.Tensor, places: torch.Tensor | None, count: int
) -> list[tuple[int, float]]:
    """(place, value) of the `count` entries that rank highest."""
    if count == 1:
        first = int(_quick(ranked).argmax())
        return [(first if places is None else int(places[first]), float(values[first]))]
    order = torch.topk(ranked, count).indices
    chosen = order if places is None else places[order]
    return list(zip(chosen.tolist(), values[order].tolist(), strict=True))


def _quick(scores: torch.Tensor) -> Any:
    """The same memory as numpy's array on a processor, whose calls are the cheaper ones at every token."""
    return scores.numpy() if scores.device.type == "cpu" else scores


def _within(ends: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
    """The end tokens that there are scores of, on their device."""
    found = [end for end in ends if end < scores.shape[-1]]
    return torch.tensor(found, dtype=torch.long, device=scores.device)


def _rules(settings: Generation) -> Iterator[Rule]:
    """What the settings ask for that depends on the tokens before, in transformers' order."""
    if settings.repetition_penalty != 1:
        yield RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)
    if settings.no_repeat_ngram_size:
        yield NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size)


def _warpers(settings: Generation, ends: Sequence[int]) -> Iterator[Rule]:
    """transformers' own for sampling; the order is its order."""
    if not settings.samples:
        return
    keep = 1 if settings.width == 1 else 1 + max(1, len(ends))
    if settings.temperature != 1:
        yield TemperatureLogitsWarper(settings.temperature)
    if settings.top_k:
        yield TopKLogitsWarper(settings.top_k, min_tokens_to_keep=keep)
    if settings.top_p < 1:
        yield TopPLogitsWarper(settings.top_p, min_tokens_to_keep=keep)
