"""S6, S7, S14: Python files of model folders are not run, and templates of models are confined.

OneCard also asks nothing of the network by itself.
"""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from onecard.data import jinja_sandbox
from onecard.data import template as data_template
from onecard.errors import UNSAFE, UserError
from onecard.models import base_model
from onecard.models import tokenizer as models_tokenizer
from tests.support import hostile_files, meta_llama_reference, tiny
from tests.support.paths import ROOT

CODE = """
from pathlib import Path
Path(__file__).with_name("canary").write_text("imported")
from transformers import LlamaConfig, LlamaForCausalLM
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddModel(LlamaForCausalLM):
    pass
class OddTokenizer:
    pass
"""
AUTO = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddModel"}


def with_code(base: Path, folder: Path, kind: str) -> Path:
    """A model folder with Python files that its configuration asks for."""
    shutil.copytree(base, folder)
    for name in ("modeling_odd.py", "tokenizer.py", "configuration_odd.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = AUTO
    settings["auto_map"] = {"AutoTokenizer": ["tokenizer.OddTokenizer", None]}
    if kind == "unknown":
        config["model_type"], settings["tokenizer_class"] = "odd", "OddTokenizer"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_code_of_a_folder_is_never_imported(tiny_model, tmp_path):
    """Exit code 8 with the file's name; transformers does not ask its own question, so `y` has no effect."""
    folder = with_code(tiny_model, tmp_path / "model", "unknown")
    script = "import sys; from onecard import errors; from onecard.models import base_model\n"
    script += "errors.run_program(lambda: base_model.load_config(sys.argv[1]))"
    ended = subprocess.run(
        [sys.executable, "-c", script, folder],
        input="y\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == UNSAFE, ended.stderr
    assert "modeling_odd" in ended.stderr
    assert "[y/N]" not in ended.stdout + ended.stderr
    assert not list(tmp_path.rglob("canary"))


def test_a_known_kind_with_code_is_loaded_without_it(tiny_model, tmp_path):
    """transformers' own class reads the folder, and none of the folder's code is imported."""
    folder = with_code(tiny_model, tmp_path / "model", "known")
    config = base_model.load_config(str(folder))
    model = base_model.load_base(str(folder), 16, "fp32", "cpu", config)
    base_model.skeleton(str(folder), config)
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    models_tokenizer.load_tokenizer(str(folder))
    assert not list(tmp_path.rglob("canary"))
    assert not any("modeling_odd" in name for name in sys.modules)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"])
def test_weights_that_are_missing_are_not_made_up(tiny_model, tmp_path, name):
    """transformers would fill them with random numbers."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name + "x"] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"1 of its weights are missing, {name}"):
        base_model.load_base(str(folder), 16, "fp32", "cpu")


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self.__init__.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ joiner.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ namespace.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ raise_exception.__globals__['__builtins__']['eval']('1') }}",
    "{{ ('{0.__class__.__init__.__globals__[os]}').format(cycler) }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ (messages|attr('__class__'))|attr('__mro__') }}",
    "{{ messages.append('x') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "{% set x = strftime_now.__globals__ %}{{ x['datetime'] }}",
]
BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 100000000 }}",
    "{{ 'x' * 100000000000 }}",
    "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ range(100000000000) }}",
    "{{ ('%1000000000000d' % 1) }}",
    "{{ 'x'.center(10000000000) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
]


def rendered(texts: list[str], folder: Path) -> tuple[dict[int, str], list[str | None]]:
    """Outcome and text of each template, from the child's own function in forked processes."""
    source, tokenizer = folder / "asked.json", tiny.tokenizer()
    request = {
        "tokens": tokenizer.special_tokens_map,
        "conversations": [[[{"role": "user", "content": "red"}], True]],
    }

    def read(number: int) -> None:
        source.write_text(json.dumps({**request, "template": texts[number]}))
        if jinja_sandbox._child(str(source), str(folder / f"{number}.json")):
            raise UserError("refused")

    outcomes = hostile_files.survey(len(texts), lambda _: None, read, {})
    paths = [folder / f"{number}.json" for number in range(len(texts))]
    return outcomes, [json.loads(path.read_text())[0] if path.exists() else None for path in paths]


@pytest.fixture
def limits(monkeypatch):
    """Less time and more memory, because torch is loaded in these processes."""
    monkeypatch.setattr(jinja_sandbox, "SECONDS", 2)
    monkeypatch.setattr(jinja_sandbox, "MEMORY", 8 << 30)
    monkeypatch.setattr(hostile_files, "SECONDS", 20)


def test_a_template_gets_out_of_nothing(tmp_path, limits, monkeypatch):
    """The template is refused, or its text shows nothing of the process in which it runs."""
    monkeypatch.setattr(jinja_sandbox, "SECONDS", 60)
    (tmp_path / "nest").mkdir()
    texts = [text.replace("CANARY", str(tmp_path / "nest" / "canary")) for text in ESCAPES]
    outcomes, written = rendered([*texts, "{{ messages[0].content }}"], tmp_path)
    assert set(outcomes.values()) == {"loaded"}
    assert written.pop() == "red"
    inside = ("subclass", "<class", "<module", "root:", "built-in", "environ")
    assert [text for text in written if any(word in (text or "") for word in inside)] == []
    assert not any((tmp_path / "nest").iterdir())


@pytest.mark.parametrize("text", BOMBS, ids=range(len(BOMBS)))
def test_a_template_that_would_never_end(text, tmp_path, limits):
    """It is refused or ended by the limit, and nothing is written in either case."""
    outcomes, written = rendered([text], tmp_path)
    assert outcomes[0] in ("loaded", "refused", "crash")  # crash: system/sandbox.py reports the time limit
    assert not written[0]


def test_a_gguf_file_brings_the_same_template(tmp_path, monkeypatch):
    """The template in the metadata of a file runs in the same child."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra of its own")
    from onecard.conversion import gguf as conversion_gguf
    from onecard.inference import llama_cpp as inference_llama_cpp

    monkeypatch.setattr(jinja_sandbox, "SECONDS", 12)
    canary = tmp_path / "canary"
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = ESCAPES[2].replace("CANARY", str(canary)) + BOMBS[0]
    path = conversion_gguf.base(
        tiny.save_model(tmp_path / "model", tokenizer), tmp_path / "x.gguf", any_tokenizer=True
    )
    restored = inference_llama_cpp.tokenizer_of(path)
    assert "cycler" in restored.chat_template
    with pytest.raises(UserError, match="cannot be used"):
        data_template.load("auto", restored)
    assert not canary.exists()


DENIED = """
import os, socket, sys
def denied(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.gethostbyname"):
        place = args[1] if event in ("socket.connect", "socket.sendto") else args
        host = place[0] if isinstance(place, tuple) else place
        if isinstance(place, tuple) and host not in ("127.0.0.1", "::1", "localhost", None, ""):
            with open(os.environ["ATTEMPTS"], "a") as file:
                file.write(f"{event} {place}\\n")
            raise OSError("no network")
sys.addaudithook(denied)
"""


def denial(folder: Path) -> dict[str, str]:
    """The environment in which each attempt to use the network is recorded and fails, in children too."""
    (folder / "sitecustomize.py").write_text(DENIED)
    variables = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "WANDB_MODE")}
    path = f"{folder}{os.pathsep}{ROOT}"
    return {**variables, "PYTHONPATH": path, "ATTEMPTS": str(folder / "attempts"), "OMP_NUM_THREADS": "1"}


def attempts_in(folder: Path) -> str:
    attempts = folder / "attempts"
    return attempts.read_text() if attempts.exists() else ""


def without_network(
    folder: Path, *command: object, typed: str = ""
) -> tuple[subprocess.CompletedProcess, str]:
    """Run a program without a network and return it with its attempts; typed: its standard input."""
    ended = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=denial(folder),
        input=typed,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return ended, attempts_in(folder)


PROGRAMS = [*sorted(ROOT.glob("*.py")), *sorted([*ROOT.glob("tools/*.py"), *ROOT.glob("serve/*.py")])]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_help_asks_nobody(program, tmp_path):
    ended, attempts = without_network(tmp_path, program, "--help")
    assert (ended.returncode, attempts) == (0, ""), ended.stderr


def test_a_training_and_an_answer_ask_nobody(tmp_path, tiny_model, tiny_rows):
    """They use local files only, even without the variables that keep the libraries offline."""
    run = tmp_path / "run"
    common = [
        "--bits=16",
        "--dtype=fp32",
        "--device=cpu",
        "--batch_size=4",
        "--num_epochs=1",
        "--test_size=0",
    ]
    flags = [f"--model_path={tiny_model}", f"--data_path={tiny_rows}", f"--output_path={run}", *common]
    ended, attempts = without_network(tmp_path, "finetune.py", *flags)
    assert (ended.returncode, attempts) == (0, ""), ended.stderr[-2000:]
    ended, attempts = without_network(tmp_path, "tools/check_data.py", f"--data_path={tiny_rows}")
    assert (ended.returncode, attempts) == (0, ""), ended.stderr[-2000:]


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> dict[str, Path]:
    """The inputs of the programs below: an original LLaMA, a model, two adapters, rows and a text."""
    folder = tmp_path_factory.mktemp("few")
    count = meta_llama_reference.sentencepiece(folder / "tokenizer.model", 392)
    settings = meta_llama_reference.params(vocab=count)
    whole = meta_llama_reference.weights(settings, count, torch.bfloat16, False)
    original = meta_llama_reference.save(folder / "original", settings, meta_llama_reference.cut(whole, 1))
    shutil.move(folder / "tokenizer.model", original)
    base = tiny.save_model(folder / "model")
    settings = LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path=str(base))
    get_peft_model(base_model.load_base(str(base), 16, "fp32", "cpu"), settings).save_pretrained(
        folder / "adapter"
    )
    shutil.copytree(folder / "adapter", folder / "beacon")  # it names a model of the hub and its commit
    settings = json.loads((folder / "beacon" / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": "evil/beacon", "revision": "a" * 40}
    (folder / "beacon" / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "text.txt").write_text("red green blue")
    rows = tiny.save_rows(folder / "rows.json", 8)
    paths = {"original": original, "model": base, "adapter": folder / "adapter", "rows": rows}
    paths["beacon"] = folder / "beacon"
    return {**paths, "text": folder / "text.txt"}


@pytest.mark.parametrize(
    "line",
    [
        "tools/convert_llama.py --input_dir={original} --output_dir={new}",
        "tools/merge_lora.py --model_path={model} --lora_path={adapter} --output_path={new}",
        "tools/quantize.py --model_path={model} --method=bnb --data_path={rows} --report_rows=1"
        " --device=cpu --output_path={new}",
        "tools/export_gguf.py --model_path={model} --lora_path={adapter} --template=alpaca --check=false"
        " --output_path={new}",
        "tools/perplexity.py {text} --model_path={model} --device=cpu",
        "generate.py --terminal --model_path={model} --lora_path={adapter} --max_new_tokens=4 --device=cpu",
        "tools/merge_lora.py --model_path={model} --lora_path={beacon} --output_path={new}",
        "tools/export_gguf.py --model_path={model} --lora_path={beacon} --template=alpaca --check=false"
        " --output_path={new}",
        "generate.py --terminal --model_path={model} --lora_path={beacon} --max_new_tokens=4 --device=cpu",
        "finetune.py --model_path={model} --lora_path={beacon} --data_path={rows} --max_steps=1 --test_size=0"
        " --device=cpu --bits=16 --output_path={new}",
    ],
    ids=lambda line: line.split()[0] + ("-beacon" if "{beacon}" in line else ""),
)
def test_a_tool_asks_nobody(line, few, tmp_path):
    """Each tool does its work from local files, in one process and its children."""
    if "gguf" in line:
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra of its own")
        from onecard.conversion import llama_cpp_converter

        llama_cpp_converter.home()  # the converter is downloaded on first use
    command = line.format(**few, new=tmp_path / "new").split()
    ended, attempts = without_network(tmp_path, *command, typed="Say red\n")
    assert (ended.returncode, attempts) == (0, ""), ended.stderr[-2000:]
    assert ("{new}" in line) == (tmp_path / "new").is_dir()


def test_a_window_asks_nobody(tmp_path):
    """The window is started, and its page is opened from this machine."""
    command = [sys.executable, "-m", "tests.support.window_server", "turns", str(tmp_path)]
    settings = {"cwd": ROOT, "env": denial(tmp_path), "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **settings) as started:
        try:
            address = next(line.split()[1] for line in started.stdout if line.startswith("Open "))
            with urllib.request.urlopen(address, timeout=60) as page:
                assert page.status == 200
        finally:
            started.terminate()
    assert attempts_in(tmp_path) == ""


def test_a_try_is_seen(tmp_path):
    """An attempt is recorded by name and by address, and in a child too."""
    script = "import socket; socket.create_connection(('192.0.2.1', 80))"
    named = "import urllib.request; urllib.request.urlopen('http://example.invalid')"
    for text in (script, named):
        ended, attempts = without_network(
            tmp_path, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {text!r}])"
        )
        assert attempts.startswith("socket."), ended.stderr
        (tmp_path / "attempts").unlink()
