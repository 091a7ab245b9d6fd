"""Chat, the report of a merge and quantisation as on GPUs that this machine does not have.

All that is decided by a GPU is decided by what tests/support/fake_gpus.py answers; the CPU computes.
tests/training/test_fake_gpus.py shows whole trainings.
"""

import json
import math

import pytest
import torch

from onecard.config.chat import ChatConfig
from onecard.config.conversion import MergeConfig, QuantizeConfig
from onecard.config.generation import GREEDY, Generation
from onecard.config.options import build
from onecard.conversion import quantize
from onecard.data import conversation as data_conversation
from onecard.errors import UserError
from onecard.evaluation import merge_fidelity
from onecard.inference import chat
from onecard.models import base_model
from onecard.models import memory as models_memory
from onecard.runs import adapters as runs_adapters
from onecard.system import hardware
from tests.support import fake_gpus, tiny
from tests.support.adapters import save_adapter
from tests.support.fake_gpus import GIB

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = Generation(GREEDY, max_new_tokens=3)


def start(model_path, **changes) -> chat.Chat:
    settings = {"model_path": str(model_path), "template": "alpaca", **changes}
    return chat.start(ChatConfig(**settings), None)


def weight_bytes(folder, bits: int) -> int:
    config = base_model.load_config(str(folder))
    return models_memory.weight_bytes(base_model.skeleton(str(folder), config).half(), bits)


@pytest.mark.parametrize(
    ("card", "fitting", "bits"),
    [
        ("GeForce RTX 2080 Ti", 16, 16),
        ("Tesla T4", 16, 16),
        ("GeForce RTX 2080 Ti", 8, 8),
        ("GeForce RTX 2080 Ti", 4, 4),
        ("GeForce RTX 2080 Ti", 0, 4),
    ],
)
def test_chat_takes_the_most_bits_that_fit(tiny_model, monkeypatch, capsys, card, fitting, bits):
    """Weights fill at most four fifths of the free memory, and a Turing GPU answers in fp16.

    fitting: the bits of the weights that just fit; 0: none do.
    """
    needed = weight_bytes(tiny_model, fitting) if fitting else 1000
    fake_gpus.put(monkeypatch, (card, math.ceil(needed / models_memory.SAFETY) / GIB))
    session = start(tiny_model)
    *_, reply = session.stream(data_conversation.single("Say red"), SHORT)
    assert reply.text.tokens <= 3
    output = capsys.readouterr().out
    assert f"{bits} bits: {weight_bytes(tiny_model, bits) / GIB:.1f} GiB of weights" in output
    assert f"device      cuda:0 (NVIDIA {card}), compute dtype fp16: compute capability 7.5" in output
    layer = session.engine.model.get_decoder().layers[0].self_attn.q_proj.weight
    assert layer.dtype == {16: torch.float16, 8: torch.int8, 4: torch.uint8}[bits]
    if fitting:  # with one byte less there is no room
        fake_gpus.put(monkeypatch, (card, (math.ceil(needed / models_memory.SAFETY) - 1) / GIB))
        start(tiny_model)
        assert f", {max(4, bits // 2)} bits: " in capsys.readouterr().out


def test_chat_on_all_gpus_has_the_dtype_of_the_oldest(monkeypatch):
    """--device all computes in fp16 when one of the GPUs has no bf16, whatever its number."""
    from onecard.inference import loader

    fake_gpus.put(monkeypatch, ("GeForce RTX 3060", 11), ("GeForce RTX 2080 Ti", 10))
    assert loader._device("all").reason == "sharded over 2 GPUs and the CPU's memory"
    assert loader._dtype("auto", "all", exact=False).value == "fp16"
    fake_gpus.put(monkeypatch, ("GeForce RTX 3060", 11), ("A100-SXM4-80GB", 70))
    assert loader._dtype("auto", "all", exact=False).value == "bf16"


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_chat_refuses_a_card_without_code_in_torch(tiny_model, monkeypatch, device):
    fake_gpus.put(monkeypatch, ("GeForce GTX 1080", 8))
    with pytest.raises(UserError, match=r"GTX 1080 has compute capability 6\.1") as caught:
        start(tiny_model, device=device)
    assert "Use --device cpu." in str(caught.value)


def test_the_report_of_a_merge_runs_on_the_gpu(tiny_model, tmp_path, monkeypatch, capsys):
    """It computes in the dtype of the GPU and says so."""
    fake_gpus.put(monkeypatch, ("GeForce RTX 2080 Ti", 10))
    folder = save_adapter(tiny_model, tmp_path / "adapter", 1)
    adapter, rows = runs_adapters.Adapter("adapter", folder), [([2, 3, 4, 5], [False, False, True, True])]
    merge_fidelity.run(MergeConfig(data_path="rows.json"), rows, tiny_model, adapter, tiny_model)
    assert "1 rows of rows.json, 2 target tokens, fp16 on cuda:0" in capsys.readouterr().out


@pytest.mark.parametrize(("free", "on_cpu"), [(10.0, False), (0.0001, True)])
def test_quantisation_measures_where_the_model_fits(tiny_model, tmp_path, monkeypatch, capsys, free, on_cpu):
    """The folder has the dtype of the GPU; it is measured on the CPU if it does not fit."""
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: False)
    fake_gpus.put(monkeypatch, ("Tesla T4", free))
    paths = {"model_path": tiny_model, "data_path": tiny.save_rows(tmp_path / "rows.json", 12)}
    settings = {**paths, "output_path": tmp_path / "small", "method": "bnb", "report_rows": 1}
    quantize.run(build(QuantizeConfig, {name: str(value) for name, value in settings.items()}))
    assert ("measured on the CPU, because" in capsys.readouterr().out) == on_cpu
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "float16"
