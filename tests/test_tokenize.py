"""From raw shards to token shards: the same to the byte however it is run, and filters, variants, reports."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from chameleon.cli import main
from chameleon.data.filters import Filters
from chameleon.data.token_shards import TokenShard, open_shards
from chameleon.data.tokenize import Status, TokenizeOptions, plan_tasks, tokenize
from chameleon.errors import BadInput
from chameleon.files import is_running, sha256_of
from chameleon.tokenizers import image as image_module
from chameleon.tokenizers.mixed import MixedTokenizer


def picture(number: int, size: tuple[int, int] = (20, 24)) -> bytes:
    values = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path: Path, samples: Sequence[dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(samples):
            for ending, data in sample.items():
                info = tarfile.TarInfo(f"{number:05}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Three tars of 90 pairs, some with damaged pictures."""
    for shard in range(3):
        samples = [
            {"png": b"<html>404</html>" if number == 40 else picture(100 * shard + number), "txt": b"picture %d" % number}
            for number in range(90)
        ]
        tar(tmp_path / f"{shard:05}.tar", samples)
    return str(tmp_path / "{00000..00002}.tar")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def without_run(files: dict[str, bytes]) -> dict[str, bytes]:
    """All but the report, which says how many shards the last run made."""
    return {name: data for name, data in files.items() if name != "report.json"}


def test_worker_processes_change_nothing(shards: str, tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    seen: list[Status] = []
    plain = tokenize([shards], tokenizer, tmp_path / "plain", on_status=seen.append)
    assert plain.documents_in == 270 and plain.documents_out == 267 and plain.pictures == 267
    assert [status.shards for status in seen] == sorted(status.shards for status in seen)
    assert (seen[-1].shards, seen[-1].documents, seen[-1].skipped) == (3, 267, 3)
    assert seen[-1].seconds_left == 0
    first = [status for status in seen if status.shards == 0]  # before any shard is complete
    assert len(first) > 1 and all(status.seconds_left is not None and status.seconds_left > 0 for status in first)
    tokenize([shards], tokenizer, tmp_path / "two", num_workers=2)
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "two")


def test_killed_and_started_again_it_is_the_same_to_the_byte(
    shards: str, tmp_path: Path, tokenizer: MixedTokenizer
) -> None:
    tokenizer.text.save(tmp_path / "tokenizers")
    tokenizer.image.save(tmp_path / "tokenizers")
    tokenize([shards], MixedTokenizer.load(tmp_path / "tokenizers"), tmp_path / "whole")
    code = """
import os, signal, sys
from pathlib import Path
from chameleon.data.tokenize import tokenize
from chameleon.tokenizers.mixed import MixedTokenizer
def watch(status):
    if status.documents >= int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
tokenize([sys.argv[1]], MixedTokenizer.load(Path(sys.argv[2])), Path(sys.argv[3]), on_status=watch)
"""
    out = tmp_path / "out"
    for documents in (60, 130):  # in the first shard, and in the second
        command = [sys.executable, "-c", code, shards, str(tmp_path / "tokenizers"), str(out), str(documents)]
        assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert len(list(out.glob("*/shard.json"))) == 1
    report = tokenize([shards], MixedTokenizer.load(tmp_path / "tokenizers"), out)
    assert report.shards_made == 2 and report.documents_in == 270
    assert without_run(files_of(out)) == without_run(files_of(tmp_path / "whole"))


def test_a_worker_that_dies_is_reported_and_leaves_nothing_incomplete(
    shards: str, tmp_path: Path, tokenizer: MixedTokenizer
) -> None:
    def kill_workers(status: Status) -> None:
        time.sleep(1)  # one that is killed while it writes a result hangs Python 3.11's pool (CPython issue 94777)
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(BadInput, match="a worker process died"):
        tokenize([shards], tokenizer, tmp_path / "out", num_workers=1, on_status=kill_workers)
    left = list((tmp_path / "out").iterdir())
    assert len(left) < 3 and all(TokenShard(path).verify() is None for path in left)


def test_variants_are_other_views_of_the_same_documents(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    path = tar(tmp_path / "a.tar", [{"png": picture(n, (64, 64)), "txt": b"picture %d" % n} for n in range(12)])
    plain, varied = tmp_path / "plain", tmp_path / "varied"
    tokenize([str(path)], tokenizer, plain)
    tokenize([str(path)], tokenizer, varied, options=TokenizeOptions(variants=3, crop=0.5))
    (one,), (three,) = open_shards(plain), open_shards(varied)
    v = tokenizer.vocabulary
    changed = 0
    for number in range(12):
        views = [torch.from_numpy(three.read(number, variant=variant)) for variant in range(3)]
        assert np.array_equal(views[0].numpy(), one[number])
        for view in views[1:]:
            assert torch.equal(view[~v.is_image(view)], views[0][~v.is_image(view)])
            assert torch.equal(v.is_image(view), v.is_image(views[0]))
            changed += not torch.equal(view, views[0])
    assert changed > 20 and three.variants == 3
    tokenize([str(path)], tokenizer, tmp_path / "again", options=TokenizeOptions(variants=3, crop=0.5))
    assert files_of(varied) == files_of(tmp_path / "again")
    made_anew = tokenize([str(path)], tokenizer, varied, options=TokenizeOptions(variants=3, crop=0.6))
    assert made_anew.shards_made == 1  # other options, so not the shard that is there


def test_filters(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    facts: list[dict[str, Any]] = [
        {"caption": "good enough", "lang": "en-GB", "score": 6.0},
        {"caption": "x", "lang": "en", "score": 6},
        {"caption": "far too long " * 20, "lang": "en", "score": 6.5},
        {"caption": "nicht englisch", "lang": "de", "score": 7.0},
        {"caption": "not scored", "lang": "en"},
        {"caption": "scored low", "lang": "en", "score": 4.9},
        {"caption": "narrow", "lang": "en", "score": 6.0},
        {"caption": "small", "lang": "en", "score": 6.0},
        {"caption": "no tag", "score": 6.0},
    ]
    sizes = {6: (100, 30), 7: (19, 24)}
    samples = [
        {"png": picture(n, sizes.get(n, (20, 24))), "json": json.dumps(entry).encode()} for n, entry in enumerate(facts)
    ]
    path = tar(tmp_path / "a.tar", samples)
    filters = Filters(min_side=20, max_aspect=2, min_text=2, max_text=100, languages=["en"], min_score={"score": 5})
    report = tokenize([str(path)], tokenizer, tmp_path / "out", options=TokenizeOptions(filters=filters))
    assert (report.documents_in, report.documents_out) == (9, 1)
    assert report.skipped == {
        "filter: text is under 2 characters": 1,
        "filter: text is over 100 characters": 1,
        "filter: language is none of en": 2,
        "filter: no number score": 1,
        "filter: score is under 5": 1,
        "filter: a picture's aspect is over 2": 1,
        "filter: a picture's side is under 20": 1,
    }
    (shard,) = open_shards(tmp_path / "out")
    assert tokenizer.decode(shard[0]).text == "good enough"


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (Filters(min_side=-1), "min_side is -1"),
        (Filters(max_aspect=0.5), "no picture is below 1"),
        (Filters(min_text=5, max_text=4), "min_text is more than max_text"),
        (Filters(languages=[]), "languages is an empty list"),
    ],
)
def test_invalid_filters(filters: Filters, message: str, tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    with pytest.raises(BadInput, match=message):
        tokenize(["emoji:words"], tokenizer, tmp_path, options=TokenizeOptions(filters=filters))


def test_duplicate_pictures(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    """Ten samples over two shards show six pictures; each stays where it is seen first, also with the shards made apart."""
    shown = [[0, 1, 0, 2, 3], [1, 4, 4, 5, 0]]
    for number, pictures in enumerate(shown):
        tar(tmp_path / f"{number}.tar", [{"png": picture(n), "txt": b"%d" % n} for n in pictures])
    sources = [str(tmp_path / f"{number}.tar") for number in range(2)]
    report = tokenize(sources, tokenizer, tmp_path / "all")
    assert report.documents_out == 10 and report.duplicate_share == pytest.approx(0.4)
    options = TokenizeOptions(filters=Filters(unique_images=True))
    report = tokenize(sources, tokenizer, tmp_path / "unique", options=options)
    assert report.documents_out == 6 and report.duplicate_share == pytest.approx(0.4)
    assert report.skipped == {"filter: all its pictures are duplicates": 4}
    actual = {tokenizer.decode(shard[n]).text for shard in open_shards(tmp_path / "unique") for n in range(len(shard))}
    assert actual == set("012345")
    assert report.skipped_share == 0  # they were not wanted, but could have been used
    longer = TokenizeOptions(filters=Filters(unique_images=True, min_text=2))
    tar(tmp_path / "2.tar", [{"png": picture(9), "txt": b"9"}, {"png": picture(9), "txt": b"nine"}])
    report = tokenize([str(tmp_path / "2.tar")], tokenizer, tmp_path / "longer", options=longer)
    assert report.documents_out == 1  # the picture's first place was left out for its text
    tokenize(sources[:1], tokenizer, tmp_path / "later", options=options)
    assert tokenize(sources, tokenizer, tmp_path / "later", options=options).shards_made == 1
    assert without_run(files_of(tmp_path / "later")) == without_run(files_of(tmp_path / "unique"))


def test_each_picture_is_opened_once(tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many filters look at it, and however many variants are made of it."""
    opened: list[bytes] = []
    open_image = image_module.open_image
    monkeypatch.setattr(image_module, "open_image", lambda data: (opened.append(data), open_image(data))[1])
    pictures = [picture(n) for n in range(8)]
    source = tar(tmp_path / "a.tar", [{"png": data, "txt": b"%d" % n} for n, data in enumerate(pictures)])
    options = TokenizeOptions(filters=Filters(min_side=2, max_aspect=3), variants=3, crop=0.5)
    assert tokenize([str(source)], tokenizer, tmp_path / "out", options=options).documents_out == 8
    assert sorted(opened) == sorted(pictures)


def test_options_from_the_command_line(shards: str, bundle_folder: Path, tmp_path: Path) -> None:
    options = tmp_path / "options.yaml"
    options.write_text("filters: {min_side: 20}\nvariants: 2\n")
    command = ["tokenize", shards, "--model", str(bundle_folder), "--out", str(tmp_path / "out"), "--config", str(options)]
    main([*command, "--set", "crop=0.9", "--set", "filters.min_text=10", "--max-skipped", "1"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["documents_out"] == 79 * 3 + 3 - 3 and report["skipped"]["filter: text is under 10 characters"] == 30
    assert all(shard.variants == 2 for shard in open_shards(tmp_path / "out"))
    with pytest.raises(SystemExit) as error:
        main([*command, "--set", "filters.min_sides=2"])
    assert error.value.code == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("variants=", "variants is empty"),
        ("variants=0", "variants is 0"),
        ("variants=x", "variants"),
        ("crop=2", "crop is 2"),
        ("filters=5", "filters is 5, expected keys and values"),
        ("filters=[1]", "filters is [1], expected keys and values"),
        ("filters.min_side=-3", "min_side is -3"),
        ("filter.min_side=3", "unknown key filter; did you mean filters?"),
    ],
)
def test_invalid_options(change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["tokenize", "emoji:words", "--out", str(tmp_path / "out"), "--set", change])
    lines = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-workers", "-1"], "--num-workers is 0 or more"),
        (["--num-actors", "2"], "--num-actors and --ray-address are for --engine ray"),
        (["--device", "cpux"], "device cpux: cannot be used"),
    ],
)
def test_invalid_flags(more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["tokenize", "emoji:words", "--out", str(tmp_path / "out"), *more])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_scores_in_a_csv_and_nothing_left(bundle_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,aesthetic\none,6.5\ntwo,4\nth\xfcree,7\nfour,7\n")
    command = ["tokenize", str(tmp_path / "a.csv"), "--model", str(bundle_folder), "--out", str(tmp_path / "out")]
    main([*command, "--set", "filters.min_score={aesthetic: 5}", "--max-skipped", "0.3", "--json"])
    actual = json.loads(capsys.readouterr().out)
    assert actual["documents_out"] == 2  # the last one too, behind a row that is not UTF-8
    assert actual["skipped"] == {"filter: aesthetic is under 5": 1, "not UTF-8": 1}
    with pytest.raises(SystemExit) as error:
        main([*command, "--set", "filters.min_text=1000", "--max-skipped", "1"])
    assert error.value.code == 3 and "none of 4 samples is left" in capsys.readouterr().err


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes elsewhere work in other folders."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    (task,) = plan_tasks(["jsonl:a.jsonl?images=pictures"], Path("out"), TokenizeOptions())
    assert task.raw.path == str(tmp_path / "a.jsonl") and task.folder.parent == tmp_path / "out"
    assert task.raw.options == {"images": str(tmp_path / "pictures")}


def test_workers_end_with_the_process_that_gives_them_work(shards: str, tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    tokenizer.text.save(tmp_path / "tokenizers")
    tokenizer.image.save(tmp_path / "tokenizers")
    code = """
import multiprocessing, os, signal, sys
from pathlib import Path
from chameleon.data.tokenize import tokenize
from chameleon.tokenizers.mixed import MixedTokenizer
def watch(status):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    tokenize([sys.argv[1]], MixedTokenizer.load(Path(sys.argv[2])), Path(sys.argv[3]), num_workers=2, on_status=watch)
"""
    (tmp_path / "run.py").write_text(code)
    command = [sys.executable, str(tmp_path / "run.py"), shards, str(tmp_path / "tokenizers"), str(tmp_path / "out")]
    actual = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    workers = [int(number) for number in actual.stdout.split()]
    assert actual.returncode == -signal.SIGKILL and len(workers) == 2
    deadline = time.monotonic() + 30
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_sources_given_twice_or_empty(shards: str, tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    with pytest.raises(BadInput, match="given twice"):
        tokenize([shards, str(tmp_path / "00001.tar")], tokenizer, tmp_path / "out")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(BadInput, match="no samples"):
        tokenize([str(tmp_path / "empty.jsonl")], tokenizer, tmp_path / "out")


def test_pictures_that_cannot_be_used_are_counted(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    """Absent, a page instead of a picture, 300 megapixels, cut short: each is named by its reason, the rest is kept."""
    PILImage.new("1", (20_000, 15_000)).save(tmp_path / "huge.png")
    odd = ["a\0b.png", "x" * 300, "good.png/x.png", "data:image/png;base64,ééé"]
    (tmp_path / "page.jpg").write_text("<!doctype html><title>404</title>")
    (tmp_path / "cut.png").write_bytes(picture(0, (200, 200))[:5000])
    (tmp_path / "good.png").write_bytes(picture(1))
    (tmp_path / "folder.png").mkdir()
    names = ["good", "absent", "huge", "page", "cut", "folder", "good"]
    lines = [{"image": f"{name}.jpg" if name == "page" else f"{name}.png", "caption": name} for name in names]
    lines += [{"image": name, "caption": "odd"} for name in odd]
    lines.append({"texts": ["two pictures", None, None], "images": [None, "good.png", "absent.png"]})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for options in (TokenizeOptions(), TokenizeOptions(filters=Filters(unique_images=True, min_side=2))):
        out = tmp_path / f"out{options.filters.unique_images}"
        report = tokenize([str(tmp_path / "a.jsonl")], tokenizer, out, options=options)
        kept = 1 if options.filters.unique_images else 2
        assert (report.documents_in, report.documents_out) == (12, kept)
        assert sum(report.skipped.values()) == 12 - kept and len(report.examples) == 12 - kept
        assert "a.jsonl, line 12: picture 2: " in report.examples[-1] or options.filters.unique_images
        reported = "\n".join(report.examples)
        for line, reason in (
            (2, "no such"),
            (3, "more than 64 million pixels"),
            (4, "not a readable image"),
            (5, "damaged"),
            (6, ""),
        ):
            assert re.search(rf"a\.jsonl, line {line}: .*{reason}", reported)
    with pytest.raises(BadInput, match="line 2: no such"):
        tokenize([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "strict", strict=True)


def test_a_folder_that_cannot_be_written(shards: str, tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="could not be written"):
        tokenize([shards], tokenizer, tmp_path / "file" / "out")


def test_counts_of_answers(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    (tmp_path / "p.png").write_bytes(picture(0))
    question = {"role": "user", "content": [{"type": "text", "text": "draw"}]}
    answer = {"role": "assistant", "content": [{"type": "image", "image": "p.png"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [question, answer]}))
    tokenize([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "out")
    (shard,) = open_shards(tmp_path / "out")
    assert shard.description["answers_by_modality"] == {"structure": 3, "image": 16, "text": 0}  # boi, eoi, eos
    assert shard.image_starts.tolist() == [int((torch.from_numpy(shard[0]) == tokenizer.vocabulary.boi).nonzero())]


@pytest.fixture
def made(bundle_folder: Path, tmp_path: Path) -> Path:
    """Token shards of a pair, a text and a conversation."""
    (tmp_path / "p.png").write_bytes(picture(0))
    queries = {"role": "user", "content": [{"type": "image", "image": "p.png"}, {"type": "text", "text": "what <b>?"}]}
    lines: list[dict[str, Any]] = [
        {"image": "p.png", "caption": "orange heart"},
        {"text": "def add(a, b):\n    return a & b"},
        {"messages": [queries, {"role": "assistant", "content": "a heart"}]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    main(["tokenize", str(tmp_path / "a.jsonl"), "--model", str(bundle_folder), "--out", str(tmp_path / "made")])
    return tmp_path / "made"


def test_showing_shards(made: Path, bundle_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    main(["info", str(made), "--show", "3", "--model", str(bundle_folder)])
    shown = capsys.readouterr().out
    assert "documents             3" in shown and "images                2" in shown
    assert "<bos>«[image]»«orange heart»«<eos>»" in shown
    assert "<bos>[image]what <b>?<sep>«a heart»«<eos>»" in shown
    main(["info", str(made), "--show", "2", "--model", str(bundle_folder), "--json"])
    actual = json.loads(capsys.readouterr().out)
    assert [entry["document"] for entry in actual["shown"]] == [0, 1]
    assert actual["shown"][0]["tokens"] == sum(part["tokens"] for part in actual["shown"][0]["parts"])
    page = tmp_path / "page.html"
    main(["info", str(made), "--html", str(page), "--model", str(bundle_folder)])
    text = page.read_text()
    assert text.count("<img") == 2 and text.count('class="document"') == 3
    assert '<span class="text ">what &lt;b&gt;?</span>' in text and '<span class="text loss">a heart</span>' in text
    assert "a &amp; b" in text
    with pytest.raises(SystemExit):
        main(["info", str(made), "--show", "0", "--model", str(bundle_folder)])
    assert "--show 0: expected 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:  # the shipped tokenizers did not make them
        main(["info", str(made), "--show", "3"])
    assert error.value.code == 2 and "written with tokenizers" in capsys.readouterr().err


def test_checking_shards(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", str(made), "--check"])
    assert "checksums, offsets and token ids are valid" in capsys.readouterr().out
    (folder,) = (path.parent for path in made.glob("*/shard.json"))
    whole = {name: (folder / name).read_bytes() for name in ("ids.bin", "offsets.bin", "images.bin", "pictures.bin")}
    for name, data in whole.items():
        (folder / name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(SystemExit) as error:
            main(["info", str(made), "--check"])
        actual = capsys.readouterr().err
        assert error.value.code == 2 and f"{name}: checksum does not match" in actual and "1 of 1 shards" in actual
        (folder / name).write_bytes(data)
    # Files that were wrong when their checksums were taken: offsets that fall, ids that no vocabulary has.
    description = (folder / "shard.json").read_text()
    falling = np.frombuffer(whole["offsets.bin"], dtype="<u8").copy()
    falling[1] = 1 << 40
    for name, data, message in (
        ("offsets.bin", falling.tobytes(), "offsets do not rise"),
        ("ids.bin", b"\xff" * 4 + whole["ids.bin"][4:], "a token id is not below"),
    ):
        (folder / name).write_bytes(data)
        (folder / "shard.json").write_text(
            description.replace(hashlib.sha256(whole[name]).hexdigest(), sha256_of(folder / name))
        )
        with pytest.raises(BadInput, match=message):
            TokenShard(folder).verify()
        (folder / name).write_bytes(whole[name])


@pytest.mark.slow
def test_two_ray_nodes_one_of_which_is_lost(shards: str, tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    """Two nodes with an actor each; the node of one is killed while its shard is under way. The result is the same."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from chameleon.data.ray_engine import ray_engine

    for shard in range(3, 8):
        tar(tmp_path / f"{shard:05}.tar", [{"png": picture(100 * shard + n), "txt": b"%d" % n} for n in range(400)])
    source = str(tmp_path / "{00000..00007}.tar")
    tokenize([source], tokenizer, tmp_path / "plain")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    lost: list[float] = []

    def lose_one(status: Status) -> None:
        if status.shards >= 2 and not lost:
            cluster.remove_node(nodes[1], allow_graceful=False)
            lost.append(time.monotonic())

    try:
        out = tmp_path / "out"
        report = tokenize([source], tokenizer, out, engine=ray_engine(cluster.address), on_status=lose_one)
        assert lost and report.shards_made == 8
        assert files_of(tmp_path / "plain") == files_of(out)
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_a_ray_cluster_of_its_own_and_the_errors_of_its_actors(
    shards: str, tmp_path: Path, tokenizer: MixedTokenizer
) -> None:
    pytest.importorskip("ray")
    from chameleon.data.ray_engine import ray_engine

    with pytest.raises(BadInput, match="not a readable image"):
        tokenize([shards], tokenizer, tmp_path / "out", engine=ray_engine(num_actors=1), strict=True)
    with pytest.raises(BadInput, match="actors do not start"):
        tokenize([shards], tokenizer, tmp_path / "out", engine=ray_engine(num_actors=1, device="cpux"))
    with pytest.raises(BadInput, match="no Ray cluster answers"):
        tokenize([shards], tokenizer, tmp_path / "out", engine=ray_engine("127.0.0.1:1"))
    report = tokenize([shards], tokenizer, tmp_path / "out", engine=ray_engine(num_actors=2))
    assert report.documents_out == 267 and len(open_shards(tmp_path / "out")) == 3
