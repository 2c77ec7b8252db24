"""Sources in the forms and files that the field writes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from pyarrow import parquet

from chameleon.data import records
from chameleon.data.forms import RecordContext, content_of
from chameleon.data.sources import Sample, expand, expand_braces, read
from chameleon.data.webdataset import raise_on_skip
from chameleon.document import Conversation, Document, Image, Text
from chameleon.errors import BadInput


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def samples(source: str) -> tuple[list[Sample], list[str]]:
    """What is read, and what is passed over."""
    skipped: list[str] = []
    actual = [s for shard in expand(source) for s in read(shard, lambda where, why, _=0: skipped.append(f"{where}: {why}"))]
    return actual, skipped


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the kind of file that the ending says."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if name.endswith(".jsonl"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif name.endswith(".json"):
        text = json.dumps(rows)
    else:
        out = io.StringIO(newline="")
        table = csv.DictWriter(out, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
        table.writeheader()
        table.writerows(rows)
        text = out.getvalue()
    data = text.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(text.encode())
        return path
    path.write_bytes(data)
    return path


KINDS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet", ".csv", ".csv.gz", ".tsv"]


@pytest.mark.parametrize("ending", KINDS)
def test_texts_in_every_kind_of_file(ending: str, tmp_path: Path) -> None:
    texts = ["plain", 'with "quotes", commas\tand tabs', "two\nlines\u2028and a half", "日本 🎉", "x" * 3_000_000]
    write(tmp_path / f"a{ending}", [{"text": text, "id": str(n)} for n, text in enumerate(texts)])
    actual, skipped = samples(str(tmp_path / f"a{ending}"))
    assert [sample.content for sample in actual] == [Document((Text(text),)) for text in texts] and not skipped
    assert len({sample.key for sample in actual}) == len(texts)


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_files_cut_short_give_what_came_before_or_are_named(ending: str, tmp_path: Path) -> None:
    rows = [{"text": f"{n} " + "".join(chr(97 + (n * k) % 26) for k in range(300))} for n in range(20_000)]
    path = write(tmp_path / f"a{ending}", rows)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    actual, skipped = samples(str(path))
    assert [sample.content.text for sample in actual] == [row["text"] for row in rows[: len(actual)]]  # type: ignore[union-attr]
    assert skipped and str(path) in skipped[-1]
    assert len(actual) > 1000 or ending == ".parquet"  # whose directory stands at the end


def at(tmp_path: Path, record: Any) -> Document | Conversation:
    return content_of(record, RecordContext("here", tmp_path))


def test_interleaved_documents(tmp_path: Path) -> None:
    one, two = Image(tmp_path / "1.png"), Image(tmp_path / "2.png")
    obelics = {"texts": ["a", None, "b", None], "images": [None, "1.png", None, "2.png"], "metadata": "[]"}
    assert at(tmp_path, obelics) == Document((Text("a"), one, Text("b"), two))
    info = [{"image_name": "2.png", "matched_text_index": 1}, {"image_name": "1.png", "matched_text_index": 0}]
    mmc4 = {"text_list": ["First.", "Second."], "image_info": info, "url": "x"}
    assert at(tmp_path, mmc4) == Document((one, Text("First. "), two, Text("Second.")))
    for record, words in (
        ({**obelics, "images": [None]}, "not lists of equal length"),
        ({**obelics, "images": ["x", "1.png", None, "2.png"]}, "a text and an image at the same index"),
        ({**obelics, "images": [None, "https://a/b.png", None, None]}, "is a URL"),
        ({**mmc4, "image_info": [{"image_name": "a", "matched_text_index": 2}]}, "is not the index of a sentence"),
        ({"texts": [], "images": []}, "neither image nor text"),
        ({"colour": "red"}, "unknown form; its keys are colour, a form needs one of messages"),
        ([1], "expected an object"),
    ):
        with pytest.raises(BadInput, match=words):
            at(tmp_path, record)


def test_edits_are_a_question_and_its_answer(tmp_path: Path) -> None:
    """In the columns of InstructPix2Pix and of MagicBrush, and in MagicBrush's own files."""
    before, after = Image(tmp_path / "1.png"), Image(tmp_path / "2.png")
    pix2pix = {
        "original_prompt": "a cat",
        "original_image": "1.png",
        "edit_prompt": "make it blue",
        "edited_image": "2.png",
    }
    brush = {"img_id": "7", "turn_index": 1, "source_img": "1.png", "mask_img": "m.png", "target_img": "2.png"}
    for record in (pix2pix, {**brush, "instruction": "make it blue"}):
        actual = at(tmp_path, record)
        assert isinstance(actual, Conversation)
        assert [message.role for message in actual.messages] == ["user", "assistant"]
        assert actual.messages[0].content == Document((before, Text("make it blue")))
        assert actual.messages[1].content == Document((after,))
    turn = {"input": "7-input.png", "mask": "7-mask1.png", "output": "7-output1.png", "instruction": "make it blue"}
    actual = at(tmp_path, turn)
    assert isinstance(actual, Conversation)
    folder = tmp_path / "images" / "7"
    assert actual.messages[0].content.images + actual.messages[1].content.images == [
        folder / "7-input.png",
        folder / "7-output1.png",
    ]
    for record, words in (
        ({**pix2pix, "edit_prompt": " "}, "edit_prompt is empty"),
        ({**pix2pix, "edited_image": 5}, "edited_image is not an image"),
        ({**turn, "input": "../7-input.png"}, "names an image outside"),
    ):
        with pytest.raises(BadInput, match=words):
            at(tmp_path, record)


def test_llava_conversations(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "And <image> here?"},
        {"from": "gpt", "value": "A dog."},
    ]
    actual = at(tmp_path, {"id": 1, "image": ["cat.png", "dog.png"], "conversations": turns})
    assert isinstance(actual, Conversation)
    cat, dog = (Image(tmp_path / name) for name in ("cat.png", "dog.png"))
    assert [message.role for message in actual.messages] == ["user", "assistant"] * 2
    assert actual.messages[0].content == Document((cat, Text("What is it?")))
    assert actual.messages[2].content == Document((Text("And"), dog, Text("here?")))
    with pytest.raises(BadInput, match="more <image> than images"):
        at(tmp_path, {"image": "cat.png", "conversations": turns})
    with pytest.raises(BadInput, match="3 images, but 2 <image>"):
        at(tmp_path, {"image": ["a", "b", "c"], "conversations": turns})
    with pytest.raises(BadInput, match="human or gpt"):
        at(tmp_path, {"conversations": [{"from": "cat", "value": "miau"}]})


def test_pairs_and_code(tmp_path: Path) -> None:
    pair = Document((Image(tmp_path / "a.png"), Text("a cat")))
    for record in ({"image": "a.png", "caption": " a cat "}, {"file_name": "a.png", "text": "a cat"}):
        assert at(tmp_path, record) == pair
    assert at(tmp_path, {"content": "x = 1\n", "path": "a.py", "lang": "python"}) == Document((Text("x = 1\n"),))
    actual = at(tmp_path, {"image": {"bytes": png(), "path": None}, "caption": None})
    assert isinstance(actual, Document) and actual.images[0] == png()


def test_pictures_inside_parquet_are_encoded(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "a.parquet", [{"image": {"bytes": png("blue"), "path": "x.png"}, "text": "blue"}])
    actual, _ = samples(str(tmp_path / "a.parquet"))
    ids = tokenizer.encode(actual[0].content)
    assert tokenizer.vocabulary.is_image(ids).sum() == math.prod(tokenizer.vocabulary.grid)


def test_coco_and_vqa(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    images = [{"id": 7, "file_name": "000000000007.jpg"}]
    notes = [{"image_id": 7, "id": 1, "caption": "A cat."}, {"image_id": 8, "id": 2, "caption": "Lost."}]
    notes += [{"image_id": 7, "id": 3, "caption": None}]
    coco = tmp_path / "captions.json"
    coco.write_text(json.dumps({"images": images, "annotations": notes, "info": {}}))
    actual, skipped = samples(f"coco:{coco}?images={tmp_path / 'pictures'}")
    assert [s.content for s in actual] == [Document((Image(tmp_path / "pictures" / "000000000007.jpg"), Text("A cat.")))]
    assert skipped == [f"{coco}, annotation 1: no image 8", f"{coco}, annotation 2: no caption"]
    questions, annotations = tmp_path / "questions.json", tmp_path / "annotations.json"
    questions.write_text(json.dumps({"questions": [{"image_id": 7, "question": "What?", "question_id": 70}]}))
    answers = [{"question_id": n, "multiple_choice_answer": "cat", "answers": []} for n in (70, 71)]
    annotations.write_text(json.dumps({"annotations": answers}))
    source = f"vqa:{annotations}?questions={questions}&images={tmp_path / 'pictures'}&prefix=COCO_val2014_"
    actual, skipped = samples(source)
    assert isinstance(actual[0].content, Conversation) and len(actual) == len(skipped) == 1
    question, answer = (message.content for message in actual[0].content.messages)
    assert question.images == [tmp_path / "pictures" / "COCO_val2014_000000000007.jpg"]
    assert (question.text, answer.text) == ("What?", "cat")
    for source, words in (
        (f"vqa:{annotations}", "no file of questions; write vqa:"),
        (f"vqa:{annotations}?question={questions}", "unknown option question; there are: images, questions, prefix"),
        (f"coco:{coco}?images={tmp_path / 'none'}", "no such folder"),
        (f"coco:{annotations}", "no list images"),
        (f"text:{coco}?characters=20k", "characters is 20k, expected a number of 1 or more"),
        (f"json:{coco}", "expected an array of records; for annotations of COCO"),
    ):
        with pytest.raises(BadInput, match=words):
            [sample for shard in expand(source) for sample in read(shard)]


def test_a_folder_takes_nothing_twice(tmp_path: Path) -> None:
    """As img2dataset leaves it: tars, and beside them tables and statistics."""
    for name in ("00000.tar", "00000.parquet", "00000_stats.json", "00001.tar", "notes.txt", "package.json"):
        (tmp_path / name).write_bytes(b"")
    assert [Path(shard.path).name for shard in expand(str(tmp_path))] == ["00000.tar", "00001.tar", "notes.txt"]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(png())
    (folder / "a.json").write_text('{"caption": "from the sidecar", "width": 4}')
    (folder / "b.txt").write_text("from the text")
    actual, _ = samples(str(folder))
    assert [sample.content.text for sample in actual] == ["from the sidecar", "from the text"]  # type: ignore[union-attr]
    for path in (folder / "a.json", folder / "b.txt"):
        path.unlink()
    write(folder / "captions.csv", [{"file_name": "a.png", "caption": "one"}, {"file_name": "b.png", "caption": "two"}])
    actual, _ = samples(str(folder))
    assert [sample.content for sample in actual] == [
        Document((Image(folder / f"{name}.png"), Text(text))) for name, text in (("a", "one"), ("b", "two"))
    ]


def test_braces(tmp_path: Path) -> None:
    assert list(expand_braces("{a,b}/{008..011}.tar")) == [f"{x}/{n:03d}.tar" for x in "ab" for n in range(8, 12)]
    assert list(expand_braces("no{thing}s")) == ["no{thing}s"]
    for name in ("00000.jsonl", "00001.jsonl", "00007.jsonl"):
        write(tmp_path / name, [{"text": name}])
    actual, _ = samples(str(tmp_path / "{00000..00005}.jsonl"))
    assert [sample.content.text for sample in actual] == ["00000.jsonl", "00001.jsonl"]  # type: ignore[union-attr]
    assert len(expand(f"jsonl:{tmp_path}/0000?.jsonl")) == 3  # a lone ? is the pattern's own


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    lines = ['{"text": NaN}', '{"text": "a", "text": "b"}', '{"text": "\\ud800"}', "[" * 100_000, '{"text": "good"}']
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    actual, skipped = samples(str(path))
    assert [sample.key for sample in actual] == [f"{path}, line 5"]
    for line, words in enumerate(("NaN is not JSON", "key 'text' occurs twice", "surrogate", "not JSON"), 1):
        assert skipped[line - 1].startswith(f"{path}, line {line}: ") and words in skipped[line - 1]
    table = tmp_path / "a.csv"
    table.write_text('text,id\ngood,1\nshort\nlong,1,2\n"never closed,1\n')
    actual, skipped = samples(str(table))
    assert len(actual) == 1 and len(skipped) == 3


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_no_damage_crashes_a_reader_or_loses_a_record(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed at random: every line is read or named."""
    rows = [{"text": f"number {n}"} for n in range(20)]
    path = write(tmp_path / "a.jsonl", rows)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    actual, skipped = samples(str(path))
    lines = [line for line in bytes(whole).split(b"\n") if line.strip()]
    assert len(actual) + len(skipped) == len(lines)


@pytest.mark.parametrize("ending", [".tar", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".csv", ".parquet"])
def test_many_kinds_of_damage(ending: str, tmp_path: Path) -> None:
    """Files with bytes changed, cut out or cut off: whatever is read is a sample, all else is named, nothing crashes."""
    path, random = tmp_path / f"a{ending}", np.random.default_rng(0)
    if ending == ".tar":
        with tarfile.open(path, "w") as archive:
            for n in range(6):
                for name, data in ((f"{n}.png", png()), (f"{n}.txt", b"red"), (f"{n}.json", b'{"a": 1}')):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    else:
        write(path, [{"text": f"number {n}", "id": str(n)} for n in range(30)])
    whole = path.read_bytes()
    for _ in range(800):
        data = bytearray(whole)
        for _ in range(random.integers(1, 6)):
            place, kind = int(random.integers(0, len(data))), random.integers(0, 4)
            if kind < 2:
                data[place] = int(random.integers(0, 256))
            elif kind == 2:
                del data[place : place + int(random.integers(1, 200))]
            else:
                del data[max(1, place) :]
            if not data:
                data = bytearray(b"x")
        path.write_bytes(data)
        actual, skipped = samples(str(path))
        assert all(isinstance(sample.content, Document) for sample in actual)
        assert actual or skipped or not bytes(data).strip() or ending in (".csv", ".jsonl")


# --- arrays and texts as streams ---

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(json_values, max_size=8), st.sampled_from([None, 1]), st.integers(1, 40))
def test_an_array_is_read_one_element_at_a_time(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, block: int
) -> None:
    """In whatever pieces the file comes, as the standard library reads it as a whole."""
    path = tmp_path_factory.mktemp("arrays") / "values.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "READ_BYTES", block)
        assert [value for _, value in records.read_json_array(path, raise_on_skip)] == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected an array of records"),
        ("", "expected an array of records"),
        ("[1, 2", "expected a comma or the end of the array"),
        ("[1, ]", "an element is missing"),
        ("[1 2]", "expected a comma"),
        ('[{"a": 1, "a": 2}]', "occurs twice"),
        ("[NaN]", "NaN is not JSON"),
        ("[1] 2", "more after the end"),
        ("[tru]", "not JSON"),
    ],
)
def test_what_is_no_array(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "values.json").write_text(text)
    with pytest.raises(BadInput, match=message):
        list(records.read_json_array(tmp_path / "values.json", raise_on_skip))


def test_what_comes_before_damage_in_an_array_is_read(tmp_path: Path) -> None:
    path, names = tmp_path / "values.json", [f"één {number}" for number in range(10)]
    whole = json.dumps(names, ensure_ascii=False).encode()
    for damaged, message in ((whole[:-1] + b', "\xff"]', "damaged file"), (whole[:-1] + b", tru, 1]", "not JSON")):
        path.write_bytes(damaged + b" " * 100_000)
        reader = records.read_json_array(path, raise_on_skip)
        assert [next(reader)[1] for _ in names] == names
        with pytest.raises(BadInput, match=message):
            next(reader)


def test_a_mistake_is_told_before_the_rest_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "READ_BYTES", 1000)
    (tmp_path / "values.json").write_text("[tru, " + "1, " * 100_000 + "1]")
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 50_000)
    with pytest.raises(BadInput, match="not JSON"):
        list(records.read_json_array(tmp_path / "values.json", raise_on_skip))


def test_an_array_is_never_held_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    path.write_text("[" + ",".join(json.dumps("x" * 100_000) for _ in range(300)) + "]")
    tracemalloc.start()
    assert sum(len(value) for _, value in records.read_json_array(path, raise_on_skip)) == 30_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15e6


@given(st.text(alphabet="ab\n漢", max_size=200), st.integers(1, 30))
def test_a_long_text_becomes_documents_of_a_stated_length(
    tmp_path_factory: pytest.TempPathFactory, text: str, limit: int
) -> None:
    path = tmp_path_factory.mktemp("texts") / "long.txt"
    path.write_bytes(text.encode())
    parts = [sample.text for sample in read(*expand(f"text:{path}?characters={limit}"))]
    assert "".join(parts) == text and all(0 < len(part) <= max(limit, 1) or len(parts) == 1 for part in parts)
    for part in parts[:-1]:  # it ends after a line, where there is one
        assert part.endswith("\n") or ("\n" not in part and len(part) == limit)
