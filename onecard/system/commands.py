"""How a user calls our programs here, and how the packages that one lacks are installed.

In a checkout the programs are files beside onecard/, and tools/setup.sh makes .venv. Where OneCard was
installed as a package there are the command `onecard` and pip.
"""

import importlib.util
import os
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
    "json-to-parquet": "tools/json_to_parquet.py",
}
PARTS = {  # part of the set-up -> modules that it installs; what is not listed is no user's to install
    "train": (
        "torch transformers peft bitsandbytes accelerate safetensors gguf sentencepiece google.protobuf "
        "numpy matplotlib pyarrow ftfy wcwidth tqdm huggingface_hub httpx2 tenacity filelock platformdirs"
    ),
    "chat": "gradio markdown_it prompt_toolkit",
    "cpu": "llama_cpp",
    "gptq": "gptqmodel optimum",
}
COMPILED = "cpu"  # the part with llama.cpp
ANY_PROCESSOR = 'CMAKE_ARGS="-DGGML_NATIVE=OFF"'  # tools/setup.sh says why; an extra cannot carry it


def name(command: str) -> str:
    """What a sub-command is called here: `finetune_continue.py` or `onecard continue`."""
    return FILES[command] if IN_CHECKOUT else f"onecard {command}"


def line(command: str) -> str:
    """What to type for it, without its options: `.venv/bin/python finetune_continue.py`, say."""
    return f"{in_environment('python')} {FILES[command]}" if IN_CHECKOUT else name(command)


def script(file: str, command: str) -> str:
    """What to type for a sub-command that a checkout has a shell script for."""
    return f"bash {file}" if IN_CHECKOUT else name(command)


def in_environment(program: str) -> str:
    """What to type for a program that a package brought."""
    return f".venv/bin/{program}" if IN_CHECKOUT else program


def set_up(part: str) -> str:
    """What to type for a part of the set-up."""
    if IN_CHECKOUT:
        return f"bash tools/setup.sh {part}"
    return f'{ANY_PROCESSOR + " " if part == COMPILED else ""}pip install "onecard[{part}]"'


def extra(package: str) -> str:
    """What to type for a package that is an extra of its own."""
    return pip_install(package) if IN_CHECKOUT else set_up(package)


def pip_install(package: str, options: str = "") -> str:
    """What to type for one package, so that the versions of all others stay where a list of them is there."""
    constraints = "-c requirements.txt " if IN_CHECKOUT else ""
    return f"{in_environment('pip')} install {options}{constraints}{package}"


def child(command: str) -> tuple[list[str], dict[str, str]]:
    """The command line, without options, and the environment of a program as a child in any folder.

    -P: a file of that folder never stands for one of the library.
    """
    variables = dict(os.environ)
    if IN_CHECKOUT:  # where onecard need not be installed
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH")]))
    return [sys.executable, "-P", "-m", "onecard", command], variables


def missing_package(module: str, part: str) -> UserError:
    """For a program whose optional package is not in the environment that runs it."""
    problem = f"the package {module} is not installed for {sys.executable}."
    return UserError(problem, f"Run: {set_up(part)}" + (", and use .venv/bin/python." if IN_CHECKOUT else ""))


def require(module: str, part: str) -> None:
    """Raise UserError where a package of a part of the set-up is missing; nothing is imported."""
    if importlib.util.find_spec(module) is None:
        raise missing_package(module, part)


def not_installed(error: ModuleNotFoundError) -> UserError | None:
    """What to tell of a module that was not found, None for one that no part of the set-up installs."""
    wanted = error.name or ""
    for part, modules in PARTS.items():
        for module in modules.split():
            # of google.protobuf also google may be missing; a part of a package that is there is a fault
            if wanted == module or module.startswith(f"{wanted}."):
                return missing_package(module, part)
    if wanted == "deepspeed":  # no part has it: it is built with the torch that is there
        problem = f"the package {wanted} is not installed for {sys.executable}."
        return UserError(problem, f"Run: {pip_install(wanted, '--no-build-isolation ')}")
    return None
