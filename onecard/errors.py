"""What a user sees when something is wrong: one message and an exit code, never a traceback.

Every module may import this file; this file imports nothing of OneCard.

Who says what the user can do? A function that several programs call does not know their options. Its
UserError states the problem, and a remedy only if that helps whoever called ("Fetch it again."). The caller
that knows the options adds the rest, with `remedy` around the call or as an argument:

    with errors.remedy("Use --device cpu."):
        device = hardware.choose_device(options.device)

tests/test_remedies.py finds every option that a message names and its program lacks.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

OK = 0
USAGE = 2  # an option, a template, module names, an output folder that holds another run
DATA = 3  # rows and texts that cannot be read or used
CHECKPOINT = 4  # a model, adapter or checkpoint that is damaged, incomplete or does not belong here
NON_FINITE = 5  # the loss or the gradient is not a number
MEMORY = 6
DISK = 7
UNSAFE = 8  # a file that could run code


OUT_OF_MEMORY = (  # in lower case
    "out of memory",  # torch.OutOfMemoryError, CUDA, bitsandbytes
    "can't allocate memory",  # torch's CPU allocator
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cublas_status_not_initialized",  # what cuBLAS says when a full GPU has no room for its workspace
    "cudaerrormemoryallocation",
    "std::bad_alloc",
)
ENDS = (".", "!", "?", ":", ";", ",", "。")  # of a sentence or a part of one


class UserError(Exception):
    """A problem the user can solve: what is wrong and where, what to do about it, and the exit code."""

    def __init__(self, problem: str, fix: str = "", code: int = USAGE):
        super().__init__(problem)
        self.problem, self.fix, self.code = problem, fix, code

    def __str__(self) -> str:
        # a problem that ends with another program's words often has no full stop
        ended = not (self.problem and self.fix) or self.problem.endswith(ENDS)
        return f"{self.problem}{'' if ended else '.'} {self.fix}".strip()


@contextlib.contextmanager
def remedy(fix: str, beside: bool = False) -> Iterator[None]:
    """What the user can do about a UserError that is raised within this block and says nothing of that.

    The innermost block counts, as it knows most. beside: where the error has a remedy of its own, this one
    follows it as another way. Keep the block to the one call that the remedy fits.
    """
    try:
        yield
    except UserError as error:
        if not error.fix:
            error.fix = fix
        elif beside and error.fix.endswith(ENDS):
            error.fix += f" Or {fix[0].lower()}{fix[1:]}"
        elif beside:  # a command to type, whose end has to be seen
            error.fix += f" (or {fix[0].lower()}{fix[1:].rstrip('.')})"
        raise


class Stopped(BaseException):
    """SIGTERM or Ctrl-C arrived; like KeyboardInterrupt, no `except Exception` swallows it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def run_program(main: Callable[[], int | None], smaller: str = "") -> None:
    """Run a root program's `main` and end the process with its exit code.

    A UserError becomes one message on stderr; ONECARD_DEBUG=1 adds the traceback. smaller: the program's
    options with which it needs less memory when they are smaller.
    """
    try:
        code = main() or OK
    except UserError as error:
        code = error.code
        _say(error, f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code = MEMORY
        fix = f"Try a smaller {smaller}." if smaller else "End other programs to free memory."
        _say(error, f"error: out of memory. {fix}")
    except (KeyboardInterrupt, Stopped) as error:
        number = getattr(error, "number", signal.SIGINT)
        code = 128 + number
        _say(error, f"stopped by {'Ctrl-C' if number == signal.SIGINT else error}.")
    except OSError as error:
        code = DISK
        named = error.filename2 or error.filename or "no file named"  # of a copy, the one that is written
        problem = f"{error.strerror or error}: {named}."
        _say(error, f"error: {problem} Check the disk and your permissions.")
    sys.stdout.flush()
    sys.exit(code)


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names for a message: the first of them, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of an error's text, at most so many characters; without a text the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def last_line(output: str, silent: str, most: int = 300) -> str:
    """The last line that a child process wrote, at most so many characters; `silent` where it wrote none."""
    return (output.strip().splitlines() or [silent])[-1][:most]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is a MemoryError, or one of the RuntimeErrors in which torch, CUDA and others report it."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in words for phrase in OUT_OF_MEMORY)
    )


def _say(error: BaseException, message: str) -> None:
    if os.environ.get("ONECARD_DEBUG"):
        traceback.print_exception(error)
    print(f"\n{message}" if sys.stderr.isatty() else message, file=sys.stderr, flush=True)
