"""A tiny model as GGUF files, made as tools/export_gguf.py makes them; needs llama-cpp-python."""

from pathlib import Path

from onecard.config import options as config_options
from onecard.config.conversion import ExportConfig
from onecard.conversion import export_gguf
from tests.support import console


def run(**options) -> tuple[Path, list[str]]:
    """Export with these options; returns the folder and what was printed."""
    settings = config_options.build(ExportConfig, {name: str(value) for name, value in options.items()})
    with console.heard() as printed:
        return export_gguf.run(settings), printed
