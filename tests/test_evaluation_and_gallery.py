"""The suite over the embedded set, likelihood, the gallery page and the whole pipeline, on models too small to be good."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image as PILImage

from chameleon.bundle import Bundle
from chameleon.data import clipart, emoji, labelled
from chameleon.data.colours import main_colour, recolour
from chameleon.data.picture_tasks import is_held_out_pair, thing_of
from chameleon.demo import StageLog, picture_operations, run_pipeline
from chameleon.document import Document, Text
from chameleon.evaluation.drawings import DrawingJudge, coloured_prompts, unseen_colours
from chameleon.evaluation.emoji import Captions, EmojiPictures, EmojiSuite, Questions, evaluate, suite_questions
from chameleon.evaluation.likelihood import document_bits
from chameleon.evaluation.mixed import Truth, has_right_form, held_out_prompts
from chameleon.evaluation.part import LocalModel
from chameleon.evaluation.pictures import EffNetLite0, nearest_names, reconstruction
from chameleon.gallery import codebook_plot, curves_section, model_section
from chameleon.generation.chameleon import Chameleon
from chameleon.html_page import page
from chameleon.run_view import plot_curves
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
    assert document_bits(chameleon, [Document((Text(text),))]) == pytest.approx([total / math.log(2)], rel=1e-5)


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


def test_features_recognise_an_augmented_picture() -> None:
    """The real network: a picture is nearer to itself moved a little than to others."""
    chosen = [entry for entry in labelled.representatives(emoji.subset("train", 60)) if entry.group != "people-body"][:12]
    features = EffNetLite0()
    plain = features([entry.picture for entry in chosen])
    moved = features([labelled.augment(entry, random.Random(1)) for entry in chosen])
    assert plain.shape == (12, 1280)
    torch.testing.assert_close(plain.norm(dim=1), torch.ones(12))
    assert int(((moved @ plain.t()).argmax(1) == torch.arange(12)).sum()) >= 9


def test_questions_are_scored_right(model: Chameleon, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows all answers has accuracy 1 everywhere; one that always says yes has the share of yes."""
    part = Questions(EmojiPictures(EmojiSuite(concepts=40, views=3)))
    items, local = part.items(), LocalModel(model)
    truth = {id(item.prompt): item.expected for item in items}

    def answers(prompts: list[Document], *_: object, views: int) -> list[str]:
        assert views == 3
        return [truth[id(prompt)].upper() + "." for prompt in prompts]

    monkeypatch.setattr(local, "generate_texts", answers)
    figures = part.score(local, items, part.run(local, items, 0)).all_figures(items)
    assert {"name", "group", "style", "flags yes-no"} <= set(figures)
    assert all(figure.value == 1 for figure in figures.values())
    always = part.score(local, items, ["yes"] * len(items)).all_figures(items)
    assert always["flags yes-no"].value == always["flags yes-no"].base_rate == 0.5
    assert always["name"].value == 0


def test_captions_are_asked_for_by_so_many_views(model: Chameleon, monkeypatch: pytest.MonkeyPatch) -> None:
    part, local = Captions(EmojiPictures(EmojiSuite(concepts=40, views=2))), LocalModel(model)
    monkeypatch.setattr(local, "generate_texts", lambda prompts, *_, views: [f"{views} views"] * len(prompts))
    assert set(part.run(local, part.items(), 0)) == {"2 views"}


def test_the_complete_suite_runs(model: Chameleon) -> None:
    figures = evaluate(model, concepts=8, drawings=2)
    parts = {name.partition(" / ")[0] for name in figures}
    assert parts == {"reconstruction", "captions", "questions", "drawings", "likelihood"}
    assert figures["drawings / right_among_10"]["count"] == 2
    assert figures["likelihood / code_bits_per_byte"]["value"] > 1


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
    metrics = {
        "captions / exact_name": {"value": 0.25, "low": 0.2, "high": 0.31, "count": 40, "base_rate": 0.03},
        "captions / cider_d": {"value": 1.0, "low": 0.5, "high": 1.5, "count": 40},
        "questions / kind": {"value": 0.65, "low": 0.6, "high": 0.7, "count": 80, "base_rate": 0.17},
        "drawings / right_among_10": {"value": 0.45, "low": 0.4, "high": 0.5, "count": 40, "base_rate": 0.05},
        "reconstruction / psnr_db": {"value": 21.5, "low": 21.0, "high": 22.0, "count": 40},
        "reconstruction / codebook_used": {"value": 0.9, "count": 40},
        "likelihood / text_bits_per_byte": {"value": 3.5, "low": 3.4, "high": 3.6, "count": 40},
    }
    section = model_section(model, "A <model>", "note & more", 16, metrics)
    text = page([section], "Gallery", "here")
    tags = check_page(text)
    assert "A &lt;model&gt;" in text and "note &amp; more" in text
    for values in (
        ("25%", "20% to 31%", "3%"),
        ("65%", "60% to 70%", "17%"),
        ("45%", "40% to 50%", "5%"),
        ("21.50", "21.00 to 22.00", ""),
        ("90%", "", ""),
        ("3.50", "3.40 to 3.60", ""),
    ):
        assert "<td>{}</td><td>{}</td><td>{}</td>".format(*values) in text  # each figure beside its base rate
    headings = re.findall("<h3>(.*?)</h3>", text)
    assert headings.index("Drawings by prompt") == 0 and headings.index("Metrics on held-out styles") == 4
    shown = len(labelled.representatives(emoji.subset("validation", 16))[:24])
    assert tags.counts["img"] >= 2 * min(12, shown) + 2 * shown
    assert text.count('class="plot"') == 1


def test_the_demos_log_names_slow_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage's arithmetic beside the peak that was measured."""
    monkeypatch.setattr("chameleon.demo.matmul_peak", lambda **_: 1e12)
    lines: list[str] = []
    log = StageLog(lines.append)
    for seconds, operations in ((10.0, 5e12), (10.0, 5e10)):
        log.begin("a stage")
        log.stage_start -= seconds
        log.end(operations)
    assert lines[0] == "peak of matrix products here: 1.00 TFLOP/s"
    assert "10 s at 50.0% of the peak" in lines[2] and "slow" not in lines[2]
    assert "10 s at 0.5% of the peak (slow: is a kernel missing" in lines[4]


def test_operations_of_a_picture_are_those_of_its_convolutions(model: Chameleon) -> None:
    """Counted from the shapes that each convolution sees."""
    tokenizer, counts = model.tokenizer.image, [0.0]
    encoding, decoding = picture_operations(tokenizer)

    def count(module: Any, inputs: Any, output: Any) -> None:
        counts[0] += 2 * output.numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in tokenizer.network.modules() if isinstance(m, torch.nn.Conv2d)]
    codes = tokenizer.network.encode(torch.zeros(1, 3, tokenizer.config.resolution, tokenizer.config.resolution))
    assert 0.8 < counts[0] / encoding <= 1.0  # the rest is attention and the search for the nearest code
    counts[0] = 0
    tokenizer.network.decode(codes)
    assert 0.8 < counts[0] / decoding <= 1.0
    for hook in hooks:
        hook.remove()


def test_curves_show_what_was_logged(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    rows = ["step,train/loss,lr", "1,4.0,0.1", "2,nan,0.1", "3,1.0,0.1"]
    (tmp_path / "log" / "metrics.csv").write_text("\n".join(rows) + "\n")
    (panel,) = [axes for axes in plot_curves(tmp_path).axes if axes.get_title() == "losses"]
    (line,) = panel.lines
    points = [(x, y) for x, y in zip(*line.get_data(), strict=True) if math.isfinite(y)]
    assert points == [(1, 4.0), (3, 1.0)]
    check_page(curves_section("A <run>", tmp_path))
    assert curves_section("nothing", tmp_path / "elsewhere") == ""
    check_page(codebook_plot(torch.tensor([0, 1, 1]), 4))


@pytest.mark.slow
def test_the_complete_pipeline(tmp_path: Path) -> None:
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
    pipeline = yaml.safe_load((RECIPES / "demo.yaml").read_text())
    pipeline["shards"] = {
        name: re.sub(r"concepts=\d+&per_concept=\d+", "concepts=10&per_concept=4", source)
        for name, source in pipeline["shards"].items()
    }
    pipeline |= {"image": str(tmp_path / "demo-image.yaml"), "concepts": 10, "drawings": 2}
    pipeline |= {stage: str(tmp_path / f"demo-{stage}.yaml") for stage in ("pretrain", "finetune")}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    printed: list[str] = []
    output = run_pipeline(str(tmp_path / "pipeline.yaml"), tmp_path / "run", printed.append)
    text = output.read_text(encoding="utf-8")
    check_page(text)
    assert text.count('<section class="model">') == 2
    assert text.count('class="plot"') == 5  # curves of three runs and two codebooks
    figures = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert figures["drawings / right_among_10"]["count"] == 2
    assert Bundle.load(tmp_path / "run" / "finetune" / "bundle").prompting == "conversation"
    assert "done" in printed[-1]
    del pipeline["image"], pipeline["pretrain"], pipeline["text_sources"], pipeline["text_pieces"]
    pipeline["bundle"] = str(tmp_path / "run" / "finetune" / "bundle")
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(pipeline))
    run_pipeline(str(tmp_path / "more.yaml"), tmp_path / "more", printed.append)
    first, second = (Bundle.load(tmp_path / run / "finetune" / "bundle") for run in ("run", "more"))
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint and not (tmp_path / "more" / "pretrain").exists()
    assert len(second.provenance["training"]) == len(first.provenance["training"]) + 1


# --- judges of drawings and mixed documents --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge() -> DrawingJudge:
    return DrawingJudge(emoji.subset("train", 120), emoji.subset("validation", 120))


def test_expected_answers_of_mixed_prompts_are_judged_right(judge: DrawingJudge) -> None:
    """The judge finds form, texts and pictures of the tasks' own answers right, and those of other prompts wrong."""
    pictures = [entry for entry in judge.drawable if not entry.is_variant]
    prompts = held_out_prompts(pictures, 12, 0)
    truth = Truth(judge)
    right: dict[str, list[bool]] = {"texts": [], "pictures": [], "other texts": [], "other pictures": []}
    for (task, conversation), (other_task, other) in zip(prompts, prompts[1:] + prompts[:1], strict=True):
        prompt, expected = (message.content for message in conversation.messages)
        assert has_right_form(task, expected, expected)
        right["texts"] += truth.texts(task, prompt, expected, expected)
        right["pictures"] += truth.pictures(task, expected, expected)
        if task == other_task and task in ("restyling", "pages", "rebus_writing"):
            answer = other.messages[1].content
            if task != "rebus_writing":
                right["other texts"] += truth.texts(task, prompt, answer, expected)
            right["other pictures"] += truth.pictures(task, answer, expected) if task == "rebus_writing" else []
    shares = {kind: sum(values) / len(values) for kind, values in right.items()}
    assert shares["texts"] > 0.95 and shares["pictures"] > 0.9, shares
    assert shares["other texts"] < 0.1 and shares["other pictures"] < 0.4, shares
    short = Document(expected.parts[:1])
    assert not has_right_form("lists", short, Document((*expected.parts, Text("more"))))


def test_styles_and_colours_of_real_pictures_are_told(judge: DrawingJudge) -> None:
    wanted = [entry for entry in judge.held_out if not entry.is_variant]
    figures = means(judge.unseen_hits([entry.picture for entry in wanted], wanted))
    assert figures["right_style"] == judge.real_style_accuracy() > 0.5  # of three styles, from few pictures
    assert figures["right_among_10"] > 0.6  # among 10 of about 180 names, from other styles' pictures alone
    things = [(entry, thing) for entry in judge.drawable if (thing := thing_of(entry)) is not None][:40]
    pictures = [recolour(entry.picture, "blue") for entry, _ in things]
    figures = means(judge.coloured_hits(pictures, [("blue", thing) for _, thing in things]))
    assert figures["right_colour"] > 0.85 and figures["right_thing"] > 0.85
    assert means(judge.coloured_hits(pictures, [("red", thing) for _, thing in things]))["right_colour"] == 0


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def test_unseen_colours_are_in_no_training_picture() -> None:
    pairs = unseen_colours(20, 0)
    assert len(set(pairs)) == 20 and all(is_held_out_pair(*pair) for pair in pairs)
    assert not set(pairs) & set(coloured_prompts(200, 0))
    called = {entry.name for entry in [*emoji.load("train"), *clipart.load("train")]}
    others = unseen_colours(100, 1)
    assert "green down arrow" in called and is_held_out_pair("green", "down arrow")
    assert not {" ".join(pair) for pair in [*pairs, *others]} & called
    for colour, thing in pairs[:5]:
        of_thing = [entry for entry in emoji.load("train") if thing_of(entry) == thing]
        assert of_thing and all(main_colour(entry.picture) != colour for entry in of_thing)


def test_yes_no_questions_are_balanced() -> None:
    asked = [question for _, question in suite_questions(emoji.load("validation"), 0) if question.family.endswith("yes-no")]
    families = {question.family for question in asked}
    assert len(families) == 3
    for family in families:
        answers = [question.answer for question in asked if question.family == family]
        assert answers.count("yes") == answers.count("no") > 5
