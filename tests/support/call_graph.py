"""Which functions of onecard/ a program can reach, read from the source; nothing is imported.

The parts of a module are its functions, classes, constants, what its import runs (AT_IMPORT) and what it does
as a child process (AS_CHILD). An arrow goes from a part to every part that it refers to, called or not, so
functions that are passed as values, wrapped by functools.partial or kept in tables count. A class is one part
with all its methods: an object exists only where reachable code refers to its class, so no method is missed.
Names of modules in texts and `__name__` lead to what those modules do as children; a child that is a program
of its own (commands.child) speaks of its own options. Annotations make no object and do not count.
"""

import ast
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from tests.support.rooms import dotted, place_of

AT_IMPORT, AS_CHILD = "<import>", "<child>"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Part(NamedTuple):
    """One function, class or constant of a module, or its AT_IMPORT or AS_CHILD."""

    module: str  # without `onecard.`
    name: str


class ModuleRef(NamedTuple):
    """A name that means a whole module."""

    module: str


Target = Part | ModuleRef


@dataclasses.dataclass
class Module:
    """The source of one module, cut into parts."""

    tree: ast.Module
    parts: dict[str, list[ast.AST]]  # name of a part -> its statements
    imports: dict[str, Target]  # the meanings of the names that the top of the module imports


class CallGraph:
    """The parts of all modules, and the arrows between them; sources: name without `onecard.` -> source."""

    def __init__(self, sources: Mapping[str, str]):
        self.sources = sources
        self._known: dict[Part, frozenset[Part]] = {}
        self.modules = {name: self._cut(name, source) for name, source in sources.items()}

    def reachable(self, start: Iterable[Part]) -> set[Part]:
        """All parts that can run when these do."""
        waiting, seen = list(start), set()
        while waiting:
            part = waiting.pop()
            if part not in seen:
                seen.add(part)
                waiting.extend(self.arrows(part))
        return seen

    def nodes(self, part: Part) -> list[ast.AST]:
        """The statements of a part."""
        return self.modules[part.module].parts.get(part.name, [])

    def arrows(self, part: Part) -> frozenset[Part]:
        """The parts that a part refers to, and the import of its module."""
        if part not in self._known:
            self._known[part] = frozenset(self._arrows(part))
        return self._known[part]

    def _arrows(self, part: Part) -> set[Part]:
        module = self.modules[part.module]
        targets = {Part(part.module, AT_IMPORT)}
        if part.name == AT_IMPORT:
            targets |= self._run_at_import(part.module)
        for statement in module.parts.get(part.name, []):
            targets |= self._of_statement(part.module, statement)
        return {target for target in targets if target.name in self.modules[target.module].parts}

    def target(self, module: str, node: ast.AST, local: Mapping[str, Target] | None = None) -> Target | None:
        """The meaning of a name or a dotted name in a module; None where it is no part of onecard."""
        if isinstance(node, ast.Name):
            return (local or {}).get(node.id) or self._named(module, node.id)
        if isinstance(node, ast.Attribute):
            owner = self.target(module, node.value, local)
            return self._named(owner.module, node.attr) if isinstance(owner, ModuleRef) else None
        return None

    def imported(self, module: str, node: ast.AST) -> dict[str, Target]:
        """The meanings of the names that the import statements inside a node bind."""
        names: dict[str, Target] = {}
        for each in ast.walk(node):
            if isinstance(each, ast.Import | ast.ImportFrom):
                for alias in each.names:
                    single = type(each)(**{**vars(each), "names": [alias]})
                    for name in dotted(single, module):
                        meaning = self._imported_target(name)
                        if meaning:
                            names[alias.asname or alias.name] = meaning
        return names

    def _named(self, module: str, name: str) -> Target | None:
        """The meaning of a name at the top of a module; an `__init__` also holds its submodules."""
        if module not in self.modules:
            return None
        if name in self.modules[module].parts:
            return Part(module, name)
        if module.endswith("__init__"):
            submodule = f"{module.removesuffix('__init__')}{name}"
            if submodule in self.modules:
                return ModuleRef(submodule)
        return self.modules[module].imports.get(name)

    def _imported_target(self, name: str) -> Target | None:
        if not name.startswith("onecard."):
            return None
        place = place_of(name, self.sources)
        if place is None:
            return None
        rest = name.removeprefix("onecard.").removeprefix(place.removesuffix(".__init__")).lstrip(".")
        return Part(place, rest) if rest else ModuleRef(place)

    def _cut(self, name: str, source: str) -> Module:
        tree = ast.parse(source)
        module = Module(tree, {AT_IMPORT: []}, {})
        self._cut_statements(module, tree.body)
        for statement in tree.body:
            if not isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
                module.imports |= self.imported(name, statement)
        return module

    def _cut_statements(self, module: Module, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
                module.parts.setdefault(statement.name, []).append(statement)
            elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                for target in (each for whole in targets for each in ast.walk(whole)):
                    if isinstance(target, ast.Name):
                        module.parts.setdefault(target.id, []).append(statement)
            elif isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test):
                module.parts.setdefault(AS_CHILD, []).extend(statement.body)
            elif not isinstance(statement, ast.Import | ast.ImportFrom):
                module.parts[AT_IMPORT].append(statement)
                for block in ("body", "orelse", "finalbody"):
                    self._cut_statements(module, getattr(statement, block, None) or [])
                for handler in getattr(statement, "handlers", []):
                    self._cut_statements(module, handler.body)

    def _run_at_import(self, name: str) -> set[Part]:
        """The parts called while the module is imported, and the imports of the modules that it imports."""
        module, targets = self.modules[name], set()
        for node in _outside_functions(module.tree):
            if isinstance(node, ast.Call):
                targets |= self._of_statement(name, node)
            targets |= self._imports_of(name, node)
        for statement in module.tree.body:
            for decorator in getattr(statement, "decorator_list", []):  # it may put the function into a table
                owner = decorator.func if isinstance(decorator, ast.Call) else decorator
                if isinstance(self.target(name, owner), Part):
                    targets.add(Part(name, statement.name))
        return targets

    def _imports_of(self, name: str, node: ast.AST) -> set[Part]:
        places = {place_of(each, self.sources) for each in dotted(node, name) if each.startswith("onecard.")}
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        return {Part(place, AT_IMPORT) for place in places if place and is_import}

    def _of_statement(self, name: str, statement: ast.AST) -> set[Part]:
        targets: set[Part] = set()
        local = self.imported(name, statement)
        for node in but_annotations(statement):
            targets |= self._imports_of(name, node)
            if isinstance(node, ast.Name | ast.Attribute):
                meaning = self.target(name, node, local)
                if isinstance(meaning, Part):
                    targets |= self._followed(meaning)
                elif isinstance(node, ast.Name) and node.id == "__name__":
                    targets.add(Part(name, AS_CHILD))
                elif isinstance(node, ast.Name) and node.id == "globals":
                    targets |= {Part(name, each) for each in self.modules[name].parts}
            elif isinstance(node, ast.Constant):
                child = next(iter(dotted(node, name)), None)
                place = place_of(child, self.sources) if child else None
                targets |= self._all_of(place) if place else set()
        return targets | self._whole_modules(name, statement, local)

    def _followed(self, part: Part) -> set[Part]:
        """The part itself, or the imported one where a module only imports it."""
        module = self.modules[part.module]
        if part.name in module.parts:
            return {part}
        further = module.imports.get(part.name)
        return self._followed(further) if isinstance(further, Part) else set()

    def _whole_modules(self, name: str, statement: ast.AST, local: Mapping[str, Target]) -> set[Part]:
        """All parts of a module used as a value or for its name, because any of them may run then."""
        owners = {
            id(node.value)
            for node in ast.walk(statement)
            if isinstance(node, ast.Attribute) and node.attr != "__name__"
        }
        targets: set[Part] = set()
        for node in but_annotations(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and id(node) not in owners:
                meaning = self.target(name, node, local)
                targets |= self._all_of(meaning.module) if isinstance(meaning, ModuleRef) else set()
        return targets

    def _all_of(self, module: str) -> set[Part]:
        """The parts that a module runs as a child process; all of them where it has no such block."""
        parts = self.modules[module].parts
        return {Part(module, name) for name in ([AS_CHILD] if AS_CHILD in parts else parts)}


def _outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run at import: decorators and defaults of functions, but not their bodies."""
    waiting: list[ast.AST] = list(ast.iter_child_nodes(tree))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "__name__" in ast.dump(node.test):
            continue
        if isinstance(node, FUNCTIONS):
            waiting.extend([*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)])
            continue
        yield node
        if not isinstance(node, ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def but_annotations(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those of annotations, which make no object."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns"):
                values = value if isinstance(value, list) else [value]
                waiting.extend(each for each in values if isinstance(each, ast.AST))
