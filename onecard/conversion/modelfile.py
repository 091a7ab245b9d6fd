"""A template and GGUF files -> a Modelfile for Ollama: FROM, ADAPTER, TEMPLATE and PARAMETER stop.

Templates of Ollama are written in the language of Go (text/template), over .Messages. A turn has only one
text there, so the {input} of a template is left out, and so are the turns of functions.
"""

import json
from typing import Any

from onecard.data import encode as data_encode
from onecard.data.template import Part, Template

QUOTES = '"""'


def modelfile(template: Template, tokenizer: Any, base: str, adapter: str | None) -> str:
    """The text of a Modelfile for files in its folder; without TEMPLATE if it cannot hold the template."""
    lines = [f"FROM ./{base}"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
    text = go_template(template, tokenizer)
    if QUOTES in text or text.endswith('"'):
        lines.append("# The template has quotes that a Modelfile cannot hold: write TEMPLATE by hand.")
    else:
        lines.append(f"TEMPLATE {QUOTES}{text}{QUOTES}")
    for token in stops(template, tokenizer):
        lines.append(f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def stops(template: Template, tokenizer: Any) -> list[str]:
    """The tokens that end an answer, as text."""
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in data_encode.eos_ids(template, tokenizer)]


def go_template(template: Template, tokenizer: Any) -> str:
    """The template in the language of Go; a conversation that ends with a question gives a prompt."""

    def rendered(parts: tuple[Part, ...] | None, text: str = "") -> str:
        pieces = ""
        for kind, literal in parts or ():
            value = tokenizer.eos_token if kind == "{end}" else literal
            pieces += text if kind == "{text}" else _escaped(value)
        return pieces

    content = "{{ $m.Content }}"
    opening = rendered(_without_bos(template.opening, tokenizer))
    system = rendered(_without_bos(template.system, tokenizer), content)
    user = rendered(_without_bos(template.user, tokenizer), content)
    between, first = rendered(template.between), '{{ if eq $before "" }}'
    before_user = f"{first}{opening}{{{{ end }}}}" if opening else ""
    before_user += f'{{{{ if eq $before "assistant" }}}}{between}{{{{ end }}}}' if between else ""
    parts = [f'{{{{ if eq $m.Role "system" }}}}{system}'] if template.system else []
    parts.append(f'{{{{ if eq $m.Role "user" }}}}{before_user}{user}')
    parts.append(f'{{{{ if eq $m.Role "assistant" }}}}{rendered(template.assistant, content)}')
    turns = "{{ else }}".join(parts) + "{{ end }}" * len(parts)
    return '{{ $before := "" }}{{ range $m := .Messages }}' + turns + "{{ $before = $m.Role }}{{ end }}"


def _escaped(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _without_bos(parts: tuple[Part, ...] | None, tokenizer: Any) -> tuple[Part, ...] | None:
    """The parts without BOS, where the tokenizer adds it, because llama.cpp then adds it as well."""
    bos = tokenizer.bos_token
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return parts[1:] if parts and adds_bos and parts[0] == ("control", bos) else parts
