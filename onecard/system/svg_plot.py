"""Curves as SVG text for a page: axes, lines, a legend with the last values, tooltips that browsers show.

Colours are those of the page's style sheet (STYLE), light and dark. This file knows points and no runs.
"""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 340, 190  # of the drawing, which the page scales
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 22  # room around the curves
COLOURS = ("#2f6fd0", "#d0672f", "#23895b", "#9a4bc2", "#b3324f", "#7a7a1c")
DARK = ("#79a9f2", "#f0a06c", "#63c795", "#cb93ea", "#f0849b", "#c9c95c")
TIPS = 40  # places with a tooltip
STYLE = """<style>
.oc-plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: .7rem; }
.oc-plot { border: 1px solid var(--border-color-primary); border-radius: var(--radius-md); min-width: 0;
  background: var(--block-background-fill); padding: .5rem .6rem; }
.oc-plot .oc-title { margin: 0; font-size: .85rem; font-weight: 600; color: var(--body-text-color); }
.oc-plot > svg { width: 100%; height: auto; display: block; }
.oc-plot text { font-size: 10.5px; fill: var(--body-text-color-subdued); }
.oc-plot .oc-grid { stroke: var(--border-color-primary); stroke-width: 1; }
.oc-plot polyline { fill: none !important; stroke-width: 1.6; stroke-linejoin: round; }
.oc-plot .oc-dashed { stroke-dasharray: 5 3; } .oc-plot .oc-tip { fill: transparent; }
.oc-plot .oc-tip:hover { fill: var(--border-color-primary); fill-opacity: .45; }
.oc-keys { display: flex; flex-wrap: wrap; gap: 0 .9rem; font-size: .75rem; min-height: 1.2em;
  color: var(--body-text-color); overflow-wrap: anywhere; }
.oc-keys svg { width: 22px; height: 8px; display: inline-block; vertical-align: middle; margin-right: 4px; }
"""
for _where, _colours in (("", COLOURS), (".dark ", DARK)):
    for _number, _colour in enumerate(_colours):
        STYLE += f"{_where}.oc-c{_number} {{ stroke: {_colour}; fill: {_colour}; }}\n"
STYLE += "</style>"


class Line(NamedTuple):
    label: str
    points: list[tuple[int, float]]  # (step, value), in the order of the steps
    colour: int
    dashed: bool = False

    @property
    def style(self) -> str:
        return f"oc-c{self.colour % len(COLOURS)}" + (" oc-dashed" if self.dashed else "")


def plot(title: str, lines: Sequence[Line], from_zero: bool = False) -> str:
    """One plot of several lines; from_zero: the axis of the values begins there."""
    lines = [line for line in lines if line.points]
    keys = "".join(map(_key, lines))
    head = f'<p class="oc-title">{html.escape(title)}</p><div class="oc-keys">{keys}</div>'
    return f'<div class="oc-plot">{head}{_drawing(title, lines, from_zero) if lines else ""}</div>'


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, at most `most` + 1 of them."""
    least = (high - low) / most
    size = 10.0 ** math.floor(math.log10(least))
    step = next(size * times for times in (1, 2, 5, 10) if size * times >= least * (1 - 1e-9))
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10000 else f"{value:.0f}"


def _drawing(title: str, lines: Sequence[Line], from_zero: bool) -> str:
    values = [value for line in lines for _, value in line.points]
    right = max(1, *(line.points[-1][0] for line in lines))
    low, high = (min(0.0, *values) if from_zero else min(values)), max(values)
    spare = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - (0 if from_zero else spare), high + spare

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / right

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    elements = []
    for value in ticks(low, high, 5):
        at = f"{y(value):.1f}"
        elements.append(f'<line class="oc-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        elements.append(f'<text x="{LEFT - 5}" y="{at}" dy="3.5" text-anchor="end">{number(value)}</text>')
    for step in ticks(0, right, 5):
        if step == int(step):
            elements.append(
                f'<text x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{int(step)}</text>'
            )
    for line in lines:
        places = [(f"{x(step):.1f}", f"{y(value):.1f}") for step, value in line.points]
        if len(places) == 1:
            elements.append(f'<circle class="{line.style}" cx="{places[0][0]}" cy="{places[0][1]}" r="2.5"/>')
        else:
            path = " ".join(map(",".join, places))
            elements.append(f'<polyline class="{line.style}" points="{path}"/>')
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}"'
    return f"<svg {box}>{''.join(elements)}{_tips(lines, right)}</svg>"


def _tips(lines: Sequence[Line], right: int) -> str:
    """Upright stripes that show, under the mouse, the values at their step."""
    width, height = (WIDTH - LEFT - RIGHT) / TIPS, HEIGHT - TOP - BOTTOM
    elements = []
    for place in range(TIPS):
        step = right * (place + 0.5) / TIPS
        near = [(line.label, *min(line.points, key=lambda p: abs(p[0] - step))) for line in lines]
        text = "\n".join(f"{label}: {number(value)} ({at})" for label, at, value in near)
        box = f'x="{LEFT + place * width:.1f}" y="{TOP}" width="{width:.1f}" height="{height}"'
        elements.append(f'<rect class="oc-tip" {box}><title>{html.escape(text)}</title></rect>')
    return "".join(elements)


def _key(line: Line) -> str:
    stroke = f'<line class="{line.style}" x2="22" y1="4" y2="4" stroke-width="2"/>'
    label = html.escape(f"{line.label} {number(line.points[-1][1])}")
    return f'<span><svg viewBox="0 0 22 8">{stroke}</svg>{label}</span>'
