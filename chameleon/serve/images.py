"""POST /v1/images/generations, /v1/images/edits and /v1/images/variations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, File, Form, UploadFile
from fastapi import Request as HttpRequest
from PIL import Image as PILImage
from PIL import ImageOps

from chameleon.document import Image
from chameleon.errors import MAX_SEED
from chameleon.generation.image_requests import Drawing, image_request, randomly_kept_codes
from chameleon.generation.request import Request
from chameleon.generation.streaming import PartialImage
from chameleon.serve.chat import opened, token_ids_json
from chameleon.serve.errors import ApiError
from chameleon.serve.schema import MAX_CHOICES, MAX_TEXT, ImageBody
from chameleon.serve.service import Answer, Service, encode_picture, while_connected
from chameleon.serve.streams import event, event_stream, merge
from chameleon.tokenizers.fitting import Size, parse_size
from chameleon.tokenizers.image import ImageFile

Finish = Callable[[PILImage.Image], PILImage.Image]


@dataclass
class ImageJob:
    """Pictures to draw, and the form of the answer."""

    service: Service
    kind: str
    """Prefix of the names of a stream's events."""
    body: ImageBody
    requests: list[Request]
    finish: Finish
    """What is done to each drawing."""

    @property
    def format(self) -> str:
        return self.body.output_format or "png"

    @property
    def about(self) -> dict[str, Any]:
        """What every answer says of its pictures."""
        return {"quality": "auto", "background": "opaque", "output_format": self.format}

    async def whole(self) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        answers = await self.service.whole_answers(self.requests)
        pictures = [picture for answer in answers for picture in answer.pictures]
        extras = await self.extras(pictures, answers, self.requests)
        encoded = await asyncio.to_thread(self.encode_all, pictures)
        data = [{"b64_json": picture} | extra for picture, extra in zip(encoded, extras, strict=True)]
        usage = self.service.usage([request.prompt for request in self.requests], answers).images()
        sizes = [size_text(picture.size) for picture in pictures]
        if len(set(sizes)) > 1:  # the model chose them
            data = [entry | {"size": size} for entry, size in zip(data, sizes, strict=True)]
        size = sizes[0] if len(set(sizes)) == 1 else "auto"
        if self.body.rank:
            data.sort(key=lambda entry: -entry["log_likelihood"])
        return {"created": int(time.time()), "data": data, "usage": usage, "size": size} | self.about

    def encode_all(self, pictures: Sequence[PILImage.Image]) -> list[str]:
        return [encode_picture(self.finish(picture), self.format) for picture in pictures]

    async def extras(
        self, pictures: Sequence[PILImage.Image], answers: Sequence[Answer], requests: Sequence[Request]
    ) -> list[dict[str, Any]]:
        """Return what is said of each picture: its seed, and what the body asks for."""
        extras: list[dict[str, Any]] = [
            {"seed": request.seed} | token_ids_json(self.body, request.prompt, answer)
            for answer, request in zip(answers, requests, strict=True)
        ]
        if self.body.rank:
            scores = self.service.model.caption_log_likelihoods
            for extra, value in zip(
                extras, await self.service.worker.call(scores, pictures, self.body.prompt, is_new=False), strict=True
            ):
                extra["log_likelihood"] = value
        return extras

    async def events(self, service: Service, generations: Sequence[Any]) -> AsyncIterator[str]:
        """Yield the events of a stream: previews as rows of codes come, and each whole picture."""
        answers, previews = [Answer() for _ in generations], self.body.partial_images or 0
        streams = [
            service.parts(generation, answer, num_previews=previews)
            for generation, answer in zip(generations, answers, strict=True)
        ]
        sent = [0] * len(answers)
        async for index, part in merge(streams):
            common = {"created_at": int(time.time()), "index": index} | self.about
            if isinstance(part, PartialImage):
                (encoded,) = await asyncio.to_thread(self.encode_all, [part.filled()])
                about = common | {"size": size_text(part.size)}
                name = f"{self.kind}.partial_image"
                yield event({"type": name, "b64_json": encoded, "partial_image_index": sent[index]} | about, name)
                sent[index] += 1
            elif isinstance(part, Image):
                assert isinstance(part.image, PILImage.Image)
                (encoded,) = await asyncio.to_thread(self.encode_all, [part.image])
                name = f"{self.kind}.completed"
                usage = service.usage([self.requests[index].prompt], [answers[index]]).images()
                (extra,) = await self.extras([part.image], [answers[index]], [self.requests[index]])
                about = common | {"size": size_text(part.image.size)}
                yield event({"type": name, "b64_json": encoded, "usage": usage} | extra | about, name)


def size_text(size: Size) -> str:
    return "{}x{}".format(*size)


def unchanged(picture: PILImage.Image) -> PILImage.Image:
    return picture


def form_body(
    prompt: Annotated[str, Form(max_length=MAX_TEXT)] = "",
    model: Annotated[str | None, Form()] = None,
    n: Annotated[int, Form(ge=1, le=MAX_CHOICES)] = 1,
    size: Annotated[str | None, Form(max_length=20)] = None,
    seed: Annotated[int | None, Form(ge=0, le=MAX_SEED)] = None,
    guidance_scale: Annotated[float | None, Form(ge=0, le=100)] = None,
    temperature: Annotated[float | None, Form(ge=0, le=10)] = None,
    top_p: Annotated[float | None, Form(gt=0, le=1)] = None,
    top_k: Annotated[int | None, Form(ge=0, le=2**31 - 1)] = None,
    response_format: Annotated[Literal["b64_json", "url"] | None, Form()] = None,
    output_format: Annotated[Literal["png", "webp", "jpeg"] | None, Form()] = None,
    stream: Annotated[bool, Form()] = False,
    partial_images: Annotated[int, Form(ge=0, le=3)] = 0,
    return_token_ids: Annotated[bool, Form()] = False,
    rank: Annotated[bool, Form()] = False,
) -> ImageBody:
    """Return the fields of a form as a body; `prompt` is what the whole picture is to show."""
    return ImageBody(**locals())


FormBody = Annotated[ImageBody, Depends(form_body)]


def add_routes(router: APIRouter, service: Service) -> None:
    """Add the routes."""
    tokenizer = service.model.tokenizer

    def check(body: ImageBody) -> None:
        tokenizer.image.network.check_decoder()
        if body.response_format == "url":
            raise ApiError(400, "response_format: only b64_json; no files are kept", param="response_format")

    @router.post("/v1/images/generations", summary="Draw pictures of a prompt")
    async def generations(body: ImageBody, http: HttpRequest) -> Any:
        check(body)
        drawing = Drawing(service.model.grid_of(asked_size(body)))
        return await draw(http, "image_generation", body, lambda seed: drawing, unchanged)

    @router.post("/v1/images/edits", summary="Draw a part of a picture anew")
    async def edits(
        http: HttpRequest,
        body: FormBody,
        image: Annotated[UploadFile, File(description="The picture.")],
        mask: Annotated[
            UploadFile | None, File(description="As large as the picture; transparent where it is drawn anew.")
        ] = None,
    ) -> Any:
        check(body)
        data, mask_data = await image.read(), await mask.read() if mask is not None else None
        async with service.reading():
            picture, painted = await asyncio.to_thread(read_mask, service, data, mask_data)
        task = await service.worker.call(service.model.painting, picture, painted)
        check_size(body, picture.size)
        return await draw(http, "image_edit", body, lambda seed: task.drawing, task.merge)

    @router.post("/v1/images/variations", summary="Draw variations of a picture")
    async def variations(
        http: HttpRequest,
        body: FormBody,
        image: Annotated[UploadFile, File(description="The picture.")],
        keep: Annotated[
            float, Form(ge=0, le=1, description="Share of the picture's codes that each variation keeps.")
        ] = 0.3,
    ) -> Any:
        check(body)
        data = await image.read()
        async with service.reading():
            picture = await asyncio.to_thread(service.read_picture, data, "image")
        check_size(body, tokenizer.fitter.size_of(tokenizer.fitter.grid_for(picture.size)))
        block = await service.worker.call(service.model.encode_picture, picture)
        body.prompt = body.prompt or await while_connected(http, service.limits, lambda: service.caption(picture))

        def kept(seed: int) -> Drawing:
            return Drawing(block.grid, randomly_kept_codes(block.code_ids, keep, seed))

        return await draw(http, "image_variation", body, kept, unchanged)

    async def draw(
        http: HttpRequest, kind: str, body: ImageBody, drawing_of: Callable[[int], Drawing], finish: Finish
    ) -> Any:
        """Answer with drawings, which seeds determine; all have one size."""
        scale = service.model.guidance_scale if body.guidance_scale is None else body.guidance_scale
        sampling, seeds = service.image_sampling(body), service.seeds(body.seed, body.n or 1)

        def build_requests() -> list[Request]:
            prompts, prompt = service.model.prompts, body.prompt
            return [
                image_request(prompts, prompt, drawing_of(seed), seed=seed, guidance_scale=scale, sampling=sampling)
                for seed in seeds
            ]

        requests = await asyncio.to_thread(build_requests)  # a long prompt takes a while
        job = ImageJob(service, kind, body, requests, finish)
        if body.stream:
            return event_stream(await opened(service, requests, job.events), service.limits)
        return await while_connected(http, service.limits, job.whole)


def asked_size(body: ImageBody) -> Size | None:
    """Return the (width, height) that a body asks for; None where it leaves that to the model."""
    return None if body.size in (None, "auto") else parse_size(body.size)


def check_size(body: ImageBody, size: Size) -> None:
    """Raise `ApiError` where a body asks for another size than that of the picture that is changed."""
    if asked_size(body) not in (None, size):
        raise ApiError(400, "size: this picture is drawn as {}x{}".format(*size), param="size")


def read_mask(service: Service, data: bytes, mask_data: bytes | None) -> tuple[PILImage.Image, PILImage.Image]:
    """Return a picture and what is drawn anew of it, white, both fitted to a size of the model's images.

    That is where the mask is transparent, or where the picture itself is, if there is no mask.
    """
    picture, fitter = service.read_picture(data, "image"), service.model.tokenizer.fitter
    where, given = ("image", data) if mask_data is None else ("mask", mask_data)
    service.read_picture(given, where)  # refuses what is damaged or too large
    alpha = ImageOps.exif_transpose(ImageFile(given, where).opened).convert("RGBA").getchannel("A")
    if alpha.size != picture.size:
        raise ApiError(400, f"mask: {alpha.size} pixels, but the picture has {picture.size}", param="mask")
    if alpha.getextrema()[0] == 255:
        raise ApiError(400, f"{where}: nothing is transparent, so nothing is to be drawn anew", param=where)
    marked = PILImage.fromarray(np.where(np.asarray(alpha) < 255, 255, 0).astype(np.uint8))
    painted = np.where(fitter.fit_mask(marked), 255, 0).astype(np.uint8)
    return PILImage.fromarray(fitter.fit(picture)), PILImage.fromarray(painted)
