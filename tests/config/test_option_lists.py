"""No file lists names of options for which their declarations could say what is true of them."""

import pytest

from tests.support import option_lists

SHAPE = "lora_alpha, lora_r, lora_target_modules, rslora, train_what"
LISTED = {  # (file, names) -> why these names stand there
    ("conversion/gptq_awq.py", "bits, device, group_size"): "arguments of a function of gptqmodel",
    ("conversion/quantize.py", "data_path, rows"): "keys of quantize.json; rows are those that were measured",
    ("hub/download.py", "endpoint, revision, source"): "keys of onecard_download.json",
    ("hub/manifest.py", "endpoint, revision, source"): "keys of onecard_download.json",
    ("inference/transcript.py", "context, system"): "keys of a saved chat; the context is a text",
    ("training/plan.py", "device, dtype"): "reasons of the choices that the plan makes itself",
    (
        "training/resume.py",
        "max_steps, num_epochs",
    ): "an exception: epochs that are given end a count of steps",
    ("training/resume.py", "device, dtype, threads"): "what `resolved` of the run holds, not options",
    (
        "training/warm_start.py",
        "lora_r, lora_target_modules, rslora",
    ): "each comes from its own tensors or key",
    ("training/warm_start.py", SHAPE): "each comes from a key of adapter_config.json, by its own rule",
}


def test_no_list_of_names_of_options_is_left():
    """Declare what is true of an option instead, and ask `declaration.names` for the options."""
    unknown = [
        f"{option_list.file}:{option_list.line}: {', '.join(option_list.names)}"
        for option_list in option_lists.of_project()
        if (option_list.file.removeprefix("onecard/"), ", ".join(option_list.names)) not in LISTED
    ]
    assert unknown == []


def test_every_exception_is_still_there():
    present = {(each.file, ", ".join(each.names)) for each in option_lists.of_project()}
    assert [key for key in LISTED if (f"onecard/{key[0]}", key[1]) not in present] == []


@pytest.mark.parametrize(
    "source",
    [
        'PATHS = ("data_path", "model_path")',
        'PATHS = ["data_path", "model_path", "template"]',
        'PATHS = {"data_path", "model_path"}',
        'PATHS = frozenset({"data_path", "model_path"})',
        'PATHS = frozenset(["data_path", "model_path"])',
        'LABELS = {"data_path": "Rows", "model_path": "Base model"}',
        'LABELS = dict(data_path="Rows", model_path="Base model")',
        'PATHS = "data_path model_path".split()',
        'PATHS = "data_path,model_path".split(",")',
        'PATHS = ("data_path",) + ("model_path",)',
        'PATHS = (*("data_path", "model_path"), *MORE)',
        'for name in ("data_path", "model_path"): check(name)',
        'is_path = name in ("data_path", "model_path")',
        'is_path = name == "data_path" or name == "model_path"',
        'is_other = name != "data_path" and "model_path" != name and other',
        'if name == "data_path":\n    a()\nelif name == "model_path":\n    b()\nelse:\n    c()',
        'match name:\n    case "data_path" | "model_path":\n        a()',
        'match name:\n    case "data_path":\n        a()\n    case "model_path":\n        b()',
        'PATHS = ("data_path", "model_path", "no_option", "none_either")',
        'IDLE = ("rope_factor", "card_memory")',  # options of another program
        'RECORDED = ["act_order", "damp"]',
    ],
)
def test_a_planted_list_is_found(source):
    assert list(option_lists.lists(source))


@pytest.mark.parametrize(
    "source",
    [
        'ONE = ("data_path", "no_option")',
        'WORDS = ("rows", "row", "line", "lines", "seed", "word")',  # most of them are no options
        'OF_TWO_PROGRAMS = ("wandb", "pickles")',
        "values = (options.data_path, options.model_path)",  # values that are used
        "start(data_path=a, model_path=b)",
        'text = "data_path model_path"',
        'is_one = name == "data_path" or other',
    ],
)
def test_what_is_no_list_of_options_is_let_through(source):
    assert list(option_lists.lists(source)) == []
