"""Other base models and other kinds of adapters through the same path."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from onecard.config.training import FinetuneConfig
from onecard.data.conversation import single
from onecard.data.packing import pack
from onecard.errors import UserError
from onecard.models import adapter as models_adapter
from onecard.models import base_model, lora_shape, trainable
from onecard.models.dropout import CheapDropout
from onecard.training import step
from tests.support import tiny
from tests.support.adapters import SMALL, save_adapter
from tests.support.resume_cases import differences, flags, outcome, stopped_at

COMMON = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
GROUPED = {**COMMON, "num_key_value_heads": 4}
LLAMA_LIKE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
BLOOM = {
    "n_layer": 2,
    "n_head": 12,
    **{k: COMMON[k] for k in ("vocab_size", "hidden_size", "initializer_range")},
}
ARCHITECTURES = {  # configuration, modules that all-linear must find, whether rows can be packed
    "qwen3": (transformers.Qwen3Config(**GROUPED, head_dim=8), LLAMA_LIKE, True),
    "mistral": (transformers.MistralConfig(**GROUPED, sliding_window=None), LLAMA_LIKE, True),
    "phi3, fused": (
        transformers.Phi3Config(**GROUPED),
        {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
        True,
    ),
    "glm": (
        transformers.GlmConfig(**GROUPED, head_dim=8),
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
        True,
    ),
    "gpt-neox, fused": (
        transformers.GPTNeoXConfig(**COMMON),
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        True,
    ),
    "bloom, fused": (
        transformers.BloomConfig(**BLOOM, bos_token_id=0, eos_token_id=1),
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        False,
    ),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def other(request, tmp_path_factory) -> tuple[Path, set[str], bool]:
    """The folder of a tiny random model of another architecture, its linear modules and whether it packs."""
    config, linear, packs = ARCHITECTURES[request.param]
    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder, linear, packs


def test_all_linear_finds_the_right_modules(other):
    """It finds all of them except the head, with as many parameters as the plan says."""
    folder, linear, _ = other
    shape = lora_shape.LoraShape(4, 8.0, 0.0, "all-linear")
    planned = base_model.check_architecture(str(folder), base_model.load_config(str(folder)), shape)
    adapted = models_adapter.add_adapter(base_model.load_base(str(folder), 16, "fp32", "cpu"), shape, seed=3)
    modules = {
        n.split(".lora_")[0].rsplit(".", 1)[-1] for n, p in adapted.named_parameters() if p.requires_grad
    }
    assert modules == linear
    assert sum(p.numel() for p in trainable.trainable(adapted)) == planned


def test_the_loss_is_that_of_the_plain_model(other):
    """With rows packed or alone, the loss of each row is the one that transformers computes."""
    folder, _, packs = other
    examples = tiny.encoded([single(**row) for row in tiny.rows(5)], tiny.tokenizer())
    adapted = models_adapter.add_adapter(
        base_model.load_base(str(folder), 16, "fp32", "cpu"),
        lora_shape.LoraShape(4, 8.0, 0.0, "all-linear"),
        seed=3,
    )
    assert base_model.prepare_for_packed_training(adapted, checkpointing=False) == packs
    ours = step.StepModel(adapted, torch.float32, packs).eval()
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    expected = 0.0
    with torch.no_grad():
        for row in range(5):
            ids, is_target = (torch.from_numpy(part.copy()) for part in examples[row])
            logits = plain(ids.long()[None]).logits[0, :-1][is_target[1:]]
            expected += torch.nn.functional.cross_entropy(
                logits, ids.long()[1:][is_target[1:]], reduction="sum"
            )
        groups = [range(5)] if packs else [[row] for row in range(5)]
        got = sum(ours(pack(examples, rows))[0] for rows in groups)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("other", ["qwen3", "phi3, fused", "bloom, fused"], indirect=True)
def test_other_models_train_and_go_on(harness, other, tmp_path):
    """A stopped run continues bit for bit, the loss falls, and peft loads the adapter."""
    folder, _, packs = other
    rows, whole = tiny.save_rows(tmp_path / "rows.json", 24), tmp_path / "whole"
    answer = harness.run("finetune", flags(folder, rows, whole, lora_target_modules="all-linear"))
    assert answer["code"] == 0, answer["said"]
    assert ("one row at a time" in answer["said"]) != packs
    run = stopped_at(whole, 5, tmp_path / "run")
    assert harness.run("finetune_continue", {"output_path": run})["code"] == 0
    assert differences(outcome(whole), outcome(run)) == []
    losses = [record["eval_loss"] for record in outcome(whole)["log"] if "eval_loss" in record]
    assert min(losses) < 0.95 * losses[0]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), whole)


def test_attention_that_mixes_documents_is_seen(tiny_model, monkeypatch):
    """A model that ignores the documents' lengths is not packed, even if it claims to support it."""
    adapted = models_adapter.add_adapter(
        base_model.load_base(str(tiny_model), 16, "fp32", "cpu"),
        lora_shape.LoraShape(4, 8.0, 0.0, "q_proj"),
        seed=3,
    )
    decoder = adapted.get_base_model().get_decoder()
    plain = decoder.forward

    def deaf(input_ids, **_):
        places = torch.arange(input_ids.shape[1])[None]
        return plain(input_ids, position_ids=places, document_lengths=(input_ids.shape[1],), use_cache=False)

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "forward", deaf)
        assert base_model.prepare_for_packed_training(adapted, checkpointing=False) is False
    assert base_model.prepare_for_packed_training(adapted, checkpointing=False) is True


@pytest.mark.parametrize(
    "given",
    [{"rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}],
    ids=str,
)
def test_other_kinds_of_adapters(harness, tiny_model, tmp_path, given):
    """rsLoRA has a flag, others use --peft_config: a stopped run is bit-equal, and peft loads the adapter."""
    settings = dict(given)
    if "rslora" not in settings:
        (tmp_path / "peft.json").write_text(json.dumps(settings))
        settings = {"peft_config": tmp_path / "peft.json"}
    rows, whole = tiny.save_rows(tmp_path / "rows.json", 24), tmp_path / "whole"
    answer = harness.run("finetune", flags(tiny_model, rows, whole, **settings))
    assert answer["code"] == 0, answer["said"]
    run = stopped_at(whole, 5, tmp_path / "run")
    answer = harness.run("finetune_continue", {"output_path": run})
    assert answer["code"] == 0, answer["said"]
    assert differences(outcome(whole), outcome(run)) == []
    saved = json.loads((whole / "adapter_config.json").read_text())
    assert all(saved["use_" * (name == "rslora") + name] == value for name, value in given.items())
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), whole)
    stored = load_file(whole / "adapter_model.safetensors")
    tensors = {n.replace(".default", ""): p for n, p in loaded.named_parameters() if "lora_" in n}
    assert all(torch.equal(tensors[n if n in tensors else f"{n}.weight"], stored[n]) for n in stored)
    if "peft_config" in settings:
        (tmp_path / "peft.json").write_text('{"use_rslora": true}')
        refused = harness.run("finetune_continue", {"output_path": stopped_at(whole, 5, tmp_path / "other")})
        assert refused["code"] == 4
        assert "adapter settings" in refused["said"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[]", "does not hold a JSON object"),
        ("{", "cannot be read"),
        ('{"r": 4}', "'r' belongs to another kind"),
        ('{"modules_to_save": ["lm_head"]}', "'modules_to_save'"),
        ('{"use_dora": "yes"}', "'use_dora' cannot be 'yes'"),
        ('{"init_lora_weights": "pissa"}', "'init_lora_weights' can be"),
    ],
)
def test_wrong_settings_of_an_adapter_are_named(tmp_path, text, word):
    """The exit code is 2 with the file and the setting."""
    (tmp_path / "peft.json").write_text(text)
    with pytest.raises(UserError, match=word) as caught:
        lora_shape.read_extras(str(tmp_path / "peft.json"), rslora=False)
    assert caught.value.code == 2


LAYER = "q_proj"


def lora_layer(model: PeftModel) -> torch.nn.Module:
    """The first adapter layer of the first block."""
    return model.get_base_model().get_decoder().layers[0].self_attn.get_submodule(LAYER)


def test_adapters_are_mixed_by_their_weights(tiny_model, tmp_path):
    """The output of a layer is the base's and the weighted sum of what each active adapter adds."""
    folders = {
        name: save_adapter(tiny_model, tmp_path / name, seed) for seed, name in enumerate(("one", "v1.1"))
    }
    model = base_model.load_base(str(tiny_model), 16, "fp32", "cpu")
    for name, folder in folders.items():
        model = models_adapter.attach(model, folder, name)
    layer, inputs = lora_layer(model), torch.randn(3, 96, generator=torch.Generator().manual_seed(4))
    base = layer.get_base_layer()(inputs)
    added = {}
    for name, folder in folders.items():
        tensors = load_file(folder / "adapter_model.safetensors")
        a, b = (tensors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight"] for x in "AB")
        added[name] = inputs @ a.T @ b.T * SMALL["lora_alpha"] / SMALL["r"]
    for weights in ({"one": 1.0}, {"v1.1": 0.5}, {"one": 0.25, "v1.1": -2.0}, {}, {"one": 0.5, "v1.1": 1.0}):
        models_adapter.mix(model, weights)
        expected = base + sum(weight * added[name] for name, weight in weights.items())
        assert torch.allclose(layer(inputs), expected, atol=1e-5), weights
    assert not model.training


@pytest.mark.parametrize(
    ("what", "is_tied", "names"),
    [
        ("lora", False, []),
        ("lora", True, []),
        ("embeddings", False, ["model.embed_tokens"]),
        ("embeddings", True, ["model.embed_tokens"]),
        ("lora+embeddings", False, ["model.embed_tokens", "lm_head"]),
        ("lora+embeddings", True, ["model.embed_tokens"]),
    ],
)
def test_modules_that_are_trained_whole(tiny_model, tied_model, what, is_tied, names):
    """A head that is tied to the embedding follows it, and is no module of its own."""
    base = base_model.load_base(str(tied_model if is_tied else tiny_model), 16, "fp32", "cpu")
    shape = lora_shape.LoraShape(4, 8.0, 0.0, "q_proj", what=what)
    assert models_adapter.trained_whole(base, shape) == names
    adapted = models_adapter.add_adapter(base, shape, seed=3)
    assert {parameter.dtype for parameter in trainable.trainable(adapted)} == {torch.float32}
    tensors = models_adapter.adapter_tensors(adapted)
    assert models_adapter.learned_nothing(adapted, tensors)
    with torch.no_grad():
        last = trainable.trainable(adapted)[-1]
        last.view(-1)[-1] += 1
    assert not models_adapter.learned_nothing(adapted, models_adapter.adapter_tensors(adapted))


def test_tensors_that_are_not_named_stay_as_they_are(tiny_model):
    adapted = models_adapter.add_adapter(
        base_model.load_base(str(tiny_model), 16, "fp32", "cpu"),
        lora_shape.LoraShape(4, 8.0, 0.0, "q_proj"),
        seed=3,
    )
    before = {name: tensor.clone() for name, tensor in models_adapter.adapter_tensors(adapted).items()}
    chosen = next(name for name in before if "lora_B" in name)
    models_adapter.set_tensors(adapted, {chosen: torch.full_like(before[chosen], 0.5).double()})
    for name, tensor in models_adapter.adapter_tensors(adapted).items():
        expected = torch.full_like(tensor, 0.5) if name == chosen else before[name]
        assert torch.equal(tensor, expected), name


def test_the_initial_weights_depend_on_the_seed_alone(tiny_model):
    """They change no random state, and dropout on a CPU is the cheap one."""

    def weights(seed: int, state: int) -> list[torch.Tensor]:
        base = base_model.load_base(str(tiny_model), 16, "fp32", "cpu")
        torch.manual_seed(state)
        expected = torch.rand(3)
        torch.manual_seed(state)
        adapted = models_adapter.add_adapter(base, lora_shape.LoraShape(4, 8.0, 0.1, "q_proj"), seed)
        assert torch.equal(torch.rand(3), expected)
        assert isinstance(lora_layer(adapted).lora_dropout["default"], CheapDropout)
        return list(models_adapter.adapter_tensors(adapted).values())

    first, again, other = weights(3, 1), weights(3, 2), weights(4, 1)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({"target_modules": ["nonesuch"]}, None),
        ({"r": 8}, None),
        ({"r": "many"}, None),
        ({"rank_pattern": {"(": 3}}, None),
        ({}, {"more": torch.ones(2)}),
        ({}, {}),
        ({}, {"model.norm.weight": torch.ones(96)}),
    ],
    ids=["modules", "rank", "no rank", "pattern", "one more", "one less", "a tensor of the base"],
)
def test_an_adapter_that_does_not_fit_is_named(tiny_model, tmp_path, settings, values):
    """The exit code is 4, with the folder; the model may have been changed, and is not used."""
    folder = save_adapter(tiny_model, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    if values is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors = {**tensors, **values} if values else dict(list(tensors.items())[1:])
        save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="does not fit this base model") as caught:
        models_adapter.attach(base_model.load_base(str(tiny_model), 16, "fp32", "cpu"), folder, "one")
    assert caught.value.code == 4
    assert str(folder) in caught.value.problem


def test_out_of_memory_is_no_adapter_that_does_not_fit(tiny_model, tmp_path, monkeypatch):
    folder = save_adapter(tiny_model, tmp_path / "adapter")

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PeftModel, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        models_adapter.attach(base_model.load_base(str(tiny_model), 16, "fp32", "cpu"), folder, "one")


@pytest.mark.parametrize("kind", [ValueError, TypeError, KeyError, IndexError, re.error])
def test_what_peft_raises_for_settings_names_the_option(kind, monkeypatch):
    """peft has no error of its own: which of these comes depends on the setting."""

    def refuse(*_):
        raise kind("no such thing")

    monkeypatch.setattr(models_adapter, "get_peft_model", refuse)
    base = transformers.AutoModelForCausalLM.from_config(tiny.config())
    with pytest.raises(UserError, match=r"peft cannot make this adapter: .*no such thing.*--peft_config"):
        models_adapter.add_adapter(base, lora_shape.LoraShape.of(FinetuneConfig()), seed=0)


def test_weights_that_are_not_trained_in_fp32_are_an_error_of_ours(monkeypatch):
    """Should peft one day make them in the dtype of the base, no run may go on with that in silence."""
    make = models_adapter.get_peft_model
    monkeypatch.setattr(models_adapter, "get_peft_model", lambda *inputs: make(*inputs).bfloat16())
    base = transformers.AutoModelForCausalLM.from_config(tiny.config())
    with pytest.raises(AssertionError, match="fp32"):
        models_adapter.add_adapter(base, lora_shape.LoraShape.of(FinetuneConfig()), seed=0)
