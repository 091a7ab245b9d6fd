"""Causal attention inside each document of a packed row, registered with transformers' AttentionInterface.

A packed row holds several documents, one after the other. A token attends only to earlier tokens of its own
document. One causal call of scaled_dot_product_attention per document needs no mask; that saves the memory of
the mask, and the time for pairs of tokens that the mask would exclude. On a CPU, the backward pass handles
many short documents at once (benchmarks/attention_speed.py measures the gain). This file knows no model.

Shapes: H query heads, K key/value heads (G = H / K query heads share one), T tokens, D head size; a batch of
n documents has up to L tokens each.
"""

import math
from itertools import accumulate, groupby, pairwise

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "onecard_packed"  # attn_implementation of a model that is trained on packed rows
SHORT = 512  # tokens; torch's own backward pass is as fast for longer documents
GROUP = 1024  # tokens (padding included) of short documents in one batch of the backward pass
BLOCK = 128  # queries whose scores exist at one time


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, K, T, D]
    value: torch.Tensor,  # [1, K, T, D]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention output [1, T, H, D] of a packed row; document_lengths (tokens) must add up to T.

    Raises ValueError when the model does not pass document_lengths on to its attention, and for attention of
    another kind: with a soft cap, with sinks, or with a window shorter than a document.
    """
    if document_lengths is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError(f"{NAME} attention needs one packed row with document_lengths and without a mask")
    if softcap is not None or s_aux is not None or (sliding_window or math.inf) < max(document_lengths):
        raise ValueError(f"{NAME} attention supports no soft cap, no sinks and no window shorter than a row")
    assert sum(document_lengths) == query.shape[2] == key.shape[2]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    batched = query.device.type == "cpu" and dropout == 0
    outputs, start = [], 0
    for short, run in groupby(document_lengths, key=lambda length: batched and length <= SHORT):
        lengths = tuple(run)
        end = start + sum(lengths)
        parts = [tensor[:, :, start:end] for tensor in (query, key, value)]
        if short:
            outputs.append(_ShortDocuments.apply(*parts, lengths, scaling))
        else:
            outputs.append(each_document(*parts, lengths, scaling, dropout))
        start = end
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output.transpose(1, 2), None


def each_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """One causal attention call per document.

    query [1, H, T, D], key and value [1, K, T, D] -> output [1, H, T, D]; lengths: tokens of each document.
    """
    outputs = [
        scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for start, end in pairwise(accumulate(lengths, initial=0))
    ]
    return torch.cat(outputs, dim=2)


class _ShortDocuments(torch.autograd.Function):
    """The same as each_document, but the backward pass works on batches of documents of similar length."""

    @staticmethod
    def forward(ctx, query, key, value, lengths, scaling):
        output = each_document(query, key, value, lengths, scaling)
        ctx.save_for_backward(query, key, value, output)
        ctx.lengths, ctx.scaling = lengths, scaling
        return output

    @staticmethod
    def backward(ctx, grad_output):
        tensors = [*ctx.saved_tensors, grad_output]
        gradients = [torch.empty_like(tensor) for tensor in tensors[:3]]
        for group in similar_lengths(ctx.lengths):
            longest = max(end - start for start, end in group)
            padded = [_padded(tensor, group, longest) for tensor in tensors]
            for gradient, parts in zip(gradients, _backward(*padded, ctx.scaling), strict=True):
                for part, (start, end) in zip(parts, group, strict=True):
                    gradient[0, :, start:end] = part[:, : end - start]
        return *gradients, None, None


def similar_lengths(lengths: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    """(start, end) of all documents in groups of similar length.

    No document is more than a fifth shorter than the longest of its group. A group of several documents has
    at most GROUP tokens, padding included.
    """
    groups: list[list[tuple[int, int]]] = []
    spans = list(pairwise(accumulate(lengths, initial=0)))
    for span in sorted(spans, key=lambda span: span[0] - span[1]):
        longest = groups[-1][0][1] - groups[-1][0][0] if groups else math.inf
        near = (span[1] - span[0]) * 5 >= longest * 4
        if near and (len(groups[-1]) + 1) * longest <= GROUP:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _padded(tensor: torch.Tensor, group: list[tuple[int, int]], longest: int) -> torch.Tensor:
    """[1, X, T, D] -> [n, X, L, D]; the zeros behind the end of a document change none of its results."""
    parts = [pad(tensor[0, :, start:end], (0, 0, 0, longest - (end - start))) for start, end in group]
    batch = torch.stack(parts)
    return batch if batch.dtype == torch.bfloat16 else batch.float()


def _backward(query, key, value, output, grad_output, scaling):
    """Gradients of query, key and value of softmax attention; it computes the probabilities once more.

    query, output, grad_output [n, H, L, D]; key, value [n, K, L, D]; all of them bf16, or all fp32. BLOCK
    queries are handled at a time, with only the keys up to the last of them: that is about half of the
    products, and the scores stay small. The scores and the differences are computed in fp32, because large
    numbers cancel there; the products with the results run in the dtype of the inputs.
    """
    (n, heads, length, size), kv_heads, low = query.shape, key.shape[1], query.dtype
    batch, groups = n * kv_heads, heads // kv_heads  # the G query heads of a key lie one after the other
    by_key = (batch, groups, length, size)
    query, output, grad_output = (tensor.reshape(by_key) for tensor in (query, output, grad_output))
    key, value = key.reshape(batch, length, size), value.reshape(batch, length, size)
    query32, key32, value32, grad32 = (tensor.float() for tensor in (query, key, value, grad_output))
    minus = -(grad32 * output.float()).sum(-1, keepdim=True)
    grad_query = torch.empty_like(query)
    grad_key, grad_value = torch.zeros(2, batch, length, size)
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)

        def block(tensor, start=start, end=end):
            return tensor[:, :, start:end].reshape(batch, groups * (end - start), -1)

        future = torch.full((end - start, end), -math.inf).triu_(start + 1).repeat(groups, 1)
        scores = torch.baddbmm(future, block(query32), key32[:, :end].transpose(1, 2), alpha=scaling)
        weights = scores.softmax(-1)
        grad_scores = torch.baddbmm(block(minus), block(grad32), value32[:, :end].transpose(1, 2))
        weights, grad_scores = weights.to(low), grad_scores.mul_(weights).to(low)
        grad_value[:, :end] += torch.bmm(weights.transpose(1, 2), block(grad_output))
        grad_key[:, :end] += torch.bmm(grad_scores.transpose(1, 2), block(query))
        grad_query[:, :, start:end] = torch.bmm(grad_scores, key[:, :end]).view(batch, groups, -1, size)
    return (
        grad_query.mul_(scaling).view(n, heads, length, size),
        grad_key.mul_(scaling).view(n, kv_heads, length, size),
        grad_value.view(n, kv_heads, length, size),
    )


AttentionInterface.register(NAME, packed_attention)
