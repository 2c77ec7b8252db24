"""The server, through the clients that people use, against the Python API with the same model and seeds."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model, running
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from chameleon.bundle import Bundle
from chameleon.cli import main
from chameleon.document import Conversation, Document, Image, Message, Text
from chameleon.errors import BadInput
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.engine import Engine
from chameleon.generation.inspection import attention_weights, token_scores
from chameleon.generation.sampling import GREEDY, TEXT_SAMPLING, Sampling
from chameleon.generation.streaming import PartialImage
from chameleon.tokenizers.mixed import MixedTokenizer

uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx2")

from chameleon.serve.app import PAGE  # noqa: E402
from chameleon.serve.metrics import Metrics  # noqa: E402
from chameleon.serve.service import MAX_READING, Answer, Service, StopTexts  # noqa: E402
from chameleon.serve.settings import ApiKey, ApiKeys, Limits, read_keys  # noqa: E402


@pytest.fixture(scope="module")
def model(tokenizer: MixedTokenizer) -> Chameleon:
    network = random_model(tokenizer.vocabulary.size, context_length=256)
    return Chameleon(Bundle(network, tokenizer, "conversation"))


@pytest.fixture(scope="module")
def address(model: Chameleon) -> Iterator[str]:
    with running(model, name="small") as url:
        yield url


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def png(picture: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(picture: PILImage.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def from_base64(text: str) -> PILImage.Image:
    return PILImage.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def noise(seed: int, side: int = 16) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def same(one: PILImage.Image, other: PILImage.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def asking(text: str, *pictures: PILImage.Image) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


# --- chat ---


def test_chat_answers_as_the_python_api_does(client: Any, model: Chameleon) -> None:
    picture = noise(0, 40)
    content = Conversation([Message("user", Document((Image(picture), Text("which style is it?"))))])
    body = {"model": "small", "messages": asking("which style is it?", picture), "max_tokens": 12}
    for seed, given_sampling, sampling in (
        (3, {}, TEXT_SAMPLING),
        (4, {"temperature": 0}, GREEDY),
        (5, {"temperature": 1.1, "top_p": 0.5}, Sampling(1.1, 0.5, repetition_penalty=1.2)),
    ):
        expected = model.generate(content, max_new_tokens=12, max_images=0, text_sampling=sampling, seed=seed)
        answer = client.chat.completions.create(**body, **given_sampling, seed=seed)
        assert answer.choices[0].message.content == expected.text
        assert answer.choices[0].finish_reason in ("stop", "length")
        chunks = list(client.chat.completions.create(**body, **given_sampling, seed=seed, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
        assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason


def test_choices_have_seeds_of_their_own_and_usage_counts_modalities(client: Any, model: Chameleon) -> None:
    prompt = [Message("user", Document((Image(noise(1)), Text("orange heart"))))]
    answer = client.chat.completions.create(
        model="small", messages=asking("orange heart", noise(1)), n=3, seed=7, max_tokens=9
    )
    expected = [model.generate(Conversation(prompt), max_new_tokens=9, max_images=0, seed=seed).text for seed in (7, 8, 9)]
    assert [choice.message.content for choice in answer.choices] == expected
    token_ids = model.prompts.token_ids(Conversation(prompt))
    codes = math.prod(model.vocabulary.grid)
    assert answer.usage.prompt_tokens == len(token_ids)
    assert answer.usage.prompt_tokens_details.image_tokens == codes
    assert answer.usage.prompt_tokens_details.text_tokens == len(token_ids) - codes
    assert answer.usage.completion_tokens_details.image_tokens == 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_answers_may_hold_pictures(client: Any, model: Chameleon) -> None:
    """Parts in the order of the format, streamed with previews that are the upper rows of what comes."""
    extra = {"modalities": ["text", "image"], "format": ["text", "image", "text"], "partial_images": 3}
    content = Conversation([Message("user", Document((Text("two hearts"),)))])
    options = {"max_new_tokens": 90, "max_images": 4, "seed": 2}
    expected = model.generate(content, format=["text", "image", "text"], **options)  # type: ignore[arg-type]
    body = {"model": "small", "messages": asking("two hearts"), "seed": 2, "max_tokens": 90, "extra_body": extra}
    parts = client.chat.completions.create(**body).choices[0].message.content
    assert [part["type"] for part in parts] == ["text", "image_url", "text"]
    assert parts[0]["text"] == expected.parts[0].text and parts[2]["text"] == expected.parts[2].text
    picture = from_base64(parts[1]["image_url"]["url"].partition(",")[2])
    assert same(picture, expected.images[0])
    previews, texts, pictures = [], "", []
    for chunk in client.chat.completions.create(**body, stream=True):
        content_of_chunk = chunk.choices[0].delta.content or ""
        if isinstance(content_of_chunk, str):
            texts += content_of_chunk
            continue
        (part,) = content_of_chunk
        shown = from_base64(part["image_url"]["url"].partition(",")[2])
        (previews if part["type"] == "partial_image" else pictures).append((part.get("rows"), shown))
    assert texts == expected.text
    assert len(pictures) == 1 and same(pictures[0][1], picture)
    assert [rows for rows, _ in previews] == [1, 2, 3]
    assert [image.size for _, image in previews] == [(16, 4), (16, 8), (16, 12)]
    only_text = client.chat.completions.create(**body | {"extra_body": {"modalities": ["text"]}})
    assert isinstance(only_text.choices[0].message.content, str)


def test_log_probabilities_are_those_of_the_model(client: Any, model: Chameleon) -> None:
    answer = client.chat.completions.create(
        model="small", messages=asking("a b"), max_tokens=6, seed=1, logprobs=True, top_logprobs=3,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    choice = answer.choices[0]
    prompt, generated = choice.prompt_token_ids, choice.token_ids
    log_probs = model.logits(torch.tensor([prompt + generated]))[0].double().log_softmax(-1)
    entries = choice.logprobs.content
    assert len(entries) == len(generated)
    for offset, (token_id, entry) in enumerate(zip(generated, entries, strict=True)):
        row = log_probs[len(prompt) + offset - 1]
        assert entry.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert bytes(entry.bytes) == model.tokenizer.text_bytes([token_id])
    streamed = list(
        client.chat.completions.create(
            model="small", messages=asking("a b"), max_tokens=6, seed=1, logprobs=True, top_logprobs=3, stream=True
        )
    )
    (with_logprobs,) = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    assert [entry.logprob for entry in with_logprobs.content] == [entry.logprob for entry in entries]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.integers(1, 4))
@settings(max_examples=300)
def test_stop_texts_end_an_answer_before_the_first_of_them(text: str, stops: list[str], step: int) -> None:
    """However the text is cut into pieces."""
    detector, shown = StopTexts(stops), ""
    for start in range(0, len(text), step):
        shown += detector.push(text[start : start + step])
        assert not any(stop in shown for stop in stops)
    if not detector.is_stopped:
        shown += detector.finish()
    places = [text.index(stop) for stop in stops if stop in text]
    # Of two stop texts the one that is complete first ends the answer.
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    assert detector.is_stopped == bool(places)
    if len(stops) <= 1 or step >= len(text):
        assert shown == (text[: min(places)] if places else text)
    else:
        assert text.startswith(shown) and len(shown) <= (min(ends) if ends else len(text))


def test_text_that_was_held_back_comes_before_a_picture_that_forms() -> None:
    service, stop, answer = object.__new__(Service), StopTexts(["aa"]), Answer()
    forming = PartialImage(PILImage.new("RGB", (2, 1)), 1, (2, 2))
    assert service.before_stop([Text("ba"), forming, forming], stop, answer) == [Text("b"), Text("a"), forming, forming]
    assert answer.parts == [Text("ba")]
    assert service.before_stop([Text("aa")], stop, answer) == [] and stop.is_stopped


def test_log_probabilities_reach_to_the_end_of_the_context(client: Any, model: Chameleon) -> None:
    token_ids = [model.vocabulary.bos, *[30] * 250]
    answer = client.completions.create(model="small", prompt=token_ids, max_tokens=100, logprobs=0, seed=1)
    room = model.model.config.context_length + 1 - len(token_ids)
    assert len(answer.choices[0].logprobs.token_logprobs) in (room, answer.usage.completion_tokens)


def test_usage_and_token_ids_end_with_what_is_shown(client: Any, model: Chameleon) -> None:
    body = {"model": "small", "messages": asking("heart"), "seed": 6, "max_tokens": 40}
    extra = {"return_token_ids": True}
    whole = client.chat.completions.create(**body, extra_body=extra).choices[0]
    cut = client.chat.completions.create(**body, stop=[whole.message.content[4:7]], extra_body=extra)
    token_ids = cut.choices[0].token_ids
    assert token_ids == whole.token_ids[: len(token_ids)] and len(token_ids) == cut.usage.completion_tokens
    text = model.tokenizer.text_bytes(token_ids[:-1]).decode(errors="replace")
    assert cut.choices[0].message.content.startswith(text[: len(cut.choices[0].message.content)])
    assert len(token_ids) < len(whole.token_ids)


def test_a_stop_text_ends_the_answer(client: Any) -> None:
    body = {"model": "small", "messages": asking("heart"), "seed": 6, "max_tokens": 20}
    whole = client.chat.completions.create(**body).choices[0].message.content
    stop = whole[4:7]
    cut = client.chat.completions.create(**body, stop=[stop]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"
    chunks = client.chat.completions.create(**body, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]


# --- completions ---


def test_completions_echo_prompts_with_their_log_probabilities(client: Any, model: Chameleon) -> None:
    text = "the quick brown fox ü"
    answer = client.completions.create(model="small", prompt=[text, "ein"], max_tokens=0, echo=True, logprobs=2)
    for prompt, choice in zip((text, "ein"), answer.choices, strict=True):
        token_ids = [model.vocabulary.bos, *model.tokenizer.text_to_ids(prompt)]
        logits = model.logits(torch.tensor([token_ids]))[0].double().clone()
        logits[:, model.vocabulary.mask(image=True)] = -torch.inf
        log_probs = logits.log_softmax(-1)
        expected = [float(log_probs[i, token_id]) for i, token_id in enumerate(token_ids[1:])]
        assert choice.text == prompt
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
        assert len(choice.logprobs.text_offset) == len(token_ids)
        for top, row in zip(choice.logprobs.top_logprobs[1:], log_probs[:-1], strict=True):
            assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4)
    by_ids = client.completions.create(model="small", prompt=token_ids, max_tokens=0, echo=True, logprobs=2)
    assert by_ids.choices[0].logprobs.token_logprobs == answer.choices[1].logprobs.token_logprobs


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_prompt_that_is_scored_alone_is_streamed_as_it_is_answered(client: Any, logprobs: int | None) -> None:
    asked: dict[str, Any] = {"model": "small", "prompt": ["a b", "b"], "echo": True, "max_tokens": 0, "logprobs": logprobs}
    whole = client.completions.create(**asked).choices
    events = list(client.completions.create(**asked, stream=True))
    for index, choice in enumerate(whole):
        chunks = [chunk for event in events for chunk in event.choices if chunk.index == index]
        assert "".join(chunk.text for chunk in chunks) == choice.text == asked["prompt"][index]
        assert chunks[-1].finish_reason == choice.finish_reason == "length"
        assert chunks[-1].logprobs == choice.logprobs


def test_completions_continue_a_document(client: Any, model: Chameleon) -> None:
    as_document = Chameleon(Bundle(model.model, model.tokenizer, "document"))
    for seed in (0, 9):
        expected = as_document.generate(Document((Text("the fox"),)), max_new_tokens=8, max_images=0, seed=seed).text
        body = {"model": "small", "prompt": "the fox", "max_tokens": 8, "seed": seed}
        assert client.completions.create(**body).choices[0].text == expected
        assert client.completions.create(**body, echo=True).choices[0].text == "the fox" + expected
        streamed = client.completions.create(**body, echo=True, stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == "the fox" + expected


# --- pictures ---


def test_drawings_are_those_of_the_python_api(client: Any, model: Chameleon) -> None:
    expected = [model.draw("orange heart", seed=seed) for seed in (11, 12, 13)]
    answer = client.images.generate(model="small", prompt="orange heart", n=3, extra_body={"seed": 11})
    assert [image.seed for image in answer.data] == [11, 12, 13]
    assert all(same(from_base64(image.b64_json), picture) for image, picture in zip(answer.data, expected, strict=True))
    assert answer.size == "16x16" and answer.usage.output_tokens_details.image_tokens == 3 * 16
    scores = model.caption_log_likelihoods(expected, "orange heart")
    ranked = client.images.generate(model="small", prompt="orange heart", n=3, extra_body={"seed": 11, "rank": True})
    assert [image.log_likelihood for image in ranked.data] == pytest.approx(sorted(scores, reverse=True), abs=1e-4)
    jpeg = client.images.generate(model="small", prompt="a", output_format="jpeg").data[0].b64_json
    assert base64.b64decode(jpeg).startswith(b"\xff\xd8")


def test_streamed_drawings_form_row_by_row(client: Any, model: Chameleon) -> None:
    whole = model.draw("orange heart", seed=5)
    codes = model.tokenizer.image.encode([whole])  # not those that were drawn, but a grid as tall
    height = codes.shape[1]
    for count in (0, 1, 3):
        events = list(
            client.images.generate(
                model="small", prompt="orange heart", stream=True, partial_images=count, extra_body={"seed": 5}
            )
        )
        *previews, completed = events
        assert completed.type == "image_generation.completed" and same(from_base64(completed.b64_json), whole)
        assert completed.usage.output_tokens_details["image_tokens"] == math.prod(model.vocabulary.grid)
        assert [event.type for event in previews] == ["image_generation.partial_image"] * count
        assert [event.partial_image_index for event in previews] == list(range(count))
        rows = height // (count + 1)
        for index, event in enumerate(previews):
            preview = np.asarray(from_base64(event.b64_json))
            edge = 16 * rows * (index + 1) // height
            assert (preview[edge:] == 128).all() and not (preview[:edge] == 128).all()


def test_edits_change_what_is_transparent_and_nothing_else(client: Any, model: Chameleon) -> None:
    picture = noise(3)
    marked = np.zeros((16, 16), dtype=bool)
    marked[5:9, 2:14] = True
    alpha = PILImage.fromarray(np.where(marked, 0, 255).astype(np.uint8))
    mask = PILImage.merge("RGBA", (*PILImage.new("RGB", (16, 16)).split(), alpha))
    answer = client.images.edit(
        model="small", image=("a.png", png(picture)), mask=("m.png", png(mask)), prompt="noto", n=2, extra_body={"seed": 4}
    )
    painted = PILImage.fromarray(np.where(marked, 255, 0).astype(np.uint8))
    expected = model.paint(picture, painted, "noto", 2, seed=4)
    for image, other in zip(answer.data, expected, strict=True):
        edited = from_base64(image.b64_json)
        assert same(edited, other)
        assert (np.asarray(edited)[~marked] == np.asarray(picture)[~marked]).all()
        assert (np.asarray(edited)[marked] != np.asarray(picture)[marked]).any()
    events = list(
        client.images.edit(
            model="small", image=("a.png", png(picture)), mask=("m.png", png(mask)), prompt="noto", stream=True,
            extra_body={"seed": 4},
        )
    )  # fmt: skip
    assert events[-1].type == "image_edit.completed" and same(from_base64(events[-1].b64_json), expected[0])


def test_drawings_of_any_shape(sized_tokenizer: MixedTokenizer) -> None:
    """By size, or as the model chooses; edits and variations keep the shape of their picture."""
    network = random_model(sized_tokenizer.vocabulary.size, context_length=256)
    model = Chameleon(Bundle(network, sized_tokenizer, "conversation"))
    with running(model, name="small") as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        (listed,) = client.models.list().data
        assert listed.image_sizes[0] == "16x16" and "32x8" in listed.image_sizes
        answer = client.images.generate(model="small", prompt="a", size="32x8", n=2, extra_body={"seed": 3})
        assert answer.size == "32x8"
        for seed, image in enumerate(answer.data, 3):
            assert same(from_base64(image.b64_json), model.draw("a", size=(32, 8), seed=seed))
        chosen = client.images.generate(model="small", prompt="a", n=6, extra_body={"seed": 0})
        expected = model.draw_batch(["a"] * 6)
        assert all(same(from_base64(i.b64_json), one) for i, one in zip(chosen.data, expected, strict=True))
        assert chosen.size == "auto"
        assert [image.size for image in chosen.data] == ["{}x{}".format(*one.size) for one in expected]
        events = list(client.images.generate(model="small", prompt="a", size="8x32", stream=True, partial_images=2))
        assert [event.size for event in events] == ["8x32"] * 3
        assert all(from_base64(event.b64_json).size == (8, 32) for event in events)
        wide = noise(1, 40).resize((60, 20))
        (varied,) = client.images.create_variation(model="small", image=("a.png", png(wide))).data
        size = model.tokenizer.fitter.size_of(model.tokenizer.fitter.grid_for((60, 20)))
        assert from_base64(varied.b64_json).size == size and size[0] > 2 * size[1]
        for size_text, words in (("30x8", "multiples of 4"), ("wide", "not WIDTHxHEIGHT")):
            with pytest.raises(openai.BadRequestError, match=words):
                client.images.generate(model="small", prompt="a", size=size_text)
        # Looking inside: the codes of each picture lie in rows with an end.
        drawn = client.images.generate(model="small", prompt="a", size="32x8", extra_body={"return_token_ids": True}).data[
            0
        ]
        seen = httpx.post(f"{address}/inspect", json={"tokens": [*drawn.prompt_token_ids, *drawn.token_ids]}).json()
        (picture,) = seen["pictures"]
        assert (picture["grid"], picture["row_length"]) == ([2, 8], 9)
        kinds = [seen["tokens"][picture["start"] + offset]["kind"] for offset in range(18)]
        assert kinds == (["code"] * 8 + ["special"]) * 2


@given(st.integers(0, 2**16 - 1).filter(bool), st.integers(0, 3))
@settings(max_examples=25)
def test_painting_keeps_the_codes_of_cells_without_a_marked_pixel(model: Chameleon, cells: int, seed: int) -> None:
    """And draws the others after the prompt and the codes before them: greedily, what a plain loop over logits gives."""
    picture, v = noise(seed), model.vocabulary
    is_marked = np.array([bool(cells >> bit & 1) for bit in range(16)]).reshape(4, 4)
    mask = PILImage.fromarray(np.where(is_marked, 255, 0).astype(np.uint8)).resize((16, 16), PILImage.Resampling.NEAREST)
    given_ids = model.encode_picture(picture).code_ids
    task = model.painting(picture, mask)
    sequence = [*model.prompts.token_ids(Document((Text("heart"),))), v.boi]
    expected = []
    for token_id, marked in zip(given_ids, is_marked.flatten(), strict=True):
        if marked:
            logits = model.logits(torch.tensor([sequence]))[0, -1].clone()
            logits[~v.mask(image=True)] = -torch.inf
            token_id = int(logits.argmax())
        sequence.append(token_id)
        expected.append(token_id)
    drawn = model.paint(picture, mask, "heart", guidance_scale=1.0, sampling=GREEDY)[0]
    codes = v.ids_to_codes(torch.tensor(expected)).view(1, 4, 4)
    assert same(drawn, task.merge(model.tokenizer.image.decode(codes)[0]))


@pytest.mark.parametrize("size", [(16, 16), (24, 12)])
def test_variations_are_those_of_the_python_api(address: str, model: Chameleon, size: tuple[int, int]) -> None:
    picture = noise(8, 24).resize(size)
    asked: dict[str, Any] = {"n": 2, "seed": 3, "keep": 0.5}

    def varied(**others: Any) -> list[dict[str, Any]]:
        files = {"image": ("a.png", png(picture), "image/png")}
        response = httpx.post(f"{address}/v1/images/variations", data={**asked, **others}, files=files)
        data: list[dict[str, Any]] = response.json()["data"]
        return data

    expected = model.variations(picture, 2, seed=3, keep=0.5)
    assert all(same(from_base64(one["b64_json"]), other) for one, other in zip(varied(), expected, strict=True))
    ranked = varied(rank=True, prompt="a")
    scores = [one["log_likelihood"] for one in ranked]
    assert scores == sorted(scores, reverse=True) and {one["seed"] for one in ranked} == {3, 4}
    sampling = replace(model.image_sampling, top_p=0.01)
    expected = model.variations(picture, 2, seed=3, keep=0.5, prompt="a", sampling=sampling)
    drawn = varied(prompt="a", top_p=0.01)
    assert all(same(from_base64(one["b64_json"]), other) for one, other in zip(drawn, expected, strict=True))


# --- tokens, and looking inside ---


@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=30))
@settings(max_examples=40)
def test_tokenize_and_detokenize_are_a_round_trip(address: str, text: str) -> None:
    tokens = httpx.post(f"{address}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert httpx.post(f"{address}/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}


def test_inspection_gives_probabilities_pictures_and_attention(address: str, model: Chameleon) -> None:
    content = Conversation([Message("user", Document((Text("a"), Image(noise(2)), Text("b"))))])
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, *asking("b", noise(2))[0]["content"]]}]
    token_ids = httpx.post(f"{address}/tokenize", json={"messages": messages}).json()["tokens"]
    assert tuple(token_ids) == model.prompts.token_ids(content)
    answer = httpx.post(f"{address}/inspect", json={"tokens": token_ids, "top": 3}).json()
    log_probs = model.logits(torch.tensor([token_ids]))[0].double().log_softmax(-1)
    for position, token in enumerate(answer["tokens"][1:]):
        row = log_probs[position]
        assert token["logprob"] == pytest.approx(float(row[token["id"]]), abs=1e-4)
        assert token["entropy"] == pytest.approx(float(torch.distributions.Categorical(logits=row).entropy()), abs=1e-4)
        assert [top["id"] for top in token["top"]] == row.topk(3).indices.tolist()
    (picture,) = answer["pictures"]
    start = token_ids.index(model.vocabulary.boi) + 1
    assert picture["start"] == start
    codes = model.vocabulary.ids_to_codes(torch.tensor(token_ids[start : start + 16])).view(1, 4, 4)
    assert same(from_base64(picture["b64_json"]), model.tokenizer.image.decode(codes)[0])
    body = {"tokens": token_ids, "position": len(token_ids) - 2, "layer": 1}
    weights = torch.tensor(httpx.post(f"{address}/inspect/attention", json=body).json()["weights"])
    assert weights.shape == (4, len(token_ids) - 1)
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    entry = from_base64(httpx.get(f"{address}/inspect/code/3").json()["b64_json"])
    assert entry.size == (4, 4)


def test_attention_weights_give_the_output_of_attention(model: Chameleon) -> None:
    """Weights times values is what the layer's attention computes."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    attention = model.model.blocks[1].attention.sdpa
    handle = attention.register_forward_hook(lambda module, inputs, output: seen.append((inputs[2], output)))
    token_ids = list(range(20, 33))
    weights = attention_weights(model, token_ids, 12, 1)
    handle.remove()
    values, output = seen[0]
    values = values[0].repeat_interleave(2, dim=0)
    torch.testing.assert_close(torch.einsum("ht, htc -> hc", weights, values), output[0, :, -1], atol=1e-5, rtol=1e-4)
    with pytest.raises(BadInput, match="layer"):
        attention_weights(model, token_ids, 12, 7)
    with pytest.raises(BadInput, match="context length"):
        token_scores(model, [1] * 1000, 1)


# --- what is refused, and what does not fail with it ---

SMALL_PNG = data_url(noise(0, 2))


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": asking("a"), "temperature": -1}, 400, "temperature"),
        ("/v1/chat/completions", {"messages": asking("a"), "n": 99}, 400, "n: "),
        ("/v1/chat/completions", {"messages": asking("a"), "tools": [{}]}, 400, "tools are not supported"),
        ("/v1/chat/completions", {"messages": asking("a"), "response_format": {"type": "json_object"}}, 400, "only text"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "a"}]}, 400, "nothing to answer"),
        ("/v1/chat/completions", {"messages": asking("a " * 400)}, 400, "context length is 256"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "unicode"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "echo"),
        ("/v1/completions", {"prompt": [99999999]}, 400, "token id"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("/v1/images/generations", {"prompt": "a", "size": "1024x1024"}, 400, "draws 16x16"),
        ("/v1/images/generations", {"prompt": "a", "response_format": "url"}, 400, "b64_json"),
        ("/v1/images/generations", {"prompt": "a", "guidance_scale": 1e9}, 400, "guidance_scale"),
        ("/detokenize", {"tokens": [10**8]}, 400, "is not below"),
        ("/tokenize", {}, 400, "either prompt or messages"),
        ("/inspect", {"tokens": [1] * 300}, 400, "context length"),
        ("/inspect/attention", {"tokens": [1, 2], "position": 2, "layer": 0}, 400, "position"),
        ("/v1/chat/completions", b"{", 400, "JSON"),
        ("/v1/nothing", {}, 404, "Not Found"),
    ],
)
def test_bad_requests_get_openai_s_form_of_error(address: str, path: str, body: Any, status: int, message: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx.post(address + path, content=content, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == status == error["code"] and message in error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.com/a.png", "nothing is fetched"),
        ("file:///etc/passwd", "nothing is fetched"),
        ("/etc/passwd", "nothing is fetched"),
        ("data:image/png;base64,@@", "not base64"),
        ("data:image/png;base64," + base64.b64encode(b"no picture").decode(), "not a readable image"),
        ("data:image/png;base64," + base64.b64encode(png(noise(0))[:200]).decode(), "damaged image"),
    ],
)
def test_pictures_are_data_and_nothing_is_opened_or_fetched(address: str, url: str, message: str) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    response = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_a_request_has_so_much_text_at_most(address: str) -> None:
    """In all of its parts together; none is read before."""
    part = {"type": "text", "text": "ab " * 30_000}
    messages = [{"role": "user", "content": [part, part]}]
    for path in ("/v1/chat/completions", "/tokenize"):
        response = httpx.post(f"{address}{path}", json={"messages": messages})
        assert response.status_code == 400 and "180,000 characters, at most 100,000" in response.text


def test_requests_that_would_wait_long_to_be_read_are_refused(model: Chameleon) -> None:
    service = Service(lambda: model, Limits(waiting=1), "small", Metrics())
    service.worker.stop()

    async def enter(num_readers: int) -> list[Any]:
        released = asyncio.Event()

        async def read() -> None:
            async with service.reading():
                await released.wait()

        tasks = [asyncio.ensure_future(read()) for _ in range(num_readers)]
        await asyncio.sleep(0.01)
        released.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    async def enter_twice() -> list[list[Any]]:
        return [await enter(MAX_READING + 3) for _ in range(2)]

    for results in asyncio.run(enter_twice()):  # at the second time the first ones have left
        assert [type(result).__name__ for result in results] == ["NoneType"] * (MAX_READING + 1) + ["Overloaded"] * 2


def test_bombs_are_refused(model: Chameleon) -> None:
    limits = Limits(pixels=10_000, images=2, body_bytes=20_000)
    with running(model, limits=limits) as url:
        large = data_url(PILImage.new("RGB", (101, 100)))
        cases = [
            (asking("a", PILImage.new("RGB", (101, 100))), 400, "101 × 100 pixels"),
            (asking("a", *[PILImage.new("RGB", (90, 100))] * 2), 400, "90 × 100 pixels; a request may have 10,000"),
            (asking("a", *[noise(0, 2)] * 3), 400, "3 pictures"),
            ([{"role": "user", "content": large + "x" * 20_000}], 413, "20,000 bytes"),
        ]
        for messages, status, message in cases:
            response = httpx.post(f"{url}/v1/chat/completions", json={"messages": messages})
            assert response.status_code == status and message in response.json()["error"]["message"]
        chunks = (b"x" * 1000 for _ in range(30))  # no Content-Length tells the size
        response = httpx.post(f"{url}/v1/chat/completions", content=chunks)
        assert response.status_code == 413


def test_a_request_that_fails_fails_alone(model: Chameleon, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(model) as url:
        monkeypatch.setattr("chameleon.serve.service.token_scores", lambda *_: 1 / 0)
        body = {"messages": asking("a"), "max_tokens": 4, "seed": 0}
        failed = httpx.post(f"{url}/v1/chat/completions", json=body | {"logprobs": True})
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
        assert "division" not in failed.text  # what went wrong stays in the log
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
        streamed = httpx.post(f"{url}/v1/chat/completions", json=body | {"logprobs": True, "stream": True})
        assert '"error"' in streamed.text and streamed.status_code == 200


def test_nobody_waits_for_an_engine_that_has_ended(model: Chameleon, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was doing and what comes later gets status 503, and so does the question whether it is ready."""
    own = Chameleon(model.bundle)
    with running(own) as url:
        monkeypatch.setattr("chameleon.serve.worker.EngineWorker.deliver", lambda _: 1 / 0)
        body = {"messages": asking("a"), "max_tokens": 4, "seed": 0}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20).status_code == 503
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20).status_code == 503
        assert httpx.post(f"{url}/inspect", json={"tokens": [1, 2]}, timeout=20).status_code == 503
        assert [httpx.get(f"{url}/{path}").status_code for path in ("health", "ready")] == [500, 503]


class Paused:
    """An engine whose passes wait until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate, run_step = threading.Event(), Engine.run_step

        def waiting_step(engine: Engine, *arguments: Any) -> None:
            self.gate.wait(10)
            run_step(engine, *arguments)

        monkeypatch.setattr(Engine, "run_step", waiting_step)


def until(condition: Any, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_a_full_queue_refuses_and_says_when_to_come_back(model: Chameleon, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Chameleon(model.bundle, max_batch_size=1)
    paused = Paused(monkeypatch)
    with running(small, limits=Limits(waiting=2)) as url:
        body = {"messages": asking("a"), "max_tokens": 3, "seed": 0}
        statuses: list[int] = []

        def ask() -> None:
            statuses.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).status_code)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert until(lambda: "num_requests_waiting 2.0" in httpx.get(f"{url}/metrics").text)
        refused = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        paused.gate.set()
        for thread in threads:
            thread.join()
        assert statuses == [200, 200]
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200


def test_a_deadline_ends_a_request_and_frees_its_rows(model: Chameleon, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Chameleon(model.bundle)
    paused = Paused(monkeypatch)
    with running(own, limits=Limits(seconds=0.3)) as url:
        body = {"messages": asking("a"), "max_tokens": 100, "seed": 0}
        late = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert late.status_code == 408 and late.json()["error"]["type"] == "timeout_error"
        paused.gate.set()
        assert until(lambda: own.engine.is_idle and not own.engine.scheduler.requests)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_rows(model: Chameleon, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    own = Chameleon(model.bundle)
    paused = Paused(monkeypatch)
    with running(own) as url:
        body = json.dumps({"messages": asking("a"), "max_tokens": 200, "seed": 0, "n": 4, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            assert until(lambda: len(own.engine.scheduler.requests) == 4)
        time.sleep(0.3)
        paused.gate.set()
        assert until(lambda: own.engine.is_idle and not own.engine.scheduler.requests)
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        generated = httpx.get(f"{url}/metrics").text
        count = float(re.search(r'generation_tokens_total\{modality="text"\} (\S+)', generated)[1])  # type: ignore[index]
        assert count < 4 * 100  # not to the end


# --- keys ---


def test_keys_are_asked_for_and_their_rates_are_kept(model: Chameleon, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# clients\nfirst-key-1\nsecond-key-2 2  # slow\n")
    with running(model, keys=read_keys(file)) as url:
        get = lambda path, key=None: httpx.get(url + path, headers={"Authorization": f"Bearer {key}"} if key else {})  # noqa: E731
        assert [get(path).status_code for path in ("/health", "/ready", "/", "/docs", "/page/page.css")] == [200] * 5
        for key in (None, "wrong", "first-key-", "é"):
            headers = {} if key is None else {"Authorization": b"Bearer " + key.encode()}
            refused = httpx.get(f"{url}/v1/models", headers=headers)
            assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"
        for path in ("/v1/models", "/metrics"):
            assert get(path).status_code == 401 and get(path, "first-key-1").status_code == 200
        assert [get("/v1/models", "second-key-2").status_code for _ in range(3)] == [200, 200, 429]
        assert 1 <= int(get("/v1/models", "second-key-2").headers["Retry-After"]) <= 60
        assert get("/v1/models", "first-key-1").status_code == 200


@given(st.lists(st.floats(0, 40), min_size=1, max_size=60), st.integers(1, 20))
def test_a_rate_is_never_exceeded(gaps: list[float], per_minute: int) -> None:
    """In no minute more than twice the rate (a full bucket and what flows in); and one that waits as told gets through."""
    key, now, served = ApiKey("k" * 8, per_minute), 100.0, []
    for gap in gaps:
        now += gap
        if wait := key.seconds_to_wait(now):
            now += wait + 1e-6
            assert not key.seconds_to_wait(now)
        served.append(now)
    assert all(sum(time <= other < time + 60 for other in served) <= 2 * per_minute for time in served)


def test_pages_of_other_hosts_cannot_use_a_server_without_keys(model: Chameleon) -> None:
    """Neither by a name of theirs that leads here, nor by a form."""
    with running(Chameleon(model.bundle), hosts=("127.0.0.1", "localhost")) as url:
        port = url.rpartition(":")[2]
        for headers, status in (
            ({}, 200),
            ({"Host": f"localhost:{port}"}, 200),
            ({"Origin": url}, 200),
            ({"Host": "evil.example"}, 403),
            ({"Origin": "https://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": "http://[", "Host": "x"}, 403),
        ):
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status, headers


def test_keys_are_compared_whole() -> None:
    keys = ApiKeys([ApiKey("one-key-1"), ApiKey("other-key")])
    assert keys.find("other-key") is keys.keys[1]
    assert [keys.find(given) for given in ("", "one-key", "one-key-11", "ONE-KEY-1")] == [None] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "no key is asked for"),
        (["--api-keys", "none.txt"], "none.txt"),
        (["--api-keys", "keys.txt"], "keys.txt, line 2: "),
        (["--replicas", "0"], "must be positive"),
        (["--timeout", "inf"], "must be positive"),
        (["--port", "1", "--host", "256.1.1.1", "--open"], "cannot listen there"),
        (["--model", "nothing-here"], "no bundle here"),
    ],
)
def test_the_command_refuses_what_cannot_be_meant(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CHAMELEON_API_KEY", raising=False)
    Path("keys.txt").write_text("long-enough\nshort\n")
    port = [] if "--port" in arguments else ["--port", "0"]
    with pytest.raises(SystemExit) as exit_:
        main(["serve", *port, *arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and message in error and len(error.splitlines()) == 1


# --- the process ---


def start_server(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "chameleon.cli", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:"), line
    return process, line.split("/ ")[0]


def test_sigterm_drains_and_ends_with_zero(bundle_folder: Path) -> None:
    """What is running is answered whole; what comes later is not accepted."""
    process, url = start_server("--model", str(bundle_folder), "--dtype", "float32", "--max-batch-size", "2")
    try:
        answers: list[Any] = []
        body = {"prompt": "heart", "n": 16, "seed": 0, "guidance_scale": 3}
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/images/generations", json=body, timeout=60))
        )
        thread.start()
        running_line = "chameleon:num_requests_running"
        with httpx.Client() as client:  # one drawing after the other, so that some are left when the signal comes
            assert until(lambda: f"{running_line} 0.0" not in client.get(f"{url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        thread.join(60)
        assert process.wait(30) == 0
        assert answers[0].status_code == 200 and len(answers[0].json()["data"]) == 16
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    finally:
        process.kill()


def test_replicas_share_a_port_and_a_killed_one_comes_back(bundle_folder: Path) -> None:
    process, url = start_server("--model", str(bundle_folder), "--replicas", "2")
    try:
        import psutil

        def replicas() -> list[psutil.Process]:
            running = []
            for child in psutil.Process(process.pid).children():
                with suppress(psutil.NoSuchProcess):  # it ended meanwhile
                    is_zombie = child.status() == psutil.STATUS_ZOMBIE
                    if not is_zombie and "spawn_main" in " ".join(child.cmdline()):
                        running.append(child)
            return running

        first = replicas()
        assert len(first) == 2
        first[0].kill()
        assert until(lambda: len([p for p in replicas() if p.pid not in {f.pid for f in first}]) == 1, 30)

        def answers() -> bool:
            try:
                return httpx.post(f"{url}/tokenize", json={"prompt": "a"}).status_code == 200
            except httpx.HTTPError:
                return False

        assert until(answers)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()


@pytest.mark.slow
def test_replicas_on_ray_share_the_load_and_a_killed_one_comes_back(bundle_folder: Path) -> None:
    """Under load from 4 clients; only what the killed replica was serving fails."""
    pytest.importorskip("ray.serve")
    import psutil

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--model", str(bundle_folder), "--engine", "ray", "--replicas", "3", "--cpus", "0.2", "--port", str(port))
    process, url = start_server(*options)
    try:

        def replicas() -> set[int]:
            return {
                p.pid
                for p in psutil.process_iter()
                if "ServeReplica" in "".join(p.cmdline() if p.status() != "zombie" else [])
            }

        first, statuses, is_over = replicas(), list[int](), threading.Event()
        assert len(first) == 3

        def ask() -> None:
            with httpx.Client() as client:
                while not is_over.is_set():
                    body = {"prompt": "heart", "seed": 0}
                    try:
                        response = client.post(f"{url}/v1/images/generations", json=body, timeout=20)
                        statuses.append(response.status_code)
                    except httpx.TimeoutException:  # the proxy may wait for a replica that was killed
                        statuses.append(408)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(2)
        os.kill(next(iter(first)), signal.SIGKILL)
        came_back = until(lambda: len(replicas() - first) == 1, 60)
        time.sleep(2)
        is_over.set()
        for thread in threads:
            thread.join()
        num_lost = len(statuses) - statuses.count(200)
        assert came_back and set(statuses) <= {200, 408, 500} and num_lost <= 4 < statuses.count(200)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    finally:
        process.kill()


def test_texts_do_not_wait_behind_drawings(model: Chameleon) -> None:
    """A quarter of the sequences is theirs: a text is answered before the first of many drawings."""
    own, finished = Chameleon(model.bundle, max_batch_size=8), list[str]()
    step = own.engine.run_step
    with running(own) as url:

        def ask(kind: str) -> None:
            if kind == "text":
                httpx.post(f"{url}/v1/chat/completions", json={"messages": asking("a"), "max_tokens": 3, "seed": 0})
            else:
                httpx.post(f"{url}/v1/images/generations", json={"prompt": "a", "guidance_scale": 3, "seed": 0})
            finished.append(kind)

        own.engine.run_step = lambda *arguments: (time.sleep(0.02), step(*arguments))  # type: ignore[method-assign]
        threads = [threading.Thread(target=ask, args=("drawing",)) for _ in range(12)]
        for thread in threads:
            thread.start()
        assert until(lambda: len(own.engine.scheduler.running) == 3)
        text = threading.Thread(target=ask, args=("text",))
        text.start()
        for thread in (*threads, text):
            thread.join()
    assert finished.index("text") <= 3  # of twelve, three at a time


# --- the page, the schema, metrics ---


def test_the_page_loads_nothing_from_elsewhere(address: str) -> None:
    page = httpx.get(f"{address}/")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    for file in PAGE.iterdir():
        text = httpx.get(f"{address}/page/{file.name}").text
        assert text == file.read_text(encoding="utf-8")
        assert not re.search(
            r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w.]+\.\w+", re.sub(r"(?m)^\s*//.*|\s//\s.*", "", text)
        )
    for name in re.findall(r'(?:src|href)="/page/([^"]+)"', page.text) + re.findall(
        r'from "\./(\w+\.js)"', "".join(file.read_text() for file in PAGE.glob("*.js"))
    ):
        assert (PAGE / name).is_file()
    assert httpx.get(f"{address}/page/../app.py").status_code == 404


def test_docs_show_every_route(address: str) -> None:
    page, schema = httpx.get(f"{address}/docs").text, httpx.get(f"{address}/openapi.json").json()
    assert all(path in page for path in schema["paths"]) and "<script" not in page
    assert {"/v1/chat/completions", "/v1/completions", "/v1/images/generations", "/v1/images/edits"} <= set(schema["paths"])


def test_metrics_count_tokens_by_modality(model: Chameleon) -> None:
    with running(Chameleon(model.bundle)) as url:
        httpx.post(f"{url}/v1/images/generations", json={"prompt": "a", "n": 2, "seed": 0})
        httpx.post(f"{url}/v1/chat/completions", json={"messages": asking("b", noise(0)), "seed": 0, "max_tokens": 5})
        text = httpx.get(f"{url}/metrics").text
        value = lambda name: float(re.search(rf"^chameleon:{name} (\S+)", text, re.MULTILINE)[1])  # type: ignore[index]  # noqa: E731
        assert value(r'generation_tokens_total\{modality="image"\}') == 2 * 16
        assert value(r'prompt_tokens_total\{modality="image"\}') == 16
        assert value(r"time_to_first_token_seconds_count") == 3
        assert value(r"prefix_cache_hits_total") > 0
        assert value(r"num_requests_running") == 0


def test_the_guide_s_example_runs(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    guide = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```py\n(.*?)^```", guide, re.M | re.S)
    exec(example.replace("http://127.0.0.1:8000", address), {})
    assert capsys.readouterr().out


def test_the_dashboard_shows_metrics_that_there_are(address: str) -> None:
    folder = Path(__file__).parent.parent / "deploy" / "grafana"
    expressions = [
        target["expr"]
        for panel in json.loads((folder / "chameleon.json").read_text())["panels"]
        for target in panel["targets"]
    ]
    names = {
        re.sub(r"_(bucket|count|sum)$", "", name) for text in expressions for name in re.findall(r"chameleon:\w+", text)
    }
    text = httpx.get(f"{address}/metrics").text
    assert names and all(f"# TYPE {name} " in text or f"# TYPE {name.removesuffix('_total')} " in text for name in names)


def test_streams_of_several_requests_are_merged_and_their_errors_raised() -> None:
    from chameleon.serve.streams import merge

    async def count(number: int) -> Any:
        for value in range(number):
            yield value
        if number == 3:
            raise BadInput("three")

    async def run(*numbers: int) -> list[Any]:
        return sorted([item async for item in merge([count(number) for number in numbers])])

    assert asyncio.run(run(2, 1)) == [(0, 0), (0, 1), (1, 0)]
    with pytest.raises(BadInput, match="three"):
        asyncio.run(run(2, 3))


# --- the schema, fuzzed ---


@pytest.mark.parametrize("num_cases", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_no_request_that_the_schema_allows_breaks_the_server(model: Chameleon, num_cases: int) -> None:
    """13 routes, so `slow` sends 5,000 cases."""
    schemathesis = pytest.importorskip("schemathesis")
    import psutil

    with running(Chameleon(model.bundle), limits=Limits(seconds=20)) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        statuses, start_memory = [], 0
        for operation in schema.get_all_operations():
            strategy = operation.ok().as_strategy()

            @given(strategy)
            @settings(
                max_examples=num_cases, database=None, suppress_health_check=list(__import__("hypothesis").HealthCheck)
            )
            def send(case: Any) -> None:
                response = case.call(timeout=30)
                statuses.append(response.status_code)
                assert response.status_code < 500 or response.status_code == 503, (case, response.content)

            send()
            start_memory = start_memory or psutil.Process().memory_info().rss
        assert len(statuses) >= 10 * num_cases and 200 in statuses
        assert httpx.get(f"{url}/health").status_code == 200
        assert psutil.Process().memory_info().rss < start_memory + 400 * 2**20
