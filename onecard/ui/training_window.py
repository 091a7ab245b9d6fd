"""The training window: choose rows, fill in options, start, stop, continue; curves and answers, live.

It holds nothing: trainings are processes of their own (runs/jobs.py), and what it shows comes from their
files. Closing the page or killing the window loses nothing; whoever opens it again sees the run that goes on.
"""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from onecard.config import declaration
from onecard.config import options as config_options
from onecard.config.training import FinetuneConfig
from onecard.errors import UserError
from onecard.runs import folder as runs_folder
from onecard.runs import jobs
from onecard.ui import forms, page, training_html
from onecard.ui.run_view import PageState, RunView
from onecard.ui.training_form import TrainingForm
from onecard.ui.training_layout import TrainingLayout

WORKSPACE = Path("lora-checkpoints")  # folder of the runs
SECONDS = 2.0  # between two readings of the files


def build_page(lang: str = "en", workspace: Path = WORKSPACE) -> gr.Blocks:
    """The training window alone; `build` explains the arguments."""
    with gr.Blocks(analytics_enabled=False, title="OneCard", fill_width=True) as window:
        page.head(forms.text(lang, "training", "训练"), lang)
        build(lang, workspace)
    return window


def build(lang: str = "en", workspace: Path = WORKSPACE) -> None:
    """Create the training window inside the gr.Blocks or gr.Tab that is open.

    lang: en or zh; workspace: folder of the runs.
    """
    TrainingWindow(lang, workspace)


class TrainingWindow:
    """Which event of the components does what."""

    def __init__(self, lang: str, workspace: Path, settings: type[FinetuneConfig] = FinetuneConfig):
        """settings: the class whose options the form shows."""
        self.layout, self.workspace = TrainingLayout(lang, workspace, settings), workspace
        self.form, self.runs = TrainingForm(self.layout), RunView(self.layout)
        self._wire_form()
        self._wire_runs()

    def start(self, name: str, *values: Any) -> tuple[str, Any, Any, Any, Any]:
        """Start a training; values: the form's."""
        name, text = name.strip(), self.layout.text
        try:
            jobs.start(self.workspace, name, self.form.options(values))
        except UserError as error:
            return self.form.error_note(error), *[gr.skip()] * 4
        english = f"{name} has started. It goes on when this page is closed."
        note = training_html.note(text(english, f"{name} 已启动。关闭页面不影响训练。"))
        choice = gr.update(choices=jobs.names(self.workspace), value=name)
        return note, choice, jobs.free_name(self.workspace), False, ""

    def stop(self, run: str | None) -> str:
        """Let a training save a checkpoint and end."""
        try:
            jobs.stop(self.workspace, run)
        except UserError as error:
            return self.form.error_note(error)
        return training_html.note(
            self.layout.text("The training saves a checkpoint, then stops.", "保存检查点后停止。")
        )

    def resume(self, run: str | None, epochs: str) -> tuple[str, Any]:
        """Continue a training; epochs: the new number of epochs, or '' for the one that was planned."""
        try:
            longer = {"num_epochs": epochs.strip()} if epochs.strip() else {}
            config_options.build(self.layout.settings, longer)
            jobs.go_on(self.workspace, run, longer)
        except UserError as error:
            return self.form.error_note(error), gr.skip()
        return training_html.note(self.layout.text(f"{run} goes on.", f"{run} 继续训练。")), ""

    def copy_options(self, run: str | None) -> list[Any]:
        """Put the options of a run into the form."""
        text, inputs = self.layout.text, self.layout.inputs
        stored = jobs.config_of(self.workspace / run) if run in jobs.names(self.workspace) else {}
        if not stored:
            reason = text("This run has no options yet.", "该训练还没有选项。")
            return [training_html.note(reason, True), *[gr.skip()] * len(inputs)]
        options = {**runs_folder.options_of(stored), "overwrite": False}
        values = [options.get(name, self.layout.fields[name].default) for name in inputs]
        note = training_html.note(text("Copied into the form.", "已复制到表单。"))
        return [note, *("" if value is None else value for value in values)]

    def _wire_form(self) -> None:
        layout, form = self.layout, self.form
        inputs = list(layout.inputs.values())
        chosen = [layout.inputs["data_path"], layout.rows]
        layout.upload.upload(form.keep_upload, layout.upload, chosen, **page.QUICK)
        private = {"concurrency_limit": 1, "api_visibility": "private"}
        layout.preview.click(form.preview_rows, inputs, layout.rows, **private)
        # of several changes only the last one is computed
        predicted = {**private, "trigger_mode": "always_last", "show_progress": "hidden"}
        decisive = declaration.names(layout.settings, lambda option: option.decides_memory)
        changes = [layout.inputs[name].change for name in decisive]
        triggers = [*changes, Context.root_block.load]
        gr.on(triggers, form.predict_memory, inputs, layout.memory, **predicted)

    def _wire_runs(self) -> None:
        """Nothing here waits for a training."""
        layout, runs, quick = self.layout, self.runs, page.QUICK
        inputs, state = list(layout.inputs.values()), gr.State(PageState())
        page_inputs = [layout.run, layout.others, layout.step, state]
        look = {"fn": runs.refresh, "inputs": page_inputs, "outputs": runs.outputs(state), **quick}
        started = [layout.started, layout.run, layout.name, layout.inputs["overwrite"], layout.done]
        continued = [layout.done, layout.longer]
        layout.start.click(self.start, [layout.name, *inputs], started, **quick).then(**look)
        layout.stop.click(self.stop, layout.run, layout.done, **quick).then(**look)
        layout.go_on.click(self.resume, [layout.run, layout.longer], continued, **quick).then(**look)
        layout.reuse.click(self.copy_options, layout.run, [layout.done, *inputs], **quick)
        layout.run.input(lambda: "", None, layout.done, **quick).then(**look)
        layout.others.input(**look)
        layout.step.input(runs.answers, [layout.run, layout.step], layout.answers, **quick)
        gr.Timer(SECONDS).tick(**look)
        Context.root_block.load(runs.newest, None, [layout.run, layout.name], **quick).then(**look)
