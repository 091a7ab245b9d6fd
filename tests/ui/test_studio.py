"""The training window: answers during a training, trainings as processes, their files, and a browser."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import pytest

from onecard.config.options import build
from onecard.config.training import ContinueConfig, FinetuneConfig
from onecard.data import preview
from onecard.data import template as data_template
from onecard.errors import Stopped, UserError
from onecard.models import tokenizer as models_tokenizer
from onecard.runs import folder as runs_folder
from onecard.runs import jobs
from onecard.runs import log as runs_log
from onecard.system import commands, svg_plot
from onecard.training import loop, metrics
from onecard.ui import training_html, training_window
from tests.support import resume_cases, tiny
from tests.support.paths import ROOT
from tests.support.small_runs import planted, short_reply, trained
from tests.support.training_page import eventually, visited, windows


def samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / runs_folder.SAMPLES).read_text().splitlines()]


@pytest.mark.parametrize("bits", [16, 8])
def test_answers_on_the_way_change_nothing_that_is_learned(one_thread, tiny_model, tiny_rows, tmp_path, bits):
    """Log, adapters, optimizer and position are equal to the byte with and without --sample_steps."""
    plain = trained(tiny_model, tiny_rows, tmp_path / "plain", bits=bits)
    prompts = {"sample_steps": 4, "sample_prompts": "Say red | Say  blue 3"}
    sampled = trained(tiny_model, tiny_rows, tmp_path / "asked", bits=bits, **prompts)
    assert resume_cases.differences(resume_cases.outcome(plain), resume_cases.outcome(sampled)) == []
    assert not (plain / runs_folder.SAMPLES).exists()
    rounds = samples(sampled)
    assert [record["step"] for record in rounds] == [0, 4, 6]
    questions = [[answer["instruction"] for answer in record["answers"]] for record in rounds]
    assert questions == [questions[0]] * 3
    assert questions[0][-2:] == ["Say red", "Say  blue 3"]
    finished = json.loads((sampled / "finished.json").read_text())["answers"]
    assert len(finished) == 5
    for place, when in ((0, "before"), (-1, "after")):
        assert [a["answer"] for a in rounds[place]["answers"][:5]] == [a[when] for a in finished]


def test_answers_on_the_way_survive_a_stop(one_thread, tiny_model, tiny_rows, tmp_path):
    """A run that is stopped between checkpoints and continued has the rounds of answers of a straight run."""
    flags = {"sample_steps": 1, "save_steps": 3, "eval_steps": 100}
    whole = trained(tiny_model, tiny_rows, tmp_path / "whole", **flags)

    rounds = []

    def killed(*arguments):
        rounds.append(1)
        if len(rounds) == 4:  # after the rounds of steps 0, 1 and 2
            os.kill(os.getpid(), signal.SIGTERM)
        return short_reply(*arguments)

    folder = tmp_path / "stopped"
    with pytest.raises(Stopped):
        trained(tiny_model, tiny_rows, folder, killed, **flags)
    assert [record["step"] for record in samples(folder)] == [0, 1, 2]
    with open(folder / runs_folder.SAMPLES, "a", encoding="utf-8") as file:
        file.write('{"step": 99, "answers": []}\n{"step": 3, "ans')
    wish = build(ContinueConfig, {"output_path": str(folder)})
    loop.go_on(wish, frozenset({"output_path"}), short_reply, metrics.loss_curve)
    assert samples(folder) == samples(whole)
    assert resume_cases.differences(resume_cases.outcome(whole), resume_cases.outcome(folder)) == []


@pytest.mark.parametrize("prompts", ["|".join("abcdefghijklmnopq"), "x" * 501])
def test_long_lists_of_own_prompts_are_refused(prompts):
    """Their number and length are limited, because each round asks all of them."""
    with pytest.raises(Exception, match=r"--sample_prompts .* at most"):
        build(FinetuneConfig, {"sample_prompts": prompts})


# trainings as processes

SLEEPER = """
import json, sys, time
print("argv", json.dumps(sys.argv[1:]), flush=True)
time.sleep(30)
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("lora-checkpoints")


@pytest.fixture
def sleeper(tmp_path, monkeypatch) -> Iterator[Path]:
    """Replace `python -m onecard` by trainers that only sleep."""
    (tmp_path / "onecard").mkdir()
    (tmp_path / "onecard" / "__main__.py").write_text(SLEEPER)
    (tmp_path / "onecard" / "__init__.py").touch()
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    pids = []
    plain = subprocess.Popen
    monkeypatch.setattr(jobs.subprocess, "Popen", lambda *a, **k: pids.append(plain(*a, **k)) or pids[-1])
    yield tmp_path
    for process in pids:
        process.kill()
        process.wait()


HOSTILE = [
    "",
    "..",
    ".",
    "a/b",
    "../x",
    "/etc",
    "-x",
    "--x",
    ".hidden",
    "a b",
    "a\n",
    "a\0",
    "~",
    "a;b",
    "x" * 101,
]


@pytest.mark.parametrize("name", [*HOSTILE, None, 7, "$(id)", "a\\b", "学" * 34])
def test_a_run_is_named_by_one_plain_word(workspace, name):
    """Each function refuses any other name before it touches a file."""
    for way in (
        lambda: jobs.start(workspace, name, FinetuneConfig()),
        lambda: jobs.go_on(workspace, name),
        lambda: jobs.stop(workspace, name),
        lambda: jobs.state(workspace, name),
    ):
        with pytest.raises(UserError, match="cannot be the name"):
            way()
    assert not workspace.exists()


@pytest.mark.parametrize("name", ["run-1", "a.b_c-d", "_x", "训练1", "x" * 100])
def test_plain_words_are_names(workspace, name):
    """A name may have letters of any script, digits and three other characters."""
    assert jobs.folder_of(workspace, name) == workspace / name


@pytest.mark.parametrize(
    "option", ["data_path", "eval_data_path", "model_path", "lora_path", "peft_config", "template"]
)
@pytest.mark.parametrize(
    "path",
    [
        "../rows.json",
        "a/../../b",
        "/etc/passwd",
        "~/rows.json",
        "~root",
        "--x",
        "-x",
        "a\nb",
        "a\0",
        "ok,/etc",
        "http://127.0.0.1/rows.json",
        "ok, hf://owner/name",
        "file:///etc/passwd",
    ],
)
def test_paths_stay_inside(workspace, sleeper, option, path):
    """An option with a path outside of the folder is refused, and nothing is started."""
    options = dataclasses.replace(FinetuneConfig(), **{option: path})
    with pytest.raises(UserError, match=f"--{option} .* not open"):
        jobs.start(workspace, "run", options)
    assert not workspace.exists()


def test_paths_inside_are_open(workspace, tmp_path):
    """Allowed are files below this folder, several with weights, names on the hub, and uploads."""
    uploads = workspace / jobs.UPLOADS
    for path in (
        "sample/a.json:2,b.csv",
        str(tmp_path / "a.json"),
        "owner/name",
        f"{uploads.absolute()}/x.json",
    ):
        jobs.check_paths(dataclasses.replace(FinetuneConfig(), data_path=path), uploads)


def test_an_upload_is_kept_under_a_harmless_name(workspace, tmp_path):
    """An upload is copied into the workspace under a harmless name; a file without rows is refused."""
    source = tmp_path / "--a b;$(id)..json"
    source.write_text("[]")
    copy = jobs.keep_upload(source, workspace)
    assert copy.parent == workspace / jobs.UPLOADS
    assert copy.name.startswith("a_b__")
    assert jobs.keep_upload(source, workspace) == copy
    jobs.check_paths(dataclasses.replace(FinetuneConfig(), data_path=str(copy)), workspace / jobs.UPLOADS)
    (tmp_path / "x.py").write_text("")
    with pytest.raises(UserError, match="not a file of rows"):
        jobs.keep_upload(tmp_path / "x.py", workspace)


def test_options_reach_the_trainer_as_values(workspace, sleeper):
    """Each changed option is passed as one --name=value, so that a value never becomes an option."""
    text = "a | --overwrite"
    options = dataclasses.replace(
        FinetuneConfig(), sample_prompts=text, seed=7, rslora=True, data_path="a b.json"
    )
    jobs.start(workspace, "run", options)
    console = jobs.console_of(workspace / "run")
    eventually(lambda: "argv" in console.read_text())
    words = ["finetune", "--data_path=a b.json", "--rslora=true", "--seed=7", f"--sample_prompts={text}"]
    words.append(f"--output_path={workspace / 'run'}")
    line = next(line for line in console.read_text().splitlines() if line.startswith("argv "))
    assert sorted(json.loads(line.removeprefix("argv "))) == sorted(words)


def test_a_second_start_is_refused(workspace, sleeper):
    """Of many simultaneous starts one succeeds; another process's lock and an earlier run are respected."""
    refused = []

    def window() -> None:
        try:
            jobs.start(workspace, "run", FinetuneConfig())
        except UserError as error:
            refused.append(str(error))

    windows = [threading.Thread(target=window) for _ in range(6)]
    for thread in windows:
        thread.start()
    for thread in windows:
        thread.join()
    assert len(refused) == 5
    assert all("is being trained already" in text for text in refused)
    state = jobs.state(workspace, "run")
    assert (state.kind, state.going) == (jobs.STARTING, True)
    (workspace / "other").mkdir()
    with open(workspace / "other" / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(os.getpid()))
        lock.flush()
        with pytest.raises(UserError, match=f"process {os.getpid()} is training there"):
            jobs.start(workspace, "other", FinetuneConfig())
        assert jobs.state(workspace, "other").pid == os.getpid()
    planted(workspace, "earlier")
    with pytest.raises(UserError, match="earlier run"):
        jobs.start(workspace, "earlier", FinetuneConfig())
    with pytest.raises(UserError, match="no run to continue"):
        jobs.go_on(workspace, "nothing")


def test_a_trainer_that_has_not_begun_can_be_stopped(workspace, sleeper):
    """Such a trainer is found by its console file, and after the stop its name is free again."""
    jobs.start(workspace, "run", FinetuneConfig())
    pid = jobs.state(workspace, "run").pid
    assert os.getpgid(pid) == pid != os.getpgid(0)
    jobs.stop(workspace, "run")
    eventually(lambda: not jobs.state(workspace, "run").going)
    assert jobs.state(workspace, "run").kind == jobs.STOPPED
    with pytest.raises(UserError, match="not being trained"):
        jobs.stop(workspace, "run")
    jobs.start(workspace, "run", FinetuneConfig())
    assert jobs.state(workspace, "run").kind == jobs.STARTING


def test_who_is_trained_on_a_device(workspace, sleeper):
    """These are the running ones there and those that have just begun, which might be anywhere."""
    assert jobs.training_on(workspace, "cpu") == []
    planted(workspace, "ended")
    for number, device in enumerate(("cpu", "cuda:0", "cuda:1", None)):
        jobs.start(workspace, f"run-{number}", FinetuneConfig())
        if device:
            folder = planted(workspace, f"run-{number}")
            stored = {"options": {}, "resolved": {"device": device}}
            (folder / runs_folder.CONFIG).write_text(json.dumps(stored))
    for device, names in (("cpu", "03"), ("cuda:0", "13"), ("cuda:1", "23"), ("all", "123"), ("cuda", "13")):
        assert sorted(jobs.training_on(workspace, device)) == [f"run-{name}" for name in names]


def test_a_stale_lock_is_nobodys(workspace):
    """With the pid of a dead process, of one without the lock, or nonsense in it, nobody trains there."""
    folder = planted(workspace, "run")
    for pid in ("999999999", str(os.getpid()), "", "-1", "0", "x", "9" * 30):
        (folder / ".lock").write_text(pid)
        state = jobs.state(workspace, "run")
        assert (state.kind, state.step, state.total) == (jobs.STOPPED, 3, 5)
        with pytest.raises(UserError, match="not being trained"):
            jobs.stop(workspace, "run")


def test_how_a_run_stands_is_read_from_its_files(workspace):
    """A run can be new, failed, killed, stopped, finished, or continued later without a window."""
    assert jobs.state(workspace, "run").kind == jobs.NEW
    folder = planted(workspace, "run")
    console = jobs.console_of(folder)
    start = "=== 2020-01-01 10:00:00 finetune.py\n=== process 1\n"

    def state_after(text: str) -> jobs.State:
        console.write_text("error: of an earlier start\n" + start + text)
        return jobs.state(workspace, "run")

    failed = state_after("rows 5\nerror: something is wrong.\n")
    assert (failed.kind, failed.said.splitlines()[-1]) == (jobs.FAILED, "error: something is wrong.")
    assert "earlier" not in failed.said
    assert state_after("Traceback (most recent call last)\n  x\nKeyError: 1\n").kind == jobs.FAILED
    killed = state_after("step 3/5\r 60%\rstep 4/5")
    assert (killed.kind, killed.said.splitlines()[0]) == (jobs.FAILED, "step 4/5")
    assert "It may have been killed." in killed.said
    assert state_after("error: in a row\nstopped by SIGTERM.\n").kind == jobs.STOPPED
    assert state_after(f"step 1\n{jobs.STOP_NOTE}\n").kind == jobs.STOPPED
    state_after("step 3/5")
    later = time.time() + 5
    os.utime(folder / runs_folder.LOG, (later, later))
    assert jobs.state(workspace, "run").kind == jobs.STOPPED
    (folder / runs_folder.FINISHED).write_text("{}")
    assert state_after("error: in a row\nall is well\n").kind == jobs.FINISHED
    jobs.console_of(workspace / "failed").write_text(f"{start}error: no such file\n")
    jobs.console_of(workspace / "deleted").write_text(f"{start}step 5\n")
    assert sorted(jobs.names(workspace)) == ["failed", "run"]
    assert jobs.state(workspace, "deleted").kind == jobs.STOPPED
    assert jobs.free_name(workspace) == "run-1"
    (folder / runs_folder.CONFIG).write_text('{"options": {}, "resolved": {"total_steps": "<script>"}}')
    assert jobs.state(workspace, "run").total is None
    (folder / runs_folder.CONFIG).write_text("{")
    assert jobs.state(workspace, "run").kind == jobs.FINISHED


def test_memory_is_predicted_from_the_form(workspace, tiny_model, tmp_path):
    """The prediction uses the form's options and a local model, or a message says why there is none."""
    shutil.copytree(tiny_model, tmp_path / "tiny")
    with gr.Blocks():
        training = training_window.TrainingWindow("en", workspace)

    def predicted(**changes) -> str:
        values = {name: training.layout.fields[name].default for name in training.layout.inputs}
        return training.form.predict_memory(
            *{**values, "model_path": "tiny", "device": "cpu", **changes}.values()
        )

    assert "Predicted peak memory: " in predicted()
    assert "weights 0.00" in predicted()
    assert predicted(batch_size=2, cutoff_len=64) != predicted()
    assert "elsewhere/model is not on this machine yet" in predicted(model_path="elsewhere/model")
    assert "which this model does not have" in predicted(lora_target_modules="x_proj")
    assert "not open to this window" in predicted(model_path=str(tiny_model.parent / ".." / "x"))
    assert "must be 1 or more" in predicted(batch_size=0)


# reading and showing the files of runs


def test_curves_grow_with_the_log_and_go_back_with_it(workspace):
    """Half a line waits for its rest, damaged lines are skipped, and a log that was cut is read again."""
    folder = planted(workspace, "run")
    curves = runs_log.Curves(folder)
    curves.refresh()
    assert curves.points["loss"] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert curves.latest()["speed"] == 5.0
    log = folder / runs_folder.LOG
    with open(log, "ab") as file:
        file.write(
            b'\xff\xfe\n[1]\n{"step": "4"}\n{"step": true}\n{"step": 4, "loss": "nan"}\n{"step": 5, "lo'
        )
    curves.refresh()
    assert curves.points["loss"][-1] == (3, 1 / 3)
    assert runs_log.last_step(folder) == 4
    with open(log, "ab") as file:
        file.write(b'ss": 0.25}\n{"step": 5, "eval_loss": 0.5}\n')
    curves.refresh()
    assert curves.points["loss"][-1] == (5, 0.25)
    assert curves.points["eval_loss"] == [(5, 0.5)]
    runs_folder.cut_log(folder, 2)
    curves.refresh()
    assert curves.points["loss"] == [(1, 1.0), (2, 0.5)]
    assert curves.thinned("loss", 1) == [(2, 0.75)]
    log.unlink()
    curves.refresh()
    assert curves.points["loss"] == []
    assert runs_log.last_step(folder) == 0


def test_answers_are_those_of_the_rounds_or_of_the_end(workspace):
    """Damaged records are skipped; a finished run without rounds has the answers before and after."""
    folder = planted(workspace, "run")
    assert runs_log.samples(folder) == {}
    answer = {"instruction": "a", "input": "", "before": "x", "after": "y"}
    (folder / runs_folder.FINISHED).write_text(json.dumps({"steps": 5, "answers": [answer]}))
    assert {step: items[0]["answer"] for step, items in runs_log.samples(folder).items()} == {0: "x", 5: "y"}
    lines = ['{"step": 4, "answers": [{"instruction": "q", "answer": 7}]}', '{"step": 0, "answers": []}']
    (folder / runs_folder.SAMPLES).write_text(
        "\n".join([*lines, '{"step": 9, "answers": [1]}', '{"step": 8'])
    )
    assert runs_log.samples(folder) == {0: [], 4: [{"instruction": "q", "input": "", "answer": "7"}]}


def test_nothing_that_is_shown_becomes_a_tag(workspace, tiny_model):
    """Rows, answers, names, messages and logs are shown as text, whatever they contain."""
    bad = "<script>alert(1)</script><img src=x onerror=y>"
    Path("rows.json").write_text(
        json.dumps([{"instruction": bad, "input": "", "output": bad}, {"x": bad}]), encoding="utf-8"
    )
    options = dataclasses.replace(
        FinetuneConfig(), data_path="rows.json", model_path=str(tiny_model), cutoff_len=2000
    )

    def load(model_path: str, name: str):
        tokenizer = models_tokenizer.load_tokenizer(model_path)
        return tokenizer, data_template.load(name, tokenizer)

    rows = preview.first_rows(options, load, 5)
    assert len(rows) == 2
    page = training_html.rows(rows, "en")
    answers = [{"instruction": bad, "input": bad, "answer": bad}]
    page += training_html.answers(answers, answers, (bad, bad), "zh")
    page += training_html.note(bad, True) + training_html.card(
        bad, jobs.State(jobs.FAILED, 1, 2, None, bad), {}, "en"
    )
    page += svg_plot.plot(bad, [svg_plot.Line(bad, [(1, 2.0)], 0)])
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;") >= 9
    marked = training_html.rows(rows, "en").split("<mark>")[2]
    assert marked.startswith("&lt;script&gt;")


@pytest.mark.parametrize(
    "points",
    [[(0, 0.0)], [(1, 5.0), (2, 5.0)], [(0, -1.0), (10**6, 1e-9)], [(n, n**3) for n in range(300)], []],
)
def test_any_curve_can_be_drawn(points):
    """One point, a flat line, tiny and large numbers and no points at all can be drawn."""
    for from_zero in (True, False):
        plot = svg_plot.plot("t", [svg_plot.Line("a", points, 0)], from_zero)
        assert "nan" not in plot
        assert ("<svg" in plot) == bool(points)


# a real browser


@pytest.fixture
def window(tmp_path) -> Iterator:
    with windows(tmp_path) as begin:
        yield begin


def test_a_training_in_the_browser(window, browser, tiny_model, tmp_path):
    """A training is started, watched, attached to by a second window, stopped, continued and finished."""
    shutil.copytree(tiny_model, tmp_path / "tiny")
    (tmp_path / "sample").mkdir()
    shutil.copy(ROOT / "sample" / "instruct.json", tmp_path / "sample")
    tiny.save_rows(tmp_path / "rows.json", 24)
    first, url = window()
    with visited(browser, url) as page:
        page.fill(model_path="tiny", batch_size=0)
        page.press("start")
        page.page.get_by_text("Rows per step (--batch_size) 0: must be 1 or more.").wait_for()
        assert not (tmp_path / "lora-checkpoints").exists()
        page.page.get_by_text("All options").click()
        page.choose(bits="16", dtype="fp32")
        page.fill(batch_size=4, num_epochs=20, device="cpu", test_size=2, eval_steps=30)
        page.fill(data_path="rows.json", sample_steps=40, sample_prompts="Say red", name="mine")
        page.press("start")
        page.page.get_by_text("mine has started.").wait_for()
        page.fill(data_path="sample/instruct.json")
        page.press("preview")
        learned = page.page.locator("#train-rows .oc-row mark").first
        learned.wait_for()
        assert learned.inner_text().startswith("Answer: Trim the stems")

        folder = tmp_path / "lora-checkpoints" / "mine"
        pid = jobs.state(folder.parent, "mine").pid
        eventually(lambda: runs_log.last_step(folder) >= 1, 90)
        os.kill(pid, signal.SIGSTOP)  # the tiny run would end between two looks at the page
        seen = page.wait("running", 1)
        os.kill(pid, signal.SIGCONT)
        first.send_signal(signal.SIGKILL)
        first.wait()
        eventually(lambda: runs_log.last_step(folder) >= seen + 2)
        os.kill(pid, signal.SIGSTOP)
    _, url = window()
    with visited(browser, url) as page:
        seen = page.wait("running", seen + 2)
        assert page.page.input_value("#train-run input") == "mine"
        os.kill(pid, signal.SIGCONT)
        eventually(lambda: runs_log.last_step(folder) > seen)
        os.kill(pid, signal.SIGSTOP)
        seen = page.wait("running", seen + 1)
        page.press("stop")
        page.page.get_by_text("The training saves a checkpoint, then stops.").wait_for()
        os.kill(pid, signal.SIGCONT)
        saved = page.wait("stopped", seen)
        assert (folder / f"checkpoint-{saved}").is_dir()
        assert not jobs.state(folder.parent, "mine").going

        page.press("continue")
        page.wait("starting")
        page.wait("finished", 120)
        assert page.page.locator("#train-plots polyline").count() >= 5  # loss twice, accuracy, rate, speed
        answers = page.page.locator("#train-answers")
        answers.get_by_text("After step 120").first.wait_for()
        assert answers.get_by_text("Say red").count() >= 1
        page.page.fill("#train-step input[type=number]", "0")
        page.page.keyboard.press("Enter")
        answers.get_by_text("After step").first.wait_for(state="detached")
        assert answers.get_by_text("Base model").count() == 3
