"""llama.cpp as a library: loaded once, its errors kept; and the tokenizer that a GGUF file carries.

Nothing here knows a context, an adapter or a conversation.
"""

import collections
import contextlib
import functools
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onecard.errors import CHECKPOINT, UserError, first_line
from onecard.inference import gguf_check
from onecard.inference.gguf_check import ERROR_LEVEL
from onecard.system import commands


def tokenizer_of(gguf: Path) -> Any:
    """The transformers tokenizer that a GGUF file carries; raises UserError (exit 4) when there is none."""
    from transformers import AutoTokenizer

    gguf_check.check(gguf, [])
    with tempfile.TemporaryDirectory(prefix="onecard-") as folder:  # files beside it may be another model's
        link = Path(folder) / "model.gguf"
        link.symlink_to(gguf.resolve())
        try:
            return AutoTokenizer.from_pretrained(folder, gguf_file=link.name, trust_remote_code=False)
        except Exception as error:  # a reader's many ways to fail on a damaged file
            problem = f"{gguf}: its tokenizer cannot be read ({first_line(error)})."
            raise UserError(problem, "Use the model's folder instead.", CHECKPOINT) from None


_said: collections.deque[str] = collections.deque(maxlen=20)  # llama.cpp's errors, the newest last
_callbacks: list[Any] = []  # kept: llama.cpp calls it as long as the process lives


@functools.cache
def library() -> Any:
    """The module llama_cpp with its log turned to us; raises UserError when it is not there."""
    try:
        library = importlib.import_module("llama_cpp.llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        problem = f"llama-cpp-python cannot be used here ({error})."
        raise UserError(problem, f"Run: {commands.set_up('cpu')}") from None
    _callbacks.append(library.llama_log_callback(_log))
    library.llama_log_set(_callbacks[-1], None)
    library.llama_backend_init()
    return library


def _log(level: int, text: bytes, _: Any) -> None:
    if level == ERROR_LEVEL and text.strip():
        _said.append(text.decode("utf-8", "replace").strip())


def forget() -> None:
    """Let go of the errors that llama.cpp logged so far."""
    _said.clear()


def said() -> list[str]:
    """The errors that llama.cpp logged since, the newest last."""
    return list(_said)


@contextlib.contextmanager
def complaints() -> Iterator[list[str]]:
    """A list that at the end has the errors llama.cpp logged meanwhile."""
    forget()
    found: list[str] = []
    yield found
    found.extend(said())
