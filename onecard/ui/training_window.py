"""The training window: choose rows, fill in options, start, stop, continue; curves and answers, live.

It holds nothing: trainings are processes of their own (runs/jobs.py), what it shows comes from their files.
Closing the page or killing the window loses nothing; whoever opens it again sees the run that is going on.
"""

import dataclasses
import functools
import threading
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from onecard.config import options as config_options
from onecard.config.training import SHAPES, FinetuneConfig
from onecard.data import preview
from onecard.errors import UserError
from onecard.hub import locate
from onecard.runs import jobs
from onecard.runs import log as run_log
from onecard.runs.log import ACCURACY, LOSS, RATE, SPEED, VALIDATION, Curves
from onecard.system import hardware, svg_plot
from onecard.ui import forms, training_html
from onecard.ui.page import head
from onecard.ui.training_layout import FIELDS, StudioLayout

WORKSPACE = Path("lora-checkpoints")  # folder of the runs
SECONDS = 2.0  # between two looks at the files
POINTS = 300  # of a curve
PREVIEW = 5  # rows
PLOTS = {  # curves of one plot -> its title
    (LOSS, VALIDATION): ("Loss (nats per target token)", "损失（每个目标词元）"),
    (ACCURACY,): ("Validation: target tokens right", "验证：目标词元正确率"),
    (RATE,): ("Learning rate", "学习率"),
    (SPEED,): ("Speed (tokens/s)", "速度（词元/秒）"),
}


def page(lang: str = "en", workspace: Path = WORKSPACE) -> gr.Blocks:
    """The training window alone; `build` for what it takes."""
    with gr.Blocks(analytics_enabled=False, title="OneCard", fill_width=True) as window:
        head(forms.text(lang, "training", "训练"), lang)
        build(lang, workspace)
    return window


def build(lang: str = "en", workspace: Path = WORKSPACE) -> None:
    """Make the training window inside the gr.Blocks or gr.Tab that is open.

    lang: en or zh; workspace: folder of the runs.
    """
    Studio(lang, workspace)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a page shows, so that only what has changed is sent to it; of long texts their hashes."""

    names: tuple[str, ...] = ()
    card: int = 0
    may: tuple[bool, ...] = ()
    plots: int = 0
    steps: tuple[Any, ...] = ()  # the run, then the steps of its answers


class Studio(StudioLayout):
    """The components of one window and what happens when they are used; it has no state of any page."""

    def __init__(self, lang: str, workspace: Path):
        super().__init__(lang, workspace)
        self.curves = functools.lru_cache(maxsize=64)(Curves)
        self.encoders, self.loading = functools.lru_cache(maxsize=2)(_encoder), threading.Lock()
        self.seen, self.timer = gr.State(Seen()), gr.Timer(SECONDS)
        self.wire()

    def wire(self) -> None:
        """Which event does what; nothing here waits for a training."""
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        form = list(self.inputs.values())
        pages = [self.run, self.others, self.step, self.seen]
        buttons = [self.stop, self.go_on, self.reuse]
        shown = [self.run, self.others, self.card, self.done, *buttons]
        shown += [self.plots, self.step, self.answers, self.seen]
        look = {"fn": self.refresh, "inputs": pages, "outputs": shown, **quick}
        self.upload.upload(self.keep, self.upload, [self.inputs["data_path"], self.rows], **quick)
        self.preview.click(self.show_rows, form, self.rows, concurrency_limit=1, api_visibility="private")
        begun = [self.started, self.run, self.name, self.inputs["overwrite"], self.done]
        self.start.click(self.begin, [self.name, *form], begun, **quick).then(**look)
        self.stop.click(self.end, self.run, self.done, **quick).then(**look)
        self.go_on.click(self.resume, [self.run, self.longer], [self.done, self.longer], **quick).then(**look)
        self.reuse.click(self.take_options, self.run, [self.done, *form], **quick)
        self.run.input(lambda: "", None, self.done, **quick).then(**look)
        self.others.input(**look)
        self.step.input(self.show_answers, [self.run, self.step], self.answers, **quick)
        self.timer.tick(**look)
        changed = [self.inputs[name].change for name in SHAPES]
        one = {"concurrency_limit": 1, "trigger_mode": "always_last", "show_progress": "hidden"}
        gr.on(
            [*changed, Context.root_block.load],
            self.predict, form, self.memory, api_visibility="private", **one
        )  # fmt: skip
        Context.root_block.load(self.attach, None, [self.run, self.name], **quick).then(**look)

    def attach(self) -> tuple[Any, str]:
        """A page that is opened: the run that goes on, else the newest; and a name for the next."""
        names = jobs.names(self.workspace)
        going = [name for name in names if jobs.state(self.workspace, name).going]
        value = next(iter([*going, *names]), None)
        return gr.update(choices=names, value=value), jobs.free_name(self.workspace)

    def refresh(self, run: str | None, others: list[str] | None, step: float, seen: Seen) -> list[Any]:
        """Updates of what has changed in the files since `seen`."""
        names = tuple(jobs.names(self.workspace))
        choices = gr.skip() if names == seen.names else gr.update(choices=list(names))
        run = run if _is_name(run) else None
        shown = [name for name in dict.fromkeys([run, *(others or [])]) if name in names]
        for name in [run, *shown] if run else shown:
            self.curve(name).refresh()
        state = jobs.state(self.workspace, run) if run else jobs.State(jobs.NEW)
        card = self.card_of(run, state)
        plots = "".join(self.plot(keys, shown) for keys in PLOTS)
        rounds = run_log.samples(self.workspace / run) if run else {}
        steps = (run, *rounds)
        slider, text = gr.skip(), gr.skip()
        if steps != seen.steps:
            newest = max(rounds, default=0)
            follows = seen.steps[:1] != steps[:1] or step >= max(seen.steps[1:], default=0)
            step = newest if follows else step
            slider = gr.update(maximum=max(newest, 1), value=step, visible=bool(rounds))
            text = self.show_answers(run, step)
        may = self.may(run, state)
        told = "" if seen.may[:1] == (True,) and not state.going else gr.skip()  # of a stop, or of going on
        pressable = [gr.skip()] * 3 if may == seen.may else [gr.update(interactive=m) for m in may]
        now = Seen(names, hash(card), may, hash(plots), steps)
        new_card = gr.skip() if now.card == seen.card else card
        drawn = gr.skip() if now.plots == seen.plots else f'<div class="oc-plots">{plots}</div>'
        return [choices, choices, new_card, told, *pressable, drawn, slider, text, now]

    def may(self, run: str | None, state: jobs.State) -> tuple[bool, bool, bool]:
        """Whether this run can be stopped, continued, taken as a pattern."""
        begun = bool(run and jobs.config_of(self.workspace / run))
        return state.going, begun and not state.going, begun

    def curve(self, name: str) -> Curves:
        return self.curves(self.workspace / name)

    def card_of(self, run: str | None, state: jobs.State) -> str:
        if run is None:
            return training_html.note(self.text("No run yet.", "还没有训练。"))
        return training_html.card(run, state, self.curve(run).latest(), self.lang)

    def plot(self, keys: tuple[str, ...], names: list[str]) -> str:
        """The same curves of several runs in one plot; '' without a run."""
        lines = []
        for place, name in enumerate(names):
            for key in keys:
                is_check = key == VALIDATION
                what = self.text("validation", "验证") if is_check else self.text("training", "训练")
                parts = [name if len(names) > 1 else "", what if len(keys) > 1 else ""]
                colour = place if len(names) > 1 else int(is_check)
                points = self.curve(name).thinned(key, POINTS)
                lines.append(svg_plot.Line(" ".join(filter(None, parts)) or name, points, colour, is_check))
        return svg_plot.plot(self.text(*PLOTS[keys]), lines, LOSS not in keys) if names else ""

    def show_answers(self, run: str | None, step: float) -> str:
        """The first answers and those of the last round up to `step`."""
        if run not in jobs.names(self.workspace):
            return ""
        folder = self.workspace / run
        rounds = run_log.samples(folder)
        if not rounds:
            return ""
        first, chosen = min(rounds), max([at for at in rounds if at <= step], default=min(rounds))
        stored = jobs.config_of(folder)
        plain = not first and not stored.get("begun_from") and not stored.get("options", {}).get("lora_path")
        before = self.text("Base model", "基座模型") if plain else self.text("At the start", "训练开始时")
        after = self.text(f"After step {chosen}", f"第 {chosen} 步之后")
        titles = (before, after) if chosen > first else (before,)
        return training_html.answers(rounds[first], rounds[chosen], titles, self.lang)

    def options(self, values: tuple[Any, ...]) -> FinetuneConfig:
        """The form's options; raises UserError naming all that is wrong."""
        given = dict(zip(self.inputs, values, strict=True))
        empty = [n for n, value in given.items() if value in (None, "") and FIELDS[n].default is None]
        return config_options.build(
            FinetuneConfig, {n: value for n, value in given.items() if n not in empty}
        )

    def told(self, error: UserError) -> str:
        return training_html.note(forms.told(error, self.inputs), True)

    def begin(self, name: str, *values: Any) -> tuple[str, Any, Any, Any, Any]:
        name = name.strip()
        try:
            jobs.start(self.workspace, name, self.options(values))
        except UserError as error:
            return self.told(error), *[gr.skip()] * 4
        told = self.text(
            f"{name} was started. It goes on when this page is closed.",
            f"{name} 已启动。关闭页面不影响训练。",
        )
        choice = gr.update(choices=jobs.names(self.workspace), value=name)
        return training_html.note(told), choice, jobs.free_name(self.workspace), False, ""

    def end(self, run: str | None) -> str:
        try:
            jobs.stop(self.workspace, run)
        except UserError as error:
            return self.told(error)
        return training_html.note(self.text("It saves, then stops.", "保存后停止。"))

    def resume(self, run: str | None, epochs: str) -> tuple[str, Any]:
        try:
            longer = {"num_epochs": epochs.strip()} if epochs.strip() else {}
            config_options.build(FinetuneConfig, longer)
            jobs.go_on(self.workspace, run, longer)
        except UserError as error:
            return self.told(error), gr.skip()
        return training_html.note(self.text(f"{run} goes on.", f"{run} 继续训练。")), ""

    def take_options(self, run: str | None) -> list[Any]:
        stored = jobs.config_of(self.workspace / run) if run in jobs.names(self.workspace) else {}
        if not stored:
            text = self.text("This run has no options yet.", "该训练还没有选项。")
            return [training_html.note(text, True), *[gr.skip()] * len(self.inputs)]
        values = {**stored["options"], "overwrite": False}
        values = [values.get(name, FIELDS[name].default) for name in self.inputs]
        return [
            training_html.note(self.text("Copied into the form.", "已复制到表单。")),
            *map(_shown, values),
        ]

    def keep(self, path: str) -> tuple[Any, str]:
        try:
            kept = jobs.keep_upload(Path(path), self.workspace)
        except UserError as error:
            return gr.skip(), self.told(error)
        finally:
            Path(path).unlink(missing_ok=True)  # gradio would hand it to whoever knows its name
        return gr.update(choices=self.files(), value=str(kept)), ""

    def predict(self, *values: Any) -> str:
        """Predicted peak memory of the form's options beside what is free; without a model nothing."""
        try:
            options = self.options(values)
            jobs.check_paths(options, self.workspace / jobs.UPLOADS)
            folder = locate.here(options.model_path)
            if folder is None:
                name = options.model_path
                reason = self.text(f"{name} is not on this machine yet", f"{name} 还不在本机")
                return training_html.unpredicted(reason, self.lang)
            from onecard.training import (
                memory as training_memory,  # brings torch, which a window alone does not need
            )

            device = hardware.choose_device(options.device).value
            free = hardware.free_memory_bytes(device)
            return training_html.memory(
                training_memory.predict(options, folder, device, free), free, device, self.lang
            )
        except UserError as error:
            return training_html.unpredicted(error.problem, self.lang)

    def show_rows(self, *values: Any) -> str:
        try:
            options = self.options(values)
            jobs.check_paths(options, self.workspace / jobs.UPLOADS)
            return training_html.rows(preview.first_rows(options, self.load_encoder, PREVIEW), self.lang)
        except UserError as error:
            return self.told(error)
        except OSError as error:
            return training_html.note(f"{error.filename}: {error.strerror}", True)

    def load_encoder(self, model_path: str, template_name: str) -> tuple[Any, Any]:
        """Tokenizer and template of a base model; those of the last two are kept."""
        with self.loading:
            return self.encoders(locate.locate(model_path), template_name)


def _encoder(folder: str, template_name: str) -> tuple[Any, Any]:
    from onecard.data import template as templates
    from onecard.models import (
        tokenizer as models_tokenizer,  # they bring torch, which a window alone does not need
    )

    templates.check(template_name)
    tokenizer = models_tokenizer.load_tokenizer(folder)
    template = templates.load(template_name, tokenizer)
    return templates.tokenizer_for(tokenizer, template), template


def _is_name(text: Any) -> bool:
    """Whether a run could be called so; others type into a list of runs too."""
    try:
        jobs.folder_of(Path(), text)
    except UserError:
        return False
    return True


def _shown(value: Any) -> Any:
    return "" if value is None else value
