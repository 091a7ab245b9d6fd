"""LLaMA's two layouts: the original one (consolidated.NN.pth, params.json) and that of transformers.

This file knows the names and shapes of the tensors, how they are cut into shards, the order of their rotary
rows, and the settings of both layouts. conversion/meta_files.py knows the files of a folder.

Shapes: V tokens, D width of the model, F width of the feed-forward part, d = D / heads, K = d * KV heads.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from onecard.errors import CHECKPOINT, UserError

COMPUTED = "rope.freqs"  # a table of rotary frequencies in old files, which are computed today
NEEDED = ("dim", "n_layers", "n_heads", "norm_eps")
SETTINGS = {
    *NEEDED,
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "rope_theta",
    "use_scaled_rope",
    "rope_scaling_factor",
    "max_seq_len",
    "max_batch_size",
}
# settings of transformers that the original layout cannot express, and the values that it implies
PLAIN = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a LLaMA model and the settings of its rotary embedding."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int  # F
    vocab: int
    norm_eps: float
    theta: float = 10000.0
    scaling: dict[str, Any] | None = None  # of LLaMA 3.1, in the terms of transformers
    length: int = 2048  # tokens of the longest context

    @property
    def head_dim(self) -> int:
        """The size d of a head."""
        return self.dim // self.heads


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor of the model: its name in both layouts, and its whole shape.

    cut: the dimension along which shards cut it, None when each shard has all of it. rotary: whether the two
    layouts order its rows differently, as the rotary embedding needs them.
    """

    hf: str
    meta: str
    shape: tuple[int, ...]
    cut: int | None = None
    rotary: bool = False


def weights(shape: Shape, embedding_cut: int) -> list[Weight]:
    """Every tensor of an untied model, in the order of its layers; the head is the last.

    embedding_cut: the dimension along which shards cut the embedding, 0 or 1.
    """
    d, kv, f = shape.dim, shape.kv_heads * shape.head_dim, shape.hidden
    tensors = [Weight("model.embed_tokens.weight", "tok_embeddings.weight", (shape.vocab, d), embedding_cut)]
    for n in range(shape.layers):
        hf, meta = f"model.layers.{n}.", f"layers.{n}."
        tensors += [
            Weight(f"{hf}self_attn.q_proj.weight", f"{meta}attention.wq.weight", (d, d), 0, rotary=True),
            Weight(f"{hf}self_attn.k_proj.weight", f"{meta}attention.wk.weight", (kv, d), 0, rotary=True),
            Weight(f"{hf}self_attn.v_proj.weight", f"{meta}attention.wv.weight", (kv, d), 0),
            Weight(f"{hf}self_attn.o_proj.weight", f"{meta}attention.wo.weight", (d, d), 1),
            Weight(f"{hf}mlp.gate_proj.weight", f"{meta}feed_forward.w1.weight", (f, d), 0),
            Weight(f"{hf}mlp.down_proj.weight", f"{meta}feed_forward.w2.weight", (d, f), 1),
            Weight(f"{hf}mlp.up_proj.weight", f"{meta}feed_forward.w3.weight", (f, d), 0),
            Weight(f"{hf}input_layernorm.weight", f"{meta}attention_norm.weight", (d,)),
            Weight(f"{hf}post_attention_layernorm.weight", f"{meta}ffn_norm.weight", (d,)),
        ]
    tensors.append(Weight("model.norm.weight", "norm.weight", (d,)))
    tensors.append(Weight("lm_head.weight", "output.weight", (shape.vocab, d), 0))
    return tensors


def part(weight: Weight, shards: int) -> tuple[int, ...]:
    """The shape of one of `shards` equal pieces; raises UserError when the tensor cannot be cut like that."""
    if weight.cut is None:
        return weight.shape
    if weight.shape[weight.cut] % shards:
        problem = f"{weight.meta} {list(weight.shape)} cannot be cut into {shards} equal pieces."
        raise UserError(f"--num_shards {shards}: {problem}", "Use fewer shards.")
    return tuple(n // shards if at == weight.cut else n for at, n in enumerate(weight.shape))


def check_shards(shape: Shape, shards: int) -> None:
    """Raise UserError unless every shard gets whole heads and all tensors can be cut into equal pieces."""
    if shape.heads % shards or shape.kv_heads % shards:
        problem = f"{shape.heads} heads and {shape.kv_heads} KV heads cannot be divided among {shards}."
        raise UserError(f"--num_shards {shards}: {problem}", "Use fewer shards.")
    for weight in weights(shape, 0) + weights(shape, 1)[:1]:
        part(weight, shards)


def to_halves(rows: Any, head_dim: int) -> Any:
    """Reorder the rows [n * d, D] of q or k of n heads from pairs to halves.

    The original layout has pairs (x0 y0 x1 y1 ...), transformers has halves (x0 x1 ... y0 y1 ...).
    """
    pairs = rows.view(-1, head_dim // 2, 2, rows.shape[1])
    return pairs.transpose(1, 2).reshape(rows.shape)


def to_pairs(rows: Any, head_dim: int) -> Any:
    """Reorder the rows [n * d, D] of q or k of n heads from halves to pairs, the inverse of to_halves."""
    halves = rows.view(-1, 2, head_dim // 2, rows.shape[1])
    return halves.transpose(1, 2).reshape(rows.shape)


def feed_forward(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """F as the original code computes it: two thirds of 4 D, times a factor, rounded up to a multiple."""
    wide = int(2 * (4 * dim) / 3)
    wide = int(multiplier * wide) if multiplier is not None else wide
    return multiple_of * math.ceil(wide / multiple_of)


def from_params(params: dict[str, Any], path: Path, vocab: int) -> Shape:
    """The shape that params.json describes.

    path: of the file, for messages; vocab: rows of the embedding, because old files have the size -1. Raises
    UserError (exit 4) for settings that are missing, unknown or do not fit together.
    """

    def wrong(problem: str, fix: str = "Download it again.") -> UserError:
        return UserError(f"{path}: {problem}.", fix, CHECKPOINT)

    missing, unknown = [name for name in NEEDED if name not in params], sorted(params.keys() - SETTINGS)
    if missing or unknown:
        name = (missing or unknown)[0]
        raise wrong(f"{name} is missing" if missing else f"{name} is not a setting of LLaMA models")
    try:
        dim, layers, heads = (_whole(params, name) for name in ("dim", "n_layers", "n_heads"))
        kv_heads = _whole(params, "n_kv_heads") if params.get("n_kv_heads") is not None else heads
        multiple, multiplier = int(params.get("multiple_of", 256)), params.get("ffn_dim_multiplier")
        theta, eps = float(params.get("rope_theta", 10000.0)), float(params["norm_eps"])
        hidden = feed_forward(dim, multiple, None if multiplier is None else float(multiplier))
        vocab_size = int(params.get("vocab_size", -1))
        factor = float(params.get("rope_scaling_factor") or 0)
        length = int(params.get("max_seq_len") or 0)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise wrong(f"a setting is not a number or has a wrong size ({error})") from None
    if heads % kv_heads or dim % heads or dim // heads % 2 or hidden < 1 or theta <= 0:
        raise wrong(f"dim {dim}, n_heads {heads}, n_kv_heads {kv_heads} do not fit together")
    if vocab_size not in (-1, vocab):
        raise wrong(f"vocab_size is {vocab_size}, but the embedding has {vocab} rows")
    scaling = None
    if params.get("use_scaled_rope"):
        if not factor:
            fix = 'Add "rope_scaling_factor": 8 for LLaMA 3.1 and 3.3, or 32 for 3.2.'
            raise wrong("it has use_scaled_rope, but no rope_scaling_factor", fix)
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    length = length or _length(theta, eps, scaling is not None)
    return Shape(dim, layers, heads, kv_heads, hidden, vocab, eps, theta, scaling, length)


def _whole(params: dict[str, Any], name: str) -> int:
    value = params[name]
    if type(value) is not int or not 0 < value < 1 << 24:
        raise ValueError(f"{name} {value!r}")
    return value


def _length(theta: float, eps: float, is_scaled: bool) -> int:
    """The longest context in tokens, which params.json lacks; other settings show the generation."""
    if is_scaled:
        return 131072  # LLaMA 3.1 and later
    if theta > 10000.0:
        return 16384 if theta == 1e6 else 8192  # Code LLaMA; LLaMA 3
    return 2048 if eps <= 1e-6 else 4096  # LLaMA 1; LLaMA 2


def to_params(shape: Shape) -> dict[str, Any]:
    """The content of params.json for a shape, with only the settings that this generation of models has."""
    multiple, multiplier = _multiples(shape)
    params: dict[str, Any] = {"dim": shape.dim}
    params |= {} if multiplier is None else {"ffn_dim_multiplier": multiplier}
    params |= {"multiple_of": multiple, "n_heads": shape.heads}
    params |= {} if shape.kv_heads == shape.heads else {"n_kv_heads": shape.kv_heads}
    params |= {"n_layers": shape.layers, "norm_eps": shape.norm_eps}
    params |= {} if shape.theta == 10000.0 else {"rope_theta": shape.theta}
    if shape.scaling:
        params |= {"rope_scaling_factor": shape.scaling["factor"], "use_scaled_rope": True}
    return {**params, "vocab_size": shape.vocab}


def _multiples(shape: Shape) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) from which feed_forward computes F."""
    candidates = [
        m for m in (256, 4096, 2048, 1024, 512, 128, 64, 32, 16, 8, 4, 2, 1) if not shape.hidden % m
    ]
    for multiple in candidates:
        if feed_forward(shape.dim, multiple, None) == shape.hidden:
            return multiple, None
    plain = feed_forward(shape.dim, 1, None)
    for multiple in candidates:
        for digits in (1, 2, 3, 6, 17):
            multiplier = round((shape.hidden - multiple / 2) / plain, digits)
            if multiplier > 0 and feed_forward(shape.dim, multiple, multiplier) == shape.hidden:
                return multiple, multiplier
    raise AssertionError("multiple 1 always fits")


def from_config(config: dict[str, Any], path: Path) -> Shape:
    """The shape that config.json of transformers describes; path: of the file, for messages.

    Raises UserError: exit 2 for settings that the original layout cannot express, 4 for a damaged file.
    """
    if config.get("architectures") != ["LlamaForCausalLM"] and config.get("model_type") != "llama":
        problem = f"{path}: a model of the type {config.get('model_type')} has no original layout."
        raise UserError(problem, "Only LLaMA models have one.")
    other = [name for name, plain in PLAIN.items() if config.get(name, plain) != plain]
    other += ["quantization_config"] if config.get("quantization_config") else []
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    try:
        dim, heads = config["hidden_size"], config["num_attention_heads"]
        if config.get("head_dim") not in (None, dim // heads):
            other.append("head_dim")
        if kind not in ("default", "llama3"):
            other.append(f"rope_type {kind}")
        if other:
            problem = f"{path}: the original layout cannot express {', '.join(other)}."
            raise UserError(problem, "Keep this model in the layout of transformers.")
        scaling = None
        if kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            scaling = {"rope_type": "llama3", **{name: rope[name] for name in names}}
            if [scaling[name] for name in names[1:]] != [1, 4, 8192]:
                problem = f"{path}: the original layout cannot express the factors of its rope scaling."
                raise UserError(problem, "Keep this model in the layout of transformers.")
        return Shape(
            dim,
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads") or heads,
            config["intermediate_size"],
            config["vocab_size"],
            config["rms_norm_eps"],
            float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            scaling,
            config.get("max_position_embeddings", 2048),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        problem = f"{path} is damaged or incomplete ({error!r})."
        raise UserError(problem, "Download it again.", CHECKPOINT) from None


def to_config(shape: Shape, dtype: str, tied: bool, ids: dict[str, Any]) -> dict[str, Any]:
    """The content of transformers' config.json for a shape.

    dtype: a name like float16; tied: whether the head is the embedding; ids: bos_token_id and the like.
    """
    rope = {"rope_theta": shape.theta, **(shape.scaling or {"rope_type": "default"})}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.dim,
        "initializer_range": 0.02,
        "intermediate_size": shape.hidden,
        "max_position_embeddings": shape.length,
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": rope,
        "rope_theta": shape.theta,  # older versions of transformers look here
        **({"rope_scaling": shape.scaling} if shape.scaling else {}),
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": shape.vocab,
        **ids,
    }
