"""Metrics against the reference tools: pycocoevalcap, results of the official VQA code, torchmetrics, torch-fidelity."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.kid import poly_mmd

from chameleon.errors import BadInput
from chameleon.evaluation.caption_metrics import CiderD, bleu_terms, has_java, meteor, rouge_l
from chameleon.evaluation.caption_words import caption_words, split_caption
from chameleon.evaluation.captioning import score_captions
from chameleon.evaluation.counting import COUNTED_THINGS, count_objects, several, side_by_side
from chameleon.evaluation.distances import frechet_distance, frechet_figure, kernel_distance, kernel_figure, manifolds
from chameleon.evaluation.part import Item, Scores
from chameleon.evaluation.pictures import ssim
from chameleon.evaluation.statistics import Metric, bleu, figure_of, interval, paired_difference
from chameleon.evaluation.tokenizer_suite import words_in
from chameleon.evaluation.vqa_accuracy import normalise, vqa_accuracy

needs_java = pytest.mark.skipif(not has_java(), reason="needs Java and pycocoevalcap")
SENTENCES = (
    "a man riding a wave on top of a surfboard",
    "a surfer rides a wave in the ocean",
    "two dogs are playing in the snow",
    "a black and white dog catching a frisbee",
    "a plate of food with broccoli and rice",
    "the man is not looking at the camera",
    "a red double decker bus on a city street",
    "a bus",
    "people standing around a table with a cake on it",
    "a cat sitting on a laptop keyboard",
)


def captioned(count: int, seed: int = 0) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Return captions and references as words, of many lengths, an empty caption among them."""
    rng = random.Random(seed)

    def words() -> list[str]:
        chosen = rng.choice(SENTENCES).split()
        return [word for word in chosen if rng.random() > 0.15] + rng.choice(SENTENCES).split()[: rng.randrange(4)]

    captions = [words() for _ in range(count)]
    captions[3] = []
    return captions, [[words() or ["a"] for _ in range(rng.randint(1, 5))] for _ in range(count)]


def test_caption_metrics_equal_pycocoevalcap() -> None:
    captions, references = captioned(60)
    texts = {i: [" ".join(words)] for i, words in enumerate(captions)}
    known = {i: [" ".join(words) for words in of] for i, of in enumerate(references)}
    expected_cider, each_cider = Cider().compute_score(known, texts)
    expected_bleu, each_bleu = Bleu(4).compute_score(known, texts, verbose=0)
    expected_rouge, each_rouge = Rouge().compute_score(known, texts)
    scores = score_captions(captions, references, False)
    items = [Item(str(i)) for i in range(60)]
    figures = scores.all_figures(items)
    assert figures["cider_d"].value == pytest.approx(expected_cider, abs=1e-6)
    assert figures["rouge_l"].value == pytest.approx(expected_rouge, abs=1e-6)
    for order in range(1, 5):
        assert figures[f"bleu_{order}"].value == pytest.approx(expected_bleu[order - 1], abs=1e-6)
    cider = CiderD(references)
    for index, caption in enumerate(captions):
        assert cider.score(caption, index) == pytest.approx(each_cider[index], abs=1e-6)
        assert rouge_l(caption, references[index]) == pytest.approx(each_rouge[index], abs=1e-6)
        terms = np.array(bleu_terms(caption, references[index]))
        if caption:
            assert float(bleu(4)(terms)) == pytest.approx(each_bleu[3][index], abs=1e-6)


@needs_java
def test_files_in_cocos_form_score_as_with_pycocoevalcap(tmp_path: Path) -> None:
    """The whole of coco-caption on files: its PTB tokenizer, its metrics, METEOR."""
    from pycocoevalcap.eval import COCOEvalCap
    from pycocotools.coco import COCO

    rng = random.Random(1)
    captions, references = captioned(20, 1)
    extras = ["Mr. Smith's dog isn't here!", "The U.S. flag, 3.5 ft. tall...", 'A sign that says "STOP" (red).']
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(20)]
    texts = [[" ".join(words).capitalize() + rng.choice([".", "", " !"]) for words in of] for of in references]
    texts[0] += extras
    annotations = [
        {"id": 10 * i + k, "image_id": i, "caption": text} for i, of in enumerate(texts) for k, text in enumerate(of)
    ]
    outputs = [" ".join(words) or "nothing" for words in captions]
    outputs[0] = "Mr. Smith's flag isn't here, it's \"red\"."
    (tmp_path / "gt.json").write_text(json.dumps({"images": images, "annotations": annotations, "info": {}}))
    (tmp_path / "res.json").write_text(json.dumps([{"image_id": i, "caption": text} for i, text in enumerate(outputs)]))
    ground_truth = COCO(str(tmp_path / "gt.json"))
    theirs = COCOEvalCap(ground_truth, ground_truth.loadRes(str(tmp_path / "res.json")))
    scorers = "pycocoevalcap.eval.Spice"  # which downloads a model of Stanford's parser
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            scorers,
            lambda: type(
                "None_", (), {"compute_score": lambda *_: (0.0, [{"All": {"f": 0}}] * 20), "method": lambda _: "SPICE"}
            )(),
        )
        theirs.evaluate()
    known, splitter = caption_words(texts, "java")
    assert splitter == "java"
    scores = score_captions([of[0] for of in caption_words([[text] for text in outputs], "java")[0]], known, True)
    figures = scores.all_figures([Item(str(i)) for i in range(20)])
    for name, expected in theirs.eval.items():
        ours = {"CIDEr": "cider_d", "ROUGE_L": "rouge_l", "METEOR": "meteor"}.get(name, name.lower())
        if name != "SPICE":
            assert figures[ours].value == pytest.approx(expected, abs=1e-6), name


@needs_java
def test_the_rules_in_python_split_as_stanfords_tokenizer() -> None:
    texts = [[sentence.capitalize() + "." for sentence in SENTENCES]]
    texts.append(
        [
            "A man's hat isn't on, they're 3.5 ft. away (left).",
            "Don't touch: it's 1,000 degrees!",
            'The sign says "STOP" at 10:30 a.m.',
            "Mr. Jones, a well-known T-shirt designer; he'll pay $5 & go.",
            "black/white cats... and 2 dogs -- cannot run",
        ]
    )
    java, _ = caption_words(texts, "java")
    python, name = caption_words(texts, "python")
    assert name == "python" and python == java


@pytest.mark.slow
@needs_java
def test_meteor_of_the_same_words_is_one() -> None:
    value, values = meteor([["a", "cat"], ["a", "dog"]], [[["a", "cat"]], [["some", "bus"]]])
    assert values[0] > 0.9 > values[1] and 0 < value < 1


@given(st.text(max_size=60))
def test_any_text_is_split(text: str) -> None:
    words = split_caption(text)
    assert all(word and word == word.lower() and not word.isspace() for word in words)


def test_vqa_accuracy_equals_the_official_code() -> None:
    """760 cases whose results the official evaluation code gave."""
    cases = json.loads((Path(__file__).parent / "vqa_cases.json").read_text(encoding="utf-8"))
    assert len(cases) >= 500
    for case in cases:
        if "answer" in case:
            assert vqa_accuracy(case["answer"], case["people"]) == pytest.approx(case["accuracy"], abs=1e-9), case
        else:
            text, expected = case["normalised"]
            assert normalise(text) == expected
    values = {round(case["accuracy"], 3) for case in cases if "accuracy" in case}
    assert {0, 0.3, 0.6, 0.9, 1} <= values  # each way of leaving one out occurs


# --- intervals and tests ---


def test_bootstrap_of_a_mean_is_that_of_scipy() -> None:
    values = list(np.random.default_rng(0).exponential(size=120))
    figure = figure_of(Metric(), values)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=1).confidence_interval
    assert figure.value == pytest.approx(np.mean(values))
    assert figure.low == pytest.approx(theirs.low, abs=0.02) and figure.high == pytest.approx(theirs.high, abs=0.02)


def test_bootstrap_covers_the_truth() -> None:
    """About 95% of 300 intervals hold the known mean; where questions share pictures, those over groups alone."""
    rng = np.random.default_rng(2)
    covered = {"single": 0, "grouped": 0, "not grouped": 0}
    for _ in range(300):
        single = rng.normal(1, 1, 60)
        of_picture = np.repeat(rng.normal(1, 1, 30), 4) + rng.normal(0, 0.3, 120)
        groups = [str(index // 4) for index in range(120)]
        for name, figure in (
            ("single", figure_of(Metric(), list(single))),
            ("grouped", figure_of(Metric(), list(of_picture), groups)),
            ("not grouped", figure_of(Metric(), list(of_picture))),
        ):
            assert figure.low is not None and figure.high is not None
            covered[name] += figure.low <= 1 <= figure.high
    assert 0.9 < covered["single"] / 300 < 0.985 and 0.88 < covered["grouped"] / 300 < 0.985
    assert covered["not grouped"] / 300 < 0.8


def test_intervals_where_resampling_shows_no_spread() -> None:
    figure = figure_of(Metric(), [1.0] * 20)
    assert (figure.low, figure.high) == interval(1.0, 20)
    assert figure_of(Metric(is_share=False), [1.0] * 20).high == 1.0  # one picture in each answer is no share
    assert figure_of(Metric(), [(3.0, 4.0), (1.0, 4.0)], ["a", "a"]).low is None  # one group says nothing of a spread
    low, high = interval(0.3, 50)
    expected = scipy.stats.binomtest(15, 50).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_a_ratio_is_of_sums() -> None:
    figure = figure_of(Metric(), [(10.0, 4.0), (2.0, 2.0)])
    assert figure.value == 2.0  # bits per byte of all, not the mean of 2.5 and 1


def test_paired_tests_agree_with_scipy() -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(0.3, 1, 40)
    b = a - rng.normal(0.35, 1, 40)
    ours = paired_difference(Metric(), list(a), list(b))
    theirs = scipy.stats.permutation_test(
        (a, b),
        lambda x, y: np.mean(x) - np.mean(y),
        permutation_type="samples",
        n_resamples=20000,
        rng=0,
    )
    assert ours.value == pytest.approx(float(a.mean() - b.mean()))
    assert ours.p_value == pytest.approx(theirs.pvalue, abs=0.01)
    assert ours.low < ours.value < ours.high
    # For right and wrong it is the exact McNemar test: signs of the samples on which the two differ.
    first = [1.0] * 30 + [0.0] * 12 + [1.0] * 10
    second = [1.0] * 30 + [1.0] * 4 + [0.0] * 18
    ours = paired_difference(Metric(), first, second)
    wins, losses = (
        sum(x > y for x, y in zip(first, second, strict=True)),
        sum(x < y for x, y in zip(first, second, strict=True)),
    )
    assert ours.p_value == pytest.approx(scipy.stats.binomtest(wins, wins + losses).pvalue, abs=0.015)


def test_a_difference_by_chance_is_rarely_significant() -> None:
    rng = np.random.default_rng(4)
    p_values = [
        paired_difference(Metric(), list(rng.integers(0, 2, 30) * 1.0), list(rng.integers(0, 2, 30) * 1.0), seed=i).p_value
        for i in range(60)
    ]
    assert sum(p < 0.05 for p in p_values) <= 9 and max(p_values) > 0.5


def test_corpus_bleu_can_be_resampled_and_compared() -> None:
    captions, references = captioned(40, 5)
    better = [bleu_terms(of[0], of) for of in references]
    worse = [bleu_terms(caption, of) for caption, of in zip(captions, references, strict=True)]
    difference = paired_difference(Metric("bleu-4"), better, worse)
    assert difference.value > 0.3 and difference.p_value < 0.001 and difference.low > 0.1


# --- sets of images ---


def features(count: int, seed: int, shift: float = 0.0, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, width, generator=generator) @ mixing + shift


@pytest.mark.parametrize(("first", "second"), [(200, 150), (10, 300), (12, 14)])  # more and fewer images than features
def test_frechet_distance_equals_torch_fidelity(first: int, second: int) -> None:
    a, b = features(first, 0), features(second, 1, 0.4)
    statistics = [fid_features_to_statistics(x.double()) for x in (a, b)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_interval_holds_the_value_and_shrinks() -> None:
    figures = [frechet_figure(features(size, 0), features(size, 1, 0.4)) for size in (60, 600)]
    for figure in figures:
        assert figure.low is not None and figure.high is not None and figure.low < figure.value < figure.high
    widths = [figure.high - figure.low for figure in figures]  # type: ignore[operator]
    assert widths[1] < widths[0] / 2


def test_intervals_of_distances_have_the_right_width() -> None:
    """Against the spread of the distance over sets that are drawn anew."""
    for figure_of_sets, distance in ((frechet_figure, frechet_distance), (kernel_figure, kernel_distance)):
        pairs = [(features(300, 2 * seed, width=6), features(300, 2 * seed + 1, 1.0, width=6)) for seed in range(40)]
        spread = float(np.std([distance(*pair) for pair in pairs]))
        half_widths = [(figure.high - figure.low) / 2 for figure in (figure_of_sets(*pair) for pair in pairs[:10])]  # type: ignore[operator]
        assert 0.6 < np.mean(half_widths) / (1.96 * spread) < 1.6


def test_paired_sets_are_resampled_in_pairs() -> None:
    before = features(100, 0)
    after = before + 0.05 * features(100, 1)
    paired, unpaired = (frechet_figure(before, after, paired=is_paired) for is_paired in (True, False))
    assert paired.low is not None and paired.high is not None and paired.low < paired.value < paired.high
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 2  # type: ignore[operator]


def test_kernel_distance_of_large_sets_is_over_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chameleon.evaluation.distances.KERNEL_SUBSET_SIZE", 50)
    a, b = features(600, 0), features(500, 1, 0.4)
    figure = kernel_figure(a, b)
    assert figure.value == pytest.approx(kernel_distance(a, b), rel=0.3)
    assert figure.low is not None and figure.low < kernel_distance(a, b) < figure.high  # type: ignore[operator]


def test_kernel_distance_equals_torchmetrics() -> None:
    a, b = features(70, 0).double(), features(70, 1, 0.4).double()
    assert kernel_distance(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)
    figure = kernel_figure(a, b)
    assert figure.low is not None and figure.low < figure.value < figure.high  # type: ignore[operator]


def test_precision_recall_density_coverage_by_hand() -> None:
    """Against the definitions, written with loops; precision and recall also against torch-fidelity's distances."""
    real, made = features(40, 0, width=6), features(30, 1, 0.8, width=6)
    got = manifolds(real, made)

    def radius(points: torch.Tensor, index: int, k: int) -> float:
        return sorted(float((points[index] - other).norm()) for other in points)[k]

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm())

    for j, point in enumerate(made):
        assert bool(got.precision[j]) == any(distance(point, real[i]) <= radius(real, i, 3) + 1e-6 for i in range(40))
        within = sum(distance(point, real[i]) <= radius(real, i, 5) + 1e-6 for i in range(40))
        assert float(got.density[j]) == pytest.approx(within / 5)
    for i, point in enumerate(real):
        assert bool(got.recall[i]) == any(distance(point, made[j]) <= radius(made, j, 3) + 1e-6 for j in range(30))
        assert bool(got.coverage[i]) == any(distance(point, other) <= radius(real, i, 5) + 1e-6 for other in made)
    assert 0 < got.precision.double().mean() < 1 and 0 < got.recall.double().mean() < 1
    theirs = calculate_precision_recall_full(made.double(), real.double(), neighborhood=3)
    assert [float(got.precision.double().mean()), float(got.recall.double().mean())] == pytest.approx(
        list(map(float, theirs))
    )


def test_ssim_is_torchmetrics() -> None:
    a, b = torch.rand(3, 3, 32, 32) * 2 - 1, torch.rand(3, 3, 32, 32) * 2 - 1
    expected = [float(structural_similarity_index_measure(a[i : i + 1], b[i : i + 1], data_range=2.0)) for i in range(3)]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-6)
    assert ssim(a, a).tolist() == pytest.approx([1] * 3)


def test_things_on_white_are_counted() -> None:
    thing = PILImage.new("RGB", (64, 64), "white")
    thing.paste((200, 30, 30), (12, 12, 52, 52))
    for number in (1, 2, 3, 4):
        assert count_objects(side_by_side(thing, number)) == number
    assert count_objects(PILImage.new("RGB", (64, 64), "white")) == 0
    assert several(3, "red apple") == "three red apples" and several(1, "key") == "one key"
    assert [several(2, thing) for thing in ("fish", "tomato", "strawberry")] == [
        "two fish",
        "two tomatoes",
        "two strawberries",
    ]


def test_counted_things_are_in_the_set() -> None:
    from chameleon.data import emoji

    names = {entry.name for entry in emoji.load("train")}
    assert set(COUNTED_THINGS) <= names


def test_words_are_read_where_tesseract_is() -> None:
    import shutil

    if shutil.which("tesseract") is None:
        pytest.skip("needs tesseract")
    from PIL import ImageDraw, ImageFont

    picture = PILImage.new("RGB", (512, 128), "white")
    ImageDraw.Draw(picture).text((20, 30), "orange heart", fill="black", font=ImageFont.load_default(60))
    assert words_in(picture) == {"orange": 1, "heart": 1}


def test_figures_are_of_the_items_that_have_the_metric() -> None:
    items = [Item("a"), Item("b"), Item("c")]
    scores = Scores([{"x": 1.0}, {}, {"x": 0.0}], {"x": Metric(base_rate=0.5)})
    figure = scores.all_figures(items)["x"]
    assert (figure.value, figure.count, figure.base_rate) == (0.5, 2, 0.5)
    assert not math.isnan(figure.low or 0)


# --- extractors from the user's files ---


def test_inception_features_come_from_the_users_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-fidelity's network with random weights in a file, since the real ones are a download."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    from chameleon.evaluation.extractors import make_extractor

    network: Any = torch.nn.Module.__new__(module.FeatureExtractorInceptionV3)
    with monkeypatch.context() as patch:
        patch.setattr(module.torch, "load", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(tmp_path))
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    pictures = [PILImage.new("RGB", (40, 30), colour) for colour in ("red", "blue", "green")]
    got = make_extractor("inception", str(tmp_path / "inception.pth"), "cpu")(pictures)
    values = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    torch.testing.assert_close(got, network(values)[0].float(), atol=1e-4, rtol=1e-4)
    with pytest.raises(BadInput, match="no such file"):
        make_extractor("inception", str(tmp_path / "none.pth"), "cpu")
    with pytest.raises(BadInput, match="use effnet-lite0, inception, clip"):
        make_extractor("vgg", "", "cpu")


def test_clip_scores_are_cosines_of_the_users_model(tmp_path: Path) -> None:
    """A tiny random CLIP in a folder, against its own logits."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    from chameleon.evaluation.extractors import Clip

    small = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**small, "vocab_size": 20, "eos_token_id": 1, "max_position_embeddings": 16}
    vision = {**small, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path)
    words = ["<|startoftext|>", "<|endoftext|>", "a", "b", "c", "a</w>", "b</w>", "c</w>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, tokenizer).save_pretrained(tmp_path)
    pictures = [PILImage.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    clip = Clip(str(tmp_path), "cpu")
    scores = clip.scores(pictures, ["a b", "c"])
    inputs = clip.processor(text=["a b", "c"], images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = clip.model(**inputs)
    cosines = output.logits_per_image / clip.model.logit_scale.exp()
    assert scores == pytest.approx([100 * max(0.0, float(cosines[i, i])) for i in range(2)], abs=1e-3)
