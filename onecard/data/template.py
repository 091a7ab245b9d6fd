"""Prompt templates: the parts in which each turn of a conversation is written.

A template is a file in onecard/data/templates/, a file of the user's, or the tokenizer's own chat template
(`auto`). A file is a JSON object of texts with the placeholders {text}, {input} and {end} (the tokenizer's
end token). Its list `control` names the tokens of the template that must be single tokens of the tokenizer;
everything else is plain text. A new file in the folder is a new template.

Loading a template changes nothing. tokenizer_for gives the tokenizer that texts are encoded with.
"""

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from onecard.data import jinja_sandbox
from onecard.errors import UserError
from onecard.system import commands

Part = tuple[str, str]  # (a placeholder, ""), ("control", a token's name) or ("literal", a text)
FOLDER = Path(__file__).parent / "templates"
AUTO = "auto"  # the tokenizer's own chat template
LARGEST = 1 << 18  # bytes of a template file
PLACEHOLDERS = ("{text}", "{input}", "{end}")
REQUIRED = ("user", "assistant")
OPTIONAL = ("opening", "opening_with_input", "system", "user_with_input", "function", "between")


@dataclasses.dataclass(frozen=True)
class Template:
    """How each turn is written: () writes nothing, None means that the template has no such turn."""

    name: str
    user: tuple[Part, ...]
    assistant: tuple[Part, ...]
    opening: tuple[Part, ...] = ()  # before the first turn of a conversation without a system turn
    opening_with_input: tuple[Part, ...] | None = None  # opening, when the first turn has an input
    system: tuple[Part, ...] | None = None
    user_with_input: tuple[Part, ...] | None = None  # None: the input follows the text on a line of its own
    function: tuple[Part, ...] | None = None  # a function's result, after the answer that called it
    between: tuple[Part, ...] = ()  # after an answer, before the user's next turn

    def texts(self) -> dict[str, Any]:
        """The whole template as JSON values; runs compare and save these."""
        return dataclasses.asdict(self)

    def controls(self) -> set[str]:
        """Names of the control tokens that the template writes, without the tokenizer's end token."""
        values = [value for value in dataclasses.asdict(self).values() if isinstance(value, tuple)]
        return {text for parts in values for what, text in parts if what == "control"}


def names() -> list[str]:
    """Names that --template takes: auto, and one for each file in the folder."""
    return [AUTO, *sorted(path.stem for path in FOLDER.glob("*.json"))]


def check(name: str) -> None:
    """Raise UserError when there is no such template, or when its file is wrong. Needs no tokenizer."""
    if name != AUTO:
        read(_path(name))


def load(name: str, tokenizer: Any) -> Template:
    """The template with this name, in this file, or of this tokenizer (`auto`).

    Raises UserError when it is wrong, or when the tokenizer lacks one of its control tokens.
    """
    if name == AUTO:
        return from_tokenizer(tokenizer)
    return _checked(read(_path(name)), tokenizer, name)


def of(texts: dict[str, Any], tokenizer: Any) -> Template:
    """The template whose texts() were saved as JSON. Raises UserError as load does."""
    try:
        values = {
            key: tuple((str(what), str(text)) for what, text in value) if isinstance(value, list) else value
            for key, value in texts.items()
        }
        template = Template(**values)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The template saved with the adapter is damaged ({error}).", "Take another copy of the adapter."
        ) from None
    return _checked(template, tokenizer, template.name)


def tokenizer_for(tokenizer: Any, *templates: Template) -> Any:
    """The tokenizer that conversations in these templates are encoded and decoded with.

    Every control token of the templates is special in it: a row cannot write such a token, and a decoded
    answer does not show it. This is a copy, or the tokenizer itself where nothing differs, so that templates
    used beside each other do not influence one another.
    """
    controls = {token for template in templates for token in template.controls()}
    ordinary = sorted(controls.difference(tokenizer.all_special_tokens)) if controls else []
    if not ordinary:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ordinary}, replace_extra_special_tokens=False)
    return tokenizer


def _checked(template: Template, tokenizer: Any, name: str) -> Template:
    """The same template; raises UserError when the tokenizer lacks its tokens. name: as the user wrote it."""
    missing = sorted(token for token in template.controls() if token_id(tokenizer, token) is None)
    if missing:
        raise UserError(
            f"Template {name}: the tokenizer has no token {', '.join(missing)}.",
            f"Choose a template without control tokens, or add them with {commands.name('prepare-base')}.",
        )
    return template


def _path(name: str) -> Path:
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        raise UserError(f"There is no template called {name!r}.", f"Choose from: {', '.join(names())}.")
    return path


def read(path: Path) -> Template:
    """The template in a file. Raises UserError (exit 2) that names the file and the key that is wrong."""

    def wrong(problem: str) -> UserError:
        return UserError(f"Template {path}: {problem}.", f"See {FOLDER / 'alpaca.json'} for an example.")

    try:
        if path.stat().st_size > LARGEST:
            raise wrong(f"the file is larger than {LARGEST >> 10} KiB")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise wrong(f"the file cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise wrong("the file does not hold a JSON object")
    control = values.pop("control", [])
    values.pop("description", None)
    if not isinstance(control, list) or not all(isinstance(token, str) and token for token in control):
        raise wrong("'control' must be a list of the names of tokens")
    for key, text in values.items():
        if key not in (*REQUIRED, *OPTIONAL):
            raise wrong(f"{key!r} is not known; the keys are {', '.join((*REQUIRED, *OPTIONAL))}")
        if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
            raise wrong(f"{key!r} must be a text")
    for key in (*REQUIRED, "system", "function", "user_with_input"):
        if values.get(key, "" if key in REQUIRED else "{text}").count("{text}") != 1:
            raise wrong(f"{key!r} must hold {{text}} once")
    if values.get("user_with_input", "{input}").count("{input}") != 1:
        raise wrong("'user_with_input' must hold {input} once")
    if not values["assistant"].endswith("{end}"):
        raise wrong("'assistant' must end with {end}, or the model never learns to stop")
    allowed = {"user_with_input": {"{text}", "{input}"}, "assistant": {"{text}", "{end}"}}
    for key, text in values.items():
        own = {"{text}"} if key in ("user", "system", "function") else set()
        permitted = allowed.get(key, own) | {"{end}"}
        extra = {placeholder for placeholder in PLACEHOLDERS if placeholder in text} - permitted
        if extra:
            raise wrong(f"{key!r} cannot hold {', '.join(sorted(extra))}")
    return Template(path.stem, **{key: parts(text, control) for key, text in values.items()})


def parts(text: str, control: list[str]) -> tuple[Part, ...]:
    """A template's text, cut at its placeholders and at the control tokens of these names."""
    text_parts = []
    longest_first = sorted({*control, *PLACEHOLDERS}, key=len, reverse=True)
    for piece in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text):
        if piece in PLACEHOLDERS:
            text_parts.append((piece, ""))
        elif piece:
            text_parts.append(("control" if piece in control else "literal", piece))
    return tuple(text_parts)


def from_tokenizer(tokenizer: Any) -> Template:
    """The tokenizer's own chat template as a Template. Raises UserError where it cannot be written as one.

    The chat template renders conversations whose texts are marks; what stands between them are the parts.
    Further conversations show that it writes every turn in the same way, so that training and chat agree.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "Template auto: the tokenizer has no chat template.", f"Choose from: {', '.join(names()[1:])}."
        )
    try:
        return _inferred(tokenizer)
    except _UnfitError as error:
        raise UserError(
            f"Template auto: the tokenizer's chat template cannot be used: {error}.",
            f"Choose from: {', '.join(names()[1:])}.",
        ) from None


class _UnfitError(Exception):
    """Why a chat template cannot be written as a Template."""


TURNS = ("user", "assistant", "user", "assistant")
PROBES = (  # conversations to render: their roles, and whether the text ends where an answer begins
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
    conversations = [
        ([{"role": role, "content": mark} for role, mark in zip(roles, names, strict=True)], is_prompt)
        for (roles, is_prompt), names in zip(PROBES, marks, strict=True)
    ]
    try:
        texts = jinja_sandbox.render(tokenizer, conversations)
    except UserError as error:
        raise _UnfitError(error.problem.partition(": ")[2].rstrip(".")) from None
    rendered = dict(zip(PROBES, zip(texts, marks, strict=True), strict=True))

    def around_turns(*roles: str, is_prompt: bool = False) -> list[str]:
        """The texts before, between and behind the turns of a probe."""
        text, names = rendered[roles, is_prompt]
        if text is None:
            raise _UnfitError(f"it refuses a conversation of {', '.join(roles)}, or writes too much")
        pieces = re.split("|".join(names), text)
        if len(pieces) != len(names) + 1:
            raise _UnfitError(f"it does not write every turn of {', '.join(roles)} once")
        return pieces

    opening, before_answer, after_answer, before_second, last = around_turns(*TURNS)
    control = sorted({*tokenizer.all_special_tokens, *_added(tokenizer)}, key=len, reverse=True)
    first_control = re.search("|".join(map(re.escape, control)), after_answer) if control else None
    if not first_control:
        raise _UnfitError("no control token ends an answer")
    end, between = after_answer[: first_control.end()], after_answer[first_control.end() :]
    if before_second != before_answer or not last.startswith(end):
        raise _UnfitError("it writes the last turn in another way than the turns before it")
    before_system = after_system = None
    try:
        before_system, after_system, *_ = around_turns("system", *TURNS)
    except _UnfitError:
        before_system = None
    try:  # a function's result follows the assistant's call
        _, _, before_result, after_result, _ = around_turns("user", "assistant", "tool", "assistant")
        if not before_result.startswith(end):
            raise _UnfitError("an answer that calls a function ends in another way")
        function = parts(before_result.removeprefix(end) + "{text}" + after_result, control)
    except _UnfitError:
        function = None
    template = Template(
        AUTO,
        user=parts("{text}" + before_answer, control),
        assistant=parts("{text}" + end, control),
        opening=parts(opening, control),
        system=None if before_system is None else parts(before_system + "{text}" + after_system, control),
        function=function,
        between=parts(between, control),
    )
    expected = {
        ("user",): [opening, before_answer],
        ("user", "assistant", "user"): [opening, before_answer, after_answer, before_answer],
        (*TURNS, "user"): [opening, *[before_answer, after_answer] * 2, before_answer],
    }
    if before_system is not None:
        expected[("system", "user")] = [before_system, after_system, before_answer]
    for roles, texts in expected.items():
        if around_turns(*roles, is_prompt=True) != texts:
            raise _UnfitError("the prompt for an answer is not how the conversation with the answer begins")
    return template


def _added(tokenizer: Any) -> list[str]:
    """Names of added tokens that are special or look special; the others are pieces of words."""
    added = tokenizer.added_tokens_decoder.values()
    return [str(token) for token in added if token.special or re.fullmatch(r"<.+>|\[.+\]", str(token))]


def token_id(tokenizer: Any, token: str) -> int | None:
    """The id of the token with this name; None when the tokenizer has no such token."""
    number = tokenizer.convert_tokens_to_ids(token)
    is_unknown = number == tokenizer.unk_token_id and token != tokenizer.unk_token
    return None if number is None or is_unknown else number
