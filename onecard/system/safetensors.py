"""The header of a stranger's safetensors file, looked at before a library reads it.

safetensors checks offsets against shapes and the file's size. It takes headers of 100 MB, though, whose names
cost gigabytes and minutes, a name that is there twice, and empty tensors of any length. This file does
not know what the tensors are for.
Format: 8 bytes with the length of a JSON header, the header, the data.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import SafetensorError

from onecard.errors import CHECKPOINT, UserError

MOST = 16 << 20  # bytes: more than 100,000 tensors; a file of a large model has some hundreds
LONGEST = 1 << 32  # of a dimension of a tensor without elements; those of others end with the file


def read(path: Path) -> tuple[int, dict[str, Any]]:
    """(where the data begins, the tensors' entries by name); raises UserError (exit 4)."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = 8 + int.from_bytes(file.read(8), "little")
            if start > 8 + MOST:
                raise ValueError(f"its header would have {start - 8} bytes; at most {MOST} are read")
            if size < start:
                raise ValueError("it ends within its header")
            header = json.loads(file.read(start - 8), object_pairs_hook=_once)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        header.pop("__metadata__", None)
        for name, entry in header.items():
            _check_entry(name, entry)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if start + end != size:
            raise ValueError(f"its tensors need {start + end} bytes, but it has {size} bytes")
        return start, header
    except OSError as error:
        problem = f"{path}: cannot be read ({error.strerror})."
        raise UserError(problem, "Fetch it again.", CHECKPOINT) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: the file is damaged ({str(error)[:200]}).", "Fetch it again.", CHECKPOINT
        ) from None


def check(paths: Iterable[Path]) -> None:
    """Raise UserError (exit 4) for a file whose header is not safe for a library to read."""
    for path in paths:
        read(path)


def read_tensors(path: Path) -> dict[str, Any]:
    """Tensors of a safetensors file; raises UserError (exit 4) when it cannot be read."""
    from safetensors.torch import load_file  # brings torch

    check([path])
    try:
        return load_file(path)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}).", "Use another checkpoint.", CHECKPOINT) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError for a repeated name, as readers differ in which value they use."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name[:80]!r} is in its header twice")
        values[name] = value
    return values


def _check_entry(name: str, entry: Any) -> None:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    right = isinstance(entry, dict) and isinstance(entry.get("dtype"), str)
    if not right or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name[:80]!r} has no type, shape and offsets")
    if 0 in shape and max(shape) > LONGEST:
        raise ValueError(f"{name[:80]!r} has no elements and a length of {max(shape)}")


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
