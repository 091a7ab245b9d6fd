"""A merged model answers as base + adapter does, for every kind of module; what does not fit is refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from onecard.config.conversion import MergeConfig
from onecard.conversion import lora_delta, merge
from onecard.errors import CHECKPOINT, DATA, DISK, USAGE, UserError
from onecard.evaluation import merge_fidelity
from onecard.hub import locate, model_files
from onecard.models import base_model, tensor_files
from onecard.models import tokenizer as models_tokenizer
from onecard.runs import adapters as runs_adapters
from onecard.runs import folder as runs_folder
from onecard.system import hashing, output_folder
from tests.support import console, kill_points, tiny

LLAMA_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_of(kind: str, folder: Path, **changes: Any) -> Path:
    """A small base in fp32 with a tokenizer."""
    torch.manual_seed(0)
    if kind == "llama":
        return tiny.save_model(folder, **changes)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    else:
        model = BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def adapter_of(base: Path, folder: Path, resize: int | None = None, **settings: Any) -> Path:
    """A LoRA adapter as peft saves it, with random numbers in all of its tensors."""
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resize:
        bare.resize_token_embeddings(resize)
    model = get_peft_model(
        bare, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grown = parameter.data * (1 + 0.3 * torch.rand_like(parameter))
            is_magnitude = "magnitude" in name
            parameter.data = grown if is_magnitude else parameter.data + torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    return folder


def run(base: Path | None, adapter: Path, target: Path, **more: Any) -> list[str]:
    path = str(base) if base else None
    options = MergeConfig(model_path=path, lora_path=str(adapter), output_path=str(target), **more)
    with console.heard() as lines:
        merge.run(options, lambda done, total: None)
    return lines


def refused(code: int, *words: str, **arguments: Any) -> None:
    with pytest.raises(UserError) as caught:
        run(**arguments)
    assert caught.value.code == code, caught.value
    assert all(word in str(caught.value) for word in words), caught.value


def logits(made: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        return made.eval()(input_ids=ids).logits


def unmerged(base: Path, adapter: Path, resize: int | None = None) -> torch.Tensor:
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resize:
        bare.resize_token_embeddings(resize)
    return logits(PeftModel.from_pretrained(bare, adapter))


def check_equal(base: Path, adapter: Path, target: Path, resize: int | None = None) -> torch.nn.Module:
    """The merged model has the logits of base + adapter, which differ from those of the base model."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    merged, expected = logits(model), unmerged(base, adapter, resize)
    scale = expected.abs().max()
    assert (merged - expected).abs().max() < 1e-5 * max(1, scale)
    plain = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert plain.shape != expected.shape or (plain - expected).abs().max() > 1e-3 * scale
    return model


SETTINGS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all linear": {"target_modules": LLAMA_ALL},
    "rsLoRA": {"target_modules": LLAMA_ALL, "use_rslora": True, "r": 9},
    "DoRA": {"target_modules": LLAMA_ALL, "use_dora": True},
    "patterns": {
        "target_modules": LLAMA_ALL,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"v_proj": 3, "^model.layers.0.mlp.gate_proj": 5},
    },
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "a whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "a whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "a whole norm": {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", SETTINGS)
def test_llama(tmp_path, name, tied):
    """Every kind of module of a Llama model, with its head tied to the embedding or not."""
    base = base_of("llama", tmp_path / "base", tie_word_embeddings=tied)
    adapter = adapter_of(base, tmp_path / "adapter", **SETTINGS[name])
    run(base, adapter, tmp_path / "made")
    check_equal(base, adapter, tmp_path / "made")


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"bias": "all"}], ids=["plain", "DoRA", "bias"])
@pytest.mark.parametrize("kind", ["gpt2", "bloom"])
def test_other_architectures(tmp_path, kind, settings):
    """Bloom, and GPT-2, whose Conv1D weights are transposed; both have biases and a tied head."""
    base = base_of(kind, tmp_path / "base")
    modules = {"gpt2": ["c_attn", "c_proj", "c_fc"], "bloom": ["query_key_value", "dense", "dense_h_to_4h"]}
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=modules[kind], **settings)
    run(base, adapter, tmp_path / "made")
    check_equal(base, adapter, tmp_path / "made")


def test_bias_of_b(tmp_path):
    """With lora_bias, B also adds something to a bias."""
    base = base_of("gpt2", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["c_attn"], lora_bias=True)
    run(base, adapter, tmp_path / "made")
    check_equal(base, adapter, tmp_path / "made")


def test_names_without_the_inner_models_prefix(tmp_path):
    """The files of GPT-2 on the hub leave out the prefix `transformer.`."""
    base = base_of("gpt2", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["c_attn"])
    run(base, adapter, tmp_path / "made")
    check_equal(base, adapter, tmp_path / "made")
    assert load_file(tmp_path / "made/model.safetensors").keys() == short.keys()


@pytest.mark.parametrize("name", ["attention", "the head", "a whole embedding"])
def test_a_head_of_its_own_in_a_base_that_says_tied(tmp_path, name):
    """transformers ties only equal tensors: a different head stays, and the merged model's config says so."""
    base = base_of("llama", tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    for head, tied in ((tensors["model.embed_tokens.weight"].clone(), True), (torch.randn(300, 96), False)):
        both = {**tensors, "lm_head.weight": head}
        save_file(both, base / "model.safetensors", metadata={"format": "pt"})
        adapter = adapter_of(base, tmp_path / f"adapter{tied}", **SETTINGS[name])
        run(base, adapter, tmp_path / f"made{tied}")
        model = check_equal(base, adapter, tmp_path / f"made{tied}")
        assert model.config.tie_word_embeddings == (tied and name == "attention")
        assert ("lm_head.weight" in read(tmp_path / f"made{tied}")) != model.config.tie_word_embeddings


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resized_vocabulary(tmp_path, tied):
    """With more tokens than the base model, embedding and head grow, and the tokenizer is the adapter's."""
    base = base_of("llama", tmp_path / "base", tie_word_embeddings=tied)
    modules = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    adapter = adapter_of(
        base,
        tmp_path / "adapter",
        resize=304,
        target_modules=["q_proj"],
        modules_to_save=modules,
        ensure_weight_tying=tied,
    )
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save_pretrained(adapter)
    run(base, adapter, tmp_path / "made")
    model = check_equal(base, adapter, tmp_path / "made", resize=304)
    assert model.config.vocab_size == 304
    assert model.config.tie_word_embeddings == tied
    assert "<b>" in models_tokenizer.load_tokenizer(str(tmp_path / "made")).get_vocab()


def test_our_own_embedding_adapter(tmp_path):
    """OneCard saves trained tied embeddings under both names; the merged head is still tied."""
    base = base_of("llama", tmp_path / "base", tie_word_embeddings=True)
    settings = {
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
        "target_modules": ["q_proj"],
    }
    adapter = adapter_of(base, tmp_path / "adapter", **settings)
    run(base, adapter, tmp_path / "made")
    model = check_equal(base, adapter, tmp_path / "made")
    assert model.config.tie_word_embeddings
    assert "lm_head.weight" not in load_file(tmp_path / "made/model.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_stored_in_the_bases_dtype(tmp_path, dtype, monkeypatch):
    """Sums are made in fp32 and rounded once, in blocks over several files; other tensors are copied."""
    monkeypatch.setattr(tensor_files, "BLOCK", 5000)
    tiny.save_model(tmp_path / "fp32")
    AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=dtype).save_pretrained(
        tmp_path / "base", max_shard_size="100KB"
    )
    adapter = adapter_of(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    run(tmp_path / "base", adapter, tmp_path / "made")
    before, after = (read(tmp_path / name) for name in ("base", "made"))
    names = [[path.name for path in model_files.files_of(tmp_path / name)] for name in ("base", "made")]
    assert names[0] == names[1]
    assert len(names[0]) > 2
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, weight in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in tensors:
            delta = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"] * 2
            assert torch.equal(after[name], (weight.float() + delta).to(dtype)) or torch.allclose(
                after[name].float(), weight.float() + delta, rtol=torch.finfo(dtype).eps
            )
            assert not torch.equal(after[name], weight)
        else:
            assert torch.equal(after[name], weight)
        assert after[name].dtype == dtype


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in model_files.files_of(folder) for k, v in load_file(path).items()}


# what does not fit


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A base and an adapter that fit."""
    place = tmp_path_factory.mktemp("pair")
    base = base_of("llama", place / "base")
    return base, adapter_of(base, place / "adapter", target_modules=["q_proj", "v_proj"])


def change_tensors(how: Any) -> Any:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(how(tensors), folder / "adapter_model.safetensors")

    return apply


def change_config(**settings: Any) -> Any:
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return apply


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
MISFITS = {
    "a key less": (
        change_tensors(lambda h: {k: v for k, v in h.items() if k != f"{Q0}.lora_B.weight"}),
        "lora_B",
    ),
    "a module less": (change_tensors(lambda h: {k: v for k, v in h.items() if not k.startswith(Q0)}), Q0),
    "renamed": (change_tensors(lambda h: {k.replace("q_proj", "query"): v for k, v in h.items()}), "query"),
    "no prefix": (
        change_tensors(lambda h: {k.removeprefix("base_model."): v for k, v in h.items()}),
        "model.",
    ),
    "a key more": (
        change_tensors(lambda h: {**h, f"{lora_delta.PREFIX}x.weight": torch.ones(2)}),
        "x.weight",
    ),
    "another rank": (change_config(r=8), "its rank is 8"),
    "not finite": (
        change_tensors(lambda h: {**h, f"{Q0}.lora_A.weight": h[f"{Q0}.lora_A.weight"] / 0}),
        "finite",
    ),
    "other targets": (change_config(target_modules=["q_proj"]), "v_proj"),
    "no such target": (change_config(target_modules=["query"]), "query"),
    "DoRA without magnitudes": (change_config(use_dora=True), "lora_magnitude_vector"),
    "another start": (change_config(init_lora_weights="pissa"), "pissa"),
    "another kind": (change_config(peft_type="IA3"), "LoRA"),
}


@pytest.mark.parametrize("fault", MISFITS)
def test_adapters_that_do_not_fit(tmp_path, pair, fault):
    """X5: missing, renamed and unknown keys, a wrong rank and other kinds are named, with exit code 4."""
    base, adapter = pair
    shutil.copytree(adapter, tmp_path / "adapter")
    make, word = MISFITS[fault]
    make(tmp_path / "adapter")
    refused(CHECKPOINT, word, base=base, adapter=tmp_path / "adapter", target=tmp_path / "out/made")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 48}, {"num_key_value_heads": 12}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}],
    ids=["narrower", "more KV heads", "deeper", "flatter"],
)
def test_a_wrong_base(tmp_path, pair, changes):
    """X5: a base model of other sizes gives exit code 4 and the list of keys."""
    base = base_of("llama", tmp_path / "base", **changes)
    refused(CHECKPOINT, "layers", base=base, adapter=pair[1], target=tmp_path / "made")


def test_another_base_of_the_same_shape(tmp_path, pair):
    """The run recorded the SHA-256 of its base model: only the same one is accepted."""
    base, adapter = pair
    shutil.copytree(adapter, tmp_path / "adapter")
    digest = hashing.of_folder(base_model.identity_files(str(base))["weights"])
    record = {"options": {"model_path": str(base), "bits": 8}, "fingerprints": {"base model": digest}}
    (tmp_path / "adapter" / runs_folder.CONFIG).write_text(json.dumps(record))
    run(None, tmp_path / "adapter", tmp_path / "made")  # finetune_config.json names the base model
    check_equal(base, adapter, tmp_path / "made")
    other = tiny.save_model(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    refused(CHECKPOINT, "SHA-256", base=other, adapter=tmp_path / "adapter", target=tmp_path / "no")


def test_a_tokenizer_with_too_many_tokens(tmp_path, pair):
    """Ids beyond the merged embedding would crash later, so they are refused."""
    base, adapter = pair
    shutil.copytree(adapter, tmp_path / "adapter")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"<{n}>" for n in range(9)])
    tokenizer.save_pretrained(tmp_path / "adapter")
    refused(CHECKPOINT, "308", base=base, adapter=tmp_path / "adapter", target=tmp_path / "made")


def test_folders(tmp_path, pair, monkeypatch):
    """What cannot be merged is refused before anything is written; a second merge has nothing to do.

    Refused are a target inside the base model or the adapter, a changed target, a quantised base model and a
    full disk.
    """
    base, adapter = pair
    for target in (base, base / "made", adapter / "made"):
        refused(USAGE, "--output_path", base=base, adapter=adapter, target=target)
    run(base, adapter, tmp_path / "made")
    before = kill_points.contents(tmp_path / "made")
    assert "nothing to do" in " ".join(run(base, adapter, tmp_path / "made"))
    run(base, adapter, tmp_path / "again")
    assert before == kill_points.contents(tmp_path / "made") == kill_points.contents(tmp_path / "again")
    weights = tmp_path / "again/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-16] + bytes(16))
    refused(CHECKPOINT, weights.name, base=base, adapter=adapter, target=tmp_path / "again")
    shutil.copytree(base, tmp_path / "quantised")
    path = tmp_path / "quantised/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"bits": 4}}))
    refused(USAGE, "quantised", base=tmp_path / "quantised", adapter=adapter, target=tmp_path / "x")
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage)
    refused(DISK, "MiB", base=base, adapter=adapter, target=tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_a_base_that_only_the_adapter_names_is_not_fetched(tmp_path, pair, monkeypatch):
    """A stranger's adapter cannot cause a download; a name that the user types can."""
    shutil.copytree(pair[1], tmp_path / "adapter")
    change_config(base_model_name_or_path="evil/model")(tmp_path / "adapter")
    names: list[str] = []
    monkeypatch.setattr(locate, "fetch_model", names.append)
    monkeypatch.setattr(locate, "fetch_adapter", names.append)
    options = MergeConfig(lora_path=str(tmp_path / "adapter"), output_path=str(tmp_path / "made"))
    with pytest.raises(UserError, match="evil/model, which is not on this machine"):
        merge.run(options, lambda *_: None)
    assert names == []


def test_only_the_models_own_files_come_along(tmp_path, pair):
    """Records and logs in the folders of base model and adapter are not copied: they describe other files."""
    for name, source in zip(("base", "adapter"), pair, strict=True):
        shutil.copytree(source, tmp_path / name)
        for record in ("onecard_download.json", "export.json", "finished.json", "log.jsonl", "loss.png"):
            (tmp_path / name / record).write_text("{}")
    # with it the folder would count as an export of GGUF files
    (tmp_path / "adapter" / "export.json").unlink()
    (tmp_path / "base" / runs_folder.CONFIG).write_text("{}")
    (tmp_path / "base" / "README.md").write_text("A card")
    run(tmp_path / "base", tmp_path / "adapter", tmp_path / "made")
    run(*pair, tmp_path / "plain")
    merged, plain = ({path.name for path in (tmp_path / name).iterdir()} for name in ("made", "plain"))
    assert merged == plain | {"README.md"}


def test_another_tokenizer_is_another_merge(tmp_path, pair):
    """The record names the small files too, so a changed one makes it another merge."""
    base, adapter = tmp_path / "base", pair[1]
    shutil.copytree(pair[0], base)
    run(base, adapter, tmp_path / "made")
    (base / "tokenizer_config.json").write_text((base / "tokenizer_config.json").read_text() + "\n")
    refused(USAGE, "is there already", base=base, adapter=adapter, target=tmp_path / "made")


def test_an_older_adapter(tmp_path, pair):
    """Its own folder counts and not the temporary copy, both for a second merge and for the target."""
    base, old = pair[0], tmp_path / "old"
    old.mkdir()
    torch.save(load_file(pair[1] / "adapter_model.safetensors"), old / "adapter_model.bin")
    shutil.copy(pair[1] / "adapter_config.json", old)
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(old)
    refused(USAGE, "--output_path", base=base, adapter=old, target=old / "made")
    run(base, old, tmp_path / "made")
    assert models_tokenizer.load_tokenizer(str(tmp_path / "made")).model_max_length == 77
    assert "nothing to do" in " ".join(run(base, old, tmp_path / "made"))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter(tmp_path, pair, name):
    """The exit code is 4, whichever of its files is cut short."""
    shutil.copytree(pair[1], tmp_path / "adapter")
    path = tmp_path / "adapter" / name
    path.write_bytes(path.read_bytes()[:-40])
    refused(CHECKPOINT, name, base=pair[0], adapter=tmp_path / "adapter", target=tmp_path / "made")


def test_a_folder_has_the_users_rights(tmp_path):
    before = os.umask(0o077)
    try:
        with output_folder.making(tmp_path / "made", 0, {}, "--output_path"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_killed_at_every_operation(tmp_path, pair):
    """SIGKILL before each operation of a merge leaves no folder, and the next run is clean."""
    kill_points.check("merge", tmp_path / "out", model_path=pair[0], lora_path=pair[1])


def test_report(tmp_path, pair):
    """Perplexity and logit differences against base + adapter, also on the quantised base of the training."""
    base, adapter = pair
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / runs_folder.CONFIG).write_text(json.dumps({"options": {"bits": 8}}))
    rows = tiny.save_rows(tmp_path / "rows.json", 6)
    lines = run(
        base, tmp_path / "adapter", tmp_path / "made", report=True, data_path=str(rows), report_rows=4
    )
    table = {line[:30].strip(): line[30:].split() for line in lines}
    same, coarse = table["base + adapter (peft)"], table["8-bit base + adapter"]
    assert float(table["merged"][0]) > 1
    assert abs(float(same[1]) - 1) < 0.05  # bf16 on the CPU
    assert float(coarse[2]) > 0


@pytest.mark.parametrize("rows", ["none.json", "no_answers.json"])
def test_the_rows_of_a_report_are_looked_at_first(tmp_path, pair, monkeypatch, rows):
    """Wrong rows give exit code 3 before any merging; the sample's rows are found from any folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_answers.json").write_text('[{"instruction": "a"}]')
    before = sorted(tmp_path.iterdir())
    arguments = {"base": pair[0], "adapter": pair[1], "target": tmp_path / "made", "report": True}
    refused(DATA, "--data_path", rows, **arguments, data_path=rows)
    assert sorted(tmp_path.iterdir()) == before
    assert any("rows of sample/instruct.json" in line for line in run(**arguments, report_rows=1))


@pytest.mark.parametrize("given", [{"data_path": "rows.json"}, {"report_rows": 2}, {"cutoff_len": 99}])
def test_options_of_a_report_that_is_not_asked_for(pair, tmp_path, given):
    """They would do nothing, so they are refused and nothing is written."""
    refused(USAGE, "is for --report", base=pair[0], adapter=pair[1], target=tmp_path / "made", **given)
    assert list(tmp_path.iterdir()) == []


def test_report_numbers():
    """The perplexity is that of the targets alone; the difference is the largest over all of them."""

    class Even(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))  # says on which device the model is

        def forward(self, ids, use_cache):
            scores = torch.zeros(1, ids.shape[1], 8)
            scores[0, 0, 3] = 100.0  # after the first token, 3 is certain
            return type("Output", (), {"logits": scores})

    perplexity, outputs = merge_fidelity.outcome(Even(), [([1, 3, 5], [False, False, True])])
    assert perplexity == pytest.approx(8.0)
    assert outputs[0].shape == (1, 8)
    assert merge_fidelity.largest_difference([outputs[0]], [outputs[0] + torch.eye(1, 8) * 3]) == 3.0
    sure, _ = merge_fidelity.outcome(Even(), [([1, 3, 5], [False, True, False])])
    assert sure == pytest.approx(1.0)


def test_a_difference_that_is_no_number_is_told(tmp_path, monkeypatch):
    """max() would ignore it, so the report checks for it and ends with exit code 4."""
    fine, broken = torch.zeros(1, 8), torch.full((1, 8), float("nan"))
    assert merge_fidelity.largest_difference([fine, broken], [fine, fine]) != 0
    outcomes = iter([(1.0, [fine, broken]), (1.0, [fine, fine])])
    monkeypatch.setattr(merge_fidelity, "outcome", lambda *_: next(outcomes))
    monkeypatch.setattr(merge_fidelity, "_load", lambda *_: None)
    base = tiny.save_model(tmp_path / "base")
    options = MergeConfig(output_path=str(base))
    with pytest.raises(UserError, match="no numbers") as caught:
        merge_fidelity.run(options, [], base, runs_adapters.Adapter("a", tmp_path), base)
    assert caught.value.code == CHECKPOINT
