"""Lets only a server's own pages reach it, and only from this machine unless the user allows others.

It is ASGI middleware. It knows gradio's paths and login, but no component of a window.
"""

import ipaddress
import re
from collections.abc import Callable
from typing import Any

POLICY = "img-src 'self' data: blob:; media-src 'self' blob:; connect-src 'self' ws: wss:; frame-src 'none'"
API = "/gradio_api/"
UPLOAD = 20 << 20  # bytes of a file at most
FILES = 16  # of one request at most: gradio keeps each of them open until the last has come
# gradio gives an uploaded file to whoever knows its path, fetches addresses for pages, and tells anyone what
# it can be asked: no window needs it
NEVER = re.compile(r"(/gradio_api)?/+((file|proxy)[=/]|openapi\.json)")


class Guard:
    """Refuses what another site's page sends, and names that only point here (DNS rebinding).

    With a password it also closes what gradio leaves open to those who did not log in.
    """

    def __init__(self, app: Any, local: bool, login: bool, origin: str):
        """origin: of a proxy that was allowed, or empty."""
        self.app, self.local, self.login, self.origin = app, local, login, origin

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif not self._is_fine(scope) or NEVER.match(scope["path"]):
            await _refuse(receive, send, 403, b"This server does not accept this request.")
        elif self.login and not self._may_enter(scope):
            await _refuse(receive, send, 401, b"Log in first.")
        else:
            upload = scope["path"].rstrip("/") == f"{API}upload"
            await self.app(scope, _limited_upload(scope, receive) if upload else receive, _with_policy(send))

    def _may_enter(self, scope: Any) -> bool:
        if not scope["path"].startswith(API) or scope["path"] == f"{API}startup-events":
            return True  # gradio asks itself for this one when it starts
        cookies = dict(scope["headers"]).get(b"cookie", b"").decode("latin-1")
        cookie_tokens = [
            part.partition("=")[2] for part in cookies.split("; ") if part.startswith("access-token")
        ]
        return any(token in scope["app"].tokens for token in cookie_tokens)

    def _is_fine(self, scope: Any) -> bool:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self.origin and self.origin == (f"https://{host}" if origin is None else origin):
            return True
        return is_expected(host, origin, is_local if self.local else lambda _: True)


def _with_policy(send: Any) -> Any:
    """Add the policy that keeps images in answers, and pages tampered with, from reaching other hosts."""

    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
        await send(message)

    return sending


def _limited_upload(scope: Any, receive: Any) -> Any:
    """Make an upload of too many files, or one that its sender abandoned, end as one that is too large.

    gradio deletes only those.
    """
    content_type = dict(scope["headers"]).get(b"content-type", b"")
    boundary = re.search(rb'boundary="?([^";,]+)', content_type)
    border = b"--" + boundary[1].strip() if boundary else b""
    parts, before = 0, b""  # borders so far, and the end of what came, which may hold the start of a border

    async def receiving() -> Any:
        nonlocal parts, before
        message = await receive()
        if message["type"] == "http.disconnect":
            return {"type": "http.request", "body": bytes(UPLOAD + 1), "more_body": False}
        body = message.get("body", b"")
        if border:
            text = before + body
            borders = [match.start() for match in re.finditer(re.escape(border), text)]
            if parts + len(borders) > FILES + 1:  # one stands behind the last file
                end = max(0, borders[max(0, FILES - parts)] - len(before))
                return {"type": "http.request", "body": body[:end] + bytes(UPLOAD + 1), "more_body": False}
            parts += len(borders)
            before = text[borders[-1] + len(border) if borders else 0 :][1 - len(border) :]
        return message

    return receiving


async def read_on(receive: Any) -> None:
    """Read some of a body that is not wanted: closing on it would reset the connection and the answer."""
    for _ in range(64):
        if not (await receive()).get("more_body"):
            break


async def _refuse(receive: Any, send: Any, status: int, why: bytes) -> None:
    await read_on(receive)
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": why})


def _name(host: str) -> str:
    """A Host header without its port."""
    return host[1:].split("]")[0] if host.startswith("[") else host.rsplit(":", 1)[0]


def is_expected(host: str, origin: str | None, is_name: Callable[[str], bool]) -> bool:
    """Whether a request names this server as its Host and, with an Origin, comes from a page of it.

    is_name: whether the server goes by a name, which comes without a port.
    """
    return is_name(_name(host)) and (origin is None or origin.split("://")[-1] == host)


def is_local(name: str) -> bool:
    """Whether only programs of this machine reach a server by this name."""
    return name == "localhost" or (is_number(name) and ipaddress.ip_address(name).is_loopback)


def is_number(name: str) -> bool:
    """Whether it is an IP address, which no DNS server can let point to another machine."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
