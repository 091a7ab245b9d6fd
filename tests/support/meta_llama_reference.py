"""Small LLaMA models in their original layout and mathematics, with complex rotary embeddings in fp32."""

import base64
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

Shards = list[dict[str, torch.Tensor]]
COLUMNS = ("wo.weight", "w2.weight")  # these are cut along their inputs
LAYERS, MULTIPLE = 2, 256


def params(heads: int = 8, kv_heads: int = 8, vocab: int = 64, **more: Any) -> dict[str, Any]:
    settings = {
        "dim": 8 * heads,
        "multiple_of": MULTIPLE,
        "n_heads": heads,
        "n_layers": LAYERS,
        "norm_eps": 1e-5,
    }
    settings |= {} if heads == kv_heads else {"n_kv_heads": kv_heads}
    return {**settings, "vocab_size": vocab, **more}


def hidden(settings: dict[str, Any]) -> int:
    wide = int(2 * 4 * settings["dim"] / 3)
    if "ffn_dim_multiplier" in settings:
        wide = int(settings["ffn_dim_multiplier"] * wide)
    return -(-wide // settings["multiple_of"]) * settings["multiple_of"]


def weights(settings: dict[str, Any], vocab: int, dtype: torch.dtype, tied: bool) -> dict[str, torch.Tensor]:
    """A whole model with random weights under its original names."""
    draw = torch.Generator().manual_seed(0)
    d, f = settings["dim"], hidden(settings)
    kv = d // settings["n_heads"] * settings.get("n_kv_heads", settings["n_heads"])

    def some(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw) * 0.1).to(dtype)

    tensors = {"tok_embeddings.weight": some(vocab, d), "norm.weight": 1 + some(d)}
    for n in range(settings["n_layers"]):
        sizes = {"attention.wq": (d, d), "attention.wk": (kv, d), "attention.wv": (kv, d)}
        sizes |= {"attention.wo": (d, d), "feed_forward.w1": (f, d)}
        sizes |= {"feed_forward.w2": (d, f), "feed_forward.w3": (f, d)}
        tensors |= {f"layers.{n}.{name}.weight": some(*size) for name, size in sizes.items()}
        tensors |= {f"layers.{n}.{name}.weight": 1 + some(d) for name in ("attention_norm", "ffn_norm")}
    return {**tensors, "output.weight": tensors["tok_embeddings.weight"].clone() if tied else some(vocab, d)}


def cut(whole: dict[str, torch.Tensor], count: int, embedding: int = 1) -> Shards:
    """The shards of a model; the embedding is cut along dimension `embedding`."""

    def piece(name: str, tensor: torch.Tensor, number: int) -> torch.Tensor:
        if tensor.ndim == 1:
            return tensor.clone()
        along = embedding if name == "tok_embeddings.weight" else int(name.endswith(COLUMNS))
        return tensor.chunk(count, dim=along)[number].contiguous().clone()

    return [{name: piece(name, tensor, n) for name, tensor in whole.items()} for n in range(count)]


def save(folder: Path, settings: dict[str, Any], shards: Shards) -> Path:
    folder.mkdir(parents=True)
    for number, tensors in enumerate(shards):
        torch.save(tensors, folder / f"consolidated.{number:02d}.pth")
    (folder / "params.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def load(folder: Path) -> Shards:
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("consolidated.*.pth"))]


def same(one: Shards, other: Shards) -> bool:
    """Whether all tensors are equal bit for bit, in the same shards under the same names."""
    return len(one) == len(other) and all(
        a.keys() == b.keys()
        and all(a[n].dtype == b[n].dtype and torch.equal(bits(a[n]), bits(b[n])) for n in a)
        for a, b in zip(one, other, strict=True)
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def logits(settings: dict[str, Any], given: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The logits [T, V] of token ids [T], computed in fp32 like the original code."""
    tensors = {name: tensor.float() for name, tensor in given.items()}
    heads, eps = settings["n_heads"], settings["norm_eps"]
    kv_heads, width = settings.get("n_kv_heads", heads), settings["dim"] // heads
    steps = settings.get("rope_theta", 10000.0) ** (-torch.arange(0, width, 2)[: width // 2].float() / width)
    angles = torch.outer(torch.arange(len(ids)).float(), steps)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # [T, 1, width / 2]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def turned(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(-2)

    x = tensors["tok_embeddings.weight"][ids]
    mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    for n in range(settings["n_layers"]):
        one = {k.split(".", 2)[2]: v for k, v in tensors.items() if k.startswith(f"layers.{n}.")}
        y = norm(x, one["attention_norm.weight"])
        q = turned((y @ one["attention.wq.weight"].T).view(len(ids), heads, width))
        k = turned((y @ one["attention.wk.weight"].T).view(len(ids), kv_heads, width))
        v = (y @ one["attention.wv.weight"].T).view(len(ids), kv_heads, width)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / width**0.5 + mask
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ one["attention.wo.weight"].T
        y = norm(x, one["ffn_norm.weight"])
        gate = F.silu(y @ one["feed_forward.w1.weight"].T) * (y @ one["feed_forward.w3.weight"].T)
        x = x + gate @ one["feed_forward.w2.weight"].T
    return norm(x, tensors["norm.weight"]) @ tensors["output.weight"].T


def sentencepiece(path: Path, vocab: int = 400, **changes: Any) -> int:
    """Train a small tokenizer of LLaMA's kind; returns its number of tokens."""
    import sentencepiece as library

    texts = ["hello world, this is a small test of llama", "the quick brown fox 12345", "你好世界 深度学习"]
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 1.0,
        "hard_vocab_limit": False,
        "normalization_rule_name": "identity",
        "split_digits": True,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "num_threads": 1,
        "minloglevel": 2,
    }
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 50),
        model_prefix=str(path.with_suffix("")),
        vocab_size=vocab,
        **{**settings, **changes},
    )
    path.with_suffix(".vocab").unlink()
    return library.SentencePieceProcessor(model_file=str(path)).get_piece_size()


def ranks(path: Path, merges: int = 60) -> list[bytes]:
    """Write a small tokenizer.model as LLaMA 3 has it; returns its tokens by rank."""
    text = "hello world, this is a small test of llama: 你好世界 the quick brown fox jumps 123 456".encode()
    tokens = [bytes([n]) for n in range(256)]
    words = [[bytes([b]) for b in word] for word in text.split()]
    words += [[b" ", *word] for word in words]
    for _ in range(merges):
        pairs = [pair for word in words for pair in itertools.pairwise(word)]
        fresh = [pair for pair in pairs if pair[0] + pair[1] not in tokens]
        if not fresh:
            break
        best = max(sorted(set(fresh)), key=fresh.count)
        tokens.append(best[0] + best[1])
        words = [by_rank(b"".join(word), {t: n for n, t in enumerate(tokens)}) for word in words]
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
    return tokens


def by_rank(text: bytes, known: dict[bytes, int]) -> list[bytes]:
    """Byte pair encoding as tiktoken does it: the pair with the lowest rank is joined first."""
    if text in known:
        return [text]
    parts = [bytes([byte]) for byte in text]
    lowest: Callable[[int], float] = lambda at: known.get(parts[at] + parts[at + 1], float("inf"))  # noqa: E731
    while len(parts) > 1:
        at = min(range(len(parts) - 1), key=lowest)
        if lowest(at) == float("inf"):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
