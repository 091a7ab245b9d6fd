"""What the form of the training window answers before a training starts: memory, rows, uploads, mistakes."""

import contextvars
import functools
import threading
from pathlib import Path
from typing import Any

import gradio as gr

from onecard.config import options as config_options
from onecard.config.training import FinetuneConfig
from onecard.data import preview
from onecard.errors import UserError
from onecard.hub import locate
from onecard.runs import jobs
from onecard.system import hardware
from onecard.ui import forms, training_html
from onecard.ui.training_layout import TrainingLayout

PREVIEW = 5  # rows
ENCODERS = 2  # tokenizers that are kept in memory


class TrainingForm:
    """The options of the form, and what can be said about them; values: those of layout.inputs."""

    def __init__(self, layout: TrainingLayout):
        self.layout, self.workspace, self.lang = layout, layout.workspace, layout.lang
        self.encoders, self.loading = functools.lru_cache(maxsize=ENCODERS)(_encoder), threading.Lock()
        # the threads of a page look names up in the session (hub/session.py) of the command that opened it
        self.context = contextvars.copy_context()

    def options(self, values: tuple[Any, ...]) -> FinetuneConfig:
        """Raises UserError that names everything that is wrong."""
        by_name = dict(zip(self.layout.inputs, values, strict=True))
        fields = self.layout.fields
        empty = [n for n, value in by_name.items() if value in (None, "") and fields[n].default is None]
        return config_options.build(
            self.layout.settings, {name: value for name, value in by_name.items() if name not in empty}
        )

    def error_note(self, error: UserError) -> str:
        """An error as HTML, with the options called as in the form."""
        return training_html.note(forms.in_labels(error, self.layout.inputs), True)

    def keep_upload(self, path: str) -> tuple[Any, str]:
        """Keep an uploaded file among those that can be chosen, and choose it."""
        try:
            file = jobs.keep_upload(Path(path), self.workspace)
        except UserError as error:
            return gr.skip(), self.error_note(error)
        finally:
            Path(path).unlink(missing_ok=True)  # gradio would give it to anyone who knows its name
        return gr.update(choices=self.layout.files(), value=str(file)), ""

    def predict_memory(self, *values: Any) -> str:
        """Predicted peak memory beside what is free; without the model on this machine the reason why not."""
        try:
            options = self.options(values)
            jobs.check_paths(options, self.workspace / jobs.UPLOADS)
            folder = locate.here(options.model_path)
            if folder is None:
                name = options.model_path
                reason = self.layout.text(f"{name} is not on this machine yet", f"{name} 还不在本机")
                return training_html.unpredicted(reason, self.lang)
            from onecard.training import memory  # imports torch, which the window alone does not need

            device = hardware.choose_device(options.device).value
            free = hardware.free_memory_bytes(device)
            parts = memory.predict(options, folder, device, free)
            return training_html.memory(parts, free, device, self.lang)
        except UserError as error:
            return training_html.unpredicted(error.problem, self.lang)

    def preview_rows(self, *values: Any) -> str:
        """The first rows as the model will see them."""
        try:
            options = self.options(values)
            jobs.check_paths(options, self.workspace / jobs.UPLOADS)
            return training_html.rows(preview.first_rows(options, self._load_encoder, PREVIEW), self.lang)
        except UserError as error:
            return self.error_note(error)
        except OSError as error:
            return training_html.note(f"{error.filename}: {error.strerror}", True)

    def _load_encoder(self, model_path: str, template_name: str) -> tuple[Any, Any]:
        """Tokenizer and template of a base model."""
        with self.loading:
            return self.encoders(self.context.run(locate.locate, model_path), template_name)


def _encoder(folder: str, template_name: str) -> tuple[Any, Any]:
    from onecard.data import template as data_template
    from onecard.models import tokenizer as models_tokenizer  # imports torch, as above

    data_template.check(template_name)
    tokenizer = models_tokenizer.load_tokenizer(folder)
    return tokenizer, data_template.load(template_name, tokenizer)
