"""Asks the hub through its own client with a limit on every wait, and says why there was no answer."""

import errno
import threading
import time
from typing import Any

import httpx2
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from onecard.config.checks import COMMIT

PATIENCE = 5.0  # seconds to ask which commit a name means, and for each wait of a download
REST = 60.0  # seconds in which a hub that did not answer is not asked again
REFUSED = (401, 403, 404)  # HTTP states with which the hub does answer
REFUSALS = (OSError, ValueError, httpx2.HTTPError)  # what the hub's client raises
DISK_SAYS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_silence = {"until": 0.0}  # of the monotonic clock, in seconds


def ask_commit(name: str, kind: str, revision: str) -> str:
    """Ask the hub which commit a revision is, for at most PATIENCE seconds; raises one of REFUSALS."""
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=PATIENCE).sha)
        except Exception as error:
            answers.append(error)

    if time.monotonic() < _silence["until"]:
        raise TimeoutError("it did not answer a moment ago, and is not asked again yet")
    thread = threading.Thread(target=ask, daemon=True)  # the look-up of the hub's address has no limit
    thread.start()
    thread.join(PATIENCE)
    answer = answers[0] if answers else TimeoutError()
    if isinstance(answer, TimeoutError | httpx2.TimeoutException):
        _silence["until"] = time.monotonic() + REST
        raise TimeoutError(f"no answer in {PATIENCE:g} seconds")
    if isinstance(answer, REFUSALS):
        raise answer
    if isinstance(answer, Exception):  # HF_ENDPOINT is no address, or the answer has another shape
        raise ValueError(f"{type(answer).__name__}: {answer}") from answer
    if not COMMIT.fullmatch(str(answer)):
        raise ValueError("the answer of the hub names no commit")
    return str(answer)


def reason(error: Exception) -> str:
    """Why the hub gave nothing, in a few words."""
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub is not asked (HF_HUB_OFFLINE)"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in REFUSED:
        return f"the hub refuses it ({status})"
    words = str(error) if isinstance(error, TimeoutError) else type(error).__name__
    return f"the hub did not answer ({status or words})"


def is_local(error: Exception) -> bool:
    """Whether the error came from this machine's disk and not from the hub."""
    return isinstance(error, OSError) and error.errno in DISK_SAYS


def limit_waits() -> None:
    """Give every later request of the hub's client the limit PATIENCE, where it sets none itself."""
    hooks = get_session().event_hooks
    if _end_in_time not in hooks["request"]:
        get_session().event_hooks = {**hooks, "request": [*hooks["request"], _end_in_time]}


def _end_in_time(request: httpx2.Request) -> None:
    limits = request.extensions.get("timeout") or {}
    with_limits = {name: limits.get(name) or PATIENCE for name in ("connect", "read", "write", "pool")}
    request.extensions["timeout"] = with_limits
