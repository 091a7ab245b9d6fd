"""Text generation by transformers: token ids in, token ids out. It knows no conversation and no template."""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from transformers import GenerationConfig

from onecard import weights


@torch.inference_mode()
def greedy(
    model: torch.nn.Module, prompts: list[list[int]], max_new_tokens: int, ends: list[int]
) -> list[list[int]]:
    """The most probable continuation of each prompt, up to one of the end tokens; prompts run as one batch.

    Works on a model that is being trained: its attention, mode and caches are as before afterwards.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.tensor(
        [[ends[0]] * (longest - len(p)) + p for p in prompts], device=device
    )  # [B, T], padded at the left
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=ends,
        pad_token_id=ends[0],
        use_cache=True,
    )
    with _ready_to_generate(model):
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[
            :, longest:
        ].tolist()
    return [list(itertools.takewhile(lambda token: token not in ends, answer)) for answer in made]


@contextlib.contextmanager
def _ready_to_generate(model: torch.nn.Module) -> Iterator[None]:
    base = weights.base_of(model)
    attention, training = base.config._attn_implementation, model.training
    if attention != "eager":  # a model's only one
        base.set_attn_implementation("sdpa")  # takes padding and a cache, which packed attention does not
    model.eval()
    try:
        yield
    finally:
        base.set_attn_implementation(attention)
        model.train(training)
