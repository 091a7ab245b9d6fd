"""TigerBot's calls, in its envelope; errors keep the envelope and have a true HTTP status."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from onecard.config import generation
from onecard.config.generation import BASE, Generation
from onecard.data.conversation import Conversation, Turn
from onecard.serving import service as serving_service
from onecard.serving.access import Chatter
from onecard.serving.answers import Task
from onecard.serving.openai_request import WholeText
from onecard.serving.service import Service

DONE = "操作成功"


class Question(BaseModel):
    """The body of /bot-service/ai_service/gpt."""

    model_config = ConfigDict(strict=True, extra="forbid")
    text: Annotated[WholeText, Field(min_length=1)]
    model_version: str | None = Field(None, alias="modelVersion", min_length=1, max_length=300)


def envelope(data: Any) -> dict[str, Any]:
    return {"code": 200, "msg": DONE, "data": data}


def router(service: Service, settings: Generation, system: str) -> APIRouter:
    """The routes on a service. settings, system: of an answer, as the calls have no room for them."""
    routes = APIRouter(prefix="/bot-service", tags=["TigerBot"])

    @routes.post("/ai_service/gpt")
    async def gpt(body: Question, request: Request, key: Chatter) -> dict[str, Any]:
        """Answer one text. `modelVersion` is a name of /v1/models; without it the first adapter answers."""
        first = next(iter(service.models.chat.engine.adapters), BASE)
        served = service.models.find(body.model_version or first)
        turns = (*((Turn("system", system),) if system else ()), Turn("user", body.text))
        task = Task(served, [Conversation(turns)], generation.seeded(settings))
        async with service.answer(request, key, task) as answering:
            answers = await serving_service.collected(answering)
        return envelope({"result": [answer.text for answer in answers]})

    return routes
