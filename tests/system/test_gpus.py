"""What is chosen for GPUs that this machine does not have: device, compute dtype, gradient checkpointing."""

import ast
import types

import pytest
import torch

from onecard.errors import USAGE, UserError
from onecard.system import gpus, hardware
from tests.support import fake_gpus
from tests.support.fake_gpus import GIB
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("card", "dtype", "words"),
    [
        ("GeForce RTX 2080 Ti", "fp16", "compute capability 7.5 is below 8.0"),
        ("Tesla T4", "fp16", "loss scaler on"),
        ("GeForce RTX 3060", "bf16", "compute capability 8.6 has bf16"),
        ("A100-SXM4-80GB", "bf16", "compute capability 8.0 has bf16"),
    ],
)
def test_each_card_has_its_dtype(monkeypatch, card, dtype, words):
    """bf16 needs compute capability 8.0; before it fp16. Gradient checkpointing is on for every GPU."""
    fake_gpus.put(monkeypatch, (card, 6))
    device = hardware.choose_device("auto")
    assert (device.value, device.reason) == ("cuda:0", f"NVIDIA {card}")
    choice = hardware.choose_dtype("auto", device.value)
    assert choice.value == dtype
    assert words in choice.reason
    assert hardware.choose_checkpointing("auto", device.value).value
    assert not hardware.choose_checkpointing("off", device.value).value
    hardware.check_optimizer("paged_adamw_8bit", device.value)


def test_a_dtype_that_the_gpu_emulates_is_said(monkeypatch):
    """--dtype bf16 is obeyed on a Turing GPU, and the user is told that fp16 would be faster there."""
    fake_gpus.put(monkeypatch, ("Tesla T4", 15), ("GeForce RTX 3060", 12))
    slow, fast = (hardware.choose_dtype("bf16", f"cuda:{number}") for number in (0, 1))
    assert (slow.value, fast.value, fast.reason) == ("bf16", "bf16", "asked for")
    assert "NVIDIA Tesla T4 only emulates it" in slow.reason
    assert hardware.choose_dtype("fp32", "cuda:0") == hardware.Choice("fp32", "asked for")


@pytest.mark.parametrize("option", ["auto", "cuda", "cuda:0"])
def test_a_card_without_code_in_torch_is_refused(monkeypatch, option):
    """A GTX 1080 is refused before anything is loaded, and the message says that no build helps."""
    fake_gpus.put(monkeypatch, ("GeForce GTX 1080", 8))
    with pytest.raises(UserError, match=r"GTX 1080 has compute capability 6\.1.*No build of torch") as caught:
        hardware.choose_device(option)
    assert caught.value.code == USAGE


def test_each_process_has_its_card(monkeypatch):
    """The device is that of the process; a process without a GPU and a number without a GPU are refused."""
    fake_gpus.put(monkeypatch, ("GeForce RTX 3060", 12), ("GeForce RTX 2080 Ti", 11))
    assert [hardware.choose_device("auto", rank).value for rank in (0, 1)] == ["cuda:0", "cuda:1"]
    assert [hardware.choose_device("cuda", rank).value for rank in (0, 1)] == ["cuda:0", "cuda:1"]
    assert hardware.choose_device("cuda:1").value == "cuda:1"
    with pytest.raises(UserError, match="no GPU for process 2: torch finds 2"):
        hardware.choose_device("auto", 2)
    with pytest.raises(UserError, match="this machine has cuda:0 to cuda:1"):
        hardware.choose_device("cuda:2")


def test_the_oldest_card_decides_for_all(monkeypatch):
    """GPUs that compute together have one dtype: bf16 if each has it. Other GPUs do not count."""
    fake_gpus.put(monkeypatch, ("GeForce RTX 3060", 12), ("GeForce RTX 2080 Ti", 11), ("A100-SXM4-80GB", 80))
    assert hardware.devices_together("cuda:1", 1) == ["cuda:1"]
    assert hardware.devices_together("cuda:1", 2) == ["cuda:0", "cuda:1"]
    assert hardware.devices_together("cpu", 2) == ["cpu"]
    together = hardware.choose_dtype("auto", "cuda:0", "cuda:1", "cuda:2")
    assert together.value == "fp16"
    assert "7.5 of NVIDIA GeForce RTX 2080 Ti (cuda:1)" in together.reason
    assert hardware.choose_dtype("auto", "cuda:0", "cuda:2").value == "bf16"


def test_what_torch_says_of_a_gpu(monkeypatch):
    """Name, capability and memory are those of torch; free memory is what is free, not what there is."""
    facts = types.SimpleNamespace(name="NVIDIA X", major=7, minor=5, total_memory=11 * GIB, uuid="12ab")
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda number: facts,
        "get_arch_list": lambda: ["sm_75", "sm_80"],
        "mem_get_info": lambda device: {"cuda:0": (3 * GIB, 11 * GIB), "cuda:1": (2 * GIB, 11 * GIB)}[device],
        "max_memory_allocated": {"cuda:0": 5, "cuda:1": 6}.__getitem__,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    machine = gpus.cuda()
    assert machine.builds == ("sm_75", "sm_80")
    assert machine.gpus == tuple(gpus.Gpu(n, "NVIDIA X", (7, 5), 11 * GIB, "GPU-12ab") for n in (0, 1))
    assert [gpu.free_bytes() for gpu in machine.gpus] == [3 * GIB, 2 * GIB]
    assert [hardware.peak_memory_bytes(gpu.device) for gpu in machine.gpus] == [5, 6]
    assert gpus.named("cuda:1").number == 1
    assert [gpus.torch_name(device) for device in ("cpu", "mps", "cuda:1")] == ["cpu", "mps", "cuda:1"]


def test_without_a_gpu_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpus.cuda() == gpus.Cuda((), ())


def test_free_memory_is_asked_of_the_driver(monkeypatch, tmp_path):
    """nvidia-smi may number GPUs otherwise than torch, so it is asked by UUID; it may not answer."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\ntest "$1 $2" = "-i GPU-12ab" && echo 1024\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    first, second = (gpus.Gpu(n, "", (7, 5), 0, uuid) for n, uuid in enumerate(("GPU-12ab", "GPU-34cd")))
    monkeypatch.setattr(gpus, "cuda", lambda: gpus.Cuda((first, second), ()))
    assert hardware.free_memory_bytes("cuda:0") == GIB
    assert hardware.free_memory_bytes("cuda:1") is None
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert hardware.free_memory_bytes("cuda:0") is None
    assert hardware.free_memory_bytes("cpu") > 0


def users_of_cuda(source: str) -> bool:
    """Whether a source uses torch.cuda."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "cuda"
            and getattr(node.value, "id", "") == "torch"
        ):
            return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.cuda"):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and node.names[0].name == "cuda":
            return True
        if isinstance(node, ast.Import) and any(alias.name.startswith("torch.cuda") for alias in node.names):
            return True
    return False


def test_one_file_asks_cuda():
    """All other files decide by what it answers, so the GPUs of these tests are seen everywhere."""
    planted = ("import torch.cuda", "from torch import cuda", "from torch.cuda import mem_get_info")
    assert all(map(users_of_cuda, [*planted, "def f():\n    return torch.cuda.mem_get_info(0)"]))
    paths = [path for path in (ROOT / "onecard").rglob("*.py") if users_of_cuda(path.read_text("utf-8"))]
    assert [str(path.relative_to(ROOT)) for path in paths] == ["onecard/system/gpus.py"]
