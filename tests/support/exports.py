"""A tiny model as GGUF files, made as tools/export_gguf.py makes them; needs llama-cpp-python."""

from pathlib import Path

from onecard import export, hub, parsing
from onecard.tool_config import ExportConfig


def run(**options) -> tuple[Path, list[str]]:
    """The exported folder and what was said."""
    said: list[str] = []
    settings = parsing.build(ExportConfig, {name: str(value) for name, value in options.items()})
    return export.run(settings, hub.locate, hub.fetch_adapter, said.append), said
