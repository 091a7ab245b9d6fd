"""The GPUs that torch can use: what they are, how much of their memory is free, and where torch computes.

All that depends on a GPU is decided by what this file answers, and no other file uses torch.cuda. So a test
can name GPUs that the machine does not have. torch is imported inside the functions that need it, so that
--help does not wait for it.
"""

import dataclasses
import os
import subprocess

from onecard.system import commands

FIRST_WITH_BF16 = (8, 0)  # compute capability; GPUs before it only emulate bf16, which is slow
NEWEST_DRIVER = 580  # what the CUDA 13 build of torch asks for


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use."""

    number: int  # that of torch, which is not always that of nvidia-smi
    name: str
    capability: tuple[int, int]  # the compute capability 7.5 is (7, 5)
    total_bytes: int
    uuid: str  # as nvidia-smi takes it

    @property
    def device(self) -> str:
        """The name of the device for the user, as in cuda:0."""
        return f"cuda:{self.number}"

    @property
    def version(self) -> str:
        """The compute capability as text, as in 7.5."""
        return ".".join(map(str, self.capability))

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies bf16 in hardware; torch.cuda.is_bf16_supported() also counts emulation."""
        return self.capability >= FIRST_WITH_BF16

    @property
    def torch_name(self) -> str:
        """The torch device of its tensors."""
        return self.device

    def select(self) -> None:
        """Let torch compute on this GPU where nothing else is said, and always in the same way."""
        import torch

        torch.cuda.set_device(self.torch_name)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
        torch.use_deterministic_algorithms(True, warn_only=True)

    def peak_bytes(self) -> int:
        """The largest number of bytes that tensors of this process took so far."""
        import torch

        return torch.cuda.max_memory_allocated(self.torch_name)

    def free_bytes(self) -> int:
        """Bytes that are free now, for a program that computes on the GPU: torch makes its CUDA context."""
        import torch

        return torch.cuda.mem_get_info(self.torch_name)[0]

    def free_bytes_by_driver(self) -> int | None:
        """Bytes that are free now, as nvidia-smi says; None where it does not. This needs no CUDA context."""
        answer = _ask_driver(["-i", self.uuid, "--query-gpu=memory.free", "--format=csv,noheader,nounits"])
        first = (answer or "").split()[:1]
        return int(first[0]) * 2**20 if first and first[0].isdecimal() else None


@dataclasses.dataclass(frozen=True)
class Cuda:
    """The GPUs that torch can use, in torch's order, and what this build of torch has code for."""

    gpus: tuple[Gpu, ...]
    builds: tuple[str, ...]  # sm_75, compute_90, ...


def cuda() -> Cuda:
    """What torch says about CUDA on this machine; without a usable GPU there are none."""
    import torch

    if not torch.cuda.is_available():
        return Cuda((), ())
    gpus = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        capability = (facts.major, facts.minor)
        gpus.append(Gpu(number, facts.name, capability, facts.total_memory, f"GPU-{facts.uuid}"))
    return Cuda(tuple(gpus), tuple(torch.cuda.get_arch_list()))


def named(device: str) -> Gpu:
    """The GPU of a device that exists; device: cuda or cuda:N."""
    return cuda().gpus[int(device.partition(":")[2] or 0)]


def torch_name(device: str) -> str:
    """The torch device of the tensors of a device that exists; device: cpu, mps, cuda or cuda:N."""
    return named(device).torch_name if device.startswith("cuda") else device


def forget_cached_memory() -> None:
    """Give memory that torch keeps for later tensors back to the GPUs."""
    import torch

    torch.cuda.empty_cache()


def has_code_for(capability: tuple[int, int], builds: tuple[str, ...]) -> bool:
    """Whether one of `builds` (sm_75, compute_90, ...) runs on a GPU of this compute capability.

    By CUDA's rules of binary compatibility that is code for the same major version and no later minor one, or
    intermediate code for any earlier version.
    """
    for build in builds:
        kind, _, digits = build.partition("_")
        digits = digits.rstrip("af")
        version = (int(digits[:-1]), int(digits[-1]))
        if kind == "compute" and version <= capability:
            return True
        if kind == "sm" and version[0] == capability[0] and version[1] <= capability[1]:
            return True
    return False


def problem() -> str | None:
    """Why torch cannot use the GPU that nvidia-smi shows, and what to type; None where it shows none."""
    answer = _ask_driver(["--query-gpu=name,driver_version", "--format=csv,noheader"])
    lines = [line for line in (answer or "").splitlines() if "," in line]
    if not lines:
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
    return f"{facts} {update}Run: {pip_line(torch.__version__)}"


def _ask_driver(arguments: list[str]) -> str | None:
    """What nvidia-smi prints; None where there is none, or where it fails or takes longer than 20 s."""
    command = ["nvidia-smi", *arguments]
    try:
        ended = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout


def pip_line(version: str) -> str:
    """The command that installs the CUDA build of this torch from the package index; other versions stay."""
    return commands.pip_install(f"torch=={version.split('+')[0]}", "--force-reinstall --no-cache-dir ")
