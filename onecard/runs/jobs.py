"""Trainings as processes of their own: starts and stops them, and reads their state from their files.

Windows may be closed and opened meanwhile: a run is its folder, and the lock in it says which process trains
there. Beside the folder lies .console-NAME.txt with the output of the trainer. The trainer inherits a lock on
that file, so its name is taken as soon as it is started. This file knows no window and no torch.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from onecard import errors
from onecard.config import declaration
from onecard.config.options import command_line, flag
from onecard.config.training import FORMATS, FinetuneConfig
from onecard.errors import DATA, UserError
from onecard.runs import folder as runs_folder
from onecard.runs import log as runs_log
from onecard.system import commands, lock
from onecard.system import files as system_files

NAME = re.compile(r"\w[\w.-]*")
LONGEST_NAME = 100  # bytes
BEFORE, BEHIND = ".console-", ".txt"  # around the name of a run, in the name of its console file
UPLOADS = ".uploads"
TAIL = 1 << 16  # bytes at the end of a console that are read
SHOWN = 12  # lines of the console of a failed run that are shown
MARK, CLOCK = "=== ", "%Y-%m-%d %H:%M:%S"  # our own lines in a console
STARTED = re.compile(rf"{MARK}(\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d) ")
PROCESS = re.compile(rf"{MARK}process (\d+)")
STOP_NOTE = f"{MARK}asked to save and stop"
ERRORS = ("error:", "Traceback (most recent call last)")
NEW, STARTING, RUNNING = "new", "starting", "running"
STOPPED, FINISHED, FAILED = "stopped", "finished", "failed"


@dataclasses.dataclass(frozen=True)
class State:
    """How a run stands. kind: new, starting, running, stopped, finished or failed."""

    kind: str
    step: int = 0  # the last step that is done; of a run that is not going, that is saved
    total: int | None = None
    pid: int | None = None
    said: str = ""  # the last line of its console; of a failed run the last lines

    @property
    def going(self) -> bool:
        """Whether a process trains, or has been started to train."""
        return self.kind in (STARTING, RUNNING)


def folder_of(workspace: Path, name: str | None) -> Path:
    """The folder of a run; raises UserError unless the name is one plain part of a path."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or len(name.encode()) > LONGEST_NAME:
        problem = f"{str(name)[:LONGEST_NAME]!r} cannot be the name of a run."
        raise UserError(problem, "Use letters, digits, '_', '.' and '-', first a letter or digit.")
    return workspace / name


def console_of(folder: Path) -> Path:
    """The file with the output of the trainers of a run folder, one after the other."""
    return folder.with_name(f"{BEFORE}{folder.name}{BEHIND}")


def names(workspace: Path) -> list[str]:
    """All runs in a workspace, the newest first; also runs that are starting or failed without a folder."""
    times = {path.parent.name: _time(path) for path in workspace.glob(f"*/{runs_folder.CONFIG}")}
    for path in workspace.glob(f"{BEFORE}*{BEHIND}"):
        name = path.name.removeprefix(BEFORE).removesuffix(BEHIND)
        if name in times or (NAME.fullmatch(name) and state(workspace, name).kind in (STARTING, FAILED)):
            times[name] = max(_time(path), times.get(name, 0.0))
    return sorted((name for name in times if NAME.fullmatch(name)), key=lambda name: (-times[name], name))


def free_name(workspace: Path) -> str:
    """The first of run-1, run-2, ... that is not taken."""
    number = 1
    while any(p.exists() for p in [workspace / f"run-{number}", console_of(workspace / f"run-{number}")]):
        number += 1
    return f"run-{number}"


def check_paths(options: FinetuneConfig, uploads: Path) -> None:
    """Raise UserError when an option that may name a file leads out of this folder and the uploads, or is an
    address: somebody at a page chooses what is read, but not what this machine asks others for.

    A link inside the folder may lead out of it: only the owner of the folder can have put it there.
    """
    open_folders = (Path.cwd(), uploads.absolute())
    for name in declaration.names(type(options), lambda option: option.is_path):
        for part in (getattr(options, name) or "").split(","):
            path = Path(part.strip())
            outside = path.is_absolute() and not any(path.is_relative_to(folder) for folder in open_folders)
            strange = part.strip().startswith(("-", "~")) or re.search(r"[\x00-\x1f\x7f]", part)
            if outside or strange or ".." in path.parts or "://" in part:
                fix = "Name something inside the folder where this window was started, or upload it."
                raise UserError(f"{flag(options, name)} {part!r} is not open to this window.", fix)


def keep_upload(source: Path, workspace: Path) -> Path:
    """A copy of an uploaded file that stays; raises UserError (exit 3, or 7 on a full disk)."""
    ending = source.suffix.lower()
    if ending not in FORMATS:
        raise UserError(f"{source.name}: not a file of rows.", f"Upload one of {', '.join(FORMATS)}.", DATA)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    stem = re.sub(r"[^\w.-]", "_", source.stem)[:40].strip(".-") or "rows"
    target = workspace / UPLOADS / f"{stem}-{digest}{ending}"
    system_files.make_folder(target.parent)
    if not target.exists():
        temporary = target.with_name(f".{os.getpid()}.{target.name}")
        try:
            shutil.copyfile(source, temporary)
            system_files.put_file(temporary, target)
        except OSError as error:
            raise system_files.disk_error(target, error) from None
        finally:
            temporary.unlink(missing_ok=True)
    return target


def start(workspace: Path, name: str, options: FinetuneConfig) -> None:
    """Start a training; raises UserError when the name is taken or an option leads out of this folder."""
    folder = folder_of(workspace, name)
    check_paths(options, workspace / UPLOADS)
    begun = runs_folder.has_log(folder) or runs_folder.checkpoint_steps(folder)
    if begun and not options.overwrite and _pid(folder) is None:
        raise UserError(f"{name} is the name of an earlier run.", "Continue it, or choose another name.")
    default, values = type(options)(), dataclasses.asdict(options)
    _launch(folder, "finetune", {k: v for k, v in values.items() if v != getattr(default, k)})


def go_on(workspace: Path, name: str, longer: dict[str, Any] | None = None) -> None:
    """Go on with a training; longer: the num_epochs or max_steps to go on to."""
    folder = folder_of(workspace, name)
    if not (folder / runs_folder.CONFIG).is_file():
        raise UserError(f"{name}: there is no run to continue.", "Start one.")
    _launch(folder, "continue", longer or {})


def stop(workspace: Path, name: str) -> None:
    """Ask a run to save and stop (SIGTERM); raises UserError when nothing goes on there."""
    folder = folder_of(workspace, name)
    pid = _pid(folder)
    with contextlib.suppress(ProcessLookupError), contextlib.ExitStack() as stack:
        if pid is not None:
            handle = os.pidfd_open(pid)
            stack.callback(os.close, handle)
            if _pid(folder) == pid:  # so the handle is the trainer's, not that of a later process
                with contextlib.suppress(UserError):  # on a full disk it is stopped without the note
                    _note(folder, STOP_NOTE)
                signal.pidfd_send_signal(handle, signal.SIGTERM)
                return
    raise UserError(f"{name} is not being trained now.")


def state(workspace: Path, name: str) -> State:
    """The state of a run, from its files and locks alone."""
    folder = folder_of(workspace, name)
    stored, console_lines = config_of(folder), _console_lines(folder)
    total = stored["resolved"].get("total_steps") if stored else None
    total = total if type(total) is int else None
    trainer_lines = [line for line in console_lines if not line.startswith(MARK)]
    last = trainer_lines[-1] if trainer_lines else ""
    pid = _pid(folder)
    if pid is not None:
        if _owner(folder) and runs_folder.has_log(folder):
            return State(RUNNING, runs_log.last_step(folder), total, pid, last)
        return State(STARTING, 0, total, pid, last)
    finished, console = _time(folder / runs_folder.FINISHED), _time(console_of(folder))
    errors_at = [number for number, line in enumerate(trainer_lines) if line.startswith(ERRORS)]
    if finished and (finished >= _start(console_lines) or not errors_at):
        return State(FINISHED, runs_log.last_step(folder), total, None, last)
    saved = max(runs_folder.checkpoint_steps(folder), default=0)
    was_last = console_lines and console >= _time(
        folder / runs_folder.LOG
    )  # else a later trainer had no console
    if (
        was_last
        and not last.startswith("stopped by ")
        and (errors_at or (stored and STOP_NOTE not in console_lines))
    ):
        end = [] if errors_at else ["(It ended without an error message. It may have been killed.)"]
        return State(FAILED, saved, total, None, "\n".join(trainer_lines[-SHOWN:] + end))
    return State(STOPPED if stored or console_lines else NEW, saved, total, None, last)


def training_on(workspace: Path, device: str) -> list[str]:
    """The runs that are trained on a device now; one that has just begun counts for every device."""
    going = [name for name in names(workspace) if state(workspace, name).going]
    used = {name: config_of(workspace / name).get("resolved", {}).get("device", device) for name in going}
    kinds = ("cuda", "cuda:0") if device in ("cuda", "cuda:0") else (device,)
    return [name for name in going if used[name] in kinds or (device == "all" and used[name] != "cpu")]


def config_of(folder: Path) -> dict[str, Any]:
    """The content of finetune_config.json; {} when there is none or it is damaged."""
    try:
        stored = system_files.read_json(folder / runs_folder.CONFIG)
    except (UserError, OSError):
        return {}
    parts = ("options", "resolved")
    whole = isinstance(stored, dict) and all(isinstance(stored.get(part), dict) for part in parts)
    return stored if whole else {}


def _launch(folder: Path, command: str, options: dict[str, Any]) -> None:
    values = {**options, "output_path": folder}
    flags = command_line(values)
    system_files.make_folder(folder.parent)
    with console_of(folder).open("ab", buffering=0) as console:
        _take(console, folder.name)
        system_files.sync_folder(folder.parent)
        with errors.remedy("Wait for it, or stop it."):
            lock.check_free(folder)
        _note(folder, f"{MARK}{time.strftime(CLOCK)} {commands.name(command)} {' '.join(map(repr, flags))}")
        program, variables = commands.child(command)
        process = subprocess.Popen(
            [*program, *flags],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with contextlib.suppress(UserError):  # the lock in the run folder names the process too
            _note(folder, f"{MARK}process {process.pid}")
    threading.Thread(target=process.wait, daemon=True).start()  # or its end would leave a zombie


def _note(folder: Path, text: str) -> None:
    """Add a line to the console; raises UserError (exit 7) on a full disk."""
    console = console_of(folder)
    try:
        system_files.append(console, f"{text}\n".encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise system_files.disk_error(console, error) from None


def _take(console: BinaryIO, name: str) -> None:
    """Lock the console for the trainer that will inherit it; raises UserError when it is locked already."""
    if not lock.take_soon(console.fileno()):
        raise UserError(f"{name} is being trained already.", "Wait, stop it, or choose another name.")


def _pid(folder: Path) -> int | None:
    """The process that trains in this folder, or was started to; None without one."""
    owner = _owner(folder)
    if owner is None and _is_locked(console_of(folder)):
        pids = [int(match[1]) for match in map(PROCESS.fullmatch, _console_lines(folder)) if match]
        owner = pids[-1] if pids and _is_alive(pids[-1]) else None
    return owner


def _owner(folder: Path) -> int | None:
    """The process that holds the lock of this run folder."""
    pid = lock.owner_of(folder)
    # who asks holds the lock for a moment, and a trainer may be about to take that of a dead process
    return pid if pid and _is_alive(pid) and _is_locked(folder / lock.NAME) else None


def _is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file; False where that cannot be seen."""
    with contextlib.suppress(OSError):
        return lock.is_taken(path)
    return False


def _is_alive(pid: int) -> bool:
    if pid <= 0:  # which would mean a group of processes
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _console_lines(folder: Path) -> list[str]:
    """The last lines of a run's console, at most those since the last start."""
    try:
        with console_of(folder).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    # of a progress bar only its last state
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n") if line.strip()]
    starts = [number for number, line in enumerate(lines) if STARTED.match(line)]
    return lines[starts[-1] :] if starts else lines


def _start(lines: list[str]) -> float:
    """The time at which the trainer of these console lines was started; 0 when its first line is cut off."""
    match = STARTED.match(lines[0]) if lines else None
    return time.mktime(time.strptime(match[1], CLOCK)) if match else 0.0


def _time(path: Path) -> float:
    """The time of a file's last change; 0 when there is no file."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
