"""The chat windows in a real browser: headless Chromium, driven by playwright, on a tiny model.

Debian's Chromium; support/window_server.py is the other side. What a person would click is clicked here.
"""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.support.browser import (
    MESSAGES,
    Server,
    ask,
    bubbles,
    finished,
    opened,
    serving,
    set_slider,
    status,
)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Iterator[Server]:
    with serving("single", tmp_path_factory.mktemp("single"), "--max_new_tokens=60") as server:
        yield server


@pytest.fixture(scope="module")
def turns(tmp_path_factory) -> Iterator[Server]:
    options = ["--max_new_tokens=40", "--mode=greedy", "--queue=4"]
    with serving("turns", tmp_path_factory.mktemp("turns"), *options) as server:
        yield server


def choose(page: Page, name: str, value: str) -> None:
    """Choose an entry of a dropdown."""
    page.click(f"#{name} input")
    page.get_by_role("option", name=value, exact=True).click()


def load(page: Page, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#load")
    chooser.value.set_files(path)


WATCH = """() => {  // notes every text that is shown, however short it stands there
  window.seen = new Set(); window.apart = 0;
  const output = document.querySelector('#output');
  new MutationObserver(() => {
    window.seen.add(output.innerText);
    window.apart += output.querySelectorAll('.may-change').length;
  }).observe(output, {childList: true, subtree: true, characterData: true});
}"""


def test_single_streams_four_beams_and_shows_them_all(browser, single):
    """The answer grows, open text is marked, and at the end all four beams can be read."""
    with opened(browser, single, "#instruction textarea") as page:
        page.evaluate(WATCH)
        page.fill("#instruction textarea", "Say something quick")
        page.fill("#input textarea", "old and new")
        page.click("#send")
        page.wait_for_selector("#stop:visible")
        finished(page)
        assert page.evaluate("window.seen.size") >= 3
        assert page.evaluate("window.apart") >= 1
        assert page.locator("#output .may-change").count() == 0
        assert "tokens/s" in status(page)
        assert "context tokens" in status(page)
        page.click("#beams-box button")
        expect(page.locator("#beams .beam")).to_have_count(4)
        first = page.locator("#beams .beam").first.inner_text().removeprefix("1").strip()
        assert first == page.inner_text("#output").strip()


def test_controls_that_do_nothing_are_disabled_with_the_reason(browser, single):
    """Temperature is disabled for beams and enabled for sampling, the number of beams the other way round."""
    with opened(browser, single, "#instruction textarea") as page:
        temperature = page.locator("#option-temperature input[type=range]")
        number = page.locator("#option-num_beams input[type=range]")
        expect(temperature).to_be_disabled()
        expect(page.locator("#option-temperature")).to_contain_text("only for sampling")
        expect(number).to_be_enabled()
        page.click("#option-mode label:has-text('sample') >> nth=0")
        expect(temperature).to_be_enabled()
        expect(number).to_be_disabled()
        expect(page.locator("#option-num_beams")).to_contain_text("only for beam search")
        page.click("#reset")
        expect(temperature).to_be_disabled()


def test_weights_of_adapters_that_do_not_answer_are_disabled(browser, single, turns):
    """Only weights with an effect can be changed: of the chosen adapter, both compared ones or a mix."""
    for server, ready in ((single, "#instruction textarea"), (turns, "#box textarea")):
        with opened(browser, server, ready) as page:
            page.click("#weights button")
            one, two = (page.locator("#weights input[type=range]").nth(place) for place in (0, 1))
            expect(one).to_be_enabled()
            expect(two).to_be_disabled()
            expect(page.locator("#weights")).to_contain_text("not chosen")
            choose(page, "adapter", "mix")
            expect(two).to_be_enabled()
            expect(page.locator("#weights")).not_to_contain_text("not chosen")
            choose(page, "adapter", "adapter2")
            expect(one).to_be_disabled()
            if server is turns:
                page.check("#compare input")
                expect(one).to_be_disabled()
                choose(page, "against", "adapter1")
                expect(one).to_be_enabled()
                page.uncheck("#compare input")
                expect(one).to_be_disabled()
            expect(two).to_be_enabled()
            choose(page, "adapter", "base")
            expect(two).to_be_disabled()


def test_stop_ends_the_answer_and_keeps_what_is_there(browser, single):
    """Stop takes effect within a token or two; the text stays, and the engine does nothing more."""
    with opened(browser, single, "#instruction textarea") as page:
        set_slider(page, "max_new_tokens", "400")
        page.fill("#instruction textarea", "Go on for long")
        page.click("#send")
        page.wait_for_selector("#stop:visible")
        page.wait_for_function("document.querySelector('#output').innerText.length > 5")
        page.click("#stop")
        finished(page)
        assert "stopped" in status(page)
        assert len(page.inner_text("#output").strip()) > 1
        resting = single.tokens()
        page.wait_for_timeout(500)
        assert single.tokens() == resting


@pytest.mark.parametrize("secure", [True, False])
def test_copy_takes_the_answer(browser, single, secure):
    """Copying also works at an http address of another machine, where pages have no clipboard."""
    granted = ["clipboard-read", "clipboard-write"]
    with opened(browser, single, "#instruction textarea", permissions=granted) as page:
        if not secure:
            page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
        page.evaluate("document.querySelector('#output .answer').textContent = `one 1\\ntwo <b> ${1 < 2}`")
        page.click("#copy")
        page.wait_for_timeout(500)
        page.click("#instruction textarea")
        page.keyboard.press("Control+v")
        expect(page.locator("#instruction textarea")).to_have_value("one 1\ntwo <b> true")
        assert page.locator("body > textarea").count() == 0


def test_wrong_values_and_no_question_are_told(browser, single):
    with opened(browser, single, "#instruction textarea") as page:
        page.click("#send")
        expect(page.locator("#status [role=alert]")).to_contain_text("instruction")
        page.fill("#instruction textarea", "x" * 3000)
        page.click("#send")
        expect(page.locator("#status [role=alert]")).to_contain_text(re.compile(r"has \d+ tokens .* \d+ fit"))
        page.locator("#option-mode").get_by_text("sample", exact=True).click()
        page.click("#more")
        page.fill("#option-seed textarea:enabled", "-1")
        page.click("#send")
        expect(page.locator("#status [role=alert]")).to_contain_text("Seed (--seed) -1: must be")
        assert "--help" not in status(page)


def test_chat_with_all_its_buttons(browser, turns, tmp_path):
    """Ask, retry, edit, delete, continue, save, load, summarise and clear all do what they say."""
    with opened(browser, turns, "#box textarea", accept_downloads=True) as page:
        ask(page, "Say red 1")
        finished(page)
        first = bubbles(page)
        assert first[0] == "Say red 1"
        assert len(first) == 2
        ask(page, "Say blue 2")
        finished(page)
        both = bubbles(page)
        assert both[:2] == first
        assert both[2] == "Say blue 2"
        page.click("#retry")
        page.wait_for_selector("#stop:visible")
        finished(page)
        assert bubbles(page) == both, "greedy answers twice the same"
        page.click("#continue")
        page.wait_for_selector("#stop:visible")
        finished(page)
        longer = bubbles(page)
        assert longer[3].startswith(both[3][:-3])
        assert len(longer[3]) > len(both[3])
        with page.expect_download() as saved:
            page.click("#save")
        saved.value.save_as(tmp_path / "chat.jsonl")
        record = json.loads((tmp_path / "chat.jsonl").read_text(encoding="utf-8"))
        assert [turn["question"] for turn in record["turns"]] == ["Say red 1", "Say blue 2"]
        assert record["options"]["max_new_tokens"] == 40
        assert record["turns"][0]["adapters"] == {"answer": {"adapter1": 1.0}}
        page.click("#edit")
        expect(page.locator("#box textarea")).to_have_value("Say blue 2")
        assert bubbles(page) == first
        page.click("#delete")
        expect(page.locator(MESSAGES)).to_have_count(0)
        load(page, tmp_path / "chat.jsonl")
        expect(page.locator(MESSAGES)).to_have_count(4)
        assert bubbles(page) == longer
        page.click("#summarise")
        page.wait_for_selector("#stop:visible")
        finished(page)
        assert bubbles(page) == longer, "a summary that was cut replaces nothing"
        expect(page.locator("#status [role=alert]")).to_contain_text("incomplete")
        page.fill("#context textarea", "about colours")
        choose(page, "adapter", "adapter2")
        choose(page, "template", "cutegpt")
        page.check("#compare input")
        page.click("#new")
        expect(page.locator("#context textarea")).to_have_value("")
        expect(page.locator("#adapter input")).to_have_value("adapter1")
        expect(page.locator("#template input")).to_have_value("as trained (alpaca)")
        expect(page.locator("#right")).to_be_hidden()
        assert bubbles(page) == []
        load(page, tmp_path / "chat.jsonl")
        expect(page.locator(MESSAGES)).to_have_count(4)
        expect(page.locator("#status")).to_contain_text("Loaded.")


def test_another_template_in_the_picker(browser, turns):
    """The next answer uses it; a template without a system turn disables the box of the system prompt."""
    with opened(browser, turns, "#box textarea") as page:
        answers = {}
        for name in ("as trained (alpaca)", "cutegpt", "as trained (alpaca)"):
            choose(page, "template", name)
            ask(page, "Say red 6")
            finished(page)
            answers.setdefault(name, []).append(bubbles(page)[1])
            page.click("#clear")
            expect(page.locator(MESSAGES)).to_have_count(0)
        first, again = answers["as trained (alpaca)"]
        assert first == again != answers["cutegpt"][0]
        choose(page, "template", "chatml")
        ask(page, "Say red 6")
        finished(page)
        expect(page.locator("#status [role=alert]")).to_contain_text("no token")


def test_two_tabs_of_one_browser_have_a_chat_each(browser, turns):
    """A second tab begins with an empty chat; a reload shows each tab its own chat."""
    with opened(browser, turns, "#box textarea") as one:
        ask(one, "Say dark 3")
        finished(one)
        two = one.context.new_page()
        two.goto(turns.address)
        two.wait_for_selector("#box textarea")
        two.wait_for_timeout(500)
        expect(two.locator(MESSAGES)).to_have_count(0)
        ask(two, "Say soft 4")
        finished(two)
        for page, question in ((one, "Say dark 3"), (two, "Say soft 4")):
            page.reload()
            page.wait_for_selector("#box textarea")
            expect(page.locator(MESSAGES)).to_have_count(2)
            assert bubbles(page)[0] == question


COVERED = """side => {
  const top = document.querySelector(`#${side} .bubble-wrap`).getBoundingClientRect().top;
  return [...document.querySelectorAll(`#${side} .block-label, #${side} .top-panel`)]
    .filter(one => one.getBoundingClientRect().bottom > top).map(one => one.className);
}"""


def test_compare_answers_side_by_side_with_two_adapters(browser, turns):
    """The answer of each side is the one that its adapter gives alone."""
    with opened(browser, turns, "#box textarea") as page:
        alone = {}
        for name in ("adapter1", "adapter2"):
            page.click("#adapter input")
            page.click(f"[role=option]:has-text('{name}')")
            ask(page, "Say green 5")
            finished(page)
            alone[name] = bubbles(page)[1]
            page.click("#clear")
            expect(page.locator(MESSAGES)).to_have_count(0)
        assert alone["adapter1"] != alone["adapter2"]
        page.check("#compare input")
        page.click("#against input")
        page.click("[role=option]:has-text('adapter1')")
        ask(page, "Say green 5")
        finished(page)
        assert bubbles(page, "left")[1] == alone["adapter2"]
        assert bubbles(page, "right")[1] == alone["adapter1"]
        for side in ("left", "right"):
            assert page.evaluate(COVERED, side) == [], "a label or a button lies over the chat"


def test_reload_shows_the_chat_again_and_two_people_do_not_mix(browser, turns):
    """W15: a chat survives a reload, another profile does not see it, and Stop ends only one's own answer."""
    with opened(browser, turns, "#box textarea") as one, opened(browser, turns, "#box textarea") as two:
        ask(one, "Say old 7")
        finished(one)
        mine = bubbles(one)
        for page in (one, two):
            set_slider(page, "max_new_tokens", "150")
        ask(one, "Say warm 8")
        ask(two, "Say cold 9")
        two.wait_for_timeout(1000)
        one.click("#stop")
        finished(one)
        assert "stopped" in status(one)
        finished(two)
        assert "stopped" not in status(two)
        assert bubbles(two)[0] == "Say cold 9"
        assert len(bubbles(two)) == 2
        assert "Say old 7" not in two.inner_text("body")
        assert bubbles(one)[:2] == mine
        before = bubbles(one)
        one.reload()
        one.wait_for_selector("#box textarea")
        expect(one.locator(MESSAGES)).to_have_count(len(before))
        assert bubbles(one) == before


def test_stop_ends_both_answers_that_are_compared(browser, turns):
    """The text of both sides stays, the engine does nothing more, and the chat can continue."""
    with opened(browser, turns, "#box textarea") as page:
        set_slider(page, "max_new_tokens", "450")
        page.check("#compare input")
        ask(page, "Say much 3")
        page.wait_for_function(BOTH)
        page.click("#stop")
        finished(page)
        assert "stopped" in status(page)
        assert [len(bubbles(page, side)) for side in ("left", "right")] == [2, 2]
        resting = turns.tokens()
        page.wait_for_timeout(500)
        assert turns.tokens() == resting
        set_slider(page, "max_new_tokens", "5")
        ask(page, "Say more 4")
        finished(page)
        assert [len(bubbles(page, side)) for side in ("left", "right")] == [4, 4]


BOTH = """() => ['left', 'right'].every(side => {
  const bots = document.querySelectorAll(`#${side} [data-testid=bot]`);
  return bots.length && bots[bots.length - 1].innerText.length > 3;
})"""


def test_closed_page_stops_being_answered(browser, turns):
    """W7: when the page is closed, no further token is generated."""
    with opened(browser, turns, "#box textarea") as page:
        set_slider(page, "max_new_tokens", "450")
        before = turns.tokens()
        ask(page, "Say everything")
        page.wait_for_timeout(500)
    resting = -1
    while turns.tokens() != resting:
        resting = turns.tokens()
        time.sleep(1)
    assert resting - before < 350, "the answer went on to its end"


def test_an_unforeseen_error_gives_the_buttons_back(browser, tmp_path):
    """An exception before the answer begins is shown, and the page still works."""
    with (
        serving("broken", tmp_path / "server", "--max_new_tokens=20") as server,
        opened(browser, server, "#box textarea") as page,
    ):
        page.fill("#box textarea", "Say red 2")
        page.press("#box textarea", "Enter")
        expect(page.locator("[data-testid=toast-body]")).to_contain_text("planted")
        finished(page)
        ask(page, "Say red 3")
        finished(page)
        assert bubbles(page)[0] == "Say red 3"


def test_reload_in_the_middle_of_an_answer(browser, turns):
    """The question is shown again, and the chat can continue."""
    with opened(browser, turns, "#box textarea") as page:
        set_slider(page, "max_new_tokens", "300")
        ask(page, "Say slow 4")
        page.wait_for_timeout(700)
        page.reload()
        page.wait_for_selector("#box textarea")
        expect(page.locator(MESSAGES).first).to_have_text("Say slow 4")
        page.wait_for_timeout(500)
        ask(page, "Say loud 5")
        finished(page)
        assert [text for text in bubbles(page) if text.startswith("Say ")] == ["Say slow 4", "Say loud 5"]


def test_a_chat_that_the_browser_cannot_keep_is_told(browser, turns):
    """A notice appears when the storage is full; the answer is shown all the same."""
    with opened(browser, turns, "#box textarea") as page:
        page.evaluate("""() => {
          for (let size = 1 << 22; size; size >>= 1)
            try { for (let n = 0; ; n++) sessionStorage.setItem(`${size}-${n}`, 'x'.repeat(size)); } catch {}
        }""")
        ask(page, "Say dark 8")
        finished(page)
        expect(page.locator("#unkept [role=alert]")).to_contain_text("too long for your browser")
        expect(page.locator("#unkept [role=alert]")).to_be_visible()
        assert len(bubbles(page)) == 2
        page.evaluate("sessionStorage.clear()")
        ask(page, "Say soft 9")
        finished(page)
        expect(page.locator("#unkept [role=alert]")).to_have_count(0)


def test_summary_becomes_the_context(browser, tmp_path):
    """A complete summary replaces the turns."""
    (tmp_path / "answers.json").write_text(
        json.dumps(["Four.", "We counted to four.", "Yes."]), encoding="utf-8"
    )
    options = ["--answers", str(tmp_path / "answers.json")]
    with (
        serving("turns", tmp_path / "server", *options) as server,
        opened(browser, server, "#box textarea") as page,
    ):
        ask(page, "Two and two?")
        finished(page)
        page.click("#summarise")
        expect(page.locator("#context textarea")).to_have_value("We counted to four.")
        expect(page.locator(MESSAGES)).to_have_count(0)
        page.fill("#system textarea", "Be brief.")
        page.reload()
        expect(page.locator("#context textarea")).to_have_value("We counted to four.")
        expect(page.locator("#system textarea")).to_have_value("Be brief.")
        ask(page, "Still there?")
        finished(page)
        expect(page.locator(MESSAGES)).to_have_count(2)
        page.evaluate("sessionStorage.setItem('onecard-texts', '{')")  # the page never writes this
        page.reload()
        expect(page.locator(MESSAGES)).to_have_count(2)
        expect(page.locator("#system textarea")).to_have_value("")


HOSTILE = """# Title

| a | b |
|---|---|
| 1 | <img src=x onerror="window.hit=1"> |

```python
print("<script>window.hit=2</script>")
```

![picture](http://evil.example/?q=1) \\`<img src=http://evil.example/x>\\`

<script>window.hit=3</script><iframe srcdoc="<script>parent.hit=4</script>"></iframe>
[link](javascript:window.hit=5) <a href="javascript:window.hit=6">x</a> <svg onload="window.hit=7">
$$x^2 + y^2 = z^2$$ and 1 < 2 & 3 > 2, `a < b`
"""


def test_markdown_code_tables_and_math_are_shown_and_nothing_runs(browser, tmp_path):
    """W9: what a model or a user writes is never HTML; tables, code and formulas are drawn."""
    (tmp_path / "answers.json").write_text(json.dumps([HOSTILE]), encoding="utf-8")
    options = ["--answers", str(tmp_path / "answers.json")]
    with (
        serving("turns", tmp_path / "server", *options) as server,
        opened(browser, server, "#box textarea") as page,
    ):
        page.on("dialog", lambda dialog: dialog.dismiss())
        ask(page, "<img src=x onerror='window.hit=8'> <b>bold</b> <script>window.hit=9</script>")
        finished(page)
        page.wait_for_timeout(500)
        chat = page.locator("#left")
        expect(chat.locator("table td").first).to_have_text("1")
        expect(chat.locator("pre code")).to_contain_text('print("<script>window.hit=2</script>")')
        assert chat.locator("pre code span").count() >= 1, "code is highlighted"
        assert chat.locator(".katex").count() >= 1
        expect(chat).to_contain_text("1 < 2 & 3 > 2")
        expect(chat).to_contain_text("a < b")
        expect(chat).to_contain_text("<b>bold</b>")
        for link in chat.locator("a").all():
            assert "javascript:" not in (link.get_attribute("href") or "")
        assert chat.locator("script, iframe, svg[onload], img[onerror]").count() == 0
        assert page.evaluate("window.hit") is None


CUT = """() => [...document.querySelectorAll('.narrow button')]
  .filter(button => button.scrollWidth > button.clientWidth + 1).map(button => button.innerText)"""


PAGES = pytest.mark.parametrize(
    ("kind", "ready", "labels"),
    [
        ("turns", "#box textarea", {"#send": "发送", "#option-mode": "生成方式"}),
        ("single", "#instruction textarea", {"#send": "生成", "#option-mode": "生成方式"}),
        ("training", "#train-name textarea", {"#train-start": "开始训练", "#train-bits": "基座模型位数"}),
    ],
)


@PAGES
def test_english_on_a_phone(browser, tmp_path, kind, ready, labels):
    phone = {"viewport": {"width": 390, "height": 844}}
    with (
        serving(kind, tmp_path / ("a_long_name_" * 6), "--max_new_tokens=20") as server,
        opened(browser, server, ready, **phone) as page,
    ):
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate(CUT) == [], "a button is narrower than its words"
        if kind == "turns":
            page.check("#compare input")
            ask(page, "a_long_word_" * 20)
            finished(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390


@PAGES
def test_chinese_dark_and_on_a_phone(browser, tmp_path, kind, ready, labels):
    """The page works in Chinese, light and dark, and at 390 pixels nothing is wider than the screen."""
    folder = tmp_path / ("a_long_name_" * 6)
    with serving(kind, folder, "--lang=zh", "--mode=greedy", "--max_new_tokens=20") as server:
        phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
        with opened(browser, server, ready, **phone) as page:
            for place, label in labels.items():
                expect(page.locator(place)).to_contain_text(label)
            assert page.evaluate("document.body.classList.contains('dark')")
            page.click("#dark")
            assert not page.evaluate("document.body.classList.contains('dark')")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            assert page.evaluate(CUT) == [], "a button is narrower than its words"
            if kind == "turns":
                ask(page, "你好")
                finished(page)
                assert "词元/秒" in status(page)
