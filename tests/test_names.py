"""The files that comments and docstrings name exist, and so does everything that the docs name."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator

import pytest

from tests.support import doc_names
from tests.support.paths import ROOT
from tests.support.rooms import RANKS

FOLDERS = ("onecard", "tests", "tools", "serve", "benchmarks", "sample", "docs")
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STRANGERS = ("modeling_x.py",)  # belongs to a model with code of its own
NAMED = re.compile(r"(?<![\w/.<>-])(?:[\w-]+/)*[\w-]+\.py\b")


def sources() -> dict[str, str]:
    """The text of every Python file by its path from the root."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(paths)}


def prose(source: str) -> Iterator[str]:
    """The comments and docstrings of a Python file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def missing(text: str, known: set[str]) -> list[str]:
    """The .py files that a text names and that do not exist."""
    return [
        name for name in NAMED.findall(text) if not any(f"/{path}".endswith(f"/{name}") for path in known)
    ]


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every way to name an existing file: from the root, or from any folder on the way to it."""
    parts = [path.split("/") for path in sources()]
    return {*STRANGERS, *("/".join(each[start:]) for each in parts for start in range(len(each)))}


def test_names_in_the_code(known):
    wrong = {path: missing("\n".join(prose(source)), known) for path, source in sources().items()}
    assert {path: names for path, names in wrong.items() if names} == {}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_names_in_the_docs(path, known):
    assert missing(path.read_text(encoding="utf-8"), known) == []


def test_a_stale_name_is_found(known):
    assert missing("See frozen.py, models/loss.py, loss.py and training/loss.py.", known) == [
        "frozen.py",
        "training/loss.py",
    ]
    assert missing("\n".join(prose('"""As nowhere.py."""\n# and other.py\nx = "no.py"\n')), known) == [
        "nowhere.py",
        "other.py",
    ]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_the_docs_name_what_exists(path):
    """Named options, files, code, commands and variables exist; in decisions.md all words in backticks do."""
    page = path.read_text(encoding="utf-8")
    names = doc_names.of_project()
    assert names.missing(page, strict=path.name == "decisions.md") == []
    assert doc_names.wrong_options(page) == []
    assert doc_names.dead_links(path.relative_to(ROOT).as_posix(), page) == []


def test_the_decisions_are_grouped_by_room():
    """The sections follow the order of the rooms, then the project; each paragraph begins with its title."""
    page = (ROOT / "docs/decisions.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\w+)", page, flags=re.MULTILINE)
    rooms = [room for room in RANKS if (ROOT / "onecard" / room).is_dir()]
    assert [section.lower() for section in sections] == [*rooms, "project"]
    paragraphs = page.partition("## ")[2].split("\n\n")[1:]
    untitled = [text for text in paragraphs if not text.startswith(("**", "## "))]
    assert untitled == []


@pytest.mark.parametrize(
    "span",
    [
        "training/nowhere.py",
        "docs/nowhere.md",
        "training.loop.no_step",
        "training.loop.Trainer.no_member",
        "training.nowhere.one_step",
        "onecard.training.nowhere",
        "tests.support.nowhere",
        "--no_such_option",
        "finetune.py --no_such_option",
        "onecard finetune --no_such_option",
        "ONECARD_NO_SUCH_VARIABLE",
        "no_such_key",
        "bash tools/no_setup.sh gptq",
    ],
)
def test_a_planted_name_is_found(span):
    """It is found on any page, in backticks and in a block of code."""
    names = doc_names.of_project()
    for page in (f"Here `{span}` is.", f"```text\n{span}\n```\n"):
        assert len(names.missing(page)) == 1
    assert len(names.missing(f"Here `{span}` is.", strict=True)) == 1


@pytest.mark.parametrize(
    "span",
    [
        "torch.amp.NoScaler",
        "peft.helpers.nowhere",
        "torch.cuda.is_bf16_supported",  # this exists, but nothing in the project uses it
        "use_cache=None",
        "nowhere",
        "no-package",
        "nowhere.json",
    ],
)
def test_a_planted_word_is_found_in_the_decisions(span):
    """In the decisions every word in backticks names something that is in this project or used by it."""
    assert doc_names.of_project().missing(f"Here `{span}` is.", strict=True) == [span]


def test_names_that_exist_are_let_through():
    page = (
        "`training/loop.py`, `onecard/training/loop.py`, `tools/setup.sh`, `onecard/`, "
        "`training.loop.one_step`, `training.trainer.Trainer.plan`, `system.sandbox.ENVIRONMENT`, "
        "`torch.amp.GradScaler`, `use_cache=False`, `--batch_size`, `adapter_model.safetensors`, "
        "`ONECARD_CACHE`, `safetensors`, `learned`, `python -P -m onecard finetune`, "
        "`bash tools/setup.sh gptq`, `pip-compile --generate-hashes mine.txt`"
    )
    assert doc_names.of_project().missing(page, strict=True) == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (".venv/bin/python finetune.py --rows 3", "finetune --rows"),
        ("TEST_SIZE=0 bash finetune.sh --max_steps 1 --rows 3", "finetune --rows"),
        ("onecard merge --seed 3", "merge --seed"),
        ('echo "a --b" | .venv/bin/python generate.py --terminal --overwrite', "generate --overwrite"),
    ],
)
def test_an_option_of_another_program_is_found(line, wrong):
    """It is found in backticks and in a block of code, also where a line is continued."""
    assert doc_names.wrong_options(f"`{line}`") == [wrong]
    assert doc_names.wrong_options("```text\n" + line.replace(" --", " \\\n--") + "\n```\n") == [wrong]


def test_a_dead_link_is_found():
    page = (
        "# One heading\n[a](#one-heading) [b](#none) [c](docs/data.md#files) [d](docs/data.md#none) [e](x.md)"
    )
    assert doc_names.dead_links("README.md", page) == ["#none", "docs/data.md#none", "x.md"]
