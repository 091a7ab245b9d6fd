"""As in Colab: uploaded files lie in the working folder afterwards; {} when nothing was chosen."""

from pathlib import Path

from google import colab


def upload() -> dict[str, bytes]:
    given = colab.uploads()
    colab.note("upload", list(given))
    for name, text in given.items():
        Path(name).write_text(text, encoding="utf-8")
    return {name: text.encode() for name, text in given.items()}


def download(path: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"Cannot find file: {path}")
    colab.note("download", path)
