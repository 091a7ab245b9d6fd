"""Tensors in the safetensors files of a model folder, read and written a few rows at a time.

The library's own save_file needs all tensors of a file in memory. The format is simple (8 bytes with the
length of a JSON header, the header, the data) and all sizes are known beforehand. So this file writes the
header first and fills in the data afterwards, with no more than a block of rows in memory. The library's
safe_open checks every header that is read here, and the tests read with it what is written here.
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
from onecard.system import safetensors as system_safetensors

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
BLOCK = 8 << 20  # bytes that are read, changed and written at one time
SHARD = 5 << 30  # largest size of a file in bytes, unless a single tensor is larger


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its rows lie one after the other, from byte `offset` on."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path = Path()
    offset: int = 0

    @property
    def rows(self) -> int:
        """The size of the first dimension; a scalar has one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Bytes of the whole tensor."""
        return self.rows * self.row_bytes

    def blocks(self, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """The rows in blocks of about BLOCK bytes: (first, last), where last is exclusive.

        Each block but the last has a multiple of `multiple` rows.
        """
        step = max(1, BLOCK // max(1, self.row_bytes * multiple)) * multiple
        for first in range(0, self.rows, step):
            yield first, min(self.rows, first + step)


class Files:
    """Open files. Any thread may read and write rows of their tensors, in any order."""

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
        """Rows first..last (exclusive) of a tensor; raises UserError (exit 4) when the file is too short."""
        shape = (last - first, *tensor.shape[1:]) if tensor.shape else ()
        rows = torch.empty(shape, dtype=tensor.dtype)
        self.read_into(tensor, first, rows)
        return rows

    def read_into(self, tensor: StoredTensor, first: int, rows: torch.Tensor) -> None:
        """Fill `rows`, which are contiguous in memory, with rows of a tensor, from row `first` on.

        Raises UserError (exit 4) when the file is too short.
        """
        view, position = _bytes(rows), tensor.offset + first * tensor.row_bytes
        handle = self._open(tensor.file, os.O_RDONLY)
        while view:
            count = os.preadv(handle, [view], position)
            if not count:
                problem = f"{tensor.file}: the file ends within the tensor {tensor.name}."
                raise UserError(problem, "Download the file again.", CHECKPOINT)
            view, position = view[count:], position + count

    def write(self, tensor: StoredTensor, first: int, rows: torch.Tensor) -> None:
        """Write rows of a tensor, from row `first` on; they must have its dtype and its other dimensions."""
        assert rows.dtype == tensor.dtype
        assert rows.shape[1:] == tensor.shape[1:]
        view = _bytes(rows.contiguous())
        position = tensor.offset + first * tensor.row_bytes
        handle = self._open(tensor.file, os.O_RDWR)
        while view:
            count = os.pwrite(handle, view, position)
            view, position = view[count:], position + count

    def _open(self, path: Path, how: int) -> int:
        with self.opening:
            if (path, how) not in self.handles:
                self.handles[path, how] = os.open(path, how)
            return self.handles[path, how]


class Behind:
    """Threads that process blocks in the background, at most a few blocks behind their caller.

    An error in a thread is raised by a later call. Raises MemoryError when the threads cannot be started.
    """

    def __init__(self, files: Files, threads: int = 1):
        self.files, self.waiting, self.most = files, deque(), threads + 1
        self.pool, started = ThreadPoolExecutor(threads), threading.Event()
        try:  # start all threads now, because a limit on the process may forbid it later
            for _ in range(threads):
                self.pool.submit(started.wait)
        except RuntimeError as error:
            raise MemoryError(f"{error}: {threads} threads are needed") from None
        finally:
            started.set()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, *_: Any) -> None:
        self.pool.shutdown(cancel_futures=True)

    def do(self, work: Callable[..., None], *arguments: Any) -> None:
        """Call work(*arguments) in a thread; the caller must not change the arguments afterwards."""
        self.waiting.append(self.pool.submit(work, *arguments))
        while len(self.waiting) > self.most:
            self.waiting.popleft().result()

    def write(self, tensor: StoredTensor, first: int, rows: torch.Tensor) -> None:
        """Write rows as Files.write does; a single thread keeps the order of the calls."""
        self.do(self.files.write, tensor, first, rows)

    def finish(self) -> None:
        """Wait until all work is done; whoever makes the folder visible syncs its files."""
        while self.waiting:
            self.waiting.popleft().result()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def of_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, in the order of the file; only its header is read.

    Raises UserError (exit 4) for a damaged file and for dtypes that torch does not have.
    """
    start, header = system_safetensors.read(path)
    try:
        with safe_open(path, "pt"):  # raises for a malformed header
            pass
        unknown = sorted({entry["dtype"] for entry in header.values()} - DTYPES.keys())
        if unknown:
            problem = f"{path}: tensors of the type {unknown[0]} cannot be read."
            raise UserError(problem, "Take the model in 16 or 32 bits.", CHECKPOINT)
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
        problem = f"{path}: the file cannot be read ({error.strerror or error})."
        raise UserError(problem, "Download it again.", CHECKPOINT) from None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        problem = f"{path}: the file is damaged ({str(error)[:200]})."
        raise UserError(problem, "Download it again.", CHECKPOINT) from None


def of_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model folder, file by file.

    Raises UserError as files_of and of_file do, and (exit 4) for a name that is in two files.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files_of(folder):
        for name, tensor in of_file(path).items():
            if name in tensors:
                files = f"{tensors[name].file.name} and {path.name}"
                problem = f"{folder}: {name} is in two files, {files}."
                raise UserError(problem, "Download the model again.", CHECKPOINT)
            tensors[name] = tensor
    return tensors


def check_whole(folder: Path, tensors: Mapping[str, StoredTensor], bare: torch.nn.Module) -> None:
    """Raise UserError (exit 4) with a list when the folder lacks weights of the model.

    tensors: those of the folder; bare: the model without its weights. A folder with tensors that the model
    does not know is accepted, because transformers renames the tensors of some kinds of models.
    """
    names: dict[int, set[str]] = {}  # of each parameter: of a tied one several, with and without the prefix
    for name, parameter in bare.named_parameters(remove_duplicate=False):
        both = {name, name.removeprefix(f"{bare.base_model_prefix}.")}
        names[id(parameter)] = names.get(id(parameter), set()) | both
    missing = sorted(max(each, key=len) for each in names.values() if not each & tensors.keys())
    if missing and set().union(*names.values()) >= tensors.keys():
        problem = f"{folder}: {len(missing)} of its weights are missing: {listed(missing)}."
        raise UserError(problem, "Download or convert it again.", CHECKPOINT)


def divide(tensors: Iterable[StoredTensor], most: int = SHARD) -> list[list[StoredTensor]]:
    """The tensors, in their order, divided into files of at most `most` bytes."""
    files: list[list[StoredTensor]] = [[]]
    for tensor in tensors:
        if files[-1] and sum(other.size for other in files[-1]) + tensor.size > most:
            files.append([])
        files[-1].append(tensor)
    return files


def names_of(count: int) -> list[str]:
    """The names that transformers gives to `count` files of weights."""
    if count == 1:
        return [MODEL_WEIGHTS]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def create(folder: Path, files: dict[str, list[StoredTensor]]) -> dict[str, StoredTensor]:
    """Create files that have their headers and room for these tensors, and an index for more than one file.

    files: file name -> its tensors, of which names, dtypes and shapes count. Returns where each tensor lies.
    """
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
    """Create a safetensors file that has its header and room for these tensors; returns where each lies."""
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
