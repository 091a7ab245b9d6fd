"""Original LLaMA folders become transformers' and original again, with equal bits and equal logits."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from onecard.config.conversion import ConvertConfig
from onecard.conversion import meta_layout, meta_llama, meta_tokenizer, meta_weights
from onecard.errors import CHECKPOINT, DISK, MEMORY, UNSAFE, USAGE, UserError
from onecard.hub import model_files
from onecard.models import tensor_files
from onecard.system import output_folder, sandbox
from tests.support import console, faults, kill_points, meta_llama_reference
from tests.support.meta_llama_reference import params
from tests.support.paths import ROOT

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> tuple[Path, int]:
    """A SentencePiece tokenizer and its number of tokens (a multiple of four)."""
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    count = meta_llama_reference.sentencepiece(path, 392)
    assert count % 4 == 0
    return path, count


def here(request: dict[str, Any], told: Any, keep: int) -> None:
    """Do the child's work in this process, without its limits."""
    module = meta_weights if request["step"] == meta_llama.WEIGHTS else meta_tokenizer
    module.work({**request, "limit": 0}, lambda **report: told(report))


def run(source: Path, target: Path, to: str, work: Any = here, **more: Any) -> list[str]:
    options = ConvertConfig(input_dir=str(source), output_dir=str(target), to=to, **more)
    with console.heard() as lines:
        meta_llama.run(options, lambda done, total: None, work)
    return lines


def refused(code: int, *words: str, **arguments: Any) -> None:
    with pytest.raises(UserError) as caught:
        run(**arguments)
    assert caught.value.code == code, caught.value
    assert all(word in str(caught.value) for word in words), caught.value


def model(
    folder: Path,
    pieces: tuple[Path, int],
    count: int = 1,
    tied: bool = False,
    dtype=BF16,
    embedding=1,
    **more,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An original folder with its tokenizer; (params, whole weights)."""
    settings = params(vocab=pieces[1], **more)
    whole = meta_llama_reference.weights(settings, pieces[1], dtype, tied)
    meta_llama_reference.save(folder, settings, meta_llama_reference.cut(whole, count, embedding))
    shutil.copy(pieces[0], folder / "tokenizer.model")
    return settings, whole


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("heads", [(8, 8), (12, 4), (32, 4)], ids=["8/8", "12/4", "32/4"])
def test_there_and_back(tmp_path, pieces, heads, count, tied, dtype):
    """The weights come back bit for bit with the same names and shards; the logits are the original's."""
    start = tmp_path / "start"
    settings, whole = model(start, pieces, count, tied, dtype, heads=heads[0], kv_heads=heads[1])
    run(start, tmp_path / "hf", "hf")
    run(tmp_path / "hf", tmp_path / "back", "meta", num_shards=count)
    assert meta_llama_reference.same(
        meta_llama_reference.load(start), meta_llama_reference.load(tmp_path / "back")
    )
    assert json.loads((tmp_path / "back/params.json").read_text()) == settings
    assert (tmp_path / "back/tokenizer.model").read_bytes() == pieces[0].read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = torch.randint(0, pieces[1], (40,), generator=torch.Generator().manual_seed(1))
    expected = meta_llama_reference.logits(settings, whole, ids)
    assert (loaded(ids[None]).logits[0] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_reference_is_sensitive(pieces):
    """The reference notices rows of q in the wrong order; otherwise equal logits would prove nothing."""
    settings = params(vocab=64)
    whole = meta_llama_reference.weights(settings, 64, torch.float32, tied=False)
    ids = torch.arange(40)
    right = meta_llama_reference.logits(settings, whole, ids)
    name = "layers.0.attention.wq.weight"
    wrong = meta_llama_reference.logits(settings, {**whole, name: meta_layout.to_halves(whole[name], 8)}, ids)
    assert (right - wrong).abs().max() > 0.01 * right.abs().max()


@pytest.mark.parametrize(("one", "other"), [(1, 4), (4, 1), (2, 4), (4, 2)])
@pytest.mark.parametrize("embedding", [0, 1])
def test_reshard(tmp_path, pieces, one, other, embedding):
    """Any number of shards becomes any other; the embedding is cut along the same dimension as before."""
    start = tmp_path / "start"
    _, whole = model(start, pieces, one, embedding=embedding, heads=12, kv_heads=4)
    run(start, tmp_path / "made", "meta", num_shards=other)
    along = embedding if one > 1 else 1  # for an uncut one the tokenizer decides
    expected = meta_llama_reference.cut(whole, other, along)
    assert meta_llama_reference.same(expected, meta_llama_reference.load(tmp_path / "made"))


def test_blocks_smaller_than_a_tensor(tmp_path, pieces, monkeypatch):
    """Every tensor is copied in several blocks, across the borders of shards, and stays the same."""
    monkeypatch.setattr(tensor_files, "BLOCK", 3000)
    start = tmp_path / "start"
    _, whole = model(start, pieces, 4, heads=12, kv_heads=4, embedding=0)
    run(start, tmp_path / "hf", "hf")
    run(tmp_path / "hf", tmp_path / "back", "meta", num_shards=2)
    assert meta_llama_reference.same(
        meta_llama_reference.cut(whole, 2), meta_llama_reference.load(tmp_path / "back")
    )


def test_many_files(tmp_path, pieces, monkeypatch):
    """Large models are written as several safetensors files with an index, which transformers and we read."""
    monkeypatch.setattr(tensor_files, "divide", lambda tensors: plain(tensors, 40_000))
    model(tmp_path / "start", pieces)
    run(tmp_path / "start", tmp_path / "hf", "hf")
    files = model_files.files_of(tmp_path / "hf")
    assert len(files) > 2
    stored = {name: tensor for path in files for name, tensor in load_file(path).items()}
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=BF16).state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in stored)
    run(tmp_path / "hf", tmp_path / "back", "meta")
    start, back = (meta_llama_reference.load(tmp_path / name) for name in ("start", "back"))
    assert meta_llama_reference.same(start, back)


plain = tensor_files.divide


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"vocab_size": -1, "norm_eps": 1e-6}, {"max_position_embeddings": 2048}),
        ({"norm_eps": 1e-5}, {"max_position_embeddings": 4096, "rope_theta": 10000.0}),
        ({"rope_theta": 500000.0, "ffn_dim_multiplier": 2.5}, {"max_position_embeddings": 8192}),
        (
            {"rope_theta": 500000.0, "use_scaled_rope": True, "rope_scaling_factor": 8},
            {"max_position_embeddings": 131072},
        ),
    ],
    ids=["LLaMA 1", "LLaMA 2", "LLaMA 3", "LLaMA 3.1"],
)
def test_generations(tmp_path, pieces, settings, wanted):
    """params.json of each generation gives its configuration and comes back; the logits show its theta."""
    start = tmp_path / "start"
    original, whole = model(start, pieces, **settings)
    run(start, tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert {name: config[name] for name in wanted} == wanted
    assert config["intermediate_size"] == meta_llama_reference.hidden(original)
    run(tmp_path / "hf", tmp_path / "back", "meta")
    back = json.loads((tmp_path / "back/params.json").read_text())
    wide = ("multiple_of", "ffn_dim_multiplier")  # several pairs of them give the same size
    assert meta_llama_reference.hidden(back) == meta_llama_reference.hidden(original)
    assert {k: v for k, v in back.items() if k not in wide} == {
        **{k: v for k, v in original.items() if k not in wide},
        "vocab_size": pieces[1],
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    if "use_scaled_rope" not in original:
        ids = torch.arange(3, 43)
        expected = meta_llama_reference.logits(original, whole, ids)
        assert (loaded(ids[None]).logits[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    else:
        assert loaded.config.rope_parameters["rope_type"] == "llama3"


@pytest.mark.parametrize(
    ("dim", "f"),
    [(4096, 11008), (4096, 14336), (8192, 28672), (5120, 13824), (576, 1536), (96, 97), (64, 10)],
)
def test_feed_forward_sizes_come_back(dim, f):
    """params.json can express every size of the feed-forward part."""
    shape = meta_layout.Shape(dim, 2, 8, 8, f, 100, 1e-5)
    values = meta_layout.to_params(shape)
    assert meta_layout.from_params(values, Path("params.json"), 100).hidden == f


def test_tables_and_missing_heads(tmp_path, pieces):
    """Rotary tables of old files are left out, and the output says so; a model without head is tied."""
    settings = params(vocab=pieces[1])
    whole = meta_llama_reference.weights(settings, pieces[1], BF16, tied=True)
    head = whole.pop("output.weight")
    meta_llama_reference.save(tmp_path / "a", settings, [{**whole, "rope.freqs": torch.ones(4)}])
    shutil.copy(pieces[0], tmp_path / "tokenizer.model")  # beside the folder, as in LLaMA 1
    output = " ".join(run(tmp_path / "a", tmp_path / "hf", "hf"))
    assert "1 tables" in output
    assert "no output.weight" in output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.tie_word_embeddings
    run(tmp_path / "hf", tmp_path / "back", "meta")
    assert meta_llama_reference.same(
        meta_llama_reference.load(tmp_path / "back"), [{**whole, "output.weight": head}]
    )


# the tokenizer


def test_tokens_are_sentencepieces(tmp_path, pieces):
    """AutoTokenizer gives SentencePiece's ids, with the begin token before them, and decodes them."""
    import sentencepiece

    model(tmp_path / "start", pieces)
    run(tmp_path / "start", tmp_path / "hf", "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(pieces[0]))
    texts = [*meta_tokenizer.SAMPLES, " lead", "trail ", "a\n\n b", "▁x", "你好 🙂"]
    for text in texts:
        assert tokenizer(text, add_special_tokens=False).input_ids == reference.encode(text), text
        assert tokenizer(text).input_ids == [reference.bos_id(), *reference.encode(text)]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text.replace("▁", " ")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (reference.bos_id(), reference.eos_id())
    assert tokenizer.model_max_length == 4096


def test_another_kind_of_tokenizer_is_refused(tmp_path):
    """A SentencePiece model that transformers' LLaMA tokenizer would read differently is refused."""
    path = tmp_path / "tokenizer.model"
    count = meta_llama_reference.sentencepiece(
        path, 392, normalization_rule_name="nmt_nfkc", add_dummy_prefix=False
    )
    model(tmp_path / "start", (path, count))
    refused(CHECKPOINT, "tokenizer.model", source=tmp_path / "start", target=tmp_path / "hf", to="hf")


def test_tokens_are_tiktokens(tmp_path):
    """A LLaMA 3 tokenizer gives the tokens of the plain algorithm over its ranks; its file is copied."""
    path = tmp_path / "tokenizer.model"
    tokens = meta_llama_reference.ranks(path)
    count = len(tokens) + 256
    model(tmp_path / "start", (path, count), 4, embedding=0, rope_theta=500000.0)
    run(tmp_path / "start", tmp_path / "hf", "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for text in [*meta_tokenizer.SAMPLES, "hello worlds this  is llama's 12345"]:
        words = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert words
        split = words_of(text)
        ids = [ranks[part] for word in split for part in meta_llama_reference.by_rank(word, ranks)]
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, text
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == count
    assert tokenizer("a").input_ids[0] == tokenizer.convert_tokens_to_ids("<|begin_of_text|>") == len(tokens)
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") == len(tokens) + 9
    assert tokenizer.convert_tokens_to_ids("<|reserved_special_token_250|>") == count - 1
    run(tmp_path / "hf", tmp_path / "back", "meta", num_shards=4)
    assert (tmp_path / "back/tokenizer.model").read_bytes() == path.read_bytes()
    assert meta_llama_reference.same(
        *(meta_llama_reference.load(tmp_path / name) for name in ("start", "back"))
    )


def words_of(text: str) -> list[bytes]:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(meta_tokenizer.SPLIT), "isolated")
    return [word.encode() for word, _ in split.pre_tokenize_str(text)]


def test_special_names_of_later_models():
    """LLaMA 3.1 named three of the reserved tokens; there are always 256 special tokens."""
    before, after = meta_tokenizer.specials(False), meta_tokenizer.specials(True)
    assert len(before) == len(after) == len(set(after)) == 256
    assert before[2:6] == [f"<|reserved_special_token_{n}|>" for n in range(4)]
    assert after[4], after[8] == ("<|finetune_right_pad_id|>", "<|eom_id|>")
    assert (before[255], after[255]) == (
        "<|reserved_special_token_250|>",
        "<|reserved_special_token_247|>",
    )


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_tokenizer_only(tmp_path, pieces, to):
    """The tokenizer is converted alone, from a folder that holds nothing else."""
    (tmp_path / "start").mkdir()
    shutil.copy(pieces[0], tmp_path / "start/tokenizer.model")
    run(tmp_path / "start", tmp_path / "made", to, tokenizer_only=True)
    assert (tmp_path / "made/tokenizer.model").read_bytes() == pieces[0].read_bytes()
    if to == "hf":
        assert AutoTokenizer.from_pretrained(tmp_path / "made")("hello").input_ids[0] == 1
    assert not list((tmp_path / "made").glob("*.safetensors"))


def test_shards_of_a_tokenizer_are_refused(tmp_path, pieces):
    """A tokenizer has no weights to cut into shards; nothing is written."""
    (tmp_path / "start").mkdir()
    shutil.copy(pieces[0], tmp_path / "start/tokenizer.model")
    with pytest.raises(UserError, match="--num_shards is for weights") as caught:
        run(tmp_path / "start", tmp_path / "made", "meta", tokenizer_only=True, num_shards=3)
    assert caught.value.code == USAGE
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("to", ["hf", "meta"])
@pytest.mark.parametrize("fault", ["missing", "another's", "garbage"])
def test_wrong_tokenizers(tmp_path, pieces, fault, to):
    """X9: a tokenizer that is missing or belongs to another model is refused, and none is guessed."""
    start = tmp_path / "in/start"
    model(start, pieces)
    path = start / "tokenizer.model"
    if fault == "missing":
        path.unlink()
    elif fault == "garbage":
        path.write_bytes(os.urandom(5000))
    else:
        meta_llama_reference.sentencepiece(path, 380)
    refused(CHECKPOINT, "tokenizer.model", source=start, target=tmp_path / "out/made", to=to)
    assert not list((tmp_path / "out").iterdir())


# what is wrong with a folder


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def shift(start: Path, one: str, other: str) -> None:
    (start / one).rename(start / other)


def change(start: Path, **settings: Any) -> None:
    stored = json.loads((start / "params.json").read_text())
    changed = {name: value for name, value in {**stored, **settings}.items() if value is not None}
    (start / "params.json").write_text(json.dumps(changed))


def edit(start: Path, number: int, how: Any) -> None:
    path = start / f"consolidated.{number:02d}.pth"
    tensors = torch.load(path, weights_only=True)
    how(tensors)
    torch.save(tensors, path)


FAULTS = {
    "no shard 0": (lambda p: (p / "consolidated.00.pth").unlink(), "consolidated.00.pth"),
    "no shard 2": (lambda p: (p / "consolidated.02.pth").unlink(), "consolidated.02.pth"),
    "no last shard": (
        lambda p: (p / "consolidated.03.pth").unlink(),
        "[392, 64] cannot lie in 3 equal pieces",
    ),
    "one too many": (
        lambda p: shutil.copy(p / "consolidated.03.pth", p / "consolidated.04.pth"),
        "5 equal pieces",
    ),
    "renamed": (lambda p: shift(p, "consolidated.01.pth", "consolidated.1.pth"), "consolidated.1.pth"),
    "a copy": (lambda p: shutil.copy(p / "consolidated.03.pth", p / "consolidated.03.pth.bak"), ".bak"),
    "no params": (lambda p: (p / "params.json").unlink(), "params.json"),
    "params are no JSON": (lambda p: (p / "params.json").write_text("{"), "params.json"),
    "params are a list": (lambda p: (p / "params.json").write_text("[]"), "params.json"),
    "wrong dim": (
        lambda p: change(p, dim=128),
        "consolidated.00.pth: tok_embeddings.weight has the shape [392, 16]",
    ),
    "wrong heads": (lambda p: change(p, n_heads=7), "n_heads 7"),
    "wrong KV heads": (lambda p: change(p, n_kv_heads=4), "[16, 64]"),
    "too few layers": (lambda p: change(p, n_layers=1), "layers.1"),
    "too many layers": (lambda p: change(p, n_layers=3), "layers.2"),
    "no layers": (lambda p: change(p, n_layers=None), "n_layers"),
    "layers in words": (lambda p: change(p, n_layers="two"), "n_layers"),
    "wrong vocabulary": (lambda p: change(p, vocab_size=999), "999"),
    "wrong multiple": (lambda p: change(p, multiple_of=512), "[64, 64]"),
    "multiple of zero": (lambda p: change(p, multiple_of=0), "params.json"),
    "unknown setting": (lambda p: change(p, n_experts=8), "n_experts"),
    "scaled by what": (lambda p: change(p, use_scaled_rope=True), "rope_scaling_factor"),
    "a name less": (lambda p: edit(p, 1, lambda held: held.pop("norm.weight")), "consolidated.01.pth"),
    "a name more": (lambda p: [edit(p, n, lambda h: h.update(x=torch.ones(1))) for n in range(4)], "x"),
    "another dtype": (
        lambda p: edit(p, 1, lambda h: h.update({"norm.weight": h["norm.weight"].float()})),
        "norm.weight",
    ),
    "eight bits": (
        lambda p: [
            edit(p, n, lambda h: h.update({"norm.weight": h["norm.weight"].char()})) for n in range(4)
        ],
        "norm.weight",
    ),
    "another shape": (
        lambda p: edit(p, 2, lambda h: h.update({"norm.weight": torch.ones(9, dtype=BF16)})),
        "consolidated.02.pth: norm.weight has the shape [9]",
    ),
    "cut short": (lambda p: os.truncate(p / "consolidated.02.pth", 9000), "consolidated.02.pth"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_folders(tmp_path, pieces, fault):
    """A file that is missing, renamed, too much or of another model is named; nothing is written."""
    start = tmp_path / "in/start"
    model(start, pieces, 4)
    make, word = FAULTS[fault]
    make(start)
    code = UNSAFE if fault == "cut short" else CHECKPOINT  # a file that is no zip archive may be anything
    refused(code, word, source=start, target=tmp_path / "out/made", to="hf")
    assert not (tmp_path / "out").exists() or not names(tmp_path / "out")


def change_config(start: Path, **settings: Any) -> None:
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**config, **settings}))


def edit_hf(start: Path, how: Any) -> None:
    tensors = load_file(start / "model.safetensors")
    how(tensors)
    save_file(tensors, start / "model.safetensors")


HF_FAULTS = {
    "no weights": (lambda p: (p / "model.safetensors").unlink(), USAGE, "model.safetensors"),
    "a second download": (
        lambda p: shutil.copy(p / "model.safetensors", p / "model-00001-of-00002.safetensors"),
        CHECKPOINT,
        "model-00001",
    ),
    "a name less": (lambda p: edit_hf(p, lambda h: h.pop("lm_head.weight")), CHECKPOINT, "lm_head.weight"),
    "a name more": (
        lambda p: edit_hf(p, lambda h: h.update(x=torch.ones(1))),
        CHECKPOINT,
        "unknown tensors: 1 (x)",
    ),
    "another shape": (lambda p: change_config(p, intermediate_size=96), CHECKPOINT, "instead of [96, 64]"),
    "biases": (lambda p: change_config(p, attention_bias=True), USAGE, "attention_bias"),
    "another model": (
        lambda p: change_config(p, model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        USAGE,
        "gpt2",
    ),
    "another scaling": (
        lambda p: change_config(p, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        USAGE,
        "yarn",
    ),
    "no config": (lambda p: (p / "config.json").unlink(), USAGE, "config.json"),
    "cut short": (lambda p: os.truncate(p / "model.safetensors", 9000), CHECKPOINT, "model.safetensors"),
}


@pytest.mark.parametrize("fault", HF_FAULTS)
def test_wrong_hf_folders(tmp_path, pieces, fault):
    """The same holds for folders of transformers."""
    model(tmp_path / "start", pieces)
    run(tmp_path / "start", tmp_path / "hf", "hf")
    make, code, word = HF_FAULTS[fault]
    make(tmp_path / "hf")
    refused(code, word, source=tmp_path / "hf", target=tmp_path / "out/made", to="meta")
    assert not (tmp_path / "out").exists() or not names(tmp_path / "out")


@pytest.mark.parametrize("count", [3, 8, 16])
def test_shards_that_do_not_divide(tmp_path, pieces, count):
    """The number of shards must divide the heads, the KV heads and every tensor."""
    model(tmp_path / "start", pieces, heads=12, kv_heads=4)
    target = tmp_path / "made"
    refused(
        USAGE, f"--num_shards {count}", source=tmp_path / "start", target=target, to="meta", num_shards=count
    )


def test_code_in_a_shard_is_not_run(tmp_path, pieces):
    """A pickle that asks for more than tensors, or an old format, gives exit code 8 from the child."""
    canary = tmp_path / "canary"
    start = tmp_path / "start"
    model(start, pieces)
    torch.save({"tok_embeddings.weight": faults.Touch(canary)}, start / "consolidated.00.pth")
    work = meta_llama.in_child
    refused(UNSAFE, "could run code", source=start, target=tmp_path / "made", to="hf", work=work)
    old = {"tok_embeddings.weight": torch.ones(4, 4)}
    torch.save(old, start / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    refused(UNSAFE, "zip", source=start, target=tmp_path / "made", to="hf", work=work)
    assert not canary.exists()
    assert not (tmp_path / "made").exists()


# folders


def test_source_and_target_are_apart(tmp_path, pieces):
    """X4: the target may not be the source, nor inside or around it; a link does not hide that."""
    start = tmp_path / "in/start"
    model(start, pieces)
    before = kill_points.contents(start)
    (tmp_path / "link").symlink_to(start)
    for target in (start, start / "made", tmp_path / "in", tmp_path / "link", tmp_path / "link/made"):
        refused(USAGE, "--output_dir", source=start, target=target, to="hf")
    assert kill_points.contents(start) == before


def test_a_full_disk_is_refused_before_writing(tmp_path, pieces, monkeypatch):
    """X4: the free space is checked first, and nothing is written."""
    model(tmp_path / "in/start", pieces)
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage)
    refused(DISK, "MiB", source=tmp_path / "in/start", target=tmp_path / "out/made", to="hf")
    assert not names(tmp_path / "out")


def test_a_disk_that_fills_up(tmp_path, pieces, monkeypatch):
    """A write that fails gives exit code 7, and no file stays."""

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    model(tmp_path / "in/start", pieces)
    monkeypatch.setattr(os, "pwrite", full)
    refused(DISK, "No space", source=tmp_path / "in/start", target=tmp_path / "out/made", to="hf")
    assert not names(tmp_path / "out")


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_the_same_command_twice(tmp_path, pieces, to):
    """The second call has nothing to do; another target gets the same bytes; other settings are refused."""
    model(tmp_path / "start", pieces)
    run(tmp_path / "start", tmp_path / "made", to)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "made").rglob("*")}
    assert "nothing to do" in " ".join(run(tmp_path / "start", tmp_path / "made", to))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "made").rglob("*")} == before
    run(tmp_path / "start", tmp_path / "again", to)
    assert kill_points.contents(tmp_path / "made") == kill_points.contents(tmp_path / "again")
    refused(
        USAGE,
        "is there already",
        source=tmp_path / "start",
        target=tmp_path / "made",
        to="meta",
        num_shards=2,
    )
    (tmp_path / "made/tokenizer.model").write_bytes(b"changed")
    refused(CHECKPOINT, "tokenizer.model", source=tmp_path / "start", target=tmp_path / "made", to=to)


@pytest.mark.parametrize("to", ["hf", pytest.param("meta", marks=pytest.mark.slow)])
def test_killed_at_every_operation(tmp_path, pieces, to):
    """X3: SIGKILL before each file operation leaves no folder, and the next run is clean."""
    model(tmp_path / "start", pieces)
    kill_points.check("convert", tmp_path / "out", input_dir=tmp_path / "start", to=to)


def test_a_killed_parent_takes_its_child_along(tmp_path, pieces):
    """The child ends with its parent, and the next run makes the folder from the start."""
    start = tmp_path / "start"
    model(start, pieces)
    program = (
        "import os, signal, sys\n"
        "from onecard.conversion import meta_llama\n"
        "from onecard.config.conversion import ConvertConfig\n"
        "def progress(done, total): os.kill(os.getpid(), signal.SIGKILL)\n"
        "options = ConvertConfig(input_dir=sys.argv[1], output_dir=sys.argv[2])\n"
        "meta_llama.run(options, progress)\n"
    )
    command = [sys.executable, "-c", program, str(start), str(tmp_path / "made")]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "made").exists()
    run(start, tmp_path / "made", "hf", work=meta_llama.in_child)
    assert [path.name for path in tmp_path.glob(".*")] == []
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "made")


def test_two_at_a_time(tmp_path, pieces, monkeypatch):
    """A second process that makes the same folder is refused and does not disturb the first."""
    monkeypatch.setattr(output_folder, "PATIENCE", 0.2)
    model(tmp_path / "start", pieces)
    with output_folder.making(tmp_path / "made", 0, {}, "--output_dir") as (place, _):
        (place / "x").touch()
        refused(USAGE, "another process", source=tmp_path / "start", target=tmp_path / "made", to="hf")
        assert (place / "x").exists()
    assert (tmp_path / "made/x").exists()


# memory


def program(start: Path, target: Path, to: str, limit: int | None = None) -> subprocess.CompletedProcess:
    """Run the tool itself, with a limit of its address space in bytes if one is given."""
    command = [
        sys.executable,
        "tools/convert_llama.py",
        "--input_dir",
        str(start),
        "--output_dir",
        str(target),
    ]

    def narrow() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    return subprocess.run(
        [*command, "--to", to],
        cwd=ROOT,
        preexec_fn=narrow,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


SLOW = [pytest.param(limit, marks=pytest.mark.slow) for limit in (150, 450, 750)]


@pytest.mark.parametrize("limit", [300, 600, 1200, *SLOW])
def test_little_address_space(tmp_path, pieces, limit):
    """X10: under RLIMIT_AS it converts, or it ends with exit code 6 and leaves nothing behind."""
    model(tmp_path / "in/start", pieces)
    ended = program(tmp_path / "in/start", tmp_path / "out/made", "hf", limit << 20)
    assert ended.returncode in (0, MEMORY), ended.stderr
    assert "Traceback" not in ended.stderr
    assert (ended.returncode == 0) == (tmp_path / "out/made").exists()
    assert ended.returncode == 0 or not (tmp_path / "out").exists() or not names(tmp_path / "out")
    assert ended.returncode == 0 or limit < 1200


@pytest.mark.parametrize("direction", ["hf", pytest.param("meta", marks=pytest.mark.slow)])
def test_peak_memory(tmp_path, pieces, direction):
    """The child's peak is below the largest tensor + 300 MB, for a model much larger than that."""
    path, count = pieces
    settings = params(heads=8, vocab=count, dim=4096, n_heads=32, n_layers=4, multiple_of=8192)
    whole = {
        name: torch.empty(shape.shape, dtype=BF16).fill_(0.5)
        for shape in meta_layout.weights(meta_layout.from_params(settings, Path("x"), count), 1)
        for name in [shape.meta]
    }
    size = sum(tensor.nbytes for tensor in whole.values())
    meta_llama_reference.save(tmp_path / "start", settings, meta_llama_reference.cut(whole, 2))
    shutil.copy(path, tmp_path / "start/tokenizer.model")
    largest = max(tensor.nbytes for tensor in whole.values())
    del whole
    # a small process measures, since a child forked from this one would begin with all of pytest's memory
    watch = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, *sys.argv[1:]], check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    folders = ["--input_dir", str(tmp_path / "start"), "--output_dir", str(tmp_path / "made")]
    command = [sys.executable, "-c", watch, "tools/convert_llama.py", *folders, "--to", direction]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    peak = 1024 * int(ended.stdout.split()[-1])  # ru_maxrss is that of the largest process
    assert size > 4 * largest
    assert peak < largest + 300_000_000, f"{peak >> 20} MiB"


def test_address_space_for_large_shards(tmp_path, pieces, monkeypatch):
    """The child's limit has room for the files it writes, such as one large file made of many small ones."""
    monkeypatch.setattr(tensor_files, "divide", lambda tensors: plain(tensors, 40_000))
    model(tmp_path / "start", pieces)
    run(tmp_path / "start", tmp_path / "hf", "hf")
    limits = []

    def work(request: dict[str, Any], told: Any, keep: int) -> None:
        limits.append(request["limit"])
        here(request, told, keep)

    run(tmp_path / "hf", tmp_path / "back", "meta", work=work)
    assert min(limits) > (tmp_path / "back/consolidated.00.pth").stat().st_size


def test_the_child_reports_its_crash(tmp_path):
    """A child that dies without a message gives the user an error and no traceback."""
    handle = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(UserError) as caught:
        sandbox.work("onecard.no_such_module", {}, print, handle)
    assert caught.value.code == CHECKPOINT
    os.close(handle)


def test_options_are_declared():
    """The options have the names that users know."""
    fields = [field.name for field in dataclasses.fields(ConvertConfig)]
    assert fields == ["input_dir", "output_dir", "to", "num_shards", "tokenizer_only"]
