"""Options as flags, as a JSON file and as both, and one message about all that is wrong with them."""

import contextlib
import dataclasses
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from onecard import __main__ as command
from onecard.config import chat as config_chat
from onecard.config import declaration
from onecard.config import options as config_options
from onecard.config.chat import ChatConfig, CpuConfig, SingleConfig
from onecard.config.training import FinetuneConfig
from onecard.errors import USAGE, UserError
from tests.support.paths import ROOT

FIELDS = {field.name: field for field in dataclasses.fields(FinetuneConfig)}
OPTIONS = declaration.declared(FinetuneConfig)


def parse(*argv: object) -> FinetuneConfig:
    return config_options.parse(FinetuneConfig, [str(word) for word in argv])


def json_file(folder: Path, values: object) -> Path:
    path = folder / "options.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def mistakes(*argv: object) -> str:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert caught.value.code == USAGE
    return str(caught.value)


def test_without_flags_every_option_has_its_default():
    """Without flags and file the declared defaults are used, and each passes its own check."""
    assert parse() == FinetuneConfig()
    assert config_options.build(FinetuneConfig, dataclasses.asdict(FinetuneConfig())) == FinetuneConfig()


def test_flags_become_values_of_their_type():
    """Text, whole numbers, fractions and optional values get their own types."""
    options = parse(
        *("--data_path", "a b.json", "--bits", "4", "--seed", "7", "--learning_rate", "1e-4"),
        *("--num_epochs", "0.5", "--max_steps", "3", "--test_size", "20", "--save_total_limit=2"),
    )
    assert (options.data_path, options.bits, options.seed) == ("a b.json", 4, 7)
    assert (options.learning_rate, options.num_epochs, options.test_size) == (1e-4, 0.5, 20)
    assert (options.max_steps, options.save_total_limit) == (3, 2)
    assert all(type(value) is int for value in (options.bits, options.seed, options.max_steps))


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("4096", 4096), ("1", 1)])
def test_micro_batch_tokens_is_auto_or_a_number(tmp_path, text, value):
    """auto stays a word and a number becomes a number, from a flag and from the file."""
    assert parse("--micro_batch_tokens", text).micro_batch_tokens == value
    assert parse("--config", json_file(tmp_path, {"micro_batch_tokens": value})).micro_batch_tokens == value


@pytest.mark.parametrize("text", ["0", "-5", "1.5", "Auto", "many", "inf", ""])
def test_micro_batch_tokens_takes_nothing_else(text):
    """What is neither auto nor a whole number above 0 is refused by name."""
    assert "--micro_batch_tokens" in mistakes(f"--micro_batch_tokens={text}")


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.type is bool])
@pytest.mark.parametrize(
    ("words", "value"),
    [
        ((), True),
        *(((word,), True) for word in ("true", "True", "yes", "1", "on")),
        *(((word,), False) for word in ("false", "FALSE", "no", "0", "off")),
    ],
)
def test_booleans_stand_alone_or_with_a_word(name, words, value):
    """--x means true, --x true|false what it says, and the flag behind it is not swallowed."""
    options = parse(f"--{name}", *words, "--seed", 5)
    assert (getattr(options, name), options.seed) == (value, 5)


def test_file_gives_values_and_flags_override_them(tmp_path):
    """--config FILE sets options; a flag wins wherever it stands."""
    file = json_file(tmp_path, {"bits": 4, "seed": 1, "wandb": True, "max_steps": None, "lora_alpha": 32})
    options = parse("--seed", 2, "--config", file, "--wandb", "false")
    assert (options.bits, options.seed, options.wandb) == (4, 2, False)
    assert (options.max_steps, options.lora_alpha) == (None, 32.0)
    assert dataclasses.replace(options, bits=8, seed=42, lora_alpha=16.0) == FinetuneConfig()


def test_file_of_all_options_is_those_options(tmp_path):
    """The options of a run, written as JSON, give the same run again."""
    expected = FinetuneConfig(data_path="x", bits=16, max_steps=9, micro_batch_tokens=512, wandb=True)
    assert parse("--config", json_file(tmp_path, dataclasses.asdict(expected))) == expected


WRONG = {
    "bits": ["5", "eight", "8.5", "true"],
    "cutoff_len": ["0", "7", "2.5", ""],
    "batch_size": ["0", "-1", "1.5", "x"],
    "num_epochs": ["0", "-1", "nan", "inf"],
    "max_steps": ["0", "1.5"],
    "learning_rate": ["-1e-4", "fast", "nan"],
    "warmup_steps": ["-1", "0.1"],
    "warmup_ratio": ["1", "-0.1", "50%"],
    "lr_scheduler": ["step", ""],
    "weight_decay": ["-0.1"],
    "max_grad_norm": ["-1"],
    "lora_r": ["0", "2.5"],
    "lora_alpha": ["0", "-16"],
    "lora_dropout": ["1", "-0.1", "1.5"],
    "train_on_inputs": ["maybe", "2"],
    "test_size": ["-1", "1.5", "-0.1", "nan"],
    "eval_steps": ["0"],
    "save_steps": ["0"],
    "save_total_limit": ["0"],
    "seed": ["-1", "1.5"],
    "dtype": ["float16", "BF16"],
    "gradient_checkpointing": ["true"],
    "optimizer": ["sgd"],
    "log_steps": ["0"],
    "wandb": ["offline"],
    "overwrite": ["please"],
    "skip_bad_rows": ["all"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_wrong_value_names_its_flag_and_no_other(name, value):
    """Each option refuses a wrong value, and the error has its name and the value."""
    message = mistakes(f"--{name}={value}")
    assert f"--{name} {value}" in message
    assert not [other for other in FIELDS if f"--{other} " in message and other != name]


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.choices])
def test_wrong_choice_lists_the_choices(name):
    """The error for a word that is no choice lists all choices."""
    message = mistakes(f"--{name}=99")
    assert all(str(choice) in message for choice in OPTIONS[name].choices)


def test_all_mistakes_come_in_one_message(tmp_path):
    """Wrong flags, wrong values of the file and its unknown keys are in one message."""
    file = json_file(
        tmp_path, {"lora_rank": 8, "batch_size": "many", "seed": [1], "bits": True, "wandb": None}
    )
    message = mistakes("--config", file, "--lora_r", "0", "--dtype", "int8", "--overwrite", "maybe")
    for name in ("batch_size", "seed", "bits", "wandb", "lora_r", "dtype", "overwrite"):
        assert f"--{name} " in message
    assert "'lora_rank'" in message
    assert str(file) in message
    assert "--help" in message


def test_unknown_flags_come_with_the_other_mistakes():
    """A flag that does not exist does not hide a wrong value beside it."""
    message = mistakes("--lora_rank", "8", "--bits", "5")
    assert "--lora_rank" in message
    assert "--bits" in message


@pytest.mark.parametrize("flag", ["--lora_rank", "--lora", "--bit", "--learning-rate", "rows.json"])
def test_unknown_flag_is_refused_by_name(flag):
    """Neither an abbreviation nor another spelling is guessed."""
    assert flag in mistakes(flag, "8")


def test_flag_without_its_value_is_refused_by_name():
    """--bits at the end of the line has no value."""
    assert "--bits" in mistakes("--bits")


@pytest.mark.parametrize("content", ["", "{", "[]", "8", '"bits"', "{bits: 4}"])
def test_file_that_is_no_json_object_is_named(tmp_path, content):
    """A file that holds something else than an object of options is refused with its path."""
    assert str(tmp_path / "options.json") in mistakes("--config", json_file(tmp_path, content))


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_file_that_cannot_be_read_is_named(tmp_path, name):
    """A missing file and a directory are refused with their path."""
    assert str(tmp_path / name) in mistakes("--config", tmp_path / name)


def test_number_that_no_number_can_hold_is_refused(tmp_path):
    """A number of 400 digits is a mistake like any other, from a flag and from the file."""
    assert "--learning_rate" in mistakes("--learning_rate", "1" * 400)
    assert "--learning_rate" in mistakes("--config", json_file(tmp_path, {"learning_rate": 10**400}))


def test_whole_numbers_keep_every_digit():
    """A seed is used as it was given, also beyond the 53 bits of a floating point number."""
    assert parse("--seed", 2**53 + 1).seed == 2**53 + 1


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_has_a_role_and_help(name):
    """The role is learned or execution, and the help is more than one word."""
    assert OPTIONS[name].role in (declaration.LEARNED, declaration.EXECUTION)
    assert len(OPTIONS[name].help[0].split()) > 1


def test_help_shows_every_option_at_once_and_loads_no_torch():
    """It ends with 0, names every flag, default and role, and imports nothing heavy."""
    command = [sys.executable, "-X", "importtime", "finetune.py", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0
    modules = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "onecard.config.training" in modules
    assert not {name.split(".")[0] for name in modules} & {"torch", "transformers", "peft", "numpy"}
    text = " ".join(result.stdout.split())
    for name, field in FIELDS.items():
        default = "none" if field.default is None else field.default
        default = str(default).lower() if field.type is bool else default
        assert f"--{name} " in text
        assert f"{OPTIONS[name].help[0]} [{default}; {OPTIONS[name].role}]" in text


@pytest.mark.parametrize("program", command.PROGRAMS)
def test_help_of_every_sub_command_loads_nothing_heavy(program):
    """It loads no installed package, such as torch, and no more of onecard than the options."""
    line = [sys.executable, "-X", "importtime", "-m", "onecard", program, "--help"]
    process = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    modules = {line.split("|")[-1].strip() for line in process.stderr.splitlines()}
    assert "onecard.config.options" in modules
    packages = {name for name in importlib.metadata.packages_distributions() if not name.startswith("_")}
    assert {"torch", "tqdm"} <= packages
    assert not {module.split(".")[0] for module in modules} & (packages - {"onecard"})
    small = {"onecard.hub", "onecard.hub.session"}  # onecard/__main__.py opens a session around each program
    rooms = {module.split(".")[1] for module in modules - small if module.startswith("onecard.")}
    assert rooms <= {"__main__", "errors", "config", "system", "programs"}


def test_examples_are_shown_as_the_program_was_called():
    """Each example is on its own line; a file of a checkout keeps its own name."""
    text = "What it does.\n\npython tools/merge_lora.py --a 1\necho x | python tools/merge_lora.py\n"
    called = config_options.as_called(text, "onecard merge")
    assert called == "What it does.\n\nonecard merge --a 1\necho x | onecard merge\n"
    assert config_options.as_called(text, "merge_lora.py") == text


def test_help_is_shown_even_beside_a_mistake(capsys):
    """--help is answered and the mistake is not reported."""
    with pytest.raises(SystemExit) as caught:
        parse("--bits", "5", "--help")
    assert caught.value.code == 0
    assert "--bits" in capsys.readouterr().out


WINDOW = {
    "studio": "true",
    "lang": "zh",
    "server_name": "localhost",
    "server_port": "7870",
    "origin": "https://x",
    "share": "true",
    "auth": "me:secret",
    "queue": "3",
}


@pytest.mark.parametrize(
    ("settings", "given", "idle"),
    [
        (ChatConfig, {}, []),
        (ChatConfig, {**WINDOW, "max_memory": "64", "last_turns": "1"}, []),
        (ChatConfig, {"terminal": "true", "max_memory": "64", "last_turns": "1"}, []),
        (ChatConfig, {"terminal": "true", **WINDOW}, [*WINDOW]),
        (ChatConfig, {"rope_factor": "8"}, ["rope_factor"]),
        (ChatConfig, {"rope_factor": "8", "rope_scaling": "yarn"}, []),
        (CpuConfig, {"terminal": "true", "max_memory": "64"}, []),
        (CpuConfig, WINDOW, [*WINDOW]),
        (CpuConfig, {"share": "false", "lang": "en", "rope_factor": "4"}, []),
        (SingleConfig, {name: value for name, value in WINDOW.items() if name != "studio"}, []),
        (
            SingleConfig,
            {"studio": "true", "max_memory": "64", "last_turns": "1"},
            ["studio", "max_memory", "last_turns"],
        ),
        (SingleConfig, {"terminal": "true", "auth": "me:secret", "last_turns": "1"}, ["last_turns", "auth"]),
    ],
)
def test_options_that_a_program_does_not_use_are_refused(settings, given, idle):
    """One message names all of them, and none that has its default value."""
    options = config_options.parse(settings, [f"--{name}={value}" for name, value in given.items()])
    with pytest.raises(UserError) if idle else contextlib.nullcontext() as caught:
        config_chat.check_used(options)
    message = str(caught.value) if idle else ""
    assert set(re.findall(r"--(\w+) is", message)) == set(idle)


@pytest.mark.parametrize("program", ["generate.py", "interaction.py", "tools/cpu_chat.py"])
def test_programs_refuse_what_they_do_not_use(program):
    """They refuse it before anything is loaded."""
    command = [sys.executable, program, "--terminal", "--share"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert process.returncode == USAGE
    assert process.stderr == "error: --share is for a window, not for a terminal. Leave it out.\n"
