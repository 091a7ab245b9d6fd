"""Export a model and its adapter as GGUF files for llama.cpp and Ollama, and compare them with the model.

python tools/export_gguf.py --lora_path lora-checkpoints/demo
python tools/export_gguf.py --lora_path lora-checkpoints/demo --type q4_k_m --output_path my-model
python tools/export_gguf.py --model_path demo --type q8_0
"""

from onecard.config import options as config_options
from onecard.config.conversion import ExportConfig
from onecard.system import commands

SETTINGS = ExportConfig  # the class of its options
LESS_MEMORY = ""  # options whose smaller values need less memory


def main(arguments: list[str]) -> None:
    options = config_options.parse(SETTINGS, arguments, description=__doc__)
    from onecard.conversion import export_gguf  # imported late, because --help needs no torch
    from onecard.system.console import say

    folder = export_gguf.run(options)
    chat = commands.script("cpu_chat.sh", "chat")
    say(f"The files are in {folder}. Chat with them: {chat} --lora_path {folder}")
