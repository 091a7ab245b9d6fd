"""The bodies of /v1/chat/completions and /v1/completions: each parameter is applied or refused, none ignored.

The fields of the two models are the parameters that are applied. REFUSED has those of the official schema
that are not, with the reason and the values that ask for nothing; any other name is refused as unknown.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from onecard.config import generation
from onecard.config.generation import LONGEST_PHRASE, Generation
from onecard.data.conversation import Conversation, Turn
from onecard.inference.controls import HIGHEST_BIAS, HIGHEST_PENALTY, MOST_LOGPROBS, MOST_STOPS, Controls
from onecard.inference.grammar import JSON_OBJECT

MOST_CHOICES = 16  # answers of one request
MOST_TOKENS = 1 << 20  # more than any context has
MOST_MESSAGES = 4096
MOST_BIASED = 1024  # token ids with a bias
ROLES = {"developer": "system"}  # OpenAI's newer name
HALF_CHARACTER = re.compile("[\ud800-\udfff]")


class Refusal(NamedTuple):
    """A parameter that is not applied."""

    reason: str
    asks_nothing: tuple[Any, ...] = ()  # values besides null that pass, because they ask for nothing


NO_TOOLS = "the templates of these models declare no tools"
NO_SOUND = "these models read and write text only"
NO_STORE = "this server keeps no answers"
ONE_MACHINE = "this server is one machine with one tier"
NO_REASONING = "these models have no setting for how long they reason"
CHAT_REFUSED = {
    "audio": Refusal(NO_SOUND),
    "function_call": Refusal(NO_TOOLS, ("none", "auto")),
    "functions": Refusal(NO_TOOLS, ([],)),
    "metadata": Refusal(NO_STORE, ({},)),
    "modalities": Refusal(NO_SOUND, (["text"],)),
    "moderation": Refusal("this server has no moderation model"),
    "parallel_tool_calls": Refusal(NO_TOOLS, (True, False)),
    "prediction": Refusal("the engines decode without predicted output"),
    "prompt_cache_key": Refusal("prefixes are found by their tokens"),
    "prompt_cache_options": Refusal("prefixes are found by their tokens"),
    "prompt_cache_retention": Refusal("prefixes stay in memory while there is room", ("in_memory",)),
    "reasoning_effort": Refusal(NO_REASONING, ("none",)),
    "safety_identifier": Refusal("this server reports nobody; a key belongs to each caller"),
    "service_tier": Refusal(ONE_MACHINE, ("auto", "default")),
    "store": Refusal(NO_STORE, (False,)),
    "tool_choice": Refusal(NO_TOOLS, ("none", "auto")),
    "tools": Refusal(NO_TOOLS, ([],)),
    "verbosity": Refusal("these models have no setting for the length of answers", ("medium",)),
    "web_search_options": Refusal("this server does not search the web"),
}
COMPLETION_REFUSED = {
    "best_of": Refusal("choose among the answers of n yourself", (1,)),
    "echo": Refusal("put the prompt before the answer yourself", (False,)),
    "logprobs": Refusal("only /v1/chat/completions has log-probabilities"),
    "suffix": Refusal("these models continue a text and do not fill gaps", ("",)),
}
MESSAGE_REFUSED = {
    "audio": Refusal(NO_SOUND),
    "annotations": Refusal("the templates have no place for it", ([],)),
    "function_call": Refusal(NO_TOOLS),
    "name": Refusal("the templates have no place for it"),
    "refusal": Refusal("the templates have no place for it"),
    "tool_calls": Refusal(NO_TOOLS, ([],)),
    "tool_call_id": Refusal(NO_TOOLS),
}


def _same(value: Any, other: Any) -> bool:
    """Equal and of one type: True is not 1 here, but 0.0 is 0."""
    numbers = {type(value), type(other)} <= {int, float}
    return (type(value) is type(other) or numbers) and bool(value == other)


def _problem(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


def refuse_extra(extra: Mapping[str, Any] | None, refused: Mapping[str, Refusal]) -> None:
    """Raise for each field that is unknown, or that is known, not applied, and asks for something."""
    for name, value in (extra or {}).items():
        if name not in refused:
            raise _problem(name[:100], "Unknown parameter.")
        reason, asks_nothing = refused[name]
        if value is not None and not any(_same(value, each) for each in asks_nothing):
            raise _problem(name, f"This parameter cannot be used here: {reason}.")


def _whole_characters(text: str) -> str:
    if HALF_CHARACTER.search(text):
        raise PydanticCustomError("half", "The text contains half a character (a lone surrogate).")
    return text


def _joined(content: Any) -> Any:
    """The text of a content, whose parts are joined."""
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            shown = repr(kind)[:50] if isinstance(kind, str) else "that has no type"
            message = f"Part {number} of the content is {shown}, but these models read text only."
            raise PydanticCustomError("part", "{message}", {"message": message})
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            message = f"Part {number} of the content must have a text and nothing else."
            raise PydanticCustomError("part", "{message}", {"message": message})
        texts.append(part["text"])
    return "".join(texts)


def _listed(stop: Any) -> Any:
    """A single stop text as a list of one."""
    return [stop] if isinstance(stop, str) else stop


def _token_ids(bias: Any) -> Any:
    """{12: 1.5} of {"12": 1.5}: JSON has no numbers as keys."""
    if not isinstance(bias, dict) or not all(
        re.fullmatch(r"\d{1,9}", str(token), re.ASCII) for token in bias
    ):
        raise PydanticCustomError("bias", "It must be an object of token ids and numbers.")
    return {int(token): amount for token, amount in bias.items()}


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


WholeText = Annotated[str, AfterValidator(_whole_characters)]
Content = Annotated[WholeText, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart])]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=LONGEST_PHRASE)]],
    BeforeValidator(_listed, json_schema_input_type=str | list[str]),
    Field(max_length=MOST_STOPS),
]
Penalty = Annotated[float, Field(ge=-HIGHEST_PENALTY, le=HIGHEST_PENALTY, allow_inf_nan=False)]
Bias = Annotated[
    dict[int, Annotated[float, Field(ge=-HIGHEST_BIAS, le=HIGHEST_BIAS, allow_inf_nan=False)]],
    BeforeValidator(_token_ids, json_schema_input_type=dict[str, float]),
    Field(max_length=MOST_BIASED),
]
STRICT = ConfigDict(strict=True, extra="allow", json_schema_extra={"additionalProperties": False})


class Message(BaseModel):
    """One turn of a chat."""

    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    @model_validator(mode="after")
    def _check(self) -> "Message":
        refuse_extra(self.model_extra, MESSAGE_REFUSED)
        return self

    @property
    def turn(self) -> Turn:
        return Turn(ROLES.get(self.role, self.role), self.content)


class StreamOptions(BaseModel):
    model_config = STRICT
    include_usage: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> "StreamOptions":
        refuse_extra(
            self.model_extra, {"include_obfuscation": Refusal("nothing is added to hide lengths", (False,))}
        )
        return self


class JsonSchema(BaseModel):
    """A schema that the answer follows."""

    model_config = ConfigDict(strict=True, extra="forbid")
    name: Annotated[str, Field(max_length=64)]
    description: str | None = None  # the model does not see it, as it does not see the schema
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None  # the answer follows the schema in any case


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise _problem("json_schema", "It goes with the type json_schema, and only with that.")
        return self

    @property
    def schema_of_answer(self) -> Mapping[str, Any] | None:
        """The JSON schema of the answer; None: any text."""
        if self.json_schema is not None:
            return self.json_schema.schema_ or JSON_OBJECT
        return JSON_OBJECT if self.type == "json_object" else None


class Common(BaseModel):
    """What both calls have."""

    model_config = STRICT
    model: Annotated[str, Field(min_length=1, max_length=300)]
    frequency_penalty: Penalty | None = None
    logit_bias: Bias | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    presence_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None  # a name for the log

    def _check_common(self, refused: Mapping[str, Refusal]) -> None:
        refuse_extra(self.model_extra, refused)
        if self.stream_options is not None and not self.stream:
            raise _problem("stream_options", "It is for streams: set stream to true, or leave it out.")

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def choices(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    def settings(self) -> Generation:
        """How to decode; max_new_tokens is set when the prompt has been counted. OpenAI's defaults hold."""
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        return generation.seeded(generation.of_request(temperature, top_p, seed=self.seed))

    def controls(self) -> Controls:
        """What the decoder does beyond the settings."""
        return Controls(
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            stop=tuple(self.stop or ()),
        )


class ChatRequest(Common):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        self._check_common(CHAT_REFUSED)
        if (
            None not in (self.max_tokens, self.max_completion_tokens)
            and self.max_tokens != self.max_completion_tokens
        ):
            raise _problem("max_tokens", "max_tokens and max_completion_tokens contradict each other.")
        if self.top_logprobs and not self.logprobs:
            raise _problem("top_logprobs", "It needs logprobs: set that to true.")
        if self.messages[-1].role != "user":
            raise _problem("messages", "The last message must be the user's: the model answers it.")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def controls(self) -> Controls:
        schema = self.response_format.schema_of_answer if self.response_format else None
        top = (self.top_logprobs or 0) if self.logprobs else None
        return dataclasses.replace(super().controls(), json_schema=schema, top_logprobs=top)

    @property
    def conversations(self) -> list[Conversation]:
        return [Conversation(tuple(message.turn for message in self.messages))]


def _prompts(prompt: Any) -> Any:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not all(isinstance(each, str) for each in prompts):
        raise PydanticCustomError("prompt", "It must be a text or a list of texts; token ids cannot be sent.")
    return prompts


Prompts = Annotated[
    list[WholeText],
    BeforeValidator(_prompts, json_schema_input_type=str | list[str]),
    Field(min_length=1, max_length=MOST_CHOICES),
]
USUAL_COMPLETION = 16  # tokens, OpenAI's default


class CompletionRequest(Common):
    """The body of /v1/completions, which continues raw text: no template is written around it."""

    prompt: Prompts

    @model_validator(mode="after")
    def _check(self) -> "CompletionRequest":
        self._check_common(COMPLETION_REFUSED)
        if self.choices * len(self.prompt) > MOST_CHOICES:
            raise _problem("n", f"One request gets at most {MOST_CHOICES} answers.")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens or USUAL_COMPLETION

    @property
    def conversations(self) -> list[Conversation]:
        return [Conversation((Turn("prompt", text),)) for text in self.prompt]
