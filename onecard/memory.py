"""How many tokens of a micro-batch fit into a card's free memory.

An estimate from shapes alone; tests compare it with what a forward pass really keeps.
"""

from typing import Any

from onecard import loss

SAFETY = 0.8  # share of the free memory that is planned for


def bytes_per_token(config: Any, element: int, checkpointing: bool) -> int:
    """Bytes of activations one token keeps until the backward pass.

    config: a transformers model config; element: bytes of one activation (2 or 4). Per layer: two norms in
    fp32 (twice each), q, k, v, the attention output, three MLP products and the adapter's dropped inputs;
    with checkpointing one layer in full plus the input of every layer.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = hidden * (4 * 4 + 8 * element) + 3 * intermediate * element
    return layer + layers * hidden * element if checkpointing else layers * layer


def tokens_that_fit(free_bytes: int, config: Any, element: int, checkpointing: bool) -> int:
    """Micro-batch budget in tokens for `free_bytes` of free memory; at least 1."""
    logits = 4 * 4 * loss.CHUNK * config.vocab_size
    usable = free_bytes * SAFETY - logits
    return max(1, int(usable // bytes_per_token(config, element, checkpointing)))
