"""llama.cpp may die in the middle of an answer: the program says why, and the next question is answered.

The real thing happens to a real file: it is cut while it is mapped and an answer grows.
"""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from onecard.config import options as config_options
from onecard.config.chat import ChatConfig
from onecard.config.generation import GREEDY, Generation
from onecard.data import conversation as data_conversation
from onecard.data import template as data_template
from onecard.errors import CHECKPOINT, MEMORY, USAGE, UserError
from onecard.inference import chat as inference_chat
from onecard.inference import gguf_check, llama_cpp_model
from onecard.inference.chat import Chat
from onecard.inference.llama_cpp_engine import Engine
from onecard.ui import sessions as ui_sessions
from onecard.ui import status as ui_status
from onecard.ui import terminal
from onecard.ui.terminal_session import Session
from tests.support import tiny
from tests.support.pty_session import READY, Pty

pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra of its own: bash tools/setup.sh cpu")

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = Generation(GREEDY, repetition_penalty=1.0, min_new_tokens=40, max_new_tokens=40, seed=1)
PROMPT, CUT = [5, 6, 7, 8, 9, 10], 4096  # CUT: bytes that stay of a file that is cut while it is in use
SENT = r"\x1b\[\?2004l"  # the end of bracketed paste: the line was sent, and the answer follows
ACTIVE = [(), (("a", 1.0),), (("a", 0.5), ("b", 0.7))]


class Slow(Engine):
    """An engine whose answers take long enough to be stopped by hand."""

    def add(self, *what, **how) -> int:
        time.sleep(0.02)
        return super().add(*what, **how)


@pytest.fixture
def base(tiny_gguf, tmp_path) -> Path:
    """A GGUF file that a test may damage."""
    return Path(shutil.copy(tiny_gguf[0], tmp_path / "base.gguf"))


def talk_of(base: Path, adapters: dict[str, Path], kind: type[Engine] = Engine) -> Chat:
    engine = kind(base, tiny.tokenizer(), 512, adapters, threads=1, exact=True)
    return Chat(engine, engine.tokenizer, data_template.load("alpaca", engine.tokenizer))


@pytest.fixture
def talk(base, tiny_gguf) -> Iterator[Chat]:
    chat = talk_of(base, tiny_gguf[1])
    yield chat
    chat.engine.close()


def answer(talk: Chat, during: Callable[[int], object] = lambda tokens: None, active=(("a", 1.0),)) -> str:
    """The answer to a question; during: is called after every token with their number so far."""
    text = ""
    for reply in talk.stream(data_conversation.single("Say red"), QUICK, active):
        during(reply.text.tokens)
        text = reply.text.whole
    return text


def pid_of(talk: Chat) -> int:
    return talk.engine.process.process.pid


def is_gone(pid: int, seconds: float = 20) -> bool:
    """Whether a process ends; a zombie that nobody reaps, as after its parent's death, counts as ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
            threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z" and threads == 1:  # while others end, nobody can wait for the process
            return True
        time.sleep(0.02)
    return False


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def cut(base: Path) -> None:
    os.truncate(base, CUT)


def killed_by(number: int) -> Callable[[Chat, Path], None]:
    return lambda talk, base: os.kill(pid_of(talk), number)


DEATHS = {  # how llama.cpp ends -> the exit code, and what the message says
    "cut": (
        lambda talk, base: cut(base),
        CHECKPOINT,
        r"ended with SIGBUS.* Restore the file, then try",
    ),
    "SIGKILL": (
        killed_by(signal.SIGKILL),
        MEMORY,
        r"ended with SIGKILL.*memory runs out. End other",
    ),
    "SIGSEGV": (killed_by(signal.SIGSEGV), CHECKPOINT, r"ended with SIGSEGV.* Try again"),
    "SIGABRT": (killed_by(signal.SIGABRT), CHECKPOINT, r"ended with SIGABRT.* Try again"),
}


@pytest.mark.parametrize("death", DEATHS)
def test_one_message_and_the_next_question_is_answered(talk, base, tiny_gguf, death):
    """The answer ends with the file's name and what to do; nothing of the dead process is left."""
    end, code, message = DEATHS[death]
    expected, before, pid = answer(talk), descriptors(), pid_of(talk)
    tokens: list[int] = []

    def die_at_ten(count: int) -> None:
        tokens.append(count)
        if count == 10:
            end(talk, base)

    with pytest.raises(UserError, match=message) as caught:
        answer(talk, die_at_ten)
    assert (caught.value.code, str(base) in str(caught.value)) == (code, True)
    assert max(tokens) >= 10
    assert not Path(f"/proc/{pid}").exists()
    if death == "cut":
        with pytest.raises(UserError, match=r"llama\.cpp cannot load it: ") as refused:
            answer(talk)
        assert (refused.value.code, str(base) in str(refused.value)) == (CHECKPOINT, True)
        shutil.copy(tiny_gguf[0], base)
    assert answer(talk) == expected
    assert (pid_of(talk) != pid, descriptors()) == (True, before)


def test_death_between_two_answers_costs_nothing(talk):
    """The next question loads the file again, and says so and why."""
    expected = answer(talk)
    before = descriptors()
    os.kill(pid_of(talk), signal.SIGKILL)
    assert is_gone(pid_of(talk))
    replies = list(talk.stream(data_conversation.single("Say red"), QUICK, (("a", 1.0),)))
    assert (replies[0].loading, replies[-1].text.whole) == (True, expected)
    assert {reply.ended for reply in replies} == {
        f"{talk.engine.path}: the process in which llama.cpp uses this file ended with SIGKILL."
    }
    for lang, word in (("en", "loaded again"), ("zh", "重新载入")):
        assert f"{word}" in (line := ui_status.describe(replies[-1], talk, lang))
        assert replies[0].ended in line
        assert replies[0].ended in ui_status.describe(replies[0], talk, lang)
    assert descriptors() == before, "the pipes of the dead child are closed"
    again = list(talk.stream(data_conversation.single("Say red"), QUICK, (("a", 1.0),)))
    assert {(reply.loading, reply.ended) for reply in again} == {(False, "")}


def test_who_has_no_answer_to_show_it_in_is_told_in_a_line(talk, capsys):
    """A measurement, and a chat through a pipe, whose answers are all that its output has."""
    list(talk.engine.each([3, 4, 5]))
    for ask in (
        lambda: list(talk.engine.each([3, 4, 5])),
        lambda: Session(talk, ChatConfig(mode="greedy", max_new_tokens=3), False).ask("red", []),
    ):
        os.kill(pid_of(talk), signal.SIGKILL)
        assert is_gone(pid_of(talk))
        ask()
        said = capsys.readouterr()
        assert (said.out + said.err).count("ended with SIGKILL. The model is loaded again.\n") == 1
    assert "SIGKILL" not in said.out


def test_who_waits_is_answered_although_the_first_is_not(talk):
    """Both asked at once; llama.cpp dies under the first answer."""
    expected, answers = answer(talk), []
    other = threading.Thread(target=lambda: answers.append(answer(talk)))

    def die(count: int) -> None:
        if count == 10:
            other.start()
            time.sleep(0.3)
            os.kill(pid_of(talk), signal.SIGKILL)

    with pytest.raises(UserError, match="SIGKILL"):
        answer(talk, die)
    other.join(60)
    assert answers == [expected]


def test_measuring_ends_with_the_message_too(talk):
    """Perplexity and the comparison of an export read a whole text at once."""
    parts = talk.engine.each([*range(2, 290)] * 2, (("b", 1.0),))
    next(parts)
    os.kill(pid_of(talk), signal.SIGKILL)
    with pytest.raises(UserError, match="SIGKILL"):
        list(parts)
    assert sum(len(part) for part in talk.engine.each(PROMPT)) == len(PROMPT)
    os.kill(pid_of(talk), signal.SIGKILL)
    with pytest.raises(UserError, match="SIGKILL"):
        talk.engine.encode("red")


def test_the_child_gives_what_the_library_gives(tiny_gguf):
    """The same file in this process: every score, bit by bit, and all that the file says of itself."""
    path, adapters = tiny_gguf
    engine = Engine(path, tiny.tokenizer(), 512, adapters, threads=1, exact=True)
    model = llama_cpp_model.Model(path, 512, adapters, 1, exact=True)
    length = 0

    def scores(ids: list[int]) -> bytes:
        nonlocal length
        (row,) = model.decode([(0, length, ids, 1)])
        length += len(ids)
        return row

    for active in ACTIVE:
        length = model.cut(0, 0)
        model.activate(dict(active))
        engine.forget()
        sequence = engine.open(PROMPT, active)
        assert list(sequence.read()) == [len(PROMPT)]
        ours, theirs = sequence.first(), scores(PROMPT)
        for _ in range(30):
            assert ours.numpy().tobytes() == theirs.tobytes()
            token = int(theirs.argmax())
            ours, theirs = sequence.advance([0], [token]), scores([token])
        sequence.close()
    model.cut(0, 0)
    rows = torch.cat(list(engine.each(PROMPT, ACTIVE[-1])))
    theirs = model.decode([(0, 0, PROMPT, len(PROMPT))])
    assert rows.numpy().tobytes() == b"".join(row.tobytes() for row in theirs)
    for text in ("red green", "<end>", "漢\U0001f642", ""):
        assert engine.encode(text) == model.encode(text)
    assert [engine.ends_with(token) for token in range(300)] == [model.ends_with(n) for n in range(300)]
    for key in ("general.architecture", "tokenizer.ggml.eos_token_id", "nothing"):
        assert engine.written(key) == model.written(key)
    with pytest.raises(RuntimeError, match=r"llama\.cpp: "):
        model.decode([(0, len(PROMPT), [1 << 20], 1)])
    sequence = engine.open([1 << 20])
    with pytest.raises(RuntimeError, match=r"llama\.cpp: "):
        list(sequence.read())  # an error of one step ends nothing
    sequence.close()
    assert engine.is_loaded
    assert sum(len(part) for part in engine.each(PROMPT)) == len(PROMPT)
    model.close()
    engine.close()


def test_the_child_needs_no_torch(talk):
    """It starts in a fraction of a second and takes no memory for what it does not use."""
    libraries = Path(f"/proc/{pid_of(talk)}/maps").read_text(encoding="utf-8")
    assert "libllama" in libraries
    assert "libtorch" not in libraries


def test_an_interrupted_request_answers_no_other(talk, monkeypatch):
    """Ctrl-C may come while the scores are on their way: they are not taken for those of the next token."""
    expected = answer(talk)

    class Interrupting:
        def __init__(self, pipe):
            self.close = pipe.close

        def fileno(self):
            raise KeyboardInterrupt

    def interrupt(count: int) -> None:
        if count == 10:
            monkeypatch.setattr(talk.engine.process, "replies", Interrupting(talk.engine.process.replies))

    with pytest.raises(KeyboardInterrupt):
        answer(talk, interrupt)
    assert answer(talk) == expected


@pytest.mark.parametrize("closed", [True, False])
def test_the_child_ends_with_its_parent(base, closed):
    """Whether the parent closes the engine or is killed."""
    reader, writer = os.pipe()
    parent = os.fork()
    if not parent:
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)
            chat = talk_of(base, {})
            os.write(writer, str(pid_of(chat)).encode())
            if closed:
                chat.engine.close()
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    os.close(writer)
    pid = int(os.read(reader, 20))
    os.close(reader)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == (0 if closed else -signal.SIGKILL)
    assert is_gone(pid)


def test_a_terminal_goes_on(base, tiny_gguf, tmp_path):
    """Ctrl-C stops the answer and not llama.cpp; a cut file costs one answer, and /retry repeats it."""
    settings = config_options.build(
        ChatConfig, {"mode": "greedy", "min_new_tokens": 200, "max_new_tokens": 200}
    )

    def run() -> None:
        terminal.talk(talk_of(base, tiny_gguf[1], Slow), settings)

    session = Pty(run, {"ONECARD_CACHE": str(tmp_path / "cache")})
    try:
        session.see(READY)
        session.line("red")
        session.see(rf"{SENT}.{{20}}", seconds=60)
        session.keys("\x03")
        session.see(r" · stopped\x1b\[0m")
        session.see(READY)
        session.line("green")
        session.see(rf"{SENT}.{{20}}")
        cut(base)
        session.see(r"error: .*?base\.gguf: the process .*?SIGBUS.*?/retry\s+asks it again")
        session.see(READY)
        session.line("/retry")
        session.see(r"error: .*?base\.gguf: llama\.cpp cannot load it")
        session.see(READY)
        shutil.copy(tiny_gguf[0], base)
        session.line("/retry")
        session.see("loading the model")
        session.see(r"200 tokens · .*?limit of new tokens", seconds=60)
        session.see(READY)
        session.line("/exit")
        assert session.code() == 0
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(session.pid, signal.SIGKILL)
            os.waitpid(session.pid, 0)


def test_a_window_goes_on(base, tiny_gguf):
    """Its engine loads at the first question; the status line shows the message and the text so far stays."""
    options = config_options.build(ChatConfig, {"model_path": str(base), "template": "alpaca", "threads": 1})
    chat = inference_chat.later(options, None, lambda device: [])
    sessions = ui_sessions.Sessions()

    def updates(during: Callable[[int], object] = lambda tokens: None) -> ui_sessions.AnswerUpdate:
        sessions.begin("page")
        conversation = data_conversation.single("Say red")
        for update in ui_sessions.answers(sessions, "page", chat, conversation, QUICK, (), "en"):
            during(update.text.tokens)
        sessions.end("page")
        return update

    expected = updates()
    assert not expected.is_error
    assert expected.text.tokens == 40
    talk_of_lazy = chat.engine.engine

    def slow(*what, **how) -> int:
        time.sleep(0.01)
        return Engine.add(talk_of_lazy, *what, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(talk_of_lazy, "add", slow)
        broken = updates(lambda tokens: cut(base) if 2 < tokens < 30 else None)
    assert broken.is_error
    assert "SIGBUS" in broken.message
    assert 2 < broken.text.tokens < 40
    refused = updates()
    assert (refused.is_error, refused.text.tokens) == (True, 0)
    assert f"{base}: llama.cpp cannot load it: " in refused.message
    shutil.copy(tiny_gguf[0], base)
    again = updates()
    assert (again.is_error, again.text.whole) == (False, expected.text.whole)
    chat.engine.close()


def test_a_library_that_cannot_be_loaded_is_named(base, tmp_path, monkeypatch):
    """The children find a package that fails; the message has the command that installs it."""
    broken = tmp_path / "packages" / "llama_cpp"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libllama.so: no such file')\n")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    passed = tmp_path / "passed"
    with monkeypatch.context() as whole:
        whole.delenv("PYTHONPATH")
        whole.setenv("ONECARD_CACHE", str(passed))
        gguf_check.check(base, [])
    for cache in (tmp_path / "new", passed):  # the file is checked now, or it was before
        monkeypatch.setenv("ONECARD_CACHE", str(cache))
        with pytest.raises(
            UserError, match=r"cannot be loaded \(libllama.*bash tools/setup\.sh cpu"
        ) as caught:
            talk_of(base, {})
        assert caught.value.code == USAGE
