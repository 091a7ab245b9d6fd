"""Tensors in torch's zip files (.pth), read and written a few rows at a time. Runs in a child process.

torch itself reads the table of contents, with its restricted unpickler (tensors and plain values only), and
writes it, with skip_data, which leaves room for the tensors. The data in between lies uncompressed, so only
its place is needed: records of the zip and storages of the tensors come in the same order, and that they
have the same sizes and distances is checked.
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

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's record: mark, ..., length of the name, of what follows
MARK = b"PK\x03\x04"


def of_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a .pth file and where each lies.

    Raises UserError: exit 8 when the file is no zip or asks for more than tensors, 4 when it is damaged.
    """
    if not _is_zip(path):
        problem = f"{path}: not in torch's zip format; older formats can run code when they are read."
        fix = "Have somebody who trusts it save it again with torch.save."
        raise UserError(problem, fix, UNSAFE)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).replace("\n", " ")[:200]
        raise UserError(f"{path}: would run code: {reason}.", "It was not loaded.", UNSAFE) from None
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, OSError):
            raise
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
        raise UserError(f"{path}: damaged ({reason}).", "Fetch it again.", CHECKPOINT) from None
    plain = isinstance(held, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in held.items()
    )
    if not plain:
        raise UserError(f"{path}: holds something else than tensors by name.", "", CHECKPOINT)
    scattered = next((name for name, tensor in held.items() if not tensor.is_contiguous()), None)
    if scattered:
        problem = f"{path}: {scattered} is a view into a larger tensor."
        raise UserError(problem, "Save each tensor with .contiguous().clone().", CHECKPOINT)
    places = _places(path, held)
    return {
        name: StoredTensor(
            name,
            tensor.dtype,
            tuple(tensor.shape),
            path,
            places[tensor.untyped_storage().data_ptr()] + tensor.storage_offset() * tensor.dtype.itemsize,
        )
        for name, tensor in held.items()
    }


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True  # one that says odd things of itself: damaged


def _places(path: Path, held: dict[str, torch.Tensor]) -> dict[int, int]:
    """Address of each mapped storage -> where its bytes lie in the file."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held.values()}
    addresses = sorted(address for address, size in storages.items() if size)
    records = [record for record in _records(path) if record[1]]
    same = len(addresses) == len(records) and all(
        storages[address] == size and address - addresses[0] == place - records[0][0]
        for address, (place, size) in zip(addresses, records, strict=True)
    )
    if not same:
        raise UserError(f"{path}: its tensors do not lie where they should.", "Fetch it again.", CHECKPOINT)
    found = {address: place for address, (place, _) in zip(addresses, records, strict=True)}
    return {**dict.fromkeys(storages, 0), **found}  # of an empty storage any place will do


def _records(path: Path) -> list[tuple[int, int]]:
    """(place, size) of the data of each storage in the file, in the file's order."""
    found = []
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            for entry in (entry for entry in entries if "/data/" in entry.filename):
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise UserError(f"{path}: is compressed.", "Save it with torch.save.", CHECKPOINT)
                file.seek(entry.header_offset)
                mark, name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
                if mark != MARK:
                    raise zipfile.BadZipFile("a record is not where it should be")
                found.append((entry.header_offset + LOCAL_HEADER.size + name + extra, entry.file_size))
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}).", "Fetch it again.", CHECKPOINT) from None
    return found


def create_file(path: Path, tensors: Iterable[StoredTensor]) -> dict[str, StoredTensor]:
    """Make a .pth file with room for these tensors; returns where each lies.

    Address space for all of them is taken for a moment; memory is not, since nothing is written there.
    """
    wanted = {tensor.name: tensor for tensor in tensors}
    assert all(math.prod(tensor.shape) for tensor in wanted.values())
    hollow = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in wanted.items()}
    with skip_data():
        torch.save(hollow, path)
    del hollow
    made = of_file(path)
    same = [(t.name, t.dtype, t.shape) for t in made.values()]
    assert same == [(t.name, t.dtype, t.shape) for t in wanted.values()], "torch.save wrote something else"
    return {name: dataclasses.replace(tensor) for name, tensor in made.items()}
