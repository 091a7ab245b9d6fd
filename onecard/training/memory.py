"""Predicts the memory of a training, and how many tokens of a micro-batch fit beside its weights.

It reads shapes only, no weights. The bytes of weights, adapter, gradient and optimizer are exact. Activations
are an estimate; tests compare it with what a forward pass really keeps.
"""

from typing import Any

import torch

from onecard.config.training import FinetuneConfig
from onecard.models import base_model, loss, quantized, trainable
from onecard.models import memory as models_memory
from onecard.models.lora_shape import LoraShape
from onecard.models.memory import SAFETY
from onecard.system import hardware
from onecard.training.plan import check_quantised

SMALL = 4096  # elements; bitsandbytes keeps the moments of smaller parameters in fp32


def bytes_per_token(config: Any, element: int, checkpointing: bool) -> int:
    """Bytes of activations that one token keeps until the backward pass.

    config: a transformers model config; element: bytes of one activation (2 or 4). A layer keeps two norms in
    fp32 (twice each), q, k, v, the attention output, three MLP products and the inputs of the adapter after
    dropout. With gradient checkpointing one layer keeps all of it, and every layer its input.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = hidden * (4 * 4 + 8 * element) + 3 * intermediate * element
    return layer + layers * hidden * element if checkpointing else layers * layer


def tokens_that_fit(free_bytes: int, config: Any, element: int, checkpointing: bool) -> int:
    """Tokens of a micro-batch that fit into `free_bytes`; at least 1."""
    usable = free_bytes * SAFETY - _logits_bytes(config)
    return max(1, int(usable // bytes_per_token(config, element, checkpointing)))


def tokens_on_cpu(options: FinetuneConfig) -> int:
    """Tokens of a micro-batch on the CPU."""
    return max(2048, options.cutoff_len)


def _logits_bytes(config: Any) -> int:
    """Bytes of the logits that exist at the same time, with their gradients, in fp32."""
    return 4 * 4 * loss.CHUNK * config.vocab_size


def predict(options: FinetuneConfig, folder: str, device: str, free_bytes: int | None) -> dict[str, float]:
    """GiB of weights, adapter, gradient, optimizer and activations at the peak of a training on one device.

    folder: of the base model; device: cpu or cuda:N; free_bytes: free now, for --micro_batch_tokens auto on a
    GPU. The program itself and the CUDA context are not included. Raises UserError when the model or the
    adapter cannot be trained.
    """
    config = base_model.load_config(folder)
    check_quantised(options, config)
    shape = LoraShape.of(options)
    base_model.check_architecture(options.model_path, config, shape)
    dtype = hardware.choose_dtype(options.dtype, device).value
    stored_dtype = "fp32" if options.train_what == trainable.FULL else dtype
    bare = base_model.skeleton(folder, config).to(base_model.DTYPES[stored_dtype])
    weights = 0
    if quantized.method(config):
        weights = models_memory.stored_bytes(bare, folder)
    elif options.train_what != trainable.FULL:
        weights = models_memory.weight_bytes(bare, options.bits)
    with torch.device("meta"):
        trained = trainable.trainable(trainable.prepare(bare, shape, seed=0))
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    parts = {
        "weights": weights,
        "adapter": parameters,
        "gradient": parameters,
        "optimizer": optimizer_bytes([parameter.numel() for parameter in trained], options.optimizer),
    }
    checkpointing = hardware.choose_checkpointing(options.gradient_checkpointing, device).value
    left = None if free_bytes is None else free_bytes - sum(parts.values())
    element = base_model.DTYPES[dtype].itemsize
    tokens = _micro_batch(options, config, element, checkpointing, device, left)
    activations = tokens * bytes_per_token(config, element, checkpointing)
    parts["activations"] = activations + _logits_bytes(config)
    return {name: count / 2**30 for name, count in parts.items()}


def _micro_batch(
    options: FinetuneConfig, config: Any, element: int, checkpointing: bool, device: str, left: int | None
) -> int:
    """Tokens of the largest micro-batch if rows have --cutoff_len tokens. left: bytes for activations."""
    largest_step = options.batch_size * options.cutoff_len
    budget = options.micro_batch_tokens
    if budget == "auto" and device == "cpu":
        budget = tokens_on_cpu(options)
    elif budget == "auto":
        fits = largest_step if left is None else tokens_that_fit(left, config, element, checkpointing)
        budget = max(options.cutoff_len, fits)
    return min(max(budget, options.cutoff_len), largest_step)


def optimizer_bytes(counts: list[int], optimizer: str) -> int:
    """Bytes of AdamW's two moments for parameters with these numbers of elements.

    bitsandbytes keeps the moments of small parameters in fp32, and others in 8 bits with a scale for every
    256 elements.
    """
    if optimizer == "adamw":
        return 8 * sum(counts)
    return sum(8 * n if n < SMALL else 2 * (n + 4 * -(-n // 256)) for n in counts)
