"""The predicted memory of a training, compared with what a real training holds."""

import dataclasses

import pytest
import torch

from onecard.config.training import FinetuneConfig
from onecard.data.packing import pack
from onecard.errors import UserError
from onecard.models import base_model, loss, trainable
from onecard.models.lora_shape import LoraShape
from onecard.training import memory as training_memory
from onecard.training import step
from onecard.training.trainer import make_optimizer
from onecard.ui import training_html
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def options(**changes) -> FinetuneConfig:
    return dataclasses.replace(FinetuneConfig(), **{"bits": 16, "dtype": "fp32", "batch_size": 4, **changes})


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def held(base: torch.nn.Module) -> int:
    """Bytes of a loaded base: its weights and the tables of bitsandbytes beside them."""
    total = 0
    for parameter in base.parameters():
        total += size(parameter)
        scales = getattr(parameter, "SCB", None)
        state = getattr(parameter, "quant_state", None)
        total += 0 if scales is None else size(scales)
        if state is not None:
            inner = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            total += sum(map(size, inner))
    return total


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["tiny_model", "tied_model"])
def test_weights_are_those_that_are_loaded(request, bits, dtype, kind):
    """The prediction is exact to the byte, also when embedding and head share one matrix."""
    folder = str(request.getfixturevalue(kind))
    parts = training_memory.predict(options(bits=bits, dtype=dtype), folder, "cpu", None)
    assert parts["weights"] * 2**30 == held(base_model.load_base(folder, bits, dtype, "cpu"))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["tiny_model", "tied_model"])
def test_a_folder_that_is_quantised_is_predicted_too(request, tmp_path, bits, kind):
    """Its weights are predicted but for the tables that no file holds, the rest as for any base."""
    base_model.load_base(str(request.getfixturevalue(kind)), bits, "fp32", "cpu").save_pretrained(
        tmp_path / "q"
    )
    parts = training_memory.predict(options(), str(tmp_path / "q"), "cpu", None)
    base = base_model.load_base(str(tmp_path / "q"), 16, "fp32", "cpu")
    assert parts["weights"] * 2**30 == pytest.approx(held(base), rel=0.05)
    plain = training_memory.predict(options(), str(request.getfixturevalue(kind)), "cpu", None)
    assert {**parts, "weights": 0} == {**plain, "weights": 0}
    with pytest.raises(UserError, match="cannot be trained"):
        training_memory.predict(options(train_what="full"), str(tmp_path / "q"), "cpu", None)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_r": 64, "lora_target_modules": "all-linear"},
        {"optimizer": "adamw_8bit", "lora_r": 64},
        {"train_what": "lora+embeddings"},
        {"train_what": "embeddings", "optimizer": "adamw_8bit"},
        {"train_what": "full"},
    ],
    ids=str,
)
def test_adapter_gradient_and_optimizer_are_those_of_a_step(tiny_model, changes):
    """The prediction is exact to the byte after one real step."""
    settings = options(**changes)
    parts = training_memory.predict(settings, str(tiny_model), "cpu", None)
    model = trainable.prepare(
        base_model.load_base(str(tiny_model), 16, "fp32", "cpu"), LoraShape.of(settings), 0
    )
    trained = trainable.trainable(model)
    optimizer = make_optimizer(settings, trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if name.startswith(("exp_avg", "state", "absmax"))
    ]
    counted = {
        "adapter": sum(map(size, trained)),
        "gradient": sum(size(parameter.grad) for parameter in trained),
        "optimizer": sum(map(size, moments)),
    }
    assert {name: parts[name] * 2**30 for name in counted} == counted
    assert (parts["weights"] == 0) == (settings.train_what == "full")


def test_activations_grow_with_the_micro_batch_alone(tiny_model):
    """They grow with the batch up to the token budget; gradient checkpointing needs less."""

    def predicted(**changes) -> float:
        return training_memory.predict(options(**changes), str(tiny_model), "cpu", None)["activations"]

    assert predicted(batch_size=2) < predicted(batch_size=4) < predicted(batch_size=8)
    assert predicted(batch_size=100) == predicted(batch_size=1000)
    assert predicted(batch_size=100, micro_batch_tokens=512) < predicted(batch_size=100)
    assert predicted(gradient_checkpointing="on") < predicted()
    config = base_model.load_config(str(tiny_model))
    count = training_memory.bytes_per_token(config, 4, False) * 1024
    assert predicted() * 2**30 - count == 16 * loss.CHUNK * config.vocab_size


def test_activations_are_near_what_a_forward_pass_keeps(tiny_model):
    """The prediction is within a factor of two of the tensors that autograd saves."""
    settings = options(batch_size=6, lora_target_modules="all-linear")
    examples = tiny.encoded(tiny_conversations(), tiny.tokenizer())
    model = trainable.prepare(
        base_model.load_base(str(tiny_model), 16, "fp32", "cpu"), LoraShape.of(settings), 0
    )
    packs = base_model.prepare_for_packed_training(model, checkpointing=False)
    packed = pack(examples, list(range(len(examples.lengths))))
    saved_bytes: dict[int, int] = {}
    parameter_addresses = {parameter.data_ptr() for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameter_addresses:
            saved_bytes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step.StepModel(model, torch.float32, packs)(packed)
    tokens = int(examples.lengths.sum())
    config = base_model.load_config(str(tiny_model))
    expected = tokens * training_memory.bytes_per_token(config, 4, False)
    assert 0.5 < sum(saved_bytes.values()) / expected < 2


def tiny_conversations():
    from onecard.data.conversation import Conversation, Turn

    return [
        Conversation((Turn("user", row["instruction"], row["input"]), Turn("assistant", row["output"])))
        for row in tiny.rows(12)
    ]


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"lora_target_modules": "none_such"}, "names none_such, which"), ({"model_path": "x"}, "cannot load")],
)
def test_what_cannot_be_trained_is_not_predicted(tiny_model, tmp_path, changes, word):
    """The prediction gives the same error message as the training."""
    folder = str(tmp_path if "model_path" in changes else tiny_model)
    with pytest.raises(UserError, match=word):
        training_memory.predict(options(**changes), folder, "cpu", None)


def test_the_panel_names_the_parts_and_warns():
    """The panel shows the prediction, its parts and the free memory, with an alert only if that is less."""
    parts = {"weights": 3.5, "adapter": 0.1, "gradient": 0.1, "optimizer": 0.2, "activations": 2.1}
    fits, tight = (training_html.memory(parts, gib * 2**30, "cuda:0", "en") for gib in (11, 5))
    assert "Predicted peak memory: 6.00 GiB of 11.0 GiB free on cuda:0" in fits
    assert all(f"{name} {parts[name]:.2f}" in fits for name in parts)
    assert ("alert" in fits, "alert" in tight) == (False, True)
    assert "free" not in training_html.memory(parts, None, "cuda:0", "en")
    assert "预计内存峰值：6.00 GiB" in training_html.memory(parts, 2**33, "cpu", "zh")
