"""Text that anybody may have written, as HTML or as Markdown: escaped, growing answers, all beams.

Markdown keeps its code, and none of its HTML and pictures. Blocks and code spans are found as CommonMark has
them, as far as lists, quotes and fences go.
"""

import html
import re

from onecard.inference.detokenizer import PartialText

LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")
QUOTE = re.compile(r" {0,3}> ?")
ITEM = re.compile(r"(?:[-+*]|\d{1,9}[.)])(?: {1,4}(?=\S)| (?=\s)|$)")
FENCE = re.compile(r"(`{3,})[^`]*$|(~{3,})")
# an escaped sign; a code span between two runs of as many backticks; a run that has no partner
SPAN = re.compile(r"\\[\\`]|(?P<span>(`+)(?!`).+?(?<!`)\2(?!`))|`+", flags=re.DOTALL)


def without_html(text: str) -> str:
    """The text without HTML and pictures outside of code, which would be fetched from wherever they lie."""
    return "".join(part if is_code else _escaped(part) for is_code, part in _parts(text)[0])


def ends_in_code(text: str) -> bool:
    """Whether what is added to the text belongs to a fenced block."""
    return _parts(text)[1]


def _escaped(text: str) -> str:
    """A paragraph or less; a span over several lines is escaped, too: a list may have parted it."""
    made, end = [], 0
    for found in SPAN.finditer(text):
        span = found["span"]
        if span and "\n" not in span:
            made += [_plain(text[end : found.start()]), span]
            end = found.end()
    return "".join([*made, _plain(text[end:])])


def _plain(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("![", "!\\[")


def _parts(text: str) -> tuple[list[tuple[bool, str]], bool]:
    """(is it code, text) of fenced blocks and of what is around them, by paragraphs; is the last one open."""
    parts: list[tuple[bool, str]] = []
    items: list[int] = []  # column where the text of each list item begins that we are in
    depth, inside, fence = 0, 0, ""  # of quotes; column and sign of the open fence
    for line in LINE.findall(text):
        quotes, rest = _unquoted(line.expandtabs(4), depth if fence else None)
        column = len(rest) - len(rest.lstrip(" "))
        blank = not rest.strip(" \r\n")
        if fence and (quotes < depth or (not blank and column < inside)):
            fence = ""  # its quote or list item is over
            quotes, rest = _unquoted(line.expandtabs(4))
            column = len(rest) - len(rest.lstrip(" "))
        if fence:
            parts.append((True, line))
            mark = rest.strip()
            if column - inside < 4 and mark.startswith(fence) and not mark.strip(fence[0]):
                fence = ""
            continue
        begins = blank or quotes != depth
        if quotes != depth:
            items, depth = [], quotes
        while not blank and items and column < items[-1]:
            items.pop()
        inside = items[-1] if items else 0
        while column - inside < 4 and (item := ITEM.match(rest, column)):
            begins = True
            inside = item.end() if rest[item.end() :].strip() else column + len(item[0].rstrip()) + 1
            items.append(inside)
            column = inside
        opened = FENCE.match(rest.rstrip(), column) if column - inside < 4 else None
        if opened:
            fence = opened[1] or opened[2]
            parts.append((True, line))
        elif parts and not parts[-1][0] and not begins:
            parts[-1] = False, parts[-1][1] + line
        else:
            parts.append((False, line))
    return parts, bool(fence)


def _unquoted(line: str, most: int | None = None) -> tuple[int, str]:
    """How many quotes (of at most so many) a line stands in, and what stands there."""
    depth = 0
    while (most is None or depth < most) and (mark := QUOTE.match(line)):
        depth, line = depth + 1, line[mark.end() :]
    return depth, line


def escaped(text: str) -> str:
    return html.escape(text, quote=False)


def growing(text: PartialText) -> str:
    """An answer as HTML; what may still change stands apart."""
    tail = f'<span class="may-change">{escaped(text.open)}</span>' if text.open else ""
    return f'<div class="answer" data-testid="answer">{escaped(text.stable)}{tail}</div>'


def beams(text: PartialText) -> str:
    """All beams, the best first."""
    if len(text.beams) < 2:
        return ""
    return "".join(f'<div class="beam"><b>{n}</b> {escaped(b)}</div>' for n, b in enumerate(text.beams, 1))


def as_markdown(text: PartialText) -> str:
    """An answer for a chat's Markdown: none of its own HTML is taken for HTML, outside of code or in it."""
    if not text.open:
        return without_html(text.stable)
    if ends_in_code(text.stable):  # inside of code nothing is marked
        return without_html(text.stable + text.open)
    lines = escaped(text.open).replace("\n", "<br>")
    return f'{without_html(text.stable)}<span class="may-change">{lines}</span>'
