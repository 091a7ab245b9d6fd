"""A larger vocabulary: new rows get the mean, padding rows are zero, and everything else stays as it was."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from onecard.conversion import vocabulary as conversion_vocabulary
from onecard.errors import UserError
from onecard.hub import model_files
from tests.support import tiny
from tests.support.paths import ROOT
from tests.support.tokenizers import sentencepiece_tokenizer

TOKENS = ["<pad>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(params=[(True, "1GB"), (False, "1GB"), (False, "40KB")], ids=["tied", "untied", "shards"])
def base(request, tmp_path) -> Path:
    """A tiny model with tied or untied embeddings, in one file or several."""
    tied, shard = request.param
    return tiny.save_model(tmp_path / "base", shard=shard, tie_word_embeddings=tied)


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, f"tools/{tool}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("multiple", [1, 64, 128])
def test_new_rows_get_the_mean_and_padding_is_zero(base, tmp_path, multiple):
    """Old rows of the embedding and of an untied head keep their bytes; ids agree in all files."""
    old = AutoTokenizer.from_pretrained(base)
    new = AutoTokenizer.from_pretrained(base)
    conversion_vocabulary.add_special(new, TOKENS)
    before, added, after = conversion_vocabulary.prepare(base, old, new, tmp_path / "new", multiple)
    assert (before, added, after) == (300, 3, -(-303 // multiple) * multiple)
    old_tensors, new_tensors = tensors(base), tensors(tmp_path / "new")
    assert old_tensors.keys() == new_tensors.keys()
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"} & old_tensors.keys()
    assert len(embeddings) == (1 if AutoConfig.from_pretrained(base).tie_word_embeddings else 2)
    for name, tensor in old_tensors.items():
        if name not in embeddings:
            assert torch.equal(new_tensors[name], tensor), name
            continue
        assert new_tensors[name].shape == (after, tensor.shape[1])
        assert torch.equal(new_tensors[name][:300], tensor)
        mean = tensor.float().mean(dim=0).to(tensor.dtype)
        assert all(torch.equal(row, mean) for row in new_tensors[name][300:303])
        assert not new_tensors[name][303:].any()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert [tokenizer.convert_tokens_to_ids(token) for token in TOKENS] == [300, 301, 302]
    assert tokenizer("<|im_end|>", add_special_tokens=False).input_ids == [302]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.config.vocab_size == after
    generation = GenerationConfig.from_pretrained(tmp_path / "new")
    for ids in (model.config, generation, tokenizer):
        assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (0, 1, 300)
    tokens = torch.arange(2, 30)[None]
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert torch.allclose(model(tokens).logits[..., :300], plain(tokens).logits, atol=1e-5)
    index = tmp_path / "new" / model_files.INDEX
    if index.is_file():
        total = json.loads(index.read_text())["metadata"]["total_size"]
        assert total == sum(tensor.nbytes for tensor in new_tensors.values())


def test_a_padded_model_is_not_padded_again(base, tmp_path):
    """There are enough rows, so the new tokens take padding rows, which get the mean."""
    old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    conversion_vocabulary.prepare(base, old, new, tmp_path / "padded", 128)
    conversion_vocabulary.add_special(new, TOKENS)
    before, added, after = conversion_vocabulary.prepare(tmp_path / "padded", old, new, tmp_path / "new", 128)
    assert (before, added, after) == (384, 3, 384)
    rows = tensors(tmp_path / "new")["model.embed_tokens.weight"]
    assert torch.equal(rows[300], rows[:300].float().mean(dim=0))
    assert rows[302].any()
    assert not rows[303:].any()


def test_another_familys_tokenizer_is_refused(base, tmp_path):
    """Tokens with other ids would point to other rows."""
    other = AutoTokenizer.from_pretrained(base)
    core = json.loads(other.backend_tokenizer.to_str())
    first, second = list(core["model"]["vocab"])[10:12]
    vocabulary = core["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    shuffled = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token="<end>"
    )
    with pytest.raises(UserError, match="does not extend the model's own"):
        conversion_vocabulary.prepare(base, other, shuffled, tmp_path / "new", 128)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_base_without_some_weights_is_refused(base, tmp_path, name):
    """Exit code 4 with the tensor's name, and no folder, since the new model would lack the weights too."""
    [path] = [path for path in base.glob("*.safetensors") if name in load_file(path)]
    remaining = {other: tensor for other, tensor in load_file(path).items() if other != name}
    save_file(remaining, path, {"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(base)
    with pytest.raises(UserError, match=f"1 of its weights are missing: {name}") as caught:
        conversion_vocabulary.prepare(base, tokenizer, tokenizer, tmp_path / "new", 64)
    assert caught.value.code == 4
    assert [each.name for each in tmp_path.iterdir()] == ["base"]


def test_ids_with_gaps(tmp_path):
    """Rows are found by their ids and not by the number of tokens."""
    rows = conversion_vocabulary.resized(torch.arange(16.0).reshape(8, 2), [0, 1, 2, 7], [8, 9], 4)
    assert rows.shape == (12, 2)
    assert rows[7].tolist() == [14, 15]
    assert rows[8].tolist() == rows[9].tolist() == [5, 6]
    assert not rows[3:7].any()
    assert not rows[10:].any()


def test_pieces_and_characters(tmp_path):
    """Pieces come from text files, running text and SentencePiece models; existing tokens are not added."""
    tokenizer = tiny.tokenizer()
    (tmp_path / "pieces.txt").write_text("红色\n\nred\n蓝\n红色\n")
    assert conversion_vocabulary.pieces_of(tmp_path / "pieces.txt") == ["红色", "red", "蓝", "红色"]
    assert conversion_vocabulary.extend(tokenizer, ["红色", "red", "蓝", "红色"]) == ["红色", "蓝"]
    assert len(tokenizer("红色", add_special_tokens=False).input_ids) == 1
    assert tokenizer.decode(tokenizer("说红色 red").input_ids) == "说红色 red"
    assert conversion_vocabulary.characters_of("红红红 abc 蓝蓝\n", 2) == ["红", "蓝"]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["水 在 一百 度 沸腾"] * 9), model_writer=buffer, vocab_size=40,
        byte_fallback=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "han.model").write_bytes(buffer.getvalue())
    pieces = conversion_vocabulary.pieces_of(tmp_path / "han.model")
    assert {"水", "沸"} <= set(pieces)
    assert not any("▁" in piece or "<" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("none.txt", None, "no such file"),
        ("x.model", b"junk", "no SentencePiece"),
        ("x.txt", b"\xff", "UTF-8"),
        ("x.txt", b"a" * 40, "no piece"),
    ],
)
def test_what_holds_no_pieces_is_named(tmp_path, name, content, word):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=word) as caught:
        conversion_vocabulary.pieces_of(tmp_path / name)
    assert caught.value.code == 3


@pytest.mark.parametrize("base", [(True, "1GB")], indirect=True)
def test_the_tools_and_a_training_on_their_result(base, tmp_path, harness):
    """Extend, prepare and train with chatml; a folder that exists is not written over."""
    (tmp_path / "text.txt").write_text("红色和蓝色。" * 10)
    arguments = (
        "--model_path",
        base,
        "--characters",
        tmp_path / "text.txt",
        "--sample_text",
        tmp_path / "text.txt",
    )
    ended = run("extend_vocab", *arguments, "--output_path", tmp_path / "tokenizer")
    assert ended.returncode == 0, ended.stderr
    assert "5 pieces, 5 added" in ended.stdout
    assert "3.000 -> 1.000 tokens per character" in ended.stdout
    arguments = (
        "--model_path",
        base,
        "--tokenizer_path",
        tmp_path / "tokenizer",
        "--output_path",
        tmp_path / "new",
    )
    ended = run("prepare_base_model", *arguments)
    assert ended.returncode == 0, ended.stderr
    assert "300 -> 384 rows: 300 tokens, 8 new ones" in ended.stdout
    again = run("prepare_base_model", *arguments)
    assert again.returncode == 2
    assert "is there already" in again.stderr
    rows = tiny.save_rows(tmp_path / "rows.json", 12)
    flags = {"model_path": tmp_path / "new", "data_path": rows, "output_path": tmp_path / "run", "bits": 16}
    answer = harness.run(
        "finetune", {**flags, "template": "chatml", "max_steps": 1, "test_size": 0, "device": "cpu"}
    )
    assert answer["code"] == 0, answer["said"]
    assert "<|im_start|>assistant\n«" in answer["said"]


def sentencepiece_like(scheme: str) -> PreTrainedTokenizerFast:
    """A mark stands for the space before a word, at the start of a text or of each part, as Llama has it."""
    tokenizer = sentencepiece_tokenizer()
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    return tokenizer


def test_pieces_inside_words_gain_no_spaces():
    """Pieces fit a tokenizer with a mark at the start of a text, but not one with a mark before each part."""
    pieces = ["月亮", "太阳"]
    old, new = (sentencepiece_like("first") for _ in range(2))
    assert conversion_vocabulary.extend(new, pieces) == pieces
    conversion_vocabulary.check_spaces(old, new, pieces)
    text = "我看月亮abc 太阳"
    assert new.decode(new(text, add_special_tokens=False).input_ids) == text
    old, new = (sentencepiece_like("always") for _ in range(2))
    conversion_vocabulary.extend(new, pieces)
    with pytest.raises(UserError, match="prepend_scheme"):
        conversion_vocabulary.check_spaces(old, new, pieces)


def test_a_tokenizer_without_bytes_takes_pieces():
    """It needs the pieces that it could not write before."""
    core = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0, byte_fallback=False))
    old, new = (PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>") for _ in range(2))
    new.add_tokens(["你好"])
    conversion_vocabulary.check_spaces(old, new, ["你好"])


def test_nothing_to_add_is_said(tmp_path):
    """No frequent characters, an empty list of pieces and an empty sample give a message and no traceback."""
    tiny.save_model(tmp_path / "base")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "pieces.txt").write_text("月亮\n")
    base = ("--model_path", tmp_path / "base", "--output_path", tmp_path / "new")
    for arguments in (
        ("--characters", tmp_path / "empty.txt"),
        ("--pieces", tmp_path / "empty.txt"),
        ("--pieces", tmp_path / "pieces.txt", "--sample_text", tmp_path / "empty.txt"),
    ):
        ended = run("extend_vocab", *base, *arguments)
        assert ended.returncode == 3
        assert "Traceback" not in ended.stderr
        assert "empty.txt" in ended.stderr
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_that_does_not_belong_to_the_model_is_seen(harness, tmp_path):
    """Ids beyond the embedding give exit code 2; an end token unlike the model's gives a warning."""
    base = tiny.save_model(tmp_path / "base")
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": "a", "output": "月亮"}] * 4))
    flags = {
        "model_path": base,
        "data_path": rows,
        "output_path": tmp_path / "run",
        "bits": 16,
        "max_steps": 1,
    }
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "eos_token_id": 7}))
    answer = harness.run("finetune", {**flags, "device": "cpu", "test_size": 0})
    assert answer["code"] == 0, answer["said"]
    assert "the end token of the tokenizer is 1, but config.json says [7]" in answer["said"]
    larger = tiny.tokenizer()
    conversion_vocabulary.extend(larger, ["月亮"])
    larger.save_pretrained(base)
    answer = harness.run("finetune", {**flags, "device": "cpu", "test_size": 0, "overwrite": True})
    assert answer["code"] == 2
    assert "token ids up to 300, its embedding 300" in answer["said"]


def test_a_tokenizer_with_several_chat_templates(tmp_path):
    """The templates are stored in a subfolder, which is complete before the tokenizer can be seen."""
    folder = tiny.save_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    (tmp_path / "pieces.txt").write_text("zyx\n", encoding="utf-8")
    pieces, target = tmp_path / "pieces.txt", tmp_path / "made"
    ended = run("extend_vocab", "--model_path", folder, "--pieces", pieces, "--output_path", target)
    assert ended.returncode == 0, ended.stderr
    assert AutoTokenizer.from_pretrained(target).chat_template == tokenizer.chat_template
