"""Converts a pickled list of rows (CuteGPT's format) to a JSONL file in the cache, once.

A pickle is a program. A child process with limits runs it, in an unpickler that knows no class and no
function: it gives lists, dictionaries, texts and numbers, and refuses everything else.
"""

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

from onecard.errors import DATA, DISK, UNSAFE
from onecard.system import files as system_files
from onecard.system import hashing, sandbox

SECONDS, MEMORY = 300, 4 << 30  # limits of the child: seconds, bytes


def convert_to_jsonl(path: Path) -> Path:
    """The JSONL file with a pickle's rows; its name in the cache is the hash of the pickle.

    Raises UserError: exit 8 when the pickle is not plain, exit 3 when it is damaged or too large.
    """
    target = system_files.cache_folder() / "pickles" / f"{hashing.of_file(path)}.jsonl"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    print(f"Converting {path} to JSONL; this happens once ...", flush=True)
    try:
        sandbox.convert(__name__, path, temporary, SECONDS, damaged=DATA, late=DATA)
        system_files.put_file(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


class _Plain(pickle.Unpickler):
    """Refuses every look-up of a name: lists, dictionaries, texts and numbers need none."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, name: Any) -> Any:
        raise pickle.UnpicklingError("it asks for something outside of the file")


def _child(source: str, output: str) -> int:
    import resource

    sandbox.limit(resource.RLIMIT_AS, MEMORY)
    sandbox.limit(resource.RLIMIT_CPU, SECONDS)
    sandbox.limit(resource.RLIMIT_NPROC, 0)
    try:
        with open(source, "rb") as file:
            rows = _Plain(file).load()
        if not isinstance(rows, list | tuple):
            raise ValueError("it holds no list of rows")
        with open(output, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"row": row}, ensure_ascii=True, allow_nan=False) + "\n")
    except pickle.UnpicklingError as error:
        print(str(error)[:300], file=sys.stderr)
        return UNSAFE if "it asks for" in str(error) else DATA
    except MemoryError:
        print("it needs too much memory", file=sys.stderr)
        return DATA
    except OSError as error:
        print(error.strerror or error, file=sys.stderr)
        return DISK if error.errno in system_files.REFUSED else DATA
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " ")[:300], file=sys.stderr)
        return DATA
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1], sys.argv[2]))
