"""llama.cpp as a library that keeps its errors for us, and the tokenizer that a GGUF file carries.

Nothing here knows a context, an adapter or a conversation.
"""

import collections
import contextlib
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onecard.errors import CHECKPOINT, UserError, first_line
from onecard.inference import gguf_check
from onecard.inference.gguf_check import ERROR_LEVEL


def tokenizer_of(gguf: Path) -> Any:
    """The transformers tokenizer that a GGUF file carries; raises UserError (exit 4) if it cannot be read."""
    from transformers import AutoTokenizer

    gguf_check.check(gguf, [])
    with tempfile.TemporaryDirectory(
        prefix="onecard-"
    ) as folder:  # the files beside it may belong to another model
        link = Path(folder) / "model.gguf"
        link.symlink_to(gguf.resolve())
        try:
            return AutoTokenizer.from_pretrained(folder, gguf_file=link.name, trust_remote_code=False)
        except Exception as error:  # the reader fails on damaged files in many ways
            problem = f"{gguf}: its tokenizer cannot be read ({first_line(error)})."
            raise UserError(problem, "Use the model's folder instead.", CHECKPOINT) from None


_errors: collections.deque[str] = collections.deque(maxlen=20)  # that llama.cpp logged, the newest last
_callbacks: list[Any] = []  # llama.cpp calls them as long as the process lives, so they may not be freed


@functools.cache
def library() -> Any:
    """The module llama_cpp, whose log comes to this file; raises UserError when it cannot be imported."""
    library = gguf_check.import_library()
    _callbacks.append(library.llama_log_callback(_log))
    library.llama_log_set(_callbacks[-1], None)
    library.llama_backend_init()
    return library


def _log(level: int, text: bytes, _: Any) -> None:
    if level == ERROR_LEVEL and text.strip():
        _errors.append(text.decode("utf-8", "replace").strip())


def forget_errors() -> None:
    _errors.clear()


def logged_errors() -> list[str]:
    """The errors that llama.cpp logged since forget_errors(), the newest last."""
    return list(_errors)


@contextlib.contextmanager
def collected_errors() -> Iterator[list[str]]:
    """A list that is filled, at the end of the block, with the errors that llama.cpp logged in it."""
    forget_errors()
    errors: list[str] = []
    yield errors
    errors.extend(logged_errors())
