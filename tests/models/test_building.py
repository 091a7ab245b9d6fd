"""Two models in one process: a memory prediction while the chat loads its weights, and what it may change."""

import ast
import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from onecard.config.training import FinetuneConfig
from onecard.models import base_model
from onecard.training import memory as training_memory
from tests.support import tiny
from tests.support.paths import ROOT

OTHER = 0.5  # seconds in which another thread would reach a place that it must not reach
OPTIONS = dataclasses.replace(FinetuneConfig(), bits=16, dtype="fp32", batch_size=4)


@pytest.fixture(scope="module")
def half_model(tmp_path_factory) -> Path:
    """A model whose config.json says bf16, like most on the hub."""
    folder = tiny.save_model(tmp_path_factory.mktemp("half") / "model", num_hidden_layers=4)
    model = base_model.load_base(str(folder), 16, "bf16", "cpu")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def at_each_layer(monkeypatch) -> Callable[[Callable[[int], None]], None]:
    """A function that has a hook called with the layer's number before each layer is built."""

    def call(hook: Callable[[int], None]) -> None:
        original = modeling_llama.LlamaDecoderLayer.__init__

        def init(layer: Any, config: Any, layer_idx: int) -> None:
            hook(layer_idx)
            original(layer, config, layer_idx)

        monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "__init__", init)

    return call


def dtypes(made: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in made.parameters()}


def test_a_prediction_does_not_change_the_default_dtype(half_model, at_each_layer):
    """It does not change even while transformers builds the model, since another thread may compute then."""
    seen = []
    with ThreadPoolExecutor(1) as other:
        at_each_layer(lambda _: seen.append(other.submit(torch.get_default_dtype).result()))
        training_memory.predict(OPTIONS, str(half_model), "cpu", None)
    assert len(seen) >= 4
    assert set(seen) == {torch.float32}


def test_a_skeleton_leaves_the_config_alone(half_model):
    config = base_model.load_config(str(half_model))
    assert dtypes(base_model.skeleton(str(half_model), config)) == {torch.float32}
    assert config.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_is_whole_whatever_is_predicted_meanwhile(half_model, at_each_layer, dtype):
    """One thread loads and another predicts, each in the middle of the other's work if that is possible."""
    loading, predicting, loaded = threading.Event(), threading.Event(), threading.Event()

    def meet(layer: int) -> None:
        is_loader = threading.current_thread().name.startswith("load")
        if is_loader and layer == 2:
            loading.set()
            predicting.wait(OTHER)
        elif not is_loader and layer == 2:
            predicting.set()
            loaded.wait(OTHER)

    def load() -> torch.nn.Module:
        try:
            return base_model.load_base(str(half_model), 16, dtype, "cpu")
        finally:
            loaded.set()

    def predict() -> dict[str, float]:
        assert loading.wait(30)
        return training_memory.predict(OPTIONS, str(half_model), "cpu", None)

    expected = training_memory.predict(OPTIONS, str(half_model), "cpu", None)
    at_each_layer(meet)
    with ThreadPoolExecutor(1, "load") as one, ThreadPoolExecutor(1, "predict") as two:
        model, parts = one.submit(load), two.submit(predict)
        model, parts = model.result(), parts.result()
    assert dtypes(model) == {base_model.DTYPES[dtype]}
    assert torch.get_default_dtype() == torch.float32
    assert parts == expected
    with torch.no_grad():
        assert model(torch.arange(2, 10)[None]).logits.isfinite().all()


BUILDERS = {"get_peft_model", "load_adapter", "from_config", "from_pretrained", "read", "build", "load"}
OF_MODELS = {"AutoModelForCausalLM", "PeftModel", "GPTQModel", "model", ""}


def unguarded(source: str) -> list[str]:
    """Calls that build a model or an adapter outside of `with build_lock.alone()`."""
    calls = []

    def builds(call: ast.Call) -> str:
        owner, _, name = ast.unparse(call.func).rpartition(".")
        through_consent = owner == "code" and any(
            ast.unparse(argument).startswith("AutoModel") for argument in call.args
        )
        of_model = owner.rpartition(".")[2] in OF_MODELS and (owner or name == "get_peft_model")
        return name if name in BUILDERS and (of_model or through_consent) else ""

    def look(node: ast.AST, alone: bool) -> None:
        if isinstance(node, ast.With):
            alone = alone or any(
                ast.unparse(each.context_expr) == "build_lock.alone()" for each in node.items
            )
        if isinstance(node, ast.Call) and builds(node) and not alone:
            calls.append(ast.unparse(node))
        for child in ast.iter_child_nodes(node):
            look(child, alone)

    look(ast.parse(source), False)
    return calls


def test_every_model_is_built_alone():
    """This holds in the whole library, and each kind of unguarded call is found."""
    for path in sorted((ROOT / "onecard").rglob("*.py")):
        assert unguarded(path.read_text(encoding="utf-8")) == [], path.name
    for call in (
        "AutoModelForCausalLM.from_pretrained(path)",
        "AutoModelForCausalLM.from_config(config)",
        "code.read(AutoModelForCausalLM, **settings)",
        "code.build(AutoModelForCausalLM, config)",
        "PeftModel.from_pretrained(base, folder)",
        "model.load_adapter(folder)",
        "get_peft_model(base, config)",
        "library.GPTQModel.load(folder)",
    ):
        assert unguarded(f"with other():\n    {call}") == [call]
        assert unguarded(f"with build_lock.alone(), other():\n    {call}") == []
    assert unguarded("AutoTokenizer.from_pretrained(path)\ncode.read(AutoConfig)\nmodel.skeleton(path)") == []
