"""A program: one optimizer step over five rows. Arguments: MODEL OUTPUT.json [no-memory]"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onecard.data import conversation as data_conversation
from onecard.data import examples as data_examples
from onecard.data.packing import micro_batches
from onecard.models import adapter as models_adapter
from onecard.models import base_model, lora_shape, trainable
from onecard.system import processes as system_processes
from onecard.training import distributed, step
from tests.support import tiny

NO_DROPOUT = lora_shape.LoraShape(4, 8.0, 0.0, "q_proj,v_proj")


def encode_tiny(count: int) -> data_examples.Examples:
    return tiny.encoded([data_conversation.single(**row) for row in tiny.rows(count)], tiny.tokenizer())


def tiny_step_model(folder: Path, bits: int = 16, checkpointing: bool = False) -> step.StepModel:
    base = base_model.load_base(str(folder), bits, "fp32", "cpu")
    adapted = models_adapter.add_adapter(base, NO_DROPOUT, seed=3)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # away from zero, so that A has a gradient too
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    base_model.prepare_for_packed_training(adapted, checkpointing)
    return step.StepModel(adapted, torch.float32)


def one_step(folder: Path) -> dict[str, Any]:
    """Loss, gradient and adapter after one step of five rows, in one process or in each of several."""
    examples, step_model = encode_tiny(5), tiny_step_model(folder)
    optimizer = optimizer_of(trainable.trainable(step_model))
    share = micro_batches(examples, np.arange(5), 150, system_processes.rank(), system_processes.world_size())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    parameters, targets = trainable.trainable(step_model), int(examples.target_counts.sum())
    loss = step.gradient(step_model, share, targets, parameters, scaler)
    norm, _ = step.update(optimizer, scaler, 0, [])
    return {
        "micro_batches": len(share),
        "loss": loss,
        "grad_norm": norm,
        "gradient": torch.cat([p.grad.flatten() for p in parameters]).tolist(),
        "adapter": torch.cat([p.detach().flatten() for p in parameters]).tolist(),
    }


def one_step_without_memory(folder: Path) -> dict[str, Any]:
    """The results of two tries in this process; the last process runs out of memory at its first try."""
    examples, step_model = encode_tiny(5), tiny_step_model(folder)
    parameters, targets = trainable.trainable(step_model), int(examples.target_counts.sum())
    scaler, forward = torch.amp.GradScaler("cpu", enabled=False), step_model.forward
    losses, dropped = [], []
    for budget in (150, 75):
        if budget == 150 and system_processes.rank() == system_processes.world_size() - 1:
            step_model.forward = no_memory
        share = micro_batches(
            examples, np.arange(5), budget, system_processes.rank(), system_processes.world_size()
        )
        losses.append(step.gradient(step_model, share, targets, parameters, scaler))
        dropped.append(all(p.grad is None for p in parameters))
        step_model.forward = forward
    return {
        "losses": losses,
        "dropped": dropped,
        "norm": step.update(optimizer_of(parameters), scaler, 0, [])[0],
    }


def no_memory(packed: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def optimizer_of(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


if __name__ == "__main__":
    distributed.start(torch.device("cpu"))
    record = (one_step_without_memory if sys.argv[3:] else one_step)(Path(sys.argv[1]))
    if system_processes.is_main():
        Path(sys.argv[2]).write_text(json.dumps(record), encoding="utf-8")
    distributed.stop()
