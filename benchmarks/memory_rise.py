"""What a piece of work holds at its peak (Linux); for the programs beside this file, and for tests."""

from collections.abc import Callable
from pathlib import Path


def memory_rise(work: Callable[[], object]) -> int:
    """Bytes by which the process's peak memory within work() lies above what it held before (Linux)."""

    def held(name: str) -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.split(f"{name}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = held("VmRSS")
    work()
    return held("VmHWM") - before
