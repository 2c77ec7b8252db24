"""Bodies of requests. Fields that OpenAI's API has and that mean nothing here are ignored, unless that would mislead."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from chameleon.errors import MAX_SEED

MAX_CHOICES = 16
MAX_STOPS = 4
MAX_LOGPROBS = 20
MAX_MESSAGES = 200
MAX_TEXT = 100_000
"""Characters of one text."""
MAX_TOKEN_IDS = 200_000

Prompt = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MAX_TOKEN_IDS)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Modality = Literal["text", "image"]


class Body(BaseModel):
    """What all bodies share."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = Field(None, description="Name of the model, as /v1/models gives it; it may be left out.")

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, value: Any) -> Any:
        """Take a field that is null as one that is left out, as OpenAI's API does."""
        return {key: field for key, field in value.items() if field is not None} if isinstance(value, dict) else value


class SamplingBody(Body):
    """Sampling of text."""

    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Left out: a random one.")
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool((self.stream_options or {}).get("include_usage"))


class ImageUrl(BaseModel):
    url: str = Field(description="A data: URL. Nothing is fetched.")


class ContentPart(BaseModel):
    """`text`, or an `image_url` that is a data URL."""

    type: Literal["text", "image_url"]
    text: Prompt | None = None
    image_url: ImageUrl | str | None = None

    @model_validator(mode="after")
    def has_its_content(self) -> ContentPart:
        if (self.text if self.type == "text" else self.image_url) is None:
            raise ValueError(f"a part of type {self.type} needs {self.type!r}")
        return self


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Prompt | Annotated[list[ContentPart], Field(max_length=MAX_MESSAGES)]


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    modalities: Annotated[list[Modality], Field(min_length=1, max_length=2)] = Field(
        ["text"],
        description='["text"]; ["text", "image"]: it may answer with pictures; ["image"]: one.',
    )
    format: Annotated[list[Modality], Field(min_length=1, max_length=32)] | None = Field(
        None, description="The parts of the answer, in order; the model chooses if left out."
    )
    max_images: int = Field(4, ge=0, le=32, description="Pictures in an answer at most.")
    partial_images: int = Field(0, ge=0, le=3, description="In a stream: previews of each picture.")
    guidance_scale: float | None = Field(None, ge=0, le=100)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    return_token_ids: bool = Field(False, description="Also give the token ids of prompt and answer.")
    tools: Any = None
    functions: Any = None
    response_format: Any = None

    @model_validator(mode="after")
    def is_served(self) -> ChatBody:
        if self.tools or self.functions:
            raise ValueError("tools are not supported")
        kind = self.response_format.get("type") if isinstance(self.response_format, dict) else self.response_format
        if kind not in (None, "text"):
            raise ValueError("response_format: only text is supported")
        return self


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: (
        Prompt
        | Annotated[list[Prompt], Field(min_length=1, max_length=64)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=64)]
        | Annotated[TokenIds, Field(min_length=1)]
    )
    max_tokens: int | None = Field(16, ge=0, le=2**31 - 1)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    suffix: str | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def is_served(self) -> CompletionBody:
        if self.suffix:
            raise ValueError("suffix is not supported")
        if self.best_of not in (None, 1) and self.best_of != self.n:
            raise ValueError("best_of is not supported")
        return self


class ImageBody(Body):
    """POST /v1/images/generations."""

    prompt: Prompt
    n: int | None = Field(1, ge=1, le=MAX_CHOICES)
    size: str | None = Field(
        None, max_length=20, description="WIDTHxHEIGHT in pixels, of those that the model draws; or auto."
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Of the first picture; left out: a random one.")
    guidance_scale: float | None = Field(None, ge=0, le=100)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    stream: bool | None = False
    partial_images: int | None = Field(0, ge=0, le=3)
    rank: bool = Field(
        False,
        description="Give each picture's log_likelihood, of the prompt as its caption; likeliest first unless streamed.",
    )
    return_token_ids: bool = Field(False, description="Also give the token ids of prompt and picture.")


class TokenizeBody(Body):
    """POST /tokenize."""

    prompt: Prompt | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def has_one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: TokenIds


class InspectBody(Body):
    """POST /inspect: a sequence to look into."""

    tokens: Annotated[TokenIds, Field(min_length=1)]
    top: int = Field(5, ge=1, le=MAX_LOGPROBS)


class AttentionBody(Body):
    """POST /inspect/attention."""

    tokens: Annotated[TokenIds, Field(min_length=1)]
    position: int = Field(ge=0, lt=MAX_TOKEN_IDS)
    layer: int = Field(ge=0, lt=1000)
