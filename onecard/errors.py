"""What a user sees when something is wrong: one message and an exit code, never a traceback.

Every module may import this file; this file imports nothing of OneCard.
"""

import os
import sys
import traceback
from collections.abc import Callable

OK = 0
USAGE = 2  # an option, a template, module names, an output folder that holds another run
DATA = 3  # rows that cannot be read or used
CHECKPOINT = 4  # an adapter or checkpoint that is bad or does not belong here
NON_FINITE = 5  # the loss or the gradient is not a number
MEMORY = 6
DISK = 7
SIGINT = 130


class UserError(Exception):
    """A problem the user can solve: what is wrong and where, what to do about it, and the exit code."""

    def __init__(self, problem: str, fix: str = "", code: int = USAGE):
        super().__init__(problem)
        self.problem, self.fix, self.code = problem, fix, code

    def __str__(self) -> str:
        return f"{self.problem} {self.fix}".strip()


def run_program(main: Callable[[], int | None]) -> None:
    """Run a root program's `main` and end the process with its exit code.

    A UserError becomes one message on stderr; ONECARD_DEBUG=1 adds the traceback.
    """
    try:
        code = main() or OK
    except UserError as error:
        code = error.code
        _say(error, f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        code = MEMORY
        _say(error, "error: out of memory. Try a smaller --micro_batch_tokens, --cutoff_len or --bits.")
    except KeyboardInterrupt as error:
        code = SIGINT
        _say(error, "stopped by Ctrl-C.")
    except OSError as error:
        code = DISK
        _say(
            error,
            f"error: {error.strerror or error}: {error.filename or 'no file named'}. Check disk and rights.",
        )
    sys.stdout.flush()
    sys.exit(code)


def _is_out_of_memory(error: Exception) -> bool:
    """MemoryError, or how torch words it for cards and for its CPU allocator (a RuntimeError)."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words


def _say(error: BaseException, message: str) -> None:
    if os.environ.get("ONECARD_DEBUG"):
        traceback.print_exception(error)
    print(f"\n{message}" if sys.stderr.isatty() else message, file=sys.stderr, flush=True)
