"""The HTTP application: its routes, and the middleware around them. A program hands in models and keys.

From the outside in: the log, the gate (Host, Origin, sizes), access (keys, rate limits), the routes.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from onecard.config.generation import Generation
from onecard.serving import docs_page, openai_routes, refusals, request_log, tigerbot_routes
from onecard.serving.access import Access, FindKey, Wait
from onecard.serving.gate import BODY, SECONDS_PER_BODY, Gate
from onecard.serving.models import Models
from onecard.serving.refusals import BAD_REQUEST, NOT_FOUND, UNAVAILABLE, RequestError
from onecard.serving.request_log import RequestLog
from onecard.serving.service import Limits, Service

DESCRIPTION = (
    "Chat with the models of this machine. Each call but those to /docs, /health and /ready needs a key."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the application is reached and what it allows."""

    local: bool = True  # whether only names of this machine are accepted as Host
    names: Collection[str] = ()  # further names of the server
    origins: Collection[str] = ()  # of pages elsewhere that may call it
    limits: Limits = dataclasses.field(default_factory=Limits)
    most_body: int = BODY  # bytes
    seconds_per_body: float = SECONDS_PER_BODY
    log_prompts: bool = False
    tigerbot: Generation = dataclasses.field(default_factory=Generation)  # how its calls are answered
    system: str = ""  # the system prompt of its calls


@dataclasses.dataclass(frozen=True)
class Doors:
    """How keys are found and requests counted; all but the last may block."""

    find_key: FindKey
    wait: Wait
    wait_unknown: Callable[[str], float]


def create_app(
    models: Models,
    doors: Doors,
    settings: Settings | None = None,
    write: request_log.Write = request_log.to_stderr,
) -> FastAPI:
    """The application; `app.state.service` is what a server stops. write: takes each line of the log."""
    settings = settings or Settings()
    service = Service(models, settings.limits, settings.log_prompts, write)
    app = FastAPI(
        title="OneCard", description=DESCRIPTION, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.service = service
    app.include_router(openai_routes.router(service))
    app.include_router(tigerbot_routes.router(service, settings.tigerbot, settings.system))
    _add_own_routes(app, service)
    _add_error_handlers(app)
    app.add_middleware(Access, find_key=doors.find_key, wait=doors.wait, wait_unknown=doors.wait_unknown)
    app.add_middleware(
        Gate,
        local=settings.local,
        names=settings.names,
        origins=settings.origins,
        body=settings.most_body,
        seconds=settings.seconds_per_body,
    )
    app.add_middleware(RequestLog, metrics=service.metrics, write=write)
    return app


def _add_own_routes(app: FastAPI, service: Service) -> None:
    @app.get("/docs", response_class=HTMLResponse)
    async def docs() -> Response:
        """This page."""
        return HTMLResponse(docs_page.page(app.openapi()), headers=docs_page.HEADERS)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server runs."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        """Whether the model is loaded and requests are taken: 200, otherwise 503."""
        if service.is_stopping or not service.models.is_ready:
            return JSONResponse({"status": "stopping" if service.is_stopping else "loading"}, UNAVAILABLE)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: Any) -> Response:
        return _answer(request, refusals.of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: Any) -> Response:
        if isinstance(error, RequestError):
            return _answer(request, error)
        if error.status_code == NOT_FOUND:
            return _answer(request, RequestError(NOT_FOUND, "There is no such call.", code="not_found"))
        if error.status_code == BAD_REQUEST:  # FastAPI could not read the body
            wrong = RequestError(BAD_REQUEST, "The body is not valid JSON.", code="invalid_json")
            return _answer(request, wrong)
        return _answer(request, RequestError(error.status_code, str(error.detail)), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def crashed(request: Request, error: Any) -> Response:
        return _answer(request, refusals.failed())


def _answer(request: Request, error: RequestError, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(error.body(request.url.path), error.status, headers or error.headers)
