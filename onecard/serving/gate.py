"""What reaches the service at all: ASGI middleware that checks hosts, headers, and the size of bodies.

It knows neither keys nor routes. Everything that it refuses, it refuses before a route sees it.
"""

import asyncio
import contextlib
import time
from collections.abc import Collection
from typing import Any

from onecard.serving.refusals import (
    FORBIDDEN,
    HEADERS_TOO_LARGE,
    TIMED_OUT,
    TOO_LARGE,
    WRONG_TYPE,
    RequestError,
)
from onecard.system import http_guard

MOST_HEADERS, MOST_HEADER_BYTES = 100, 16 << 10
BODY = 4 << 20  # bytes of a body at most
SECONDS_PER_BODY = 30  # from the first to the last byte of a body
SECONDS_TO_READ_ON = 2
LONGEST_PATH = 2048


class Gate:
    """ASGI middleware."""

    def __init__(
        self,
        app: Any,
        local: bool,
        names: Collection[str] = (),
        origins: Collection[str] = (),
        body: int = BODY,
        seconds: float = SECONDS_PER_BODY,
    ):
        """local: only names of this machine are its Host; names, origins: further ones that are allowed."""
        self.app, self.local, self.body, self.seconds = app, local, body, seconds
        self.names, self.origins = frozenset(name.lower() for name in names), frozenset(origins)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self._check_headers(scope["headers"])
            if len(scope["path"]) > LONGEST_PATH:
                raise RequestError(414, "The address is too long.")
            receive = self._limited(scope, receive)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        await self.app(scope, receive, send)

    def _check_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > MOST_HEADERS or size > MOST_HEADER_BYTES:
            raise RequestError(HEADERS_TOO_LARGE, "The headers are too large.")
        hosts, origins = _values(headers, b"host"), _values(headers, b"origin")
        if len(hosts) != 1 or len(origins) > 1 or not self._is_expected(hosts[0], (*origins, None)[0]):
            message = "This server does not accept requests for this Host or from this Origin."
            raise RequestError(FORBIDDEN, message, code="wrong_host_or_origin")
        if set(_values(headers, b"content-encoding")) - {"identity"}:
            raise RequestError(WRONG_TYPE, "Bodies cannot be compressed here. Send it as it is.")

    def _is_expected(self, host: str, origin: str | None) -> bool:
        if origin in self.origins:
            origin = None
        return http_guard.is_expected(host, origin, self._is_name)

    def _is_name(self, name: str) -> bool:
        """Whether the server goes by this name; a page cannot let a number point to another machine."""
        if self.local:
            return http_guard.is_local(name) or name.lower() in self.names
        return http_guard.is_local(name) or http_guard.is_number(name) or name.lower() in self.names

    def _limited(self, scope: Any, receive: Any) -> Any:
        lengths = _values(scope["headers"], b"content-length")
        if any(not length.isdecimal() or len(length) > 18 for length in lengths) or len(set(lengths)) > 1:
            raise RequestError(400, "The Content-Length is not a number.")
        if lengths and int(lengths[0]) > self.body:
            raise self._too_large()
        size, end, is_whole = 0, time.monotonic() + self.seconds, False

        async def receiving() -> Any:
            nonlocal size, is_whole
            if is_whole:  # what comes now is that the caller is gone
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError:
                raise RequestError(TIMED_OUT, "The body did not arrive in time.") from None
            size += len(message.get("body", b""))
            if size > self.body:
                await read_on(receive)
                raise self._too_large()
            is_whole = not message.get("more_body", False)
            return message

        return receiving

    def _too_large(self) -> RequestError:
        return RequestError(TOO_LARGE, f"A body may have at most {self.body} bytes.", code="body_too_large")


async def read_on(receive: Any) -> None:
    """Read some of a body that is not wanted, for SECONDS_TO_READ_ON at most."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SECONDS_TO_READ_ON):
            await http_guard.read_on(receive)


def _values(headers: list[tuple[bytes, bytes]], name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in headers if key == name]
