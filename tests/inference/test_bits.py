"""--bits and --load_8bit of a chat, through the program: the layers have so few bits, and they answer."""

import io
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from transformers import LlamaForCausalLM

from onecard.inference.chat import Chat
from onecard.models.frozen_linear import FrozenLinear4bit, FrozenLinear8bit
from onecard.programs import generate, interaction
from onecard.ui import terminal

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [  # program, options, kind of the layers, bits of a weight
    (generate, [], torch.nn.Linear, 32),  # the compute dtype of this test is fp32
    (generate, ["--load_8bit"], FrozenLinear8bit, 8),
    (interaction, ["--bits", "8"], FrozenLinear8bit, 8),
    (interaction, ["--bits", "4"], FrozenLinear4bit, 4),
]
PROMPT = list(range(5, 25))


@pytest.fixture
def chat(tiny_model, monkeypatch, capsys):
    """Return a function that runs a program on a piped question and returns its chat and what it printed."""
    chats: list[Chat] = []
    talk = terminal.talk

    def watched(chat: Chat, *arguments, **options) -> None:
        chats.append(chat)
        talk(chat, *arguments, **options)

    monkeypatch.setattr(terminal, "talk", watched)

    def run(program, options: list[str]) -> tuple[Chat, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Say red\n"), encoding="utf-8"))
        common = ["--terminal", "--device", "cpu", "--dtype", "fp32", "--template", "alpaca"]
        answer = ["--mode", "greedy", "--min_new_tokens", "12", "--max_new_tokens", "12"]
        capsys.readouterr()
        program.main([*common, *answer, "--model_path", str(tiny_model), *options])
        return chats[-1], capsys.readouterr().out

    return run


def scores(chat: Chat) -> torch.Tensor:
    chat.engine.forget()
    sequence = chat.engine.open(PROMPT)
    list(sequence.read())
    row = sequence.first()[0].float().clone()
    sequence.close()
    return row


@torch.no_grad()
def rounded(folder: Path, bits: int) -> torch.Tensor:
    """The scores of transformers' own model in fp32, whose weights were rounded to so many bits."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear) or "lm_head" in name:
            continue
        weight = layer.weight.data
        if bits == 8:  # one scale for each row, as in LLM.int8
            weight = weight.half().float()  # bitsandbytes rounds from fp16
            scale = weight.abs().amax(1, keepdim=True) / 127
            layer.weight.data = (weight / scale).round() * scale
        if bits == 4:
            layer.weight.data = dequantize_4bit(*quantize_4bit(weight, None, None, 64, True, "nf4"))
    return model(torch.tensor([PROMPT])).logits[0, -1]


def bits_of(layer: torch.nn.Linear) -> float:
    """Bits that each weight takes, without the scales."""
    return layer.weight.nbytes * 8 / (layer.in_features * layer.out_features)


@pytest.mark.parametrize(("program", "options", "kind", "bits"), CASES)
def test_a_chat_has_the_bits_that_were_asked_for(chat, tiny_model, program, options, kind, bits):
    """Every layer but the head has them; the scores are those of weights that were rounded by hand."""
    partner, printed = chat(program, options)
    layers = {
        name: layer
        for name, layer in partner.engine.model.named_modules()
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name
    }
    assert len(layers) == 2 * 7
    assert {type(layer) for layer in layers.values()} == {kind}
    assert {bits_of(layer) for layer in layers.values()} == {bits}
    assert len(printed.strip()) > 5
    plain, expected = rounded(tiny_model, 32), rounded(tiny_model, bits)
    gap, effect = (scores(partner) - expected).abs().max(), (plain - expected).abs().max()
    assert gap < 1e-3 if bits == 32 else gap < effect / 10, (gap, effect)
