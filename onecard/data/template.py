"""Prompt templates: a data file, or the tokenizer's own chat template -> the parts that turns are written in.

A file in onecard/data/templates/ is a JSON object of texts with the places {text}, {input} and {end} (the
tokenizer's end token). `control` names tokens of the template that must be single tokens of the tokenizer.
Everything else in a template is plain text. Adding a file adds a template.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onecard.data import jinja_sandbox
from onecard.errors import UserError
from onecard.system import commands

Part = tuple[str, str]  # (what, text): a place of PLACES, "control" with its token, "literal" with its text
FOLDER = Path(__file__).parent / "templates"
AUTO = "auto"  # the tokenizer's own
LARGEST = 1 << 18  # characters; anything longer is no template
PLACES = ("{text}", "{input}", "{end}")
REQUIRED = ("user", "assistant")
OPTIONAL = ("opening", "opening_with_input", "system", "user_with_input", "function", "between")


@dataclasses.dataclass(frozen=True)
class Template:
    """How each turn is written; () where nothing is, None where the template has no such turn."""

    name: str
    user: tuple[Part, ...]
    assistant: tuple[Part, ...]
    opening: tuple[Part, ...] = ()  # before the first turn of a conversation without a system turn
    opening_with_input: tuple[Part, ...] | None = None  # the same when its first turn has an input
    system: tuple[Part, ...] | None = None
    user_with_input: tuple[Part, ...] | None = None  # None: the input follows the text on a line of its own
    function: tuple[Part, ...] | None = None  # what a function gave back, after the answer that called it
    between: tuple[Part, ...] = ()  # after an answer, before the user's next turn

    def texts(self) -> dict[str, Any]:
        """All of it as JSON values: what two runs compare."""
        return dataclasses.asdict(self)

    def controls(self) -> set[str]:
        values = [value for value in dataclasses.asdict(self).values() if isinstance(value, tuple)]
        return {text for parts in values for what, text in parts if what == "control"}


def names() -> list[str]:
    return [AUTO, *sorted(path.stem for path in FOLDER.glob("*.json"))]


def check(name: str) -> None:
    """Raise UserError when there is no such template, or its file is wrong; the tokenizer is not needed."""
    if name != AUTO:
        read(_path(name))


def load(name: str, tokenizer: Any) -> Template:
    """A template by its name, its file, or `auto`; raises UserError naming what is wrong with it."""
    if name == AUTO:
        return from_tokenizer(tokenizer)
    return _fitted(read(_path(name)), tokenizer, name)


def of(texts: dict[str, Any], tokenizer: Any) -> Template:
    """A template from what Template.texts() gave, by way of JSON; raises UserError."""
    try:
        values = {
            key: tuple((str(what), str(text)) for what, text in value) if isinstance(value, list) else value
            for key, value in texts.items()
        }
        made = Template(**values)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The template saved with the adapter is damaged ({error}).", "Use --template."
        ) from None
    return _fitted(made, tokenizer, made.name)


def _fitted(template: Template, tokenizer: Any, name: str) -> Template:
    """The template, its tokens made control tokens; name: what the user calls it."""
    missing = sorted(token for token in template.controls() if token_id(tokenizer, token) is None)
    if missing:
        raise UserError(
            f"--template {name}: the tokenizer has no token {', '.join(missing)}.",
            f"Choose a template without control tokens, or add them with {commands.name('prepare-base')}.",
        )
    _promote(tokenizer, sorted(template.controls()))
    return template


def _promote(tokenizer: Any, tokens: list[str]) -> None:
    """Make tokens of a template control tokens; ordinary ones could be written by a row."""
    new = [token for token in tokens if token not in tokenizer.all_special_tokens]
    if new:
        extra = {"extra_special_tokens": new}
        tokenizer.add_special_tokens(extra, replace_extra_special_tokens=False)


def _path(name: str) -> Path:
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        raise UserError(f"--template {name}: no such template.", f"Choose from: {', '.join(names())}.")
    return path


def read(path: Path) -> Template:
    """The template of a file; raises UserError (exit 2) with the key that is wrong."""

    def wrong(problem: str) -> UserError:
        return UserError(f"template {path}: {problem}.", f"See {FOLDER / 'alpaca.json'} for an example.")

    try:
        if path.stat().st_size > LARGEST:
            raise wrong("too large for a template")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise wrong(f"cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise wrong("holds no JSON object")
    control = values.pop("control", [])
    values.pop("description", None)
    if not isinstance(control, list) or not all(isinstance(token, str) and token for token in control):
        raise wrong("'control' must be a list of tokens")
    for key, text in values.items():
        if key not in (*REQUIRED, *OPTIONAL):
            raise wrong(f"{key!r} is not known; known: {', '.join((*REQUIRED, *OPTIONAL))}")
        if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
            raise wrong(f"{key!r} must be a text")
    for key in (*REQUIRED, "system", "function", "user_with_input"):
        if values.get(key, "" if key in REQUIRED else "{text}").count("{text}") != 1:
            raise wrong(f"{key!r} must hold the place {{text}} once")
    if values.get("user_with_input", "{input}").count("{input}") != 1:
        raise wrong("'user_with_input' must hold the place {input} once")
    if not values["assistant"].endswith("{end}"):
        raise wrong("'assistant' must end with {end}, or a model never learns to stop")
    allowed = {"user_with_input": {"{text}", "{input}"}, "assistant": {"{text}", "{end}"}}
    for key, text in values.items():
        known = allowed.get(key, {"{text}"} if key in ("user", "system", "function") else set()) | {"{end}"}
        extra = {place for place in PLACES if place in text} - known
        if extra:
            raise wrong(f"{key!r} cannot hold {', '.join(sorted(extra))}")
    return Template(path.stem, **{key: parts(text, control) for key, text in values.items()})


def parts(text: str, control: list[str]) -> tuple[Part, ...]:
    """A template's text cut at its places and control tokens."""
    found = []
    longest_first = sorted({*control, *PLACES}, key=len, reverse=True)
    for piece in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text):
        if piece in PLACES:
            found.append((piece, ""))
        elif piece:
            found.append(("control" if piece in control else "literal", piece))
    return tuple(found)


def from_tokenizer(tokenizer: Any) -> Template:
    """The tokenizer's own chat template as a Template; raises UserError where it cannot be one.

    It is rendered with marks in the places of texts, and what stands between the marks are the parts. That it
    writes other conversations in the same way is then checked, so that training and chat agree.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "--template auto: the tokenizer has no chat template.", f"Choose from: {', '.join(names()[1:])}."
        )
    try:
        template = _inferred(tokenizer)
    except _UnfitError as error:
        raise UserError(
            f"--template auto: the tokenizer's chat template cannot be used: {error}.",
            f"Choose from: {', '.join(names()[1:])}.",
        ) from None
    return template


class _UnfitError(Exception):
    pass


TURNS = ("user", "assistant", "user", "assistant")
PROBES = (  # roles, and whether an answer is to follow
    (TURNS, False),
    (("system", *TURNS), False),
    (("user", "assistant", "tool", "assistant"), False),
    (("user",), True),
    (("user", "assistant", "user"), True),
    ((*TURNS, "user"), True),
    (("system", "user"), True),
)


def _inferred(tokenizer: Any) -> Template:
    marks = [[f"{role}mark{number}" for number, role in enumerate(roles)] for roles, _ in PROBES]
    asked = [
        ([{"role": role, "content": mark} for role, mark in zip(roles, names, strict=True)], asking)
        for (roles, asking), names in zip(PROBES, marks, strict=True)
    ]
    try:
        texts = jinja_sandbox.render(tokenizer, asked)
    except UserError as error:
        raise _UnfitError(error.problem.partition(": ")[2].rstrip(".")) from None
    written = dict(zip(PROBES, zip(texts, marks, strict=True), strict=True))

    def render(*roles: str, asking: bool = False) -> list[str]:
        """The texts before, between and behind the turns' marks."""
        text, names = written[roles, asking]
        if text is None:
            raise _UnfitError(f"it refuses {' '.join(roles)}, or writes too much")
        found = re.split("|".join(names), text)
        if len(found) != len(names) + 1:
            raise _UnfitError(f"it does not write every turn of {' '.join(roles)} once")
        return found

    opening, ask, follow, again, last = render(*TURNS)
    control = sorted({*tokenizer.all_special_tokens, *_added(tokenizer)}, key=len, reverse=True)
    outside = [text for roles, asking in PROBES for text in _or_none(render, roles, asking)]
    _promote(tokenizer, [token for token in control if any(token in text for text in outside)])
    found = re.search("|".join(map(re.escape, control)), follow) if control else None
    if not found:
        raise _UnfitError("no control token ends an answer")
    end, between = follow[: found.end()], follow[found.end() :]
    if again != ask or not last.startswith(end):
        raise _UnfitError("it writes the last turn in another way than those before")
    before = after = None
    try:
        before, after, *_ = render("system", *TURNS)
    except _UnfitError:
        before = None
    try:  # what a function gave back follows the assistant's call
        _, _, called, answered, _ = render("user", "assistant", "tool", "assistant")
        if not called.startswith(end):
            raise _UnfitError("an answer that calls a function ends in another way")
        function = parts(called.removeprefix(end) + "{text}" + answered, control)
    except _UnfitError:
        function = None
    made = Template(
        AUTO,
        user=parts("{text}" + ask, control),
        assistant=parts("{text}" + end, control),
        opening=parts(opening, control),
        system=None if before is None else parts(before + "{text}" + after, control),
        function=function,
        between=parts(between, control),
    )
    expected = {
        ("user",): [opening, ask],
        ("user", "assistant", "user"): [opening, ask, follow, ask],
        (*TURNS, "user"): [opening, ask, follow, ask, follow, ask],
    }
    if before is not None:
        expected[("system", "user")] = [before, after, ask]
    for roles, texts in expected.items():
        if render(*roles, asking=True) != texts:
            raise _UnfitError("a conversation does not begin with the prompt that asked for it")
    return made


def _added(tokenizer: Any) -> list[str]:
    """Added tokens that are special, or look like it; others are pieces of words."""
    added = tokenizer.added_tokens_decoder.values()
    return [str(token) for token in added if token.special or re.fullmatch(r"<.+>|\[.+\]", str(token))]


def _or_none(render: Callable[..., list[str]], roles: tuple[str, ...], asking: bool) -> list[str]:
    try:
        return render(*roles, asking=asking)
    except _UnfitError:
        return []


def token_id(tokenizer: Any, token: str) -> int | None:
    """The id of a token by its name, None when the tokenizer does not have it."""
    found = tokenizer.convert_tokens_to_ids(token)
    return (
        None if found is None or (found == tokenizer.unk_token_id and token != tokenizer.unk_token) else found
    )
