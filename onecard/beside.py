"""Which small files a model folder made of a base and an adapter takes along, and which make an adapter up.

None of them is opened here.
"""

from pathlib import Path

from onecard import checkpoint, legacy, model, newfolder, receipt, runfolder

WEIGHT_FILES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".index.json", ".py")
TOKENIZER = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template", "spiece")
OWN = (  # what OneCard writes about other folders and runs
    newfolder.RECORD,
    receipt.NAME,
    checkpoint.MANIFEST,
    runfolder.CONFIG,
    runfolder.EXPORT,
    runfolder.FINISHED,
    runfolder.LOG,
    runfolder.DROPPED,
    runfolder.REJECTED,
    runfolder.SAMPLES,
    runfolder.PICTURE,
    "adapter_",
)
ADAPTER = (*legacy.MARKS, runfolder.CONFIG, runfolder.MODEL_WEIGHTS)  # and adapter_*


def places(folder: Path) -> list[Path]:
    """The adapter's folder, and the run's when it is a checkpoint."""
    return [folder, *([folder.parent] if folder.name.startswith("checkpoint-") else [])]


def tokenizer_of(folder: Path) -> Path | None:
    names = model.TOKENIZER_FILES
    return next((p for p in places(folder) if any((p / name).is_file() for name in names)), None)


def of_adapter(adapter_folder: Path) -> list[Path]:
    """The files of an adapter, in any of the forms that it may have."""
    return sorted(
        path
        for path in adapter_folder.iterdir()
        if path.is_file() and (path.name.startswith("adapter_") or path.name in ADAPTER)
    )


def rest(source: Path, skip: tuple[str, ...] = (), only: tuple[str, ...] = ("",)) -> list[Path]:
    """Everything beside the weights: settings and tokenizer; code and our own records are left out."""
    left_out = (".", *OWN, *skip)
    return sorted(
        path
        for path in source.iterdir()
        if path.is_file()
        and path.name.startswith(only)
        and not path.name.startswith(left_out)
        and not path.name.endswith(WEIGHT_FILES)
    )
