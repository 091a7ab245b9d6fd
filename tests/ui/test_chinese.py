"""What a page says in one of its two languages, component by component; without a browser."""

import dataclasses
import re
from collections.abc import Iterator

import gradio as gr
import pytest

from onecard.config.chat import ChatConfig, SingleConfig
from onecard.config.declaration import declared
from onecard.config.generation import MODES, Generation
from onecard.data.template import Template
from onecard.inference.engine import Placement
from onecard.inference.llama_cpp_engine import Engine as Llama
from onecard.ui import adapter_picker, chat_window, forms, single_window, training_window
from onecard.ui import status as ui_status
from tests.support.chat_fakes import PLAIN_TEMPLATE, Toy

NAMES = {  # the same in both languages: of methods and programs, and what the user called something
    "LoRA alpha", "LoRA dropout", "rsLoRA", "Weights & Biases", "one", "two",
}  # fmt: skip
CHINESE = re.compile(r"[\u4e00-\u9fff]")
LANGUAGES = ("en", "zh")
WITHOUT = dataclasses.replace(PLAIN_TEMPLATE, name="bare", system=None)


def chat(names: list[str], form: Template = PLAIN_TEMPLATE) -> Toy:
    made = Toy(Llama.capabilities, (("one", 1.0),) if names else (), form)
    made.engine.adapters = names
    return made


def single(lang: str, tmp_path) -> gr.Blocks:
    return single_window.build_page(chat(["one", "two"]), SingleConfig(lang=lang))


def turns(lang: str, tmp_path) -> gr.Blocks:
    return chat_window.build_page(chat(["one", "two"]), ChatConfig(lang=lang))


def bare(lang: str, tmp_path) -> gr.Blocks:
    """No adapter, and a template without a place for a system prompt."""
    return chat_window.build_page(chat([], WITHOUT), ChatConfig(lang=lang))


def both(lang: str, tmp_path) -> gr.Blocks:
    """interaction.py --studio."""
    return chat_window.build_page(
        chat(["one", "two"]), ChatConfig(lang=lang), lambda lang: training_window.build(lang, tmp_path)
    )


def alone(lang: str, tmp_path) -> gr.Blocks:
    return training_window.build_page(lang, tmp_path)


PAGES = {made.__name__: made for made in (single, turns, bare, both, alone)}


def texts(page: gr.Blocks) -> Iterator[tuple[str, str]]:
    """Where it stands, and each text that a reader of the page can see, or may once a part is opened."""
    for block in page.blocks.values():
        config = block.get_config()
        if config.get("visible") == "hidden":
            continue
        place = f"{type(block).__name__} {config.get('elem_id')}"
        shown = {key: config.get(key) for key in ("info", "placeholder")}
        if config.get("show_label") is not False:
            shown["label"] = config.get("label")
        if isinstance(block, gr.Button | gr.Markdown | gr.HTML):
            shown["value"] = config.get("value")
        for key, text in shown.items():
            plain = re.sub(r"<style>.*?</style>|<[^>]*>", "", text or "", flags=re.DOTALL)
            if re.search(r"\w", plain):
                yield f"{place} {key}", plain


@pytest.mark.parametrize("kind", PAGES)
def test_a_chinese_page_speaks_chinese(kind, tmp_path):
    """Labels, help, placeholders, buttons, headings: all but names have Chinese characters."""
    found = list(texts(PAGES[kind]("zh", tmp_path)))
    assert len(found) > 25
    assert {text for _, text in found if not CHINESE.search(text)} <= NAMES


@pytest.mark.parametrize("kind", PAGES)
def test_an_english_page_speaks_english(kind, tmp_path):
    """The same places, and no Chinese in them."""
    found = list(texts(PAGES[kind]("en", tmp_path)))
    assert [place for place, _ in found] == [place for place, _ in texts(PAGES[kind]("zh", tmp_path))]
    assert [text for _, text in found if CHINESE.search(text)] == []


@pytest.mark.parametrize("lang", LANGUAGES)
def test_help_comes_back_in_the_language_of_the_page(lang):
    """After a change of mode: the help of what can be used, the reason of what cannot."""
    names = [name for name in declared(Generation) if name != "mode"]
    made = chat(["one"])
    for mode in MODES:
        updates = forms.usable(names, made.unused(mode), ChatConfig(lang=lang), lang)
        said = {name: update["info"] for name, update in zip(names, updates, strict=True)}
        assert all(bool(CHINESE.search(text)) == (lang == "zh") and text for text in said.values()), said
    names = [field.name for field in dataclasses.fields(Generation)]
    with gr.Blocks():
        start = [box.info for box in forms.inputs(ChatConfig(), names, lang, {}).values()]
    assert len(set(start)) == len(names)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_choices_of_a_picker_have_names(lang):
    """What stands for no adapter and for several; an adapter keeps its own name."""
    with gr.Blocks():
        shown = dict(adapter_picker.picker(chat(["one", "two"]), lang)[0].choices)
    assert list(shown.values()) == ["base", "one", "two", "mix"]
    assert [bool(CHINESE.search(name)) for name in shown] == [lang == "zh", False, False, lang == "zh"]


@pytest.mark.parametrize("layers", [0, -1, 7])
def test_where_an_engine_runs(layers):
    """English and Chinese for the status line."""
    english, chinese = ui_status.where(Placement("cpu", threads=2, gpu_layers=layers))
    assert "2 threads" in english
    assert "2 线程" in chinese
    assert not CHINESE.search(english)
    assert ("GPU" in english, "GPU" in chinese) == (layers != 0,) * 2
