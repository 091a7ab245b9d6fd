"""What a user types to call our programs on this machine, and to install the packages that one lacks.

In a checkout the programs are files beside onecard/, and tools/setup.sh makes .venv. Where OneCard was
installed as a package there are the command `onecard` and pip.
"""

import importlib.util
import os
import shlex
import sys

from onecard.errors import UserError
from onecard.system.files import ROOT

IN_CHECKOUT = (ROOT / "tools" / "setup.sh").is_file()
FILES = {  # sub-command of onecard -> the same program as a file of a checkout
    "finetune": "finetune.py",
    "continue": "finetune_continue.py",
    "generate": "generate.py",
    "interaction": "interaction.py",
    "chat": "tools/cpu_chat.py",
    "check-data": "tools/check_data.py",
    "download": "tools/download.py",
    "convert": "tools/convert_llama.py",
    "merge": "tools/merge_lora.py",
    "quantize": "tools/quantize.py",
    "export-gguf": "tools/export_gguf.py",
    "perplexity": "tools/perplexity.py",
    "extend-vocab": "tools/extend_vocab.py",
    "prepare-base": "tools/prepare_base_model.py",
    "keys": "serve/keys.py",
    "serve": "serve/app.py",
    "json-to-parquet": "tools/json_to_parquet.py",
}
PARTS = {  # part of the set-up -> modules that it installs; users install no other modules
    "train": (
        "torch transformers peft bitsandbytes accelerate safetensors gguf sentencepiece google.protobuf "
        "numpy matplotlib pyarrow ftfy wcwidth tqdm huggingface_hub httpx2 tenacity filelock platformdirs"
    ),
    "chat": "gradio markdown_it prompt_toolkit",
    "cpu": "llama_cpp",
    "gptq": "gptqmodel optimum",
    "serve": "fastapi uvicorn sqlalchemy alembic limits prometheus_client python_multipart llguidance",
}
COMPILED = ("cpu", "serve")  # the parts with llama.cpp
ANY_CPU = 'CMAKE_ARGS="-DGGML_NATIVE=OFF"'  # tools/setup.sh says why; an extra cannot carry it


def name(command: str) -> str:
    """What a sub-command is called here: `finetune_continue.py` or `onecard continue`."""
    return FILES[command] if IN_CHECKOUT else f"onecard {command}"


def line(command: str) -> str:
    """What a user types for a sub-command: `.venv/bin/python finetune_continue.py`, say; without options."""
    return f"{in_environment('python')} {_typed(FILES[command])}" if IN_CHECKOUT else name(command)


def _typed(file: str) -> str:
    """A file of the checkout as the user types it: from another folder only its whole path is right."""
    try:
        is_here = ROOT.samefile(os.path.curdir)
    except OSError:  # it is gone or may not be read
        is_here = False
    return file if is_here else shlex.quote(str(ROOT / file))


def script(file: str, command: str) -> str:
    """What to type for a sub-command that a checkout has a shell script for."""
    return f"bash {_typed(file)}" if IN_CHECKOUT else name(command)


def in_environment(program: str) -> str:
    """What to type for a program that a package brought."""
    return _typed(f".venv/bin/{program}") if IN_CHECKOUT else program


def set_up(part: str) -> str:
    """What to type for a part of the set-up."""
    if IN_CHECKOUT:
        return f"bash {_typed('tools/setup.sh')} {part}"
    return f'{ANY_CPU + " " if part in COMPILED else ""}pip install "onecard[{part}]"'


def extra(package: str) -> str:
    """What to type for a package that is an extra of its own."""
    return pip_install(package) if IN_CHECKOUT else set_up(package)


def pip_install(package: str, options: str = "") -> str:
    """What a user types to install one package; in a checkout all other versions stay as they are."""
    constraints = f"-c {_typed('requirements.txt')} " if IN_CHECKOUT else ""
    return f"{in_environment('pip')} install {options}{constraints}{package}"


def child(command: str) -> tuple[list[str], dict[str, str]]:
    """The command line, without options, and the environment of a program as a child in any folder.

    The option -P keeps Python from importing a file of that folder in place of a library.
    """
    variables = {**os.environ, "PYTHONIOENCODING": "utf-8"}  # its output is read as UTF-8
    if IN_CHECKOUT:  # where onecard need not be installed
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH")]))
    return [sys.executable, "-P", "-m", "onecard", command], variables


def missing_package(module: str, part: str) -> UserError:
    """For a program whose optional package is not in the environment that runs it."""
    problem = f"the package {module} is not installed for {sys.executable}."
    return UserError(
        problem, f"Run: {set_up(part)}" + (f", and use {in_environment('python')}." if IN_CHECKOUT else "")
    )


def require(module: str, part: str) -> None:
    """Raise UserError where a package of a part of the set-up is missing; nothing is imported."""
    if importlib.util.find_spec(module) is None:
        raise missing_package(module, part)


def not_installed(error: ModuleNotFoundError) -> UserError | None:
    """The error to show for a missing module; None for a module that no part of the set-up installs."""
    missing = error.name or ""
    for part, modules in PARTS.items():
        for module in modules.split():
            # for google.protobuf the missing module may be google; a missing part of a package that is
            # installed is a bug
            if missing == module or module.startswith(f"{missing}."):
                return missing_package(module, part)
    if missing == "deepspeed":  # no part installs it: it is built with the installed torch
        problem = f"the package {missing} is not installed for {sys.executable}."
        return UserError(problem, f"Run: {pip_install(missing, '--no-build-isolation ')}")
    return None
