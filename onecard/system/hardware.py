"""What this machine can do, each answer with its reason. No torch at module level: words load instantly."""

import ctypes
import dataclasses
import functools
import os
import platform
import shutil
import subprocess
from typing import Any

from onecard.errors import UserError
from onecard.system import commands

M_MMAP_THRESHOLD = -3  # a parameter of mallopt, from malloc.h
LARGE = 4_000_000  # bytes
ON_CPU = "Use --device cpu."  # what programs with this option advise where there is no GPU to use
NEWEST_DRIVER = 580  # what the CUDA 13 build of torch asks for


@dataclasses.dataclass(frozen=True)
class Choice:
    """A value that was chosen, and why."""

    value: Any
    reason: str


def choose_device(wanted: str, local_rank: int = 0) -> Choice:
    """The torch device name; raises UserError when there is none of this name, or a GPU torch cannot use."""
    import torch

    if wanted == "cpu":
        return Choice("cpu", "asked for")
    usable = torch.cuda.is_available()
    if wanted.startswith("cuda"):
        if not usable:
            raise UserError(f"There is no device {wanted}: torch sees no CUDA GPU.", _card_problem() or "")
        name = wanted if wanted != "cuda" else f"cuda:{local_rank}"
        if name not in {f"cuda:{number}" for number in range(torch.cuda.device_count())}:
            last = torch.cuda.device_count() - 1
            raise UserError(f"There is no device {wanted}: this machine has cuda:0 to cuda:{last}.")
        check_build(int(name.split(":")[1]))
        return Choice(name, "asked for")
    if wanted != "auto":
        raise UserError(f"There is no device called {wanted!r}.", "Choose auto, cpu, cuda or cuda:N.")
    if usable:
        if local_rank >= torch.cuda.device_count():
            problem = f"Process {local_rank} has no card: torch sees {torch.cuda.device_count()}."
            raise UserError(problem, "Name as many cards in TOT_CUDA as this machine has.")
        check_build(local_rank)
        return Choice(f"cuda:{local_rank}", torch.cuda.get_device_name(local_rank))
    unusable = _card_problem()
    if unusable:
        raise UserError("nvidia-smi shows a GPU, but torch cannot use it.", unusable)
    return Choice("cpu", "no CUDA card found")


def check_build(number: int) -> None:
    """Raise UserError when this torch build holds no code for the card, which would fail much later."""
    import torch

    major, minor = torch.cuda.get_device_capability(number)
    if not has_code_for(major, minor, torch.cuda.get_arch_list()):
        name, builds = torch.cuda.get_device_name(number), " ".join(torch.cuda.get_arch_list())
        problem = (
            f"{name} has compute capability {major}.{minor}, torch {torch.__version__} is built for {builds}."
        )
        if (major, minor) < (7, 5):  # torch 2.13 is built for Turing and later
            raise UserError(f"{problem} No build of torch serves this GPU.")
        raise UserError(problem, f"Run: {_pip_line(torch.__version__)}")


def has_code_for(major: int, minor: int, builds: list[str]) -> bool:
    """Whether one of `builds` (sm_75, compute_90, ...) runs on this capability: code of the same major and no
    later minor version, or intermediate code of any earlier one (CUDA's binary compatibility rules)."""
    for build in builds:
        kind, _, digits = build.partition("_")
        digits = digits.rstrip("af")
        version = (int(digits[:-1]), int(digits[-1]))
        if kind == "compute" and version <= (major, minor):
            return True
        if kind == "sm" and version[0] == major and version[1] <= minor:
            return True
    return False


def choose_dtype(wanted: str, device: str) -> Choice:
    """fp32, fp16 or bf16. torch.cuda.is_bf16_supported() counts slow emulation, so it is not asked."""
    if wanted != "auto":
        return Choice(wanted, "asked for")
    if device.startswith("cuda"):
        import torch

        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return Choice("bf16", f"compute capability {major}.{minor} has it")
        return Choice(
            "fp16", f"compute capability {major}.{minor} is below 8.0: no real bf16; loss scaler on"
        )
    if cpu_has_bf16():
        return Choice("bf16", "this processor multiplies bf16 itself")
    return Choice("fp32", "this processor has no bf16 arithmetic")


def choose_checkpointing(wanted: str, device: str) -> Choice:
    if wanted != "auto":
        return Choice(wanted == "on", "asked for")
    if device.startswith("cuda"):
        return Choice(True, "a card's memory is scarcer than its speed")
    return Choice(False, "on a CPU memory is cheaper than computing twice")


def check_optimizer(name: str, device: str) -> None:
    if name == "paged_adamw_8bit" and not device.startswith("cuda"):
        raise UserError(
            "--optimizer paged_adamw_8bit needs a CUDA card: it pages to unified memory.", "Use adamw_8bit."
        )


def choose_threads(wanted: int | None) -> Choice:
    """Threads for products on the processor: one a physical core; two on one core wait for each other."""
    if wanted:
        return Choice(wanted, "asked for")
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return Choice(int(given), "OMP_NUM_THREADS")
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_core_of(number) for number in usable}
    both = f", {len(usable)} with hyper-threading" if len(cores) < len(usable) else ""
    return Choice(len(cores), f"{len(cores)} physical cores{both}")


def _core_of(number: int) -> str:
    """A name that threads on one core share; the thread's own number where that is not known."""
    try:
        path = f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return str(number)


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 in hardware (AVX512-BF16, AMX or Arm's bf16)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            words = set(file.read().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def describe_machine() -> str:
    """Processor, cores and memory, for reports."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else model
    except OSError:
        pass
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {gib:.0f} GiB RAM, {platform.system()} {platform.release()}"


def free_memory_bytes(device: str) -> int | None:
    """Free now on a card, or for this machine's programs on the CPU; None where nobody says.

    nvidia-smi is asked, not torch: a CUDA context of our own would take memory of the card.
    """
    if device.startswith("cuda"):
        number = int(device.partition(":")[2] or 0)
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = shown.split(",") if shown else []
        name = names[number].strip() if number < len(names) else str(number)
        command = ["nvidia-smi", "-i", name, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
            return int(answer.stdout.split()[0]) * 2**20
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return None
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def peak_memory_bytes(device: str) -> int:
    """Most memory used so far: allocated on the card, or by the whole process on the CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status", encoding="utf-8") as file:  # getrusage would inherit the parent's peak
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def keep_large_memory_apart(device: str) -> None:
    """Let the C library map each large tensor on its own, so that freeing it gives the memory back at once.

    Otherwise the activations of unequal micro-batches leave holes that nothing fits. Huge pages
    (onecard/__init__.py) keep the page faults few.
    """
    if device == "cpu" and platform.libc_ver()[0] == "glibc":
        _libc().mallopt(M_MMAP_THRESHOLD, LARGE)


def release_free_memory(device: str) -> None:
    """Give what smaller tensors left free inside the C library back to the system.

    Freed pieces of one micro-batch seldom fit the next, and the process would grow with every step. Cards
    have torch's caching allocator instead.
    """
    if device == "cpu" and platform.libc_ver()[0] == "glibc":
        _libc().malloc_trim(0)


def forget_cached_memory(device: str) -> None:
    """After running out of memory: give everything that is free back before trying smaller pieces."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
    release_free_memory(device)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _card_problem() -> str | None:
    """Why torch cannot use the card nvidia-smi shows, and the pip line that fits; None without a card."""
    smi = shutil.which("nvidia-smi")
    if not smi:
        return None
    command = [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line for line in answer.stdout.splitlines() if "," in line]
    if answer.returncode or not lines:
        return None
    import torch

    name, driver = (part.strip() for part in lines[0].rsplit(",", 1))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    facts = f"Card: {name}; driver: {driver}; torch {torch.__version__}: {build}."
    if hidden is not None and torch.version.cuda:
        facts += f" CUDA_VISIBLE_DEVICES is {hidden!r}: do these cards exist?"
    major = int(driver.split(".")[0]) if driver.split(".")[0].isdecimal() else 0
    update = "" if major >= NEWEST_DRIVER else f"Update the driver to {NEWEST_DRIVER} or newer. "
    return f"{facts} {update}Run: {_pip_line(torch.__version__)}"


def _pip_line(version: str) -> str:
    """Installs the package index's CUDA build of this torch and what it needs; the other versions stay."""
    torch = f"torch=={version.split('+')[0]}"
    return commands.pip_install(torch, "--force-reinstall --no-cache-dir ")
