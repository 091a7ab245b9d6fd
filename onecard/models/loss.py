"""Cross entropy at target positions only, in chunks: the logits of all tokens never exist at once.

torch's own linear_cross_entropy does this too, but its sum comes back in the dtype of its input: rounded to
16 units in bf16, infinite above 65504 in fp16. Here the sum and its gradient's scale stay in fp32.

Shapes: N target tokens, H hidden size, V vocabulary.
"""

import torch
from torch.nn.functional import linear

CHUNK = 256  # target tokens whose logits [CHUNK, V] exist at the same time


def loss_and_correct(
    hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, count: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum over targets of -log p(target), fp32 scalar; how many targets are the most probable token).

    hidden [N, H]: final hidden states of the positions that predict; head: the output layer, weight [V, H],
    used in hidden's dtype; targets [N]: token ids. The loss is differentiable in hidden, and in weight and
    bias where they are trained. Without `count` the second is 0, which spares a slow pass over the logits.
    """
    return _ChunkedCrossEntropy.apply(hidden, head.weight, head.bias, targets, count)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient of a chunk is made while its logits exist, so backward only has to scale it."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, count):
        loss = torch.zeros((), device=hidden.device)
        correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # [N, H]
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # [V, H]
        of_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None  # [V]
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            wanted = targets[part].unsqueeze(1)
            logits = linear(hidden[part], weight, bias)  # [CHUNK, V]
            if count:
                correct += (logits.argmax(-1, keepdim=True) == wanted).sum()
            log_probabilities = logits.log_softmax(-1, dtype=torch.float32)
            hit = log_probabilities.gather(1, wanted)
            loss -= hit.sum()
            if any(ctx.needs_input_grad):
                probabilities = log_probabilities.exp_()
                probabilities.scatter_add_(1, wanted, torch.full_like(hit, -1.0))
                if of_bias is not None:
                    of_bias += probabilities.sum(0)
                probabilities = probabilities.to(weight.dtype)
                if gradient is not None:
                    gradient[part] = probabilities @ weight
                if of_weight is not None:
                    of_weight += probabilities.T @ hidden[part]
        ctx.mark_non_differentiable(correct)
        ctx.save_for_backward(gradient, of_weight, of_bias)
        return loss, correct

    @staticmethod
    def backward(ctx, grad_loss, _):
        scaled = [None if g is None else (g.float() * grad_loss).to(g.dtype) for g in ctx.saved_tensors]
        return *scaled, None, None
