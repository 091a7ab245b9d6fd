"""How torch and llama.cpp use the CPU: waiting threads soon sleep, and containers have a thread for a core.

Both compute with OpenMP. By default a waiting thread keeps its core busy for many milliseconds. Beside
another busy process the thread it waits for may need that very core. The library knows the cores that this
process may use, but not how much time on them a container may take. It reads its settings when it is loaded,
so choose() comes before anything imports torch. benchmarks/busy_machine.py measures what that gains.
"""

import functools
import math
import os
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from onecard.system.console import say

SPINS = "GOMP_SPINCOUNT"  # how often a thread looks whether its wait is over before it sleeps; GNU's OpenMP
OURS = "200"  # outlasts most waits of a machine with free cores, and is soon over on a busy one
THREADS = "OMP_NUM_THREADS"
# who sets one of these has chosen how many threads there are, where they run or how they wait
USERS = (
    "OMP_WAIT_POLICY",
    SPINS,
    "KMP_BLOCKTIME",
    THREADS,
    "OMP_THREAD_LIMIT",
    "OMP_DYNAMIC",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
)
SLEEP = "idle threads sleep after a short wait, so that other programs can use their cores"
SYSTEM = Path("/")  # where proc and sys are; tests have their own


def choose(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set how this process and its children compute, unless the user has set something of it.

    Nothing is changed once torch has been imported, because then it has no effect.
    """
    if "torch" not in sys.modules and not any(name in environment for name in USERS):
        environment.update(_settings())


def is_ours(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether choose() has made the settings of this process, here or in the process that started it."""
    return {name: environment[name] for name in USERS if name in environment} == _settings()


def say_once(device: str) -> None:
    """Say once in a process what choose() has set, if a computation on this device has several threads."""
    if device == "cpu" and usable_cores() > 1 and is_ours():
        _say(os.environ.get(THREADS))


@functools.cache
def _say(limit: str | None) -> None:
    if limit:
        say(f"cores       {limit}, because this container has no more ({THREADS}={limit})")
    if limit != "1":
        say(f"waiting     {SLEEP} ({SPINS}={OURS})")


def usable_cores() -> int:
    """How many cores this process may use, of those that the system has; a hardware thread counts as one."""
    return len(_usable())


def physical_cores() -> int:
    """How many cores they are when all hardware threads of one core count as one."""
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return len({_text(topology.format(number)).strip() or str(number) for number in _usable()})


def container_cores() -> int | None:
    """The number of cores whose time a container may take, rounded up; None without such a limit."""
    limits = [quota / period for quota, period in _quotas() if quota > 0 and period > 0]
    return math.ceil(min(limits)) if limits else None


def _usable() -> set[int]:
    """The numbers of the hardware threads that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return os.sched_getaffinity(0) if has_affinity else set(range(os.cpu_count() or 1))


def _settings() -> dict[str, str]:
    limit = container_cores()  # with a larger one torch and llama.cpp have a thread for each physical core
    limited = {THREADS: str(limit)} if limit is not None and limit < physical_cores() else {}
    return {SPINS: OURS, **limited}


def _quotas() -> Iterator[tuple[int, int]]:
    """(microseconds of all cores together, microseconds of the period) of every control group above us."""
    for line in _text("proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        is_new = controllers == ""  # version 2 of control groups
        if not is_new and "cpu" not in controllers.split(","):
            continue
        root = Path("sys/fs/cgroup", controllers)
        # inside a container the path may be that outside of it, and the container's own group is the root
        place = root / path.lstrip("/")
        for folder in (place, *place.parents):
            if not folder.is_relative_to(root):
                break
            old = f"{_text(folder / 'cpu.cfs_quota_us')} {_text(folder / 'cpu.cfs_period_us')}"
            numbers = (_text(folder / "cpu.max") if is_new else old).split()
            if len(numbers) == 2 and numbers[0] != "max":  # -1 in version 1: no limit
                yield int(numbers[0]), int(numbers[1])


def _text(path: str | Path) -> str:
    """The content of a file of the system; "" when there is none."""
    try:
        return (SYSTEM / path).read_text(encoding="utf-8")
    except OSError:
        return ""
