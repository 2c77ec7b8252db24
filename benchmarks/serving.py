"""The server under load, all from loopback, each part in processes of their own.

    python benchmarks/serving.py [--only batching hf overhead first_token start] [--soak SECONDS]

* `batching`: pictures and captions a second with 16 clients, against the same server answering one request at a time.
* `hf`: 16 clients of a text model of 12 layers × 768 with random weights, against a FastAPI loop around Hugging Face's
  `generate` with the same weights.
* `overhead`: one streamed caption-free text, tokens a second, against the engine in Python.
* `first_token`: a caption's first token behind 16 drawings, against alone.
* `start`: seconds from the command to its first answer.
* `--soak`: 64 mixed clients with random cancels. Every answer is compared with the engine's for its seed (float32, exact),
  and the resident memory is watched.

Rounds of the two sides of a comparison alternate; medians are printed, as JSON lines.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil

CLIENTS = 16
ROUNDS = 3
TEXT_TOKENS = 48
HF_SHAPE = {"layers": 12, "width": 768, "heads": 12, "kv_heads": 12, "ffn_width": 2048, "context_length": 512}
HF_SERVER = """
import sys
sys.path.insert(0, {benchmarks!r})
import torch, uvicorn
from fastapi import FastAPI
from threading import Lock
from transformers import ChameleonForConditionalGeneration
from hugging_face import config_of, state_of
from chameleon.bundle import Bundle
torch.set_num_threads(2)
bundle = Bundle.load({bundle!r}, dtype=torch.bfloat16 if {bfloat16} else torch.float32)
model = ChameleonForConditionalGeneration(config_of(bundle.model.config)).to(next(bundle.model.parameters()).dtype).eval()
state = {{f"model.{{name}}": value for name, value in state_of(bundle.model).items()}}
loaded = model.load_state_dict(state | {{"lm_head.weight": bundle.model.head.weight}}, strict=False)
assert not loaded.unexpected_keys and all("vqmodel" in key for key in loaded.missing_keys), loaded
app, lock = FastAPI(), Lock()

@app.post("/v1/completions")
def complete(body: dict):
    ids = torch.tensor([body["prompt"]])
    with lock, torch.inference_mode():
        count = body["max_tokens"]
        out = model.generate(input_ids=ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return {{"tokens": out[0, ids.shape[1]:].tolist()}}

print("http://127.0.0.1:{port}/ ", flush=True)
uvicorn.run(app, port={port}, log_level="warning")
"""


@contextmanager
def server(*arguments: str, command: Sequence[str] = ()) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server; yields its address and process."""
    command = command or [sys.executable, "-m", "chameleon.cli", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url = process.stdout.readline().split("/ ")[0]
        while True:
            try:
                httpx2.get(f"{url}/health")
                break
            except httpx2.ConnectError:
                time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(90)


def in_parallel(count: int, run: Callable[[int], None]) -> float:
    """Run a function in so many threads and return the seconds until all are done."""
    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def post(url: str, path: str, body: dict[str, Any], client: Any) -> Any:
    response = client.post(url + path, json=body, timeout=600)
    response.raise_for_status()
    return response.json()


def draw_some(url: str, per_client: int) -> float:
    """Return drawings a second of 16 clients."""

    clients = [httpx2.Client() for _ in range(CLIENTS)]

    def run(index: int) -> None:
        for number in range(per_client):
            post(url, "/v1/images/generations", {"prompt": "red heart", "seed": index * 100 + number}, clients[index])

    return CLIENTS * per_client / in_parallel(CLIENTS, run)


def caption_some(url: str, pictures: Sequence[str], per_client: int) -> float:
    """Return captions a second of 16 clients, each of another picture."""

    clients = [httpx2.Client() for _ in range(CLIENTS)]

    def run(index: int) -> None:
        for number in range(per_client):
            part = {"type": "image_url", "image_url": {"url": pictures[(index * per_client + number) % len(pictures)]}}
            message = {"role": "user", "content": [part]}
            post(url, "/v1/chat/completions", {"messages": [message], "temperature": 0, "max_tokens": 12}, clients[index])

    return CLIENTS * per_client / in_parallel(CLIENTS, run)


def emoji_urls(count: int) -> list[str]:
    from chameleon.data import emoji

    urls = []
    for entry in emoji.load("train")[:: max(1, 3000 // count)][:count]:
        buffer = io.BytesIO()
        entry.picture.save(buffer, "PNG")
        urls.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    return urls


def batching() -> dict[str, Any]:
    pictures = emoji_urls(64)
    rates: dict[str, list[float]] = {
        "drawings": [],
        "drawings, one at a time": [],
        "captions": [],
        "captions, one at a time": [],
    }
    with (
        server() as (batched, _),
        server("--max-batch-size", "2") as (single, _),
        server("--max-batch-size", "1") as (single_caption, _),
    ):
        draw_some(batched, 1), draw_some(single, 1)
        caption_some(batched, pictures, 1), caption_some(single_caption, pictures, 1)
        for _ in range(ROUNDS):
            rates["drawings"].append(draw_some(batched, 4))
            rates["drawings, one at a time"].append(draw_some(single, 1))
            rates["captions"].append(caption_some(batched, pictures, 8))
            rates["captions, one at a time"].append(caption_some(single_caption, pictures, 4))
    result: dict[str, Any] = {name: statistics.median(values) for name, values in rates.items()}
    for kind in ("drawings", "captions"):
        result[f"ratio of {kind}"] = result[kind] / result[f"{kind}, one at a time"]
    return result


def hf() -> dict[str, Any]:
    import torch

    from chameleon.bundle import Bundle
    from chameleon.device import fast_bfloat16
    from chameleon.model.config import ModelConfig
    from chameleon.model.transformer import Transformer

    shipped = Bundle.load()
    with tempfile.TemporaryDirectory() as folder:
        model = Transformer(ModelConfig(vocab_size=shipped.vocabulary.size, **HF_SHAPE))  # type: ignore[arg-type]
        model.init_weights(0)
        Bundle(model, shipped.tokenizer, "document").save(f"{folder}/bundle")
        script = HF_SERVER.format(
            benchmarks=str(Path(__file__).parent), bundle=f"{folder}/bundle", port=8917, bfloat16=fast_bfloat16("cpu")
        )
        prompt = [shipped.vocabulary.bos, *shipped.tokenizer.text_to_ids("the quick brown fox jumps over the lazy dog")]
        body = {"prompt": prompt, "max_tokens": TEXT_TOKENS, "temperature": 0}

        def rate(url: str, per_client: int) -> float:
            counts: list[int] = []
            clients = [httpx2.Client() for _ in range(CLIENTS)]

            def run(index: int) -> None:
                for _ in range(per_client):
                    answer = post(url, "/v1/completions", body | {"prompt": [*prompt, 40 + index]}, clients[index])
                    counts.append(len(answer["tokens"]) if "tokens" in answer else answer["usage"]["completion_tokens"])

            seconds = in_parallel(CLIENTS, run)
            return sum(counts) / seconds

        with (
            server("--model", f"{folder}/bundle") as (ours, _),
            server(command=[sys.executable, "-c", script]) as (theirs, _),
        ):
            rate(ours, 1), rate(theirs, 1)
            pairs = [(rate(ours, 2), rate(theirs, 1)) for _ in range(ROUNDS)]
        del torch
    result: dict[str, Any] = {
        name: statistics.median(values) for name, values in zip(("ours", "theirs"), zip(*pairs, strict=True), strict=True)
    }
    return {f"tokens a second, {name}": value for name, value in result.items()} | {
        "ratio": result["ours"] / result["theirs"]
    }


def overhead() -> dict[str, Any]:
    """One stream of text through the server, and the same request to the engine in this process."""
    from chameleon.document import Document, Text
    from chameleon.generation.chameleon import Chameleon

    model, client = Chameleon.load(), httpx2.Client()
    times: dict[str, list[float]] = {"engine": [], "server": []}
    content, tokens = Document((Text("the quick brown fox"),)), 256

    def engine() -> float:
        start, count = time.perf_counter(), 0
        request = model.document_request(content, model.constraints(tokens, 0, None, None), None, *samplings(), seed=count)
        for _ in model.engine.stream([request]):
            count += 1
        return count / (time.perf_counter() - start)

    def samplings() -> tuple[Any, Any]:
        from chameleon.generation.sampling import IMAGE_SAMPLING, Sampling

        return Sampling(1.0, 1.0), IMAGE_SAMPLING

    def streamed(url: str) -> float:
        body = {
            "messages": [{"role": "user", "content": "the quick brown fox"}], "max_tokens": tokens, "seed": 0,
            "temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        start, count = time.perf_counter(), 0
        with client.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                if '"usage"' in line:
                    count = json.loads(line[6:])["usage"]["completion_tokens"]
        return count / (time.perf_counter() - start)

    def drawn_by_engine() -> float:
        start = time.perf_counter()
        model.draw("red heart", seed=1)
        return time.perf_counter() - start

    def drawn_by_server(url: str) -> float:
        start = time.perf_counter()
        post(url, "/v1/images/generations", {"prompt": "red heart", "seed": 1}, client)
        return time.perf_counter() - start

    drawings: dict[str, list[float]] = {"engine": [], "server": []}
    with server() as (url, _):
        for index in range(4 * ROUNDS):
            values = engine(), streamed(url), drawn_by_engine(), drawn_by_server(url)
            if index:
                times["engine"].append(values[0])
                times["server"].append(values[1])
                drawings["engine"].append(values[2])
                drawings["server"].append(values[3])
    rates = {name: statistics.median(values) for name, values in times.items()}
    seconds = {name: statistics.median(values) for name, values in drawings.items()}
    return {
        **{f"tokens a second, {name}": value for name, value in rates.items()},
        "overhead of text": rates["engine"] / rates["server"] - 1,
        **{f"seconds of a drawing, {name}": value for name, value in seconds.items()},
        "overhead of a drawing": seconds["server"] / seconds["engine"] - 1,
    }


def first_token() -> dict[str, Any]:
    pictures, client, alone, behind = emoji_urls(32), httpx2.Client(), [], []
    clients = [httpx2.Client() for _ in range(CLIENTS)]

    def caption(url: str, index: int) -> float:
        part = {"type": "image_url", "image_url": {"url": pictures[index % len(pictures)]}}
        body = {"messages": [{"role": "user", "content": [part]}], "temperature": 0, "max_tokens": 12, "stream": True}
        start = time.perf_counter()
        with client.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                if '"content":"' in line and '"content":""' not in line:
                    return time.perf_counter() - start
        return time.perf_counter() - start

    with server() as (url, _):
        draw_some(url, 1)
        for index in range(5 * ROUNDS):
            alone.append(caption(url, 2 * index))
            threads = [
                threading.Thread(
                    target=post, args=(url, "/v1/images/generations", {"prompt": "red heart", "seed": seed}, clients[seed])
                )
                for seed in range(CLIENTS)
            ]
            for thread in threads:
                thread.start()
            time.sleep(0.3)
            behind.append(caption(url, 2 * index + 1))
            for thread in threads:
                thread.join()
    medians = {"alone": statistics.median(alone), "behind 16 drawings": statistics.median(behind)}
    return {f"seconds, {name}": value for name, value in medians.items()} | {
        "ratio": medians["behind 16 drawings"] / medians["alone"]
    }


def start() -> dict[str, Any]:
    seconds = []
    for _ in range(ROUNDS + 1):
        begin = time.perf_counter()
        with server() as (url, _):
            post(url, "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}, httpx2)
            seconds.append(time.perf_counter() - begin)
    return {"seconds to the first answer": statistics.median(seconds[1:])}


# --- soak ---


def soak(seconds: float) -> dict[str, Any]:
    """64 clients of mixed requests for a while. Answers are kept by request, and compared with the engine's afterwards."""
    from chameleon.data import emoji
    from chameleon.document import Conversation, Document, Image, Message, Text
    from chameleon.generation.chameleon import Chameleon

    pictures, words = emoji_urls(12), ["red heart", "cat", "three animals", "blue car", "pizza"]
    sources = [entry.picture for entry in emoji.load("train")[:: max(1, 3000 // 12)][:12]]
    answers: dict[tuple[Any, ...], set[str]] = {}
    outcomes: dict[str, int] = {}
    memory: list[tuple[float, int]] = []
    lock, end = threading.Lock(), time.monotonic() + seconds

    def note(outcome: str, key: tuple[Any, ...] | None = None, answer: str = "") -> None:
        with lock:
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            if key is not None:
                answers.setdefault(key, set()).add(answer)

    def ask(url: str, client: Any, chance: random.Random) -> None:
        kind, seed = chance.choice(["draw", "caption", "text", "mixed"]), chance.randrange(6)
        if kind == "draw":
            word = chance.choice(words)
            path, body, key = "/v1/images/generations", {"prompt": word, "seed": seed}, ("draw", word, seed)
        elif kind == "caption":
            index = chance.randrange(len(pictures))
            message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": pictures[index]}}]}
            path, body = "/v1/chat/completions", {"messages": [message], "seed": seed, "max_tokens": 16}
            key = ("caption", index, seed)
        else:
            word = chance.choice(words)
            body = {"messages": [{"role": "user", "content": word}], "seed": seed, "max_tokens": 160}
            body |= {"modalities": ["text", "image"]} if kind == "mixed" else {}
            path, key = "/v1/chat/completions", (kind, word, seed)
        if chance.random() < 0.2:  # cancelled somewhere on the way
            try:
                client.post(url + path, json=body, timeout=chance.uniform(0.01, 2))
                note("answered before it was cancelled")
            except httpx2.TimeoutException:
                note("cancelled")
            return
        response = client.post(url + path, json=body, timeout=300)
        if response.status_code == 429:
            note("refused")
            time.sleep(chance.uniform(0.2, 1))
        elif response.status_code != 200:
            note(f"status {response.status_code}")
        elif kind == "draw":
            note("answered", key, response.json()["data"][0]["b64_json"])
        else:
            note("answered", key, json.dumps(response.json()["choices"][0]["message"]["content"]))

    def run(url: str, index: int) -> None:
        chance = random.Random(index)
        with httpx2.Client() as client:
            while time.monotonic() < end:
                try:
                    ask(url, client, chance)
                except httpx2.HTTPError as error:
                    note(f"lost: {type(error).__name__}")

    with server("--dtype", "float32", "--exact") as (url, process):
        begin = time.monotonic()

        def watch() -> None:
            while time.monotonic() < end:
                memory.append((time.monotonic() - begin, process.memory_info().rss))
                time.sleep(1)

        watcher = threading.Thread(target=watch)
        watcher.start()
        in_parallel(64, lambda index: run(url, index))
        watcher.join()
        left = httpx2.get(f"{url}/metrics").text
    model, wrong = Chameleon.load(dtype="float32", exact=True), 0
    from chameleon.serve.chat import content_of
    from chameleon.serve.service import Answer, encode_picture

    def expected(kind: str, what: Any, seed: int) -> str:
        if kind == "draw":
            return encode_picture(model.draw(what, seed=seed))
        part = Image(sources[what]) if kind == "caption" else Text(what)
        content = Conversation([Message("user", Document((part,)))])
        limits = {"max_new_tokens": 16 if kind == "caption" else 160, "max_images": 4 if kind == "mixed" else 0}
        document = model.generate(content, seed=seed, **limits)  # type: ignore[arg-type]
        return json.dumps(content_of(Answer(parts=list(document.parts))))

    for (kind, what, seed), given in answers.items():
        wrong += given != {expected(kind, what, seed)}
    after_minute = [rss for second, rss in memory if second >= 60] or [rss for _, rss in memory]
    return {
        "seconds": seconds,
        **outcomes,
        "different requests": len(answers),
        "wrong": wrong,
        "memory after a minute, MB": after_minute[0] / 1e6,
        "most afterwards, MB": max(after_minute) / 1e6,
        "growth": max(after_minute) / after_minute[0] - 1,
        "running at the end": next(line for line in left.splitlines() if line.startswith("chameleon:num_requests_running")),
    }


PARTS = {"batching": batching, "hf": hf, "overhead": overhead, "first_token": first_token, "start": start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--soak", type=float, default=0.0, help="run the soak alone, for so many seconds")
    options = parser.parse_args()
    if options.soak:
        print(json.dumps({"soak": soak(options.soak)}, indent=2))
        return
    for name in options.only:
        print(json.dumps({name: PARTS[name]()}), flush=True)


if __name__ == "__main__":
    main()
