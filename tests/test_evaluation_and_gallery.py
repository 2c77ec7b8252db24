"""The suite over the embedded set, likelihood, the gallery page and the whole road, on models too small to be good."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image as PILImage

from chameleon.bundle import Bundle
from chameleon.data import emoji
from chameleon.demo import run_pipeline
from chameleon.document import Document, Text
from chameleon.evaluation.emoji import suite_questions, evaluate, question_accuracy
from chameleon.evaluation.likelihood import bits_per_byte
from chameleon.evaluation.pictures import EffNetLite0, nearest_names, reconstruction
from chameleon.gallery import curve, model_section, page
from chameleon.generation.chameleon import Chameleon
from chameleon.tokenizers.image import ImageTokenizer, to_tensor
from chameleon.train.recipe import SHIPPED as RECIPES


@pytest.fixture
def model(bundle: Bundle) -> Chameleon:
    bundle.model.bfloat16()
    return Chameleon(bundle)


def test_bits_a_byte_counts_every_id_once(chameleon: Chameleon) -> None:
    """Against a plain sum of −log p over windows that are cut by hand; the document is longer than the context."""
    v, context_length = chameleon.vocabulary, chameleon.model.config.context_length
    text = "orange heart, which style is it? " * 20
    ids = chameleon.encode(Document((Text(text),)))
    assert len(ids) > 2 * context_length
    total = 0.0
    for start in range(1, len(ids), context_length):
        window = torch.cat((torch.tensor([v.bos]), ids[start : start + context_length]))
        logits = chameleon.logits(window[None, :-1])[0]
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
    wanted = total / math.log(2) / len(text)
    assert bits_per_byte(chameleon, [Document((Text(text),))]) == pytest.approx(wanted, rel=1e-5)


def test_reconstruction_figures_by_hand(image_tokenizer: ImageTokenizer) -> None:
    pictures = [PILImage.new("RGB", (16, 16), colour) for colour in ("red", "blue", "grey")]
    figures = reconstruction(image_tokenizer, pictures)
    drawn = image_tokenizer.decode(image_tokenizer.encode(pictures))
    errors = (to_tensor(drawn) - to_tensor(pictures)).square().mean((1, 2, 3))
    assert figures["psnr_db"] == pytest.approx(float((10 * torch.log10(4 / errors)).mean()), rel=1e-5)
    used = len(image_tokenizer.encode(pictures).unique())
    assert figures["codebook_used"] == pytest.approx(used / 32)


def test_nearest_names_by_hand() -> None:
    known = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]]), dim=1)
    names = ["a", "a", "b", "c"]
    assert nearest_names(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), known, names, 2) == [["a", "b"], ["b", "a"]]


def test_features_know_a_picture_again() -> None:
    """The real network: a picture is nearer to itself moved a little than to others."""
    chosen = [entry for entry in emoji.representatives(emoji.subset("train", 60)) if entry.group != "people-body"][:12]
    features = EffNetLite0()
    plain = features([entry.picture for entry in chosen])
    moved = features([emoji.augment(entry, random.Random(1)) for entry in chosen])
    assert plain.shape == (12, 1280)
    torch.testing.assert_close(plain.norm(dim=1), torch.ones(12))
    assert int(((moved @ plain.t()).argmax(1) == torch.arange(12)).sum()) >= 9


def test_questions_are_scored_right(model: Chameleon, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows all answers has accuracy 1 everywhere; one that always says yes has the share of yes."""
    held_out = emoji.subset("validation", 40)
    truth = {(entry.key, question.question): question.answer for entry, question in suite_questions(held_out, 0)}
    pictures = {entry.picture.tobytes(): entry.key for entry, _ in suite_questions(held_out, 0)}
    monkeypatch.setattr(
        model, "answer_batch", lambda batch: [truth[pictures[p.tobytes()], q].upper() + "." for p, q in batch]
    )
    figures = question_accuracy(model, held_out)
    assert {"name", "group", "style", "flags yes-no"} <= set(figures)
    assert all(family["right"] == 1 for family in figures.values())
    monkeypatch.setattr(model, "answer_batch", lambda batch: ["yes"] * len(batch))
    answers = [question.answer for _, question in suite_questions(held_out, 0) if question.family == "flags yes-no"]
    assert question_accuracy(model, held_out)["flags yes-no"]["right"] == answers.count("yes") / len(answers)


def test_the_suite_runs_whole(model: Chameleon) -> None:
    figures = evaluate(model, concepts=8, drawings=2)
    assert set(figures) >= {"reconstruction", "captions", "questions", "drawings", "text_bits_per_byte"}
    assert figures["drawings"]["drawings"] == 2
    assert figures["code_bits_per_byte"] > 1


class Tags(HTMLParser):
    """Counts tags, checks that they close, and collects what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.fetched += [value or "" for key, value in attributes if key in ("src", "href")]
        if tag not in ("meta", "img", "br", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "polyline":
            assert self.open.pop() == tag


def check_page(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert all(value.startswith("data:image/png;base64,") for value in tags.fetched)  # self-contained
    assert not re.search(r"https?://|@import|url\(", text)
    return tags


def test_the_gallery_is_one_self_contained_page(model: Chameleon) -> None:
    section = model_section(model, "A <model>", "note & more", 16, {"captions": {"exact_name": 0.25}})
    text = page([section], "Gallery", "here")
    tags = check_page(text)
    assert "A &lt;model&gt;" in text and "note &amp; more" in text and "0.25" in text
    shown = len(emoji.representatives(emoji.subset("validation", 16))[:24])
    assert tags.counts["img"] >= 2 * min(12, shown) + 2 * shown
    assert tags.counts["svg"] == 1


def test_curves_show_their_ends() -> None:
    drawn = curve("loss", [(0, 4.0), (10, 2.0), (20, float("nan")), (30, 1.0)])
    points = re.search(r'points="([^"]+)"', drawn)
    assert points and len(points[1].split()) == 3
    places = [tuple(map(float, point.split(","))) for point in points[1].split()]
    assert places == sorted(places) and places[0][1] < places[1][1] < places[2][1]  # falls: y grows downwards
    assert ">4<" in drawn and ">1<" in drawn and "step 0" in drawn and ">30<" in drawn
    assert curve("nothing", [(0, 1.0)]) == ""
    drawn = curve("speed", [(0, 12345.0), (3, 999.5)], across_name="rank")
    assert ">12,345<" in drawn and ">1e+03<" not in drawn and "rank 0" in drawn


@pytest.mark.slow
def test_the_whole_road(tmp_path: Path) -> None:
    """`chameleon demo` with a recipe of a few steps: every stage runs, and the page holds both models."""
    for name, changes in (
        ("demo-image", {"run": {"max_steps": 4, "log_every_n_steps": 1, "progress": False}}),
        ("demo-pretrain", {"run": {"max_steps": 4, "log_every_n_steps": 1, "progress": False}}),
        ("demo-finetune", {"run": {"max_steps": 3, "log_every_n_steps": 1, "progress": False}}),
    ):
        recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        recipe["run"] |= changes["run"]
        if name == "demo-image":
            recipe["model"] |= {"codebook_size": 64}
            recipe |= {"sources": ["emoji:pairs?split=train&concepts=10"], "validation": []}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    road = yaml.safe_load((RECIPES / "demo.yaml").read_text())
    road["shards"] = {
        name: re.sub(r"concepts=\d+&per_concept=\d+", "concepts=10&per_concept=4", source)
        for name, source in road["shards"].items()
    }
    road |= {"image": str(tmp_path / "demo-image.yaml"), "concepts": 10, "drawings": 2}
    road |= {stage: str(tmp_path / f"demo-{stage}.yaml") for stage in ("pretrain", "finetune")}
    (tmp_path / "road.yaml").write_text(yaml.safe_dump(road))
    said: list[str] = []
    made = run_pipeline(str(tmp_path / "road.yaml"), tmp_path / "run", said.append)
    text = made.read_text(encoding="utf-8")
    tags = check_page(text)
    assert text.count('<section class="model">') == 2
    assert tags.counts["svg"] > 8  # curves of three trainings and two codebooks
    assert json.loads((tmp_path / "run" / "figures.json").read_text())["drawings"]["drawings"] == 2
    assert Bundle.load(tmp_path / "run" / "finetune" / "bundle").prompting == "conversation"
    assert "done" in said[-1]
