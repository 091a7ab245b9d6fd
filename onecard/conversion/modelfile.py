"""A template and GGUF files -> a Modelfile for Ollama: FROM, ADAPTER, TEMPLATE and where an answer stops.

Ollama's templates are Go's (text/template) over .Messages. It has no second text of a turn, so templates with
an {input} are written without it; turns of functions are left out.
"""

import json
from typing import Any

from onecard.data import encode as data_encode
from onecard.data.template import Part, Template

QUOTES = '"""'


def modelfile(template: Template, tokenizer: Any, base: str, adapter: str | None) -> str:
    """The text of a Modelfile beside its files; without TEMPLATE where the template cannot stand in one."""
    lines = [f"FROM ./{base}"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
    text = go_template(template, tokenizer)
    if QUOTES in text or text.endswith('"'):
        lines.append("# The template holds quotes that a Modelfile cannot: write TEMPLATE by hand.")
    else:
        lines.append(f"TEMPLATE {QUOTES}{text}{QUOTES}")
    for token in stops(template, tokenizer):
        lines.append(f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def stops(template: Template, tokenizer: Any) -> list[str]:
    """The tokens that end an answer, as text."""
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in data_encode.eos_ids(template, tokenizer)]


def go_template(template: Template, tokenizer: Any) -> str:
    """The template in Go's language; a conversation without an answer at its end is a prompt."""

    def said(parts: tuple[Part, ...] | None, text: str = "") -> str:
        made = ""
        for what, literal in parts or ():
            value = tokenizer.eos_token if what == "{end}" else literal
            made += text if what == "{text}" else _escaped(value)
        return made

    content = "{{ $m.Content }}"
    opening = said(_without_beginning(template.opening, tokenizer))
    system = said(_without_beginning(template.system, tokenizer), content)
    user = said(_without_beginning(template.user, tokenizer), content)
    between, first = said(template.between), '{{ if eq $before "" }}'
    before_user = f"{first}{opening}{{{{ end }}}}" if opening else ""
    before_user += f'{{{{ if eq $before "assistant" }}}}{between}{{{{ end }}}}' if between else ""
    parts = [f'{{{{ if eq $m.Role "system" }}}}{system}'] if template.system else []
    parts.append(f'{{{{ if eq $m.Role "user" }}}}{before_user}{user}')
    parts.append(f'{{{{ if eq $m.Role "assistant" }}}}{said(template.assistant, content)}')
    turns = "{{ else }}".join(parts) + "{{ end }}" * len(parts)
    return '{{ $before := "" }}{{ range $m := .Messages }}' + turns + "{{ $before = $m.Role }}{{ end }}"


def _escaped(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _without_beginning(parts: tuple[Part, ...] | None, tokenizer: Any) -> tuple[Part, ...] | None:
    """Without the tokenizer's first token, which llama.cpp puts there of its own accord."""
    bos = tokenizer.bos_token
    puts = bos is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return parts[1:] if parts and puts and parts[0] == ("control", bos) else parts
