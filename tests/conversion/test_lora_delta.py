"""Ranks and scales that are read from an adapter's files are those that peft gives its layers."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from onecard.conversion import gguf, lora_delta
from onecard.errors import CHECKPOINT, UserError


class Block(torch.nn.Module):
    """Modules whose names test how patterns are matched; as a regular expression, `a+b` is not `a+b`."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in ("q_proj", "v_proj", "mlp_q_proj")})
            for _ in range(2)
        )
        self.add_module("a+b", torch.nn.Linear(8, 8))
        self.q_proj = torch.nn.Linear(8, 8)


NAMES = ["q_proj", "v_proj", "mlp_q_proj", "a+b"]
PATTERNS = {
    "the end of a name": {"q_proj": 2},
    "the first of two": {"layers.0.q_proj": 2, "q_proj": 3},
    "anchored": {"^q_proj": 2, "^layers.0.v_proj": 3},
    "a regular expression": {r"layers\.[01]\.(q|v)_proj": 2, ".*mlp.*": 3},
    "no module": {"proj": 2, "layers": 3},
    "characters of regular expressions": {"a+b": 2},
}


def saved(folder: Path, **settings) -> torch.nn.Module:
    """A model with an adapter of peft whose files are in the folder."""
    model = get_peft_model(Block(), LoraConfig(r=4, lora_alpha=6, target_modules=NAMES, **settings))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rsLoRA"])
@pytest.mark.parametrize("name", PATTERNS)
def test_ranks_and_scales_are_those_of_peft(tmp_path, name, use_rslora):
    """This holds with patterns for ranks, and with other values for alphas."""
    alphas = {pattern: 5 * value for pattern, value in PATTERNS[name].items()}
    model = saved(tmp_path, rank_pattern=PATTERNS[name], alpha_pattern=alphas, use_rslora=use_rslora)
    layers = {
        key: layer for key, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)
    }
    changes = lora_delta.read(tmp_path).changes
    assert len(layers) == 8
    assert {key: (layer.r["default"], layer.scaling["default"]) for key, layer in layers.items()} == {
        key: (change.a.rows, pytest.approx(change.scale)) for key, change in changes.items()
    }


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("patterns", [{"(": 4}, ["q_proj"], 3], ids=str)
def test_damaged_patterns_are_refused(tmp_path, setting, patterns):
    """A merge and an export both give exit code 4 and the name of the setting."""
    saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: patterns}))
    with pytest.raises(UserError, match=setting) as caught:
        lora_delta.read(tmp_path)
    assert caught.value.code == CHECKPOINT
    if setting == "alpha_pattern":
        with pytest.raises(UserError) as caught:
            gguf.check_adapter(tmp_path)
        assert caught.value.code == CHECKPOINT
