"""What a caller gets instead of an answer: a status, one sentence, and the parameter that it is about.

The OpenAI routes write it as OpenAI does, TigerBot's routes in TigerBot's envelope. No text of an exception
that is not meant for the caller gets here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException

BAD_REQUEST, NO_KEY, FORBIDDEN, NOT_FOUND = 400, 401, 403, 404
TIMED_OUT, TOO_LARGE, WRONG_TYPE = 408, 413, 415
TOO_MANY, HEADERS_TOO_LARGE = 429, 431
GONE = 499  # status in the log of a caller that left before the answer began, as nginx has it
FAILED, UNAVAILABLE = 500, 503
TYPES = {  # status -> the word that OpenAI has for it; other statuses below 500 are invalid requests
    NO_KEY: "authentication_error",
    FORBIDDEN: "permission_error",
    TOO_MANY: "rate_limit_error",
}
TIGERBOT = "/bot-service/"  # where TigerBot's calls begin


class RequestError(HTTPException):
    """A request that is not answered. FastAPI lets an HTTPException through wherever it is raised."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        """param: the parameter that is wrong; code: a word for programs; retry_after: seconds."""
        headers = {"retry-after": str(retry_after)} if retry_after is not None else {}
        if status == NO_KEY:
            headers["www-authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.message

    def body(self, path: str) -> dict[str, Any]:
        """The JSON of the answer, in the form of the routes that the path belongs to."""
        return self.as_tigerbot() if path.startswith(TIGERBOT) else self.as_openai()

    def as_openai(self) -> dict[str, Any]:
        usual = "server_error" if self.status >= FAILED else "invalid_request_error"
        kind = TYPES.get(self.status, usual)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def as_tigerbot(self) -> dict[str, Any]:
        return {"code": self.status, "msg": self.message, "data": None}


# These are functions, because an error that was raised keeps its traceback, and with that the request.


def failed() -> RequestError:
    """What the caller learns about an error of ours; the log has more."""
    return RequestError(FAILED, "The server failed to answer this. Its log says why.", code="internal_error")


def no_room() -> RequestError:
    """Memory ran out while an answer was computed."""
    return RequestError(UNAVAILABLE, "The memory does not suffice for this answer.", code="out_of_memory")


def no_model() -> RequestError:
    """The process with the model has ended, or cannot be started now."""
    message = "The model cannot answer at the moment."
    return RequestError(UNAVAILABLE, message, code="unavailable", retry_after=10)


def stopping() -> RequestError:
    """The server takes no more requests."""
    return RequestError(UNAVAILABLE, "The server is stopping.", code="stopping")


def left() -> RequestError:
    """The caller has left; nobody reads this but the log."""
    return RequestError(GONE, "The caller left.", code="left")


def cancelled() -> RequestError:
    """An answer was cancelled without a reason of its own."""
    return RequestError(UNAVAILABLE, "The request was cancelled.", code="cancelled")


def of_validation(errors: Sequence[Mapping[str, Any]]) -> RequestError:
    """The first of pydantic's errors about a body: the parameter and what is wrong, without its value."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return RequestError(BAD_REQUEST, "The body is not valid JSON.", code="invalid_json")
    place = [part for part in first["loc"] if part != "body"]
    inner = first.get("ctx", {}).get("param")
    param = _path([*place, *([inner] if inner else [])])
    if not param:
        return RequestError(BAD_REQUEST, "The body must be a JSON object, sent as application/json.")
    if first["type"] == "missing":
        return RequestError(BAD_REQUEST, f"{param}: This parameter is missing.", param, "missing_parameter")
    return RequestError(BAD_REQUEST, f"{param}: {first['msg']}", param, "invalid_parameter")


def _path(parts: Sequence[str | int]) -> str | None:
    """messages[0].content of ("messages", 0, "content")."""
    words = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return words.lstrip(".") or None
