"""The rooms of onecard/ and the arrows between them: which module imports which, read from the source.

python -m tests.support.rooms   # prints the arrows between rooms, and what breaks a rule

Nothing is imported. Every import counts, those inside functions too, and so do the dotted names of modules
that are started as children ("onecard.runs.legacy"). The rule on torch looks only at what an import runs.
"""

import ast
import re
from collections.abc import Iterator, Mapping

from tests.support.paths import ROOT

RANKS = {  # an arrow goes to a room with a lower rank
    "errors": 0,
    "config": 1,
    "system": 1,
    "hub": 2,
    "data": 2,
    "models": 3,
    "runs": 3,
    "training": 4,
    "inference": 4,
    "evaluation": 5,
    "conversion": 6,
    "ui": 6,
    "serving": 6,
    "programs": 7,
}
EVERYBODY = {"errors", "config", "system"}  # may be imported by every room above them
ALSO = {  # the other rooms that a room may import
    "config": set(),
    "system": set(),
    "hub": set(),
    "data": set(),
    "models": {"hub"},
    "runs": {"hub"},
    "training": {"hub", "data", "models", "runs"},
    "inference": {"hub", "data", "models", "runs"},
    "evaluation": {"data", "models", "runs", "inference"},
    "conversion": {"hub", "data", "models", "runs", "inference", "evaluation"},
    "ui": {"hub", "data", "models", "runs", "training", "inference", "evaluation"},
    "serving": {"hub", "data", "models", "runs", "training", "inference", "evaluation"},
    "programs": set(RANKS) - {"programs"},
}
LIGHT = (
    "__init__",
    "__main__",
    "errors",
    "config",
    "system",
    "hub",
)  # these do not import torch, so --help does not wait for it
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors.torch")  # load torch
AT_THE_ROOT = {"__init__", "__main__", "errors"}


def library() -> dict[str, str]:
    """The source of every module of onecard/ by its dotted name without `onecard.`."""
    paths = sorted((ROOT / "onecard").rglob("*.py"))
    return {".".join(path.relative_to(ROOT / "onecard").with_suffix("").parts): read(path) for path in paths}


def read(path) -> str:
    return path.read_text(encoding="utf-8")


def room_of(module: str) -> str:
    """The room of a dotted name; `errors`, `__init__` and `__main__` are their own."""
    return module.split(".")[0]


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: all but the bodies of functions."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def dotted(node: ast.AST, module: str) -> set[str]:
    """The dotted names that an import statement, or a string with the name of a module, names."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        package = ["onecard", *module.split(".")][: -node.level] if node.level else []
        base = ".".join([*package, *filter(None, [node.module])])
        return {f"{base}.{alias.name}" for alias in node.names} if base else set()
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value} if re.fullmatch(r"onecard(\.\w+)+", node.value) else set()
    return set()


def arrows(module: str, source: str, modules: Mapping[str, str]) -> set[str]:
    """Modules of onecard that a module names anywhere, without `onecard.` before them."""
    targets = set()
    for node in ast.walk(ast.parse(source)):
        for name in dotted(node, module):
            if name == "onecard" or name.startswith("onecard."):
                target = place_of(name, modules)
                if target or not isinstance(node, ast.Constant):  # other texts also begin with onecard.
                    targets.add(target or name.removeprefix("onecard").lstrip("."))
    return targets - {module, ""}


def place_of(name: str, modules: Mapping[str, str]) -> str | None:
    """The module that a dotted name means or that holds its object; None where there is no such module."""
    parts = name.split(".")[1:]
    beginnings = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    candidates = [text for beginning in beginnings for text in (beginning, f"{beginning}.__init__")]
    return next((text for text in candidates if text in modules), None)


def wrong_arrows(module: str, source: str, modules: Mapping[str, str] | None = None) -> list[str]:
    """The problems of the imports of one module, which are empty when the table allows all of them."""
    modules = library() if modules is None else modules
    room, problems = room_of(module), []
    if room not in RANKS and module not in AT_THE_ROOT:
        problems.append(f"{module} is in no room")
    for target in sorted(arrows(module, source, modules)):
        there = room_of(target)
        is_own = there == room and room != "programs"  # nobody imports a program, not even another one
        if is_own or room in ("__init__", "__main__") or target == "__init__":
            continue
        if there not in RANKS:
            problems.append(f"{module} imports {target}, which is in no room")
        elif RANKS[there] >= RANKS.get(room, 0):
            problems.append(f"{module} imports {target}: the arrow does not go to a lower room")
        elif there not in EVERYBODY | ALSO[room]:
            problems.append(f"{module} imports {target}: {room} may not import {there}")
    if room in LIGHT:
        heavy = {name for node in at_import(ast.parse(source)) for name in dotted(node, module)}
        heavy = sorted(name for name in heavy if f"{name}.".startswith(tuple(f"{each}." for each in HEAVY)))
        problems += [
            f"{module} imports {name} when it is imported itself: --help would wait" for name in heavy
        ]
    return problems


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or an empty list."""
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            ring = follow(target, [*path, module])
            if ring:
                return ring
        done.add(module)
        return []

    return next((ring for module in sorted(graph) if (ring := follow(module, []))), [])


def between_rooms(modules: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """For each room and each room that it imports, the number of its files that do."""
    rooms: dict[str, dict[str, int]] = {}
    for module, source in modules.items():
        counts = rooms.setdefault(room_of(module), {})
        for there in {room_of(target) for target in arrows(module, source, modules)} - {room_of(module)}:
            counts[there] = counts.get(there, 0) + 1
    return rooms


def main() -> None:
    modules = library()
    rooms = between_rooms(modules)
    print("room         files  imports (from how many of its files)")
    for room in sorted(rooms, key=lambda room: (RANKS.get(room, -1), room)):
        files = sum(room_of(module) == room for module in modules)
        there = sorted(rooms[room].items(), key=lambda item: (RANKS.get(item[0], -1), item[0]))
        print(f"{room:<12} {files:>5}  " + ", ".join(f"{target} {count}" for target, count in there))
    problems = [line for module, source in modules.items() for line in wrong_arrows(module, source, modules)]
    ring = circle({module: arrows(module, source, modules) for module, source in modules.items()})
    problems += ["circle: " + " -> ".join(ring)] if ring else []
    print("\n".join(problems) or "No arrow breaks a rule.")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
