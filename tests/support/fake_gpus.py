"""GPUs that this machine does not have: all that is decided by them is real, and the CPU computes."""

import dataclasses

import pytest

from onecard.system import gpus

GIB = 2**30
BUILDS = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")  # of torch 2.13's CUDA build


@dataclasses.dataclass(frozen=True)
class FakeGpu(gpus.Gpu):
    """A GPU whose facts a test names; its tensors are on the CPU."""

    free: int = 0  # bytes

    @property
    def torch_name(self) -> str:
        return "cpu"

    def select(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return self.total_bytes - self.free

    def free_bytes(self) -> int:
        return self.free

    def free_bytes_by_driver(self) -> int:
        return self.free


CARDS = {  # name -> compute capability, bytes
    "GeForce RTX 2080 Ti": ((7, 5), 11 * GIB),
    "Tesla T4": ((7, 5), 15 * GIB),
    "GeForce GTX 1080": ((6, 1), 8 * GIB),
    "GeForce RTX 3060": ((8, 6), 12 * GIB),
    "A100-SXM4-80GB": ((8, 0), 80 * GIB),
}


def plant(cards: list[tuple[str, float]]) -> gpus.Cuda:
    """Put these GPUs, each a name of CARDS and the GiB that are free, into this process; returns them."""
    machine = cuda(cards)
    gpus.cuda = lambda: machine
    return machine


def cuda(cards: list[tuple[str, float]]) -> gpus.Cuda:
    """What torch would say of a machine with these GPUs."""
    fakes = [
        FakeGpu(number, f"NVIDIA {name}", *CARDS[name], uuid=f"GPU-{number}", free=int(free * GIB))
        for number, (name, free) in enumerate(cards)
    ]
    return gpus.Cuda(tuple(fakes), BUILDS)


def put(monkeypatch: pytest.MonkeyPatch, *cards: tuple[str, float]) -> gpus.Cuda:
    """The same as plant, until the test ends."""
    machine = cuda(list(cards))
    monkeypatch.setattr(gpus, "cuda", lambda: machine)
    return machine
