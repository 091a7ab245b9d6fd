"""Questions to the hub through its own client, with an end to every wait; what no answer means."""

import errno
import threading
import time
from typing import Any

import httpx2
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from onecard.config.checks import COMMIT

PATIENCE = 5.0  # seconds in all for the question which commit a name is, and for each wait of a download
REST = 60.0  # seconds that a hub that said nothing is left alone
REFUSED = (401, 403, 404)  # an answer, if no good one
REFUSALS = (OSError, ValueError, httpx2.HTTPError)  # of the hub's client
DISK_SAYS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_silence = {"until": 0.0}  # of the monotonic clock, in seconds


def commit_of(name: str, kind: str, revision: str) -> str:
    """The commit that the hub says a revision is, within PATIENCE; raises one of REFUSALS."""
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=PATIENCE).sha)
        except Exception as error:
            answers.append(error)

    if time.monotonic() < _silence["until"]:
        raise TimeoutError("it was silent a moment ago")
    asking = threading.Thread(target=ask, daemon=True)  # looking up the hub's address has no limit
    asking.start()
    asking.join(PATIENCE)
    answer = answers[0] if answers else TimeoutError()
    if isinstance(answer, TimeoutError | httpx2.TimeoutException):
        _silence["until"] = time.monotonic() + REST
        raise TimeoutError(f"nothing in {PATIENCE:g} seconds")
    if isinstance(answer, REFUSALS):
        raise answer
    if isinstance(answer, Exception):  # an address that is none, an answer of another shape
        raise ValueError(f"{type(answer).__name__}: {answer}") from answer
    if not COMMIT.fullmatch(str(answer)):
        raise ValueError("the hub names no commit")
    return str(answer)


def reason(error: Exception) -> str:
    """Why the hub gave nothing, in short."""
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub is not asked (HF_HUB_OFFLINE)"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in REFUSED:
        return f"the hub refuses it ({status})"
    told = str(error) if isinstance(error, TimeoutError) else type(error).__name__
    return f"the hub did not answer ({status or told})"


def is_local(error: Exception) -> bool:
    """Whether it was this machine's disk that refused, and not the hub."""
    return isinstance(error, OSError) and error.errno in DISK_SAYS


def limit_waits() -> None:
    """From now on no request of the hub's client waits longer than PATIENCE where it sets no limit itself."""
    hooks = get_session().event_hooks
    if _end_in_time not in hooks["request"]:
        get_session().event_hooks = {**hooks, "request": [*hooks["request"], _end_in_time]}


def _end_in_time(request: httpx2.Request) -> None:
    limits = request.extensions.get("timeout") or {}
    kept = {name: limits.get(name) or PATIENCE for name in ("connect", "read", "write", "pool")}
    request.extensions["timeout"] = kept
