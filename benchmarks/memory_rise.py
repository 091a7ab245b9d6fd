"""How much memory a piece of work needs at its peak (Linux). Benchmarks and tests use it."""

from collections.abc import Callable
from pathlib import Path


def memory_rise(work: Callable[[], object]) -> int:
    """Bytes by which the peak memory of this process during work() exceeds its memory before."""

    def bytes_of(name: str) -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.split(f"{name}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    before = bytes_of("VmRSS")
    work()
    return bytes_of("VmHWM") - before
