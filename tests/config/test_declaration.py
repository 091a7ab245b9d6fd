"""Imaginary options of each kind are declared, and all that depends on them follows without another line."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from onecard.config import chat as config_chat
from onecard.config import declaration
from onecard.config import options as config_options
from onecard.config.chat import TRANSFORMERS, WINDOW, SingleConfig
from onecard.config.conversion import QuantizeConfig
from onecard.config.declaration import EXECUTION, LEARNED, ROWS, Hub, OnResume, Place, execution, learned
from onecard.config.generation import SAMPLING, SEVERAL_TURNS, Generation, absent_uses
from onecard.config.training import ContinueConfig, FinetuneConfig
from onecard.config.training_adapter import LORA
from onecard.data import dataset
from onecard.errors import CHECKPOINT, USAGE, UserError
from onecard.runs import folder as runs_folder
from onecard.runs import jobs
from onecard.system import files as system_files
from onecard.system import hashing
from onecard.training import plan, recorded_names, run_options, starting_point

PLAIN = {"changes_rows": False, "fixed_for_other_rows": False}


def words(name: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return label and help in English and Chinese."""
    return (f"Label of {name}", f"{name} 的标签"), (f"help of {name}", f"{name} 的说明")


@dataclasses.dataclass(frozen=True)
class Imaginary:
    """Options of training, one of each kind."""

    stretch: int = learned(
        1,
        *words("stretch"),
        unit=ROWS,
        changes_rows=True,
        fixed_for_other_rows=False,
        decides_memory=True,
        saves_memory=True,
        place=Place.COMMON,
    )
    glossary: str | None = learned(
        None,
        *words("glossary"),
        **PLAIN,
        is_path=True,
        hub=Hub.ROWS,
        content="glossary",
        on_resume=OnResume.CONTENT,
    )
    sharpness: int = learned(
        5, *words("sharpness"), changes_rows=False, fixed_for_other_rows=True, only=(LORA,)
    )
    passes: int = learned(3, *words("passes"), **PLAIN, on_resume=OnResume.LARGER)
    chunk: int = execution(8, *words("chunk"), saves_memory=True)
    afresh: bool = execution(False, *words("afresh"), on_resume=OnResume.BEGINS)
    home: str = execution("here", *words("home"), on_resume=OnResume.NAMES_RUN, place=Place.NOWHERE)


@dataclasses.dataclass(frozen=True)
class Training(Imaginary, FinetuneConfig):
    """The options of finetune.py, if it had these too."""


@dataclasses.dataclass(frozen=True)
class Continuing(Imaginary, ContinueConfig):
    """The options of finetune_continue.py, if it had these too."""

    @classmethod
    def run_settings(cls) -> type[FinetuneConfig]:
        return Training


@dataclasses.dataclass(frozen=True)
class Chatting(SingleConfig):
    """The options of generate.py, if it had one for each use."""

    frame: int = declaration.option(0, EXECUTION, "width of the frame", only=(WINDOW,))
    recall: int = declaration.option(0, EXECUTION, "turns to recall", only=(SEVERAL_TURNS,))
    fused: int = declaration.option(0, EXECUTION, "fused layers", only=(TRANSFORMERS,), saves_memory=True)


@dataclasses.dataclass(frozen=True)
class Answering(Generation):
    """The options of an answer, if there were one more."""

    wander: float = declaration.window_option(
        0.5, EXECUTION, *words("wander"), slider=(0, 1, 0.1), only=(SAMPLING,)
    )


@dataclasses.dataclass(frozen=True)
class Quantizing(QuantizeConfig):
    """The options of tools/quantize.py, if awq recorded one more."""

    scale: int = declaration.option(1, LEARNED, "scale of the weights", recorded=("awq",))


def key(**changes: Any) -> str:
    return dataset.cache_key(Training(**changes), [], [], "tokenizer", "sft", "content")


def test_encoded_rows_are_kept_apart():
    """The key of the cache depends on the options that change rows, and on no others."""
    assert key(stretch=2) != key()
    assert key(sharpness=6, passes=4, chunk=9, glossary="x", afresh=True) == key()


def test_it_must_be_said_whether_an_option_changes_rows():
    @dataclasses.dataclass(frozen=True)
    class Undecided(FinetuneConfig):
        guess: int = declaration.window_option(0, LEARNED, *words("guess"))

    with pytest.raises(AssertionError, match="guess"):
        dataset.cache_key(Undecided(), [], [], "tokenizer", "sft", "content")


@pytest.mark.parametrize("value", ["/etc/passwd", "../x", "~/x", "rows.json,https://x"])
def test_a_page_cannot_name_a_file_elsewhere(tmp_path, value):
    with pytest.raises(UserError, match="--glossary"):
        jobs.check_paths(Training(glossary=value), tmp_path)


NEW = {
    "stretch": 2,
    "glossary": "new",
    "sharpness": 6,
    "passes": 4,
    "chunk": 9,
    "afresh": True,
    "home": "there",
}


@pytest.mark.parametrize(
    ("is_fixed", "fixed"),
    [
        (run_options.fixed_in_same_run, {"stretch", "sharpness", "afresh"}),
        (run_options.fixed_with_other_rows, {"sharpness"}),
    ],
)
@pytest.mark.parametrize("name", NEW)
def test_the_rules_of_resuming_are_applied(is_fixed, fixed, name):
    """Another value is refused by name, or becomes an option of the continued run."""
    request = Continuing(**{name: NEW[name]})
    if name in fixed:
        with pytest.raises(UserError, match=f"{name} .* -> {NEW[name]}") as caught:
            run_options.merged(Training(), request, frozenset({name}), is_fixed)
        assert caught.value.code == CHECKPOINT
        return
    merged, notes = run_options.merged(Training(), request, frozenset({name}), is_fixed)
    expected = "here" if name == "home" else NEW[name]  # the folder itself says where the run is
    assert getattr(merged, name) == expected
    assert [note.split()[0] for note in notes] == ([name] if name in ("glossary", "chunk", "afresh") else [])


def test_what_may_become_larger_may_not_become_smaller():
    with pytest.raises(UserError, match="passes 3 -> 2"):
        run_options.merged(
            Training(), Continuing(passes=2), frozenset({"passes"}), run_options.fixed_in_same_run
        )


def test_a_run_that_goes_on_has_its_own_value():
    stored = {"options": {"stretch": 7, "remote_code": "0" * 40}}
    options = run_options.options_of(stored, Continuing())
    assert (type(options), options.stretch, options.remote_code) == (Training, 7, None)


def test_a_finished_run_with_another_value_is_another_run(tmp_path):
    system_files.write_json(tmp_path / runs_folder.CONFIG, {"options": dataclasses.asdict(Training())})
    system_files.write_json(tmp_path / runs_folder.FINISHED, {"steps": 3, "eval_loss_after": None})
    assert starting_point.finished_before(Training(chunk=9), tmp_path)
    with pytest.raises(UserError, match="sharpness 5 -> 6"):
        starting_point.finished_before(Training(sharpness=6), tmp_path)


def test_the_content_of_a_file_is_a_fingerprint(tmp_path):
    (tmp_path / "words.txt").write_text("apple")
    data = SimpleNamespace(fingerprint="1", encoding=SimpleNamespace(sha256="2"))
    options = Training(glossary=str(tmp_path / "words.txt"))
    prints = plan._fingerprints(options, data, "3", "4", None)
    assert prints["glossary"] == hashing.of_file(tmp_path / "words.txt")
    assert "glossary" not in plan._fingerprints(Training(), data, "3", "4", None)


def test_a_typed_name_of_the_hub_may_be_downloaded():
    request = Continuing(glossary="owner/words")
    assert recorded_names.typed(request, frozenset({"glossary"})) == {Hub.ROWS: ["owner/words"]}
    assert recorded_names.typed(request, frozenset()) == {}


def test_a_message_about_memory_names_it():
    """It names options that may change and whose use applies."""
    assert "--stretch" in declaration.memory_savers(Training)
    may_change = declaration.memory_savers(Continuing, rules=[OnResume.FREE])
    assert "--chunk" in may_change
    assert "--stretch" not in may_change
    assert "--fused" in declaration.memory_savers(Chatting)
    assert "--fused" not in declaration.memory_savers(Chatting, [TRANSFORMERS])


def test_help_shows_it(capsys):
    with pytest.raises(SystemExit):
        config_options.parse(Training, ["--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert "help of stretch [1; learned]" in output
    assert "help of chunk [8; execution]" in output


def test_it_is_refused_where_it_has_no_effect():
    """That is in a terminal, in a chat of one question, and in a training without LoRA."""
    with pytest.raises(UserError) as caught:
        config_chat.check_used(Chatting(frame=1, recall=1, terminal=True))
    assert caught.value.code == USAGE
    assert "--frame is for a window" in str(caught.value)
    assert "--recall is for chats of several turns" in str(caught.value)
    assert [*config_options.set_without_effect(Chatting(fused=1), [TRANSFORMERS])] == ["fused"]
    assert [*config_options.set_without_effect(Training(sharpness=6), [LORA])] == ["sharpness"]
    assert "wander" in declaration.without_effect(Answering, absent_uses("greedy"))
    assert "wander" not in declaration.without_effect(Answering, absent_uses("sample"))


def test_a_quantised_folder_records_it():
    from onecard.conversion import quantize

    assert quantize._settings(Quantizing(method="awq", scale=2), 32)["scale"] == 2
    assert "scale" not in quantize._settings(Quantizing(method="gptq"), 32)


@pytest.mark.parametrize(("lang", "number"), [("en", 0), ("zh", 1)])
def test_the_form_for_training_has_an_input_for_it(tmp_path, lang, number):
    """It has label and help in both languages; its value is read, and may change the predicted memory."""
    gr = pytest.importorskip("gradio")
    from onecard.ui import training_window

    with gr.Blocks() as page:
        window = training_window.TrainingWindow(lang, tmp_path, Training)
    inputs = window.layout.inputs
    names = [name for name in NEW if name != "home"]
    assert "home" not in inputs
    for name in names:
        label, text = words(name)
        assert (inputs[name].label, inputs[name].info) == (label[number], text[number])
    values = {name: window.layout.fields[name].default for name in inputs} | {"stretch": 4, "chunk": 16}
    options = window.form.options(tuple(values.values()))
    assert (type(options), options.stretch, options.chunk, options.glossary) == (Training, 4, 16, None)
    targets = {
        target
        for event in page.fns.values()
        if getattr(event.fn, "__name__", "") == "predict_memory"
        for target in event.targets
    }
    assert (inputs["stretch"]._id, "change") in targets
    assert (inputs["sharpness"]._id, "change") not in targets


@pytest.mark.parametrize(("lang", "number"), [("en", 0), ("zh", 1)])
def test_a_window_for_chats_makes_an_input_for_it(lang, number):
    """It is a slider if one is declared, and when it has no effect it is disabled and says why."""
    gr = pytest.importorskip("gradio")
    from onecard.ui import forms

    with gr.Blocks():
        slider = forms.inputs(Answering(), ["wander"], lang, {})["wander"]
    label, text = words("wander")
    assert (slider.label, slider.info, slider.maximum) == (label[number], text[number], 1)
    idle = declaration.without_effect(Answering, absent_uses("greedy"))
    (update,) = forms.usable(["wander"], idle, Answering(), lang)
    assert (update["interactive"], update["info"]) == (False, SAMPLING.reason[number])
