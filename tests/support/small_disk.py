"""A full disk for a child process: a tmpfs of its own, filled but for a few pages.

It is mounted in a namespace of the child, so nobody else sees it and it ends with the child.
"""

import ctypes
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from onecard import errors

PAGE = 4096  # bytes; a tmpfs gives room by pages
BALLAST = ".ballast"  # the file that fills the disk
NEW_MOUNTS, NEW_USERS = 0x00020000, 0x10000000  # of <linux/sched.h>


class NoMountError(Exception):
    """This machine gives a process no namespace, or no mounts in it."""


def mount(place: Path, size: int) -> None:
    """Mount a tmpfs of `size` bytes at a folder; raises NoMountError where that is not allowed."""
    try:
        _mount(place, size)
    except OSError as error:  # EPERM, or ENOSPC where the system allows no further namespace
        raise NoMountError(error.strerror) from error


def _mount(place: Path, size: int) -> None:
    library, ids = ctypes.CDLL(None, use_errno=True), (os.getuid(), os.getgid())
    _check(library.unshare(NEW_MOUNTS | NEW_USERS))
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {ids[0]} 1"), ("gid_map", f"0 {ids[1]} 1")):
        Path(f"/proc/self/{name}").write_text(text, encoding="utf-8")
    _check(library.mount(b"none", os.fsencode(place), b"tmpfs", 0, f"size={size}".encode()))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def fill(place: Path, free: int) -> None:
    """Leave `free` bytes of the disk at `place`; a multiple of PAGE."""
    disk = os.statvfs(place)
    with open(place / BALLAST, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - free)


def in_child(work: Callable[[], None], output: Path) -> int:
    """The exit code of work() in a forked child; what it prints goes to the end of a file."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            kind = {"mode": "w", "encoding": "utf-8", "buffering": 1, "closefd": False}
            sys.stdout, sys.stderr = open(1, **kind), open(2, **kind)  # noqa: SIM115 (the child ends with them)
            work()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def program(work: Callable[[], None], output: Path) -> int:
    """The exit code of a program in a child that takes the disk for empty before it writes."""

    def run() -> None:
        shutil.disk_usage = lambda _: shutil._ntuple_diskusage(1 << 50, 0, 1 << 50)
        errors.run_program(work)

    return in_child(run, output)
