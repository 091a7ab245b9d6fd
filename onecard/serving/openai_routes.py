"""OpenAI's calls: /v1/models, /v1/chat/completions and /v1/completions, with and without a stream.

One route answers both forms. Everything is checked before the first byte of an answer, so a wrong request has
a true HTTP status in a stream too; what fails later is an error event, as OpenAI sends it.
"""

import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.responses import Response

from onecard.inference.logprobs import TokenChoice, TokenLogprob
from onecard.serving import service as serving_service
from onecard.serving.access import Chatter
from onecard.serving.answers import Answering, Choice, Ended, Piece, Task
from onecard.serving.keys import Key
from onecard.serving.models import Listed
from onecard.serving.openai_request import ChatRequest, CompletionRequest
from onecard.serving.refusals import NOT_FOUND, RequestError
from onecard.serving.service import Service

OWNER = "onecard"
DONE = "[DONE]"


class ChatForm:
    """How chat answers are written."""

    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    @staticmethod
    def first(choice: int) -> dict[str, Any] | None:
        """What opens a choice in a stream."""
        delta = {"role": "assistant", "content": ""}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    @staticmethod
    def piece(piece: Piece, reason: str | None = None) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        logprobs = _logprobs(piece.logprobs) if piece.logprobs else None
        return {"index": piece.choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    @staticmethod
    def complete(answer: Choice, has_logprobs: bool) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        logprobs = _logprobs(answer.logprobs) if has_logprobs else None
        end = answer.end
        return {"index": end.choice, "message": message, "logprobs": logprobs, "finish_reason": end.reason}


class CompletionForm:
    """How continued texts are written."""

    prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    @staticmethod
    def first(choice: int) -> dict[str, Any] | None:
        return None

    @staticmethod
    def piece(piece: Piece, reason: str | None = None) -> dict[str, Any]:
        return {"index": piece.choice, "text": piece.text, "logprobs": None, "finish_reason": reason}

    @staticmethod
    def complete(answer: Choice, has_logprobs: bool) -> dict[str, Any]:
        return CompletionForm.piece(Piece(answer.end.choice, answer.text), answer.end.reason)


Form = type[ChatForm] | type[CompletionForm]


def _logprobs(choices: Iterable[TokenChoice]) -> dict[str, Any]:
    content = [{**_scored(each), "top_logprobs": [_scored(other) for other in each.top]} for each in choices]
    return {"content": content, "refusal": None}


def _scored(token: TokenLogprob) -> dict[str, Any]:
    content = None if token.content is None else list(token.content)
    return {"token": token.text, "logprob": token.logprob, "bytes": content}


def router(service: Service) -> APIRouter:
    """The routes on a service."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.get("/models")
    async def list_models(key: Chatter) -> dict[str, Any]:
        """The base model and the adapters that can be named as `model`; `a+0.5*b` mixes two of them."""
        return {"object": "list", "data": [_model(each) for each in service.models.listed()]}

    @routes.get("/models/{name:path}")
    async def show_model(name: str, key: Chatter) -> dict[str, Any]:
        """One model, also a mixture."""
        listed = {each.name: each for each in service.models.listed()}
        if name not in listed:
            service.models.find(name)
        return _model(listed.get(name, Listed(name, int(time.time()))))

    @routes.post("/chat/completions")
    async def complete_chat(body: ChatRequest, request: Request, key: Chatter) -> Response:
        """Answer a chat, as a whole or, with `stream`, as server-sent events."""
        return await _complete(service, request, key, body, ChatForm)

    @routes.post("/completions")
    async def complete_text(body: CompletionRequest, request: Request, key: Chatter) -> Response:
        """Continue raw texts, around which no template is written."""
        return await _complete(service, request, key, body, CompletionForm)

    @routes.post("/responses")
    async def respond(key: Chatter) -> Response:
        """Not available: use /v1/chat/completions."""
        message = "This server keeps no answers, so it has no /v1/responses: use /v1/chat/completions."
        raise RequestError(NOT_FOUND, message, code="not_available")

    @routes.post("/embeddings")
    async def embed(key: Chatter) -> Response:
        """Not available: no embedding model is loaded."""
        message = "No embedding model is loaded, so there is no /v1/embeddings."
        raise RequestError(NOT_FOUND, message, code="not_available")

    return routes


def _model(listed: Listed) -> dict[str, Any]:
    return {"id": listed.name, "object": "model", "created": listed.created, "owned_by": OWNER}


async def _complete(
    service: Service, request: Request, key: Key, body: ChatRequest | CompletionRequest, form: Form
) -> Response:
    if body.user:
        request.state.log["user"] = body.user
    served = service.models.find(body.model)
    task = Task(served, body.conversations, body.settings(), body.most_tokens, body.choices, body.controls())
    head = {"id": form.prefix + secrets.token_hex(12), "created": int(time.time()), "model": body.model}
    async with contextlib.AsyncExitStack() as block:
        answering = await block.enter_async_context(service.answer(request, key, task))
        if body.stream:
            events = _events(answering, form, head, body.include_usage, service.limits.keep_alive)
            return _Stream(events, block.pop_all())
        has_logprobs = task.controls.top_logprobs is not None
        answers = await serving_service.collected(answering)
        choices = [form.complete(answer, has_logprobs) for answer in answers]
        whole = {**head, "object": form.whole, "choices": choices, "usage": _usage(answering)}
        return JSONResponse(whole)


class _Stream(EventSourceResponse):
    """Events whose block ends with the response, also when the caller leaves before the first one."""

    def __init__(self, events: AsyncIterator[bytes], block: contextlib.AsyncExitStack):
        super().__init__(events, headers={"x-accel-buffering": "no"})
        self.block = block

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self.block:
            await super().__call__(scope, receive, send)


async def _events(
    answering: Answering, form: Form, head: dict[str, Any], include_usage: bool, keep_alive: float
) -> AsyncIterator[bytes]:
    """The answer as server-sent events; the last one is [DONE], or an error."""
    head = {**head, "object": form.part}
    without = {"usage": None} if include_usage else {}

    def chunk(choice: dict[str, Any]) -> bytes:
        return _event({**head, "choices": [choice], **without})

    opened: set[int] = set()
    try:
        async for event in answering.read(keep_alive):
            if event is None:
                yield format_sse_event(comment="waiting")
                continue
            first = form.first(event.choice)
            if event.choice not in opened and first:
                yield chunk(first)
            opened.add(event.choice)
            if isinstance(event, Piece):
                yield chunk(form.piece(event))
            elif isinstance(event, Ended):
                yield chunk(form.piece(Piece(event.choice, ""), event.reason))
    except RequestError as error:
        yield _event(error.as_openai())
        return
    if include_usage:
        yield _event({**head, "choices": [], "usage": _usage(answering)})
    yield format_sse_event(data_str=DONE)


def _event(data: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=json.dumps(data, ensure_ascii=False))


def _usage(answering: Answering) -> dict[str, int]:
    prompt, completion = answering.usage.prompt, answering.usage.completion
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
