"""The texts of a page in each of its two languages, component by component and without a browser."""

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

NAMES = {  # the same in both languages: names of methods and programs, and names that the user has chosen
    "LoRA alpha", "LoRA dropout", "rsLoRA", "Weights & Biases", "one", "two",
}  # fmt: skip
CHINESE = re.compile(r"[\u4e00-\u9fff]")
LANGUAGES = ("en", "zh")
WITHOUT = dataclasses.replace(PLAIN_TEMPLATE, name="bare", system=None)


def chat(names: list[str], form: Template = PLAIN_TEMPLATE) -> Toy:
    toy = Toy(Llama.capabilities, (("one", 1.0),) if names else (), form)
    toy.engine.adapters = names
    return toy


def single(lang: str, tmp_path) -> gr.Blocks:
    return single_window.build_page(chat(["one", "two"]), SingleConfig(lang=lang))


def turns(lang: str, tmp_path) -> gr.Blocks:
    return chat_window.build_page(chat(["one", "two"]), ChatConfig(lang=lang))


def bare(lang: str, tmp_path) -> gr.Blocks:
    """A page without adapters, whose template has no place for a system prompt."""
    return chat_window.build_page(chat([], WITHOUT), ChatConfig(lang=lang))


def both(lang: str, tmp_path) -> gr.Blocks:
    """The page of interaction.py --studio."""
    return chat_window.build_page(
        chat(["one", "two"]), ChatConfig(lang=lang), lambda lang: training_window.build(lang, tmp_path)
    )


def alone(lang: str, tmp_path) -> gr.Blocks:
    return training_window.build_page(lang, tmp_path)


PAGES = {made.__name__: made for made in (single, turns, bare, both, alone)}


def texts(page: gr.Blocks) -> Iterator[tuple[str, str]]:
    """The place and the text of everything readable on the page, also in parts that are still closed."""
    for block in page.blocks.values():
        config = block.get_config()
        if config.get("visible") == "hidden":
            continue
        place = f"{type(block).__name__} {config.get('elem_id')}"
        properties = {key: config.get(key) for key in ("info", "placeholder")}
        if config.get("show_label") is not False:
            properties["label"] = config.get("label")
        if isinstance(block, gr.Button | gr.Markdown | gr.HTML):
            properties["value"] = config.get("value")
        for key, text in properties.items():
            plain = re.sub(r"<style>.*?</style>|<[^>]*>", "", text or "", flags=re.DOTALL)
            if re.search(r"\w", plain):
                yield f"{place} {key}", plain


@pytest.mark.parametrize("kind", PAGES)
def test_a_chinese_page_speaks_chinese(kind, tmp_path):
    """All labels, helps, placeholders, buttons and headings but names have Chinese characters."""
    visible = list(texts(PAGES[kind]("zh", tmp_path)))
    assert len(visible) > 25
    assert {text for _, text in visible if not CHINESE.search(text)} <= NAMES


@pytest.mark.parametrize("kind", PAGES)
def test_an_english_page_speaks_english(kind, tmp_path):
    """An English page has texts in the same places and no Chinese characters."""
    visible = list(texts(PAGES[kind]("en", tmp_path)))
    assert [place for place, _ in visible] == [place for place, _ in texts(PAGES[kind]("zh", tmp_path))]
    assert [text for _, text in visible if CHINESE.search(text)] == []


@pytest.mark.parametrize("lang", LANGUAGES)
def test_help_comes_back_in_the_language_of_the_page(lang):
    """After a change of mode an option shows its help, or the reason why it cannot be used."""
    names = [name for name in declared(Generation) if name != "mode"]
    toy = chat(["one"])
    for mode in MODES:
        updates = forms.usable(names, toy.unused(mode), ChatConfig(lang=lang), lang)
        helps = {name: update["info"] for name, update in zip(names, updates, strict=True)}
        assert all(bool(CHINESE.search(text)) == (lang == "zh") and text for text in helps.values()), helps
    names = [field.name for field in dataclasses.fields(Generation)]
    with gr.Blocks():
        start = [box.info for box in forms.inputs(ChatConfig(), names, lang, {}).values()]
    assert len(set(start)) == len(names)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_choices_of_a_picker_have_names(lang):
    """The choices of no adapter and of several are translated; an adapter keeps its own name."""
    with gr.Blocks():
        choices = dict(adapter_picker.picker(chat(["one", "two"]), lang)[0].choices)
    assert list(choices.values()) == ["base", "one", "two", "mix"]
    assert [bool(CHINESE.search(name)) for name in choices] == [lang == "zh", False, False, lang == "zh"]


@pytest.mark.parametrize("layers", [0, -1, 7])
def test_where_an_engine_runs(layers):
    """The status line names the place in English and in Chinese."""
    english, chinese = ui_status.where(Placement("cpu", threads=2, gpu_layers=layers))
    assert "2 threads" in english
    assert "2 线程" in chinese
    assert not CHINESE.search(english)
    assert ("GPU" in english, "GPU" in chinese) == (layers != 0,) * 2
