"""A GGUF file is tried out in a child process before llama.cpp opens it in this one.

With some damaged or hostile files llama.cpp ends its process, or reads memory that it must not read. So a
child with limits first does what the engine will do: load the file, make a context, read one token. A file
that passed is remembered by its size, times and inode. This file also knows which llama-cpp-python is
installed, and turns the errors of llama.cpp into messages.
The child: `python -m onecard.inference.gguf_check BASE [ADAPTER ...]`.
"""

import ctypes
import hashlib
import importlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from onecard.errors import CHECKPOINT, MEMORY, USAGE, UserError, first_line
from onecard.system import commands, hashing, sandbox
from onecard.system import files as system_files

PACKAGE = "llama-cpp-python"

WAY = "1"  # is increased when files that passed should be tried again
SECONDS, SPEED = 120, 50 << 20  # time limit of the child: SECONDS, and a second more for SPEED bytes
ROOM = (
    4 << 30
)  # bytes of memory beside twice the size of the files, which llama.cpp may copy for a CPU's layout
CONTEXT = 64  # tokens
NO_BACKTRACE = {"GGML_NO_BACKTRACE": "1"}  # otherwise llama.cpp starts a debugger when it aborts
ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR
AGAIN = "Convert or download it again."
ANOTHER = "Give the --model_path it was made with."
_callbacks: list[Any] = []  # llama.cpp calls them as long as the child lives, so they may not be freed
ALLOCATION = ("alloc", "out of memory", "insufficient memory")  # words of llama.cpp's errors, in lower case


def version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{PACKAGE} is not installed.", f"Run: {commands.set_up('cpu')}") from None


def import_library() -> Any:
    """The module llama_cpp.llama_cpp; raises UserError when it cannot be imported."""
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        problem = f"llama-cpp-python cannot be loaded ({first_line(error)})."
        raise UserError(problem, f"Run: {commands.set_up('cpu')}") from None


def check(base: Path, adapters: list[Path]) -> None:
    """Raise UserError unless llama.cpp can use these files: exit 4, or 6 where memory does not suffice."""
    for path in (base, *adapters):
        _check_magic(path)
    new = [path for path in adapters if not _has_passed([base, path])]
    if not new and _has_passed([base]):
        return
    _try(base, new)
    for files in ([base], *([base, path] for path in new)):
        _remember(files)


def _try(base: Path, adapters: list[Path]) -> None:
    files = [str(path.resolve()) for path in (base, *adapters)]
    seconds = SECONDS + sum(Path(file).stat().st_size for file in files) / SPEED
    try:
        ended = sandbox.run(__name__, *files, seconds=seconds, **NO_BACKTRACE)
    except subprocess.TimeoutExpired:
        problem = f"{base}: llama.cpp did not finish reading it within {seconds:.0f} s."
        raise UserError(problem, AGAIN, CHECKPOINT) from None
    lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()] or ["it crashed"]
    if ended.returncode == USAGE:
        raise UserError(lines[-1], f"Run: {commands.set_up('cpu')}")
    if ended.returncode < 0:
        number = _number((ended.stdout.split() or ["0"])[-1], files)  # of the file that was opened last
        reason = lines[-1].split(": ")[-1][:300]
        raise UserError(f"{(base, *adapters)[number]}: llama.cpp ended with: {reason}.", AGAIN, CHECKPOINT)
    if ended.returncode:
        first, _, rest = lines[-1].partition(" ")
        number, problem = _number(first, files), rest if first.isdecimal() and rest else lines[-1]
        raise unusable((base, *adapters)[number], problem, ANOTHER if number else AGAIN)


def _number(word: str, files: list[str]) -> int:
    """The number of the file that a child names; 0 (the base) for other words that llama.cpp writes."""
    numbers = [str(number) for number in range(len(files))]
    return numbers.index(word) if word in numbers else 0


def unusable(path: Path, problem: str, fix: str, code: int = CHECKPOINT) -> UserError:
    """The error for a file that llama.cpp refuses, for the reason in the problem.

    If memory ran out, it has no remedy: the caller knows which option needs less.
    """
    if is_allocation(problem):
        problem, fix, code = f"{problem}. It needs more memory than is free", "", MEMORY
    return UserError(f"{path}: {problem}.", fix, code)


def is_allocation(text: str) -> bool:
    return any(word in text.lower() for word in ALLOCATION)


def because(problem: str, errors: list[str]) -> str:
    """The problem with the first error that llama.cpp logged; later ones only report the first."""
    reason = errors[0].split(": ", 1)[-1].strip(" .")[:300] if errors else ""
    return f"{problem}: {reason}" if reason else problem


def _check_magic(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.", "Name a .gguf file.", CHECKPOINT) from None
    if magic != b"GGUF":
        raise UserError(f"{path}: this is not a GGUF file.", "Name a .gguf file.", CHECKPOINT)


def _mark(files: list[Path]) -> tuple[Path, str]:
    """The file that remembers that these files passed together, and its content."""
    names = "\n".join(str(path.resolve()) for path in files)
    place = system_files.cache_folder() / "gguf-passed" / hashlib.sha256(names.encode()).hexdigest()[:32]
    return place, f"{WAY} {version()} {[hashing.stamp(path) for path in files]}"


def _has_passed(files: list[Path]) -> bool:
    place, expected = _mark(files)
    return place.is_file() and place.read_text(encoding="utf-8") == expected


def _remember(files: list[Path]) -> None:
    place, content = _mark(files)
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(place)


def trial(files: list[str]) -> str:
    """In the child: what is wrong with a base and its adapters, as "NUMBER problem", or "". It may crash."""
    library = import_library()
    errors: list[str] = []

    def log(level: int, text: bytes, _: Any) -> None:
        if level == ERROR_LEVEL and text.strip():
            errors.append(text.decode("utf-8", "replace").strip())

    _callbacks.append(library.llama_log_callback(log))
    library.llama_log_set(_callbacks[-1], None)
    model = library.llama_model_load_from_file(os.fsencode(files[0]), library.llama_model_default_params())
    if not model:
        return "0 " + because("llama.cpp cannot load it", errors)
    entries = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    longest = library.llama_model_n_ctx_train(model)
    if entries < 1 or longest < 1:
        return "0 the model has no vocabulary or no context"
    settings = library.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = min(CONTEXT, longest)
    settings.n_threads = settings.n_threads_batch = 1
    errors.clear()
    state = library.llama_init_from_model(model, settings)
    if not state:
        return "0 " + because("llama.cpp cannot make a context for it", errors)
    problem = _read_one(library, state)
    for number, file in enumerate(files[1:], start=1):
        if problem:
            break
        print(number, flush=True)  # tells which file it was if llama.cpp crashes
        errors.clear()
        adapter = library.llama_adapter_lora_init(model, os.fsencode(file))
        if not adapter:
            return f"{number} " + because("the adapter does not fit this base model", errors)
        library.llama_set_adapters_lora(
            state, (library.llama_adapter_lora_p_ctypes * 1)(adapter), 1, (ctypes.c_float * 1)(1.0)
        )
        problem = _read_one(library, state) and f"{number} " + because("llama.cpp cannot use it", errors)
    library.llama_free(state)
    library.llama_model_free(model)
    return problem


def _read_one(library: Any, state: Any) -> str:
    batch = library.llama_batch_get_one((library.llama_token * 1)(0), 1)
    code = library.llama_decode(state, batch)
    if code or not library.llama_get_logits_ith(state, -1):
        return f"0 llama.cpp gives no scores for the next token (code {code})"
    return ""


def _child(files: list[str]) -> int:
    import resource

    size = sum(Path(file).stat().st_size for file in files)
    sandbox.limit(resource.RLIMIT_DATA, ROOM + 2 * size)
    sandbox.limit(resource.RLIMIT_CORE, 0)
    try:
        problem = trial(files)
    except UserError as error:  # no llama.cpp
        print(error.problem, file=sys.stderr)
        return USAGE
    if problem:
        print(problem, file=sys.stderr)
    return CHECKPOINT if problem else 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1:]))
