"""Cross entropy at target positions only, in chunks: the logits of all tokens never exist at once.

Shapes: T tokens, N target tokens, H hidden size, V vocabulary.
"""

import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import cross_entropy, linear, linear_cross_entropy

CHUNK = 256  # target tokens whose logits [CHUNK, V] exist at the same time


def loss_sum(hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """Sum over targets of -log p(target), fp32 scalar, differentiable in `hidden`.

    hidden [N, H]: final hidden states of the positions that predict; head: the frozen output layer, weight
    [V, H]; targets [N]: token ids. torch computes the gradient chunk by chunk during the forward pass.
    """
    options = LinearCrossEntropyOptions(
        batch_chunk_size=CHUNK, chunking_method=None, acc_policy=_policy(hidden)
    )
    return linear_cross_entropy(
        hidden, head.weight, targets, linear_bias=head.bias, reduction="sum", options=options
    ).float()


@torch.no_grad()
def loss_and_correct(
    hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of -log p(target), number of targets that are the most probable token); no gradient."""
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    correct = torch.zeros((), dtype=torch.long, device=hidden.device)
    for part, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        logits = linear(part, head.weight, head.bias)  # [CHUNK, V]
        total += cross_entropy(logits.float(), wanted, reduction="sum")
        correct += (logits.argmax(-1) == wanted).sum()
    return total, correct


def _policy(hidden: torch.Tensor) -> str:
    return "auto" if hidden.dtype == torch.float32 else "balanced"
