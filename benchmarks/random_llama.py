"""Models in LLaMA's shapes with random weights, and adapters for them. tools.py works on these."""

import json
import shutil
import tempfile
from pathlib import Path

import torch

from onecard.conversion import meta_layout
from onecard.models import pth_files, tensor_files
from onecard.models.tensor_files import Files, StoredTensor

VOCAB = 32000
FILE = 500 << 20  # bytes of a file in transformers' layout
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16


def shape_of(width: int, layers: int) -> meta_layout.Shape:
    """The shape of a LLaMA model; a width of 4096 and 32 layers are those of LLaMA 7B."""
    return meta_layout.Shape(
        width, layers, 32, 32, meta_layout.feed_forward(width, 256, None), VOCAB, 1e-5, length=4096
    )


def fill(placed: dict[str, StoredTensor]) -> None:
    draw = torch.Generator().manual_seed(0)
    with Files() as files:
        for tensor in placed.values():
            for first, last in tensor.blocks():
                rows = torch.empty(last - first, *tensor.shape[1:], dtype=tensor.dtype)
                files.write(tensor, first, rows.uniform_(-0.1, 0.1, generator=draw))
        files.sync()


def make_meta(folder: Path, shape: meta_layout.Shape) -> None:
    folder.mkdir()
    for number in range(2):
        tensors = [
            StoredTensor(w.meta, torch.bfloat16, meta_layout.part(w, 2))
            for w in meta_layout.weights(shape, 1)
        ]
        fill(pth_files.create_file(folder / f"consolidated.{number:02d}.pth", tensors))
    (folder / "params.json").write_text(json.dumps(meta_layout.to_params(shape)), encoding="utf-8")
    make_tokenizer(folder)


def make_hf(folder: Path, shape: meta_layout.Shape) -> None:
    folder.mkdir()
    tensors = [StoredTensor(w.hf, torch.bfloat16, w.shape) for w in meta_layout.weights(shape, 1)]
    files = tensor_files.divide(tensors, FILE)
    fill(tensor_files.create(folder, dict(zip(tensor_files.names_of(len(files)), files, strict=True))))
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(
        json.dumps(meta_layout.to_config(shape, "bfloat16", False, ids)), encoding="utf-8"
    )
    make_tokenizer(folder)


def make_adapter(folder: Path, shape: meta_layout.Shape) -> None:
    """A random adapter on all linear layers."""
    from peft import LoraConfig

    folder.mkdir()
    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    settings.save_pretrained(folder)
    pairs = []
    for weight in meta_layout.weights(shape, 1):
        module = weight.hf.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in TARGETS:
            name, (out, inside) = f"base_model.model.{module}", weight.shape
            pairs.append(StoredTensor(f"{name}.lora_A.weight", torch.float32, (RANK, inside)))
            pairs.append(StoredTensor(f"{name}.lora_B.weight", torch.float32, (out, RANK)))
    fill(tensor_files.create_file(folder / "adapter_model.safetensors", pairs))


def make_tokenizer(folder: Path) -> None:
    """A tokenizer with as many tokens as the model has rows, most of them single characters."""
    import sentencepiece

    letters = [chr(n) for n in range(0x4E00, 0x9FA5)] + [chr(n) for n in range(0xAC00, 0xD7A4)]
    letters = letters[:31_000]
    with tempfile.TemporaryDirectory() as place:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("".join(letters[i : i + 50]) for i in range(0, len(letters), 50)),
            model_prefix=f"{place}/tokenizer",
            model_type="bpe",
            vocab_size=VOCAB,
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        shutil.copy(f"{place}/tokenizer.model", folder)
