"""A run in the training window while it goes on: its state, plots and answers, read from the files of runs.

It keeps nothing about a page: a page hands in its PageState, so that only changes are sent to it.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import gradio as gr

from onecard.errors import UserError
from onecard.runs import jobs
from onecard.runs import log as runs_log
from onecard.runs.log import ACCURACY, LOSS, RATE, SPEED, VALIDATION, Curves
from onecard.system import svg_plot
from onecard.ui import training_html
from onecard.ui.training_layout import TrainingLayout

POINTS = 300  # of a curve
PLOTS = {  # the curves of a plot -> its title
    (LOSS, VALIDATION): ("Loss (nats per target token)", "损失（每个目标词元）"),
    (ACCURACY,): ("Validation: accuracy on target tokens", "验证：目标词元正确率"),
    (RATE,): ("Learning rate", "学习率"),
    (SPEED,): ("Speed (tokens/s)", "速度（词元/秒）"),
}


@dataclasses.dataclass(frozen=True)
class PageState:
    """What a page shows; of long texts only their hashes."""

    names: tuple[str, ...] = ()
    card: int = 0
    allowed: tuple[bool, ...] = ()
    plots: int = 0
    steps: tuple[Any, ...] = ()  # the run, then the steps of its answers


class RunView:
    """Values of the components that show runs; run: the chosen one, None without any."""

    def __init__(self, layout: TrainingLayout):
        self.layout, self.workspace, self.text = layout, layout.workspace, layout.text
        self.curves = functools.lru_cache(maxsize=64)(Curves)

    def outputs(self, state: gr.State) -> list[gr.Component]:
        """The components that `refresh` has values for; state: holds the PageState."""
        shown = self.layout
        buttons = [shown.stop, shown.go_on, shown.reuse]
        return [shown.run, shown.others, shown.card, shown.done, *buttons, shown.plots, shown.step,
                shown.answers, state]  # fmt: skip

    def newest(self) -> tuple[Any, str]:
        """What a page that is opened shows: the run that goes on, or the newest; and a name for the next."""
        names = jobs.names(self.workspace)
        going = [name for name in names if jobs.state(self.workspace, name).going]
        run = next(iter([*going, *names]), None)
        return gr.update(choices=names, value=run), jobs.free_name(self.workspace)

    def refresh(self, run: str | None, others: list[str] | None, step: float, page: PageState) -> list[Any]:
        """Values of self.outputs(), with gr.skip() for what the page shows already.

        others: runs to compare with; step: of the slider over the answers.
        """
        names = tuple(jobs.names(self.workspace))
        choices = gr.skip() if names == page.names else gr.update(choices=list(names))
        run = run if _is_name(run) else None
        shown = [name for name in dict.fromkeys([run, *(others or [])]) if name in names]
        for name in [run, *shown] if run else shown:
            self._curves(name).refresh()
        state = jobs.state(self.workspace, run) if run else jobs.State(jobs.NEW)
        card = self._card(run, state)
        plots = "".join(self._plot(keys, shown) for keys in PLOTS)
        rounds = runs_log.samples(self.workspace / run) if run else {}
        steps = (run, *rounds)
        slider, answers = gr.skip(), gr.skip()
        if steps != page.steps:
            last = max(rounds, default=0)
            # the slider follows the training, unless somebody has moved it back
            follows = page.steps[:1] != steps[:1] or step >= max(page.steps[1:], default=0)
            step = last if follows else step
            slider = gr.update(maximum=max(last, 1), value=step, visible=bool(rounds))
            answers = self.answers(run, step)
        allowed = self._allowed(run, state)
        # the note about a stop or a continuation goes once the training has ended
        note = "" if page.allowed[:1] == (True,) and not state.going else gr.skip()
        is_same = allowed == page.allowed
        buttons = [gr.skip() if is_same else gr.update(interactive=one) for one in allowed]
        new_page = PageState(names, hash(card), allowed, hash(plots), steps)
        new_card = gr.skip() if new_page.card == page.card else card
        new_plots = gr.skip() if new_page.plots == page.plots else f'<div class="oc-plots">{plots}</div>'
        return [choices, choices, new_card, note, *buttons, new_plots, slider, answers, new_page]

    def answers(self, run: str | None, step: float) -> str:
        """The first answers to the validation prompts beside those of the last round up to `step`."""
        if run not in jobs.names(self.workspace):
            return ""
        folder = self.workspace / run
        rounds = runs_log.samples(folder)
        if not rounds:
            return ""
        first, chosen = min(rounds), max([at for at in rounds if at <= step], default=min(rounds))
        config = jobs.config_of(folder)
        has_start = config.get("begun_from") or config.get("options", {}).get("lora_path")
        is_base = not first and not has_start
        before = self.text("Base model", "基座模型") if is_base else self.text("At the start", "训练开始时")
        after = self.text(f"After step {chosen}", f"第 {chosen} 步之后")
        titles = (before, after) if chosen > first else (before,)
        return training_html.answers(rounds[first], rounds[chosen], titles, self.layout.lang)

    def _allowed(self, run: str | None, state: jobs.State) -> tuple[bool, bool, bool]:
        """Whether this run can be stopped, be continued, and have its options copied."""
        has_options = bool(run and jobs.config_of(self.workspace / run))
        return state.going, has_options and not state.going, has_options

    def _curves(self, name: str) -> Curves:
        return self.curves(self.workspace / name)

    def _card(self, run: str | None, state: jobs.State) -> str:
        if run is None:
            return training_html.note(self.text("No run yet.", "还没有训练。"))
        return training_html.card(run, state, self._curves(run).latest(), self.layout.lang)

    def _plot(self, keys: tuple[str, ...], names: list[str]) -> str:
        """The same curves of several runs in one plot; '' without a run."""
        lines = []
        for number, name in enumerate(names):
            for key in keys:
                is_check = key == VALIDATION
                kind = self.text("validation", "验证") if is_check else self.text("training", "训练")
                parts = [name if len(names) > 1 else "", kind if len(keys) > 1 else ""]
                colour = number if len(names) > 1 else int(is_check)
                points = self._curves(name).thinned(key, POINTS)
                label = " ".join(filter(None, parts)) or name
                lines.append(svg_plot.Line(label, points, colour, is_check))
        return svg_plot.plot(self.text(*PLOTS[keys]), lines, LOSS not in keys) if names else ""


def _is_name(text: Any) -> bool:
    """Whether a run could have this name; a list of runs also takes what is typed into it."""
    try:
        jobs.folder_of(Path(), text)
    except UserError:
        return False
    return True
