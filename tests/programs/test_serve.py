"""The program that serves: its first start, the lines that it prints, and what it refuses before that."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from onecard.config.serving import ServeConfig
from onecard.errors import UserError
from onecard.inference import chat
from onecard.programs import serve
from tests.support.paths import ROOT


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


class Service:
    """The program in a process of its own."""

    def __init__(self, model, folder, port, *more):
        command = [sys.executable, "-m", "onecard", "serve", "--model_path", str(model), "--port", str(port)]
        command += ["--data_dir", str(folder), "--threads", "1", "--max_new_tokens", "4", *more]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        while not self.lines or "requests" not in self.lines[-1]:
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            self.lines.append(line.strip())

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


def test_answers_are_computed_together(tiny_model, tmp_path, monkeypatch):
    class StartedError(Exception):
        pass

    def start(options, to_gguf, sequences):
        raise StartedError(sequences)

    monkeypatch.setattr(chat, "start", start)
    command = ["--model_path", str(tiny_model), "--data_dir", str(tmp_path), "--port", str(free_port())]
    with pytest.raises(StartedError, match="3"):
        serve.main([*command, "--at_once", "3"])


def test_first_start(tiny_model, tmp_path):
    """A22, A18, A20: one random key, shown once; the printed lines work as they are; SIGTERM gives 143."""
    port = free_port()
    service = Service(tiny_model, tmp_path / "data", port)
    try:
        keys = {key for line in service.lines for key in re.findall(r"oc-[\w-]{43}", line)}
        assert len(keys) == 1
        curl, client, tigerbot = service.lines[-3:]
        environment = os.environ | {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}

        def pasted(line: str) -> str:
            return subprocess.run(
                line, shell=True, check=True, capture_output=True, text=True, timeout=60, env=environment
            ).stdout

        assert json.loads(pasted(curl))["object"] == "chat.completion"
        pasted(client)
        assert "操作成功" in pasted(tigerbot)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as web:
            assert web.get("/ready").status_code == 200
            assert web.get("/v1/models").status_code == 401
            assert web.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    finally:
        code, errors = service.end()
    assert code == 143
    assert "Traceback" not in errors
    assert not [key for key in keys if key in errors]
    logged = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert next(line["route"] for line in logged if line["status"] == 200) == "/v1/chat/completions"
    again = Service(tiny_model, tmp_path / "data", port)
    again.end()
    assert "oc-" not in "".join(again.lines)
    assert serve.YOUR_KEY in again.lines[-1]


def options(**changes) -> ServeConfig:
    return ServeConfig(model_path="demo", **changes)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_machines_have_to_be_allowed(host):
    with pytest.raises(UserError, match="other machines"):
        serve.check_exposure(options(host=host))
    serve.check_exposure(options(host=host, allow_remote=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_needs_no_permission(host):
    serve.check_exposure(options(host=host))


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}"):
            serve.listening(options(port=port))


@pytest.mark.parametrize("words", [["--terminal"], ["--share"], ["--queue", "3"], ["--last_turns", "2"]])
def test_options_of_windows_are_refused(words):
    with pytest.raises(UserError, match=words[0]):
        serve.main(words)
