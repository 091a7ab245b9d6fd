"""A stranger's chat template -> what it writes, in a child process with limits on time and memory.

A chat template is a program. transformers runs it in a sandbox without files and calls, but loops and texts
in it may be endless.
"""

import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from onecard.errors import DATA, UserError
from onecard.system import sandbox

SECONDS, MEMORY = 20, 2 << 30  # of the child
LARGEST = 100_000  # characters of one conversation


def render(tokenizer: Any, conversations: list[tuple[list[dict[str, str]], bool]]) -> list[str | None]:
    """The text of each conversation (messages, whether an answer is to follow); None where it refuses.

    Raises UserError when the template takes too long or too much memory.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several, none of them the usual one
        raise UserError(f"chat template: {error}.") from None
    asked = {
        "template": template,
        "tokens": tokenizer.special_tokens_map,
        "conversations": conversations,
    }
    return _written(json.dumps(asked, default=str))


@functools.lru_cache(maxsize=16)
def _written(asked: str) -> list[str | None]:
    with tempfile.TemporaryDirectory(prefix="onecard-template-") as folder:
        source, output = Path(folder) / "asked.json", Path(folder) / "written.json"
        source.write_text(asked, encoding="utf-8")
        sandbox.convert(__name__, source, output, SECONDS, damaged=DATA, late=DATA)
        return json.loads(output.read_text(encoding="utf-8"))


def _child(source: str, output: str) -> int:
    import resource

    from transformers.utils.chat_template_utils import render_jinja_template

    sandbox.limit(resource.RLIMIT_AS, MEMORY)
    sandbox.limit(resource.RLIMIT_CPU, SECONDS)
    asked = json.loads(Path(source).read_text(encoding="utf-8"))
    written = []
    for messages, asking in asked["conversations"]:
        try:
            (text,), _ = render_jinja_template(
                conversations=[messages],
                chat_template=asked["template"],
                add_generation_prompt=asking,
                **asked["tokens"],
            )
            written.append(text if len(text) <= LARGEST else None)
        except MemoryError:
            print("it needs too much memory", file=sys.stderr)
            return DATA
        except Exception:  # whatever a template of a stranger raises: it refuses this conversation
            written.append(None)
    Path(output).write_text(json.dumps(written), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1], sys.argv[2]))
