"""Small models that every test may share. Nothing here is trained; what is tested does not depend on skill."""

from __future__ import annotations

import os

# Before PyTorch is imported: tests run beside each other, and what they compute is small. Processes that they start too.
os.environ["OMP_NUM_THREADS"] = "1"

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import settings
from torch import distributed

from chameleon.bundle import Bundle
from chameleon.data.token_shards import write_shard
from chameleon.dialect import ShapeConfig
from chameleon.generation.chameleon import Chameleon
from chameleon.model.config import ModelConfig
from chameleon.model.transformer import Transformer
from chameleon.tokenizers.image import ImageTokenizer
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.tokenizers.text import SentencePieceTokenizer
from chameleon.tokenizers.vqgan import VQGAN, VQGANConfig

# What is measured once on a machine is measured once for all tests, and leaves nothing in the user's cache.
os.environ["CHAMELEON_CACHE"] = tempfile.mkdtemp(prefix="chameleon-tests-")

# A busy machine is no failure. `make test` tries the same examples each time, `make test-all` others.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.register_profile("other_examples", deadline=None)
settings.load_profile("tests")

TEXT = [
    "orange heart",
    "which style is it? noto",
    "def add(a, b):\n    return a + b\n",
    "waving hand, medium skin tone",
    "ein rotes Herz, un cœur rouge, 赤いハート",
    "the quick brown fox jumps over the lazy dog " * 4,
]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """No test leaves a group of processes behind, nor what Lightning tells further processes by the environment."""
    before = dict(os.environ)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


LONG = ("test_ranks.py", "test_scale.py", "test_resume.py", "test_serve.py", "test_training.py", "test_suites.py")
"""Files that take longest. They come first, so that processes that run tests beside each other end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


SMALL_VQGAN = VQGANConfig(
    resolution=16,
    channels=8,
    multipliers=(1, 2, 2),
    res_blocks=1,
    latent_channels=8,
    codebook_size=32,
    codebook_width=4,
    norm_groups=4,
)


@pytest.fixture(scope="session")
def text_tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer.fit(TEXT * 20, 340)


@pytest.fixture(scope="session")
def image_tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    network = VQGAN(SMALL_VQGAN)
    torch.nn.init.normal_(network.quantize.embedding.weight, std=0.3)
    # Weights as a bundle keeps them, so that saving changes nothing.
    network.load_state_dict({name: value.bfloat16().float() for name, value in network.state_dict().items()})
    return ImageTokenizer(network)


@pytest.fixture(scope="session")
def tokenizer(text_tokenizer: SentencePieceTokenizer, image_tokenizer: ImageTokenizer) -> MixedTokenizer:
    return MixedTokenizer(text_tokenizer, image_tokenizer)


@pytest.fixture(scope="session")
def sized_tokenizer(text_tokenizer: SentencePieceTokenizer, image_tokenizer: ImageTokenizer) -> MixedTokenizer:
    """Images of about 16 codes: 4 × 4, 3 × 5 and so on."""
    return MixedTokenizer(text_tokenizer, image_tokenizer, shapes=ShapeConfig(target=4))


def random_model(vocab_size: int, seed: int = 0, **changes: object) -> Transformer:
    """A small model whose weights are large enough that its logits differ clearly."""
    torch.manual_seed(seed)
    shape = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context_length": 96, **changes}
    model = Transformer(ModelConfig(vocab_size=vocab_size, **shape))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture
def bundle(tokenizer: MixedTokenizer) -> Bundle:
    return Bundle(random_model(tokenizer.vocabulary.size), tokenizer, "conversation")


@pytest.fixture
def bundle_folder(bundle: Bundle, tmp_path: Path) -> Path:
    bundle.save(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def chameleon(bundle: Bundle) -> Chameleon:
    return Chameleon(bundle)


def recipe_file(tmp_path: Path, tokenizer: MixedTokenizer, **changes: object) -> Path:
    """A recipe that trains a very small model on twelve pictures with a few words each, in `tmp_path`."""
    v = tokenizer.vocabulary
    tokenizer.text.save(tmp_path / "tokenizers")
    tokenizer.image.save(tmp_path / "tokenizers")
    with write_shard(tmp_path / "shards" / "s", tokenizer.fingerprint, v) as writer:
        for n in range(12):
            picture = [v.boi, *range(v.image_start, v.image_start + 16), v.eoi]
            words = [v.text_start + n % 3] * (1 + n % 4)  # so that rows hold different numbers of targets
            writer.add(torch.tensor([v.bos, *picture, v.sep, *words, v.text_start + 5, v.eos]))
    values = {
        "tokenizers": str(tmp_path / "tokenizers"),
        "size": "tiny",
        "model": {"layers": 1, "width": 32, "heads": 2, "kv_heads": 2, "ffn_width": 32},
        "context_length": 48,
        "global_batch_size": 4,
        "mixture": [{"shards": str(tmp_path / "shards")}],
        "run": {
            "out": str(tmp_path / "run"),
            "max_steps": 30,
            "log_every_n_steps": 5,
            "progress": False,
            "precision": "32-true",
        },
        "optimizer": {"lr": 0.01, "warmup_steps": 2, "eps": 1e-8},
        **changes,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@contextmanager
def running(model: Chameleon, **options: Any) -> Iterator[str]:
    """Serve a model in a thread; yields its address. Needs the extra `serve`."""
    from chameleon.serve.app import build_app
    from chameleon.serve.server import Server, bind, config_of

    bound = bind("127.0.0.1", 0)
    app = build_app(lambda: model, **options)
    server = Server(config_of(app, app.state.service.limits), lambda: None)
    server.capture_signals = lambda: contextmanager(lambda: iter([None]))()  # type: ignore[method-assign]  # not in a thread
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
