"""One optimizer step over five rows; run by torchrun from test_step.py. Usage: MODEL OUTPUT.json"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onecard import data, model, parallel, prompt, step
from onecard.batching import micro_batches
from tests import tiny

NO_DROPOUT = model.LoraShape(4, 8.0, 0.0, "q_proj,v_proj")


def encode_tiny(count: int) -> data.Examples:
    tokenizer, template = tiny.tokenizer(), prompt.load_template("alpaca")
    rows = [prompt.Conversation(**row) for row in tiny.rows(count)]
    return data.encode_rows(rows, lambda row: prompt.encode(row, template, tokenizer), 256).examples


def tiny_step_model(folder: Path, bits: int = 16, checkpointing: bool = False) -> step.StepModel:
    base = model.load_base(str(folder), bits, "fp32", "cpu")
    adapted = model.add_adapter(base, NO_DROPOUT, seed=3)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # away from zero, so that A has a gradient too
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    model.prepare_for_packed_training(adapted, checkpointing)
    return step.StepModel(adapted, torch.float32)


def one_step(folder: Path) -> dict[str, Any]:
    """Loss, gradient and adapter after one step of five rows; run alone or by each of several processes."""
    examples, step_model = encode_tiny(5), tiny_step_model(folder)
    optimizer = torch.optim.SGD(model.trainable(step_model), lr=0.1)
    share = micro_batches(examples, np.arange(5), 150, parallel.rank(), parallel.world_size())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    result = step.optimizer_step(step_model, share, int(examples.target_counts.sum()), optimizer, scaler, 0)
    parameters = model.trainable(step_model)
    return {
        "micro_batches": len(share),
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "gradient": torch.cat([p.grad.flatten() for p in parameters]).tolist(),
        "adapter": torch.cat([p.detach().flatten() for p in parameters]).tolist(),
    }


if __name__ == "__main__":
    parallel.start(torch.device("cpu"))
    record = one_step(Path(sys.argv[1]))
    if parallel.is_main():
        Path(sys.argv[2]).write_text(json.dumps(record))
    parallel.stop()
