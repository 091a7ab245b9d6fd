"""What this machine can do: its device, compute dtype, threads and memory, each choice with its reason.

torch is imported inside the functions that need it, so that --help does not wait for it.
"""

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
LARGE = 4_000_000  # bytes of a tensor that gets a mapping of its own
ON_CPU = "Use --device cpu."  # what programs with this option advise where there is no GPU to use
NEWEST_DRIVER = 580  # what the CUDA 13 build of torch asks for


@dataclasses.dataclass(frozen=True)
class Choice:
    """A value that was chosen, and why."""

    value: Any
    reason: str


def choose_device(option: str, local_rank: int = 0) -> Choice:
    """The torch device name; raises UserError when there is none of this name, or a GPU torch cannot use."""
    import torch

    if option == "cpu":
        return Choice("cpu", "asked for")
    usable = torch.cuda.is_available()
    if option.startswith("cuda"):
        if not usable:
            raise UserError(f"There is no device {option}: torch finds no CUDA GPU.", _gpu_problem() or "")
        name = option if option != "cuda" else f"cuda:{local_rank}"
        if name not in {f"cuda:{number}" for number in range(torch.cuda.device_count())}:
            last = torch.cuda.device_count() - 1
            raise UserError(f"There is no device {option}: this machine has cuda:0 to cuda:{last}.")
        check_build(int(name.split(":")[1]))
        return Choice(name, "asked for")
    if option != "auto":
        raise UserError(f"There is no device called {option!r}.", "Choose auto, cpu, cuda or cuda:N.")
    if usable:
        if local_rank >= torch.cuda.device_count():
            problem = (
                f"There is no GPU for process {local_rank}: torch finds {torch.cuda.device_count()} of them."
            )
            raise UserError(problem, "Name at most as many GPUs in TOT_CUDA as this machine has.")
        check_build(local_rank)
        return Choice(f"cuda:{local_rank}", torch.cuda.get_device_name(local_rank))
    unusable = _gpu_problem()
    if unusable:
        raise UserError("nvidia-smi shows a GPU, but torch cannot use it.", unusable)
    return Choice("cpu", "no CUDA GPU found")


def check_build(number: int) -> None:
    """Raise UserError when this build of torch has no code for GPU `number`, which would only fail later."""
    import torch

    major, minor = torch.cuda.get_device_capability(number)
    if not has_code_for(major, minor, torch.cuda.get_arch_list()):
        name, builds = torch.cuda.get_device_name(number), " ".join(torch.cuda.get_arch_list())
        problem = (
            f"{name} has compute capability {major}.{minor}, torch {torch.__version__} is built for {builds}."
        )
        if (major, minor) < (7, 5):  # torch 2.13 is built for Turing and later
            raise UserError(f"{problem} No build of torch supports this GPU.")
        raise UserError(problem, f"Run: {_pip_line(torch.__version__)}")


def has_code_for(major: int, minor: int, builds: list[str]) -> bool:
    """Whether one of `builds` (sm_75, compute_90, ...) runs on a GPU of this compute capability.

    By CUDA's rules of binary compatibility that is code for the same major version and no later minor one, or
    intermediate code for any earlier version.
    """
    for build in builds:
        kind, _, digits = build.partition("_")
        digits = digits.rstrip("af")
        version = (int(digits[:-1]), int(digits[-1]))
        if kind == "compute" and version <= (major, minor):
            return True
        if kind == "sm" and version[0] == major and version[1] <= minor:
            return True
    return False


def choose_dtype(option: str, device: str) -> Choice:
    """The compute dtype for --dtype: fp32, fp16 or bf16.

    torch.cuda.is_bf16_supported() also counts slow emulation, so the compute capability decides.
    """
    if option != "auto":
        return Choice(option, "asked for")
    if device.startswith("cuda"):
        import torch

        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return Choice("bf16", f"compute capability {major}.{minor} has bf16")
        return Choice(
            "fp16", f"compute capability {major}.{minor} is below 8.0: bf16 would be emulated; loss scaler on"
        )
    if cpu_has_bf16():
        return Choice("bf16", "this CPU multiplies bf16 in hardware")
    return Choice("fp32", "this CPU does not multiply bf16 in hardware")


def choose_checkpointing(option: str, device: str) -> Choice:
    """Whether gradient checkpointing is on: True or False."""
    if option != "auto":
        return Choice(option == "on", "asked for")
    if device.startswith("cuda"):
        return Choice(True, "on a GPU memory is scarcer than speed")
    return Choice(False, "on a CPU memory is cheaper than computing activations twice")


def check_optimizer(name: str, device: str) -> None:
    """Raise UserError when this device cannot run the optimizer."""
    if name == "paged_adamw_8bit" and not device.startswith("cuda"):
        raise UserError(
            "--optimizer paged_adamw_8bit needs a CUDA GPU, because it pages to unified memory.",
            "Use adamw_8bit.",
        )


def choose_threads(option: int | None) -> Choice:
    """Threads for matrix products on the CPU: one per physical core, as two of one core only wait."""
    if option:
        return Choice(option, "asked for")
    variable = os.environ.get("OMP_NUM_THREADS", "")
    if variable.isdecimal() and int(variable):
        return Choice(int(variable), "OMP_NUM_THREADS")
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_core_of(number) for number in usable}
    threads = f", {len(usable)} with hyper-threading" if len(cores) < len(usable) else ""
    return Choice(len(cores), f"{len(cores)} physical cores{threads}")


def _core_of(number: int) -> str:
    """A name that all hardware threads of one core share; the thread's number where the system has none."""
    try:
        path = f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return str(number)


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX512-BF16, AMX or Arm's bf16)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            words = set(file.read().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def describe_machine() -> str:
    """CPU, cores and memory, for reports."""
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
    """Bytes that are free now: of a GPU, or of main memory for the CPU; None where they cannot be read.

    nvidia-smi is asked and not torch, whose CUDA context would take memory of the GPU.
    """
    if device.startswith("cuda"):
        number = int(device.partition(":")[2] or 0)
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = shown.split(",") if shown else []
        name = names[number].strip() if number < len(names) else str(number)
        command = ["nvidia-smi", "-i", name, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=True
            )
            return int(answer.stdout.split()[0]) * 2**20
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return None
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def peak_memory_bytes(device: str) -> int:
    """The largest number of bytes used so far: allocated on the GPU, or by the whole process on the CPU."""
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
    """Let the C library map each large tensor by itself, so that its memory goes back when it is freed.

    Otherwise micro-batches of different lengths leave gaps that no later tensor fits. Huge pages
    (onecard/__init__.py) keep the number of page faults small.
    """
    if device == "cpu" and platform.libc_ver()[0] == "glibc":
        _libc().mallopt(M_MMAP_THRESHOLD, LARGE)


def release_free_memory(device: str) -> None:
    """Give memory of smaller tensors that was freed inside the C library back to the system.

    Freed blocks of one micro-batch seldom fit the next, so the process would grow with every step. On a GPU
    torch's caching allocator does this work.
    """
    if device == "cpu" and platform.libc_ver()[0] == "glibc":
        _libc().malloc_trim(0)


def forget_cached_memory(device: str) -> None:
    """Give all free memory back, before a smaller micro-batch is tried after running out of memory."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
    release_free_memory(device)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _gpu_problem() -> str | None:
    """Why torch cannot use the GPU that nvidia-smi shows, and what to type; None where it shows none."""
    smi = shutil.which("nvidia-smi")
    if not smi:
        return None
    command = [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line for line in answer.stdout.splitlines() if "," in line]
    if answer.returncode or not lines:
        return None
    import torch

    name, driver = (part.strip() for part in lines[0].rsplit(",", 1))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    facts = f"GPU: {name}; driver: {driver}; torch {torch.__version__}: {build}."
    if hidden is not None and torch.version.cuda:
        facts += f" CUDA_VISIBLE_DEVICES is {hidden!r}: do these GPUs exist?"
    major = int(driver.split(".")[0]) if driver.split(".")[0].isdecimal() else 0
    update = "" if major >= NEWEST_DRIVER else f"Update the driver to {NEWEST_DRIVER} or newer. "
    return f"{facts} {update}Run: {_pip_line(torch.__version__)}"


def _pip_line(version: str) -> str:
    """The command that installs the CUDA build of this torch from the package index; other versions stay."""
    torch = f"torch=={version.split('+')[0]}"
    return commands.pip_install(torch, "--force-reinstall --no-cache-dir ")
