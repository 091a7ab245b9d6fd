"""Other base models and other kinds of adapters through the same path."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from onecard.data.conversation import single
from onecard.data.packing import pack
from onecard.errors import UserError
from onecard.models import adapter as models_adapter
from onecard.models import base_model, lora_shape, trainable
from onecard.training import step
from tests.support import tiny
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
