"""Small checkpoints, and every state of the disk that a power failure may leave while one is saved."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs.checkpoint import Progress


def optimizer(step: int, rows: int = 3) -> torch.optim.Optimizer:
    """AdamW over one parameter [rows, 5] whose state depends on `step`."""
    parameter = torch.nn.Parameter(torch.full((rows, 5), float(step)))
    adamw = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.full_like(parameter, step + 1.0)
    adamw.step()
    return adamw


def save(folder: Path, step: int, keep: int | None = None, budget: int = 0) -> Path:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    weights = torch.full((4,), float(step))
    path = runs_checkpoint.save(
        folder,
        Progress(step=step, micro_batch_tokens=budget),
        lambda place: save_adapter(place, weights),
        optimizer(step),
        scaler,
    )
    runs_checkpoint.prune(folder, keep, best_step=0)
    return path


def save_adapter(place: Path, weights: torch.Tensor) -> None:
    save_file({"a": weights}, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps({"r": weights.flatten()[0].item()}))


def halved(operation: tuple) -> tuple:
    """A write of which only the first half reached the disk; what an append follows stays."""
    _, _, content, before = operation
    return (*operation[:2], content[: before + (len(content) - before) // 2], before)


def zeroed(operation: tuple) -> tuple:
    """A write whose length is on the disk but not its content."""
    _, _, content, before = operation
    return (*operation[:2], content[:before] + bytes(len(content) - before), before)


class Disk:
    """The operations of a save on the disk, from which every state after a power failure can be rebuilt.

    The model is that of a journalling file system: a write is safe after fsync of the file, a name (create,
    rename, delete) after fsync of its folder, for a rename that of the new name; whatever is not safe may be
    lost, each thing by itself.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, fsync_works: bool = True):
        self.folder, self.log, self.seen = folder, [], self.tree(folder)
        plain = {
            name: getattr(os, name) for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")
        }

        def fsync(handle: int) -> None:
            self.notice()
            if fsync_works:
                self.log.append(("sync", Path(f"/proc/self/fd/{handle}").readlink()))

        def moved(name: str):
            def move(source, target, **keywords):
                self.notice()
                plain[name](source, target, **keywords)
                self.log.append(("rename", Path(source), Path(target)))
                self.seen = self.tree(self.folder)

            return move

        def changed(name: str):
            def change(*arguments, **keywords):
                self.notice()
                plain[name](*arguments, **keywords)
                self.notice()

            return change

        monkeypatch.setattr(os, "fsync", fsync)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, moved(name))
        for name in ("mkdir", "rmdir", "unlink"):
            monkeypatch.setattr(os, name, changed(name))

    @staticmethod
    def tree(folder: Path) -> dict[Path, bytes | None]:
        return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}

    def notice(self) -> None:
        """Log what has changed on the disk since the last call."""
        now = self.tree(self.folder)
        for path in sorted(now.keys() - self.seen.keys()):
            self.log.append(("mkdir", path) if now[path] is None else ("create", path))
        for path in sorted(
            path for path in now if now[path] is not None and now[path] != self.seen.get(path)
        ):
            before = self.seen.get(path) or b""
            is_append = now[path].startswith(before)
            self.log.append(("write", path, now[path], len(before) if is_append else 0))
        for path in sorted(self.seen.keys() - now.keys(), reverse=True):
            self.log.append(("delete", path))
        self.seen = now

    def states(self, before: dict[Path, bytes | None], most: int = 3):
        """Yield (length, disk) for each prefix of the log without up to `most` of its unsafe operations."""
        for length in range(len(self.log) + 1):
            operations = self.log[:length]
            unsafe = [number for number in range(length) if not self.is_safe(number, operations)]
            for count in range(min(most, len(unsafe)) + 1):
                for lost in itertools.combinations(unsafe, count):
                    yield length, self.replay(before, [operations[i] for i in range(length) if i not in lost])

    def fewer_states(self, before: dict[Path, bytes | None]):
        """Yield (length, disk) for the longer log of a whole program, where `states` would yield too many.

        All unsafe operations are lost, or one of them, or all but one, or the last ones. An unsafe write that
        is not lost may also have reached the disk in half, or only as a length with zeros. This is done right
        before each sync, right after each rename, and at the end.
        """
        unsafe: list[int] = []
        for length, operation in enumerate([*self.log, ("sync", None)]):
            follows_rename = length > 0 and self.log[length - 1][0] == "rename"
            operations = self.log[:length]
            if operation[0] != "sync":
                unsafe.append(length)
            if operation[0] == "sync" or follows_rename:
                now = [n for n in unsafe if n < length]
                losses = [set(now[first:]) for first in range(len(now) + 1)]
                losses += [{n} for n in now] + [set(now) - {n} for n in now]
                for lost in losses:
                    yield length, self.replay(before, [operations[i] for i in range(length) if i not in lost])
                writes = {n for n in now if operations[n][0] == "write"}
                for damage in (halved, zeroed):
                    for damaged in [writes, *({n} for n in writes)] if writes else []:
                        changed = [damage(o) if i in damaged else o for i, o in enumerate(operations)]
                        yield length, self.replay(before, changed)
            unsafe = [n for n in unsafe if not self.is_safe(n, self.log[: length + 1])]

    @staticmethod
    def is_safe(number: int, operations: list) -> bool:
        operation, later = operations[number], operations[number + 1 :]
        if operation[0] == "sync":
            return True
        deletions = [n for n, other in enumerate(later) if other[0] == "delete" and other[1] != operation[1]]
        if any(later[n][1] in operation[1].parents and Disk.is_safe(n, later) for n in deletions):
            return True  # its folder is gone
        if operation[0] == "write":
            names = {operation[1]}
            for other in later:
                if other[0] == "rename" and other[1] in names:
                    names.add(other[2])
                if other[0] == "sync" and other[1] in names:
                    return True
            return False
        name = operation[-1 if operation[0] == "rename" else 1]
        if ("sync", name.parent) in later:
            return True
        moves = [n for n, other in enumerate(later) if other[0] == "rename" and other[1] == name]
        return operation[0] != "delete" and any(Disk.is_safe(n, later) for n in moves[:1])

    @staticmethod
    def replay(before: dict[Path, bytes | None], operations: list) -> dict[Path, bytes | None]:
        disk = dict(before)
        for kind, path, *rest in operations:
            if kind == "mkdir":
                disk[path] = None
            elif kind == "create":
                disk[path] = b""
            elif kind == "write" and path in disk:
                disk[path] = rest[0]
            elif kind == "delete":
                disk.pop(path, None)
            elif kind == "rename" and disk.get(path) is not None:
                disk[rest[0]] = disk.pop(path)
            elif kind == "rename" and path in disk:
                for old in [name for name in disk if name == path or path in name.parents]:
                    disk[rest[0] / old.relative_to(path)] = disk.pop(old)
        return disk


def survivors(states, folder: Path, after: int, place: Path) -> tuple[int, int]:
    """Return the number of states with a whole old or new checkpoint, and the number of all states.

    From operation `after` on the save is acknowledged, and the state must have the new checkpoint.
    """
    good = total = 0
    checked: dict[frozenset, str | None] = {}
    for length, disk in states:
        key = frozenset(disk.items())
        if key not in checked:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            for path in sorted(disk):
                target = place / path.relative_to(folder)
                if target.parent.is_dir():  # a file in a lost folder is also lost
                    target.mkdir() if disk[path] is None else target.write_bytes(disk[path])
            newest, _ = runs_checkpoint.newest(place)
            checked[key] = newest and newest.name
        total += 1
        good += checked[key] == "checkpoint-2" or (checked[key] == "checkpoint-1" and length < after)
    return good, total


def power_failures(place: Path, patch: pytest.MonkeyPatch, fsync_works: bool = True) -> tuple[int, int]:
    """The numbers of survived and of all states of a second save, after which the first is deleted."""
    folder = place / "run"
    folder.mkdir()
    save(folder, 1)
    before = Disk.tree(folder)
    disk = Disk(folder, patch, fsync_works)
    save(folder, 2, keep=1)
    disk.notice()
    patch.undo()
    renamed = next(n for n, operation in enumerate(disk.log) if operation[-1] == folder / "checkpoint-2")
    synced = [n for n, operation in enumerate(disk.log) if n > renamed and operation == ("sync", folder)]
    acknowledged = (synced[0] if synced else renamed) + 1
    most = 3 if fsync_works else 1  # without fsync everything is unsafe, and one loss shows it
    return survivors(disk.states(before, most), folder, acknowledged, place / "state")
