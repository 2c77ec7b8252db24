"""Sources, token shards, packing and the mixture."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from chameleon.cli import main
from chameleon.data import colours, emoji, labelled, picture_tasks, token_shards
from chameleon.data.questions import YES_NO, questions_about
from chameleon.data.sources import expand, read, texts_of
from chameleon.data.token_shards import TokenShard, open_shards, write_shard
from chameleon.data.tokenize import tokenize
from chameleon.document import Document, Image, Text
from chameleon.errors import BadInput
from chameleon.files import verify_once
from chameleon.tokenizers.image import load_picture
from chameleon.tokenizers.mixed import MixedTokenizer


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    files = {"a.png": png(), "a.txt": b"red square", "b.png": png("blue"), "b.json": b'{"caption": "blue square"}'}
    return write_tar(tmp_path / "good.tar", files)


# --- sources ---


def test_image_text_shards(shard: Path) -> None:
    samples = list(read(expand(str(shard))[0]))
    assert [sample.content.text for sample in samples if isinstance(sample.content, Document)] == [
        "red square",
        "blue square",
    ]


def test_bad_samples_are_named_and_skipped(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    files = {
        "a.png": png(),
        "a.txt": b"ok",
        "b.png": png()[:40],
        "b.txt": b"cut",
        "c.txt": b"\xff\xfe",
        "d.png": png(),
        "d.json": b"{",
    }
    write_tar(tmp_path / "mixed.tar", files)
    report = tokenize([str(tmp_path / "mixed.tar")], tokenizer, tmp_path / "out")
    assert (report.documents_in, report.documents_out) == (4, 1)
    text = "\n".join(report.examples)
    assert "sample c: not UTF-8" in text
    assert "sample d: not JSON" in text
    assert "sample b: " in text
    assert "not a readable image" in text
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["documents_out"] == 1 and sum(saved["skipped"].values()) == 3
    with pytest.raises(BadInput):
        tokenize([str(tmp_path / "mixed.tar")], tokenizer, tmp_path / "strict", strict=True)
    assert not list((tmp_path / "strict").glob("*/shard.json"))


def test_truncated_archives_keep_what_came_before(shard: Path, tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    whole = shard.read_bytes()
    cut_off = tmp_path / "cut.tar"
    cut_off.write_bytes(whole[:2600])
    report = tokenize([str(cut_off)], tokenizer, tmp_path / "out")
    assert report.documents_out == 1
    assert "cut.tar" in report.examples[0] and "truncated archive" in report.examples[0]
    noise = tmp_path / "noise.tar"
    noise.write_bytes(b"no archive at all" * 100)
    report = tokenize([str(noise)], tokenizer, tmp_path / "out2")
    assert report.documents_out == 0 and sum(report.skipped.values()) == 1


def test_an_archive_truncated_between_members_is_reported_and_its_last_sample_skipped(shard: Path, tmp_path: Path) -> None:
    """tarfile alone takes such an archive for whole, and its last picture would be read without its caption."""
    with tarfile.open(shard) as archive:
        caption = archive.getmember("a.txt")
    for end, last in ((caption.offset, "a.png"), (caption.offset + 100, "a.png"), (caption.offset_data + 512, "a.txt")):
        cut_off = tmp_path / f"{end}.tar"
        cut_off.write_bytes(shard.read_bytes()[:end])
        skipped: list[str] = []
        assert not list(read(expand(str(cut_off))[0], lambda where, why, _=0: skipped.append(f"{where}: {why}")))  # noqa: B023
        assert len(skipped) == 2 and re.search("truncated archive|damaged header at byte 1024", skipped[0]), last
        assert skipped[1] == f"{cut_off}, sample a: may lack members, next to a damaged place in the archive"
        with pytest.raises(BadInput, match=r"truncated archive|damaged header"):
            list(read(expand(str(cut_off))[0]))


def test_odd_samples_are_skipped_and_the_rest_read(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for name, data in (
            ("a.png", png()),
            ("a.png", png("blue")),  # the same name twice
            ("b.png", png()),
            ("b.json", b"[1]"),
            ("c.json", b'{"parts": [{"type": "image", "image": "/etc/hostname"}]}'),
            ("d.PNG", png()),
            ("d.json", b'{"parts": [{"type": "text", "text": "x"}, {"type": "image", "image": "d.PNG"}]}'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    skipped: list[str] = []
    samples = list(read(expand(str(tmp_path / "odd.tar"))[0], lambda where, why, _=0: skipped.append(f"{where}: {why}")))
    assert [Path(sample.key).name.split()[-1] for sample in samples] == ["a", "d"]
    assert len(skipped) == 3
    for part in ("duplicate file name", "sidecar is not an object", "no member /etc/hostname"):
        assert any(part in line for line in skipped), part
    content = samples[1].content
    assert isinstance(content, Document) and content.text == "x"
    assert load_picture(content.images[0]).getpixel((3, 3)) == (255, 0, 0)


def test_captions_beside_pictures_are_no_texts_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(png())
    (tmp_path / "p.txt").write_text("a caption")
    (tmp_path / "q.png").write_bytes(png())
    (tmp_path / "q.txt").write_bytes(b"\xff")
    (tmp_path / "r.txt").write_text("a text")
    assert [(Path(s.path).name, s.kind) for s in expand(str(tmp_path))] == [
        ("p.png", "picture"),
        ("q.png", "picture"),
        ("r.txt", "text"),
    ]
    assert [Path(s.path).name for s in expand(f"picture:{tmp_path}")] == ["p.png", "q.png"]
    skipped: list[str] = []
    samples = [s for raw in expand(str(tmp_path)) for s in read(raw, lambda where, why, _=0: skipped.append(why))]
    assert len(samples) == 2 and "not UTF-8" in skipped[0]


def test_naming_the_kind_takes_files_of_any_ending(tmp_path: Path) -> None:
    (tmp_path / "n.rst").write_text("of an ending without a reader")
    assert [Path(s.path).name for s in expand(f"text:{tmp_path}")] == ["n.rst"]
    with pytest.raises(BadInput, match="no file matches"):
        expand(str(tmp_path))


def test_half_a_surrogate_pair_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "\\ud800"}\n{"text": "\\ud83d\\ude00"}\n')
    skipped: list[str] = []
    assert list(texts_of([str(tmp_path / "d.jsonl")], lambda where, why, _=0: skipped.append(why))) == ["😀"]
    assert len(skipped) == 1 and "lone surrogate" in skipped[0]


def test_jsonl_and_text_and_pictures(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(
        '{"text": "plain"}\n\n{"parts": [{"type": "text", "text": "part"}]}\nnot json\n'
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
    )
    skipped: list[str] = []
    samples = list(read(expand(str(tmp_path / "d.jsonl"))[0], lambda where, why, _=0: skipped.append(f"{where}: {why}")))
    assert len(samples) == 3 and "line 4: not JSON" in skipped[0]
    (tmp_path / "bad.txt").write_bytes(b"ok\xff")
    with pytest.raises(BadInput, match=r"bad\.txt: not UTF-8 \(byte 2\)"):
        list(read(expand(str(tmp_path / "bad.txt"))[0]))
    (tmp_path / "p.png").write_bytes(png())
    (tmp_path / "p.txt").write_text("a caption\n")
    (sample,) = read(expand(str(tmp_path / "p.png"))[0])
    assert sample.content == Document((Image(tmp_path / "p.png"), Text("a caption")))
    assert list(texts_of([str(tmp_path / "d.jsonl")], lambda *_: None)) == ["plain", "part", "q\na"]


def test_sources_that_match_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no file matches"):
        expand(str(tmp_path / "*.tar"))
    (tmp_path / "x.bin").touch()
    with pytest.raises(BadInput, match="unknown extension"):
        expand(str(tmp_path / "x.bin"))
    with pytest.raises(BadInput, match="no such task"):
        expand("emoji:nothing")
    with pytest.raises(BadInput, match="unknown option"):
        expand("emoji:pairs?per=3")
    with pytest.raises(BadInput, match="no split"):
        expand("emoji:pairs?split=test")


# --- the embedded set ---


def test_embedded_set_is_complete() -> None:
    everything = emoji.load()
    counts = {style: sum(entry.style == style for entry in everything) for style in emoji.STYLES}
    assert counts == {"fluent": 3372, "noto": 3781, "twemoji": 3781}
    assert {entry.picture.size for entry in everything[:50]} == {(64, 64)}
    assert len({entry.key for entry in everything}) == len(everything)


def test_split_holds_out_one_style_of_a_concept() -> None:
    train, validation = labelled.by_concept(emoji.load("train")), labelled.by_concept(emoji.load("validation"))
    for concept, members in validation.items():
        styles = {entry.style for entry in members}
        assert len(styles) == 1
        assert styles.isdisjoint(entry.style for entry in train[concept])
    share = len(validation) / len(train)
    assert 0.12 < share < 0.18


def test_questions_are_true_and_balanced() -> None:
    import random

    members = labelled.representatives(emoji.load("train"))
    answers = []
    for entry in members:
        for question in questions_about(entry, random.Random(entry.key)):
            if question.family.endswith("yes-no"):
                answers.append((entry.group, question))
    for group, question in answers:
        about = next(name for name, text in YES_NO.items() if text == question.question)
        assert (question.answer == "yes") == (group == about)
    queries = [q.answer for group, q in answers if group in YES_NO]
    assert 0.4 < queries.count("yes") / len(queries) < 0.6


def test_names_never_come_before_other_answers() -> None:
    for conversation in picture_tasks.answering(emoji.subset("train", 40), 2, 0):
        questions = [m.content.text for m in conversation.messages if m.role == "user"]
        assert "what is it?" not in questions[:-1]


def test_tasks_with_one_seed_show_the_same_pictures() -> None:
    chosen = emoji.subset("train", 12)
    pair = [bytes(d.images[0].tobytes()) for d in picture_tasks.pairs(chosen, 2, 5)]  # type: ignore[union-attr]
    caption = [c.messages[0].content.images[0].tobytes() for c in picture_tasks.captioning(chosen, 2, 5)]  # type: ignore[union-attr]
    assert pair == caption
    plain = [c.messages[1].content.images[0].tobytes() for c in picture_tasks.drawing(chosen, 3, 5, labelled.plain_view)]  # type: ignore[union-attr]
    assert set(plain) <= {entry.picture.tobytes() for entry in chosen}


def test_colours_are_measured() -> None:
    for name, colour in (
        ("red", (220, 30, 30)),
        ("blue", (40, 80, 220)),
        ("green", (40, 160, 60)),
        ("yellow", (250, 220, 60)),
    ):
        assert colours.dominant_colour(PILImage.new("RGBA", (20, 20), (*colour, 255))) == name
    mixed = PILImage.new("RGBA", (20, 20), "red")
    mixed.paste((0, 0, 255, 255), (0, 0, 10, 20))
    assert colours.dominant_colour(mixed) is None
    assert colours.dominant_colour(PILImage.new("RGBA", (20, 20), (255, 0, 0, 0))) is None


def test_text_and_code_splits_are_apart() -> None:
    for task in (emoji.words, emoji.code):
        held = {d.text for d in task("validation")}
        seen = {d.text for d in task("train")}
        assert held and seen and not held & seen


# --- token shards ---


def test_files_are_verified_once_while_they_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, folder = [], tmp_path / "files"
    folder.mkdir()
    (folder / "a").write_text("a")

    def verify(folder: Path) -> int:
        verify_once(folder, {"a": "checksum"}, lambda: calls.append(folder))
        return len(calls)

    assert [verify(folder), verify(folder)] == [1, 1]
    shutil.copytree(folder, tmp_path / "copy")  # with its times and its note
    assert [verify(tmp_path / "copy"), verify(tmp_path / "copy")] == [2, 2]
    (folder / "a").write_text("b")
    assert verify(folder) == 3

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    (folder / "a").write_text("c")
    for name in ("write_bytes", "unlink", "replace"):
        monkeypatch.setattr(Path, name, refuse)
    assert [verify(folder), verify(folder)] == [4, 5]


def test_shards_round_trip_and_are_verified(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    v = tokenizer.vocabulary
    documents = [torch.tensor([v.bos, v.text_start + n, v.eos]) for n in range(5)] + [torch.tensor([v.bos, v.eos])]
    with write_shard(tmp_path / "s", "print", v) as writer:
        for document in documents:
            writer.add(document)
    shard = TokenShard(tmp_path / "s")
    assert len(shard) == 6 and shard.lengths.tolist() == [3] * 5 + [2]
    assert all(np.array_equal(shard[n], document.numpy()) for n, document in enumerate(documents))
    shard.verify()
    data = bytearray((tmp_path / "s" / "ids.bin").read_bytes())
    data[5] ^= 1
    (tmp_path / "s" / "ids.bin").write_bytes(data)
    with pytest.raises(BadInput, match="checksum"):
        TokenShard(tmp_path / "s").verify()
    (tmp_path / "s" / "ids.bin").write_bytes(data[:-4])
    with pytest.raises(BadInput, match=r"ids\.bin does not have the size"):
        TokenShard(tmp_path / "s")


def test_a_failing_writer_leaves_what_was_there(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    with write_shard(tmp_path / "s", "old", tokenizer.vocabulary) as writer:
        writer.add(torch.tensor([1, 2]))
    with pytest.raises(RuntimeError), write_shard(tmp_path / "s", "new", tokenizer.vocabulary) as writer:  # noqa: PT012
        writer.add(torch.tensor([3]))
        raise RuntimeError
    assert TokenShard(tmp_path / "s").description["fingerprint"] == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_tokenizing_again_does_nothing(shard: Path, tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    first = tokenize([str(shard)], tokenizer, tmp_path / "out")
    again = tokenize([str(shard)], tokenizer, tmp_path / "out")
    assert (first.shards_made, again.shards_made) == (1, 0)
    assert first.documents_out == again.documents_out == 2 and first.tokens == again.tokens


def test_too_much_skipped_is_an_exit_code(bundle_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ['{"text": "good"}'] * 8 + ["{"] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    command = ["tokenize", str(tmp_path / "a.jsonl"), "--model", str(bundle_folder), "--out", str(tmp_path / "out")]
    for _ in range(2):  # the second run finds the shard made, and reports the same
        with pytest.raises(SystemExit) as error:
            main([*command, "--json"])
        actual = capsys.readouterr()
        assert error.value.code == 3 and "20.0% could not be read, more than --max-skipped 0.05" in actual.err
        assert json.loads(actual.out)["documents_in"] == 10
    main([*command, "--max-skipped", "0.2"])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["documents_out"] == 8


def test_tokenizing_sees_other_and_changed_and_damaged_files(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    sources, out = [str(tmp_path / "x"), str(tmp_path / "y")], tmp_path / "out"
    assert tokenize(sources[:1], tokenizer, out).shards_made == 1
    assert tokenize(sources, tokenizer, out).shards_made == 1  # the other file of that name
    assert tokenize(sources, tokenizer, out).shards_made == 0
    (tmp_path / "x" / "a.txt").write_text("x, changed")
    assert tokenize(sources, tokenizer, out).shards_made == 1
    ids = next(path for path in out.glob("*/ids.bin"))
    whole = ids.read_bytes()
    for damaged in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:]):
        ids.write_bytes(damaged)
        assert tokenize(sources, tokenizer, out).shards_made == 1
        assert ids.read_bytes() == whole
    assert tokenize([os.path.relpath(source) for source in sources], tokenizer, out).shards_made == 0  # the same files
    report = tokenize(sources[:1], tokenizer, out)
    assert len(report.others) == 1
    spelt = {tokenizer.decode(shard[0]).text for shard in open_shards(out)}
    assert spelt == {"x, changed", "y"}


def test_a_full_disk_leaves_the_shard_that_was_there(
    shard: Path, tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    tokenize([str(shard)], tokenizer, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    shard.touch()  # changed, so it is made anew

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_shards, "write_json", full)
    with pytest.raises(BadInput, match="No space left"):
        tokenize([str(shard)], tokenizer, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_any_number_of_shards_holds_few_files_open(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    def held() -> int:
        return len(list(Path("/dev/fd").iterdir()))

    before = held()
    for number in range(100):
        with write_shard(tmp_path / f"s{number:02}", tokenizer.fingerprint, tokenizer.vocabulary) as writer:
            writer.add(torch.tensor([1, number]))
    shards = open_shards(tmp_path)
    assert [int(shard[0][1]) for shard in shards] == list(range(100))
    assert held() <= before + token_shards.MAX_OPEN_FILES


def test_shards_of_other_tokenizers_are_refused(shard: Path, tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    tokenize([str(shard)], tokenizer, tmp_path / "out")
    open_shards(tmp_path / "out", tokenizer.fingerprint)
    with pytest.raises(BadInput, match="written with tokenizers"):
        open_shards(tmp_path / "out", "another")
    with pytest.raises(BadInput, match="no token shard"):
        open_shards(tmp_path)
