"""The converter of llama.cpp: it is fetched once, and runs in a process of its own.

It comes from the source archive of llama-cpp-python in the installed version, so the two always match. The
process has no network and does not see code that a model folder may contain. This file does not know models.
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
from onecard.system import package_file, sandbox, whole_folder
from onecard.system.console import say

BASE_SCRIPT, ADAPTER_SCRIPT = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
# version of llama-cpp-python -> the SHA-256 of its source archive, whose code is run; others are not checked
ARCHIVES = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}
PARTS = (BASE_SCRIPT, ADAPTER_SCRIPT, "conversion/", "gguf-py/", "LICENSE")  # of llama.cpp in the archive
ANY, EOS_IDS = "--any-tokenizer", "--eos-ids="
END_KEYS = ("eos", "eot", "eom")  # keys of a GGUF file for tokens at which llama.cpp stops
PROGRESS = re.compile(r"(?:Writing|Quantising):\s*(?:(\d+)%|(\d+)/(\d+))")


def home() -> Path:
    """The folder with the converter for the installed version of llama.cpp; fetched on first use."""
    folder = system_files.cache_folder() / f"llama.cpp-{gguf_check.version()}"
    if folder.is_dir():
        return folder
    waiting = f"waiting for another program that fetches llama.cpp's converter into {folder} ..."
    try:
        with whole_folder.stage(folder, before_waiting=lambda: say(waiting)) as (place, _):
            if not folder.is_dir():  # another program may have fetched it while this one waited
                say(f"Fetching llama.cpp's converter (once) into {folder} ...")
                whole_folder.put(_unpack(_download(place), place / "converter"), folder)
    except (OSError, tarfile.TarError) as error:
        problem = f"llama.cpp's converter could not be stored in {folder}: {error}."
        raise UserError(problem, "Set ONECARD_CACHE to a folder with 200 MB free.", DISK) from None
    return folder


def _download(folder: Path) -> Path:
    version = gguf_check.version()
    try:
        pin, options = f"{PACKAGE}=={version}", ["--no-binary", PACKAGE]
        return package_file.fetch(pin, ARCHIVES.get(version), folder, options)
    except package_file.FetchError as error:
        problem = f"llama.cpp's converter could not be fetched: {last_words(str(error))}"
        if error.is_other_file:
            problem = f"llama.cpp's converter could not be fetched: {package_file.OTHER} ({pin})."
            raise UserError(problem, "Use another package index.") from None
        raise UserError(problem, "Check the network.") from None


def _unpack(archive: Path, folder: Path) -> Path:
    """Unpack only the converter from the archive; returns `folder`."""
    with tarfile.open(archive) as packed:
        for member in packed:
            _, is_inside, name = member.name.partition("/vendor/llama.cpp/")
            if is_inside and name.startswith(PARTS):
                member.name = name
                packed.extract(member, folder, filter="data")
    missing = [name for name in PARTS if not (folder / name).exists()]
    if missing:
        problem = f"{archive.name} does not contain {missing[0]}."
        raise UserError(problem, f"Install another version of {PACKAGE}.")
    return folder


def run(
    arguments: Sequence[Any], source: Path, handle: int, verb: str = "Converting", module: str = __name__
) -> None:
    """Run a script of the converter, or another module of OneCard, on `source`; a bar shows the progress.

    handle: of the lock on the place of the output, held as long as either process lives. Raises UserError
    with the last line that the script wrote.
    """
    say(f"{verb} {source} to GGUF ...")
    variables = {**gguf_check.NO_BACKTRACE, "TOKENIZERS_PARALLELISM": "false"}  # more threads would only wait
    process = sandbox.start(module, *arguments, stderr=subprocess.STDOUT, keep=(handle,), **variables)
    assert process.stdout
    try:
        output = _watch(process.stdout, source.name)
    except BaseException:
        process.kill()  # in a notebook Ctrl-C reaches only this process
        raise
    finally:
        process.stdout.close()
        process.wait()
    if process.returncode:
        was_killed = "the process was killed, perhaps because memory ran out"
        reason = last_words(output) if process.returncode > 0 else was_killed
        is_full = "No space left" in output
        fix = "Free disk space, or set ONECARD_CACHE to a folder on another disk." if is_full else ""
        problem = f"{source} cannot be converted to GGUF: {reason.rstrip('.')}."
        raise UserError(problem, fix, DISK if is_full else CHECKPOINT)


def _watch(lines: TextIO, what: str) -> str:
    """The last 64 KiB that a process writes until it ends; its lines of progress move the bar instead."""
    output = ""
    with tqdm(total=100, desc=what, unit="%", disable=None, bar_format="{desc} {bar} {n:.0f} %") as bar:
        for line in lines:  # a carriage return ends a line, too
            progress = PROGRESS.search(line)
            if progress:
                percent = float(progress[1] or 100 * int(progress[2]) / max(int(progress[3]), 1))
                bar.update(max(percent - bar.n, 0))
            else:
                output = (output + line)[-(1 << 16) :]
    return output


def last_words(output: str) -> str:
    """The last line of an output that may be an error: not a progress bar, not information, not a warning."""
    lines = [line.strip() for line in re.split(r"[\r\n]", output)]
    noise = re.compile(r"INFO:|DEBUG:|WARNING:|Writing:")
    errors = [line for line in lines if line and not noise.match(line)]
    return re.sub(r"^ERROR:( |[\w.-]+:)", "", errors[-1])[:300] if errors else "it gave no reason"


def pretokenizer(path: Path) -> str | None:
    """The name in llama.cpp for how a tokenizer.json splits a text before its merges; None if it is unclear.

    The converter of llama.cpp recognises it by the ids of one text instead. Two ways of splitting can give
    the same ids there, and a changed vocabulary always gives others.
    """
    try:
        splitter = json.loads(path.read_text(encoding="utf-8"))["pre_tokenizer"]
        steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
        *before, last = steps
        plain = last["type"] == "ByteLevel" and last.get("use_regex", True) and not last["add_prefix_space"]
        digits = [step["type"] == "Digits" and step["individual_digits"] for step in before]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not plain or len(before) > 1 or not all(digits):
        return None
    return "smollm" if before else "gpt-2"


def _write_eos_ids(eos_ids: list[int]) -> None:
    """In the child: make a GGUF file name these tokens as its end tokens; with none it names its own."""
    from gguf.vocab import SpecialVocab

    write = SpecialVocab.add_to_gguf

    def with_eos_ids(self: Any, *arguments: Any, **settings: Any) -> None:
        self.special_token_ids.update(zip(END_KEYS, eos_ids, strict=False))
        write(self, *arguments, **settings)

    SpecialVocab.add_to_gguf = with_eos_ids


def _converting(arguments: list[str]) -> None:
    """In the child: run a script of the converter, which finds its own libraries first."""
    any_tokenizer = arguments[0] == ANY
    arguments = arguments[any_tokenizer:]
    has_eos_ids = arguments[0].startswith(EOS_IDS)
    eos_ids = json.loads(arguments[0].removeprefix(EOS_IDS)) if has_eos_ids else []
    arguments = arguments[has_eos_ids:]
    folder = Path(arguments[0]).parent
    sys.path[:1] = [str(folder / "gguf-py"), str(folder)]  # instead of the working folder
    sys.argv = arguments
    from conversion.base import TextModel

    recognise = TextModel.get_vocab_base_pre

    def name_splitter(self: Any, tokenizer: Any) -> str:
        name = pretokenizer(Path(self.dir_model) / "tokenizer.json")
        if name:
            return name
        try:
            return recognise(self, tokenizer)
        except NotImplementedError:
            if any_tokenizer:
                return "default"
            raise SystemExit("llama.cpp does not know how this tokenizer splits a text into words") from None

    TextModel.get_vocab_base_pre = name_splitter
    _write_eos_ids(eos_ids)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _converting(sys.argv[1:])
