"""What one request of a service asks of an answer beyond the options for people: fields of OpenAI's API.

No window and no program has these as options, so config declares none of them. They hold for one answer at a
time (modes greedy and sample), with every engine. rules.py says in which order they change the scores.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from onecard.config import generation
from onecard.config.generation import LONGEST_PHRASE, Generation
from onecard.errors import UserError
from onecard.inference import rules as inference_rules

MOST_STOPS, MOST_LOGPROBS = 4, 20
HIGHEST_PENALTY, HIGHEST_BIAS = 2, 100


@dataclasses.dataclass(frozen=True)
class Controls:
    """The fields of one request, named as OpenAI's API names them; the defaults change nothing."""

    frequency_penalty: float = 0.0  # from -2 to 2, as rules.penalties applies it
    presence_penalty: float = 0.0  # from -2 to 2
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)  # token id -> from -100 to 100
    stop: tuple[str, ...] = ()  # the answer ends before any of these texts, beside those of Generation.stop
    json_schema: Mapping[str, Any] | None = None  # of the answer, which is JSON; None: any text
    top_logprobs: int | None = None  # alternatives of each token, from 0 to 20; None: no log-probabilities

    def stops(self, settings: Generation) -> list[str]:
        """All texts before which the answer ends."""
        return [*generation.phrases(settings.stop), *self.stop]

    def check(self, settings: Generation, vocabulary: int) -> None:
        """Raise UserError that names every field with a wrong value, or that these settings cannot apply.

        vocabulary: number of token ids that the tokenizer has.
        """
        problems = [*self._wrong_values(vocabulary), *self._unfit(settings)]
        if problems:
            raise UserError(" ".join(problems))

    def _wrong_values(self, vocabulary: int) -> list[str]:
        problems = []
        for name, value in self._penalties().items():
            if not -HIGHEST_PENALTY <= value <= HIGHEST_PENALTY:
                problems.append(f"{name} must be from -2 to 2, not {value}.")
        for token, amount in self.logit_bias.items():
            if not 0 <= token < vocabulary:
                problems.append(
                    f"logit_bias: the tokenizer has no token {token}; ids go to {vocabulary - 1}."
                )
            if not -HIGHEST_BIAS <= amount <= HIGHEST_BIAS:
                problems.append(f"logit_bias of token {token} must be from -100 to 100, not {amount}.")
        if len(self.stop) > MOST_STOPS:
            problems.append(f"stop must be at most {MOST_STOPS} texts, not {len(self.stop)}.")
        if not all(1 <= len(text) <= LONGEST_PHRASE for text in self.stop):
            problems.append(f"stop: each text must have 1 to {LONGEST_PHRASE} characters.")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MOST_LOGPROBS:
            problems.append(f"top_logprobs must be from 0 to {MOST_LOGPROBS}, not {self.top_logprobs}.")
        return problems

    def _unfit(self, settings: Generation) -> list[str]:
        problems = []
        of_one_answer = [name for name, value in self._of_one_answer().items() if value]
        if settings.width > 1 and of_one_answer:
            names = ", ".join(of_one_answer)
            problems.append(f"{names}: beam search cannot apply this. Use greedy or sample.")
        forbids = settings.no_repeat_ngram_size or generation.phrases(settings.banned)
        if self.json_schema is not None and forbids:  # together they may forbid every token, within the JSON
            problems.append("json_schema: neither banned phrases nor no_repeat_ngram_size can go with it.")
        return problems

    def _penalties(self) -> dict[str, float]:
        return {"frequency_penalty": self.frequency_penalty, "presence_penalty": self.presence_penalty}

    def _of_one_answer(self) -> dict[str, Any]:
        """Field -> a true value where the field asks for what only one answer at a time can have."""
        if_set = {"json_schema": self.json_schema is not None, "top_logprobs": self.top_logprobs is not None}
        return {**self._penalties(), "logit_bias": self.logit_bias, **if_set}

    def rules_after(self, before: Sequence[int]) -> list[inference_rules.AnswerRule]:
        """The rules that these fields ask for, in their order, without a grammar.

        before: as rules.penalties takes it.
        """
        asked: list[inference_rules.AnswerRule] = []
        if any(self._penalties().values()):
            asked.append(inference_rules.penalties(self.frequency_penalty, self.presence_penalty, before))
        if self.logit_bias:
            asked.append(inference_rules.bias(self.logit_bias))
        return asked


NONE = Controls()
