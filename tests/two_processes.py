"""One optimizer step over five rows; run by torchrun from test_step.py. Usage: MODEL OUTPUT.json"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from onecard import model, parallel, step
from onecard.batching import micro_batches
from tests.test_step import encode_tiny, tiny_step_model

if __name__ == "__main__":
    folder, output = sys.argv[1:]
    parallel.start(torch.device("cpu"))
    examples = encode_tiny(5)
    step_model = tiny_step_model(Path(folder))
    optimizer = torch.optim.SGD(model.trainable(step_model), lr=0.1)
    share = micro_batches(examples, np.arange(5), 150, parallel.rank(), parallel.world_size())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    result = step.optimizer_step(step_model, share, int(examples.target_counts.sum()), optimizer, scaler, 0)
    if parallel.is_main():
        parameters = model.trainable(step_model)
        record = {
            "micro_batches": len(share),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "gradient": torch.cat([p.grad.flatten() for p in parameters]).tolist(),
            "adapter": torch.cat([p.detach().flatten() for p in parameters]).tolist(),
        }
        Path(output).write_text(json.dumps(record))
    parallel.stop()
