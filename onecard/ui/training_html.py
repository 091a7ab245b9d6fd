"""Parts of the training window as HTML: the state of a run, rows with their targets, answers side by side.

Text goes in and HTML comes out; everything from rows, models and files is escaped. This file knows no
component and no file of a run.
"""

import html

from onecard.data import preview
from onecard.runs.jobs import FAILED, FINISHED, NEW, RUNNING, STARTING, STOPPED, State
from onecard.ui import forms

STYLE = """<style>
.oc-card { border: 1px solid var(--border-color-primary); border-left: 5px solid var(--neutral-400);
  border-radius: var(--radius-lg); padding: .7rem 1rem; background: var(--block-background-fill); }
.oc-card b { font-size: 1.05rem; } .oc-card .oc-facts { color: var(--body-text-color-subdued); }
.oc-card.oc-running, .oc-card.oc-starting { border-left-color: #2f6fd0; }
.oc-card.oc-finished { border-left-color: #23895b; } .oc-card.oc-failed { border-left-color: #c4453c; }
.oc-card.oc-stopped { border-left-color: #b98008; }
.oc-bar { height: .5rem; border-radius: .25rem; background: var(--border-color-primary); overflow: hidden;
  margin: .55rem 0 .3rem; } .oc-bar div { height: 100%; background: #2f6fd0; transition: width .6s; }
.oc-said { font-family: var(--font-mono); font-size: .78rem; color: var(--body-text-color-subdued);
  white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 0; }
.oc-note { padding: .5rem .8rem; border-radius: var(--radius-md); overflow-wrap: anywhere;
  border: 1px solid var(--border-color-primary); }
.oc-note.oc-wrong { border-color: #c4453c; color: #c4453c; }
.dark .oc-note.oc-wrong { color: #f09a92; border-color: #f09a92; }
.oc-text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; font-size: .9rem; margin: 0;
  font-family: inherit; color: var(--body-text-color); }
.oc-row { border: 1px solid var(--border-color-primary); border-radius: var(--radius-md);
  padding: .6rem .8rem; margin: .5rem 0; background: var(--block-background-fill); }
.block.oc-slot:not(:has(.prose > *)) { display: none; } .oc-slot .html-container { padding: 0; }
#train-rows .prose { max-height: 32rem; overflow: auto; }
.oc-row .oc-place, .oc-head { font-size: .78rem; color: var(--body-text-color-subdued); margin: 0 0 .3rem; }
.oc-row mark, .oc-legend mark { background: #ffd868; color: #1c1600; border-radius: 2px; padding: 0 1px; }
.dark .oc-row mark, .dark .oc-legend mark { background: #7a5c00; color: #fff3cf; }
.oc-pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .8rem; }
.oc-pair > div { border-top: 3px solid var(--neutral-400); padding-top: .35rem; min-width: 0; }
.oc-pair > div + div { border-top-color: #2f6fd0; }
.oc-even .form { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr));
  background: var(--block-background-fill); }
.oc-form .block { display: flex; flex-direction: column; }
.oc-form .block > :is(label, .container):not(:has([type=checkbox])) { flex: 1; display: flex;
  flex-direction: column; }
.oc-form .block > :is(label, .container) > span:first-child { align-self: flex-start; }
.oc-form .block > :is(label, .container):not(:has([type=checkbox])) > :last-child { margin-top: auto; }
</style>"""
KINDS = {
    NEW: ("Not started", "尚未开始"),
    STARTING: ("Starting", "正在启动"),
    RUNNING: ("Training", "训练中"),
    STOPPED: ("Stopped", "已停止"),
    FINISHED: ("Finished", "已完成"),
    FAILED: ("Failed", "失败"),
}


def note(text: str, is_error: bool = False) -> str:
    """A message; '' when there is none."""
    kind = ' oc-wrong" role="alert' if is_error else '" role="status'
    return f'<div class="oc-note{kind}">{html.escape(text)}</div>' if text else ""


PARTS = {  # what the memory is needed for
    "weights": ("weights", "权重"),
    "adapter": ("adapter", "适配器"),
    "gradient": ("gradient", "梯度"),
    "optimizer": ("optimizer", "优化器"),
    "activations": ("activations", "激活"),
}


def memory(parts: dict[str, float], free: int | None, device: str, lang: str) -> str:
    """Predicted memory beside what is free; it is shown as an error when it is more.

    parts: GiB by name; free: bytes.
    """
    total = sum(parts.values())
    named = forms.text(lang, ", ", "，").join(
        f"{forms.text(lang, *PARTS[n])} {_gib(size)}" for n, size in parts.items()
    )
    text = forms.text(lang, f"Predicted peak memory: {_gib(total)} GiB", f"预计内存峰值：{_gib(total)} GiB")
    if free is not None:
        there = f"{free / 2**30:.1f} GiB"
        text += forms.text(lang, f" of {there} free on {device}", f"，{device} 空闲 {there}")
    own = forms.text(lang, "The program itself needs a little more.", "程序本身另计。")
    text = forms.text(lang, f"{text} ({named}). {own}", f"{text}（{named}）。{own}")
    return note(text, free is not None and total * 2**30 > free)


def unpredicted(reason: str, lang: str) -> str:
    """Why no memory is predicted."""
    reason = reason.rstrip(".")
    return note(forms.text(lang, f"Memory is not predicted: {reason}.", f"无法预计内存：{reason}。"))


def _gib(size: float) -> str:
    """With two significant digits."""
    return f"{size:.2f}" if size < 10 else f"{size:.0f}"


def card(name: str, state: State, latest: dict[str, float], lang: str) -> str:
    """The state of a run; latest: the last values of its curves, and the `seconds` that a step takes."""
    kind = forms.text(lang, *KINDS[state.kind])
    of = forms.text(
        lang, f"step {state.step} of {state.total or '?'}", f"第 {state.step} / {state.total or '?'} 步"
    )
    if state.kind in (STOPPED, FAILED):
        of = forms.text(lang, f"saved up to {of}", f"已保存到{of}")
    facts = [of] if state.kind not in (NEW, STARTING) else []
    words = {
        "loss": ("loss {:.4g}", "损失 {:.4g}"),
        "eval_loss": ("validation {:.4g}", "验证 {:.4g}"),
        "speed": ("{:.0f} tokens/s", "{:.0f} 词元/秒"),
    }
    facts += [forms.text(lang, *text).format(latest[key]) for key, text in words.items() if key in latest]
    if state.kind == RUNNING and state.total and "seconds" in latest:
        left = duration((state.total - state.step) * latest["seconds"], lang)
        facts.append(forms.text(lang, f"about {left} left", f"大约还需 {left}"))
    share = 100 * min(1.0, state.step / state.total) if state.total and state.kind != STARTING else 0
    bar = f'<div class="oc-bar"><div style="width:{share:.1f}%"></div></div>'
    last_line = f'<p class="oc-said">{html.escape(state.said)}</p>' if state.said else ""
    return (
        f'<div class="oc-card oc-{state.kind}" data-testid="state" data-kind="{state.kind}" '
        f'data-step="{state.step}"><b>{html.escape(name)} · {kind}</b> '
        f'<span class="oc-facts">{" · ".join(facts)}</span>{bar}{last_line}</div>'
    )


def duration(seconds: float, lang: str) -> str:
    """In seconds, minutes or hours, whichever is readable."""
    for size, english, chinese in ((3600, "h", "小时"), (60, "min", "分钟")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{1 if size == 3600 else 0}f} {forms.text(lang, english, chinese)}"
    return f"{max(0, seconds):.0f} {forms.text(lang, 's', '秒')}"


def rows(shown: list[tuple[str, list[tuple[str, bool]]]], lang: str) -> str:
    """Rows as the model sees them: (where a row is, its pieces of text, each with whether it is learned)."""
    marked = forms.text(lang, "Marked text", "标出的文字")
    english = "is what the model learns to write; the rest is only read."
    rest = forms.text(lang, english, "是模型要学习生成的内容；其余部分只供读取。")
    boxes = [f'<p class="oc-head oc-legend"><mark>{marked}</mark> {rest}</p>']
    for place, pieces in shown:
        text = _line("oc-text", preview.marked(pieces))
        boxes.append(_box(_line("oc-place", html.escape(place)) + text))
    return "".join(boxes)


def answers(
    before: list[dict[str, str]], after: list[dict[str, str]], titles: tuple[str, ...], lang: str
) -> str:
    """The same prompts answered twice, side by side; titles: of both sides, or of the first one alone."""
    old = {(answer["instruction"], answer["input"]): answer["answer"] for answer in before}
    missing = forms.text(lang, "(this prompt was not asked then)", "（当时没有这个问题）")
    boxes = []
    for answer in after:
        prompt = (answer["instruction"], answer["input"])
        texts = (old.get(prompt, missing), answer["answer"])
        sides = "".join(
            f"<div>{_line('oc-head', html.escape(title))}{_line('oc-text', html.escape(text))}</div>"
            for title, text in zip(titles, texts, strict=False)
        )
        question = html.escape(" | ".join(filter(None, prompt)))
        boxes.append(_box(_line("oc-text", f"<b>{question}</b>") + f'<div class="oc-pair">{sides}</div>'))
    return "".join(boxes)


def _box(content: str) -> str:
    return f'<div class="oc-row">{content}</div>'


def _line(kind: str, content: str) -> str:
    return f'<p class="{kind}">{content}</p>'
