"""In Markdown that a model or a user has written, code stays as it is and HTML around it is escaped."""

import pytest

from onecard.inference.detokenizer import PartialText
from onecard.ui import html as ui_html

BAD = "<img src=x>"
ESCAPED = "&lt;img src=x>"


@pytest.mark.parametrize(
    "text",
    [
        "a `{}` b",
        "a ``{} ` `` b",
        "`a\\` `{}`",
        "```html\n{}\n```",
        "~~~\n{}\n```\n{}\n~~~",
        "````\n```\n{}\n```\n{}\n````",
        "```\n{}",
        "- a\n  ```\n  {}\n  ```",
        "1. a\n\n   - b\n\n     - c\n\n       ```\n       {}\n       ```",
        "- ```\n  {}\n  ```",
        "> ```\n> {}\n> ```",
        "  ```\n{}\n  ```",
        "```\n{}\n  - {}\n```",
        "a\n\n    {}\n\n    {}",
        "- a\n\n      {}",
    ],
)
def test_code_keeps_its_signs(text):
    """Spans, indented code and all kinds of fences are code, also in lists and quotes; the rest is not."""
    code = text.replace("{}", BAD + " & x")
    assert ui_html.as_markdown(PartialText(code)) == code
    if text.count("```") != 1:
        assert ui_html.as_markdown(PartialText(f"{code}\n\n{BAD}")) == f"{code}\n\n{ESCAPED}"


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "`` a ` {}",
        "` a `` {} ``` b",
        "`a\\` {} `",
        "\\`{}\\`",
        "- `a\n- {} `",
        "`a\n\n{} `",
        "~~~\na\n~~~\n{}\n~~~\nb\n~~~",
        "```\n~~~\n```\n{}",
        "````\n```\n````\n{}",
        "    ```\n{}",
        "- a\n  ```\n  b\n{}",
        "> ```\n> a\n{}",
        "```a`b\n{}",
        "| a | b |\n|---|---|\n| `x | {} ` |",
        "a\n    {}",
    ],
)
def test_html_outside_of_code_is_escaped(text):
    """HTML is no code between unmatched backticks, or behind a fence that is closed or does not match."""
    markdown = ui_html.as_markdown(PartialText(text.replace("{}", BAD)))
    assert BAD not in markdown
    assert ESCAPED in markdown


def test_a_fence_that_what_may_change_turns_into_text():
    """When more backticks follow in the line of a fence, it is no fence, and HTML in it is escaped."""
    assert ui_html.as_markdown(PartialText("```<img src=x>", "a")) == "```<img src=x>a"
    assert BAD not in ui_html.as_markdown(PartialText("```<img src=x>", "` a"))


@pytest.mark.parametrize("before", ["```\na\n", "~~~\na\n", "- a\n  ```\n  b\n", "````\n```\n", "~~~\n```\n"])
def test_what_may_change_is_not_marked_in_code(before):
    """The tag that marks open text comes after a fence, because it would be shown inside."""
    assert ui_html.as_markdown(PartialText(before, "  a < b")) == f"{before}  a < b"
    closing = "  ```" if before.startswith("-") else before.split("\n")[0]
    closed = f"{before}{closing}\n"
    assert (
        ui_html.as_markdown(PartialText(closed, "a < b"))
        == f'{closed}<span class="may-change">a &lt; b</span>'
    )


@pytest.mark.parametrize(
    "text",
    [PartialText("![a](http://x)"), PartialText("a ", "![a](http://x)"), PartialText("![a](", "http://x)")],
)
def test_no_image_is_fetched(text):
    """This holds for stable text and for text that may still change."""
    assert "![" not in ui_html.as_markdown(text)
    assert "!\\[a](" in ui_html.as_markdown(text)
