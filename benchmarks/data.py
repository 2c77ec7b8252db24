"""The data engine: memory of fitting a text tokenizer, its speed beside Hugging Face's, the index over a hundred million
documents, rows a second, and what worker processes bring to `tokenize`.

    python benchmarks/data.py [--only fit index packing loader tokenize]
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage

from chameleon.data.index import RowIndex
from chameleon.data.mixture import Mixture, SourceConfig
from chameleon.data.packing import pack
from chameleon.data.sources import text_blocks
from chameleon.data.token_shards import DESCRIPTION, FORMAT, IDS, IMAGES, OFFSETS, PICTURES, TokenShard, write_shard
from chameleon.data.tokenize import tokenize
from chameleon.files import write_json
from chameleon.tokenizers.image import ImageTokenizer
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.tokenizers.text import SentencePieceTokenizer, reservoir_sample, training_chunks
from chameleon.tokenizers.vqgan import VQGAN, VQGANConfig
from chameleon.vocabulary import Vocabulary

MIB = 1 << 20
CONTEXT = 4096
H100_TOKENS = 12_000  # a second, of the 7b recipe on one H100
PAPER = {"image_codes": 8192, "text_pieces": 57_338, "grid": (32, 32)}


def resident() -> float:
    """The largest resident set of this process until now, in MiB. (getrusage's would count the parent's too.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def library_text(limit: int) -> str:
    """Python's own library as text."""
    parts: list[str] = []
    for path in sorted(Path(json.__file__).parents[1].rglob("*.py")):
        if "site-packages" not in path.parts and limit > 0:
            parts.append(path.read_text(encoding="utf-8", errors="replace"))
            limit -= len(parts[-1])
    return "".join(parts)


def apart(code: str, *arguments: object) -> str:
    """What a process of its own prints: so its memory is its own too."""
    command = [sys.executable, "-c", f"import sys, data; {code}", *map(str, arguments)]
    here = Path(__file__).parent  # where such a process looks for modules first
    return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()


# --- fitting a text tokenizer ----------------------------------------------------------------------------------------


def fit_one(path: str, pieces: int, sample_mib: int) -> None:
    """Fits on a file and prints seconds and the peak of memory above what the libraries take."""
    before, began = resident(), time.perf_counter()
    texts = text_blocks(Path(path), lambda where, reason, num_bytes=0: None)
    SentencePieceTokenizer.fit(texts, pieces, sample_bytes=sample_mib * MIB)
    print(time.perf_counter() - began, resident() - before)


def fit() -> None:
    text = library_text(16 * MIB)
    print("\nfit-text, 4,000 pieces from a sample of 4 MiB at most; the corpus is Python's library, repeated")
    print("| corpus | seconds | peak above the libraries |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.txt"
        for size in (1, 10, 100, 1000):
            with open(path, "w", encoding="utf-8") as file:
                left = size * MIB
                while left > 0:
                    file.write(text[:left])
                    left -= len(text)
            seconds, memory = apart("data.fit_one(sys.argv[1], 4000, 4)", path).split()
            print(f"| {size} MiB | {float(seconds):.1f} | {float(memory):.0f} MiB |", flush=True)
    beside_hugging_face(text)


def beside_hugging_face(text: str) -> None:
    """The same sample, the same number of pieces: byte-level BPE as the library trains it, on both cores."""
    import tokenizers

    sample = reservoir_sample(training_chunks(text), 4 * MIB // 2048, 0)

    def theirs() -> None:
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=4000, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        model.train_from_iterator(sample, trainer)

    size = sum(len(part.encode()) for part in sample) / MIB
    compare(f"fitting 4,000 pieces on {size:.1f} MiB", lambda: SentencePieceTokenizer.fit(sample, 4000), theirs, 3)


def compare(what: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> None:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, found in zip((ours, theirs), times, strict=True):
            began = time.perf_counter()
            side()
            found.append(time.perf_counter() - began)
    mine, other = map(statistics.median, times)
    print(f"\n{what}: ours {mine:.2f} s, theirs {other:.2f} s, ratio {other / mine:.2f}", flush=True)


# --- the index -------------------------------------------------------------------------------------------------------


def lengths_of(stream: np.random.Generator, count: int) -> np.ndarray:
    """Captions with a picture, short and long texts: a third of each, some of them over the context."""
    kinds = (1026 + stream.integers(8, 80, count // 3), stream.integers(8, 200, count // 3))
    rest = count - 2 * (count // 3)
    return stream.permutation(np.concatenate((*kinds, stream.lognormal(6.5, 1.2, rest).astype(np.int64) + 2)))


def synthetic(folder: Path, documents: int, per_shard: int) -> None:
    """Shards with true offsets; the ids are a hole in the file."""
    vocabulary = Vocabulary.build(**PAPER).to_json()  # type: ignore[arg-type]
    stream = np.random.default_rng(0)
    for number in range(documents // per_shard):
        place = folder / f"{number:05}"
        place.mkdir()
        offsets = np.concatenate(([0], np.cumsum(lengths_of(stream, per_shard))))
        offsets.astype("<u8").tofile(place / OFFSETS)
        (place / IMAGES).touch()
        (place / PICTURES).touch()
        with open(place / IDS, "wb") as file:
            file.truncate(4 * int(offsets[-1]))
        counts = {"documents": per_shard, "tokens": int(offsets[-1]), "images": 0, "pictures": 0}
        write_json(
            place / DESCRIPTION,
            {"format": FORMAT, "variants": 1, "vocabulary": vocabulary, "fingerprint": "", "sha256": {}, **counts},
        )


def index_one(folder: str) -> None:
    before, began = resident(), time.perf_counter()
    shards = [TokenShard(path) for path in sorted(Path(folder).iterdir())]
    index = RowIndex(shards, CONTEXT, 1026)
    seconds = time.perf_counter() - began
    memory = resident() - before
    began = time.perf_counter()
    for row in np.random.default_rng(0).integers(0, len(index), 1000).tolist():
        index[row]
    access = (time.perf_counter() - began) / 1000
    print(json.dumps([index.num_documents, len(shards), len(index), index.fill, seconds, memory, access * 1e6]))


def index() -> None:
    print("\nindex over synthetic offsets, context 4,096: a third each of captions with a picture, short and longer texts")
    print("| documents | shards | rows | fill | start-up | peak above the libraries | a row's contents |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for documents, per_shard in ((1_000_000, 10_000), (100_000_000, 100_000), (100_000_000, 10_000)):
        with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
            synthetic(Path(folder), documents, per_shard)
            found = json.loads(apart("data.index_one(sys.argv[1])", folder))
        print("| {:,} | {:,} | {:,} | {:.2%} | {:.1f} s | {:.0f} MiB | {:.0f} µs |".format(*found), flush=True)


def packing() -> None:
    """How full rows are, by what shares them. Texts over the context give full rows and a rest that is packed."""
    stream = np.random.default_rng(0)
    captions = stream.integers(8, 80, 200_000)
    texts = stream.lognormal(6.5, 1.2, 100_000).astype(np.int64) + 2
    pairs = 1026 + captions[:60_000]
    mixes = {
        "captions without pictures, and texts": (captions, texts),
        "texts alone": (texts,),
        "pictures of 1,026 ids with captions, alone": (pairs,),
        "these and texts, about as many ids of each": (pairs, texts[: int(pairs.sum() / texts.mean())]),
        "these and twice as many ids of texts": (pairs[:30_000], texts[: int(pairs.sum() / texts.mean())]),
    }
    print("\nfill of rows of 4,096")
    print("| what shares rows | fill |\n| --- | --- |")
    for name, parts in mixes.items():
        lengths = np.concatenate(parts) - 1
        rests = np.where(lengths > CONTEXT, lengths % CONTEXT, lengths)
        counts = np.bincount(rests[rests > 0], minlength=CONTEXT + 1)
        rows = sum(group.num_rows for group in pack(counts, CONTEXT)) + int((lengths[lengths > CONTEXT] // CONTEXT).sum())
        print(f"| {name} | {lengths.sum() / (rows * CONTEXT):.2%} |", flush=True)


# --- the loader ------------------------------------------------------------------------------------------------------


def loader() -> None:
    """Rows of the 7b recipe from real token shards, on one core."""
    torch.set_num_threads(1)
    vocabulary = Vocabulary.build(**PAPER)  # type: ignore[arg-type]
    stream = np.random.default_rng(0)
    print("\nrows of 4,096 ids a second on one core; 20 times what the 7b recipe takes on an H100 at 12,000 tokens/s: 58.6")
    print("| source | documents a row | rows/s | times an H100 |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("pairs", "texts", "answers"):
            lengths = stream.integers(8, 80, 3000) if name != "texts" else np.minimum(lengths_of(stream, 9000), 30_000)
            with write_shard(Path(folder) / name / "s", "", vocabulary) as writer:
                for length in lengths.tolist():
                    ids = vocabulary.text_start + torch.randint(vocabulary.num_text_pieces, (length,))
                    if name != "texts":
                        codes = vocabulary.codes_to_ids(torch.randint(8192, (1024,)))
                        block = torch.cat((torch.tensor([vocabulary.boi]), codes, torch.tensor([vocabulary.eoi])))
                        middle = [block, torch.tensor([vocabulary.sep])][: 1 + (name == "answers")]
                        ids = torch.cat((torch.tensor([vocabulary.bos]), *middle, ids, torch.tensor([vocabulary.eos])))
                    writer.add(ids)
            config = SourceConfig(str(Path(folder) / name), loss="answers" if name == "answers" else "all")
            mixture = Mixture([config], context_length=CONTEXT, global_batch_size=1, seed=0, vocabulary=vocabulary)
            rows = 300
            mixture.batch(0)
            began = time.perf_counter()
            for step in range(rows):
                mixture.batch(step)
            rate = rows / (time.perf_counter() - began)
            held = mixture.sources[0].index
            each = sum(len(held[row]) for row in range(len(held))) / len(held)
            print(f"| {name} | {each:.1f} | {rate:.0f} | {rate / (H100_TOKENS / CONTEXT):.0f} |", flush=True)


# --- tokenize --------------------------------------------------------------------------------------------------------


def photographs(count: int) -> Iterator[bytes]:
    """JPEGs of 640×480 with structure and noise."""
    stream = np.random.default_rng(0)
    for _ in range(count):
        small = PILImage.fromarray(stream.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
        noisy = np.asarray(small).astype(int) + stream.integers(-9, 10, (480, 640, 3))
        buffer = io.BytesIO()
        PILImage.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def tokenizing() -> None:
    """Pairs with a small image tokenizer, so that opening pictures weighs: by workers."""
    torch.manual_seed(0)
    network = VQGAN(
        VQGANConfig(resolution=64, channels=16, multipliers=(1, 2, 2), res_blocks=1, codebook_size=512, norm_groups=8)
    )
    tokenizer = MixedTokenizer(SentencePieceTokenizer.fit([library_text(MIB)], 1000), ImageTokenizer(network))
    print("\ntokenize, 600 JPEGs of 640×480 with captions in 2 shards, encoded at 64 pixels")
    print("| workers | seconds | pictures/s |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        pictures = photographs(600)
        for shard in range(2):
            with tarfile.open(Path(folder) / f"{shard}.tar", "w") as archive:
                for number in range(300):
                    for ending, data in (("jpg", next(pictures)), ("txt", b"a picture of colours and noise")):
                        info = tarfile.TarInfo(f"{number:05}.{ending}")
                        info.size = len(data)
                        archive.addfile(info, io.BytesIO(data))
        source = str(Path(folder) / "*.tar")
        for workers in (0, 1, 2):
            began = time.perf_counter()
            tokenize([source], tokenizer, Path(folder) / f"out{workers}", num_workers=workers)
            seconds = time.perf_counter() - began
            print(f"| {workers} | {seconds:.1f} | {600 / seconds:.1f} |", flush=True)


PARTS = {"fit": fit, "index": index, "packing": packing, "loader": loader, "tokenize": tokenizing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    chosen = parser.parse_args().only
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}")
    for name in chosen:
        PARTS[name]()


if __name__ == "__main__":
    main()
