"""Who may ask: ASGI middleware that lets only holders of a key in, and a check of what the key is for.

Authentication comes before routing, so no route can be forgotten: all but OPEN need a key, also those that
do not exist. Whatever is wrong with a key, the answer is the same.
"""

import asyncio
import math
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer

from onecard.config.serving import CHAT
from onecard.serving.database import StoreUnavailableError
from onecard.serving.keys import LONGEST, Key, Refusal
from onecard.serving.refusals import FORBIDDEN, NO_KEY, TOO_MANY, UNAVAILABLE, RequestError

OPEN = frozenset({"/docs", "/openapi.json", "/health", "/ready"})
IN_DOCUMENT = HTTPBearer(auto_error=False)  # says in the OpenAPI document what Access checks


FindKey = Callable[[str], Key | Refusal]  # of a secret; raises StoreUnavailableError
Wait = Callable[[Key], float]  # counts one request of the key; seconds until it may ask again, 0: now


def no_key() -> RequestError:
    """The one answer to a missing, unknown, expired and revoked key."""
    message = "A valid key is needed: send exactly one header `Authorization: Bearer KEY`."
    return RequestError(NO_KEY, message, code="invalid_api_key")


class Access:
    """ASGI middleware. It puts the key into the state of the request."""

    def __init__(self, app: Any, find_key: FindKey, wait: Wait, wait_unknown: Callable[[str], float]):
        """find_key and wait may block; wait_unknown: address of a caller -> seconds it has to wait.

        wait_unknown counts requests without a valid key; those with one are never refused by it.
        """
        self.app, self.find_key, self.wait, self.wait_unknown = app, find_key, wait, wait_unknown

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            scope.setdefault("state", {})
            key = await self._key(scope)
            scope["state"]["key"] = key
            _refuse_if(await asyncio.to_thread(self.wait, key))
        await self.app(scope, receive, send)

    async def _key(self, scope: Any) -> Key:
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        secret = _secret(headers[0]) if len(headers) == 1 else None
        key = await self._found(secret) if secret else Refusal.UNKNOWN
        if isinstance(key, Refusal):
            scope["state"].setdefault("log", {})["refused"] = key.name.lower()
            client = scope.get("client")
            _refuse_if(self.wait_unknown(client[0] if client else ""))
            raise no_key()
        return key

    async def _found(self, secret: str) -> Key | Refusal:
        try:
            return await asyncio.to_thread(self.find_key, secret)
        except StoreUnavailableError as error:
            message = "The keys cannot be read at the moment. Try again later."
            raise RequestError(
                UNAVAILABLE, message, code="unavailable", retry_after=error.retry_after
            ) from error


def _secret(header: bytes) -> str | None:
    """The key of a header `Bearer KEY`; None where it is not one."""
    scheme, _, secret = header.decode("latin-1").partition(" ")
    secret = secret.strip(" ")
    is_key = secret.isascii() and secret.isprintable() and 0 < len(secret) <= LONGEST
    return secret if is_key and scheme.lower() == "bearer" else None


def _refuse_if(seconds: float) -> None:
    if seconds > 0:
        wait = max(1, math.ceil(seconds))
        message = f"Too many requests. Try again in {wait} s."
        raise RequestError(TOO_MANY, message, code="rate_limit_exceeded", retry_after=wait)


def needs(scope: str) -> Callable[..., Key]:
    """A dependency of a route: the key, which must have this scope; none includes another one."""

    def key_with_scope(request: Request, _: Annotated[object, Security(IN_DOCUMENT)]) -> Key:
        key: Key = request.state.key
        if scope not in key.scopes:
            message = f"This key lacks the scope {scope!r}."
            raise RequestError(FORBIDDEN, message, code="insufficient_scope")
        return key

    return key_with_scope


Chatter = Annotated[Key, Depends(needs(CHAT))]  # the key of a call that needs the scope chat
