"""The index of the pictures that an image tokenizer is trained on: the same as their sources have, none in memory."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from pyarrow import parquet

from chameleon.data.duplicates import duplicate_share, find_duplicates
from chameleon.data.filters import Filters
from chameleon.data.picture_index import GroupedPictures, IndexedPictures, PictureSet, PictureSources
from chameleon.data.source_types import PictureEntry
from chameleon.data.sources import expand, read
from chameleon.errors import BadInput
from chameleon.tokenizers.image import load_picture


def png(number: int) -> bytes:
    data = io.BytesIO()
    PILImage.new("RGB", (2 + number % 3, 2), (number, 0, 0)).save(data, "png")
    return data.getvalue()


def write_tar(path: Path, numbers: range, mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for number in numbers:
            for name, data in ((f"{number}.png", png(number)), (f"{number}.txt", b"words")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures in six kinds of sources."""
    folder = tmp_path_factory.mktemp("pictures")
    write_tar(folder / "a.tar", range(10))
    write_tar(folder / "b.tar.gz", range(10, 20), "w:gz")
    (folder / "files").mkdir()
    for number in range(20, 30):
        (folder / "files" / f"{number}.png").write_bytes(png(number))
    table = pyarrow.table({"image": [{"bytes": png(n)} for n in range(30, 40)], "caption": ["words"] * 10})
    parquet.write_table(table, folder / "c.parquet")
    urls = ["data:image/png;base64," + base64.b64encode(png(n)).decode() for n in range(40, 50)]
    (folder / "d.jsonl").write_text("".join(json.dumps({"image": url, "caption": "words"}) + "\n" for url in urls))
    (folder / "images").mkdir()
    for number in range(50, 60):
        (folder / "images" / f"{number}.png").write_bytes(png(number))
    records = [{"image": f"images/{number}.png", "caption": "words"} for number in range(50, 60)]
    (folder / "e.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def sources_in(folder: Path) -> PictureSources:
    return PictureSources([f"{folder}/{name}" for name in ("a.tar", "b.tar.gz", "files/*.png", "c.parquet", "*.jsonl")])


def number_of(entry: PictureEntry) -> int:
    return int(np.asarray(load_picture(entry.source, entry.name))[0, 0, 0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_index_has_the_pictures_of_all_sources(num_workers: int, folder: Path, tmp_path: Path) -> None:
    sources = sources_in(folder)
    sources.make_index(tmp_path / "index", num_workers=num_workers)
    pictures = sources.open(tmp_path / "index")
    assert [number_of(entry) for entry in pictures] == list(range(60))
    assert (tmp_path / "index" / "copies-0.bin").exists() is False  # a plain archive is read where it is
    drawn = [number_of(pictures.draw(np.random.default_rng(seed))) for seed in range(2000)]
    assert set(drawn) == set(range(60))
    chi_square = sum((drawn.count(n) - 2000 / 60) ** 2 / (2000 / 60) for n in range(60))
    assert chi_square < 98.3  # 99.9% of 59 degrees of freedom


def test_an_index_is_made_once_and_anew_when_a_source_has_changed(folder: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", range(5))
    sources = PictureSources([f"{tmp_path}/a.tar"])
    sources.make_index(tmp_path / "index")
    made = (tmp_path / "index" / "index.json").stat().st_mtime_ns
    sources.make_index(tmp_path / "index")
    assert (tmp_path / "index" / "index.json").stat().st_mtime_ns == made
    write_tar(tmp_path / "a.tar", range(7, 20))
    sources.make_index(tmp_path / "index")
    assert [number_of(entry) for entry in sources.open(tmp_path / "index")] == list(range(7, 20))


def test_what_cannot_be_read_is_told_when_the_index_is_made(folder: Path, tmp_path: Path) -> None:
    data = (folder / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    sources = PictureSources([f"{tmp_path}/cut.tar"])
    with pytest.raises(BadInput, match=r"cut\.tar: truncated archive"):
        sources.make_index(tmp_path / "index")
    assert not (tmp_path / "index").exists()
    skipped: list[str] = []
    sources.make_index(tmp_path / "index", lambda where, reason, _=0: skipped.append(reason))
    numbers = [number_of(entry) for entry in sources.open(tmp_path / "index")]
    assert skipped and numbers == list(range(len(numbers))) and 0 < len(numbers) < 10
    (tmp_path / "text.jsonl").write_text('{"text": "words"}\n')
    empty = PictureSources([f"{tmp_path}/text.jsonl"])
    empty.make_index(tmp_path / "empty")
    with pytest.raises(BadInput, match="no picture in any source"):
        empty.open(tmp_path / "empty")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any), st.data())
def test_a_set_numbers_the_pictures_of_its_parts(sizes: list[int], data: st.DataObject) -> None:
    names = [[f"{part}-{index}" for index in range(size)] for part, size in enumerate(sizes)]
    pictures = PictureSet([GroupedPictures([PictureEntry(n, b"", n[:3]) for n in part]) for part in names])
    flat = [name for part in names for name in part]
    assert [entry.name for entry in pictures] == flat and len(pictures) == len(flat)
    assert pictures.draw(np.random.default_rng(data.draw(st.integers(0, 99)))).name in flat


def test_an_index_holds_no_picture(folder: Path, tmp_path: Path) -> None:
    """A picture is read from its file each time, from the place that the index says."""
    write_tar(tmp_path / "a.tar", range(3))
    sources = PictureSources([f"{tmp_path}/a.tar"])
    sources.make_index(tmp_path / "index")
    pictures = IndexedPictures(tmp_path / "index")
    content = bytearray((tmp_path / "a.tar").read_bytes())
    entry = pictures[1]
    assert isinstance(entry.source, bytes) and bytes(content).find(entry.source) > 0
    start = int(pictures.columns["offsets"][1])
    content[start : start + len(entry.source)] = png(9).ljust(len(entry.source), b"\0")
    (tmp_path / "a.tar").write_bytes(content)
    assert number_of(pictures[1]) == 9


# --- duplicates ---


@pytest.fixture(scope="module")
def albums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files of documents with none to three of twenty pictures, some too short for a filter."""
    folder, rng = tmp_path_factory.mktemp("albums"), random.Random(0)
    (folder / "images").mkdir()
    for number in range(20):
        (folder / "images" / f"{number}.png").write_bytes(png(number))
    (folder / "images" / "bad.png").write_bytes(b"no picture")
    for file in range(4):
        lines = []
        for _ in range(30):
            names = [f"images/{rng.choice([*range(20), 'bad'])}.png" for _ in range(rng.randint(0, 3))]
            text = "word" * rng.randint(1, 3)
            lines.append({"parts": [{"type": "text", "text": text}, *({"type": "image", "image": n} for n in names)]})
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("num_workers", [0, 3])
def test_duplicates_are_those_of_a_plain_search(num_workers: int, albums: Path, tmp_path: Path) -> None:
    """One pass over all documents with a set of what was seen, in memory."""
    shards, filters = expand(f"{albums}/*.jsonl"), Filters(unique_images=True, min_text=5)
    seen: set[bytes] = set()
    expected = []
    for shard in shards:
        left_out: dict[int, list[bytes]] = {}
        for index, sample in enumerate(read(shard)):
            data = [Path(image).read_bytes() for image in sample.images]  # type: ignore[arg-type]
            if len(sample.text) < 5 or b"no picture" in data:
                continue
            if data and seen.issuperset(data):
                left_out[index] = [hashlib.blake2b(value, digest_size=16).digest() for value in data]
            seen.update(data)
        expected.append(left_out)
    found = find_duplicates(shards, filters, tmp_path / "duplicates", num_workers)
    assert [dict(duplicates) for duplicates in found] == expected and sum(map(len, expected)) > 20
    assert [dict(pickle.loads(pickle.dumps(duplicates))) for duplicates in found] == expected
    made = (tmp_path / "duplicates" / "duplicates.json").stat().st_mtime_ns
    find_duplicates(shards, filters, tmp_path / "duplicates", num_workers)
    assert (tmp_path / "duplicates" / "duplicates.json").stat().st_mtime_ns == made


def test_pictures_that_look_alike(tmp_path: Path) -> None:
    """A picture, half as large, and compressed: duplicates by their looks, not by their bytes. Another one is none."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = PILImage.fromarray(pixels).resize((64, 64), PILImage.Resampling.BICUBIC)
    other = PILImage.fromarray(255 - pixels).resize((64, 64), PILImage.Resampling.BICUBIC)
    (tmp_path / "images").mkdir()
    for name, image in (("0.png", picture), ("1.png", picture.resize((48, 48))), ("2.jpg", picture), ("3.png", other)):
        image.save(tmp_path / "images" / name)
    shards = expand(f"{tmp_path}/images")
    alike = find_duplicates(shards, Filters(near_duplicates=True), tmp_path / "alike")
    same = find_duplicates(shards, Filters(unique_images=True), tmp_path / "same")
    assert [len(duplicates) for duplicates in alike] == [0, 1, 1, 0] and not any(same)


@given(st.lists(st.lists(st.integers(0, 300), max_size=20), min_size=1, max_size=4))
def test_the_share_of_duplicates(tmp_path_factory: pytest.TempPathFactory, files: list[list[int]]) -> None:
    folder = tmp_path_factory.mktemp("shares")
    for index, numbers in enumerate(files):
        (folder / str(index)).write_bytes(b"".join(hashlib.blake2b(b"%d" % n, digest_size=16).digest() for n in numbers))
    flat = [number for numbers in files for number in numbers]
    share = duplicate_share([folder / str(index) for index in range(len(files))])
    assert share == pytest.approx((len(flat) - len(set(flat))) / max(1, len(flat)))
