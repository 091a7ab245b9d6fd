"""Conversation in, text out. The same `prompt.encode` as in training, whichever engine answers."""

from typing import Any

from onecard import engine_hf, prompt
from onecard.prompt import Conversation, Template


def reply(
    model: Any, tokenizer: Any, template: Template, conversations: list[Conversation], max_new_tokens: int
) -> list[str]:
    """One greedy answer for each conversation; an answer it may end with is not looked at."""
    prompts = [prompt.encode(c.question, template, tokenizer)[0] for c in conversations]
    answers = engine_hf.greedy(model, prompts, max_new_tokens, prompt.ends(template, tokenizer))
    return [prompt.decode(tokenizer, ids) for ids in answers]
