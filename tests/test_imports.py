"""Imports go to lower rooms, never in a circle and never from the product to its tests.

The rules and the reading of the source are in tests/support/rooms.py; nothing is imported. Imports inside
functions count, and so do the dotted names of modules that are started as children. Uses of tests/ are
searched everywhere, also in texts.
"""

import ast
import re

import pytest

from tests.support.paths import ROOT
from tests.support.rooms import ALSO, AT_THE_ROOT, RANKS, arrows, circle, library, room_of, wrong_arrows

LIBRARY = library()


def programs() -> dict[str, str]:
    paths = [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "serve").glob("*.py")]
    return {path.stem: path.read_text(encoding="utf-8") for path in paths}


def test_the_listing_shows_the_rooms():
    """The root of onecard/ has the entry, the errors and the rooms, and every room states its purpose."""
    at_the_root = {module for module in LIBRARY if "." not in module}
    assert at_the_root == AT_THE_ROOT
    rooms = {room_of(module) for module in LIBRARY} - AT_THE_ROOT
    assert rooms <= set(RANKS)
    purposes = {room: ast.get_docstring(ast.parse(LIBRARY[f"{room}.__init__"])) for room in rooms}
    assert all(purposes.values()), purposes


def test_the_table_agrees_with_the_ranks():
    """The rooms that a room may import are below it."""
    assert all(RANKS[there] < RANKS[room] for room, rooms in ALSO.items() for there in rooms)


@pytest.mark.parametrize("module", sorted(LIBRARY))
def test_arrows_go_where_they_may(module):
    assert wrong_arrows(module, LIBRARY[module], LIBRARY) == []


def test_no_circle():
    """Files of one room may import each other, but never in a circle; between rooms the ranks allow none."""
    assert circle({module: arrows(module, source, LIBRARY) for module, source in LIBRARY.items()}) == []


@pytest.mark.parametrize(("name", "source"), sorted(programs().items()))
def test_programs_import_only_the_library(name, source):
    """The entries that users know are above the library, and none imports another."""
    assert {"finetune", "merge_lora"} <= set(programs())
    names = {alias for node in ast.walk(ast.parse(source)) for alias in imported(node)}
    assert not {each.split(".")[0] for each in names} & {*programs(), "tools", "serve"} - {name}


def imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    return {node.module or ""} if isinstance(node, ast.ImportFrom) else set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("errors", "from onecard.system import files"),
        ("config.training", "from onecard.system.files import read_json"),
        ("system.files", "from onecard.config import training"),
        ("system.lock", "def f():\n    from onecard.hub import revisions"),
        ("hub.locate", "from onecard.data.reader import FORMATS"),
        ("data.reader", "from onecard.hub import locate"),
        ("data.preview", "from onecard.models import tokenizer"),
        ("models.loss", "import onecard.data.packing"),
        ("models.loss", "import onecard.data.packing as packing"),
        ("runs.jobs", "from onecard import training"),
        ("runs.adapters", "COMMAND = ['-m', 'onecard.inference.gguf_check']"),
        ("runs.adapters", "from onecard.data.template import load"),
        ("training.loop", "def f():\n    from onecard.inference import chat"),
        ("training.loop", "class Lazy:\n    from onecard.ui import page"),
        ("inference.chat", "if True:\n    import onecard.training.memory"),
        ("inference.chat", "from ..training import memory"),
        (
            "inference.chat",
            "try:\n    from onecard.evaluation.parity import compare\nexcept ImportError:\n    pass",
        ),
        ("evaluation.parity", "from onecard.hub.locate import locate"),
        ("conversion.merge", "from onecard.training.loop import run"),
        ("ui.page", "from onecard.conversion.gguf_cache import for_llama"),
        ("training.loop", "from onecard.train import run"),
        ("training.loop", "from onecard.kitchen import stove"),
        ("strange", "import os"),
        ("kitchen.stove", "import os"),
        ("programs.cpu_chat", "from onecard.programs import generate"),
        ("training.loop", "from onecard.programs import generate"),
        ("config.options", "import torch"),
        ("__init__", "import torch"),
        ("__main__", "import transformers"),
        ("system.hardware", "from torch.cuda import is_available"),
        ("hub.demo", "if True:\n    import peft"),
        ("errors", "class Lazy:\n    import transformers.utils"),
    ],
)
def test_planted_arrow_is_found(module, source):
    """The check finds each kind of wrong arrow, wherever and however the import is written."""
    assert len(wrong_arrows(module, source, LIBRARY)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("config.options", "from onecard.errors import UserError"),
        ("system.hardware", "def f():\n    import torch\n    from onecard.system import files"),
        ("system.hardware", "import torchlight"),
        ("hub.demo", "def convert():\n    import transformers"),
        ("models.base_model", "from onecard.hub import model_files\nimport torch"),
        ("data.packing", "from onecard.data.examples import Examples\nimport torch"),
        (
            "inference.chat",
            "from . import decoding\nfrom .decoding import decode\nfrom ..data import conversation",
        ),
        ("ui.training_window", "from onecard.training import memory"),
        ("conversion.merge", "TEXT = 'onecard.json'"),
        ("conversion.merge", "TEXT = 'see onecard.training.loop for the loop'"),
    ],
)
def test_right_arrow_is_let_through(module, source):
    """Imports of lower rooms, of the same room and of torch inside a function are allowed."""
    assert wrong_arrows(module, source, LIBRARY) == []


def test_planted_circle_is_found():
    """A circle of any length inside a room is named, also when a function or a child's name closes it."""
    assert circle({"data.a": {"data.b"}, "data.b": {"data.c"}, "data.c": {"data.a"}}) == [
        "data.a",
        "data.b",
        "data.c",
        "data.a",
    ]
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []
    planted = {
        **LIBRARY,
        "data.conversation": "def f():\n    from onecard.data import encode",
        "runs.checkpoint": "CHILD = 'onecard.runs.legacy'",
    }
    for module in ("data.conversation", "runs.checkpoint"):
        sources = {**LIBRARY, module: planted[module]}
        graph = {name: arrows(name, source, sources) for name, source in sources.items()}
        assert module in circle(graph)


# uses of tests: nobody imports a test file, and only tests import tests/support/

FOLDERS = ("benchmarks", "docs", "onecard", "sample", "serve", "tools")
PRODUCT = ("*.py", *(f"{folder}/**/*.py" for folder in FOLDERS))


def files(*patterns: str) -> dict[str, str]:
    """The source of each file by its path from the root."""
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def mentioned(path: str, source: str) -> set[str]:
    """Dotted names that a file imports, also inside functions, or writes in a text, as for a child."""
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
    """The uses of tests/ in a file that are not allowed there."""
    names, inside = sorted(mentioned(path, source)), path.startswith("tests/")
    if inside:
        names = [name for name in names if any(part.startswith("test_") for part in name.split("."))]
        return [f"{path} imports {name}: what is shared belongs into tests/support/" for name in names]
    names = [name for name in names if name.split(".")[0] == "tests"]
    return [f"{path} imports {name}: it must run without tests/" for name in names]


def test_no_test_is_imported():
    """Each test file can be read, moved and deleted alone. This file plants such imports and is excepted."""
    sources = files("tests/**/*.py")
    del sources["tests/test_imports.py"]
    assert {"tests/conftest.py", "tests/support/tiny.py", "tests/data/test_encode.py"} <= set(sources)
    assert [wrong for path, source in sources.items() for wrong in wrong_uses_of_tests(path, source)] == []


def test_nothing_else_needs_the_tests():
    """Everything runs without the tests/ folder."""
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
        ("onecard/inference/chat.py", "if True:\n    import tests.support.tiny as tiny"),
    ],
)
def test_planted_use_of_a_test_is_found(path, source):
    """A use is found in any form of import, and in the text of a command or program for a child."""
    assert len(wrong_uses_of_tests(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "tests/data/test_dataset.py",
            "from tests.support import tiny\nfrom tests.support.browser import ask",
        ),
        ("tests/support/harness.py", "def child():\n    from . import faults\n    '''as test_run.py'''"),
        (
            "benchmarks/rows.py",
            "from onecard.data import dataset\n'''what the tests. do, tests/support/ too'''",
        ),
        ("docs/pictures.py", "import pytest, testing"),
    ],
)
def test_right_use_of_tests_is_let_through(path, source):
    assert wrong_uses_of_tests(path, source) == []
