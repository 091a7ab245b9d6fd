"""llama.cpp in a child process: whatever ends it, the program that asked goes on with one clear message.

A file that becomes shorter while it is mapped ends its process with SIGBUS, a failed check of llama.cpp with
SIGABRT, and the system kills the largest process when memory runs out. The child is therefore another
process; llama_cpp_engine.py starts a new one for the next question. A child that does not answer within a
time that is generous for its work is killed, so it counts as one that has ended.

Parent and child speak through two pipes. A request is one line of JSON: the name of a function of
llama_cpp_model.Model and its arguments. A reply is one line of JSON; the scores that were asked for follow it
as plain bytes (fp32).
The child has a session of its own, so a Ctrl-C in the terminal does not reach it, and it ends when the parent
has closed its end of the pipe or has died.
The child: `python -m onecard.inference.llama_cpp_process`.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from onecard.errors import CHECKPOINT, MEMORY, UserError, is_out_of_memory
from onecard.inference import gguf_check
from onecard.inference.gguf_check import NO_BACKTRACE
from onecard.inference.llama_cpp_model import Model, Part
from onecard.system import sandbox

PIPE_BYTES = 1 << 20  # of the pipe for scores; one row of a large vocabulary fits
MOST_PARTS = 512  # that are written at once; Linux takes at most 1024
LIVES = 5  # seconds that a child may take to end after its pipes were closed by a failure
LINE = 1 << 16  # bytes of a reply that are read at once until its line ends
# a child may work on a request for STEP seconds, TOKEN more for each token of it, and the time in which a
# slow disk reads the files; the first request loads them and may take as long as gguf_check allows
STEP, TOKEN = 20.0, 1.0
CALLS = (
    "cut",
    "copy",
    "activate",
    "encode",
    "ends_with",
    "written",
)  # functions of Model whose results are JSON
WHY: dict[int, str] = {  # signal -> what has probably happened, and what the user can do
    signal.SIGBUS: "The file became shorter, or its disk failed. Restore the file, then try again.",
    signal.SIGKILL: "The system does that when memory runs out. End other programs, then try again.",
}
TRY_AGAIN = "Try again: the file is checked and loaded anew."


class ModelProcess:
    """A llama_cpp_model.Model in a child process. One thread at a time gets an answer; the others wait."""

    def __init__(
        self,
        gguf: Path,
        context: int,
        adapters: Mapping[str, Path],
        threads: int,
        exact: bool = False,
        sequences: int = 1,
    ):
        """Start the child and load the model; the arguments and errors are those of Model.

        This and every other call raise UserError when the child ends or does not answer: exit 6 when it was
        killed, as the system does when memory runs out, and exit 4 for other reasons.
        """
        self.gguf, self.lock = gguf, threading.Lock()
        self.death: UserError | None = None  # what every call raises once the child has ended
        self.complaints: IO[str] = tempfile.TemporaryFile(  # noqa: SIM115 (open as long as the child lives)
            "w+", encoding=sandbox.UTF8, errors="replace"
        )
        self.process = sandbox.start_server(__name__, stderr=self.complaints, **NO_BACKTRACE)
        assert self.process.stdin
        assert self.process.stdout
        self.requests, self.replies = self.process.stdin, self.process.stdout
        _widen(self.replies.fileno())
        files = {name: str(path.absolute()) for name, path in adapters.items()}
        path = str(gguf.absolute())
        self.reading = sum(Path(file).stat().st_size for file in (path, *files.values())) / gguf_check.SPEED
        try:
            sizes = self._call(
                "load",
                seconds=gguf_check.SECONDS + self.reading,
                gguf=path,
                context=context,
                adapters=files,
                threads=threads,
                exact=exact,
                sequences=sequences,
            )
        except BaseException:
            self.close()
            raise
        self.entries: int = sizes["entries"]
        self.context: int = sizes["context"]

    @property
    def is_alive(self) -> bool:
        return self.death is None and self.process.poll() is None

    def ended_by_itself(self) -> UserError | None:
        """Why the child has ended, if no call has raised it yet; what this process has of it is freed."""
        with self.lock:
            if self.is_alive or self.death:
                return None
            self.death = self._why_it_ended()
            self.close()
            return self.death

    def cut(self, sequence: int, length: int) -> int:
        """Keep the first `length` tokens of a sequence; returns how many stay: `length`, or 0."""
        return int(self._call("cut", sequence=sequence, length=length))

    def copy(self, source: int, target: int, length: int) -> int:
        """Let `target` hold the first `length` tokens of another sequence; returns how many it holds."""
        return int(self._call("copy", source=source, target=target, length=length))

    def activate(self, active: Mapping[str, float]) -> None:
        """Let these adapters, name -> weight, be the active ones."""
        self._call("activate", active=dict(active))

    def decode(self, parts: Sequence[Part], rooms: Iterable[memoryview]) -> None:
        """Add the ids of the parts to the context, and write the scores that they need into `rooms`.

        rooms: for each part that needs scores, the bytes of [rows, V] in fp32. Raises MemoryError or
        RuntimeError as Model does; then the sequences of the parts are in no known state.
        """
        seconds = STEP + self.reading + TOKEN * sum(len(part.ids) for part in parts)
        self._call("decode", rooms, seconds, parts=parts)

    def encode(self, text: str) -> list[int]:
        """Ids of a text by the vocabulary in the file, without BOS; names of added tokens become tokens."""
        ids: list[int] = self._call("encode", text=text)
        return ids

    def ends_with(self, token: int) -> bool:
        """Whether this token ends an answer in llama.cpp."""
        return bool(self._call("ends_with", token=token))

    def written(self, key: str) -> str | None:
        """An entry of the metadata in the file, as text; None when there is no such key."""
        text: str | None = self._call("written", key=key)
        return text

    def close(self) -> None:
        """End the child, which has nothing to save, and free what this process has of it."""
        self.death = self.death or UserError(f"{self.gguf}: llama.cpp was ended.", TRY_AGAIN)
        self.process.kill()
        self.process.wait()
        self.replies.close()
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        self.complaints.close()

    def _call(
        self, name: str, rooms: Iterable[memoryview] = (), seconds: float | None = None, **arguments: Any
    ) -> Any:
        """The result of a function of the model; scores are written into `rooms`.

        seconds: after which a child that has not answered counts as one that hangs.
        """
        seconds = STEP + self.reading if seconds is None else seconds
        with self.lock:
            if self.death:
                raise UserError(self.death.problem, self.death.fix, self.death.code)
            try:
                reply = self._exchange(json.dumps({"call": name, **arguments}), rooms, seconds)
            except (EOFError, BrokenPipeError):
                self.death = self._why_it_ended()
                self.close()
                raise self.death from None
            except TimeoutError:
                problem = f"{self.gguf}: llama.cpp did not answer within {seconds:.0f} s and was ended."
                self.death = UserError(problem, TRY_AGAIN, CHECKPOINT)
                self.close()
                raise self.death from None
            except BaseException:  # such as Ctrl-C: the reply, once it comes, must not answer another request
                self.close()
                raise
        if "problem" in reply:
            raise UserError(reply["problem"], reply["fix"], reply["code"])
        if "error" in reply:
            raise (MemoryError if reply["is_memory"] else RuntimeError)(reply["error"])
        return reply["result"]

    def _exchange(self, request: str, rooms: Iterable[memoryview], seconds: float) -> dict[str, Any]:
        """Send a request and return its reply.

        Raises EOFError or BrokenPipeError without a child, TimeoutError when the reply is not whole in time.
        """
        self.requests.write(request.encode() + b"\n")
        self.requests.flush()
        pipe, until = self.replies.fileno(), time.monotonic() + seconds
        arrived = bytearray()
        while b"\n" not in arrived:
            _wait(pipe, until)
            data = os.read(pipe, LINE)
            if not data:
                raise EOFError
            arrived += data
        line, _, rest = arrived.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        if reply.get("bytes"):
            rooms = list(rooms)
            assert reply["bytes"] == sum(map(len, rooms)), (reply["bytes"], rooms)
            for room in rooms:
                place = min(len(room), len(rest))
                room[:place], rest = rest[:place], rest[place:]
                while place < len(room):
                    _wait(pipe, until)
                    count = os.readv(pipe, [room[place:]])
                    if not count:
                        raise EOFError
                    place += count
        return reply

    def _why_it_ended(self) -> UserError:
        """The error for a child that has ended by itself."""
        code = 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(LIVES)
        self.complaints.seek(0)
        lines = [line.strip() for line in self.complaints.read().splitlines() if line.strip()]
        reason = f": {lines[-1][:300]}" if lines else ""
        how = f"exit code {code}"
        if code < 0:
            how = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
        problem = f"{self.gguf}: the process in which llama.cpp uses this file ended with {how}{reason}."
        return UserError(
            problem, WHY.get(-code, TRY_AGAIN), MEMORY if code == -signal.SIGKILL else CHECKPOINT
        )


def _wait(pipe: int, until: float) -> None:
    """Wait until the pipe has bytes or its other end is closed; raises TimeoutError at the time `until`."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
        raise TimeoutError


def _widen(pipe: int) -> None:
    """Let a whole row of scores fit into the pipe, where the system allows that."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):  # the user's share of such memory is used up
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _serve() -> None:
    """In the child: load the model that the first request names, then answer until the parent has ended."""
    import resource

    sandbox.limit(resource.RLIMIT_CORE, 0)
    voice = os.dup(1)
    os.dup2(2, 1)  # what a library prints goes to the parent's file, not among the replies
    threading.Thread(target=_end_with_parent, daemon=True).start()
    model: Model | None = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        name, rows = request.pop("call"), []
        try:
            result: Any = None
            if name == "load":
                model = _loaded(**request)
                result = {"entries": model.entries, "context": model.context}
            elif name == "decode":
                assert model
                rows = [row.data.cast("B") for row in model.decode(**request)]
            else:
                assert name in CALLS, name
                result = getattr(model, name)(**request)
            reply = {"result": result, "bytes": sum(map(len, rows))}
        except UserError as error:
            reply = {"problem": error.problem, "fix": error.fix, "code": error.code}
        except Exception as error:  # of a single request; the parent decides whether it goes on
            text = f"{error}" if isinstance(error, RuntimeError | MemoryError) else f"{error!r}"
            reply = {"error": text, "is_memory": is_out_of_memory(error)}
        _write(voice, [memoryview(json.dumps(reply).encode() + b"\n"), *rows])


def _loaded(gguf: str, adapters: dict[str, str], **sizes: Any) -> Model:
    """The model; sizes: the other arguments of Model."""
    return Model(Path(gguf), adapters={name: Path(path) for name, path in adapters.items()}, **sizes)


def _write(handle: int, parts: list[memoryview]) -> None:
    """Write all parts, at once where the pipe has room, so that the parent wakes up once."""
    while parts:
        count = os.writev(handle, parts[:MOST_PARTS])
        while parts and count >= len(parts[0]):
            count -= len(parts.pop(0))
        if count:
            parts[0] = parts[0][count:]


def _end_with_parent() -> None:
    """End this process as soon as the parent's end of the pipe is closed, also in the middle of a step."""
    poll = select.poll()
    poll.register(0, 0)  # no event is asked for, so only the one that always counts is reported: a hang-up
    poll.poll()
    os._exit(0)


if __name__ == "__main__":
    _serve()
