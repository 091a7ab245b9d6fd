"""The training window's page in a real browser: comparing and prolonging runs, memory, and hostile texts.

A whole training, watched, stopped and continued, is in test_studio.py.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from onecard.runs import folder as runs_folder
from onecard.runs import jobs
from tests.support import tiny
from tests.support.browser import WAIT
from tests.support.small_runs import planted, trained
from tests.support.training_page import visited, windows

TAG = "<img src=x onerror=window.hit=1>"  # without a slash it can be the name of a file
BAD = f"{TAG}<script>window.hit=2</script><svg onload=window.hit=3>[a](javascript:window.hit=4)"
LIVE = ".gradio-container :is(img[onerror], script, svg[onload], iframe, a[href^='javascript:' i])"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model, one_thread) -> Path:
    """A working folder with a model, rows and runs, some with texts that no browser should run."""
    folder = tmp_path_factory.mktemp("place")
    workspace = folder / "lora-checkpoints"
    shutil.copytree(tiny_model, folder / "tiny")
    tiny.save_rows(folder / "rows.json", 24)
    for name, steps in (("first", 3), ("second", 5)):
        log = planted(workspace, name, steps) / runs_folder.LOG
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": steps, "eval_loss": 0.25}) + "\n")
    with contextlib.chdir(folder):  # the run stores paths as the window writes them
        trained("tiny", "rows.json", Path("lora-checkpoints/short"), max_steps=2)
    rows = [{"instruction": BAD, "input": BAD, "output": BAD}, {BAD: BAD}]
    (folder / f"{TAG}.json").write_text(json.dumps(rows), encoding="utf-8")
    options = {"model_path": BAD, "data_path": BAD, "template": BAD, "sample_prompts": BAD}
    hostile = planted(workspace, "hostile", options=options, begun_from=BAD)
    answer = {"instruction": BAD, "input": BAD, "answer": BAD}
    lines = [json.dumps({"step": step, "answers": [answer]}) for step in (0, 3)]
    (hostile / runs_folder.SAMPLES).write_text("\n".join([*lines, ""]), encoding="utf-8")
    start = f"=== 2020-01-01 10:00:00 {BAD}\n"
    jobs.console_of(hostile).write_text(f"{start}error: {BAD}\n", encoding="utf-8")
    jobs.console_of(workspace / TAG).write_text(f"{start}error: {BAD}\n", encoding="utf-8")
    (workspace / TAG).mkdir()
    shutil.copy(hostile / runs_folder.CONFIG, workspace / TAG)
    return folder


@pytest.fixture(scope="module")
def address(place) -> Iterator[str]:
    with windows(place) as begin:
        yield begin()[1]


LINES = """() => [...document.querySelectorAll('#train-plots .oc-plot')].map(plot => ({
  title: plot.querySelector('.oc-title').innerText,
  keys: [...plot.querySelectorAll('.oc-keys span')].map(key => key.innerText.trim()),
  colours: [...plot.querySelectorAll(':scope > svg :is(polyline, circle)')].map(line => {
    const box = line.getBoundingClientRect();
    return box.width > 0 && box.bottom > 0 ? getComputedStyle(line).stroke : 'unseen';
  }),
}))"""


def test_earlier_runs_are_laid_over_the_chosen_one(browser, address):
    """Each plot has the curves of both runs in different colours, named with their last values."""
    with visited(browser, address) as page:
        page.choose(run="first", others="second")
        expect(page.page.locator("#train-plots .oc-keys").first).to_contain_text("second")
        plots = {plot["title"]: plot for plot in page.page.evaluate(LINES)}
        loss = plots["Loss (nats per target token)"]
        named = ["first training 0.3333", "first validation 0.25", "second training 0.2"]
        assert loss["keys"] == [*named, "second validation 0.25"]
        one, two, *rest = loss["colours"][0], loss["colours"][2], *loss["colours"]
        assert rest == [one, one, two, two]
        assert one != two
        assert "unseen" not in rest
        speed = plots["Speed (tokens/s)"]
        assert speed["keys"] == ["first 5", "second 5"]
        assert speed["colours"] == [one, two]
        assert "first training: 0.3333 (3)\nfirst validation: 0.25 (3)\nsecond training: 0.3333 (3)" in (
            page.page.locator("#train-plots .oc-plot").first.inner_html()
        )
        page.page.locator("#train-others").get_by_role("button", name="Remove").first.click()
        expect(page.page.locator("#train-plots")).not_to_contain_text("second")
        assert page.page.evaluate(LINES)[0]["keys"] == ["training 0.3333", "validation 0.25"]


def test_a_finished_run_goes_on_up_to_an_epoch(browser, address):
    """A run planned by steps goes on to an epoch; a wrong or too small number of epochs is reported."""
    with visited(browser, address) as page:
        page.choose(run="short")
        assert page.wait("finished") == 2
        for wrong in ("0", "x", "-1"):
            page.fill(longer=wrong)
            page.press("continue")
            expect(page.page.locator("#train-done [role=alert]")).to_contain_text(f"{wrong}")
            expect(page.page.locator("#train-done")).to_contain_text("Epochs (--num_epochs)")
        page.fill(longer="1")
        page.press("continue")
        expect(page.page.locator("#train-longer :is(input, textarea)")).to_have_value("")
        page.wait("starting")
        expect(page.page.locator("#train-done")).to_contain_text(" goes on.")  # while it does
        assert page.wait("finished", 4) == 4
        expect(page.page.locator("#train-done")).to_have_text("")
        expect(page.page.locator("#train-card")).to_contain_text("step 4 of 4")
        page.fill(longer="0.5")
        page.press("continue")
        page.wait("failed")
        expect(page.page.locator("#train-card")).to_contain_text("num_epochs 1.0 -> 0.5")


def test_memory_is_predicted_in_the_page(browser, address):
    """The prediction appears once a local model is named, and changes with each option that matters."""
    with visited(browser, address) as page:
        memory = page.page.locator("#train-memory")
        page.fill(model_path="tiny")
        page.page.get_by_text("All options").click()
        page.fill(device="cpu")
        expect(memory).to_contain_text("Predicted peak memory: ", timeout=WAIT)  # it imports torch
        expect(memory).to_contain_text("free on cpu")
        before = memory.inner_text()
        page.fill(cutoff_len=64)
        expect(memory).not_to_have_text(before)
        expect(memory).to_contain_text("Predicted peak memory: ")
        page.fill(model_path="owner/not-here")
        expect(memory).to_contain_text("Memory is not predicted: owner/not-here is not on this machine yet.")


def test_no_text_of_others_runs_as_script(browser, address):
    """W9: names, rows, answers, options, consoles and errors are shown as they are written."""
    with visited(browser, address) as page:
        browser_page = page.page

        def harmless(place: str, text: str = TAG) -> None:
            expect(browser_page.locator(f"#train-{place}")).to_contain_text(text, timeout=WAIT)
            browser_page.wait_for_timeout(100)  # a handler would run now
            assert browser_page.locator(LIVE).count() == 0, place
            assert browser_page.evaluate("window.hit") is None, place

        browser_page.on("dialog", lambda dialog: dialog.dismiss())
        page.choose(run="hostile", others="hostile")
        harmless("card", f"error: {BAD}")
        harmless("answers", BAD)
        page.press("reuse")
        harmless("done", "Copied into the form.")
        expect(browser_page.locator("#train-model_path :is(input, textarea)")).to_have_value(BAD)
        harmless("memory", BAD)
        page.press("preview")
        harmless("rows", BAD)
        page.press("start")
        harmless("started", "run-1 has started.")
        page.wait("failed")  # the trainer got all of these texts
        harmless("card", "error: ")
        harmless("card")
        browser_page.reload()
        browser_page.click("#train-data_path input")
        browser_page.get_by_role("option", name=TAG).click()
        page.fill(model_path="tiny", cutoff_len=2000)
        page.press("preview")
        harmless("rows", f"{TAG}.json")
        harmless("rows", BAD)
        assert browser_page.locator("#train-rows .oc-row").count() == 2
        page.fill(name=BAD)
        page.press("start")
        harmless("started")
        page.fill(template=BAD)
        page.press("preview")
        harmless("rows", f"There is no template called {BAD!r}. Choose from: auto, ")
        page.fill(lora_target_modules=TAG)
        harmless("memory")
        browser_page.fill("#train-run input", BAD)
        browser_page.keyboard.press("Enter")
        harmless("card", "No run yet.")
        browser_page.fill("#train-others input", BAD)
        browser_page.keyboard.press("Enter")
        harmless("card", "No run yet.")
        upload = {"name": f"{TAG}.json", "mimeType": "application/json", "buffer": b"[]"}
        browser_page.set_input_files("input[type=file]", upload)
        expect(browser_page.locator("#train-data_path input")).to_have_value(re.compile(r"uploads/img_src_x"))
        harmless("card", "No run yet.")
