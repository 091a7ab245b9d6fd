"""The command `onecard`. Each of its sub-commands is one file of onecard/programs/.

onecard finetune --data_path rows.json --output_path lora-checkpoints/mine
python -m onecard finetune --help
"""

import functools
import importlib
import sys
from collections.abc import Callable

from onecard.errors import UserError, run_program
from onecard.hub import session as hub_session
from onecard.system import commands, openmp
from onecard.system import console as system_console

PROGRAMS = {  # sub-command: (file of onecard/programs/, what it does)
    "finetune": ("finetune", "fine-tune a model on your own rows"),
    "continue": ("continue_training", "continue a run, or train its result further on other rows"),
    "generate": ("generate", "answer single instructions in a browser or the terminal"),
    "interaction": ("interaction", "chat in a browser or the terminal; --studio adds a tab for training"),
    "chat": ("cpu_chat", "chat in the terminal on the CPU, with llama.cpp"),
    "check-data": ("check_data", "check rows before training on them"),
    "download": ("download", "download a model and verify it"),
    "convert": ("convert_llama", "convert a LLaMA model to the layout of transformers, and back"),
    "merge": ("merge_lora", "merge an adapter into its base model"),
    "quantize": ("quantize", "quantise a model with GPTQ, AWQ or bitsandbytes"),
    "export-gguf": ("export_gguf", "export base model and adapter as GGUF files for llama.cpp and Ollama"),
    "perplexity": ("perplexity", "measure the perplexity of a model on a text"),
    "extend-vocab": ("extend_vocab", "add pieces to a tokenizer"),
    "prepare-base": ("prepare_base_model", "add to a base model the embedding rows that its tokenizer needs"),
    "serve": ("serve", "answer OpenAI's and TigerBot's calls over HTTP, on this machine"),
    "keys": ("keys", "create, list, revoke and rotate the API keys of the service"),
    "json-to-parquet": ("json_to_parquet", "write rows as one Parquet file"),
}


def start(command: str, arguments: list[str] | None = None) -> None:
    """Run a sub-command, then end the process with its exit code.

    arguments: those of the command line by default.
    """
    system_console.accept_any_text()
    openmp.choose()  # before the program imports torch
    program = importlib.import_module(f"onecard.programs.{PROGRAMS[command][0]}")
    arguments = sys.argv[1:] if arguments is None else arguments
    run_program(functools.partial(run, program.main, arguments), program.LESS_MEMORY)


def run(program: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Run the program. Raises UserError with the remedy when a package is missing."""
    try:
        with hub_session.session():  # in one command a name of the hub means one commit
            program(arguments)
    except ModuleNotFoundError as error:
        refusal = commands.not_installed(error)
        if refusal is None:
            raise
        raise refusal from error


def main() -> None:
    """Run the sub-command that the command line names; without one, print the list of sub-commands."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("--help", "-h", "help"):
        width = max(map(len, PROGRAMS))
        lines = [f"  {name:<{width}}  {what}" for name, (_, what) in PROGRAMS.items()]
        print("usage: onecard COMMAND [options]\n\n" + "\n".join(lines))
        print("\nonecard COMMAND --help lists the options of a command.")
        return
    if command not in PROGRAMS:
        problem = UserError(f"There is no command {command!r}.", "onecard --help lists the commands.")
        run_program(functools.partial(_refuse, problem))
    sys.argv[0] = f"onecard {command}"  # the name that --help and messages show
    start(command, arguments)


def _refuse(problem: UserError) -> None:
    raise problem


if __name__ == "__main__":
    main()
