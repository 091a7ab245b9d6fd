"""Renders a stranger's chat template in a child process with limits on time and memory.

A chat template is a program. transformers runs it in a sandbox without files and calls, but its loops and
texts may be endless.
"""

import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from onecard.errors import DATA, UserError
from onecard.system import sandbox

SECONDS, MEMORY = 20, 2 << 30  # limits of the child: seconds, bytes
LARGEST = 100_000  # characters of one rendered conversation


def render(tokenizer: Any, conversations: list[tuple[list[dict[str, str]], bool]]) -> list[str | None]:
    """The text of each conversation, or None where the template refuses it or writes too much.

    A conversation is its messages, and whether its text ends where an answer begins. Raises UserError when
    the template takes too long or too much memory.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # the tokenizer has several templates, and none is its default
        raise UserError(f"chat template: {error}.") from None
    job = {
        "template": template,
        "tokens": tokenizer.special_tokens_map,
        "conversations": conversations,
    }
    return _render(json.dumps(job, default=str))


@functools.lru_cache(maxsize=16)
def _render(job: str) -> list[str | None]:
    with tempfile.TemporaryDirectory(prefix="onecard-template-") as folder:
        source, output = Path(folder) / "job.json", Path(folder) / "texts.json"
        source.write_text(job, encoding="utf-8")
        sandbox.convert(__name__, source, output, SECONDS, damaged=DATA, late=DATA)
        return json.loads(output.read_text(encoding="utf-8"))


def _child(source: str, output: str) -> int:
    import resource

    from transformers.utils.chat_template_utils import render_jinja_template

    sandbox.limit(resource.RLIMIT_AS, MEMORY)
    sandbox.limit(resource.RLIMIT_CPU, SECONDS)
    job = json.loads(Path(source).read_text(encoding="utf-8"))
    texts = []
    for messages, is_prompt in job["conversations"]:
        try:
            (text,), _ = render_jinja_template(
                conversations=[messages],
                chat_template=job["template"],
                add_generation_prompt=is_prompt,
                **job["tokens"],
            )
            texts.append(text if len(text) <= LARGEST else None)
        except MemoryError:
            print("it needs too much memory", file=sys.stderr)
            return DATA
        except Exception:  # a stranger's template may raise anything: it refuses this conversation
            texts.append(None)
    Path(output).write_text(json.dumps(texts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1], sys.argv[2]))
