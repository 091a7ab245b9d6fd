"""What this machine can do: its device, compute dtype, threads and memory, each choice with its reason.

What depends on a GPU is chosen by what gpus.py answers. torch is imported inside the functions that need it,
so that --help does not wait for it.
"""

import ctypes
import dataclasses
import functools
import os
import platform
from typing import Any

from onecard.errors import UserError
from onecard.system import gpus, openmp

M_MMAP_THRESHOLD = -3  # a parameter of mallopt, from malloc.h
LARGE = 4_000_000  # bytes of a tensor that gets a mapping of its own
ON_CPU = "Use --device cpu."  # what programs with this option advise where there is no GPU to use


@dataclasses.dataclass(frozen=True)
class Choice:
    """A value that was chosen, and why."""

    value: Any
    reason: str


def choose_device(option: str, local_rank: int = 0) -> Choice:
    """The device name; raises UserError when there is none of this name, or a GPU torch cannot use."""
    if option == "cpu":
        return Choice("cpu", "asked for")
    cuda = gpus.cuda()
    by_name = {gpu.device: gpu for gpu in cuda.gpus}
    if option.startswith("cuda"):
        if not by_name:
            raise UserError(f"There is no device {option}: torch finds no CUDA GPU.", gpus.problem() or "")
        name = option if option != "cuda" else f"cuda:{local_rank}"
        if name not in by_name:
            last = cuda.gpus[-1].device
            raise UserError(f"There is no device {option}: this machine has cuda:0 to {last}.")
        check_build(by_name[name], cuda.builds)
        return Choice(name, "asked for")
    if option != "auto":
        raise UserError(f"There is no device called {option!r}.", "Choose auto, cpu, cuda or cuda:N.")
    if by_name:
        if local_rank >= len(cuda.gpus):
            problem = f"There is no GPU for process {local_rank}: torch finds {len(cuda.gpus)} of them."
            raise UserError(problem, "Name at most as many GPUs in TOT_CUDA as this machine has.")
        gpu = cuda.gpus[local_rank]
        check_build(gpu, cuda.builds)
        return Choice(gpu.device, gpu.name)
    unusable = gpus.problem()
    if unusable:
        raise UserError("nvidia-smi shows a GPU, but torch cannot use it.", unusable)
    return Choice("cpu", "no CUDA GPU found")


def check_build(gpu: gpus.Gpu, builds: tuple[str, ...]) -> None:
    """Raise UserError when this build of torch has no code for the GPU, which would only fail later.

    builds: what torch has code for.
    """
    if gpus.has_code_for(gpu.capability, builds):
        return
    import torch

    problem = (
        f"{gpu.name} has compute capability {gpu.version}, torch {torch.__version__} is built for "
        f"{' '.join(builds)}."
    )
    if gpu.capability < (7, 5):  # torch 2.13 is built for Turing and later
        raise UserError(f"{problem} No build of torch supports this GPU.")
    raise UserError(problem, f"Run: {gpus.pip_line(torch.__version__)}")


def choose_dtype(option: str, *devices: str) -> Choice:
    """The compute dtype for --dtype: fp32, fp16 or bf16.

    devices: all that compute together, as they need the same dtype; the oldest of several GPUs decides.
    """
    cards = [gpus.named(device) for device in devices if device.startswith("cuda")]
    oldest = min(cards, key=lambda gpu: gpu.capability, default=None)
    if option == "bf16" and oldest and not oldest.has_bf16:
        return Choice(option, f"asked for; {oldest.name} only emulates it, so fp16 would be faster")
    if option != "auto":
        return Choice(option, "asked for")
    if oldest:
        where = f"compute capability {oldest.version}"
        if len({gpu.capability for gpu in cards}) > 1:
            where += f" of {oldest.name} ({oldest.device})"
        if oldest.has_bf16:
            return Choice("bf16", f"{where} has bf16")
        return Choice("fp16", f"{where} is below 8.0: bf16 would be emulated; loss scaler on")
    if cpu_has_bf16():
        return Choice("bf16", "this CPU multiplies bf16 in hardware")
    return Choice("fp32", "this CPU does not multiply bf16 in hardware")


def devices_together(device: str, local_processes: int) -> list[str]:
    """The devices of all processes of a run on this machine, of which `device` is that of this process.

    local_processes: how many processes the run has on this machine; each has the GPU of its number.
    """
    if local_processes == 1 or not device.startswith("cuda"):
        return [device]
    return [gpu.device for gpu in gpus.cuda().gpus[:local_processes]]


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
        reason = "this container has no more cores" if openmp.is_ours() else "OMP_NUM_THREADS"
        return Choice(int(variable), reason)
    usable, cores = openmp.usable_cores(), openmp.physical_cores()
    threads = f", {usable} with hyper-threading" if cores < usable else ""
    return Choice(cores, f"{cores} physical cores{threads}")


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX512-BF16, AMX or Arm's bf16)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            words = set(file.read().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def cpu_name() -> str:
    """The model of the CPU, or its architecture where the system does not say the model."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """The model of the GPU or CPU that a device is; on another model the same sums round differently."""
    return gpus.named(device).name if device.startswith("cuda") else cpu_name()


def describe_machine() -> str:
    """CPU, cores and memory, for reports."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{cpu_name()}, {os.cpu_count()} cores, {gib:.0f} GiB RAM, {platform.system()} {platform.release()}"
    )


def free_memory_bytes(device: str) -> int | None:
    """Bytes that are free now: of a GPU, or of main memory for the CPU; None where they cannot be read."""
    if device.startswith("cuda"):
        return gpus.named(device).free_bytes_by_driver()
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def peak_memory_bytes(device: str) -> int:
    """The largest number of bytes used so far: allocated on the GPU, or by the whole process on the CPU."""
    if device.startswith("cuda"):
        return gpus.named(device).peak_bytes()
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
        gpus.forget_cached_memory()
    release_free_memory(device)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
