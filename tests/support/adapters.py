"""Adapters with random weights, as peft saves them."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from onecard.models import base_model

SMALL = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


def save_adapter(base: Path, folder: Path, seed: int = 0, std: float = 0.05, **settings) -> Path:
    """Save an adapter with these settings, by default SMALL; returns its folder.

    Its weights are so large that it changes answers.
    """
    torch.manual_seed(seed)
    loaded = base_model.load_base(str(base), 16, "fp32", "cpu")
    adapted = get_peft_model(loaded, LoraConfig(**(settings or SMALL)))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    adapted.save_pretrained(folder)
    return folder
