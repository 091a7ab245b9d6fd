"""Text that anybody may have written, as HTML or as Markdown: escaped, growing answers, all beams.

gradio's chat renders Markdown in the browser. Nothing is rendered here: markdown-it-py tells which lines are
code, which stay as they are, and all other lines lose their HTML and their images.
"""

import functools
import html
import re

from markdown_it import MarkdownIt

from onecard.inference.detokenizer import PartialText

# it finds blocks only, and tables as gradio has them; HTML is off, since gradio gets the text escaped
PARSER = MarkdownIt("commonmark", {"html": False}).enable("table")
PARSER.core.ruler.enableOnly(["normalize", "block"])
CODE = ("fence", "code_block")
CACHED = 256  # messages: a chat is shown anew with every token, and only its last message has changed
# an escaped sign; a code span between two runs of as many backticks; a run that has no partner
SPAN = re.compile(r"\\[\\`]|(?P<span>(`+)(?!`).+?(?<!`)\2(?!`))|`+", flags=re.DOTALL)


def as_markdown(text: PartialText) -> str:
    """An answer as Markdown for gr.Chatbot: no HTML and no image of its own, and code as it is written.

    What may still change is marked, except inside a block of code, where a tag would be shown as text.
    """
    if not text.open:
        return _without_html(text.stable)
    if _opens_in_code(text):
        return _without_html(text.stable + text.open)
    lines = _no_image(escaped(text.open)).replace("\n", "<br>")
    tail = f'<span class="may-change">{lines}</span>'
    return _without_html(text.stable, tail) + tail


def growing(text: PartialText) -> str:
    """An answer as HTML; what may still change stands apart."""
    tail = f'<span class="may-change">{escaped(text.open)}</span>' if text.open else ""
    return f'<div class="answer" data-testid="answer">{escaped(text.stable)}{tail}</div>'


def beams(text: PartialText) -> str:
    """All beams as HTML, the best first; '' when there is only one."""
    if len(text.beams) < 2:
        return ""
    return "".join(f'<div class="beam"><b>{n}</b> {escaped(b)}</div>' for n, b in enumerate(text.beams, 1))


def status_line(message: str, is_error: bool = False) -> str:
    """What the line below an answer says."""
    kind = ' class="wrong" role="alert"' if is_error else ""
    return f'<div class="status" data-testid="status"><span{kind}>{escaped(message)}</span></div>'


def escaped(text: str) -> str:
    return html.escape(text, quote=False)


@functools.lru_cache(maxsize=CACHED)
def _without_html(text: str, tail: str = "") -> str:
    """tail: what follows in the last line; it may turn what looks like the beginning of a fence into text."""
    lines = _lines(text)
    pieces, end = [], 0
    for kind, first, last in [*_blocks(text + tail), ("end", len(lines), len(lines))]:
        pieces += [_plain(line) for line in lines[end:first]]  # no block: there is no code to keep
        block = lines[first:last]
        if kind in CODE:
            pieces += block
        elif kind == "table":  # a cell ends at its |, even inside a code span
            pieces += ["|".join(map(_escaped, line.split("|"))) for line in block]
        elif block:
            pieces.append(_escaped("\n".join(block)))
        end = last
    return "\n".join(pieces)


def _opens_in_code(text: PartialText) -> bool:
    """Whether the open part of an answer begins in a block of code."""
    line = len(_lines(text.stable)) - 1
    blocks = _blocks(text.stable + text.open)
    return any(kind in CODE and first <= line < last for kind, first, last in blocks)


def _lines(text: str) -> list[str]:
    """The lines as markdown-it counts them: str.splitlines knows more line ends."""
    return re.split(r"\r\n?|\n", text)


def _blocks(text: str) -> list[tuple[str, int, int]]:
    """(kind, first line, line behind the last) of blocks of code, of tables, and of text with code spans."""
    blocks, end = [], 0
    for token in PARSER.parse(text):
        kind = token.type.removesuffix("_open")
        if kind in (*CODE, "table", "inline") and token.map and token.map[0] >= end:
            blocks.append((kind, *token.map))
            end = token.map[1]
    return blocks


def _escaped(text: str) -> str:
    """A paragraph or less. A code span over several lines is escaped too, since quotes may cut it in two."""
    pieces, end = [], 0
    for match in SPAN.finditer(text):
        span = match["span"]
        if span and "\n" not in span:
            pieces += [_plain(text[end : match.start()]), span]
            end = match.end()
    return "".join([*pieces, _plain(text[end:])])


def _plain(text: str) -> str:
    return _no_image(text.replace("&", "&amp;").replace("<", "&lt;"))


def _no_image(text: str) -> str:
    return text.replace("![", "!\\[")
