"""One line of JSON per request, and the figures of /metrics; the outermost ASGI middleware.

A line has the time, the id of the request, the id of the key, the route, status, seconds and tokens. It never
has a secret, and a prompt only where the user asked for that. JSON escapes line ends and control characters,
so no text of a caller can forge a line or move a terminal's cursor. Of an error that is ours it has the class
and the places in the source, not the text, which may repeat what a caller sent.
"""

import datetime
import json
import secrets
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import JSONResponse

from onecard.serving import gate
from onecard.serving.refusals import FAILED, GONE, RequestError, failed

FRAMES = 8  # of an error, the innermost
NO_ROUTE = "none"
Write = Callable[[dict[str, Any]], None]


def to_stderr(line: dict[str, Any]) -> None:
    """Write a line of the log; a closed stderr ends nothing."""
    try:
        print(json.dumps(line, ensure_ascii=True), file=sys.stderr, flush=True)
    except OSError:
        return


class Metrics:
    """Figures since the start, in a registry of their own. No label holds what a caller wrote."""

    def __init__(self, answering: Callable[[], int], waiting: Callable[[], int]):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "onecard_requests", "Requests answered or refused.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "onecard_request_seconds", "Seconds until the last byte.", ["route"], registry=self.registry
        )
        self.tokens = Counter("onecard_tokens", "Tokens read and written.", ["kind"], registry=self.registry)
        Gauge("onecard_answering", "Requests being answered.", registry=self.registry).set_function(answering)
        Gauge("onecard_waiting", "Requests in the queue.", registry=self.registry).set_function(waiting)

    def text(self) -> bytes:
        """All figures in the text format of Prometheus."""
        return generate_latest(self.registry)

    def record(self, line: dict[str, Any]) -> None:
        self.requests.labels(line["route"], line["status"]).inc()
        self.seconds.labels(line["route"]).observe(line["seconds"])
        for kind in ("prompt", "completion"):
            self.tokens.labels(kind).inc(line.get(f"{kind}_tokens", 0))


class RequestLog:
    """ASGI middleware. A route adds fields to its line through the state of the request, in `log`."""

    def __init__(self, app: Any, metrics: Metrics, write: Write = to_stderr):
        self.app, self.metrics, self.write = app, metrics, write

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, number, status = time.monotonic(), secrets.token_hex(8), 0
        state = scope.setdefault("state", {})
        state["log"], state["request_id"] = {}, number

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_headers(number)]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except RequestError as error:
            if not status:
                await _answer(error, scope, receive, sending)
        except Exception as error:
            state["log"] |= described(error)
            if not status:
                await _answer(failed(), scope, receive, sending)
        finally:
            key = state.get("key")
            line = {
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
                "request": number,
                "key": key.id if key is not None else None,
                "method": scope["method"][:16],
                "route": getattr(scope.get("route"), "path", NO_ROUTE),
                "status": status or GONE,
                "seconds": round(time.monotonic() - started, 3),
                **state["log"],
            }
            self.metrics.record(line)
            self.write(line)


def described(error: BaseException) -> dict[str, Any]:
    """Fields for a line of the log: class and places of an error, without its text."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    places = [f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno}" for frame in frames]
    return {"error": type(error).__name__, "places": places}


def _headers(number: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-request-id", number.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"cache-control", b"no-store"),
    ]


async def _answer(error: RequestError, scope: Any, receive: Any, send: Any) -> None:
    await gate.read_on(receive)
    close = {"connection": "close"} if error.status != FAILED else {}  # a body may still be under way
    response = JSONResponse(error.body(scope["path"]), error.status, {**(error.headers or {}), **close})
    await response(scope, receive, send)
