"""The application in uvicorn: connections that are slow or too large, the log of uvicorn, and the stop.

SIGTERM and Ctrl-C drain: no new request is taken, running ones may end, and after some seconds those that
still run get an error. A second Ctrl-C ends at once.
"""

import asyncio
import json
import logging
import signal
import socket
import sys
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from onecard.errors import Stopped
from onecard.serving import request_log
from onecard.serving.gate import MOST_HEADER_BYTES
from onecard.serving.refusals import TIMED_OUT
from onecard.serving.service import Service

PATIENCE = 20.0  # seconds that running requests get when the server stops
AFTERWARDS = 10  # seconds in which they send their error and close
SECONDS_PER_HEAD = 10.0  # from the first byte of a request, or of a connection, to the end of its headers
IDLE = 15  # seconds that a connection may wait for its next request
MOST_CONNECTIONS = 512


class Connection(H11Protocol):
    """uvicorn's connection with a limit on the time for headers, and true statuses for what h11 refuses."""

    seconds_per_head = SECONDS_PER_HEAD
    head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget_timer()
        elif self.head_timer is None:
            self._watch_head()

    def on_response_complete(self) -> None:
        self._forget_timer()  # the time between requests is uvicorn's
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(getattr(sys.exc_info()[1], "error_status_hint", 400), msg)

    def _watch_head(self) -> None:
        self.head_timer = self.loop.call_later(self.seconds_per_head, self._too_slow)

    def _forget_timer(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def _too_slow(self) -> None:
        self.head_timer = None
        if not self.transport.is_closing() and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(TIMED_OUT, "The headers did not arrive in time.")

    def _refuse(self, status: int, message: str) -> None:
        headers = [("content-type", "text/plain; charset=utf-8"), ("connection", "close")]
        head = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
        for event in (head, h11.Data(data=message.encode()), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, which drains through the service and leaves its exit code to the program."""

    def __init__(self, config: uvicorn.Config, service: Service, patience: float):
        super().__init__(config)
        self.service, self.patience = service, patience
        self.stopped_by: int | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn for SIGTERM and Ctrl-C."""
        if self.stopped_by is not None and sig == signal.SIGINT:
            self.force_exit = True
        self.stopped_by = self.stopped_by or sig
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, let requests end or end them, then close the connections."""
        drained = asyncio.ensure_future(self.service.stop(self.patience))
        await super().shutdown(sockets)
        drained.cancel()
        self.service.close()


class JsonLines(logging.Formatter):
    """What uvicorn logs, as lines like those of requests; of an error the places and not the text."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": self.formatTime(record), "level": record.levelname.lower()}
        line["message"] = record.getMessage()
        if record.exc_info and record.exc_info[1]:
            line |= request_log.described(record.exc_info[1])
        return json.dumps(line, ensure_ascii=True)


LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": JsonLines}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
    "loggers": {"uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False}},
}


def server_of(app: FastAPI, patience: float = PATIENCE) -> Server:
    """A server for an application of app.create_app; patience: seconds for requests at the stop."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=LOGGING,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=int(patience) + AFTERWARDS,
        limit_concurrency=MOST_CONNECTIONS,
    )
    return Server(config, app.state.service, patience)


def run(app: FastAPI, listening: socket.socket, patience: float = PATIENCE) -> None:
    """Serve until a signal comes, then drain and raise Stopped; blocks. listening: bound already."""
    server = server_of(app, patience)
    asyncio.run(server.serve(sockets=[listening]))
    if server.stopped_by is not None:
        raise Stopped(server.stopped_by)
