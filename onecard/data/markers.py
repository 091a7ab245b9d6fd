"""Recognises questions that carry the markers of a prompt template already, and takes the markers off.

Published rows are often wrapped: an instruction of TigerBot's medical_qa is "### Instruction:", the question
and "### Response:". The template of a run would be written around such a row a second time. A question is
unwrapped only when the whole of it is a prompt that a template writes; one that merely quotes markers stays.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from onecard.data import template as data_template
from onecard.data.conversation import ASSISTANT, Conversation, Turn
from onecard.data.template import Part, Template

WHOLE = "whole"  # every marked question of a row is a whole prompt, so the markers can be taken off
TURNS = "turns"  # the same, and a prompt of several turns becomes these turns
PART = "part"  # there are markers in a question, but it is no whole prompt
TEXT = "text"  # the markers stand in raw text, which no template is written around
UNWRAP, KEEP = "unwrap", "keep"  # what --marked_rows does with whole prompts
STARTS = ("<s>", "<|begin_of_text|>")  # names of BOS that may stand before a prompt
ENDS = (
    "</s>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
)  # names of EOS after an answer
OWN = "the model's own template"  # how a message names the tokenizer's chat template


def _compact(text: str) -> str:
    return "".join(text.split())


# Alpaca's preamble and its translations, as data sets write them before the first marker. Any other text
# there may be an instruction of its own, so it is never taken off.
PREAMBLES = {
    _compact(text)
    for text in (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
        "Below is an instruction that describes a task. Write a response that completes the request.",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.",
        "以下是描述任务的指令，请写出恰当完成该请求的回应。",
        "以下是描述任务的指令，以及提供更多上下文的输入。请写出恰当完成该请求的回答。",
        "以下是一个描述任务的指令，请写一个完成该指令的适当回复。",
        "以下是一个描述任务的指令。请编写一个适当完成请求的回答。",
        "以下是一个描述任务的指令，配有提供进一步背景的输入。请写出一个适当完成请求的回答。",
        "下面是描述任务的指令。编写一个适当地完成请求的响应。",
        "下面是一条描述任务的指令。请写出一个能够恰当完成该请求的回答。",
        "下面是一条描述任务的指令，并配有提供进一步背景信息的输入。请写出一个能适当完成要求的回复。",
    )
}


@dataclasses.dataclass(frozen=True)
class Marked:
    """The template whose markers a row carries, as messages name it, and WHOLE, TURNS, PART or TEXT."""

    template: str
    kind: str

    @property
    def is_whole(self) -> bool:
        """Whether the markers can be taken off."""
        return self.kind in (WHOLE, TURNS)


@dataclasses.dataclass
class MarkedRows:
    """Rows that carry the same markers."""

    marked: Marked
    rows: int
    first: int  # number of the first of them over all files, counted from 1


@dataclasses.dataclass(frozen=True)
class Form:
    """What a template writes around the texts of a prompt, as plain text."""

    name: str
    openings: tuple[str, ...]  # before the first question
    before: str  # before every question
    after: str  # after every question: here an answer begins
    middle: str | None = None  # between a question and its input, where a marker tells them apart
    system: tuple[str, str] | None = None  # before and after a system's text, where both are markers
    answer_end: str = ""
    between: str = ""  # from the end of an answer to `before`
    has_control: bool = False  # only a prompt of control tokens shows for certain where its turns end

    @functools.cached_property
    def first_markers(self) -> tuple[str, ...]:
        """Markers of which one stands before the first question of every prompt."""
        starts = (self.before, *self.openings, (self.system or ("",))[0])
        return tuple(dict.fromkeys(start.strip() for start in starts if start.strip()))


LLAMA_2 = Form(
    "llama-2",
    openings=("[INST] ",),
    before="",
    after=" [/INST]",
    system=("[INST] <<SYS>>\n", "\n<</SYS>>\n\n"),
    between=" </s><s>[INST] ",
    has_control=True,
)


def form_of(template: Template) -> Form | None:
    """The form of a template's prompts; None when no marker stands on both sides of a question."""
    before, after = _around(template.user, "{text}")
    middle = None
    if template.user_with_input:
        first, rest = _around(template.user_with_input, "{text}", "{input}")
        between, last = rest.split("{input}")
        middle = between if between.strip() and (first, last) == (before, after) else None
    openings = [_plain(template.opening), _plain(template.opening_with_input or ())]
    openings = [opening for opening in openings if opening.strip()] + ([""] if before.strip() else [])
    system = _around(template.system, "{text}") if template.system else ("", "")
    if not after.strip() or not openings:
        return None
    return Form(
        OWN if template.name == data_template.AUTO else template.name,
        openings=tuple(dict.fromkeys(openings)),
        before=before,
        after=after,
        middle=middle,
        system=system if system[0].strip() and system[1].strip() else None,
        answer_end=_around(template.assistant, "{text}")[1],
        between=_plain(template.between),
        has_control=bool(template.controls()),
    )


def _around(parts: tuple[Part, ...], placeholder: str, *others: str) -> tuple[str, str]:
    place = [what for what, _ in parts].index(placeholder)
    return _plain(parts[:place]), _plain(parts[place + 1 :], *others)


def _plain(parts: Iterable[Part], *placeholders: str) -> str:
    """Parts as a row writes them: control tokens by their names, no end token."""
    return "".join(text or (what if what in placeholders else "") for what, text in parts)


@functools.cache
def _built_in() -> tuple[Form, ...]:
    templates = [data_template.read(path) for path in sorted(data_template.FOLDER.glob("*.json"))]
    return (*filter(None, map(form_of, templates)), LLAMA_2)


class Markers:
    """The markers of the templates of a run, of every built-in template, and of Llama 2."""

    def __init__(self, templates: Sequence[Template], tokenizer: Any):
        self.own = [form for form in map(form_of, templates) if form]
        self.forms = list(dict.fromkeys([*self.own, *_built_in()]))
        self.ends = tuple(dict.fromkeys(filter(None, [tokenizer.eos_token, *ENDS])))
        self.inner = {form: self._inner(form) for form in self.forms}
        hints = {form.after.strip() for form in self.forms}
        self.hint = re.compile("|".join(map(re.escape, sorted(hints, key=len, reverse=True))))
        self.counted: dict[Marked, MarkedRows] = {}

    def count(self, conversation: Conversation, number: int, unwraps: bool) -> Conversation:
        """The conversation of the row with this number, which is counted if it carries markers.

        unwraps: the markers of whole prompts are taken off.
        """
        plain, marked = self.unwrap(conversation)
        if marked:
            self.counted.setdefault(marked, MarkedRows(marked, 0, number)).rows += 1
        return plain if unwraps else conversation

    def unwrap(self, conversation: Conversation) -> tuple[Conversation, Marked | None]:
        """The conversation without markers, and what it carried; the same conversation if it is PART or TEXT.

        A prompt of control tokens with several turns becomes these turns; without control tokens it may as
        well be one question with examples, so it stays. An end token after an answer goes with the markers.
        """
        if not any(self.hint.search(turn.text) for turn in conversation.turns if turn.role != ASSISTANT):
            return conversation, None
        turns = conversation.turns
        if conversation.is_raw:
            name = self._quoted(turns[-1].text) if turns[-1].role == "text" else None
            return conversation, Marked(name, TEXT) if name else None
        names = {number: self._quoted(turn.text) for number, turn in enumerate(turns) if turn.role == "user"}
        marked = [number for number, name in names.items() if name]
        if not marked:
            return conversation, None
        result: list[Turn] = []
        form, kind = None, WHOLE
        for number, turn in enumerate(turns):
            if number in marked:
                prompt = None if turn.input.strip() else self._parsed(turn.text)
                # a system's turn or earlier turns can only stand before all others
                if prompt is None or (result and len(prompt[1]) > 1):
                    return conversation, Marked(str(names[number]), PART)
                form, own_turns = prompt
                result += own_turns
                kind = TURNS if any(turn.role == ASSISTANT for turn in own_turns) else kind
            elif turn.role == ASSISTANT and form:
                result.append(turn._replace(text=self._without_end(turn.text, form)))
            else:
                result.append(turn)
        assert form is not None
        return Conversation(tuple(result)), Marked(form.name, kind)

    def _parsed(self, text: str) -> tuple[Form, list[Turn]] | None:
        """The form of a whole prompt and its turns: first exactly, then with other white space.

        White space at the ends of a text belongs to it only where the run's own template has written it.
        """
        for exact in (True, False):
            for form in self.forms:
                if exact and form is LLAMA_2:
                    continue  # white space at its markers is no part of the texts
                turns = self._turns(text, form, exact)
                if turns and form not in self.own:
                    turns = [Turn(turn.role, turn.text.strip(), turn.input.strip()) for turn in turns]
                if turns:
                    return form, turns
        return None

    def _turns(self, text: str, form: Form, exact: bool) -> list[Turn] | None:
        def literal(marker: str) -> str:
            return marker if exact else marker.strip()

        rest = text if exact else text.replace("\r\n", "\n").strip()
        for start in STARTS:
            rest = rest.removeprefix(start)
        *segments, last = rest.split(literal(form.after))
        if not segments or (last if exact else last.strip()):
            return None
        if len(segments) > 1 and not form.has_control:
            return None
        if not exact and form.after.startswith("\n") and not all(map(_ends_line, segments)):
            return None
        turns = self._first(segments[0], form, literal, exact)
        join = literal(form.answer_end + form.between + form.before)
        for segment in segments[1:]:
            answer, separator, question = segment.partition(join) if join.strip() else ("", "", "")
            user = self._user(question, form, exact) if separator else None
            if turns is None or user is None:
                return None
            answer = answer if exact else answer.strip()
            turns += [Turn(ASSISTANT, self._without_end(answer, form)), user]
        return turns if turns and all(turn.text.strip() for turn in turns) else None

    def _first(self, segment: str, form: Form, literal: Any, exact: bool) -> list[Turn] | None:
        """The turns before the first answer; None when the segment does not begin as a prompt does."""
        if form.system and segment.startswith(literal(form.system[0])):
            inner = segment.removeprefix(literal(form.system[0]))
            system, separator, question = inner.partition(literal(form.system[1] + form.before))
            user = self._user(question, form, exact) if separator else None
            return [Turn("system", system if exact else system.strip()), user] if user else None
        for opening in sorted(form.openings, key=len, reverse=True):
            if not segment.startswith(literal(opening)):
                continue
            rest = segment.removeprefix(literal(opening))
            if not exact and form.before.strip():
                preamble, marker, question = rest.partition(literal(form.before))
                rest = marker + question if _compact(preamble) in {"", *PREAMBLES} else rest
            if rest.startswith(literal(form.before)):
                user = self._user(rest.removeprefix(literal(form.before)), form, exact)
                return [user] if user else None
        return None

    def _user(self, text: str, form: Form, exact: bool) -> Turn | None:
        """A question, with its input; None when it holds markers of its own, so that its end is in doubt."""
        question, material = text, ""
        if form.middle:
            question, _, material = text.partition(form.middle if exact else form.middle.strip())
        if any(_holds(part, marker) for part in (question, material) for marker in self.inner[form]):
            return None
        return Turn("user", question, material) if exact else Turn("user", question.strip(), material.strip())

    def _inner(self, form: Form) -> set[str]:
        """Markers that cannot stand inside a question: those of all forms that end a question alike."""
        alike = [other for other in self.forms if other.after.strip() == form.after.strip()]
        markers = {marker for other in alike for marker in (other.before, other.middle or "", other.after)}
        return {marker.strip() for marker in markers} - {""}

    def _quoted(self, text: str) -> str | None:
        """The template of which a text holds a marker before a question and the one after it."""
        for form in self.forms:
            if _holds(text, form.after.strip()) and any(
                _holds(text, marker) for marker in form.first_markers
            ):
                return form.name
        return None

    def _without_end(self, answer: str, form: Form) -> str:
        """An answer without the names of end tokens behind it; `<s>...</s>` is markup and stays."""
        text = answer
        for end in (*self.ends, form.answer_end.strip(), *self.ends):
            if end and "<s>" not in text and text.rstrip().endswith(end):
                text = text.rstrip().removesuffix(end)
        return text


def _ends_line(text: str) -> bool:
    return text.rstrip(" \t").endswith("\n") or not text.strip()


def _holds(text: str, marker: str) -> bool:
    """Whether a marker stands in a text: at the beginning of a line, or anywhere if it is in brackets."""
    if marker not in text:
        return False
    if marker[0] in "<[" or marker.endswith("[/INST]"):
        return True
    return re.search(r"(?:^|\n)[ \t]*" + re.escape(marker), text) is not None
