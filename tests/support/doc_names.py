"""Names in the docs -> whether they exist: files, code, options, commands, variables, keys.

Everything is read from the source, and only what needs no torch is imported. A piece of code is written with
its room and file (`training.loop.one_step`), a name of a library as our code imports it
(`torch.amp.GradScaler`).
"""

import ast
import dataclasses
import functools
import importlib
import itertools
import re
from collections.abc import Iterator

from onecard.__main__ import PROGRAMS as COMMANDS
from onecard.config.declaration import declared
from onecard.system.commands import FILES
from tests.support.paths import ROOT

FOLDERS = ("benchmarks", "docs", "notebooks", "onecard", "sample", "serve", "tests", "tools")
OTHERS = {"pip", "pip-compile", "pip-audit", "diff", "grep", "less", "freeze"}  # programs of others
PROGRAMS = {"bash", "echo", "python", "python3", "accelerate"}  # programs that start ours
OF_OTHERS = {
    *("--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint", "--config_file"),  # for launchers
    *("https_proxy", "http_proxy", "all_proxy"),  # variables that Python itself reads
    "modeling_x.py",  # belongs to a model with code of its own
}
SCRIPTS = {  # shell script -> sub-command that gets its arguments
    "finetune.sh": "finetune",
    "finetune_continue.sh": "continue",
    "finetune_others_continue.sh": "continue",
    "generate.sh": "generate",
    "interaction.sh": "interaction",
    "alpaca-serve.sh": "interaction",
    "cpu_chat.sh": "chat",
    "serve.sh": "serve",
}
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)]+)\)")
FILE = re.compile(r"[\w./-]+\.(py|sh|md|yaml|ipynb|png|toml)")
CODE = re.compile(r"[A-Za-z]\w*(\.\w+)+")
LIKE_CODE = re.compile(r"\w+[-_.]\w+.*|\w+[a-z][A-Z].*")  # has a character inside that plain words lack
WORD = re.compile(r"[\w.@/-]*\w")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")
UNDERSCORED = re.compile(r"[a-z]\w*_\w+")


@dataclasses.dataclass
class Names:
    """The names that exist, as the docs write them."""

    paths: set[str] = dataclasses.field(default_factory=set)  # files and folders, from any folder on the way
    code: set[str] = dataclasses.field(default_factory=set)  # dotted, with and without `onecard.`
    defined: set[str] = dataclasses.field(default_factory=set)  # functions, classes, members; the name alone
    library: set[str] = dataclasses.field(default_factory=set)  # dotted, as our code reaches it
    attributes: set[str] = dataclasses.field(default_factory=set)  # used by our code of any object
    keywords: set[str] = dataclasses.field(default_factory=set)  # name=value, as our code passes it
    options: set[str] = dataclasses.field(default_factory=set)  # with the two dashes
    texts: set[str] = dataclasses.field(
        default_factory=set
    )  # whole string constants, and names inside of them

    def has(self, word: str) -> bool:
        """Whether a word names anything that exists."""
        return (
            word.rstrip("/") in self.paths
            or any(word in names for names in (self.code, self.library, self.attributes, self.keywords))
            or word in self.options
            or word in self.texts
        )

    def missing(self, page: str, strict: bool = False) -> list[str]:
        """The names in backticks and code blocks of a Markdown text that do not exist.

        strict: every word in backticks is a name; otherwise those alone that look like one of ours.
        """
        wrong = []
        for span in SPAN.findall(FENCE.sub("", page)):
            words = span.split()
            if words[0] in OTHERS:
                continue
            exists = self.has if strict else self.is_fine
            names = [word for word in map(bare, words) if word and word.split("/")[-1] not in PROGRAMS]
            wrong += [word for word in names if not exists(word)]
        for block in FENCE.findall(page):
            for line in block.splitlines()[1:-1]:
                words = line.split("  #")[0].split()
                if words and words[0] not in OTHERS:
                    wrong += [word for word in map(bare, words) if not self.is_fine(word)]
        return wrong

    def is_fine(self, word: str) -> bool:
        """Whether a word of code exists, or does not look like a name of ours at all."""
        if word.split("=")[0] in OF_OTHERS:
            return True
        if word.startswith("--"):
            return word.split("=")[0] in self.options
        variable = word.split("=")[0]
        if VARIABLE.fullmatch(variable):
            return variable in self.texts
        if FILE.fullmatch(word):
            return (
                word in self.paths or word in self.texts or not word.endswith((".py", ".sh", ".md", ".yaml"))
            )
        if CODE.fullmatch(word) and word.split(".")[0] in rooms():
            return word in self.code | self.paths | self.texts
        if UNDERSCORED.fullmatch(word):
            return self.has(word) or word in self.defined or f"--{word}" in self.options
        return True


def bare(word: str) -> str:
    """A word without the marks around it."""
    return word.strip("\"',;()[]…").rstrip(".:") if not word.startswith(".") else word.strip("\"',;")


def rooms() -> set[str]:
    folders = [path.name for path in (ROOT / "onecard").iterdir() if (path / "__init__.py").is_file()]
    return {"onecard", "tests", "benchmarks", *folders}


def members(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Names that statements define, with the statement of each."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign):
            names = [name for target in node.targets for name in ast.walk(target)]
            yield from ((name.id, node) for name in names if isinstance(name, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node


def reached(tree: ast.Module) -> Iterator[str]:
    """Dotted names of libraries that a module imports, or reaches through an import."""
    start = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            start |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            start |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            yield node.module
    yield from start.values()
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        first, _, rest = text.partition(".")
        if first in start and CODE.fullmatch(text):
            yield f"{start[first] if start[first].count('.') or first != start[first] else first}.{rest}"


def documentation(tree: ast.Module) -> set[ast.Constant]:
    """The strings of a module that are docstrings."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, kinds) and node.body]
    firsts = [body[0].value for body in bodies if isinstance(body[0], ast.Expr)]
    return {value for value in firsts if isinstance(value, ast.Constant)}


def add_module(names: Names, path: str, source: str) -> None:
    """The names that a Python file defines, uses and writes; uses and texts in tests do not count."""
    tree = ast.parse(source)
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for prefix in {module, module.removeprefix("onecard.")}:
        names.code.add(prefix)
        for name, node in members(tree.body):
            names.code.add(f"{prefix}.{name}")
            if isinstance(node, ast.ClassDef):
                inner = {member for member, _ in members(node.body)}
                inner |= {
                    each.attr
                    for each in ast.walk(node)
                    if isinstance(each, ast.Attribute)
                    and isinstance(each.ctx, ast.Store)
                    and ast.unparse(each.value) == "self"
                }
                names.code |= {f"{prefix}.{name}.{member}" for member in inner}
    if not path.rsplit("/", 1)[-1].startswith("test_"):  # tests plant options that do not exist
        add_options(names, tree)
    if path.startswith("tests/"):
        return
    skipped = documentation(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.attributes.add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.defined.add(node.name)
        elif isinstance(node, ast.keyword) and node.arg:
            names.keywords.add(f"{node.arg}={ast.unparse(node.value)}")
            names.defined.add(node.arg)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.defined.add(node.target.id)
            if path.startswith("onecard/config/"):
                names.options.add(f"--{node.target.id}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            names.texts.add(node.value)
            names.texts |= {word for word in WORD.findall(node.value) if LIKE_CODE.fullmatch(word)}
    names.library |= {name for name in reached(tree) if name.split(".")[0] != "onecard"}


def add_options(names: Names, tree: ast.Module) -> None:
    """The options, such as `--rows`, that a Python file writes in a text."""
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    names.options |= {word for text in texts if isinstance(text, str) for word in OPTION.findall(text)}


@functools.cache
def of_project() -> Names:
    """The names of this project."""
    names = Names()
    inside = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    for path in (*ROOT.glob("*"), *inside):
        parts = path.relative_to(ROOT).parts
        if "__pycache__" not in parts:
            names.paths |= {"/".join(parts[start:]) for start in range(len(parts))}
        if path.suffix == ".py":
            add_module(names, "/".join(parts), path.read_text(encoding="utf-8"))
        elif path.suffix in (".sh", ".yaml"):
            text = path.read_text(encoding="utf-8")
            names.texts |= {word for word in WORD.findall(text) if LIKE_CODE.fullmatch(word)}
            names.texts |= set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", text))
            names.options |= set(OPTION.findall(text))
    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    names.texts |= set(re.findall(r"^([\w.-]+)==", pinned, flags=re.MULTILINE))
    return names


def anchor(heading: str) -> str:
    """The name that GitHub gives a heading in an address."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def dead_links(path: str, page: str) -> list[str]:
    """The links of the page at this path from the root to files or headings that do not exist."""
    dead = []
    for link in LINK.findall(FENCE.sub("", page)):
        file, _, heading = link.partition("#")
        if file.startswith(("http:", "https:")):
            continue
        target = (ROOT / path).parent / file
        text = target.read_text(encoding="utf-8") if file.endswith(".md") and target.is_file() else ""
        headings = re.findall(r"^#+ (.*)$", text if file else page, flags=re.MULTILINE)
        if not target.exists() or (heading and heading not in map(anchor, headings)):
            dead.append(link)
    return dead


def options_of(command: str) -> set[str]:
    """The options of a sub-command."""
    program = importlib.import_module(f"onecard.programs.{COMMANDS[command][0]}")
    return {f"--{name}" for name in declared(program.SETTINGS)} | {"--help", "--config"}


def command_of(word: str, before: str) -> str | None:
    """The sub-command that a word of a command line starts: a file, a script, or a name after `onecard`."""
    files = {file: command for command, file in FILES.items()} | SCRIPTS
    ends = [command for file, command in files.items() if f"/{word}".endswith(f"/{file}")]
    return ends[0] if ends else word if before == "onecard" and word in COMMANDS else None


def wrong_options(page: str) -> list[str]:
    """`program --option` for each option in a command line of a page that its program does not have."""
    blocks = [line for block in FENCE.findall(page) for line in block.replace("\\\n", " ").splitlines()[1:-1]]
    wrong = []
    for line in (*SPAN.findall(FENCE.sub("", page)), *blocks):
        words, command = line.split("  #")[0].split(), None
        for before, word in itertools.pairwise(["", *words]):
            command = command_of(word.strip("\"'"), before) or command
            option = word.split("=")[0]
            if word in ("|", "&&", ";"):
                command = None
            elif command and option.startswith("--") and option not in options_of(command):
                wrong.append(f"{command} {option}")
    return wrong
