"""Cross entropy at target positions only, in chunks, so that the logits of all tokens never exist at once.

torch's own linear_cross_entropy works in chunks too, but it returns the sum in the dtype of its input: bf16
rounds a sum of some thousands to multiples of 16, and in fp16 a sum above 65504 is infinite. Here the sum and
the factor of its gradient stay in fp32.

Shapes: N target tokens, H hidden size, V vocabulary.
"""

import torch
from torch.nn.functional import linear

CHUNK = 256  # target tokens whose logits [CHUNK, V] exist at one time


def loss_and_correct(
    hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, count: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss (sum of -log p(target), a scalar in fp32), and how many targets are the most probable token.

    hidden [N, H]: final hidden states of the positions before the targets; head: the output layer with weight
    [V, H], which is used in the dtype of hidden; targets [N]: token ids. The loss is differentiable with
    respect to hidden, and to weight and bias where they are trained. With count=False the second result is 0,
    which saves a slow pass over the logits.
    """
    return _ChunkedCrossEntropy.apply(hidden, head.weight, head.bias, targets, count)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """It computes the gradient of a chunk while the logits of the chunk exist; backward only scales it."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, count):
        loss = torch.zeros((), device=hidden.device)
        correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # [N, H]
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # [V, H]
        bias_gradient = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None  # [V]
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            target = targets[part].unsqueeze(1)
            logits = linear(hidden[part], weight, bias)  # [CHUNK, V]
            if count:
                correct += (logits.argmax(-1, keepdim=True) == target).sum()
            log_probabilities = logits.log_softmax(-1, dtype=torch.float32)
            log_likelihood = log_probabilities.gather(1, target)
            loss -= log_likelihood.sum()
            if any(ctx.needs_input_grad):
                probabilities = log_probabilities.exp_()
                probabilities.scatter_add_(1, target, torch.full_like(log_likelihood, -1.0))
                if bias_gradient is not None:
                    bias_gradient += probabilities.sum(0)
                probabilities = probabilities.to(weight.dtype)
                if gradient is not None:
                    gradient[part] = probabilities @ weight
                if weight_gradient is not None:
                    weight_gradient += probabilities.T @ hidden[part]
        ctx.mark_non_differentiable(correct)
        ctx.save_for_backward(gradient, weight_gradient, bias_gradient)
        return loss, correct

    @staticmethod
    def backward(ctx, grad_loss, _):
        scaled = [None if g is None else (g.float() * grad_loss).to(g.dtype) for g in ctx.saved_tensors]
        return *scaled, None, None
