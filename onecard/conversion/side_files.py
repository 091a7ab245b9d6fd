"""Which small files a merged model takes along from base and adapter, and which files make up an adapter.

No file is opened here.
"""

from pathlib import Path

from onecard.hub import manifest, model_files
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from onecard.runs import legacy
from onecard.system import output_folder

WEIGHT_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack")
NOT_COPIED_ENDINGS = (*WEIGHT_ENDINGS, ".index.json", ".py")
# beginnings of the names of a tokenizer's files: those that an extended tokenizer replaces, and all
REPLACED_TOKENIZER_FILES = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "vocab",
    "merges",
    "chat_template",
)
TOKENIZER_FILES = (*REPLACED_TOKENIZER_FILES, "spiece")
OWN = (  # files in which OneCard describes other folders and runs
    output_folder.RECORD,
    manifest.NAME,
    runs_checkpoint.MANIFEST,
    runs_folder.CONFIG,
    runs_folder.EXPORT,
    runs_folder.FINISHED,
    runs_folder.LOG,
    runs_folder.DROPPED,
    runs_folder.WANDB,
    runs_folder.REJECTED,
    runs_folder.SAMPLES,
    runs_folder.PLOT,
    "adapter_",
)
ADAPTER = (*legacy.MARKS, runs_folder.CONFIG, model_files.MODEL_WEIGHTS)  # with adapter_* these make it up


def of_adapter(adapter_folder: Path) -> list[Path]:
    """The files of an adapter, in each layout that it may have."""
    return sorted(
        path
        for path in adapter_folder.iterdir()
        if path.is_file() and (path.name.startswith("adapter_") or path.name in ADAPTER)
    )


def rest(source: Path, skip: tuple[str, ...] = (), only: tuple[str, ...] = ("",)) -> list[Path]:
    """The files beside the weights: settings and tokenizer, but no code and none of OneCard's own records.

    skip, only: beginnings of file names.
    """
    left_out = (".", *OWN, *skip)
    return sorted(
        path
        for path in source.iterdir()
        if path.is_file()
        and path.name.startswith(only)
        and not path.name.startswith(left_out)
        and not path.name.endswith(NOT_COPIED_ENDINGS)
    )
