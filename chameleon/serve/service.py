"""What the routes share: prompts to token ids, generations to parts, and counting."""

from __future__ import annotations

import asyncio
import base64
import io
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from PIL import Image as PILImage

from chameleon.document import Conversation, Document, Image, Message, Part, Role, Text
from chameleon.errors import MAX_SEED
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.constraints import OutputConstraints
from chameleon.generation.inspection import TokenScores, token_scores
from chameleon.generation.request import Request
from chameleon.generation.sampling import GREEDY, Sampling
from chameleon.generation.streaming import CodeBlock, PartialImage, StreamDecoder
from chameleon.serve.errors import ApiError
from chameleon.serve.metrics import Metrics, RequestClock
from chameleon.serve.schema import MAX_TEXT, ChatMessage, ContentPart, SamplingBody
from chameleon.serve.settings import Limits
from chameleon.serve.worker import EngineWorker, Generation, Overloaded
from chameleon.tokenizers.image import ImageFile
from chameleon.tokenizers.mixed import Content
from chameleon.vocabulary import Vocabulary

CLIENT_CLOSED_REQUEST = 499
MAX_READING = 4
GAUGE_SECONDS = 2.0
Result = TypeVar("Result")
Shown = Part | PartialImage


class StopTexts:
    """Ends a text before the first of some strings; what may be the start of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.withheld, self.is_stopped = list(stops), "", False

    def push(self, text: str) -> str:
        """Add text and return what can be shown."""
        if self.is_stopped:
            return ""
        self.withheld += text
        stop_starts = [self.withheld.find(stop) for stop in self.stops if stop in self.withheld]
        if stop_starts:
            self.is_stopped = True
            shown, self.withheld = self.withheld[: min(stop_starts)], ""
            return shown
        longest = max(
            (size for stop in self.stops for size in range(1, len(stop)) if self.withheld.endswith(stop[:size])), default=0
        )
        shown, self.withheld = self.withheld[: len(self.withheld) - longest], self.withheld[len(self.withheld) - longest :]
        return shown

    def finish(self) -> str:
        """Return what was held back."""
        shown, self.withheld = self.withheld, ""
        return shown


@dataclass
class Usage:
    """Tokens of a request by modality: image codes, and all others as text."""

    prompt_text: int = 0
    prompt_image: int = 0
    text: int = 0
    image: int = 0

    def chat(self) -> dict[str, Any]:
        """Return the form of /v1/chat/completions."""
        prompt, completion = self.prompt_text + self.prompt_image, self.text + self.image
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"text_tokens": self.prompt_text, "image_tokens": self.prompt_image},
            "completion_tokens_details": {"text_tokens": self.text, "image_tokens": self.image},
        }

    def images(self) -> dict[str, Any]:
        """Return the form of /v1/images."""
        prompt, output = self.prompt_text + self.prompt_image, self.text + self.image
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"text_tokens": self.prompt_text, "image_tokens": self.prompt_image},
            "output_tokens": output,
            "output_tokens_details": {"text_tokens": self.text, "image_tokens": self.image},
            "total_tokens": prompt + output,
        }


@dataclass
class Answer:
    """What one generation produced."""

    token_ids: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    finish_reason: str = "stop"

    def add(self, part: Part) -> None:
        """Add a part; texts that follow each other are joined."""
        if isinstance(part, Text) and self.parts and isinstance(self.parts[-1], Text):
            self.parts[-1] = Text(self.parts[-1].text + part.text)
        else:
            self.parts.append(part)

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def pictures(self) -> list[PILImage.Image]:
        return [part.image for part in self.parts if isinstance(part, Image) and isinstance(part.image, PILImage.Image)]


class Service:
    """A model behind an engine thread."""

    def __init__(self, load: Callable[[], Chameleon], limits: Limits, name: str, metrics: Metrics) -> None:
        """load: loads the model, in the engine thread."""
        self.worker = EngineWorker(load, max_waiting=limits.waiting)
        self.model = model = self.worker.model
        self.limits, self.name, self.metrics = limits, name, metrics
        self.vocabulary, self.fingerprint = model.vocabulary, model.bundle.fingerprint
        self.special_names = {token_id: name for name, token_id in self.vocabulary.specials.items()}
        self.is_draining = False
        self.readers, self.num_reading = asyncio.Semaphore(MAX_READING), 0
        """Prompts that are read at one time, and those that are or wait for it."""
        self.counted: dict[Any, int] = {}
        """Counter of the engine's → its value when it was last read."""

    # --- prompts ---

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Wait until a prompt may be read: its text encoded, its pictures decoded. Raises `Overloaded` where many wait."""
        if self.num_reading >= MAX_READING + self.limits.waiting:
            raise Overloaded(f"{self.limits.waiting} are waiting to be read")
        self.num_reading += 1
        try:
            async with self.readers:
                yield
        finally:
            self.num_reading -= 1

    async def conversation(self, messages: Sequence[ChatMessage]) -> Conversation:
        """Return messages as a conversation, their pictures read. Raises `ApiError` for what cannot be used."""
        contents = [
            m.content if isinstance(m.content, list) else [ContentPart(type="text", text=m.content)] for m in messages
        ]
        num_images = sum(part.type == "image_url" for content in contents for part in content)
        if num_images > self.limits.images:
            raise ApiError(400, f"{num_images} pictures, at most {self.limits.images} are allowed", param="messages")
        num_characters = sum(len(part.text or "") for content in contents for part in content if part.type == "text")
        if num_characters > MAX_TEXT:
            raise ApiError(400, f"{num_characters:,} characters, at most {MAX_TEXT:,} are allowed", param="messages")
        result, pixels_left = [], self.limits.pixels
        for index, (message, content) in enumerate(zip(messages, contents, strict=True)):
            parts: list[Part] = []
            for part in content:
                if part.type == "text":
                    parts.append(Text(part.text or ""))
                else:
                    data = read_data_url(part, f"messages.{index}")
                    pixels_left -= self.check_pixels(data, f"messages.{index}", pixels_left)
                    parts.append(Image(data))
            role: Role = "system" if message.role == "developer" else message.role
            result.append(Message(role, Document(parts)))
        return Conversation(result)

    def check_pixels(self, data: bytes, where: str, most: int) -> int:
        """Return the number of pixels of a picture, of which nothing but the header is decoded. Raises `ApiError`."""
        width, height = ImageFile(data, where).size
        if width * height > most:
            raise ApiError(400, f"{width} × {height} pixels; a request may have {self.limits.pixels:,} in all", param=where)
        return width * height

    def read_picture(self, data: bytes, where: str) -> PILImage.Image:
        """Return a picture that a client sent. Raises `ApiError` or `BadInput` for one that is damaged or too large."""
        self.check_pixels(data, where, self.limits.pixels)
        return ImageFile(data, where).rgb

    async def token_ids(self, content: Content) -> tuple[int, ...]:
        """Return the token ids of a prompt; its pictures are fitted here and encoded in the engine thread."""
        prompts = self.model.prompts
        async with self.reading():
            prepared = await asyncio.to_thread(prompts.prepare, content)
        length, most = sum(len(document.token_ids) for document in prepared), self.model.model.config.context_length
        if length > most:
            raise ApiError(400, f"the prompt has {length} tokens, the context length is {most}")
        if not any(document.pictures for document in prepared):
            return prompts.encode_all([prepared])[0]
        return await self.worker.encode(prepared)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a text token; none for others."""
        return self.model.tokenizer.text_bytes([token_id]) if token_id in self.vocabulary.text_ids else b""

    def token_text(self, token_id: int) -> str:
        """Return what a token is shown as: its text, `<code 17>`, or the name of a special token, as `<boi>`.

        Parts of a character are written `bytes:\\xc3`, as OpenAI's API does.
        """
        if data := self.token_bytes(token_id):
            try:
                return data.decode("utf-8")
            except UnicodeDecodeError:
                return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        if token_id in self.vocabulary.image_ids:
            return f"<code {self.vocabulary.image_ids.index_of[token_id]}>"
        return f"<{self.special_names.get(token_id, token_id)}>"

    # --- generation ---

    def text_sampling(self, body: SamplingBody) -> Sampling:
        """Return the sampling of text that a body asks for; temperature 0 is plain greedy decoding."""
        default = GREEDY if body.temperature == 0 else self.model.text_sampling
        return changed(default, body, ("temperature", "top_p", "top_k", "repetition_penalty"))

    def image_sampling(self, body: Any) -> Sampling:
        return changed(self.model.image_sampling, body, ("temperature", "top_p", "top_k"))

    def seeds(self, seed: int | None, count: int) -> range:
        """Return a seed for each of several choices: the one that was asked for and those after it, or random ones."""
        first = secrets.randbelow(MAX_SEED - count) if seed is None else seed
        if first + count - 1 > MAX_SEED:
            raise ApiError(400, f"seed: {first} is too large for {count} choices", param="seed")
        return range(first, first + count)

    @asynccontextmanager
    async def generations(self, requests: Sequence[Request]) -> AsyncIterator[list[Generation]]:
        """Submit requests; those that have not ended are cancelled at the end, however it comes."""
        generations = self.worker.submit(requests)
        self.count_prompts({request.prompt for request in requests})
        try:
            yield generations
        finally:
            self.worker.cancel(generations)

    async def parts(
        self,
        generation: Generation,
        answer: Answer,
        stops: Sequence[str] = (),
        num_previews: int = 0,
    ) -> AsyncIterator[Shown]:
        """Yield the parts of a generation as they are complete, and note them in `answer`."""
        decoder, stop = StreamDecoder(self.model.tokenizer, num_previews=num_previews), StopTexts(stops)
        decoder.start_image(started_image(generation.request.prompt, self.vocabulary))
        clock, reason = RequestClock(self.metrics), "abort"
        try:
            async with aclosing(self.worker.tokens(generation)) as batches:  # type: ignore[type-var]
                async for token_ids in batches:
                    clock.count(len(token_ids))
                    shown: list[Shown] = []
                    for token_id in token_ids:
                        answer.token_ids.append(token_id)
                        for item in decoder.push_undecoded(token_id):
                            if isinstance(item, CodeBlock):
                                for part in joined_texts(shown):
                                    yield part
                                shown = [item.show(await self.worker.decode(item.codes))]
                                shown = self.before_stop(shown, stop, answer)
                            else:
                                shown += self.before_stop([item], stop, answer)
                        if stop.is_stopped:
                            break
                    for part in joined_texts(shown):
                        yield part
                    if stop.is_stopped:
                        break
            answer.finish_reason = "length" if generation.is_length_limited and not stop.is_stopped else "stop"
            if not stop.is_stopped:
                rest: list[Shown] = list(decoder.flush_text())
                if decoder.image_block:
                    rest += await self.worker.call(lambda: list(decoder.finish()), is_new=False)
                for part in joined_texts([*self.before_stop(rest, stop, answer), *self.withheld_text(stop, answer)]):
                    yield part
            reason = answer.finish_reason
        except Exception:
            reason = "error"
            raise
        finally:
            self.worker.cancel([generation])
            clock.end(reason)
            self.count_generated(answer)

    def before_stop(self, parts: Sequence[Shown], stop: StopTexts, answer: Answer) -> list[Shown]:
        """Return what of these parts comes before a stop text, noted in the answer."""
        shown: list[Shown] = []
        for part in parts:
            if isinstance(part, Text):
                part = Text(stop.push(part.text))
                if not part.text:
                    continue
            else:  # a stop text does not continue in or after a picture
                shown += self.withheld_text(stop, answer)
            if not isinstance(part, PartialImage):
                answer.add(part)
            shown.append(part)
        return shown

    def withheld_text(self, stop: StopTexts, answer: Answer) -> list[Shown]:
        """Return the text that was held back, which turned out to be no start of a stop text."""
        withheld = Text(stop.finish())
        if not withheld.text:
            return []
        answer.add(withheld)
        return [withheld]

    async def whole_answer(self, generation: Generation, stops: Sequence[str] = ()) -> Answer:
        """Return a generation's answer once it has ended."""
        answer = Answer()
        async with aclosing(self.parts(generation, answer, stops)) as parts:  # type: ignore[type-var]
            async for _ in parts:
                pass
        return answer

    async def whole_answers(self, requests: Sequence[Request], stops: Sequence[str] = ()) -> list[Answer]:
        """Return the answers of several requests, which run side by side."""
        async with self.generations(requests) as generations:
            tasks = [asyncio.ensure_future(self.whole_answer(generation, stops)) for generation in generations]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def caption(self, picture: PILImage.Image) -> str:
        """Return the model's caption of a picture, as `Chameleon.caption` does."""
        prompt = await self.token_ids(self.model.prompts.caption_document(picture))
        (answer,) = await self.whole_answers(
            [Request(prompt, OutputConstraints(self.model.bundle.generation.max_new_tokens), GREEDY)]
        )
        return answer.text.strip()

    async def scores(
        self, token_ids: Sequence[int], top: int, *, text_only: bool = False, is_new: bool = True
    ) -> TokenScores:
        """Score a sequence in the engine thread, see `token_scores`. is_new: see `EngineWorker.call`."""
        score = partial(token_scores, text_only=text_only)
        return await self.worker.call(score, self.model, list(token_ids), max(1, top), is_new=is_new)

    # --- counting ---

    def count_by_modality(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """Return the number of image codes, and of all other tokens."""
        images = sum(token_id in self.vocabulary.image_ids for token_id in token_ids)
        return images, len(token_ids) - images

    def usage(self, prompts: Iterable[Sequence[int]], answers: Sequence[Answer]) -> Usage:
        """Return the usage of prompts and answers."""
        usage = Usage()
        for prompt in prompts:
            images, texts = self.count_by_modality(prompt)
            usage.prompt_image += images
            usage.prompt_text += texts
        for answer in answers:
            images, texts = self.count_by_modality(answer.token_ids)
            usage.image += images
            usage.text += texts
        return usage

    def count_prompts(self, prompts: Iterable[Sequence[int]]) -> None:
        usage = self.usage(prompts, ())
        self.metrics.prompt_tokens.labels("text").inc(usage.prompt_text)
        self.metrics.prompt_tokens.labels("image").inc(usage.prompt_image)

    def count_generated(self, answer: Answer) -> None:
        usage = self.usage((), [answer])
        self.metrics.generation_tokens.labels("text").inc(usage.text)
        self.metrics.generation_tokens.labels("image").inc(usage.image)

    async def keep_gauges(self) -> None:
        """Set the gauges again and again, for a replica that another one is asked about."""
        while True:
            self.update_gauges()
            await asyncio.sleep(GAUGE_SECONDS)

    def update_gauges(self) -> None:
        """Set the metrics that are read off the engine."""
        engine, metrics = self.model.engine, self.metrics
        metrics.running.set(len(engine.scheduler.running))
        metrics.waiting.set(self.worker.num_waiting)
        metrics.cache_use.set(len(engine.manager.sequences) / engine.scheduler.max_sequences)
        for counter, value in (
            (metrics.prefix_queries, engine.manager.num_prompt_tokens),
            (metrics.prefix_hits, engine.manager.num_reused_tokens),
        ):
            counter.inc(max(0, value - self.counted.get(counter, 0)))
            self.counted[counter] = value


def joined_texts(parts: Sequence[Shown]) -> Iterator[Shown]:
    """Yield the parts, with texts that follow each other as one."""
    for is_text, group in groupby(parts, lambda part: isinstance(part, Text)):
        if is_text:
            yield Text("".join(part.text for part in group if isinstance(part, Text)))
        else:
            yield from group


def started_image(prompt: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """Return the tokens of the image that a prompt ends in, from boi on; none where it ends outside of one."""
    for position in range(len(prompt) - 1, -1, -1):
        if prompt[position] == vocabulary.eoi:
            break
        if prompt[position] == vocabulary.boi:
            return list(prompt[position:])
    return []


def changed(sampling: Sampling, body: Any, names: Sequence[str]) -> Sampling:
    """Return the sampling with those fields that the body gives."""
    given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    return replace(sampling, **given)


def read_data_url(part: ContentPart, where: str) -> bytes:
    """Return the bytes of a data: URL. Raises `ApiError` for any other URL."""
    url = part.image_url if isinstance(part.image_url, str) else part.image_url.url if part.image_url else ""
    header, comma, data = url.partition(",")
    if not header.startswith("data:") or not comma:
        raise ApiError(400, "image_url must be a data: URL; nothing is fetched", param=where)
    try:
        content = base64.b64decode(data, validate=True) if header.endswith(";base64") else b""
    except ValueError:
        content = b""
    if not content:
        raise ApiError(400, "the data: URL is not base64", param=where)
    return content


def encode_picture(picture: PILImage.Image, format: str = "png") -> str:
    """Return a picture in a file format, in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, format.upper(), **({"quality": 95} if format != "png" else {}))
    return base64.b64encode(buffer.getvalue()).decode()


async def while_connected(http: HttpRequest, limits: Limits, run: Callable[[], Any]) -> Any:
    """Return the result of a coroutine function, which is cancelled where the client goes away or the time is over."""

    async def disconnection() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(run()), asyncio.ensure_future(disconnection())
    try:
        done, _ = await asyncio.wait({task, watcher}, timeout=limits.seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if watcher in done:
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client went away")
        raise TimeoutError
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
