"""Every option that a message of a program names is an option of that program.

tests/support/remedies.py reads this from the source. The planted faults show that it sees each way of putting
a message together and of reaching a function. In the last tests the programs themselves meet bad cases.
"""

import ast
import collections
import importlib
import inspect
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from onecard.config import declaration
from onecard.errors import CHECKPOINT, DISK, UserError
from onecard.system import commands, gpus
from onecard.system import files as system_files
from tests.support import adapters, remedies, tiny
from tests.support.call_graph import CallGraph, Part
from tests.support.remedies import FLAG, commands_in, errors_in, options_of, product, program_modules, wrong
from tests.support.rooms import library

LEAST = {  # the least numbers of errors that programs can raise, so that a sweep that misses them fails
    "finetune": 120,
    "continue": 140,
    "generate": 120,
    "interaction": 150,
    "chat": 115,
    "check-data": 38,
    "download": 55,
    "convert": 65,
    "merge": 90,
    "quantize": 70,
    "export-gguf": 80,
    "perplexity": 100,
    "extend-vocab": 30,
    "prepare-base": 30,
    "keys": 15,
    "serve": 130,
    "json-to-parquet": 20,
}


@pytest.fixture(scope="module")
def results():
    return remedies.sweep(product())


@pytest.mark.parametrize("program", sorted(LEAST))
def test_messages_name_options_that_the_program_has(results, program):
    raised, findings = results[program]
    assert findings == []
    assert len(raised) >= LEAST[program]


def test_every_error_belongs_to_a_program(results):
    """The sweep reaches each place where a UserError is made, and every program is swept."""
    assert LEAST.keys() == program_modules().keys()
    places = {
        place
        for name, module in product().modules.items()
        for part in module.parts
        for place in errors_in(product(), Part(name, part))
    }
    at_the_entry = {
        place for place in places if place[0] == "__main__"
    }  # raised by `onecard` before any program
    assert places - at_the_entry == set().union(*(raised for raised, _ in results.values()))
    written = sum(source.count("UserError(") for source in library().values())
    assert len(places) >= written - 5  # some are the class itself or stand in docstrings


def test_commands_that_messages_name_exist():
    graph = product()
    names = {
        (name, command)
        for name, module in graph.modules.items()
        for part in module.parts
        for node in module.parts[part]
        for command in commands_in(graph, Part(name, part), node)
    }
    assert {name for name, command in names if not command} == {"runs.jobs", "system.commands"}  # passed on
    assert {command for _, command in names if command} <= commands.FILES.keys() == program_modules().keys()
    assert len(names) > 15


@pytest.mark.parametrize("program", sorted(LEAST))
def test_help_names_options_that_the_program_has(program):
    """This includes the reasons why an option has no effect, which refuse_unused prints."""
    options = declaration.declared(remedies.settings(program)).values()
    texts = [option.help[0] for option in options]
    texts += [use.reason[0] for option in options for use in option.only]
    flags = {match[1] for text in texts for match in FLAG.finditer(text)}
    assert flags <= options_of(program)


# planted faults in a small library, whose program has --own; another program, merge, has --report

COMMANDS = "def name(command):\n    return command\n"
ERRORS = "class UserError(Exception):\n    pass\n"
HEAD = "from onecard.errors import UserError\nfrom onecard.system import commands\n"
OPTIONS = {"tool": frozenset({"own", "help"}), "merge": frozenset({"report"})}
CALL = "def main(arguments):\n    low.run(arguments)\n"


def findings(low: str, program: str = CALL) -> list[str]:
    """The flags that the sweep finds in a program that uses a lower module."""
    sources = {
        "__main__": "",
        "errors": ERRORS,
        "system.__init__": "",
        "system.commands": COMMANDS,
        "system.low": HEAD + low,
        "programs.tool": f"import functools\nfrom onecard.system import low\n{program}",
    }
    graph = CallGraph(sources)
    problems = wrong(graph, "tool", graph.reachable({Part("programs.tool", "main")}), OPTIONS)
    return [finding.flag for finding in problems]


MESSAGES = {
    "in the error": 'raise UserError("It is damaged.", "Use --wrong.")',
    "in the problem": 'raise UserError("--wrong 3: too many.")',
    "of another program": 'raise UserError("It is damaged.", "Use --report.")',
    "in an f-string": 'raise UserError(f"--wrong {value}: too many.", f"{value}")',
    "inside an f-string": 'raise UserError(f"Use {value or "--wrong"}.")'.replace('"--wrong"', "'--wrong'"),
    "added": 'raise UserError("It is damaged." + " Use --wrong.")',
    "joined": 'raise UserError("".join(["Use ", "--wrong."]))',
    "in a variable": 'fix = "Use --wrong."\n    raise UserError("It is damaged.", fix)',
    "in a chosen variable": 'fix = "" if value else "Use --wrong."\n    raise UserError("Damaged.", fix)',
    "in a table": 'fixes = {1: "Use --wrong."}\n    raise UserError("It is damaged.", fixes[value])',
    "in an error that is made first": 'error = UserError("It is damaged.", fix="--wrong")\n    raise error',
    "in a note": 'print("Use --wrong the next time.")',
    "after another program and a stop": "raise UserError(f\"Use {commands.name('merge')}. Or --report.\")",
    "of a third program": "raise UserError(f\"{commands.name('merge')} --wrong\")",
    "in parentheses": 'raise UserError("Use the option (--wrong).")',
    "with a value": 'raise UserError("Use --wrong=3.")',
    "in Chinese": 'raise UserError("请改用--wrong选项。")',
    "of pip, in a list that is joined": 'raise UserError(" ".join(["Use", "--quiet."]))',
}


@pytest.mark.parametrize("case", sorted(MESSAGES))
def test_planted_message_is_found(case):
    [flag] = [flag for flag in ("--report", "--quiet", "--wrong") if flag in MESSAGES[case]]
    assert findings(f"def run(value):\n    {MESSAGES[case]}\n") == [flag]


@pytest.mark.parametrize(
    "message",
    ['f"--{value}: too many."', '"--" + value', '"--{}".format(value)', '"--%s" % value', '"--{}: bad"'],
)
def test_names_that_cannot_be_read_are_found(message):
    assert findings(f"def run(value):\n    raise UserError({message})\n") == ["--{...}"]


RAISE = 'raise UserError("It is damaged.", "Use --wrong.")'
REACHED = {
    "by a function": f"def run(x):\n    inner()\ndef inner():\n    {RAISE}\n",
    "by a method": f"class Reader:\n    def read(self):\n        {RAISE}\ndef run(x):\n    Reader().read()\n",
    "by a property": f"class Row:\n    @property\n    def text(self):\n        {RAISE}\n"
    "def run(x):\n    Row().text\n",
    "by a context": f"class Lock:\n    def __enter__(self):\n        {RAISE}\n"
    "def run(x):\n    with Lock():\n        pass\n",
    "by a base class": f"class Base:\n    def read(self):\n        {RAISE}\nclass Row(Base):\n    pass\n"
    "def run(x):\n    Row().read()\n",
    "by an object of the module": f"class Reader:\n    def read(self):\n        {RAISE}\nREADER = Reader()\n"
    "def run(x):\n    READER.read()\n",
    "as a value": f"def inner():\n    {RAISE}\ndef run(x):\n    list(map(inner, x))\n",
    "in a table": f"def inner():\n    {RAISE}\nTABLE = {{1: inner}}\ndef run(x):\n    TABLE[x]()\n",
    "as a decorator": f"def checked(f):\n    {RAISE}\n@checked\ndef run(x):\n    pass\n",
    "in a table by a decorator": f"TABLE = []\ndef kept(f):\n    TABLE.append(f)\n@kept\ndef inner():\n"
    f"    {RAISE}\ndef run(x):\n    TABLE[0]()\n",
    "by globals": f"def inner():\n    {RAISE}\ndef run(x):\n    globals()[x]()\n",
    "as a default": f"def inner():\n    {RAISE}\ndef run(x, read=inner):\n    read()\n",
    "inside a function": f"def run(x):\n    def inner():\n        {RAISE}\n    inner()\n",
    "at import": f"def inner():\n    {RAISE}\nVALUE = inner()\ndef run(x):\n    pass\n",
    "in the body of a class": f"def inner():\n    {RAISE}\nclass Row:\n    value = inner()\n"
    "def run(x):\n    pass\n",
    "by a child process": f'def run(x):\n    start(__name__)\nif __name__ == "__main__":\n    {RAISE}\n',
    "by the name of a child": f'CHILD = "onecard.system.low"\ndef run(x):\n    start(CHILD)\n'
    f'if __name__ == "__main__":\n    {RAISE}\n',
    "by a constant": 'FIX = "Use --wrong."\ndef run(x):\n    raise UserError("It is damaged.", FIX)\n',
    "by a constant in a constant": 'FLAG = "--wrong"\nFIX = f"Use {FLAG}."\n'
    "def run(x):\n    raise UserError(FIX)\n",
    "by an argument of a helper": "def refuse(fix):\n    raise UserError('It is damaged.', fix)\n"
    "def run(x):\n    refuse('Use --wrong.')\n",
    "by a default text": "def run(x, fix='Use --wrong.'):\n    raise UserError('It is damaged.', fix)\n",
}


@pytest.mark.parametrize("case", sorted(REACHED))
def test_planted_way_is_found(case):
    assert findings(REACHED[case]) == ["--wrong"]


@pytest.mark.parametrize(
    "program",
    [
        "def main(arguments):\n    from onecard.system import low\n    low.run(1)\n",
        "def main(arguments):\n    from onecard.system.low import run\n    run(1)\n",
        "from onecard.system.low import run as go\ndef main(arguments):\n    go(1)\n",
        "def main(arguments):\n    do(functools.partial(low.run, 1))\n",
        "def main(arguments):\n    do(lambda: low.run(1))\n",
        "def main(arguments):\n    getattr(low, 'run')()\n",
        "class Work:\n    def do(self):\n        low.run(1)\ndef main(arguments):\n    Work().do()\n",
        "import onecard.system.low as below\ndef main(arguments):\n    below.run(1)\n",
    ],
)
def test_planted_way_of_a_program_is_found(program):
    assert findings(f"def run(value):\n    {RAISE}\n", program) == ["--wrong"]


@pytest.mark.parametrize(
    "low",
    [
        'def run(x):\n    raise UserError("It is damaged.", "Use --own, or see --help.")\n',
        "def run(x):\n    raise UserError(f\"{commands.name('merge')} {x} --report\")\n",
        "def run(x):\n    go = commands.name('merge')\n    raise UserError(f'Use {go} --report')\n",
        "GO = commands.name('merge')\ndef run(x):\n    raise UserError(f'Use {GO} --report')\n",
        f"def run(x):\n    pass\ndef inner():\n    {RAISE}\n",
        f"class Row:\n    def text(self):\n        {RAISE}\ndef run(x: Row) -> Row:\n    pass\n",
        'def run(x):\n    """Read what --wrong names."""\n',
        'def run(x):\n    start(["nvidia-smi", "--query-gpu=name"])\n',
        'def run(x):\n    return "--".join(x.split("--"))\n',
        'STYLE = "a { color: var(--wrong); }"\ndef run(x):\n    return STYLE\n',
    ],
)
def test_right_text_is_let_through(low):
    assert findings(low) == []


PLANTED = {  # functions of lower rooms -> programs that reach them
    ("system.files", "read_json"): {"merge", "export-gguf", "finetune"},
    ("system.hardware", "choose_device"): {"merge", "quantize", "chat", "finetune"},
    ("inference.gguf_check", "unusable"): {"export-gguf", "perplexity", "chat"},
    ("data.template", "load"): {"perplexity", "merge", "check-data"},
    ("config.options", "parse"): {"merge", "quantize", "export-gguf"},
    ("conversion.gguf", "check_adapter"): {"export-gguf", "perplexity", "interaction"},
}


def test_fault_planted_in_the_product_is_found():
    """A planted option that no program has is found in functions that several programs call."""
    sources = dict(library())
    for number, (module, function) in enumerate(PLANTED):
        source = sources[module]
        [node] = [each for each in ast.parse(source).body if getattr(each, "name", "") == function]
        lines = source.splitlines(keepends=True)
        lines.insert(node.body[0].lineno - 1, f'    print("Use --wrong-{number}.")\n')
        sources[module] = "".join(lines)
    graph = CallGraph(sources)
    options = {program: options_of(program) for program in program_modules()}
    programs_of_flag: dict[str, set[str]] = {}
    for program in sorted(set().union(*PLANTED.values())):
        for finding in wrong(graph, program, graph.reachable(remedies.start_of(program)), options):
            programs_of_flag.setdefault(finding.flag, set()).add(program)
    for number, programs in enumerate(PLANTED.values()):
        assert programs <= programs_of_flag[f"--wrong-{number}"]
    assert programs_of_flag.keys() == {f"--wrong-{number}" for number in range(len(PLANTED))}


# the programs themselves in bad cases


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base model, an adapter for it, rows and a text."""
    folder = tmp_path_factory.mktemp("remedies")
    base = tiny.save_model(folder / "base")
    adapters.save_adapter(base, folder / "adapter")
    tiny.save_rows(folder / "rows.json", 8)
    (folder / "text.txt").write_text("The red and the blue are warm. " * 20, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["onecard"])


ARGUMENTS = {  # the arguments of each program in the folder of `place`
    "finetune": "--model_path base --data_path rows.json --output_path new --device cpu --max_steps 1",
    "merge": "--model_path base --lora_path adapter --output_path new",
    "export-gguf": "--model_path base --lora_path adapter --output_path new",
    "generate": "--model_path base --lora_path adapter --terminal --device cpu",
    "chat": "--model_path base --lora_path adapter",
    "perplexity": "text.txt --model_path base --lora_path adapter --device cpu",
    "quantize": "--model_path base --data_path rows.json --output_path new --method bnb --device cpu",
    "prepare-base": "--model_path base --output_path new",
    "convert": "--input_dir base --output_dir new --to meta",
}


def refusal(program: str, more: str = "") -> tuple[UserError, set[Part]]:
    """The error of a program in the current folder, and the parts of onecard/ that ran."""
    if program == "chat":
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra of its own")
    module = importlib.import_module(f"onecard.{program_modules()[program]}")
    ran: set[Part] = set()

    def note(frame: types.FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        is_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED  # not the body of a class or module
        if event == "call" and is_function and path.is_relative_to(system_files.PACKAGE):
            name = ".".join(path.relative_to(system_files.PACKAGE).with_suffix("").parts)
            ran.add(Part(name, frame.f_code.co_qualname.partition(".")[0]))

    sys.setprofile(note)
    try:
        with pytest.raises(UserError) as caught:
            module.main(f"{ARGUMENTS[program]} {more}".split())
    finally:
        sys.setprofile(None)
    return caught.value, {part for part in ran if part.name in product().modules[part.module].parts}


def check(program: str, more: str = "") -> UserError:
    """The error of a program, after a check that it names only its options and the sweep saw all that ran."""
    error, ran = refusal(program, more)
    assert {match[1] for match in FLAG.finditer(str(error))} <= options_of(program), str(error)
    assert error.fix, str(error)
    missed = ran - product().reachable(remedies.start_of(program))
    assert missed == set()
    return error


@pytest.fixture
def here(place, tmp_path, monkeypatch) -> Path:
    """A copy of `place` as the current folder."""
    folder = Path(shutil.copytree(place, tmp_path / "here"))
    monkeypatch.chdir(folder)
    return folder


WITH_ADAPTER = [program for program, line in ARGUMENTS.items() if "--lora_path" in line]


@pytest.mark.parametrize("program", sorted(ARGUMENTS))
def test_damaged_base_model(here, program):
    (here / "base" / "config.json").write_text('{"model_type": ', encoding="utf-8")
    error = check(program)
    assert error.code == CHECKPOINT
    assert "config.json" in str(error)
    assert "--overwrite" not in str(error)


@pytest.mark.parametrize("program", [*WITH_ADAPTER, "finetune"])
def test_damaged_adapter(here, program):
    (here / "adapter" / "adapter_config.json").write_text("{", encoding="utf-8")
    error = check(program, "--lora_path adapter" if program == "finetune" else "")
    assert error.code == CHECKPOINT
    assert "adapter_config.json" in str(error)


@pytest.mark.parametrize("program", ["finetune", "merge", "quantize", "export-gguf"])
def test_full_disk(here, program, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")(100, 100, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    error = check(program)
    assert error.code == DISK
    assert "free: 0 MiB" in str(error)


@pytest.mark.parametrize("program", ["finetune", "quantize", "generate", "perplexity"])
def test_no_gpu(here, program, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = check(program, "--device cuda")
    assert "There is no device cuda" in str(error)
    assert "--device cpu" in str(error)


def test_report_of_merge_without_its_gpu(here, monkeypatch):
    """merge has no --device, so its message advises to leave the report out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpus, "problem", lambda: "Update the driver.")
    error = check("merge", "--report --data_path rows.json")
    assert error.fix == "Update the driver. Or leave --report out."


def test_damaged_run(here):
    """The finetune_config.json in the output folder of a new run is damaged."""
    (here / "new").mkdir()
    (here / "new" / "finetune_config.json").write_text("{", encoding="utf-8")
    error = check("finetune")
    assert error.code == CHECKPOINT
    assert "--overwrite" in error.fix
