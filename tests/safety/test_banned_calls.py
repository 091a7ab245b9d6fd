"""No call that could run a stranger's code is in the source, except those in a short reviewed list.

The source is read with `ast`; names are followed through imports, assignments and getattr. Tests are left
out, because they plant faults.
"""

import ast

import pytest

from tests.support.paths import ROOT

PLACES = ("*.py", "onecard/**/*.py", "serve/**/*.py", "tools/**/*.py", "benchmarks/**/*.py", "sample/**/*.py")
REVIEWED = {  # (file, call): why it is safe
    (
        "onecard/__main__.py",
        "importlib.import_module of a name that is no constant",
    ): "a file of onecard/programs/, by the table of sub-commands",
    ("onecard/data/pickled_rows.py", "pickle.Unpickler"): "a child's, which looks up no name at all",
    (
        "onecard/hub/remote_code.py",
        "trust_remote_code other than False",
    ): "its commit was typed and is verified",
    (
        "onecard/conversion/llama_cpp_converter.py",
        "runpy.run_path",
    ): "llama.cpp's own converter, in a child without network",
}
NEVER = {  # these may not even be mentioned
    *(f"pickle.{name}" for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads")),
    *(f"builtins.{name}" for name in ("eval", "exec", "compile")),
    *(f"os.{name}" for name in ("system", "popen")),
    *(f"yaml.{name}" for name in ("load", "load_all", "unsafe_load", "full_load", "Loader", "UnsafeLoader")),
    *(f"runpy.{name}" for name in ("run_path", "run_module", "_run_code")),
    *(f"torch.{name}" for name in ("hub.load", "jit.load", "package.PackageImporter", "serialization.load")),
    *(f"importlib.{name}" for name in ("machinery.SourceFileLoader", "util.spec_from_file_location")),
    *(f"subprocess.{name}" for name in ("getoutput", "getstatusoutput")),
    "tempfile.mktemp",
    "pandas.read_pickle",
    "shutil.unpack_archive",
    "ssl._create_unverified_context",
}
# nothing of these may be used
MODULES = ("marshal", "shelve", "dill", "cloudpickle", "joblib", "_pickle", "imp")
SAFE_VALUE = {  # the only values that these keywords and dictionary keys may have
    "trust_remote_code": False,
    "shell": False,
    "allow_pickle": False,
    "verify": True,
    "weights_only": True,
}
FROM_HUB = ("from_pretrained", "from_config")  # of transformers' Auto classes
BUILTINS = ("eval", "exec", "compile", "getattr", "__import__")


class Gate(ast.NodeVisitor):
    """The unsafe calls of one file, as strings."""

    def __init__(self, tree: ast.Module):
        self.found: list[str] = []
        self.called: set[int] = set()  # attributes that are called at once
        self.names = {name: f"builtins.{name}" for name in BUILTINS}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.asname or alias.name.split(".")[0]
                    self.names[name] = alias.name if alias.asname else name
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    self.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in ast.walk(tree):  # assignments that give a second name to a known function
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                meant = self.meant(node.value)
                if meant and (meant in NEVER or "." not in meant or meant == "torch.load"):
                    self.names[node.targets[0].id] = meant
        self.visit(tree)

    def meant(self, node: ast.AST) -> str:
        """The dotted name of an expression, or "" if it has none."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, "")
        if isinstance(node, ast.Attribute):
            inside = self.meant(node.value)
            return f"{inside}.{node.attr}" if inside else ""
        if isinstance(node, ast.Call):
            called, arguments = self.meant(node.func), [self.constant(arg) for arg in node.args]
            if called == "builtins.getattr" and len(arguments) > 1 and isinstance(arguments[1], str):
                inside = self.meant(node.args[0])
                return f"{inside}.{arguments[1]}" if inside else ""
            if called in ("importlib.import_module", "builtins.__import__") and arguments and arguments[0]:
                return arguments[0]
        return ""

    def constant(self, node: ast.AST) -> object:
        return node.value if isinstance(node, ast.Constant) else None

    def mention(self, node: ast.AST) -> None:
        meant = self.meant(node)
        if meant in NEVER or meant.split(".")[0] in MODULES:
            self.found.append(meant)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").split(".")[0] in MODULES:
            self.found.append(node.module)
        self.found += [f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in NEVER]
        self.found += [f"{node.module}.*" for a in node.names if a.name == "*"]

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.mention(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.mention(node)
        is_auto = self.meant(node.value).startswith("transformers.Auto")
        if node.attr in FROM_HUB and is_auto and id(node) not in self.called:
            self.found.append(f"{node.attr} is passed on")
        if node.attr == "__builtins__":
            self.found.append("__builtins__")
        if self.meant(node) not in NEVER:
            self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            self.value(self.constant(key) if key else None, value)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.ctx, ast.Store) and self.constant(node.slice) in SAFE_VALUE:
            self.found.append(f"{self.constant(node.slice)} is set")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = self.meant(node.func)
        self.called.add(id(node.func))
        arguments = {keyword.arg: keyword.value for keyword in node.keywords}
        for name, value in arguments.items():
            self.value(name, value)
        if called == "builtins.getattr":
            owner, name = self.meant(node.args[0]), self.constant(node.args[1])
            if name is None and owner in ("torch", "pickle", "os", "numpy", "yaml", "builtins"):
                self.found.append(f"getattr({owner}, ...)")
            self.mention(node)
        if called in ("builtins.__import__", "importlib.import_module") and not self.meant(node):
            self.found.append(f"{called} of a name that is no constant")
        if called == "torch.load" and "weights_only" not in arguments:
            self.found.append("torch.load without weights_only=True")
        if called in ("numpy.load", "numpy.lib.npyio.NpzFile") and len(node.args) > 2:
            self.found.append("numpy.load with allow_pickle by its place")
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if method in ("extract", "extractall") and self.constant(arguments.get("filter")) != "data":
            self.found.append(f'{method} without filter="data"')
        owner = self.meant(node.func.value) if method in FROM_HUB else ""
        if owner.startswith("transformers.Auto") and "trust_remote_code" not in arguments:
            self.found.append(f"{owner}.{method} without trust_remote_code=False")
        self.generic_visit(node)

    def value(self, name: object, value: ast.AST) -> None:
        if name in SAFE_VALUE and not (isinstance(value, ast.Constant) and value.value is SAFE_VALUE[name]):
            self.found.append(f"{name} other than {SAFE_VALUE[name]}")


def findings(source: str) -> list[str]:
    return Gate(ast.parse(source)).found


def tree() -> dict[str, str]:
    paths = {path for place in PLACES for path in ROOT.glob(place)}
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(paths)}


def test_the_tree_has_no_unsafe_call():
    sources = tree()
    assert {"finetune.py", "onecard/runs/legacy.py", "tools/check_data.py", "benchmarks/rows.py"} <= set(
        sources
    )
    calls = {(path, call) for path, source in sources.items() for call in findings(source)}
    assert calls == set(REVIEWED)  # a call that was removed leaves the list


UNSAFE = [
    "import pickle\npickle.load(file)",
    "import pickle\npickle.loads(data)",
    "import pickle as p\np.loads(data)",
    "from pickle import loads as x\nx(data)",
    "from pickle import Unpickler\nclass Mine(Unpickler): pass",
    "import pickle\nload = pickle.loads\nload(data)",
    "import pickle\nreaders = {'.pkl': pickle.load}",
    "import pickle\ngetattr(pickle, 'loads')(data)",
    "import pickle\ngetattr(pickle, name)(data)",
    "import pickle as p\nq = p\nq.loads(data)",
    "import importlib\nimportlib.import_module('pickle').loads(data)",
    "__import__('pickle').loads(data)",
    "from pickle import *",
    "import _pickle",
    "import torch\ntorch.load(path)",
    "import torch\ntorch.load(path, weights_only=False)",
    "import torch\ntorch.load(path, weights_only=flag)",
    "import torch\nload = torch.load\nload(path)",
    "from torch import load\nload(path)",
    "import torch\ngetattr(torch, 'load')(path)",
    "import torch\ntorch.hub.load('a/b', 'c')",
    "import torch\ntorch.jit.load(path)",
    "import torch\ntry:\n    torch.load(path, weights_only=True)\nexcept Exception:\n"
    "    torch.load(path, weights_only=False)",
    "import torch\nsettings = {'weights_only': False}\ntorch.load(path, **settings)",
    "import numpy as np\nnp.load(path, allow_pickle=True)",
    "import numpy as np\nnp.load(path, None, True)",
    "import pandas\npandas.read_pickle(path)",
    "import joblib\njoblib.load(path)",
    "import dill",
    "import marshal\nmarshal.loads(data)",
    "import shelve",
    "eval(text)",
    "exec(text)",
    "compile(text, 'x', 'exec')",
    "run = eval\nrun(text)",
    "import builtins\nbuiltins.exec(text)",
    "import yaml\nyaml.load(text)",
    "from yaml import unsafe_load\nunsafe_load(text)",
    "import subprocess\nsubprocess.run(text, shell=True)",
    "import subprocess\nsubprocess.run(text, shell=asked)",
    "import subprocess\nsubprocess.getoutput(text)",
    "import os\nos.system(text)",
    "from os import popen as p\np(text)",
    "from transformers import AutoModelForCausalLM as M\nM.from_pretrained(path)",
    "from transformers import AutoModelForCausalLM as M\nM.from_pretrained(path, trust_remote_code=True)",
    "from transformers import AutoConfig\nAutoConfig.from_pretrained(path, trust_remote_code=options.trust)",
    "from transformers import AutoConfig\nload = AutoConfig.from_pretrained",
    "settings = {'trust_remote_code': True}",
    "settings['trust_remote_code'] = True",
    "archive.extractall(folder)",
    "archive.extract(member, folder)",
    "archive.extractall(folder, filter='fully_trusted')",
    "import shutil\nshutil.unpack_archive(path)",
    "import runpy\nrunpy.run_path(path)",
    "import importlib.util\nimportlib.util.spec_from_file_location('x', path)",
    "from importlib.machinery import SourceFileLoader",
    "__import__(name)",
    "import importlib\nimportlib.import_module(name)",
    "import tempfile\ntempfile.mktemp()",
    "import requests\nrequests.get(url, verify=False)",
    "import ssl\nssl._create_unverified_context()",
]
SAFE = [
    "import torch\ntorch.load(path, weights_only=True)",
    "import numpy as np\nnp.load(path, allow_pickle=False)\nnp.load(path)",
    "import re\nre.compile('x')",
    "import torch\nmodel.eval()\ntorch.compile(model)",
    "import yaml\nyaml.safe_load(text)",
    "import subprocess\nsubprocess.run(['ls'])",
    "from transformers import AutoConfig\nAutoConfig.from_pretrained(path, trust_remote_code=False)",
    "archive.extract(member, folder, filter='data')",
    "import importlib\nimportlib.import_module('llama_cpp.llama_cpp')",
    "import pickle\nraise pickle.UnpicklingError('x')",
    "getattr(options, name)",
    "__import__('json').loads(text)",
]


@pytest.mark.parametrize("source", UNSAFE)
def test_a_planted_call_is_found(source):
    assert findings(source)


@pytest.mark.parametrize("source", SAFE)
def test_a_safe_one_is_let_through(source):
    assert findings(source) == []
