"""Conversation -> token ids, and which of them are targets. The only place that knows a template.

Training and chat call the same `encode`. Prompt and response are encoded apart, so the ids of a prompt in
chat are always the first ids of the row that was trained. Control tokens written inside a row are text.
"""

import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from onecard.errors import UserError

FOLDER = Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """One instruction with an optional input; `output` is None while the answer is still to be made."""

    instruction: str
    input: str = ""
    output: str | None = None


@dataclasses.dataclass(frozen=True)
class Template:
    """Prompt texts with the places {instruction} and {input}."""

    name: str
    prompt: str
    prompt_with_input: str

    def fill(self, conversation: Conversation) -> str:
        text = self.prompt_with_input if conversation.input else self.prompt
        values = {"{instruction}": conversation.instruction, "{input}": conversation.input}
        # in one pass, so that braces inside a row stay as they are
        return re.sub(r"\{instruction\}|\{input\}", lambda place: values[place.group()], text)


def template_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_template(name: str) -> Template:
    """Read templates/NAME.json; raises UserError with the names there are."""
    if name not in template_names():
        raise UserError(
            f"--template {name}: no such template.", f"Choose from: {', '.join(template_names())}."
        )
    values = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return Template(name, values["prompt"], values["prompt_with_input"])


def encode(
    conversation: Conversation, template: Template, tokenizer: Any, train_on_inputs: bool = False
) -> tuple[list[int], list[bool]]:
    """Token ids and is_target flags, both of length T, uncut.

    With an output: prompt + response + end token, the last two being targets (with train_on_inputs all but
    the beginning-of-text token). Without: the prompt alone.
    """
    start = _beginning(tokenizer)
    prompt = _encode_text(tokenizer, template.fill(conversation))
    response = []
    if conversation.output is not None:
        response = [*_encode_text(tokenizer, conversation.output), tokenizer.eos_token_id]
    ids = start + prompt + response
    is_target = [False] * len(start) + [train_on_inputs] * len(prompt) + [True] * len(response)
    if is_target and not start:
        is_target[0] = False  # nothing comes before the first token, so nothing can predict it
    return ids, is_target


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Generated ids -> text; the end token is not shown."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def show(
    tokenizer: Any, ids: list[int], is_target: list[bool], opening: str = "«", closing: str = "»"
) -> str:
    """A row as text, runs of target tokens between the two marks, control tokens visible."""
    text, position = "", 0
    while position < len(ids):
        end = position
        while end < len(ids) and is_target[end] == is_target[position]:
            end += 1
        piece = tokenizer.decode(
            ids[position:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        text += f"{opening}{piece}{closing}" if is_target[position] else piece
        position = end
    return text


def _encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text in which no control token can appear, whatever the text says."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    if control.isdisjoint(ids):
        return ids
    # some Unigram vocabularies hold control tokens as ordinary pieces: cut the text inside each of them
    names = "|".join(re.escape(name) for name in sorted(tokenizer.all_special_tokens, key=len, reverse=True))
    cuts = [0, *(found.start() + 1 for found in re.finditer(names, text)), len(text)]
    parts = [text[start:end] for start, end in pairwise(cuts)]
    pieces = [
        tokenizer(part, add_special_tokens=False, split_special_tokens=True).input_ids for part in parts
    ]
    return [token for piece in pieces for token in piece]


def _beginning(tokenizer: Any) -> list[int]:
    """[bos] for tokenizers that put it before every text of their own accord, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []
