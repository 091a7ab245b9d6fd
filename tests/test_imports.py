"""Imports point downwards: ground, words, things, verbs, programs (docs: one direction).

Reads the source with `ast`, so nothing is imported. Only imports that run when the module is imported count;
those inside functions are how a root program starts fast. Who uses tests/ is looked at everywhere, functions
and texts included.
"""

import ast
import re

import pytest

from tests.support.paths import ROOT

LAYERS = {  # from the lowest
    "ground": {"__init__", "errors"},
    "grammar": {"parsing"},
    "words": {"chat_config", "config", "hardware", "prompt", "tool_config"},
    "things": {
        "adapter",
        "addresses",
        "answer",
        "asking",
        "attention",
        "bars",
        "batching",
        "beside",
        "building",
        "chart",
        "chat_layout",
        "checkpoint",
        "commits",
        "child",
        "controls",
        "converter",
        "curves",
        "data",
        "decoding",
        "dropout",
        "engine_hf",
        "engine_llama",
        "exported",
        "fingerprint",
        "finish",
        "fitting",
        "form",
        "frozen",
        "gguf",
        "gguf_trial",
        "guard",
        "headers",
        "history",
        "hubnames",
        "journal",
        "json_rows",
        "keyboard",
        "labels",
        "late",
        "layouts",
        "line_editor",
        "legacy",
        "llama",
        "llama_files",
        "llama_library",
        "llama_tokenizer",
        "loading",
        "lock",
        "loss",
        "markdown",
        "memory",
        "merging",
        "model",
        "newfolder",
        "ollama",
        "page",
        "panels",
        "parallel",
        "parity",
        "pickled",
        "plan",
        "preview",
        "probes",
        "pth",
        "quantised",
        "quantizer",
        "reader",
        "receipt",
        "remote",
        "remote_code",
        "rendering",
        "resume",
        "rows",
        "runfolder",
        "runs",
        "schemas",
        "scoring",
        "screen",
        "scripts",
        "sharded",
        "shards",
        "signals",
        "sources",
        "start",
        "step",
        "studio_layout",
        "summary",
        "tables",
        "talking",
        "template",
        "trainer",
        "transcript",
        "transfer",
        "trial_rows",
        "unreadable",
        "warmstart",
        "weights",
    },
    "verbs": {
        "__main__",
        "chat",
        "chat_window",
        "check",
        "convert",
        "export",
        "fetch",
        "gptq",
        "hub",
        "measure",
        "merge",
        "merge_report",
        "report",
        "studio",
        "terminal",
        "train",
        "vocab",
        "windows",
    },
}
ORDER = [*LAYERS, "programs"]
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors"}  # each brings torch


def layer_of(module: str) -> str:
    """Layer of `onecard.<module>`; anything that is not in onecard/ is a program."""
    return next((layer for layer, modules in LAYERS.items() if module in modules), "programs")


def imported(source: str) -> set[str]:
    """Dotted names that the module imports when it is imported itself, `onecard.x` for its own modules."""
    names = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["onecard" if node.level else "", node.module]))
            names |= {f"{base}.{alias.name}" if base == "onecard" else base for alias in node.names}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))
    return names


def own(source: str) -> set[str]:
    """Modules of onecard that the source imports at module level."""
    return {name.split(".")[1] for name in imported(source) if name.startswith("onecard.")}


def wrong_arrows(module: str, source: str) -> list[str]:
    """What is wrong with the imports of one module; empty when all point down."""
    layer, found = layer_of(module), []
    for target in sorted(own(source)):
        below = layer_of(target)
        if below == "programs":
            found.append(f"{module} imports {target}, which is in no layer")
        elif ORDER.index(below) > ORDER.index(layer):
            found.append(f"{module} ({layer}) imports {target} ({below}): the arrow points up")
        elif below == layer != "things":
            found.append(f"{module} imports {target}: {layer} do not import each other")
    programs = sorted(name for name in imported(source) if name.split(".")[0] in program_names() - {module})
    found += [f"{module} imports the program {name}" for name in programs]
    if layer in ("ground", "grammar", "words"):
        heavy = sorted(name for name in imported(source) if name.split(".")[0] in HEAVY)
        found += [f"{module} ({layer}) imports {name}: --help would wait for it" for name in heavy]
    return found


def cycle(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, or []."""
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(arrows.get(module, ())):
            ring = follow(target, [*path, module])
            if ring:
                return ring
        done.add(module)
        return []

    return next((ring for module in sorted(arrows) if (ring := follow(module, []))), [])


def library() -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "onecard").glob("*.py")}


def programs() -> dict[str, str]:
    paths = [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]
    return {path.stem: path.read_text(encoding="utf-8") for path in paths}


def program_names() -> set[str]:
    return set(programs()) | {"tools"}


def test_every_file_has_exactly_one_layer():
    """A new file fails here until its layer is written down; a deleted one until it is crossed out."""
    placed = [module for modules in LAYERS.values() for module in modules]
    assert sorted(placed) == sorted(library())


def test_programs_are_found():
    """The checker sees the root programs, and none has the name of a library file."""
    assert "finetune" in programs()
    assert not set(programs()) & set(library())


@pytest.mark.parametrize("module", sorted(library()))
def test_library_imports_point_down(module):
    """No file of onecard/ imports from a layer above its own, nor verbs or words each other."""
    assert wrong_arrows(module, library()[module]) == []


@pytest.mark.parametrize("module", sorted(programs()))
def test_programs_import_only_the_library(module):
    """Programs stand at the top: they import the library, never another program."""
    assert wrong_arrows(module, programs()[module]) == []


def test_library_has_no_import_cycle():
    """Files of one layer may import each other, but never in a ring."""
    assert cycle({module: own(source) for module, source in library().items()}) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("errors", "from onecard import train"),
        ("errors", "from onecard.prompt import encode"),
        ("chat", "import onecard.train"),
        ("chat", "from onecard.train import run"),
        ("train", "from onecard import hub, model"),
        ("hardware", "import torch"),
        ("hardware", "from torch.cuda import is_available"),
        ("config", "import transformers.utils"),
        ("prompt", "if True:\n    import peft"),
        ("config", "from onecard import prompt"),
        ("prompt", "from onecard.data import Examples"),
        ("batching", "from onecard import chat"),
        ("batching", "from . import chat"),
        ("batching", "from .chat import reply"),
        ("model", "try:\n    from onecard.report import loss_curve\nexcept ImportError:\n    pass"),
        ("model", "class Lazy:\n    import onecard.hub as hub"),
        ("data", "import finetune"),
        ("train", "from tools import doctor"),
        ("loss", "from onecard import studio"),
    ],
)
def test_planted_arrow_is_found(module, source):
    """The checker fails on each kind of wrong arrow, however the import is written."""
    assert len(wrong_arrows(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hardware", "def f():\n    import torch\n    from onecard import train"),
        ("hardware", "import torchlight"),
        ("batching", "from onecard.data import Examples\nimport torch"),
        ("prompt", "from onecard.errors import UserError"),
        ("chat", "from onecard import engine_hf, prompt"),
        ("finetune", "from onecard import chat, config, hub, report, train"),
    ],
)
def test_right_arrow_is_let_through(module, source):
    """Downward imports, things among themselves and imports inside functions are no mistakes."""
    assert wrong_arrows(module, source) == []


def test_planted_cycle_is_found():
    """A ring of any length is named; a diamond is no ring."""
    assert cycle({"data": {"batching"}, "batching": {"step"}, "step": {"data"}}) == [
        "batching",
        "step",
        "data",
        "batching",
    ]
    assert cycle({"loss": {"loss"}}) == ["loss", "loss"]
    assert cycle({"step": {"loss", "batching"}, "loss": {"data"}, "batching": {"data"}, "data": set()}) == []


# who imports tests: a test file nobody, tests/support/ the tests alone

FOLDERS = ("benchmarks", "docs", "onecard", "sample", "serve", "tools")
PRODUCT = ("*.py", *(f"{folder}/**/*.py" for folder in FOLDERS))


def files(*patterns: str) -> dict[str, str]:
    """Path from the root -> source."""
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def mentioned(path: str, source: str) -> set[str]:
    """Dotted names that a file imports anywhere, in functions too, or writes in a text, as for a child."""
    folder, names = path.split("/")[:-1], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= set(re.findall(r"\btests(?:\.\w+)+", node.value))
    return names


def wrong_uses_of_tests(path: str, source: str) -> list[str]:
    """What a file takes from tests/ that is not for it."""
    names, inside = sorted(mentioned(path, source)), path.startswith("tests/")
    if inside:
        names = [name for name in names if any(part.startswith("test_") for part in name.split("."))]
        return [f"{path} imports {name}: what is shared belongs into tests/support/" for name in names]
    names = [name for name in names if name.split(".")[0] == "tests"]
    return [f"{path} imports {name}: it must run without tests/" for name in names]


def test_no_test_is_imported():
    """Each test file can be read, moved and deleted alone. This file is left out: it plants such imports."""
    sources = files("tests/**/*.py")
    del sources["tests/test_imports.py"]
    assert {"tests/conftest.py", "tests/support/tiny.py", "tests/data/test_encode.py"} <= set(sources)
    assert [wrong for path, source in sources.items() for wrong in wrong_uses_of_tests(path, source)] == []


def test_nothing_else_needs_the_tests():
    """Whoever has no tests/ folder can run everything."""
    sources = files(*PRODUCT)
    assert {"finetune.py", "benchmarks/rows.py", "docs/pictures.py", "tools/merge_lora.py"} <= set(sources)
    assert [wrong for path, source in sources.items() for wrong in wrong_uses_of_tests(path, source)] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tests/data/test_dataset.py", "from tests.data.test_encode import load"),
        ("tests/data/test_dataset.py", "def f():\n    from tests.runs import test_checkpoint"),
        ("tests/data/test_dataset.py", "from . import test_encode"),
        ("tests/data/test_dataset.py", "from .test_encode import load"),
        ("tests/data/test_dataset.py", "from ..runs.test_checkpoint import copy"),
        ("tests/data/test_dataset.py", "CODE = 'from tests.data.test_dataset import encode'"),
        ("tests/support/tiny.py", "import tests.data.test_encode as other"),
        ("tests/conftest.py", "command = ['-m', 'tests.data.test_encode']"),
        ("benchmarks/rows.py", "def main():\n    from tests.support.memory import memory_rise"),
        ("benchmarks/rows.py", "command = ['-m', 'tests.support.harness']"),
        ("docs/pictures.py", "import tests"),
        ("tools/merge_lora.py", "from tests import support"),
        ("onecard/chat.py", "if True:\n    import tests.support.tiny as tiny"),
    ],
)
def test_planted_use_of_a_test_is_found(path, source):
    """However it is imported, and in the text of a command or program for a child."""
    assert len(wrong_uses_of_tests(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "tests/data/test_dataset.py",
            "from tests.support import tiny\nfrom tests.support.browser import ask",
        ),
        ("tests/support/harness.py", "def child():\n    from . import faults\n    '''as test_run.py'''"),
        ("benchmarks/rows.py", "from onecard import rows\n'''what the tests. do, tests/support/ too'''"),
        ("docs/pictures.py", "import pytest, testing"),
    ],
)
def test_right_use_of_tests_is_let_through(path, source):
    assert wrong_uses_of_tests(path, source) == []
