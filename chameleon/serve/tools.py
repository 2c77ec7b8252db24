"""Routes about the server and its tokens: models, health, metrics, tokenising, and looking into a sequence."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from chameleon.generation.inspection import attention_weights, picture_of_code, pictures_in
from chameleon.serve.errors import ApiError
from chameleon.serve.schema import AttentionBody, DetokenizeBody, InspectBody, TokenizeBody
from chameleon.serve.service import Service, encode_picture, while_connected
from chameleon.vocabulary import Modality

KINDS = {Modality.TEXT: "text", Modality.IMAGE: "code", Modality.STRUCTURE: "special"}


def add_open_routes(router: APIRouter, service: Service) -> None:
    """Add the routes that need no key."""

    @router.get("/health", summary="Whether the server runs")
    async def health() -> dict[str, str]:
        if not service.worker.is_alive:
            raise ApiError(500, "the engine thread has ended")
        return {"status": "ok"}

    @router.get("/ready", summary="Whether it takes requests")
    async def ready() -> dict[str, str]:
        if service.is_draining or not service.worker.is_alive:
            raise ApiError(503, "the server is stopping")
        return {"status": "ready"}


def add_routes(router: APIRouter, service: Service) -> None:
    """Add the routes that need a key where the server has keys."""
    model, created = service.model, int(time.time())

    @router.get("/metrics", summary="Metrics for Prometheus")
    async def metrics() -> Response:
        service.update_gauges()
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models", summary="The model that is served")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe()]}

    @router.get("/v1/models/{name:path}", summary="The model of this name")
    async def one_model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise ApiError(404, f"no model {name!r}; this server has {service.name!r}", param="model")
        return describe()

    def describe() -> dict[str, Any]:
        config, vocabulary = model.model.config, model.vocabulary
        return {
            "id": service.name,
            "object": "model",
            "created": created,
            "owned_by": "open-chameleon",
            "root": service.name,
            "max_model_len": config.context_length,
            "fingerprint": service.fingerprint,
            "image_sizes": image_sizes(),
            "defaults": {
                "guidance_scale": model.guidance_scale,
                "image": asdict(model.image_sampling),
                "text": asdict(model.text_sampling),
            },
            "image_codes": vocabulary.num_image_codes,
            "draws": model.tokenizer.image.config.decoder,
            "layers": config.layers,
            "heads": config.heads,
            "vocab_size": vocabulary.size,
            "context": "conversation" if model.prompts.is_conversational else "document",
        }

    def image_sizes() -> list[str]:
        """Return the sizes of the model's images, WIDTHxHEIGHT, the usual one first."""
        dialect, fitter = model.vocabulary.dialect, model.tokenizer.fitter
        return ["{}x{}".format(*fitter.size_of(grid)) for grid in dict.fromkeys((dialect.grid, *dialect.grids))]

    @router.post("/tokenize", summary="Text or messages to token ids")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        if body.messages is not None:
            token_ids = list(await service.token_ids(await service.conversation(body.messages)))
        else:
            bos = [model.vocabulary.bos] if body.add_special_tokens else []
            token_ids = [*bos, *await asyncio.to_thread(model.tokenizer.text_to_ids, body.prompt or "")]
        result: dict[str, Any] = {"count": len(token_ids), "max_model_len": model.model.config.context_length}
        result["tokens"] = token_ids
        if body.return_token_strs:
            result["token_strs"] = [service.token_text(token_id) for token_id in token_ids]
        return result

    @router.post("/detokenize", summary="Token ids to text")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        check_ids(body.tokens)
        data = b"".join(service.token_bytes(token_id) for token_id in body.tokens)
        return {"prompt": data.decode("utf-8", errors="replace")}

    @router.get("/tokenizer_info", summary="The special tokens")
    async def tokenizer_info() -> dict[str, Any]:
        names = {name: service.token_text(token_id) for name, token_id in model.vocabulary.specials.items()}
        ids = {f"{name}_token_id": token_id for name, token_id in model.vocabulary.specials.items()}
        return {f"{name}_token": text for name, text in names.items()} | ids | {"chat_template": None}

    @router.post("/inspect", summary="What the model thinks of each token of a sequence")
    async def inspect(body: InspectBody, http: HttpRequest) -> Any:
        check_ids(body.tokens)
        return await while_connected(http, service.limits, lambda: look_inside(body))

    async def look_inside(body: InspectBody) -> dict[str, Any]:
        scores = await service.scores(body.tokens, body.top)
        kinds = model.vocabulary.modality(scores.top_ids.new_tensor(body.tokens)).tolist()
        tokens = []
        for position, (token_id, kind) in enumerate(zip(body.tokens, kinds, strict=True)):
            entry: dict[str, Any] = {"id": token_id, "kind": KINDS[Modality(kind)], "text": service.token_text(token_id)}
            if position:
                ids = scores.top_ids[position - 1].tolist()
                values = scores.top_log_probs[position - 1].tolist()
                entry["logprob"] = float(scores.log_probs[position - 1])
                entry["entropy"] = float(scores.entropies[position - 1])
                entry["top"] = [
                    {"id": other, "text": service.token_text(other), "logprob": value}
                    for other, value in zip(ids, values, strict=True)
                ]
            tokens.append(entry)
        pictures = await service.worker.call(pictures_in, model, body.tokens)
        dialect = model.vocabulary.dialect
        shown = [
            {
                "start": start,
                "grid": list(grid),
                "row_length": dialect.row_length(grid),
                "b64_json": encode_picture(picture),
            }
            for start, grid, picture in pictures
        ]
        return {"tokens": tokens, "pictures": shown}

    @router.post("/inspect/attention", summary="Where a token attends, by head")
    async def attention(body: AttentionBody, http: HttpRequest) -> dict[str, Any]:
        check_ids(body.tokens)
        call = partial(service.worker.call, attention_weights, model, body.tokens, body.position, body.layer)
        weights = await while_connected(http, service.limits, call)
        return {"layer": body.layer, "position": body.position, "weights": weights.tolist()}

    @router.get("/inspect/code/{code}", summary="What an entry of the image codebook looks like")
    async def code(code: int) -> dict[str, Any]:
        if not 0 <= code < model.vocabulary.num_image_codes:
            raise ApiError(404, f"{code} is none of {model.vocabulary.num_image_codes} codes", param="code")
        picture = await service.worker.call(picture_of_code, model, code)
        return {"code": code, "b64_json": encode_picture(picture)}

    def check_ids(token_ids: list[int]) -> None:
        size = model.vocabulary.size
        if token_ids and max(token_ids) >= size:
            raise ApiError(400, f"tokens: {max(token_ids)} is not below {size}", param="tokens")
