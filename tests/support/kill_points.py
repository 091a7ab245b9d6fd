"""Kills a tool that writes a folder before each of its file operations. It runs as a program of its own:

    python -m tests.support.kill_points convert|merge|export|quantize TARGET OPTION=VALUE ...

Each try is a fork of this process, which has not used anything yet that a fork does not survive. The last try
runs to its end. The program prints the number of operations, and fails when it finds an incomplete target.
With over=FILE, each try starts with the complete folder in which that file is damaged.
"""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from onecard.system import output_folder
from tests.support import faults
from tests.support.paths import ROOT

MOST = 300


def contents(folder: Path) -> dict[str, bytes]:
    """The content of all files by name, without that of the record, because it holds times of files."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(p.relative_to(folder)): b"" if p.name == output_folder.RECORD else p.read_bytes() for p in paths
    }


def convert(target: Path, options: dict[str, str]) -> None:
    from onecard.config import options as config_options
    from onecard.config.conversion import ConvertConfig
    from onecard.conversion import meta_llama, meta_tokenizer, meta_weights

    def work(request: dict[str, Any], report: Any, keep: int) -> None:
        module = meta_weights if request["step"] == meta_llama.WEIGHTS else meta_tokenizer
        module.work({**request, "limit": 0}, lambda **message: report(message))

    settings = config_options.build(ConvertConfig, {**options, "output_dir": str(target)})
    meta_llama.run(settings, lambda done, total: None, work)


def merge(target: Path, options: dict[str, str]) -> None:
    from onecard.config import options as config_options
    from onecard.config.conversion import MergeConfig
    from onecard.conversion import merge as conversion_merge

    settings = config_options.build(MergeConfig, {**options, "output_path": str(target)})
    conversion_merge.run(settings, lambda done, total: None)


def export(target: Path, options: dict[str, str]) -> None:
    """Export with a converter that writes only a few bytes, which nothing reads."""
    from onecard.config import options as config_options
    from onecard.config.conversion import ExportConfig
    from onecard.conversion import export_gguf, llama_cpp_converter
    from onecard.inference import llama_cpp_engine

    def work(arguments: Any, *_: Any) -> None:
        Path(arguments[arguments.index("--outfile") + 1]).write_bytes(b"GGUF")

    class Engine:
        def __init__(self, *_: Any) -> None:
            self.close = lambda: None

    llama_cpp_converter.run, llama_cpp_converter.home, llama_cpp_engine.Engine = work, Path, Engine
    settings = config_options.build(ExportConfig, {**options, "output_path": str(target), "check": "false"})
    export_gguf.run(settings)


def quantize(target: Path, options: dict[str, str]) -> None:
    from onecard.config import options as config_options
    from onecard.config.conversion import QuantizeConfig
    from onecard.conversion import quantize as conversion_quantize

    fixed = {"method": "bnb", "device": "cpu", "output_path": str(target)}
    conversion_quantize.run(config_options.build(QuantizeConfig, {**options, **fixed}))


TOOLS = {"convert": convert, "merge": merge, "export": export, "quantize": quantize}
USED = {  # these are imported once before all forks
    "convert": ("onecard.conversion.meta_llama", "onecard.conversion.meta_weights", "sentencepiece"),
    "merge": ("onecard.conversion.merge",),
    "export": ("onecard.conversion.export_gguf",),
    "quantize": ("onecard.conversion.quantize", "transformers.models.llama.modeling_llama", "bitsandbytes"),
}


def check(name: str, target: Path, **options: Any) -> None:
    """Run this file as a program of its own. It fails when the program does, or after fewer than 11 kills."""
    command = [sys.executable, "-m", "tests.support.kill_points", name, str(target)]
    ended = subprocess.run(
        [*command, *(f"{key}={value}" for key, value in options.items())],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ONECARD_CACHE": f"{target}-cache"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert int(ended.stdout.split()[-1]) > 10


def fork(tool: Any, target: Path, options: dict[str, str], number: int) -> int:
    """The exit code of a try that is killed before operation `number`."""
    child = os.fork()
    if not child:
        code = 1
        try:
            faults.kill_at_operation(number)
            tool(target, options)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(name: str, folder: str, *pairs: str) -> None:
    from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

    del AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
    for each in USED[name]:
        importlib.import_module(each)
    options = dict(pair.split("=", 1) for pair in pairs)
    over = options.pop("over", None)
    target, whole = Path(folder) / "made", Path(folder + "-whole") / "made"
    assert fork(TOOLS[name], whole, options, MOST) == 0
    expected, neighbours = contents(whole), {Path(folder), *Path(folder).parent.iterdir()}
    allowed = [expected, *([{**expected, over: b"damaged"}] if over else [])]
    for number in range(1, MOST):
        if over:
            shutil.copytree(whole, target)
            (target / over).write_bytes(b"damaged")
        ended = fork(TOOLS[name], target, options, number)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL, ended
        if target.exists():  # the kill came after the rename, or before an older folder was moved
            assert contents(target) in allowed
            shutil.rmtree(target)
    assert number < MOST - 1
    assert contents(target) == expected
    assert [path.name for path in target.parent.iterdir()] == ["made"], "something is left beside it"
    assert set(Path(folder).parent.iterdir()) == neighbours
    print(number)


if __name__ == "__main__":
    main(*sys.argv[1:])
