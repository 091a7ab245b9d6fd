"""Tensors of a model folder in safetensors, read and written a few rows at a time.

safetensors' own save_file takes all tensors of a file at once. Its format is simple (8 bytes with the length
of a JSON header, the header, the data), and all sizes are known beforehand: so a file is made with its header
first and filled in place, and no more than a block of rows is in memory. Its safe_open checks every header
that is read here, and the tests read what is written here with it.
Format: https://huggingface.co/docs/safetensors/index#format
"""

import dataclasses
import errno
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from onecard.errors import CHECKPOINT, UserError, listed
from onecard.hub.model_files import INDEX, MODEL_WEIGHTS, files_of
from onecard.system import safetensors as safetensors_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOCK = 8 << 20  # bytes that are read, changed and written at a time
SHARD = 5 << 30  # bytes of a file, unless one tensor is larger


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: row by row from `offset` (bytes) of a file on."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path = Path()
    offset: int = 0

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Bytes."""
        return self.rows * self.row_bytes

    def blocks(self, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """Its rows in pieces of about BLOCK bytes and a multiple of rows: (first, behind the last)."""
        step = max(1, BLOCK // max(1, self.row_bytes * multiple)) * multiple
        for first in range(0, self.rows, step):
            yield first, min(self.rows, first + step)


class Files:
    """Open files, by their paths: read and written at any place, by any thread."""

    def __init__(self) -> None:
        self.handles: dict[tuple[Path, int], int] = {}
        self.opening = threading.Lock()

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles.values():
            os.close(handle)
        self.handles.clear()

    def read(self, tensor: StoredTensor, first: int, last: int) -> torch.Tensor:
        """Rows first..last of a tensor; raises UserError (exit 4) when the file is too short."""
        shape = (last - first, *tensor.shape[1:]) if tensor.shape else ()
        held = torch.empty(shape, dtype=tensor.dtype)
        self.read_into(tensor, first, held)
        return held

    def read_into(self, tensor: StoredTensor, first: int, rows: torch.Tensor) -> None:
        """Fill contiguous rows of memory with those of a tensor, from row `first` on."""
        view, place = _bytes(rows), tensor.offset + first * tensor.row_bytes
        handle = self._open(tensor.file, os.O_RDONLY)
        while view:
            count = os.preadv(handle, [view], place)
            if not count:
                raise UserError(f"{tensor.file}: ends within {tensor.name}.", "Fetch it again.", CHECKPOINT)
            view, place = view[count:], place + count

    def write(self, tensor: StoredTensor, first: int, rows: torch.Tensor) -> None:
        """Put rows at their place, from row `first` on."""
        assert rows.dtype == tensor.dtype
        assert rows.shape[1:] == tensor.shape[1:]
        view = _bytes(rows.contiguous())
        place = tensor.offset + first * tensor.row_bytes
        handle = self._open(tensor.file, os.O_RDWR)
        while view:
            count = os.pwrite(handle, view, place)
            view, place = view[count:], place + count

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        for (_, how), handle in self.handles.items():
            if how == os.O_RDWR:
                os.fsync(handle)

    def _open(self, path: Path, how: int) -> int:
        with self.opening:
            if (path, how) not in self.handles:
                self.handles[path, how] = os.open(path, how)
            return self.handles[path, how]


class Behind:
    """Work on blocks in threads of its own, a few blocks behind: whoever asks goes on meanwhile."""

    def __init__(self, files: Files, threads: int = 1):
        self.files, self.waiting, self.most = files, deque(), threads + 1
        self.pool, started = ThreadPoolExecutor(threads), threading.Event()
        try:  # all of them now, before a limit forbids that
            for _ in range(threads):
                self.pool.submit(started.wait)
        except RuntimeError as error:
            raise MemoryError(f"{error}: {threads} are needed") from None
        finally:
            started.set()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, *_: Any) -> None:
        self.pool.shutdown(cancel_futures=True)

    def do(self, work: Callable[..., None], *given: Any) -> None:
        """Have it done; what it is given must not change any more. An error comes with a later call."""
        self.waiting.append(self.pool.submit(work, *given))
        while len(self.waiting) > self.most:
            self.waiting.popleft().result()

    def write(self, tensor: StoredTensor, first: int, rows: torch.Tensor) -> None:
        """Like Files.write, in the order of the calls when there is one thread."""
        self.do(self.files.write, tensor, first, rows)

    def sync(self) -> None:
        """Wait until all is done, and on the disk."""
        while self.waiting:
            self.waiting.popleft().result()
        self.files.sync()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def of_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, from its header alone; raises UserError (exit 4)."""
    start, header = safetensors_file.read(path)
    try:
        with safe_open(path, "pt"):  # refuses a header that is not what it should be
            pass
        unknown = sorted({entry["dtype"] for entry in header.values()} - DTYPES.keys())
        if unknown:
            raise UserError(
                f"{path}: holds tensors of type {unknown[0]}.", "These cannot be read here.", CHECKPOINT
            )
        return {
            name: StoredTensor(
                name,
                DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                path,
                start + entry["data_offsets"][0],
            )
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        }
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        raise UserError(
            f"{path}: {error.strerror or 'cannot be read'}.", "Fetch it again.", CHECKPOINT
        ) from None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({str(error)[:200]}).", "Fetch it again.", CHECKPOINT) from None


def of_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model folder, file by file; raises UserError like files_of and of_file."""
    found: dict[str, StoredTensor] = {}
    for path in files_of(folder):
        for name, tensor in of_file(path).items():
            if name in found:
                problem = f"{name} is in {found[name].file.name} and in {path.name}."
                raise UserError(f"{folder}: {problem}", "Fetch it again.", CHECKPOINT)
            found[name] = tensor
    return found


def check_whole(folder: Path, tensors: Mapping[str, StoredTensor], bare: torch.nn.Module) -> None:
    """Raise UserError (exit 4) with the list of weights of the model that its folder lacks.

    tensors: the folder's; bare: the model without weights. Not where there are tensors that the model does
    not know: transformers renames those of some kinds of model.
    """
    names: dict[int, set[str]] = {}  # of one parameter: several when it is tied, with or without the prefix
    for name, parameter in bare.named_parameters(remove_duplicate=False):
        both = {name, name.removeprefix(f"{bare.base_model_prefix}.")}
        names[id(parameter)] = names.get(id(parameter), set()) | both
    missing = sorted(max(each, key=len) for each in names.values() if not each & tensors.keys())
    if missing and set().union(*names.values()) >= tensors.keys():
        problem = f"{folder}: {len(missing)} of its weights are missing: {listed(missing)}."
        raise UserError(problem, "Download or convert it again.", CHECKPOINT)


def divide(tensors: Iterable[StoredTensor], most: int = SHARD) -> list[list[StoredTensor]]:
    """The tensors, in their order, in files of at most `most` bytes."""
    files: list[list[StoredTensor]] = [[]]
    for tensor in tensors:
        if files[-1] and sum(other.size for other in files[-1]) + tensor.size > most:
            files.append([])
        files[-1].append(tensor)
    return files


def names_of(count: int) -> list[str]:
    """Names of that many files of weights, as transformers writes them."""
    if count == 1:
        return [MODEL_WEIGHTS]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def create(folder: Path, files: dict[str, list[StoredTensor]]) -> dict[str, StoredTensor]:
    """Make files with headers and room for these tensors, and an index when it takes one; where each lies."""
    placed: dict[str, StoredTensor] = {}
    for file, tensors in files.items():
        placed |= create_file(folder / file, tensors)
    if list(files) != [MODEL_WEIGHTS]:
        index = {
            "metadata": {"total_size": sum(tensor.size for tensor in placed.values())},
            "weight_map": {name: tensor.file.name for name, tensor in sorted(placed.items())},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return placed


def create_file(path: Path, tensors: Iterable[StoredTensor]) -> dict[str, StoredTensor]:
    """Make a safetensors file with room for these tensors; returns where each lies."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    tensors = list(tensors)
    for tensor in tensors:
        span = [end, end + tensor.size]
        header[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        end = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + end)
    return {
        t.name: dataclasses.replace(t, file=path, offset=start + header[t.name]["data_offsets"][0])
        for t in tensors
    }
