"""Studies with people: the page in a real browser with a scripted judge, and the statistics against closed forms."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from PIL import Image as PILImage

from chameleon.cli import main
from chameleon.errors import BadInput
from chameleon.evaluation.study import JUDGEMENTS_FILE, Study, agreement, bradley_terry, strengths
from chameleon.evaluation.study_server import StudyServer

CHROMIUM = shutil.which("chromium")


def write_card(folder: Path, answers: Sequence[str], quality: str) -> Path:
    """A scorecard with an answer of text and a picture to each prompt; the picture's colour tells the model apart."""
    folder.mkdir(parents=True)
    samples = []
    for index, answer in enumerate(answers):
        PILImage.new("RGB", (32, 32), quality).save(folder / f"{index}.png")
        output = {"parts": [{"type": "text", "text": answer}, {"type": "image", "image": f"{index}.png"}], "complete": True}
        sample = {"key": str(index), "prompt": [f"prompt {index}"], "output": output, "expected": None, "scores": {}}
        samples.append(sample | {"category": "drawing" if index % 2 else "telling"})
    part = {"method": {}, "figures": {}, "metrics": {}, "samples": samples}
    card = {"format": 1, "suites": {"mixed": {"kind": "mixed", "settings": {}, "data": {}, "parts": {"answers": part}}}}
    (folder / "scorecard.json").write_text(json.dumps(card))
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Study:
    cards = {
        "alpha": write_card(tmp_path / "a", [f"good answer {i}" for i in range(12)], "green"),
        "beta": write_card(tmp_path / "b", [f"poor answer {i}" for i in range(12)], "red"),
    }
    return Study.create(tmp_path / "study", cards)


@contextmanager
def served(study: Study) -> Iterator[str]:
    server = StudyServer(study)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_sides_are_balanced_for_each_judge_and_orders_differ(study: Study) -> None:
    orders = [study.order(judge) for judge in ("ann", "bob")]
    for order in orders:
        assert sorted(pair.index for pair in order) == list(range(12))
        assert sum(pair.models[0] == "alpha" for pair in order) == 6
    assert [pair.index for pair in orders[0]] != [pair.index for pair in orders[1]]
    assert study.order("ann") == orders[0]  # after a restart too


def test_judgements_are_on_disk_at_once_and_the_last_one_counts(study: Study) -> None:
    pair, done = study.next_pair("ann")
    assert pair is not None and done == 0
    study.judge("ann", pair.index, "left", ("fully", "not"))
    (line,) = (study.folder / JUDGEMENTS_FILE).read_text().splitlines()
    entry = json.loads(line)
    assert entry["better"] == pair.models[0] and entry["fulfilled"] == dict(zip(pair.models, ("fully", "not"), strict=True))
    with open(study.folder / JUDGEMENTS_FILE, "a") as file:
        file.write('{"judge": "ann", "pa')  # as a killed process leaves it
    reopened = Study(study.folder)
    reopened.judge("ann", pair.index, "right", ("partly", "fully"))
    assert [entry["better"] for entry in reopened.judgements()] == [pair.models[1]]
    following, done = reopened.next_pair("ann")
    assert following is not None and following.index != pair.index and done == 1
    for better, fulfilled in (("best", ("fully", "not")), ("left", ("fully",)), ("left", ("fully", "well"))):
        with pytest.raises(BadInput, match="not a judgement"):
            study.judge("ann", pair.index, better, fulfilled)


def get(url: str, host: str | None = None) -> Any:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    with urllib.request.urlopen(request) as response:
        return response.read()


def test_the_server_says_nothing_of_the_models(study: Study) -> None:
    with served(study) as url:
        state = get(f"{url}/next?judge=ann")
        assert b"alpha" not in state and b"beta" not in state
        shown = json.loads(state)
        pictures = [part["image"] for side in ("left", "right") for part in shown[side] if "image" in part]
        assert len(pictures) == 2 and get(f"{url}/media/{pictures[0]}")[:4] == b"\x89PNG"
        for path in ("/media/..", "/media/../study.json", "/media/%2e%2e/study.json", "/study.json", "/judgements.jsonl"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(url + path)
            assert refused.value.code == 404
        for path, host in (("/next", None), ("/next?judge=%3Cscript%3E", None), ("/", "evil.example")):
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(url + path, host)
            assert refused.value.code == 400
        body = json.dumps({"judge": "ann", "pair": shown["pair"], "better": "left", "left": "fully", "right": "not"})
        head = "POST {} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {}\r\nContent-Length: {}\r\n\r\n"
        smuggled = head.format("/judge", "application/json", len(body)) + body
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall((head.format("/x", "text/plain", len(smuggled)) + smuggled).encode())
            answers = b""
            while data := connection.recv(4096):
                answers += data
        assert answers.count(b"HTTP/1.1 ") == 1  # what follows a refused request is not read as another
        plain = urllib.request.Request(f"{url}/judge", body.encode(), {"Content-Type": "text/plain"})
        with pytest.raises(urllib.error.HTTPError) as refused:  # what another site's form can send
            urllib.request.urlopen(plain)
        assert refused.value.code == 400 and not (study.folder / JUDGEMENTS_FILE).exists()


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_scripted_judge_in_the_browser_is_recovered(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    """A judge who prefers good answers but for drawings, where both are the same: the report tells exactly that."""
    api = pytest.importorskip("playwright.sync_api")
    with served(study) as url, api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        state = page.locator("#state")
        for judge in ("ann", "bob"):
            page.reload()
            page.fill("#judge", judge)
            page.click("text=Begin")
            for count in range(12):
                api.expect(state).to_have_text(re.compile(rf"^{count} of 12"))
                assert page.locator("[data-better=left]").is_disabled()
                number = int(page.inner_text("#prompt").split()[-1])
                left_is_good = "good" in page.inner_text("#left")
                sides = {"left": left_is_good, "right": not left_is_good}
                for side, is_good in sides.items():
                    page.check(f"input[name={side}][value={'fully' if is_good else 'partly'}]")
                if number % 2:
                    page.keyboard.press("2")
                elif count % 2:
                    page.click(f"[data-better={'left' if left_is_good else 'right'}]")
                else:
                    page.keyboard.press("1" if left_is_good else "3")
                api.expect(state).to_have_text(re.compile(rf"^{count + 1} of 12"))
                assert len(study.judgements()) == count + 1 + (12 if judge == "bob" else 0)  # on disk after each click
            assert "That was all" in page.inner_text("#state")
        assert not errors
        assert page.evaluate("document.querySelector('img') === null || document.querySelector('img').naturalWidth > 0")
        browser.close()
    report = study.report()
    assert report["judgements"] == 24 and report["judges"] == 2 and report["agreement"] == pytest.approx(1)
    assert report["by_category"]["telling"]["pairs"] == {"alpha : beta": {"first": 12, "same": 0, "second": 0}}
    assert report["by_category"]["drawing"]["pairs"] == {"alpha : beta": {"first": 0, "same": 12, "second": 0}}
    assert report["all"]["fulfilled"]["alpha"]["fully"]["value"] == 1
    assert report["all"]["fulfilled"]["beta"]["partly"]["value"] == 1
    assert report["all"]["strengths"]["alpha"]["low"] > 0 > report["all"]["strengths"]["beta"]["high"]
    main(["study", str(study.folder), "--report"])
    assert "alpha : beta: 12 better, 12 the same, 0 worse" in capsys.readouterr().out


def test_judges_with_known_tastes_are_recovered(tmp_path: Path) -> None:
    """Three models; judges prefer by the logistic of strengths' differences. The intervals hold the strengths."""
    true = {"a": 0.9, "b": 0.0, "c": -0.9}
    cards = {name: write_card(tmp_path / name, [f"{name} {i}" for i in range(120)], "blue") for name in true}
    study = Study.create(tmp_path / "study", cards)
    rng = random.Random(5)
    for judge in ("ann", "bob"):
        for pair in study.order(judge):
            left, right = pair.models
            p_left = 1 / (1 + math.exp(true[right] - true[left]))
            study_entry = "left" if rng.random() < p_left else "right"
            with open(study.folder / JUDGEMENTS_FILE, "a") as file:  # as `judge` does, without reading the order again
                winner = left if study_entry == "left" else right
                entry = {"judge": judge, "pair": pair.index, "key": study.prompts[pair.prompt]["key"], "left": left}
                entry |= {"right": right, "better": winner, "fulfilled": {left: "fully", right: "partly"}}
                file.write(json.dumps(entry) + "\n")
    report = study.report()
    for name, strength in true.items():
        figure = report["all"]["strengths"][name]
        assert figure["low"] < strength < figure["high"] and figure["high"] - figure["low"] < 0.8
    assert 0.4 < report["left_chosen"] < 0.6
    assert 0 < report["agreement"] < 0.4


def test_bradley_terry_is_the_maximum_of_the_likelihood() -> None:
    wins = np.array([[0.0, 30.0], [10.0, 0.0]])
    values = bradley_terry(wins)
    assert values[0] - values[1] == pytest.approx(math.log(3))  # the closed form for two
    wins = np.array([[0, 7, 12.5, 3], [5, 0, 9, 4], [2.5, 6, 0, 8], [1, 2, 3, 0]], dtype=float)

    def loss(x: np.ndarray) -> float:
        difference = x[:, None] - x[None]
        return float((wins * np.log1p(np.exp(-difference))).sum())

    best = scipy.optimize.minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    assert bradley_terry(wins) == pytest.approx(best - best.mean(), abs=1e-4)


def test_a_model_that_always_wins_has_a_finite_strength() -> None:
    judgements = [{"key": str(i), "left": "a", "right": "b", "better": "a"} for i in range(10)]
    result = strengths(judgements, ["a", "b"], 0)
    assert result["a"].value == pytest.approx(0.5 * math.log(10.5 / 0.5), abs=1e-6)
    assert math.isfinite(result["a"].high or 0)


def test_agreement_is_krippendorffs_example() -> None:
    """Two judges of ten pairs with one disagreement: alpha by its formula for nominal data."""
    judgements = []
    for pair in range(10):
        for judge in ("x", "y"):
            better = "a" if pair < 5 else "b"
            if pair == 0 and judge == "y":
                better = "b"
            judgements.append({"judge": judge, "pair": pair, "left": "a", "right": "b", "better": better})
    # Coincidences: 9 pairs agree, 1 does not. n = 20 values, of a 9, of b 11.
    observed = 1 / 10
    expected = 2 * 9 * 11 / (20 * 19)
    assert agreement(judgements) == pytest.approx(1 - observed / expected)
    assert agreement(judgements[:1]) is None


def test_the_command_makes_a_study(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["study", str(study.folder), str(tmp_path / "a"), str(tmp_path / "b")])
    assert "exists" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["study", str(study.folder), "--report"])
    assert "no judgements yet" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["study", str(tmp_path / "new"), str(tmp_path / "a")])
    assert "two models or more" in capsys.readouterr().err
    files = [str(tmp_path / name / "scorecard.json") for name in ("a", "b")]
    assert len(Study.create(tmp_path / "of files", {"x": Path(files[0]), "y": Path(files[1])}).pairs) == 12
    card = json.loads(Path(files[1]).read_text())
    card["suites"]["mixed"]["parts"]["answers"]["samples"][3]["prompt"] = ["another prompt"]
    Path(files[1]).write_text(json.dumps(card))
    with pytest.raises(SystemExit):
        main(["study", str(tmp_path / "new"), *files])
    assert "the prompts of" in capsys.readouterr().err


def test_a_study_of_two_bundles(bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --prompts the answers are generated first."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a fox", "category": "x"}\n{"prompt": "the dog"}\n')
    shutil.copytree(bundle_folder, tmp_path / "other")
    made: list[Study] = []
    monkeypatch.setattr("chameleon.cli.study.serve", lambda opened, *_: made.append(opened))
    words = [str(bundle_folder), str(tmp_path / "other"), "--prompts", str(tmp_path / "prompts.jsonl")]
    main(["study", f"{tmp_path}/study/", *words])
    (study,) = made
    assert len(study.pairs) == 2 and study.prompts[0]["category"] == "x"
    for prompt in study.prompts:  # the same bundle twice: the same answers
        first, second = prompt["answers"].values()
        assert first == second
