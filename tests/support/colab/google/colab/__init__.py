"""What a notebook sees of Colab, without Colab: it writes down what it is asked, for test_notebook.py."""

import json
import os
from pathlib import Path


def note(call: str, given: object) -> None:
    with open(os.environ["COLAB_CALLS"], "a", encoding="utf-8") as file:
        file.write(json.dumps([call, given]) + "\n")


def uploads() -> dict[str, str]:
    """Texts of the files that its user chooses to upload."""
    folder = Path(os.environ["COLAB_CALLS"]).parent / "uploads"
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())}
