"""A child that reads a stranger's file gets the variables that it needs, and none of the user's secrets.

The real children run on real files, and the kernel tells what they were started with. The second half checks
the source: every other start of a process needs a reason.
"""

import ast
import pickle
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet

from onecard.conversion import gguf
from onecard.data import jinja_sandbox, pickled_rows, tables
from onecard.inference import gguf_check, llama_cpp_engine
from onecard.programs import convert_llama
from onecard.runs import legacy
from onecard.system import sandbox
from tests.support import meta_llama_reference, tiny
from tests.support.paths import ROOT

SECRETS = {
    "HF_TOKEN": "planted-1",
    "HUGGING_FACE_HUB_TOKEN": "planted-2",
    "WANDB_API_KEY": "planted-3",
    "AWS_SECRET_ACCESS_KEY": "planted-4",
    "MY_SECRET": "planted-5",
}
OWN = {"HF_HUB_OFFLINE", "GGML_NO_BACKTRACE", "TOKENIZERS_PARALLELISM"}  # variables that OneCard itself sets


def read_parquet(folder: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), folder / "rows.parquet")
    rows = list(tables.parquet_values(folder / "rows.parquet"))
    assert [value for _, _, value, _ in rows] == [{"text": "one"}, {"text": "two"}]


def read_pickled_rows(folder: Path) -> None:
    (folder / "rows.pkl").write_bytes(pickle.dumps([["one", "two"]]))
    assert pickled_rows.convert_to_jsonl(folder / "rows.pkl").is_file()


def render_a_template(folder: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = f"{folder}: {{{{ messages[0]['content'] }}}}"
    texts = jinja_sandbox.render(tokenizer, [([{"role": "user", "content": "hello"}], True)])
    assert texts == [f"{folder}: hello"]


def read_a_pickled_adapter(folder: Path) -> None:
    torch.save({"a": torch.ones(2)}, folder / "adapter_model.bin")
    assert legacy.unpickle(folder / "adapter_model.bin")["a"].tolist() == [1, 1]


def convert_llama_weights(folder: Path, *options: str) -> None:
    tokens = meta_llama_reference.sentencepiece(folder / "tokenizer.model", 392)
    settings = meta_llama_reference.params(vocab=tokens)
    whole = meta_llama_reference.weights(settings, tokens, torch.bfloat16, tied=False)
    meta_llama_reference.save(folder / "7B", settings, meta_llama_reference.cut(whole, 1))
    convert_llama.main(["--input_dir", str(folder / "7B"), "--output_dir", str(folder / "hf"), *options])
    assert (folder / "hf/tokenizer.json").is_file()


def convert_a_llama_tokenizer(folder: Path) -> None:
    convert_llama_weights(folder, "--tokenizer_only", "true")


def convert_to_gguf(folder: Path) -> Path:
    """A model of one layer as a GGUF file."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra: bash tools/setup.sh cpu")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
    model = tiny.save_model(folder / "model", **sizes, **heads)
    return gguf.base(model, folder / "base.gguf", any_tokenizer=True)


def quantise_gguf(folder: Path) -> None:
    assert gguf.quantize(convert_to_gguf(folder), folder / "small.gguf", "q8_0").is_file()


def try_gguf(folder: Path) -> None:
    gguf_check.check(convert_to_gguf(folder), [])


def talk_in_llama_cpp(folder: Path) -> None:
    engine = llama_cpp_engine.Engine(convert_to_gguf(folder), tiny.tokenizer(), 64, threads=1)
    assert sum(len(scores) for scores in engine.each([2, 3])) == 2
    engine.close()


READERS: dict[str, Callable[[Path], object]] = {
    "onecard.data.tables": read_parquet,
    "onecard.data.pickled_rows": read_pickled_rows,
    "onecard.data.jinja_sandbox": render_a_template,
    "onecard.runs.legacy": read_a_pickled_adapter,
    "onecard.conversion.meta_weights": convert_llama_weights,
    "onecard.conversion.meta_tokenizer": convert_a_llama_tokenizer,
    "onecard.conversion.llama_cpp_converter": convert_to_gguf,
    "onecard.conversion.llama_cpp_quantizer": quantise_gguf,
    "onecard.inference.gguf_check": try_gguf,
    "onecard.inference.llama_cpp_process": talk_in_llama_cpp,
}


def started_with(pid: int) -> tuple[list[str], dict[str, str]]:
    """The command and the environment that a running process was started with, as the kernel keeps them."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        command = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")
        variables = Path(f"/proc/{pid}/environ").read_text(encoding="utf-8").split("\0")
        if any(command) and any(variables):
            return command, dict(variable.split("=", 1) for variable in variables if variable)
    raise AssertionError(f"process {pid} showed no environment")


@pytest.fixture
def children(monkeypatch) -> list[tuple[list[str], dict[str, str]]]:
    """What every process is started with while the test runs."""
    started: list[tuple[list[str], dict[str, str]]] = []

    class Watched(subprocess.Popen):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            started.append(started_with(self.pid))

    monkeypatch.setattr(subprocess, "Popen", Watched)
    return started


@pytest.mark.parametrize("module", READERS)
def test_a_reader_sees_no_secret(module, children, tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    if module == "onecard.data.pickled_rows":
        # otherwise an earlier result would be used
        monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    READERS[module](tmp_path)
    assert module in [command[command.index("-m") + 1] for command, _ in children]
    for command, variables in children:
        assert not set(SECRETS) & set(variables), command
        assert set(variables) <= {*sandbox.ENVIRONMENT, *OWN}, command
        assert variables["HF_HUB_OFFLINE"] == "1", command


def test_the_kernel_would_tell_a_secret(children, monkeypatch):
    """This shows that the test above can fail."""
    monkeypatch.setenv("HF_TOKEN", "planted-1")
    subprocess.run(["sleep", "0.5"], check=True)
    assert children[0][1]["HF_TOKEN"] == "planted-1"


def sources() -> dict[str, str]:
    """The source of each file of the library, by its path from the root."""
    paths = sorted((ROOT / "onecard").rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def test_every_reader_is_tried():
    """Each module that runs as a process reads a stranger's file and so has a place in READERS."""
    mains = {
        path.removesuffix(".py").replace("/", ".")
        for path, source in sources().items()
        if re.search(r"^if __name__ == .__main__.:", source, re.MULTILINE)
    }
    assert mains - {"onecard.__main__"} == set(READERS)


# where processes are started

STARTS = re.compile(
    r"subprocess\.(run|Popen|call|check_call|check_output|getoutput|getstatusoutput)"
    r"|os\.(system|popen|fork|forkpty|posix_spawnp?|spawn\w+|exec[lv]\w*)"
    r"|pty\.(fork|spawn)"
    r"|asyncio\.(subprocess\.)?create_subprocess_(exec|shell)"
    r"|concurrent\.futures\.(process\.)?ProcessPoolExecutor"
    r"|(torch\.)?multiprocessing\..+"
)
USERS_OWN = {  # (file, function): why the process keeps the user's environment
    ("onecard/runs/jobs.py", "_launch"): "a training of the user's, with their hub and their wandb account",
    ("onecard/system/package_file.py", "fetch"): "pip, with the user's index and proxy; it opens no model",
    ("onecard/system/gpus.py", "_ask_driver"): "nvidia-smi, which reads no file of a stranger",
}


def meanings(tree: ast.AST) -> dict[str, str]:
    """The dotted name of what was imported, by its name in the file."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                names[name] = alias.name if alias.asname else name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute):
        inside = dotted(node.value, names)
        return f"{inside}.{node.attr}" if inside else ""
    return ""


def has_the_short_environment(call: ast.Call, names: dict[str, str]) -> bool:
    """Whether the call passes env=environment(...) of onecard.system.sandbox."""
    value = next((keyword.value for keyword in call.keywords if keyword.arg == "env"), None)
    if not isinstance(value, ast.Call):
        return False
    is_local = (
        isinstance(value.func, ast.Name) and value.func.id == "environment" and "environment" not in names
    )
    return is_local or dotted(value.func, names) == "onecard.system.sandbox.environment"


def inheriting(source: str) -> Iterator[str]:
    """The function around each start of a process that does not pass environment(); "" outside of any."""
    tree = ast.parse(source)
    names = meanings(tree)
    waiting: list[tuple[ast.AST, str]] = [(tree, "")]
    while waiting:
        node, function = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Name | ast.Attribute) and STARTS.fullmatch(dotted(node, names)):
            yield function
            continue
        for child in ast.iter_child_nodes(node):
            called = isinstance(node, ast.Call) and child is node.func
            is_type = child in [getattr(node, name, None) for name in ("annotation", "returns")]
            if not is_type and not (called and has_the_short_environment(node, names)):
                waiting.append((child, function))


def test_only_reviewed_processes_inherit_the_environment():
    processes = {(path, function) for path, source in sources().items() for function in inheriting(source)}
    assert processes == set(USERS_OWN)  # a start that was removed leaves the list


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess\nsubprocess.run(command)",
        "import subprocess\nsubprocess.Popen(command, env=None)",
        "import subprocess\nsubprocess.Popen(command, env=os.environ)",
        "import subprocess\nsubprocess.run(command, env=settings())",
        "import subprocess\nsubprocess.run(command, **settings)",
        "import subprocess as s\ns.check_output(command)",
        "from subprocess import run as start\nstart(command)",
        "import subprocess\nstart = subprocess.Popen",
        "from elsewhere import environment\nimport subprocess\nsubprocess.run(command, env=environment())",
        "import os\nos.posix_spawn(path, words, os.environ)",
        "import os\nos.system(words)",
        "import os\nos.execv(path, words)",
        "def f():\n    import os\n    if os.fork(): pass",
        "import asyncio\nasyncio.create_subprocess_exec('x')",
        "from concurrent.futures import ProcessPoolExecutor\nProcessPoolExecutor(2)",
        "import torch.multiprocessing as m\nm.spawn(f)",
        "import multiprocessing\nmultiprocessing.Process(target=f)",
    ],
)
def test_a_planted_process_is_found(source):
    assert list(inheriting(source))


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess\ndef environment(): pass\nsubprocess.run(command, env=environment(A='1'))",
        "from onecard.system import sandbox\nimport subprocess\nsubprocess.run(c, env=sandbox.environment())",
        "import subprocess\ntry: pass\nexcept subprocess.TimeoutExpired: pass",
        "import subprocess\ndef start(old: subprocess.Popen) -> subprocess.Popen[str]: pass",
        "import os\nos.environ.get('A')",
        "from concurrent.futures import ThreadPoolExecutor\nThreadPoolExecutor(1)",
    ],
)
def test_a_process_without_secrets_is_let_through(source):
    assert not list(inheriting(source))
