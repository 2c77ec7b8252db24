"""POST /v1/images/generations and /v1/images/edits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from fastapi import APIRouter, File, Form, UploadFile
from fastapi import Request as HttpRequest
from PIL import Image as PILImage
from PIL import ImageOps

from chameleon.document import Image
from chameleon.errors import MAX_SEED
from chameleon.generation.chameleon import GUIDANCE_SCALE
from chameleon.generation.image_requests import generated_image_codes, image_request
from chameleon.generation.request import Request
from chameleon.generation.sampling import IMAGE_SAMPLING
from chameleon.generation.streaming import PartialImage
from chameleon.serve.chat import opened, preview_rows
from chameleon.serve.errors import ApiError
from chameleon.serve.schema import MAX_CHOICES, MAX_TEXT, ImageBody
from chameleon.serve.service import Answer, Service, checked_text, encode_picture, while_connected
from chameleon.serve.streams import event, event_stream, merge
from chameleon.tokenizers.image import ImageFile, fit_square

Format = Literal["png", "webp", "jpeg"]


@dataclass
class ImageJob:
    """Pictures to draw, and the form of the answer."""

    service: Service
    kind: str
    """Prefix of the names of a stream's events."""
    prompt: str
    requests: list[Request]
    finish: Callable[[PILImage.Image], PILImage.Image]
    """What is done to each drawing."""
    format: Format
    previews: int
    rank: bool = False

    @property
    def about(self) -> dict[str, Any]:
        """What every answer says of its pictures."""
        side = self.service.model.tokenizer.image.config.resolution
        return {
            "size": f"{side}x{side}",
            "quality": "auto",
            "background": "opaque",
            "output_format": self.format,
        }

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return self.service.usage([request.prompt for request in self.requests], answers).images()

    async def whole(self) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        answers = await self.service.whole_answers(self.requests)
        pictures = await self.service.worker.call(self.decode, answers)
        order = list(range(len(pictures)))
        if self.rank:
            order = await self.service.worker.call(self.service.model.rank, pictures, self.prompt)
        encoded = await asyncio.to_thread(
            lambda: [encode_picture(self.finish(picture), self.format) for picture in pictures]
        )
        data = [{"b64_json": encoded[index], "seed": self.requests[index].seed} for index in order]
        return {"created": int(time.time()), "data": data, "usage": self.usage(answers)} | self.about

    def decode(self, answers: Sequence[Answer]) -> list[PILImage.Image]:
        """Decode the pictures of all answers in one batch."""
        codes = [
            generated_image_codes(request, answer.token_ids, self.service.vocabulary)
            for request, answer in zip(self.requests, answers, strict=True)
        ]
        return self.service.model.tokenizer.image.decode(torch.stack(codes))

    async def events(self, service: Service, generations: Sequence[Any]) -> AsyncIterator[str]:
        """Yield the events of a stream: previews as rows of codes come, and each whole picture."""
        answers = [Answer() for _ in generations]
        streams = [
            service.parts(generation, answer, preview_every_n_rows=preview_rows(service, self.previews))
            for generation, answer in zip(generations, answers, strict=True)
        ]
        sent = [0] * len(answers)
        async for index, part in merge(streams):
            common = {"created_at": int(time.time()), "index": index, "seed": self.requests[index].seed} | self.about
            if isinstance(part, PartialImage) and sent[index] < self.previews:
                square = await asyncio.to_thread(self.preview, part.image)
                name = f"{self.kind}.partial_image"
                yield event({"type": name, "b64_json": square, "partial_image_index": sent[index]} | common, name)
                sent[index] += 1
            elif isinstance(part, Image):
                assert isinstance(part.image, PILImage.Image)
                encoded = await asyncio.to_thread(encode_picture, self.finish(part.image), self.format)
                name = f"{self.kind}.completed"
                usage = service.usage([self.requests[index].prompt], [answers[index]]).images()
                yield event({"type": name, "b64_json": encoded, "usage": usage} | common, name)

    def preview(self, upper: PILImage.Image) -> str:
        """Encode a partial image, grey where nothing is drawn yet."""
        square = PILImage.new("RGB", (upper.width, upper.width), (128, 128, 128))
        square.paste(upper, (0, 0))
        return encode_picture(self.finish(square), self.format)


def same(picture: PILImage.Image) -> PILImage.Image:
    return picture


def add_routes(router: APIRouter, service: Service) -> None:
    """Add both routes."""

    def check_form(size: str | None, response_format: str | None) -> None:
        service.model.tokenizer.image.network.check_decoder()
        side = service.model.tokenizer.image.config.resolution
        if size not in (None, "auto", f"{side}x{side}"):
            raise ApiError(400, f"size: this model draws {side}x{side}", param="size")
        if response_format == "url":
            raise ApiError(400, "response_format: only b64_json; no files are kept", param="response_format")

    @router.post("/v1/images/generations", summary="Draw pictures of a prompt")
    async def generations(body: ImageBody, http: HttpRequest) -> Any:
        check_form(body.size, body.response_format)
        prompt = checked_text(body.prompt, "prompt")
        sampling, scale = service.image_sampling(body), body.guidance_scale
        requests = [
            image_request(
                service.model.prompts,
                prompt,
                seed=seed,
                guidance_scale=GUIDANCE_SCALE if scale is None else scale,
                sampling=sampling,
            )
            for seed in service.seeds(body.seed, body.n or 1)
        ]
        previews = body.partial_images or 0
        job = ImageJob(
            service, "image_generation", prompt, requests, same, body.output_format or "png", previews, body.rank
        )
        return await answer(job, http, bool(body.stream))

    @router.post("/v1/images/edits", summary="Draw a part of a picture anew")
    async def edits(
        http: HttpRequest,
        image: Annotated[UploadFile, File(description="The picture.")],
        prompt: Annotated[str, Form(max_length=MAX_TEXT)] = "",
        mask: Annotated[
            UploadFile | None, File(description="As large as the picture; transparent where it is drawn anew.")
        ] = None,
        model: Annotated[str | None, Form()] = None,
        n: Annotated[int, Form(ge=1, le=MAX_CHOICES)] = 1,
        size: Annotated[str | None, Form(max_length=20)] = None,
        seed: Annotated[int | None, Form(ge=0, le=MAX_SEED)] = None,
        guidance_scale: Annotated[float | None, Form(ge=0, le=100)] = None,
        response_format: Annotated[Literal["b64_json", "url"] | None, Form()] = None,
        output_format: Annotated[Format | None, Form()] = None,
        stream: Annotated[bool, Form()] = False,
        partial_images: Annotated[int, Form(ge=0, le=3)] = 0,
    ) -> Any:
        check_form(size, response_format)
        data, mask_data = await image.read(), await mask.read() if mask is not None else None
        picture, painted = await asyncio.to_thread(read_mask, service, data, mask_data)
        task = await service.worker.call(service.model.painting, picture, painted)
        requests = [
            image_request(
                service.model.prompts,
                checked_text(prompt, "prompt"),
                seed=each,
                guidance_scale=GUIDANCE_SCALE if guidance_scale is None else guidance_scale,
                sampling=IMAGE_SAMPLING,
                fixed_codes=task.fixed_codes,
            )
            for each in service.seeds(seed, n)
        ]
        job = ImageJob(service, "image_edit", prompt, requests, task.merge, output_format or "png", partial_images)
        return await answer(job, http, stream)

    async def answer(job: ImageJob, http: HttpRequest, stream: bool) -> Any:
        service.count_prompts([request.prompt for request in job.requests])
        if stream:
            return event_stream(await opened(service, job.requests, job.events), service.limits)
        return await while_connected(http, service.limits, job.whole)


def read_mask(service: Service, data: bytes, mask_data: bytes | None) -> tuple[PILImage.Image, PILImage.Image]:
    """Return a picture and what is drawn anew of it, white, both at the model's resolution.

    That is where the mask is transparent, or where the picture itself is, if there is no mask.
    """
    picture, side = service.read_picture(data, "image"), service.model.tokenizer.image.config.resolution
    where = "image" if mask_data is None else "mask"
    given = data if mask_data is None else mask_data
    service.read_picture(given, where)  # refuses what is damaged or too large
    opened_mask = ImageOps.exif_transpose(ImageFile(given, where).opened)
    alpha = opened_mask.convert("RGBA").getchannel("A")
    if alpha.size != picture.size:
        raise ApiError(400, f"mask: {alpha.size} pixels, but the picture has {picture.size}", param="mask")
    if alpha.getextrema()[0] == 255:
        raise ApiError(400, f"{where}: nothing is transparent, so nothing is to be drawn anew", param=where)
    marked = PILImage.fromarray(np.where(np.asarray(alpha) < 255, 255, 0).astype(np.uint8))
    return fit_square(picture, side), fit_square(marked.convert("RGB"), side)
