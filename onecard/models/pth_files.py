"""Tensors in the zip files that torch writes (.pth), read and written a few rows at a time.

It runs in a child process. torch itself reads the table of contents with its restricted unpickler, which
allows tensors and plain values only. torch also writes the table, with skip_data, which leaves room for the
tensors. The data is not compressed, so reading a tensor needs only its offset in the file: the records of the
zip file and the storages of the tensors come in the same order, and this file checks that their sizes and
distances agree.
"""

import dataclasses
import math
import pickle
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.serialization import skip_data

from onecard.errors import CHECKPOINT, UNSAFE, UserError, is_out_of_memory
from onecard.models.tensor_files import StoredTensor

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a record: signature, ..., lengths of name and extra field
SIGNATURE = b"PK\x03\x04"


def of_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a .pth file, and where each lies in it.

    Raises UserError: exit 8 when the file is no zip file or could run code, exit 4 when it is damaged or
    holds something other than contiguous tensors with names.
    """
    if not _is_zip(path):
        problem = f"{path} is not in torch's zip format, and a file in an older format can run code."
        fix = "Ask somebody who trusts the file to save it again with torch.save."
        raise UserError(problem, fix, UNSAFE)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).replace("\n", " ")[:200]
        problem = f"{path} was not loaded, because it could run code: {reason}."
        raise UserError(problem, "Take the model in safetensors.", UNSAFE) from None
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, OSError):
            raise
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
        raise _damaged(path, reason) from None
    plain = isinstance(tensors, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    )
    if not plain:
        problem = f"{path} holds something other than tensors with names."
        raise UserError(problem, "Save only the model's state_dict with torch.save.", CHECKPOINT)
    scattered = next((name for name, tensor in tensors.items() if not tensor.is_contiguous()), None)
    if scattered:
        problem = f"{path}: {scattered} is not contiguous, it is a view of a larger tensor."
        raise UserError(problem, "Save each tensor with .contiguous().clone().", CHECKPOINT)
    offsets = _offsets(path, tensors)
    return {
        name: StoredTensor(
            name,
            tensor.dtype,
            tuple(tensor.shape),
            path,
            offsets[tensor.untyped_storage().data_ptr()] + tensor.storage_offset() * tensor.dtype.itemsize,
        )
        for name, tensor in tensors.items()
    }


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(f"{path} is damaged ({reason}).", "Download it again.", CHECKPOINT)


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True  # a zip file that is damaged


def _offsets(path: Path, tensors: dict[str, torch.Tensor]) -> dict[int, int]:
    """Memory address of each mapped storage -> offset of its bytes in the file."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
    addresses = sorted(address for address, size in storages.items() if size)
    records = [record for record in _records(path) if record[1]]
    fits = len(addresses) == len(records) and all(
        storages[address] == size and address - addresses[0] == offset - records[0][0]
        for address, (offset, size) in zip(addresses, records, strict=True)
    )
    if not fits:
        raise _damaged(path, "its tensors do not lie where its table of contents says")
    offsets = {address: offset for address, (offset, _) in zip(addresses, records, strict=True)}
    return {**dict.fromkeys(storages, 0), **offsets}  # an empty storage needs no offset


def _records(path: Path) -> list[tuple[int, int]]:
    """(offset, size) of the data of each storage, in the order of the file."""
    records = []
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            for entry in (entry for entry in entries if "/data/" in entry.filename):
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise UserError(f"{path} is compressed.", "Save it with torch.save.", CHECKPOINT)
                file.seek(entry.header_offset)
                signature, name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
                if signature != SIGNATURE:
                    raise zipfile.BadZipFile("a record is not where it should be")
                records.append((entry.header_offset + LOCAL_HEADER.size + name + extra, entry.file_size))
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
        raise _damaged(path, error) from None
    return records


def create_file(path: Path, tensors: Iterable[StoredTensor]) -> dict[str, StoredTensor]:
    """Create a .pth file that has room for these tensors; returns where each lies.

    For a moment this takes address space for all of them, but no memory, because nothing is written there.
    Raises OSError when the disk is full.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    assert all(math.prod(tensor.shape) for tensor in by_name.values())
    hollow = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in by_name.items()}
    try:
        with skip_data():
            torch.save(hollow, path)
    except RuntimeError:  # it does not say whether the disk is full, but a plain write does
        path.write_bytes(bytes(1 << 16))
        raise
    del hollow
    written = of_file(path)
    same = [(t.name, t.dtype, t.shape) for t in written.values()]
    assert same == [(t.name, t.dtype, t.shape) for t in by_name.values()], "torch.save wrote something else"
    return {name: dataclasses.replace(tensor) for name, tensor in written.items()}
