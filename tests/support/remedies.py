"""Check in the source that each program has the options that its messages name.

python -m tests.support.remedies   # prints the programs and what they can raise, then what is wrong

Every text counts in everything that a program can reach (tests/support/call_graph.py), whether it ends up in
a UserError, in a note or in a helper's argument, so no way of putting a message together hides it. An option
in it must be one of the program itself or, right after the name of another program
(`{commands.name('merge')} --report`), one of that program. Where a text puts the name of an option in, as
`--{name}`, nothing can be read: such texts belong into config/options.py, which has the names from settings.
"""

import ast
import dataclasses
import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tests.support.call_graph import AS_CHILD, FUNCTIONS, CallGraph, Part, but_annotations
from tests.support.rooms import library

# CSS has var(--name). re.ASCII, because a Chinese character next to an option is not part of its name.
FLAG = re.compile(r"(?<!var\()(?<![\w-])--([A-Za-z][\w-]*|[\0{%]|$)", re.ASCII)
COMMAND = re.compile("\1([\\w-]*)\1[^,;.]*$")  # the name of a program without a stop behind it
# names in config/declaration.py, whose texts are read from the settings instead
DECLARATIONS = ("option", "window_option", "learned", "execution", "commit_option", "inherited", "Use")
NAMES = ("name", "line", "script", "child")  # functions of system/commands.py
OF_EVERY_PROGRAM = {"help", "config"}
HAVE_NAMES_FROM_SETTINGS = ("config.options", "config.declaration")
OTHERS = {  # options of programs of others in command lines
    "nvidia-smi": {"query-gpu", "format"},
    "pip": {"quiet", "disable-pip-version-check", "no-deps", "no-binary", "dest", "hash"}
    | {"force-reinstall", "no-cache-dir", "no-build-isolation"},
    "llama.cpp's converters": {"outfile", "outtype", "base"},
    "the child of conversion/llama_cpp_converter.py": {"any-tokenizer", "eos-ids"},
}
WINDOWS = {"interaction": ("finetune",)}  # the tab for training has inputs for options of another program


class Text(NamedTuple):
    """A text of the source; a NUL stands for an inserted value, and \\1 encloses the name of a program."""

    line: int
    words: str
    is_argument: bool = False  # in the command line of a child process


class Finding(NamedTuple):
    """An option that a message names and that the program lacks."""

    program: str
    module: str
    line: int
    flag: str


@functools.cache
def program_modules() -> dict[str, str]:
    """Sub-command -> module of its main, read from onecard/__main__.py."""
    table = next(
        statement.value
        for statement in ast.parse(library()["__main__"]).body
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "PROGRAMS"
    )
    return {command: f"programs.{file}" for command, (file, _) in ast.literal_eval(table).items()}


@functools.cache
def product() -> CallGraph:
    """The graph of onecard/ as it is."""
    return CallGraph(library())


def settings(command: str) -> type:
    """The class of settings that a program parses: the first argument of its call of parse or parse_given."""
    graph = product()
    module = program_modules()[command]
    for call in ast.walk(graph.modules[module].tree):
        if isinstance(call, ast.Call) and _name(call.func) in ("parse", "parse_given"):
            part = graph.target(module, call.args[0])
            assert isinstance(part, Part)
            return getattr(importlib.import_module(f"onecard.{part.module}"), part.name)
    raise AssertionError(f"{module} parses no options")


@functools.cache
def options_of(command: str) -> frozenset[str]:
    """The names of the options of a program, including those of the inputs in its window."""
    names = {field.name for field in dataclasses.fields(settings(command))} | OF_EVERY_PROGRAM
    return frozenset(names.union(*(options_of(other) for other in WINDOWS.get(command, ()))))


def start_of(command: str) -> set[Part]:
    """The parts where a program starts: those that `onecard` runs for every program, and its own file."""
    module = program_modules()[command]
    return {Part("__main__", "run"), Part(module, "main"), Part(module, "LESS_MEMORY")}


def texts(graph: CallGraph, part: Part) -> Iterator[Text]:
    """All texts of a part but docstrings and declarations of options."""
    for statement in graph.nodes(part):
        skipped, arguments = _skipped(statement), _arguments(statement)
        for node in but_annotations(statement):
            if id(node) in skipped:
                continue
            if isinstance(node, ast.JoinedStr):
                skipped |= {id(piece) for piece in node.values if isinstance(piece, ast.Constant)}
                words = "".join(_piece(graph, part, statement, piece) for piece in node.values)
                yield Text(node.lineno, words, id(node) in arguments)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield Text(node.lineno, node.value, id(node) in arguments)


def _skipped(statement: ast.AST) -> set[int]:
    """The texts of a statement that are never in a message: docstrings and declarations of options."""
    skipped = set()
    for node in ast.walk(statement):
        is_declaration = isinstance(node, ast.Call) and _name(node.func) in DECLARATIONS
        skipped |= {id(each) for each in ast.walk(node)} if is_declaration else set()
        if isinstance(node, ast.Call):  # "--".join and .replace("/", "--"): names of folders, not of options
            separators = [*node.args, getattr(node.func, "value", node)]
            skipped |= {id(each) for each in separators if getattr(each, "value", "") == "--"}
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
    return skipped


def _arguments(statement: ast.AST) -> set[int]:
    """The texts of a statement that are arguments of a program: in a list, or of commands.pip_install."""
    calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
    joined = {id(each) for call in calls if _name(call.func) == "join" for each in call.args}  # one text
    lists = [node for node in ast.walk(statement) if isinstance(node, ast.List)]
    owners: list[ast.AST] = [each for each in lists if id(each) not in joined]
    owners += [call for call in calls if _name(call.func) == "pip_install"]
    children = [child for owner in owners for child in getattr(owner, "elts", getattr(owner, "args", []))]
    return {id(child) for child in children}


def _name(function: ast.AST) -> str:
    """The last name in the callee of a call, `install` in `commands.install(...)`."""
    return getattr(function, "id", getattr(function, "attr", ""))


def _piece(graph: CallGraph, part: Part, statement: ast.AST, piece: ast.expr) -> str:
    """A piece of an f-string: its text, the name of a program between two \\1, or a NUL for a value."""
    if isinstance(piece, ast.Constant):
        return str(piece.value)
    assert isinstance(piece, ast.FormattedValue)
    values: list[ast.AST] = [piece.value]
    if isinstance(piece.value, ast.Name):
        values = [*_assigned(statement, piece.value.id), *_constant(graph, part, piece.value)]
    names = [command for value in values for command in commands_in(graph, part, value)]
    return f"\1{names[0]}\1" if names else "\0"


def _assigned(statement: ast.AST, name: str) -> list[ast.AST]:
    assignments = [node for node in ast.walk(statement) if isinstance(node, ast.Assign)]
    return [node.value for node in assignments if getattr(node.targets[0], "id", "") == name]


def _constant(graph: CallGraph, part: Part, name: ast.Name) -> list[ast.AST]:
    target = graph.target(part.module, name)
    return graph.nodes(target) if isinstance(target, Part) and target != part else []


def commands_in(graph: CallGraph, part: Part, tree: ast.AST) -> list[str]:
    """The sub-commands that a tree asks system/commands.py to name; "" for one that cannot be read."""
    names = []
    local = graph.imported(part.module, tree)
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute | ast.Name):
            target = graph.target(part.module, call.func, local)
            if isinstance(target, Part) and target.module == "system.commands" and target.name in NAMES:
                command = call.args[-1]
                names.append(str(command.value) if isinstance(command, ast.Constant) else "")
    return names


def wrong(
    graph: CallGraph, program: str, parts: set[Part], options: Mapping[str, frozenset[str]]
) -> list[Finding]:
    """The options that these parts name and a program lacks; options: those of every program."""
    findings = set()
    for part in parts:
        for text in texts(graph, part):
            for match in FLAG.finditer(text.words):
                other = COMMAND.search(text.words[: match.start()])
                allowed = options[program] | options.get(other[1] if other else "", frozenset())
                if text.is_argument or _is_of_a_child(graph, part):
                    allowed = allowed.union(*OTHERS.values())
                is_name = match[1][:1].isalpha()
                if match[1] not in allowed and (is_name or part.module not in HAVE_NAMES_FROM_SETTINGS):
                    flag = f"--{match[1]}" if is_name else "--{...}"
                    findings.add(Finding(program, part.module, text.line, flag))
    return sorted(findings)


def _is_of_a_child(graph: CallGraph, part: Part) -> bool:
    """Whether it is a constant of a module that runs as a child, which may name the child's own arguments."""
    is_constant = not any(isinstance(node, (*FUNCTIONS, ast.ClassDef)) for node in graph.nodes(part))
    return is_constant and AS_CHILD in graph.modules[part.module].parts


def errors_in(graph: CallGraph, part: Part) -> set[tuple[str, int]]:
    """The module and line of each UserError that a part creates."""
    return {
        (part.module, node.lineno)
        for statement in graph.nodes(part)
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", "")) == "UserError"
    }


def sweep(graph: CallGraph) -> dict[str, tuple[set[tuple[str, int]], list[Finding]]]:
    """Program -> (the errors that it can raise, the options that its messages name and it lacks)."""
    options = {command: options_of(command) for command in program_modules()}
    results = {}
    for command in program_modules():
        parts = graph.reachable(start_of(command))
        raised = set().union(*(errors_in(graph, part) for part in parts))
        results[command] = raised, wrong(graph, command, parts, options)
    return results


def main() -> None:
    results = sweep(product())
    print("program          options  errors that it can raise  options that it lacks")
    for command, (raised, findings) in results.items():
        print(f"{command:<16} {len(options_of(command)):>7} {len(raised):>25} {len(findings):>22}")
    findings = [finding for _, findings_of_program in results.values() for finding in findings_of_program]
    for program, module, line, flag in findings:
        print(f"onecard/{module.replace('.', '/')}.py:{line}: {program} has no {flag}")
    raise SystemExit(bool(findings))


if __name__ == "__main__":
    main()
