"""The components of the training window and where they stand; ui/training_window.py says what they do."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

import gradio as gr

from onecard.config import declaration
from onecard.config import training as config_training
from onecard.config.declaration import Option, Place
from onecard.config.training import FinetuneConfig
from onecard.runs import jobs
from onecard.system import svg_plot
from onecard.ui import forms, training_html

SLOT = {"padding": False, "elem_classes": "oc-slot"}  # takes no room while it is empty
FOLDERS = (".", "sample", "data")  # where files of rows are offered from


class TrainingLayout:
    """The training window's components, made inside the open gradio block."""

    def __init__(self, lang: str, workspace: Path, settings: type[FinetuneConfig] = FinetuneConfig):
        """settings: the class whose options the form shows."""
        self.lang, self.workspace, self.settings = lang, workspace, settings
        self.fields = {field.name: field for field in dataclasses.fields(settings)}
        self.lay_out()

    def text(self, english: str, chinese: str) -> str:
        return forms.text(self.lang, english, chinese)

    def lay_out(self) -> None:
        text = self.text
        gr.HTML(training_html.STYLE + svg_plot.STYLE, padding=False)
        with gr.Row():
            with gr.Column(min_width=320):
                words = {"value": self.fields["data_path"].default, **self.words("data_path")}
                rows = gr.Dropdown(self.files(), allow_custom_value=True, **words)
                self.inputs = {"data_path": rows}
                with gr.Row():
                    self.upload = gr.UploadButton(
                        text("Upload a file", "上传文件"), file_types=list(config_training.FORMATS), size="sm"
                    )
                    self.preview = gr.Button(text("Preview", "预览"), size="sm", elem_id="train-preview")
                self.rows = gr.HTML(elem_id="train-rows", **SLOT)
                self.inputs["model_path"] = self.input("model_path")
                even = {"elem_classes": ["oc-form", "oc-even"]}
                with gr.Row(**even):
                    self.inputs |= {name: self.input(name) for name in self.names_at(Place.COMMON)}
                with gr.Accordion(text("All options", "全部选项"), open=False), gr.Row(**even):
                    self.inputs |= {name: self.input(name) for name in self.names_at(Place.FOLDED)}
                self.memory = gr.HTML(elem_id="train-memory", **SLOT)
                self.name = gr.Textbox(
                    label=text("Name of the new run", "新训练的名称"),
                    info=text(f"a folder in {self.workspace}", f"{self.workspace} 中的文件夹"),
                    max_length=jobs.LONGEST_NAME,
                    elem_id="train-name",
                )
                self.start = gr.Button(text("Start", "开始训练"), variant="primary", elem_id="train-start")
                self.started = gr.HTML(elem_id="train-started", **SLOT)
            with gr.Column(min_width=320):
                words = {"label": text("Run", "训练"), "elem_id": "train-run", "interactive": True}
                self.run = gr.Dropdown([], allow_custom_value=True, **words)
                self.card = gr.HTML(elem_id="train-card", **SLOT)
                with gr.Row():
                    small = {"min_width": 100, "size": "md"}
                    stop = text("Stop and save", "停止并保存")
                    self.stop = gr.Button(stop, variant="stop", elem_id="train-stop", **small)
                    self.go_on = gr.Button(text("Continue", "继续训练"), elem_id="train-continue", **small)
                    self.reuse = gr.Button(text("Copy options", "复制选项"), elem_id="train-reuse", **small)
                self.done = gr.HTML(elem_id="train-done", **SLOT)
                with gr.Row(elem_classes="oc-form"):
                    self.longer = gr.Textbox(
                        label=text("Continue up to epoch", "继续训练到第几轮"),
                        info=text("empty: as planned", "留空：按原计划"),
                        elem_id="train-longer",
                    )
                    words = {"label": text("Compare with", "对比"), "elem_id": "train-others"}
                    words |= {"info": text("earlier runs in the same plots", "在同一图中显示其他训练")}
                    words |= {"multiselect": True, "interactive": True}
                    self.others = gr.Dropdown([], allow_custom_value=True, **words)
                self.plots = gr.HTML(elem_id="train-plots", **SLOT)
                at = text("Answers at step", "第几步的回答")
                self.step = gr.Slider(0, 1, 0, step=1, label=at, visible=False, elem_id="train-step")
                self.answers = gr.HTML(elem_id="train-answers", **SLOT)

    def files(self) -> list[str]:
        """Files of rows that are offered; any other inside this folder can be typed."""
        places = [*map(Path, FOLDERS), self.workspace / jobs.UPLOADS]
        paths = [path for place in places for path in sorted(place.glob("*")) if path.is_file()]
        return [str(path) for path in paths if path.suffix in config_training.FORMATS and path.name[0] != "."]

    def names_at(self, place: Place) -> list[str]:
        return declaration.names(self.settings, lambda option: option.place == place)

    def words(self, name: str) -> dict[str, Any]:
        words = forms.words(self.settings, name, self.lang)
        return {**words, "elem_id": f"train-{name}", "min_width": 140}

    def input(self, name: str) -> Any:
        """The input of an option, by what it is declared to be."""
        field, words = self.fields[name], self.words(name)
        option: Option = field.metadata["option"]
        value = field.default if option.window_value is None else option.window_value
        kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
        if option.choices:
            choices = [(str(choice), choice) for choice in option.choices]
            empty = [("-", "")] if type(None) in kinds else []
            return gr.Dropdown([*empty, *choices], value="" if value is None else value, **words)
        if bool in kinds:
            return gr.Checkbox(value, **words)
        if str in kinds or type(None) in kinds:  # a number's input cannot be empty
            return gr.Textbox("" if value is None else str(value), max_lines=3, **words)
        return gr.Number(value, precision=0 if int in kinds else None, **words)
