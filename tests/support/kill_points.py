"""A tool that makes a folder, killed before each of its file operations. Run as a program of its own:

    python -m tests.support.kill_points convert|merge|export|quantize TARGET OPTION=VALUE ...

Each try is a fork of this process, which has used nothing yet that a fork does not survive. Prints how many
operations there were; fails when a target is seen that is not whole. The last try runs to its end. With
over=FILE each try finds the whole folder there, with that file damaged.
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
    """Name -> content; the record's is left out, as it names the files' times."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(p.relative_to(folder)): b"" if p.name == output_folder.RECORD else p.read_bytes() for p in paths
    }


def convert(target: Path, options: dict[str, str]) -> None:
    from onecard.config import options as config_options
    from onecard.config.tools import ConvertConfig
    from onecard.conversion import meta_llama, meta_tokenizer, meta_weights

    def work(request: dict[str, Any], told: Any, keep: int) -> None:
        module = meta_weights if request["step"] == meta_llama.WEIGHTS else meta_tokenizer
        module.work({**request, "limit": 0}, lambda **report: told(report))

    made = config_options.build(ConvertConfig, {**options, "output_dir": str(target)})
    meta_llama.run(made, lambda done, total: None, work)


def merge(target: Path, options: dict[str, str]) -> None:
    from onecard.config import options as config_options
    from onecard.config.tools import MergeConfig
    from onecard.conversion import merge as conversion_merge

    made = config_options.build(MergeConfig, {**options, "output_path": str(target)})
    conversion_merge.run(made, lambda done, total: None)


def export(target: Path, options: dict[str, str]) -> None:
    """With a converter that writes a few bytes, which nothing reads."""
    from onecard.config import options as config_options
    from onecard.config.tools import ExportConfig
    from onecard.conversion import export_gguf, llama_cpp_converter
    from onecard.inference import llama_cpp_engine

    def work(arguments: Any, *_: Any) -> None:
        Path(arguments[arguments.index("--outfile") + 1]).write_bytes(b"GGUF")

    class Engine:
        def __init__(self, *_: Any) -> None:
            self.close = lambda: None

    llama_cpp_converter.run, llama_cpp_converter.home, llama_cpp_engine.Engine = work, Path, Engine
    made = config_options.build(ExportConfig, {**options, "output_path": str(target), "check": "false"})
    export_gguf.run(made)


def quantize(target: Path, options: dict[str, str]) -> None:
    from onecard.config import options as config_options
    from onecard.config.tools import QuantizeConfig
    from onecard.conversion import quantize as conversion_quantize

    given = {"method": "bnb", "device": "cpu", "output_path": str(target)}
    conversion_quantize.run(config_options.build(QuantizeConfig, {**options, **given}))


TOOLS = {"convert": convert, "merge": merge, "export": export, "quantize": quantize}
USED = {  # imported once, before all forks
    "convert": ("onecard.conversion.meta_llama", "onecard.conversion.meta_weights", "sentencepiece"),
    "merge": ("onecard.conversion.merge",),
    "export": ("onecard.conversion.export_gguf",),
    "quantize": ("onecard.conversion.quantize", "transformers.models.llama.modeling_llama", "bitsandbytes"),
}


def check(name: str, target: Path, **options: Any) -> None:
    """Run this file as a program of its own; fails as that does, or when hardly anything was killed."""
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
    """Exit code of a try that is killed before operation `number`."""
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


def main(name: str, place: str, *pairs: str) -> None:
    from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

    del AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
    for each in USED[name]:
        importlib.import_module(each)
    options = dict(pair.split("=", 1) for pair in pairs)
    over = options.pop("over", None)
    target, whole = Path(place) / "made", Path(place + "-whole") / "made"
    assert fork(TOOLS[name], whole, options, MOST) == 0
    wanted, around = contents(whole), {Path(place), *Path(place).parent.iterdir()}
    allowed = [wanted, *([{**wanted, over: b"damaged"}] if over else [])]
    for number in range(1, MOST):
        if over:
            shutil.copytree(whole, target)
            (target / over).write_bytes(b"damaged")
        ended = fork(TOOLS[name], target, options, number)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL, ended
        if target.exists():  # killed behind the rename, or before an older folder was moved
            assert contents(target) in allowed
            shutil.rmtree(target)
    assert number < MOST - 1
    assert contents(target) == wanted
    assert [path.name for path in target.parent.iterdir()] == ["made"], "something is left beside it"
    assert set(Path(place).parent.iterdir()) == around
    print(number)


if __name__ == "__main__":
    main(*sys.argv[1:])
