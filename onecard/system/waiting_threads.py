"""How the threads of a computation on the CPU wait for each other: they soon sleep, and leave the cores free.

torch and llama.cpp compute with OpenMP. As its library comes, a thread that waits for the others keeps its
core busy for many milliseconds. Beside another busy process the thread it waits for may need that very core.
The library reads its settings when it is loaded, so choose() comes before anything imports torch.
benchmarks/busy_machine.py measures what it gains.
"""

import functools
import os
import sys
from collections.abc import MutableMapping

SPINS = "GOMP_SPINCOUNT"  # how often a thread looks whether its wait is over before it sleeps; GNU's OpenMP
OURS = "1000"  # enough to outlast the short waits of a machine with free cores
# who sets one of these has chosen how many threads there are, where they run or how they wait
USERS = (
    "OMP_WAIT_POLICY",
    SPINS,
    "KMP_BLOCKTIME",
    "OMP_NUM_THREADS",
    "OMP_THREAD_LIMIT",
    "OMP_DYNAMIC",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
)


def choose(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads sleep soon, in this process and its children, unless the user has chosen otherwise.

    Nothing is changed once torch has been imported, because then it has no effect.
    """
    if "torch" not in sys.modules and not any(name in environment for name in USERS):
        environment[SPINS] = OURS


def is_ours(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether choose() has made the setting of this process, here or in the process that started it."""
    return [name for name in USERS if name in environment] == [SPINS] and environment[SPINS] == OURS


@functools.cache
def _say() -> None:
    from onecard.system.console import say  # imported late, because --help loads no tqdm

    say(f"waiting     threads that wait sleep soon, for the sake of other busy programs ({SPINS}={OURS})")


def say_once(device: str) -> None:
    """Say once in a process that waiting threads sleep soon, if a computation on this device has several."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device == "cpu" and cores > 1 and is_ours():
        _say()
