"""Products with frozen weights have the right values and gradient; checkpointing really frees memory."""

import bitsandbytes as bnb
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from onecard.data.packing import PackedBatch
from onecard.models import adapter as models_adapter
from onecard.models import base_model, frozen_linear, lora_shape
from onecard.training import memory as training_memory
from onecard.training import step
from tests.support import tiny


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are still alive, wherever they are stored."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        existing = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in existing:
                    self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def total(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def quantised_layer(bits: int) -> torch.nn.Module:
    torch.manual_seed(0)
    full = torch.nn.Linear(128, 64)
    if bits == 8:
        layer = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(full.state_dict())
    layer = layer.to("cpu")
    if bits == 8 and layer.weight.CB is None:
        layer.weight = layer.weight.to("cpu")
    return layer


@pytest.mark.parametrize("bits", [8, 4])
def test_product_and_gradient_are_those_of_the_dequantised_weight(bits):
    """y = x W^T + b and dx = dy W with the weight that bitsandbytes stored; W is near the original."""
    holder = torch.nn.Sequential(quantised_layer(bits))
    assert frozen_linear.use_frozen_products(holder) == 1
    layer = holder[0]
    weight = layer.dequantise(torch.float32)
    torch.manual_seed(0)
    original = torch.nn.Linear(128, 64).weight
    assert (weight - original).norm() < (0.01 if bits == 8 else 0.15) * original.norm()
    x = torch.randn(5, 128, requires_grad=True)
    y = layer(x)
    reference = torch.nn.functional.linear(x, weight, layer.bias)
    assert torch.allclose(y, reference, atol=1e-5)
    grad = torch.randn_like(y)
    assert torch.allclose(torch.autograd.grad(y, x, grad)[0], grad @ weight, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_does_not_depend_on_its_neighbours(bits):
    """The product of one row is the same alone and beside outliers."""
    holder = torch.nn.Sequential(quantised_layer(bits))
    frozen_linear.use_frozen_products(holder)
    x = torch.randn(6, 128)
    x[3] *= 100
    assert torch.allclose(holder(x)[:1], holder(x[:1]), atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_product_keeps_nothing(bits):
    """Between forward and backward only the result is alive, neither a copy of the input nor the weight."""
    holder = torch.nn.Sequential(quantised_layer(bits))
    frozen_linear.use_frozen_products(holder)
    x = torch.randn(1000, 128, requires_grad=True)
    with LiveBytes() as live:
        y = holder(x * 1.0)  # the tensor x * 1.0 must be freed
        assert live.total() <= y.nbytes + 4096
    assert y.requires_grad


def kept_bytes(folder, bits: int, checkpointing: bool, layers: int, hidden: int, tokens: int = 256) -> int:
    """The bytes that are alive after a forward pass because the backward pass needs them."""
    config = tiny.config()
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = layers, hidden, 4 * hidden
    config.head_dim = hidden // config.num_attention_heads
    LlamaForCausalLM(config).save_pretrained(folder)
    base = base_model.load_base(str(folder), bits, "fp32", "cpu")
    adapted = models_adapter.add_adapter(base, lora_shape.LoraShape(4, 8.0, 0.0, "q_proj,v_proj"), seed=0)
    base_model.prepare_for_packed_training(adapted, checkpointing)
    step_model = step.StepModel(adapted, torch.float32)
    packed = PackedBatch(
        input_ids=torch.randint(0, 300, (1, tokens)),
        position_ids=torch.arange(tokens)[None],
        document_lengths=(tokens,),
        predicts=torch.tensor([tokens - 2]),
        targets=torch.tensor([5]),
        row_numbers=(1,),
    )
    step_model(packed)[0].backward()  # bitsandbytes prepares its states at the first pass
    with LiveBytes() as live:
        loss_sum, _, _ = step_model(packed)
        size = live.total()
    loss_sum.backward()
    return size


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_checkpointing_keeps_layers_times_hidden_only(tmp_path, bits):
    """With checkpointing one more layer adds its input (tokens x hidden) and almost nothing else."""
    tokens, hidden = 256, 192
    few = kept_bytes(tmp_path / "few", bits, True, 2, hidden, tokens)
    many = kept_bytes(tmp_path / "many", bits, True, 6, hidden, tokens)
    per_layer = (many - few) / 4
    one_input = tokens * hidden * 4
    assert one_input <= per_layer <= 1.1 * one_input
    without = kept_bytes(tmp_path / "without", bits, False, 6, hidden, tokens)
    assert without - many > 6 * 5 * one_input


def test_estimate_of_activations_is_near_what_is_kept(tmp_path):
    """memory.bytes_per_token is at least what a real forward pass keeps, and at most twice that."""
    config = tiny.config()
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 192, 768, 6
    size = kept_bytes(tmp_path / "model", 8, False, 6, 192, 256) / 256
    assert size <= training_memory.bytes_per_token(config, 4, False) <= 2 * size
