"""A model behind `chameleon serve`, or another server with OpenAI's routes for chat and images."""

from __future__ import annotations

import base64
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from PIL import Image as PILImage

from chameleon.document import Conversation, Document, Image, Message, Part, Text, part_to_json
from chameleon.errors import BadInput
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.constraints import PartKind
from chameleon.generation.prompting import Example, GuidanceScale
from chameleon.generation.sampling import IMAGE_SAMPLING, Sampling
from chameleon.tokenizers.image import load_picture
from chameleon.tokenizers.mixed import Content

CONCURRENCY = 16
"""Requests under way at a time; the server batches them."""
TIMEOUT_SECONDS = 900.0
KEY_VARIABLE = "CHAMELEON_API_KEY"
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class ServerModel:
    """Answers by a server. What needs the model itself is not available, see `local`."""

    def __init__(self, url: str, tokenizer_model: Chameleon | None = None) -> None:
        """url: such as http://127.0.0.1:8000. The key for it is read from $CHAMELEON_API_KEY.

        tokenizer_model: a bundle whose tokenizer is the server's, for what works on token ids.
        """
        self.url, self.tokenizer_model = url.rstrip("/").removesuffix("/v1"), tokenizer_model
        models = self.call("/v1/models", None)["data"]
        if not models:
            raise BadInput("the server has no model", where=self.url)
        self.name = models[0]["id"]
        self.fingerprint = str(models[0].get("fingerprint", models[0].get("root", "")))

    @property
    def is_here(self) -> bool:
        return self.tokenizer_model is not None

    def local(self, purpose: str) -> Chameleon:
        """Return the bundle given beside the server. Raise `BadInput` where there is none."""
        if self.tokenizer_model is None:
            raise BadInput(f"{purpose} needs the bundle", where=self.url, remedy="give --model BUNDLE beside --server")
        return self.tokenizer_model

    def describe(self) -> dict[str, Any]:
        return {"server": self.url, "name": self.name, "bundle": self.fingerprint}

    # --- what suites ask ---

    def generate_texts(
        self,
        prompts: Sequence[Document],
        examples: Sequence[Example],
        max_new_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
        views: int = 1,
    ) -> list[str]:
        """Generate text alone after each prompt, the examples as earlier turns. Raise `BadInput` for several views."""
        if views != 1:
            raise BadInput("a server reads each picture once", where="views", remedy="leave out --server, or the views")
        history = [
            message
            for question, answer in examples
            for message in (Message("user", question), Message("assistant", Document((Text(answer),))))
        ]

        def ask(pair: tuple[Document, int]) -> str:
            messages = [*history, Message("user", pair[0])]
            document = self.chat(messages, pair[1], max_new_tokens, sampling, {"modalities": ["text"]})
            return document.text.strip()

        return self.in_parallel(ask, list(zip(prompts, seeds or range(len(prompts)), strict=True)))

    def draw_batch(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        guidance_scale: float,
        sampling: Sampling,
    ) -> list[PILImage.Image]:
        """Draw an image for each prompt."""

        def draw(pair: tuple[str, int]) -> PILImage.Image:
            body = {"model": self.name, "prompt": pair[0], "n": 1, "seed": pair[1], "response_format": "b64_json"}
            body |= {"guidance_scale": guidance_scale, "temperature": sampling.temperature, "top_p": sampling.top_p}
            data = self.call("/v1/images/generations", body)["data"][0]["b64_json"]
            return PILImage.open(io.BytesIO(base64.b64decode(data))).convert("RGB")

        return self.in_parallel(draw, list(zip(prompts, seeds or range(len(prompts)), strict=True)))

    def generate_batch(
        self,
        contents: Sequence[Content],
        *,
        max_new_tokens: int,
        max_images: int | None,
        guidance_scale: GuidanceScale | None,
        text_sampling: Sampling,
        image_sampling: Sampling,
        format: Sequence[PartKind] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Document]:
        """Answer each document or conversation with texts and pictures."""
        more: dict[str, Any] = {"modalities": ["text", "image"], "guidance_scale": guidance_scale}
        more |= {"max_images": max_images, "format": None if format is None else list(format)}
        if image_sampling != IMAGE_SAMPLING:
            raise BadInput(
                "in conversations a server samples pictures in its own way",
                where=self.url,
                remedy=f"leave temperature {IMAGE_SAMPLING.temperature} and top_p {IMAGE_SAMPLING.top_p} as they are",
            )

        def ask(pair: tuple[Content, int]) -> Document:
            content = pair[0]
            messages = content.messages if isinstance(content, Conversation) else [Message("user", content)]
            return self.chat(messages, pair[1], max_new_tokens, text_sampling, more)

        return self.in_parallel(ask, list(zip(contents, seeds or range(len(contents)), strict=True)))

    # --- requests ---

    def in_parallel(self, ask: Callable[[Asked], Answer], inputs: Sequence[Asked]) -> list[Answer]:
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            return list(pool.map(ask, inputs))

    def chat(
        self, messages: Sequence[Message], seed: int, max_new_tokens: int, sampling: Sampling, more: dict[str, Any]
    ) -> Document:
        """Return the answer to messages."""
        body = {
            "model": self.name,
            "messages": [
                {"role": message.role, "content": [chat_part(part) for part in message.content.parts]}
                for message in messages
            ],
            "max_tokens": max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": seed,
            **{key: value for key, value in more.items() if value is not None},
        }
        choice = self.call("/v1/chat/completions", body)["choices"][0]
        content = choice["message"]["content"]
        if isinstance(content, str) or content is None:
            return Document((Text(content or ""),), choice["finish_reason"] != "length")
        parts = [
            Text(part["text"]) if part["type"] == "text" else Image(load_picture(part["image_url"]["url"]))
            for part in content
        ]
        return Document(tuple(parts), choice["finish_reason"] != "length")

    def call(self, path: str, body: dict[str, Any] | None) -> Any:
        return call_server(self.url, path, body)


def call_server(url: str, path: str, body: dict[str, Any] | None) -> Any:
    """Return a server's answer as JSON, to POST or, without a body, to GET. Raise `BadInput` with what it says."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(f"{url}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:300]
        raise BadInput(f"status {error.code}: {said}", where=url) from None
    except (OSError, ValueError) as error:
        raise BadInput(f"no answer ({error})", where=url, remedy="is `chameleon serve` running there?") from None


def chat_part(part: Part) -> dict[str, Any]:
    """Return a part of a message in OpenAI's form."""
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    image = part_to_json(Image(load_picture(part.image)))["image"]
    return {"type": "image_url", "image_url": {"url": image}}
