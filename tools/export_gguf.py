#!/usr/bin/env python3
"""A model and its adapter as GGUF files for llama.cpp and Ollama, compared with the model they are made from.

python tools/export_gguf.py --lora_path lora-checkpoints/demo
python tools/export_gguf.py --lora_path lora-checkpoints/demo --type q4_k_m --output_path my-model
python tools/export_gguf.py --model_path demo --type q8_0
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard import parsing
from onecard.errors import run_program
from onecard.tool_config import ExportConfig


def main() -> None:
    options = parsing.parse(ExportConfig, sys.argv[1:], description=__doc__)
    from onecard import export, hub  # after the options: --help needs no torch

    folder = export.run(options, hub.fetch_model, hub.fetch_adapter, print)
    print(f"The files are in {folder}. Talk to them: bash cpu_chat.sh --lora_path {folder}")


if __name__ == "__main__":
    run_program(main)
