"""S1 to S4: pickles that would run code are refused wherever OneCard could meet one.

None of their code runs. Payloads are written opcode by opcode, so that each can name what Python itself would
not pickle.
"""

import functools
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from onecard.data import pickled_rows, reader
from onecard.errors import CHECKPOINT, DATA, UNSAFE, UserError
from onecard.models import base_model
from onecard.models import tokenizer as models_tokenizer
from onecard.runs import adapters as runs_adapters
from onecard.runs import legacy
from onecard.system import sandbox
from tests.support import hostile_files

CANARY = "CANARY"  # it stands for the path at which a payload makes a file


class Call:
    """A call in a pickle, either of a global (module, name) or of the result of another call."""

    def __init__(self, what, *args):
        self.what, self.args = what, args


def code(value) -> bytes:
    """Opcodes that leave a value on the stack (protocol 4's, understood by any reader since)."""
    if isinstance(value, Call):
        called = value.what if isinstance(value.what, Call) else Global(value.what)
        return code(called) + code(value.args) + b"R"
    if isinstance(value, Global):
        return f"c{value.name.rpartition('.')[0]}\n{value.name.rpartition('.')[2]}\n".encode()
    if isinstance(value, tuple | list):
        return b"(" + b"".join(map(code, value)) + (b"t" if isinstance(value, tuple) else b"l")
    if isinstance(value, dict):
        return b"(" + b"".join(code(key) + code(inner) for key, inner in value.items()) + b"d"
    return pickle.dumps(value, 0)[:-1]  # texts and numbers, without the STOP opcode


class Global:
    def __init__(self, name: str):
        self.name = name


PYTHON, SHELL = f"open({CANARY!r}, 'w').close()", f"touch {CANARY}"
OS = Call("importlib.import_module", "os")
PAYLOADS = {  # called function: its arguments
    name: Call(name, *args)
    for name, args in {
        "os.system": (SHELL,),
        "posix.system": (SHELL,),
        "os.popen": (SHELL,),
        "os.mkdir": (CANARY,),
        "os.symlink": ("/dev/null", CANARY),
        "os.spawnlp": (0, "touch", "touch", CANARY),
        "os.posix_spawnp": ("touch", ["touch", CANARY], {}),
        "posix.mkfifo": (CANARY,),
        "builtins.eval": (PYTHON,),
        "builtins.exec": (PYTHON,),
        "__builtin__.eval": (PYTHON,),
        "__builtin__.open": (CANARY, "w"),
        "builtins.open": (CANARY, "w"),
        "io.open": (CANARY, "w"),
        "codecs.open": (CANARY, "w"),
        "io.FileIO": (CANARY, "w"),
        "subprocess.call": (["touch", CANARY],),
        "subprocess.run": (["touch", CANARY],),
        "subprocess.Popen": (["touch", CANARY],),
        "subprocess.check_call": (["touch", CANARY],),
        "subprocess.check_output": (["touch", CANARY],),
        "subprocess.getoutput": (SHELL,),
        "subprocess.getstatusoutput": (SHELL,),
        "commands.getoutput": (SHELL,),  # its name in Python 2
        "pty.spawn": (["touch", CANARY],),
        "timeit.timeit": (PYTHON, "pass", Global("timeit.default_timer"), 1),
        "cProfile.run": (PYTHON, "/dev/null"),
        "profile.run": (PYTHON, "/dev/null"),
        "runpy._run_code": (Call("builtins.compile", PYTHON, "x", "exec"), {}),
        "pip._internal.main": (
            ["--disable-pip-version-check", "--log", CANARY, "list", "--path", "/nowhere"],
        ),
        "logging.FileHandler": (CANARY,),
        "tarfile.open": (CANARY, "w"),
        "zipfile.ZipFile": (CANARY, "w"),
        "sqlite3.connect": (CANARY + ".db",),
        "shutil.copy": ("/etc/hostname", CANARY),
        "numpy.testing._private.utils.runstring": (PYTHON, {}),
        "torch.utils.collect_env.run": (SHELL,),
        "torch.jit.unsupported_tensor_ops.execWrapper": (PYTHON, {}, {}),
        "torch.hub.load": (CANARY + "-hub", "canary", "local"),
        "torch.save": ({}, CANARY),
        "doctest.debug_script": (PYTHON,),
    }.items()
} | {
    "getattr of a module": Call(Call("builtins.getattr", OS, "system"), SHELL),
    "attrgetter": Call(Call(Call("operator.attrgetter", "system"), OS), SHELL),
    "methodcaller": Call(Call("operator.methodcaller", "system", SHELL), OS),
    "resolve_name": Call(Call("pkgutil.resolve_name", "os:system"), SHELL),
    "pydoc.locate": Call(Call("pydoc.locate", "os.system"), SHELL),
    "partial": Call(Call("functools.partial", Global("os.system"), SHELL)),
    "map": Call("builtins.list", Call("builtins.map", Global("os.system"), [SHELL])),
    "a path's method": Call(
        Call("builtins.getattr", Call("pathlib.Path", CANARY), "touch"),
    ),
    "ctypes": Call(Call("builtins.getattr", Call("ctypes.CDLL", None), "mkdir"), CANARY.encode(), 0o777),
    "rebuilt tensor": Call(
        "torch._utils._rebuild_tensor_v2", Call("os.system", SHELL), 0, (1,), (1,), False, None
    ),
    "in an OrderedDict": Call("collections.OrderedDict", [["a", Call("os.system", SHELL)]]),
}
OPCODES = {  # other ways than REDUCE
    "INST": b"(" + code(SHELL) + b"ios\nsystem\n.",
    "OBJ": b"(" + code(Global("os.system")) + code(SHELL) + b"o.",
    "NEWOBJ": b"\x80\x02"
    + code(Global("io.FileIO"))
    + code((CANARY, "w"))
    + b"\x81"
    + code((CANARY, "w"))
    + b"R.",
    "NEWOBJ_EX": b"\x80\x04" + code(Global("logging.FileHandler")) + code((CANARY,)) + code({}) + b"\x92.",
    "STACK_GLOBAL": b"\x80\x04" + code("os") + code("system") + b"\x93" + code((SHELL,)) + b"R.",
    "BUILD": code(Call("copyreg.__newobj__", Global("functools.partial"), Global("os.system")))
    + code((Global("os.system"), (SHELL,), {}, {}))
    + b"b"
    + code(())
    + b"R.",
    "behind a list": code([1, "a"]) + b"0" + code(PAYLOADS["os.system"]) + b".",
}


def every() -> dict[str, bytes]:
    return {name: code(value) + b"." for name, value in PAYLOADS.items()} | OPCODES


def aimed(data: bytes, canary: Path) -> bytes:
    return data.replace(CANARY.encode(), str(canary).encode())


class Touch:
    """An object that Python itself pickles, in any protocol."""

    def __init__(self, command: str):
        self.command = command

    def __reduce_ex__(self, protocol: int):
        return (os.system, (self.command,))


def zipped(data: bytes, **odd) -> bytes:
    """torch's zip format around a pickle; odd: a wrong checksum, an encryption flag, or another name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in (("data.pkl", data), ("version", b"3\n"), ("byteorder", b"little")):
            file.writestr(f"{odd.get('folder', 'archive')}/{name}", content)
    raw = bytearray(buffer.getvalue())
    if odd.get("checksum"):
        for mark, at in ((b"PK\3\4", 14), (b"PK\1\2", 16)):
            raw[raw.index(mark) + at] ^= 0xFF
    if odd.get("flag"):
        raw[raw.index(b"PK\1\2") + 8] |= 1
    if odd.get("name"):  # the directory has another name than the entry
        raw[raw.index(b"data.pkl")] = ord("x")
    return bytes(raw)


def old_torch(data: bytes) -> bytes:
    """torch's format before 1.6: several pickles one after the other."""
    numbers = (
        0x1950A86A20F9469CFC6C,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {}},
    )
    return b"".join(pickle.dumps(number, 2) for number in numbers) + data


def tarred(data: bytes) -> bytes:
    """torch's first format: a tar archive of pickles (CVE-2025-32434)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


SHAPES: dict[str, Callable[[bytes], bytes]] = {
    "pickle": bytes,
    "behind a harmless one": lambda data: pickle.dumps({}) + data,
    "zip": zipped,
    "zip with a wrong checksum": functools.partial(zipped, checksum=True),
    "zip with a flag": functools.partial(zipped, flag=True),
    "zip with two names": functools.partial(zipped, name=True),
    "zip with another folder": functools.partial(zipped, folder="x/../y"),
    "old torch": old_torch,
    "tar": tarred,
}


def test_payloads_sing_where_nobody_is_careful(tmp_path):
    """A plain unpickler runs at least 40 of the payloads, so they are real."""
    files = []
    for number, (_, data) in enumerate(sorted(every().items())):
        (tmp_path / f"{number}.pkl").write_bytes(aimed(data, tmp_path / f"sang-{number}"))
        files.append(str(tmp_path / f"{number}.pkl"))
    script = """
import os, pickle, sys
for path in sys.argv[1:]:
    pid = os.fork()
    if not pid:
        try:
            pickle.load(open(path, "rb"))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
"""
    subprocess.run(
        [sys.executable, "-c", script, *files], cwd=tmp_path, capture_output=True, check=True, timeout=120
    )
    sang = {path.name.split("-")[1].split(".")[0] for path in tmp_path.glob("sang-*")}
    mute = [name for number, name in enumerate(sorted(every())) if str(number) not in sang]
    assert len(sang) >= 40, mute


def test_none_sings_here(tmp_path):
    """Both children refuse all payloads in all protocols and shapes, and no canary is written."""
    (tmp_path / "nest").mkdir()
    canary, path = tmp_path / "nest" / "canary", tmp_path / "x"
    cells = [(shape, data) for data in every().values() for shape in SHAPES]
    plain = [pickle.dumps([1, Touch(SHELL)], protocol) for protocol in range(6)]
    cells += [(shape, data) for data in plain[:4] for shape in SHAPES]
    readers = (legacy._child, pickled_rows._child)

    def write(number: int) -> None:
        shape, data = cells[number % len(cells)]
        path.write_bytes(SHAPES[shape](aimed(data, canary)))

    def read(number: int) -> None:
        result = readers[number // len(cells)](str(path), str(tmp_path / "out"))
        if canary.exists() or any(canary.parent.iterdir()):
            os._exit(1)  # the survey counts this as a crash
        if result in (UNSAFE, CHECKPOINT, DATA):
            raise UserError("refused", code=result)

    outcomes = hostile_files.survey(len(cells) * len(readers), write, read, {})
    kinds = set(outcomes.values())
    behind = {n for n, (shape, _) in enumerate(cells) if shape == "behind a harmless one"}
    loaded = {n % len(cells) for n, outcome in outcomes.items() if outcome == "loaded"}
    assert kinds <= {"refused", "loaded"}, kinds
    assert loaded <= behind  # only the first pickle of these is read
    assert len(outcomes) >= 40 * len(SHAPES) * 2
    assert not any(canary.parent.iterdir())


@pytest.mark.parametrize("name", ["os.system", "getattr of a module", "rebuilt tensor", "STACK_GLOBAL"])
@pytest.mark.parametrize("ending", [".pkl", "adapter_model.bin", "pytorch_model.bin"])
def test_the_whole_way(tmp_path, name, ending):
    """A file that a user names gives exit code 8 with its path, and no canary is written."""
    data, canary = aimed(every()[name], tmp_path / "canary"), tmp_path / "canary"
    (tmp_path / "old").mkdir()
    path = tmp_path / "old" / (ending if ending[0] != "." else f"rows{ending}")
    path.write_bytes(data if ending == ".pkl" else zipped(data))

    def read() -> None:
        if ending == ".pkl":
            list(reader.read_rows(path))
        else:
            runs_adapters.find(str(path.parent), "x", "best", tmp_path)

    with pytest.raises(UserError, match="would run code") as caught:
        read()
    assert caught.value.code == UNSAFE
    assert not canary.exists()


def test_a_base_in_pickles_is_refused(tiny_model, tmp_path):
    """Exit code 8 comes before anything is opened, and the message says what to do."""
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    canary = tmp_path / "canary"
    (tmp_path / "pytorch_model.bin").write_bytes(zipped(aimed(every()["os.system"], canary)))
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*safetensors") as caught:
        base_model.load_base(str(tmp_path), 16, "fp32", "cpu")
    assert caught.value.code == UNSAFE
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["rng_state.pth", "scheduler.pt", "training_args.bin", "model.ckpt", "rows.npz"]
)
def test_other_pickles_are_never_opened(tmp_path, name, tiny_model):
    """The folder of a model may hold other pickles, which nobody reads."""
    canary = tmp_path / "canary"
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(aimed(every()["os.system"], canary))
    base_model.load_base(str(tmp_path), 16, "fp32", "cpu")
    models_tokenizer.load_tokenizer(str(tmp_path))
    assert not canary.exists()


def test_an_older_torch_reads_no_pickles(monkeypatch, tmp_path):
    """CVE-2026-24747: below torch 2.10 weights_only is not safe.

    The message gives the reason, and no child is started.
    """
    for version in ("2.9.1+cu126", "1.13.0", "nightly"):
        with pytest.raises(UserError, match="CVE-2026-24747") as caught:
            legacy.check_torch(version, tmp_path)
        assert caught.value.code == UNSAFE
    for version in ("2.10.0", "2.13.0+cpu", "3.0.0"):
        legacy.check_torch(version, tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    monkeypatch.setattr(torch, "__version__", "2.9.0")
    monkeypatch.setattr(sandbox, "convert", lambda *_, **__: pytest.fail("a child was started"))
    with pytest.raises(UserError, match=r"torch 2\.9\.0"):
        legacy.read(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {5: torch.ones(2)},
        {"a.lora_A.weight": torch.tensor(1.0)},
        {"a.lora_A.weight": torch.ones(1).expand(1 << 40)},
        {"a.lora_A.weight": [[]] * 5, "b": {1: {2: 3}}},
        [],
        7,
    ],
)
def test_harmless_nonsense_is_refused_too(tmp_path, values):
    """Exit code 4 for wrong names, a tensor without shape, one larger than any memory, and other objects."""
    torch.save(values, tmp_path / "adapter_model.bin")
    torch.save({"state": {"a": 1}}, tmp_path / "optimizer.pt")
    with pytest.raises(UserError) as caught:
        legacy.read(tmp_path)
    assert caught.value.code == CHECKPOINT


def test_an_older_checkpoint_with_odd_states(tmp_path):
    """States that cannot be used are left out, and the weights are used."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    torch.save({name.format(s): torch.ones(2, 2) for s in "AB"}, tmp_path / "adapter_model.bin")
    torch.save({"state": {"a": 1, 2: {}}}, tmp_path / "optimizer.pt")
    torch.save({"scale": "large"}, tmp_path / "scaler.pt")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": [2]}))
    state = legacy.read(tmp_path)
    assert (state.optimizer, state.scale, state.rank) == (None, None, 2)
