"""The service on a fake chat in a process of its own, for tests of signals; see tests/serving/test_server.py.

python -m tests.support.serving_process SECONDS_PER_TOKEN PATIENCE   # the first line of stdout is the port
"""

import socket
import sys

from onecard import errors
from onecard.serving import server
from tests.support.serving_fakes import FakeChat, Setting


def main() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    setting = Setting(FakeChat(float(sys.argv[1])))
    print(listening.getsockname()[1], flush=True)
    server.run(setting.app, listening, float(sys.argv[2]))


if __name__ == "__main__":
    errors.run_program(main)
