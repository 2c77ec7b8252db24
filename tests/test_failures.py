"""What goes wrong is said, stays where it happened, and ends with the right exit code."""

from __future__ import annotations

import gzip
import io
import json
import math
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model, recipe_file
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from chameleon import device
from chameleon.cli import main
from chameleon.data import records, webdataset
from chameleon.data.sources import texts_of
from chameleon.data.tokenize import TokenizeOptions, tokenize
from chameleon.document import Document, Text
from chameleon.errors import BadInput
from chameleon.evaluation.emoji import evaluate
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.constraints import OutputConstraints
from chameleon.generation.engine import Engine
from chameleon.generation.fair_lock import FairLock
from chameleon.generation.prefix_index import BLOCK_SIZE, PrefixIndex
from chameleon.generation.request import Request
from chameleon.generation.sampling import Sampling
from chameleon.model.kv_cache import KVCache
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.train.recipe import PretrainRecipe, read_recipe
from chameleon.train.run import train

SAMPLED = Sampling(0.9, 0.9)

# --- ranks ---


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID", "LOCAL_RANK"])
def test_an_error_of_any_rank_is_printed_with_its_rank(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "3")
    with pytest.raises(SystemExit) as stopped:
        main(["info", "nowhere"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"chameleon info ({variable} 3): nowhere: ")


def test_results_of_any_rank_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that does not train does all of its work in each process that runs it."""
    main(["plan", "tiny"])
    alone = capsys.readouterr().out
    monkeypatch.setenv("SLURM_PROCID", "3")
    main(["plan", "tiny"])
    assert capsys.readouterr().out == alone != ""


# --- the engine ---


def texts(tokenizer: MixedTokenizer, count: int, length: int = 12) -> list[Request]:
    v = tokenizer.vocabulary
    return [Request((v.bos, v.text_start + n, v.sep), OutputConstraints(length), SAMPLED, seed=n) for n in range(count)]


def make_engine(tokenizer: MixedTokenizer, **options: Any) -> Engine:
    return Engine(random_model(tokenizer.vocabulary.size).double(), tokenizer.vocabulary, **options)


def test_a_request_that_does_not_fit_in_memory_fails_alone(
    tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    v = tokenizer.vocabulary
    small = texts(tokenizer, 4)
    large = Request((v.bos,), OutputConstraints(90), SAMPLED)  # takes two units of 64 tokens
    expected = make_engine(tokenizer).generate(small)
    engine = make_engine(tokenizer)
    slot_bytes = 64 * KVCache.bytes_per_token(engine.model.config, torch.float64)
    monkeypatch.setattr("chameleon.generation.kv_cache_manager.free_memory", lambda _: 1.5 * slot_bytes)
    finished = engine.submit(small[0])
    while not engine.is_finished(finished):
        engine.step()
    failing, others = engine.submit(large), [engine.submit(request) for request in small[1:]]
    while not engine.is_idle:
        engine.step()
    with pytest.raises(BadInput, match="128 tokens takes"):
        engine.take_output(failing)
    assert [engine.take_output(request_id) for request_id in (finished, *others)] == expected
    with pytest.raises(BadInput, match="no such request"):
        engine.take_output(failing)
    results = engine.generate([small[0], large, small[1]], return_errors=True)
    assert results[0] == expected[0] and isinstance(results[1], BadInput) and results[2] == expected[1]
    with pytest.raises(BadInput, match="128 tokens takes"):
        engine.generate([large, small[0]])


def test_an_unexpected_failure_spares_waiting_requests_and_finished_output(tokenizer: MixedTokenizer) -> None:
    small = texts(tokenizer, 5)
    expected = make_engine(tokenizer).generate(small)
    engine = make_engine(tokenizer, max_batch_size=2)
    finished = engine.submit(small[0])
    while not engine.is_finished(finished):
        engine.step()
    request_ids = [engine.submit(request) for request in small[1:]]
    engine.step()

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = engine.model.norm.register_forward_pre_hook(fail)
    engine.step()
    hook.remove()
    while not engine.is_idle:
        engine.step()
    for request_id in request_ids[:2]:
        engine.take_output(request_id)  # what was generated before
        with pytest.raises(torch.OutOfMemoryError):
            engine.take_output(request_id)
    assert [engine.take_output(n) for n in (finished, *request_ids[2:])] == [expected[0], *expected[3:]]


@pytest.mark.parametrize("max_batch_size", [3, 16])
def test_threads_share_an_engine(tokenizer: MixedTokenizer, max_batch_size: int) -> None:
    """Some generate, some stream, one cancels: each gets what it would get alone."""
    requests = texts(tokenizer, 24, length=20)
    expected = make_engine(tokenizer).generate(requests)
    engine = make_engine(tokenizer, max_batch_size=max_batch_size)
    actual: dict[int, list[int]] = {}
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            mine = range(thread, 24, 6)
            if thread % 2:
                for number, output in zip(mine, engine.generate([requests[n] for n in mine]), strict=True):
                    actual[number] = output
            else:
                for number in mine:
                    stream = engine.stream([requests[number]])
                    if thread == 4:
                        next(stream, None)
                        stream.close()
                    else:
                        actual[number] = [token_id for _, token_id in stream]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not errors and not any(thread.is_alive() for thread in threads)
    assert actual == {number: output for number, output in enumerate(expected) if number % 6 != 4}
    assert engine.is_idle and not engine.scheduler.requests and not engine.manager.sequences


def test_a_lock_is_granted_in_order_and_may_be_given_up() -> None:
    lock, order, started = FairLock(), list[int](), []
    has_progressed = threading.Event()

    def wait(number: int) -> None:
        started.append(number)
        with lock.hold(unless=has_progressed.is_set if number == 2 else lambda: False) as is_held:
            order.append(number if is_held else -number)
            while number == 1 and len(lock.queue) > 3:  # until the second thread has given up
                time.sleep(0.001)

    with lock.hold():
        threads = [threading.Thread(target=wait, args=(number,)) for number in range(1, 5)]
        for number, thread in enumerate(threads, 2):
            thread.start()
            while len(lock.queue) < number:
                time.sleep(0.001)
        has_progressed.set()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(order, key=abs) == [1, -2, 3, 4] and [n for n in order if n > 0] == [1, 3, 4]
    assert not lock.queue


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("embed", "embed"),
        ("blocks.0.attention.out", "blocks.0.attention"),
        ("blocks.1.ffn.down", "blocks.1.ffn"),
        ("head", "head"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_name_the_layer(tokenizer: MixedTokenizer, module: str, name: str, value: float) -> None:
    engine = make_engine(tokenizer)
    request = texts(tokenizer, 1)[0]
    assert engine.generate([request])
    weight = engine.model.get_submodule(module).weight
    with torch.no_grad():
        before = weight.clone()
        weight.fill_(value)  # type: ignore[operator]
    with pytest.raises(BadInput, match=rf"logits of token 3 are NaN or infinite, first in {name};"):
        engine.generate([request])
    with torch.no_grad():
        weight.copy_(before)  # type: ignore[operator]
    assert engine.generate([request])


def test_nan_inside_an_image_is_an_error_too(tokenizer: MixedTokenizer) -> None:
    v = tokenizer.vocabulary
    engine = make_engine(tokenizer)
    calls = iter(range(100))
    engine.model.norm.register_forward_hook(lambda m, i, output: output * (math.nan if next(calls) == 5 else 1))
    request = Request((v.bos, v.sep), OutputConstraints(v.dialect.length(v.grid), format=("image",)))
    with pytest.raises(BadInput, match="NaN or infinite, in this batch alone"):
        engine.generate([request])
    assert engine.is_idle


def test_a_request_with_nan_leaves_none_in_the_cache(tokenizer: MixedTokenizer) -> None:
    """Masked keys and values count too, as 0 × NaN: what a failed request has cached must not reach later ones."""
    v = tokenizer.vocabulary
    engine = make_engine(tokenizer)
    poisoned = Request((v.bos, *range(v.text_start, v.text_start + 20), v.text_start + 60), OutputConstraints(5), SAMPLED)
    requests = [
        Request((v.bos, v.text_start + n, *[v.text_start + 30] * n), OutputConstraints(9), SAMPLED) for n in (1, 25)
    ]
    expected = make_engine(tokenizer).generate(requests)
    row = engine.model.embed.weight[v.text_start + 60].clone()
    with torch.no_grad():
        engine.model.embed.weight[v.text_start + 60] = math.nan
    engine.rebuild_if_weights_changed()
    with pytest.raises(BadInput, match="first in embed"):
        engine.generate([poisoned])
    assert engine.generate(requests) == expected
    cache = engine.manager.cache
    assert cache is not None and all(bool(buffer.isfinite().all()) for buffer in (*cache.keys, *cache.values))
    with torch.no_grad():
        engine.model.embed.weight[v.text_start + 60] = row


def test_a_failed_admission_is_an_error_and_ends(tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = texts(tokenizer, 3)
    expected = make_engine(tokenizer).generate(requests)
    for name in ("reserve", "allocate"):
        engine, calls = make_engine(tokenizer), iter(range(100))
        method = getattr(engine.manager, name)

        def fail_once(*arguments: Any, calls: Any = calls, method: Any = method) -> Any:
            if next(calls) == 1:
                raise RuntimeError("CUDA error")
            return method(*arguments)

        monkeypatch.setattr(engine.manager, name, fail_once)
        results = engine.generate(requests, return_errors=True)
        assert isinstance(results[1], RuntimeError) and [results[0], results[2]] == [expected[0], expected[2]]
        assert engine.is_idle and not engine.manager.sequences


def test_an_iterator_that_is_collected_during_a_step_is_cancelled(tokenizer: MixedTokenizer) -> None:
    requests = texts(tokenizer, 2, length=20)
    expected = make_engine(tokenizer).generate(requests)
    engine = make_engine(tokenizer)
    streams = [engine.stream(requests[:1])]
    next(streams[0])
    hook = engine.model.norm.register_forward_pre_hook(lambda *_: streams.clear())
    actual = engine.generate(requests[1:])
    hook.remove()
    engine.step()
    assert actual == expected[1:] and engine.is_idle and not engine.scheduler.requests


# --- seeds ---


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_are_refused_everywhere(
    seed: int, chameleon: Chameleon, tmp_path: Path, tokenizer: MixedTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = PILImage.new("RGB", (16, 16), "red")
    document = Document((Text("a"),))
    recipe = recipe_file(tmp_path, tokenizer)
    for work in (
        lambda: Request((1,), OutputConstraints(1), seed=seed),
        lambda: chameleon.caption(picture, seed=seed),
        lambda: chameleon.draw("a", seed=seed),
        lambda: chameleon.draw_batch(["a", "b"], seeds=[0, seed]),
        lambda: chameleon.variations(picture, 1, seed=seed),
        lambda: chameleon.complete(picture, seed=seed),
        lambda: chameleon.generate(document, seed=seed),
        lambda: chameleon.generate_batch([document], seeds=[seed]),
        lambda: list(chameleon.stream(document, seed=seed)),
        lambda: evaluate(chameleon, concepts=2, seed=seed),
        lambda: tokenize(["emoji:words"], tokenizer, tmp_path / "out", options=TokenizeOptions(seed=seed)),
        lambda: read_recipe(PretrainRecipe, recipe, [f"run.seed={seed}"]),
    ):
        with pytest.raises(BadInput, match=f"{seed} is out of range"):
            work()
    with pytest.raises(SystemExit):
        main(["fit-text", "emoji:words", "--out", str(tmp_path / "text"), "--num-pieces", "300", "--seed", str(seed)])
    assert f"{seed} is out of range" in capsys.readouterr().err


def test_rows_of_a_batch_have_different_seeds(chameleon: Chameleon) -> None:
    document = Document((Text("orange"),))
    options: dict[str, Any] = {"max_images": 0, "max_new_tokens": 20, "text_sampling": Sampling(1.5, 1.0)}
    together = chameleon.generate_batch([document] * 4, **options)
    assert together == [chameleon.generate(document, seed=seed, **options) for seed in range(4)]
    assert len({output.text for output in together}) == 4


# --- prefixes ---

PREFIXES = [list(range(100, 100 + 3 * BLOCK_SIZE)), [7] * (2 * BLOCK_SIZE), []]
PROMPTS = st.builds(
    lambda prefix, length, rest: prefix[:length] + rest,
    st.sampled_from(PREFIXES),
    st.integers(0, 3 * BLOCK_SIZE),
    st.lists(st.integers(0, 2), max_size=2 * BLOCK_SIZE),
)


@settings(max_examples=200)
@given(slots=st.lists(PROMPTS, max_size=6), prompt=PROMPTS, spare=st.integers(0, 3), added=st.lists(st.integers(0, 2)))
def test_shared_prefixes_are_those_of_a_plain_comparison(
    slots: list[list[int]], prompt: list[int], spare: int, added: list[int]
) -> None:
    index = PrefixIndex()
    for slot, token_ids in enumerate(slots):
        index.set(slot, [9])
        index.set(slot, token_ids)
    for token_ids in slots[:2]:
        token_ids.extend(added)  # sequences grow while they are decoded
    if len(slots) > 3:
        index.remove(3)
    limit = max(0, len(prompt) - spare)

    def shared(token_ids: list[int]) -> int:
        count = 0
        while count < min(limit, len(token_ids)) and token_ids[count] == prompt[count]:
            count += 1
        return count

    expected = {slot: shared(token_ids) for slot, token_ids in enumerate(slots) if slot != 3 and shared(token_ids)}
    assert index.shared_lengths(prompt, limit) == expected


# --- resuming ---


def test_resuming_compares_the_precision_that_is_used(
    tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16-mixed in the recipe is 32-true where bfloat16 is slow; on another processor it would be another run."""
    settings_ = ["run.precision=bf16-mixed", "run.max_steps=4", "run.save_every_n_steps=2"]
    recipe = read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), settings_)
    monkeypatch.setattr("chameleon.train.trainer.fast_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match="32-true instead of bf16-mixed"):
        train(recipe)
    recipe.run.resume = True
    monkeypatch.setattr("chameleon.train.trainer.fast_bfloat16", lambda: True)
    with pytest.raises(BadInput, match=r"run\.precision from 32-true to bf16-mixed"):
        train(recipe)
    recipe.run.precision = "32-true"  # as it was used
    train(recipe)


# --- damaged archives ---


def archive(path: Path, count: int = 50, large: int | None = None) -> bytes:
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            data = b"document %d" % number if number != large else b"long text " * 40_000
            info = tarfile.TarInfo(f"{number:05}.txt")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


@settings(max_examples=60, deadline=None)
@given(member=st.integers(0, 49), bit=st.integers(0, 8 * 157 - 1))
def test_a_flipped_bit_in_a_header_costs_its_neighbours_at_most(
    member: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    data = bytearray(archive(path))
    data[1024 * member + bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    skipped: list[tuple[str, str, int]] = []
    samples = list(
        webdataset.read_samples(path, lambda where, reason, num_bytes=0: skipped.append((where, reason, num_bytes)))
    )
    actual = [sample["txt"] for sample in samples]
    expected = [b"document %d" % number for number in range(50)]
    lost = [text for text in expected if text not in actual]
    if not skipped:  # the checksum's field has characters that do not matter
        assert not lost and 148 <= bit // 8 < 156
        return
    assert set(lost) <= set(expected[max(0, member - 1) : member + 2]) and expected[member] in lost
    assert len(actual) == 50 - len(lost) and actual == [text for text in expected if text in actual]
    assert sum(num_bytes for _, _, num_bytes in skipped) == 1024  # the header and its member
    assert f"damaged header at byte {1024 * member}" in skipped[0][1]


def test_bytes_that_could_not_be_read_count_as_skipped(
    tmp_path: Path, bundle_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of 50 documents makes up most of the archive; without it too much is missing."""
    data = bytearray(archive(tmp_path / "a.tar", large=20))
    data[1024 * 20 + 5] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    command = ["tokenize", str(tmp_path / "a.tar"), "--model", str(bundle_folder), "--out", str(tmp_path / "out"), "--json"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--max-skipped", "0.5"])
    assert stopped.value.code == 3
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["documents_out"] == 47 and report["unreadable_bytes"] == 512 + 400_384
    assert "400896 bytes could not be read" in capsys.readouterr().err
    main([*command, "--max-skipped", "0.95"])


def test_odd_members_lose_no_others(tmp_path: Path) -> None:
    """A hard link whose header has a size, a folder with a long name, a file named `damage`, a zeroed header."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind in (
            ("a.txt", b"0"),
            ("link", tarfile.LNKTYPE),
            ("x" * 150, tarfile.DIRTYPE),
            ("b.damage", b"0"),
            ("b.txt", b"0"),
        ):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.size = 3 if kind == b"0" else 0
            if kind == tarfile.LNKTYPE:
                info.linkname, info.size = "a.txt", 1024
            tar.addfile(info, io.BytesIO(b"abc") if kind == b"0" else None)
    skipped: list[str] = []
    samples = list(webdataset.read_samples(path, lambda where, reason, num_bytes=0: skipped.append(reason)))
    assert [sorted(set(sample) - {"__url__", "__key__"}) for sample in samples] == [["txt"], ["damage", "txt"]]
    assert skipped == []
    data = bytearray(archive(path, count=3))
    data[2048:2560] = bytes(512)
    path.write_bytes(data)
    samples = list(webdataset.read_samples(path, lambda where, reason, num_bytes=0: skipped.append(reason)))
    assert [sample["txt"] for sample in samples] == [b"document 0"] and "damaged header" in skipped[0]


def test_odd_records_are_skipped_and_named(
    tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        '{"text": "good"}',
        '{"text": ' + "9" * 5000 + "}",
        '{"conversations": [{"from": ["human"], "value": "x"}]}',
        '{"\\ud800": 1}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    report = tokenize([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "out")
    assert (report.documents_in, report.documents_out) == (4, 1)
    assert [example.split(",")[1].split(":")[0] for example in report.examples] == [" line 2", " line 3", " line 4"]
    with pytest.raises(BadInput, match=r"a\.jsonl, line 2: not JSON"):
        list(texts_of([str(tmp_path / "a.jsonl")]))
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1 << 20)
    (tmp_path / "a.csv").write_text("text\nshort\n" + "x" * (3 << 20) + "\nafter\n")
    report = tokenize([str(tmp_path / "a.csv")], tokenizer, tmp_path / "csv")
    assert report.documents_out == 2 and "line 3: over the limit of 1 MiB" in report.examples[0]


# --- paths and sizes ---


def test_records_name_pictures_below_their_folder_only(
    tmp_path: Path, bundle_folder: Path, tokenizer: MixedTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    outside, inside = tmp_path / "outside.png", tmp_path / "data" / "inside.png"
    inside.parent.mkdir()
    for path in (outside, inside):
        PILImage.new("RGB", (16, 16), "red").save(path)
    (tmp_path / "data" / "link.png").symlink_to(outside)
    names = ["inside.png", "../outside.png", str(outside), "link.png", "../data/inside.png"]
    lines = [json.dumps({"image": name, "caption": "a"}) for name in names]
    lines += [json.dumps({"parts": [{"type": "image", "image": name}]}) for name in names]
    source = tmp_path / "data" / "a.jsonl"
    source.write_text("\n".join(lines))
    report = tokenize([str(source)], tokenizer, tmp_path / "out")
    assert report.documents_out == 4 and len(report.examples) == 6
    assert all("names an image outside" in example for example in report.examples)
    assert tokenize([str(source)], tokenizer, tmp_path / "all", allow_paths=True).documents_out == 10
    main(["tokenize", str(source), "--model", str(bundle_folder), "--out", str(tmp_path / "cli"), "--allow-paths"])
    with pytest.raises(SystemExit):
        main(["tokenize", str(source), "--model", str(bundle_folder), "--out", str(tmp_path / "strict"), "--strict"])
    assert "line 2: names an image outside" in (printed := capsys.readouterr().err) and "--allow-paths" in printed


def test_members_lines_and_values_have_size_limits(
    tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    megabyte = 1 << 20
    monkeypatch.setattr(webdataset, "MAX_MEMBER_BYTES", megabyte)
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 2 * megabyte)
    monkeypatch.setattr(records, "MAX_JSON_BYTES", 2 * megabyte)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, size in (("a", 10), ("b", 3 * megabyte), ("c", 10), ("d", 10)):
            info = tarfile.TarInfo(f"{name}.txt")
            info.size = size
            tar.addfile(info, io.BytesIO(b"x" * size))
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(b'{"text": "short"}\n{"text": "' + b"x" * 5 * megabyte + b'"}\n{"text": "after"}\n')
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 3 * megabyte}]))
    report = tokenize([str(tmp_path / "a.tar")], tokenizer, tmp_path / "tar")
    assert report.unreadable_bytes == 3 * megabyte
    assert "member b.txt claims 3145728 bytes, over the limit of 1 MiB" in report.examples[0]
    report = tokenize([str(tmp_path / "a.jsonl.gz")], tokenizer, tmp_path / "lines")
    assert report.documents_out == 2 and "line 2: over the limit of 2 MiB" in report.examples[0]
    with pytest.raises(BadInput, match=r"a\.json.*over the limit of 2 MiB"):
        tokenize([str(tmp_path / "a.json")], tokenizer, tmp_path / "json", strict=True)


# --- memory of containers ---


def cgroup(folder: Path, limit: str, usage: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")


def test_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    membership = tmp_path / "membership"
    membership.write_text("0::/pod/container\n")
    root = tmp_path / "cgroup"
    cgroup(root / "pod" / "container", "max", 5)
    cgroup(root / "pod", str(2**30), 2**29, cache=2**28)
    assert device.cgroup_memory(root, membership) == (2**30, 2**28)
    cgroup(root / "pod" / "container", str(2**29), 2**27)
    assert device.cgroup_memory(root, membership) == (2**29, 2**27)  # 384 MiB are left there, 768 in the pod
    membership.write_text("5:cpu,memory:/job\n0::/\n")
    (root / "memory" / "job").mkdir(parents=True)
    (root / "memory" / "job" / "memory.limit_in_bytes").write_text(str(2**28))
    (root / "memory" / "job" / "memory.usage_in_bytes").write_text(str(2**27))
    assert device.cgroup_memory(root, membership) == (2**28, 2**27)
    assert device.cgroup_memory(root, tmp_path / "missing") is None
    monkeypatch.setattr(device, "cgroup_memory", lambda: (2**28, 2**27))
    assert device.total_memory() == 2**28 and device.free_memory() == 2**27
    monkeypatch.setattr(device, "cgroup_memory", lambda: (2**28, 2**29))
    assert device.free_memory() == 0
