"""Suites on files in the published forms: scorecards, resuming, repeating, comparing, processes, folders of others."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from PIL import ImageDraw

from chameleon.bundle import Bundle
from chameleon.cli import main
from chameleon.document import Document, Image, Text
from chameleon.errors import BadInput
from chameleon.evaluation import run as run_module
from chameleon.evaluation.caption_words import caption_words
from chameleon.evaluation.captioning import Captioning, CaptionSuite, score_captions
from chameleon.evaluation.coco import commonest_answer, read_captions, read_questions
from chameleon.evaluation.emoji import EmojiSuite, evaluate
from chameleon.evaluation.journal import Journal
from chameleon.evaluation.mixed_suite import read_open_prompts
from chameleon.evaluation.part import Item, LocalModel, Scores
from chameleon.evaluation.run import evaluate_suites
from chameleon.evaluation.scorecard import Scorecard, compare, differing_figures, differing_settings
from chameleon.evaluation.statistics import Metric
from chameleon.evaluation.suite import NamedSuite, fingerprint_of, make_suite, read_suites, shipped_suites
from chameleon.evaluation.visual_questions import QuestionSuite, VisualQuestions
from chameleon.evaluation.vqa_accuracy import vqa_accuracy
from chameleon.generation.chameleon import Chameleon

COLOURS = ("red", "green", "blue", "orange", "purple", "black", "grey", "yellow", "pink", "brown", "cyan", "navy")


@pytest.fixture
def model(bundle: Bundle) -> LocalModel:
    return LocalModel(Chameleon(bundle))


def write_pictures(folder: Path, names: Sequence[str], seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for index, name in enumerate(names):
        picture = PILImage.new("RGB", (20, 16), COLOURS[index % len(COLOURS)])
        ImageDraw.Draw(picture).ellipse((rng.randrange(6), rng.randrange(4), 14, 12), fill=rng.choice(COLOURS))
        picture.save(folder / name)


@pytest.fixture
def karpathy(tmp_path: Path) -> Path:
    """A split file of 12 test and 4 training pictures, in the folders that it names."""
    images = []
    for index in range(16):
        split, folder = ("train", "train2014") if index >= 12 else ("test", "val2014")
        write_pictures(tmp_path / "coco" / folder, [f"COCO_{index:012}.png"], index)
        sentences = [{"raw": f"A {COLOURS[index % 12]} fox."}, {"raw": "the dog"}]
        images.append(
            {
                "filename": f"COCO_{index:012}.png",
                "filepath": folder,
                "split": split,
                "cocoid": index,
                "sentences": sentences,
            }
        )
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return tmp_path / "dataset_coco.json"


@pytest.fixture
def vqa(tmp_path: Path) -> dict[str, str]:
    """VQAv2's two files of 9 questions about 3 pictures."""
    write_pictures(tmp_path / "val", [f"COCO_val2014_{index:012}.png" for index in range(3)])
    questions, annotations = [], []
    for index in range(9):
        questions.append({"question_id": 100 + index, "image_id": index % 3, "question": f"is it {COLOURS[index]}?"})
        answers = ["yes"] * 6 + ["no"] * 3 + ["Yes."]
        annotations.append(
            {
                "question_id": 100 + index,
                "question_type": "is it",
                "answer_type": "yes/no" if index % 2 else "other",
                "answers": [{"answer": answer, "answer_id": k + 1} for k, answer in enumerate(answers)],
            }
        )
    (tmp_path / "questions.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    return {
        "questions": str(tmp_path / "questions.json"),
        "annotations": str(tmp_path / "annotations.json"),
        "images": str(tmp_path / "val"),
    }


def caption_suite(karpathy: Path, **settings: Any) -> NamedSuite:
    values = {"annotations": str(karpathy), "images": str(karpathy.parent / "coco"), "split": "test", "words": "python"}
    values |= {"meteor": False, "batch_size": 4, "max_new_tokens": 6, **settings}
    return make_suite("coco-captions", "captions", values, "test")


# --- published files ---


def test_published_caption_files_are_read(karpathy: Path, tmp_path: Path) -> None:
    images = read_captions(str(karpathy), str(tmp_path / "coco"), "test")
    assert [image.key for image in images] == [str(index) for index in range(12)]
    assert images[0].path == tmp_path / "coco" / "val2014" / "COCO_000000000000.png"
    assert images[0].captions == ("A red fox.", "the dog")
    official = {
        "images": [{"id": 7, "file_name": "COCO_000000000001.png"}, {"id": 8, "file_name": "COCO_000000000002.png"}],
        "annotations": [{"image_id": 7, "id": 1, "caption": "one"}, {"image_id": 7, "id": 2, "caption": "two"}],
    }
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps(official))
    (image,) = read_captions(str(path), str(tmp_path / "coco" / "val2014"))  # the one with captions
    assert image.key == "7" and image.captions == ("one", "two")
    with pytest.raises(BadInput, match="split test of a file without splits"):
        read_captions(str(path), str(tmp_path / "coco" / "val2014"), "test")
    words = ["coco-captions", f"annotations={path}", f"images={tmp_path}/coco/val2014", "split=", "shots=0", "words=python"]
    (suite,) = read_suites(words)
    assert len(suite.settings.build_parts()[0].items()) == 1


def test_published_question_files_are_read(vqa: dict[str, str], tmp_path: Path) -> None:
    asked = read_questions(**vqa)
    assert len(asked) == 9 and asked[4].key == "104" and asked[4].path.name == "COCO_val2014_000000000001.png"
    assert asked[4].answers[-1] == "Yes." and asked[1].answer_type == "yes/no"
    vizwiz = [{"image": "COCO_val2014_000000000000.png", "question": "What?", "answers": [{"answer": "tea"}] * 10}]
    (tmp_path / "val.json").write_text(json.dumps([*vizwiz, {"image": "COCO_val2014_000000000001.png", "question": "Hm?"}]))
    read = read_questions(str(tmp_path / "val.json"), "", vqa["images"])
    assert read[0].answers == ("tea",) * 10 and read[1].answers == ()
    assert commonest_answer(["b", "a", "a", "b"]) == "b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["images"][0].pop("filename"), "not Karpathy's split"),
        (lambda content: content["images"][0].update(filename="gone.png"), "no such image"),
    ],
)
def test_damaged_annotations_name_the_file(karpathy: Path, tmp_path: Path, change: Any, message: str) -> None:
    content = json.loads(karpathy.read_text())
    change(content)
    karpathy.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=message):
        read_captions(str(karpathy), str(tmp_path / "coco"), "test")
    karpathy.write_text("{")
    with pytest.raises(BadInput, match=r"dataset_coco\.json: not JSON"):
        read_captions(str(karpathy), str(tmp_path / "coco"), "test")


def test_questions_without_their_picture_or_answers(vqa: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "val" / "COCO_val2014_000000000002.png").unlink()
    with pytest.raises(BadInput, match="no image with the number 2"):
        read_questions(**vqa)
    content = json.loads(Path(vqa["annotations"]).read_text())
    content["annotations"].pop()
    Path(vqa["annotations"]).write_text(json.dumps(content))
    write_pictures(tmp_path / "val", [f"COCO_val2014_{index:012}.png" for index in range(3)])
    with pytest.raises(BadInput, match="no answers to question 108"):
        read_questions(**vqa)


# --- scorecards ---


def test_a_scorecard_holds_all_that_is_needed_to_repeat_it(karpathy: Path, model: LocalModel, tmp_path: Path) -> None:
    suite = caption_suite(karpathy, shots=2)
    card = evaluate_suites([suite], model, tmp_path / "out", source="here")
    assert card is not None
    content = json.loads((tmp_path / "out" / "scorecard.json").read_text())
    assert content == json.loads(json.dumps(card.content))
    part = content["suites"]["coco-captions"]["parts"]["captions"]
    assert len(part["samples"]) == 12 and content["suites"]["coco-captions"]["settings"]["shots"] == 2
    assert {"torch", "open-chameleon", "python"} <= set(content["environment"]["versions"])
    assert content["model"]["dtype"] == "float32" and content["suites"]["coco-captions"]["data"]["annotations"]
    # Examples are of the training split, and the figures are those of the outputs that stand there.
    assert {example["key"] for example in part["method"]["examples"]} <= {"12", "13", "14", "15"}
    known, _ = caption_words([sample["expected"] for sample in part["samples"]], "python")
    captions, _ = caption_words([[sample["output"]] for sample in part["samples"]], "python")
    scores = score_captions([of[0] for of in captions], known, False)
    items = [Item(sample["key"]) for sample in part["samples"]]
    for name, figure in scores.all_figures(items).items():
        assert part["figures"][name] == figure.to_json()
    markdown = (tmp_path / "out" / "scorecard.md").read_text()
    assert "| coco-captions / captions / cider_d |" in markdown and content["model"]["bundle"] in markdown
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<figure>") >= 12 and all(sample["output"] in page for sample in part["samples"][:1])
    assert page.count("data:image/png;base64,") >= 12 and "http://" not in page


def test_few_shot_prompts_are_those_of_the_model(karpathy: Path, model: LocalModel) -> None:
    """The suite's outputs are what `caption_batch` gives with the same examples."""
    part = Captioning(caption_suite(karpathy, shots=2, prompt="").settings)  # type: ignore[arg-type]
    items = part.items()
    outputs = part.run(model, items, 0)
    shots = [(document.parts[0].image, text) for document, text in part.examples]  # type: ignore[union-attr]
    expected = model.model.caption_batch([entry.path for entry in part.entries], examples=shots, max_new_tokens=6)
    assert outputs == expected
    other = Captioning(caption_suite(karpathy, shots=2, seed=5).settings)  # type: ignore[arg-type]
    again = Captioning(caption_suite(karpathy, shots=2).settings)  # type: ignore[arg-type]
    assert again.method == part.method and other.method != part.method


def test_question_suite_is_the_official_accuracy(
    vqa: dict[str, str], model: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"is it red?": "yes", "is it green?": "No!", "is it blue?": "the yes", "is it orange?": "cat"}
    monkeypatch.setattr(
        model,
        "generate_texts",
        lambda prompts, *_: [answers.get(prompt.text, "yes") for prompt in prompts],
    )
    suite = make_suite("vqav2", "questions", {**vqa, "batch_size": 2}, "test")
    card = evaluate_suites([suite], model, tmp_path / "out")
    assert card is not None
    part = card.content["suites"]["vqav2"]["parts"]["questions"]
    people = ["yes"] * 6 + ["no"] * 3 + ["Yes."]
    expected = [vqa_accuracy(answers.get(f"is it {COLOURS[i]}?", "yes"), people) for i in range(9)]
    assert [sample["scores"]["accuracy"] for sample in part["samples"]] == expected
    assert part["figures"]["accuracy"]["value"] == pytest.approx(np.mean(expected))
    assert part["figures"]["accuracy"]["base_rate"] == 1.0  # "yes" is right everywhere
    assert part["figures"]["accuracy, yes/no"]["value"] == pytest.approx(np.mean(expected[1::2]))
    assert {sample["group"] for sample in part["samples"]} == {f"COCO_val2014_{i:012}.png" for i in range(3)}


def test_shots_need_a_training_set(vqa: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="shots need example_questions"):
        QuestionSuite(**vqa, shots=2).build_parts()
    examples = {f"example_{name}": path for name, path in vqa.items()}
    with pytest.raises(BadInput, match="0 examples, shots is 2"):  # all of them are evaluated: the answers would be shown
        VisualQuestions(QuestionSuite(**vqa, shots=2, **examples))
    write_pictures(tmp_path / "train", [f"COCO_val2014_{index:012}.png" for index in range(3)], 7)
    examples["example_images"] = str(tmp_path / "train")
    part = VisualQuestions(QuestionSuite(**vqa, shots=2, **examples))
    assert len(part.examples) == 2 and part.method["examples"][0]["answer"] == "yes"


# --- resuming, repeating, comparing ---


def test_a_killed_evaluation_goes_on_to_the_same_figures(
    karpathy: Path, model: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suites = [caption_suite(karpathy, shots=1)]
    whole = evaluate_suites(suites, model, tmp_path / "whole")
    append, ran = Journal.append, []

    def interrupted(self: Journal, batch: int, keys: list[str], outputs: list[Any]) -> None:
        ran.append(batch)
        if len(ran) == 3:
            raise KeyboardInterrupt
        append(self, batch, keys, outputs)

    monkeypatch.setattr(Journal, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_suites(suites, model, tmp_path / "part")
    assert not (tmp_path / "part" / "scorecard.json").exists()
    (journal,) = (tmp_path / "part" / "outputs" / "coco-captions" / "captions").iterdir()
    text = journal.read_text()
    journal.write_text(text[:-20])  # as a process leaves it that is killed while it writes
    resumed = evaluate_suites(suites, model, tmp_path / "part")
    assert ran == [0, 1, 2, 1, 2]  # the first batch was not repeated
    assert whole is not None and resumed is not None
    assert resumed.content["suites"] == whole.content["suites"]
    assert len(journal.read_text().splitlines()) == 4  # the torn line and three whole ones


def test_pictures_survive_a_restart_to_the_pixel(model: LocalModel, tmp_path: Path) -> None:
    settings = {"parts": ["drawings"], "concepts": 30, "drawings": 6}
    suites = [make_suite("emoji", "emoji", settings, "test")]
    first = evaluate_suites(suites, model, tmp_path / "out")
    again = evaluate_suites(suites, model, tmp_path / "out")  # from the journal alone
    assert first is not None and again is not None and first.content["suites"] == again.content["suites"]
    in_memory = evaluate(model.model, parts=["drawings"], concepts=30, drawings=6)
    assert in_memory == {name.removeprefix("emoji / "): figure.to_json() for name, figure in first.figures().items()}


class Echo:
    """A model that answers with what a function gives for each prompt."""

    is_here = False

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def generate_texts(self, prompts: Sequence[Document], *_: Any) -> list[str]:
        return [self.answer(prompt) for prompt in prompts]

    def describe(self) -> dict[str, Any]:
        return {"bundle": "echo"}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1c", "\r", "\ud800"])
def test_outputs_may_hold_any_character(karpathy: Path, tmp_path: Path, separator: str) -> None:
    """Also those that end a line for Python: batches are lines of a file."""
    model: Any = Echo(lambda prompt: f"a{separator}b")
    card = evaluate_suites([caption_suite(karpathy)], model, tmp_path / "out")
    assert card is not None
    content = json.loads((tmp_path / "out" / "scorecard.json").read_text(encoding="utf-8", errors="surrogatepass"))
    assert len(content["suites"]["coco-captions"]["parts"]["captions"]["samples"]) == 12
    (tmp_path / "lines.jsonl").write_text(json.dumps({"prompt": "x\u2028y"}, ensure_ascii=False), encoding="utf-8")
    assert read_open_prompts(str(tmp_path / "lines.jsonl"))[0].content == Document((Text("x\u2028y"),))


def test_keys_and_parts_that_look_alike_are_kept_apart(tmp_path: Path) -> None:
    """Names of files are made of keys; `keycap: #` and `keycap: *` are two."""
    keys = ["keycap: #", "keycap: *", "a/1", "a 1", "x" * 200 + "1", "x" * 200 + "2"]
    journal = Journal(tmp_path, "s", "my")
    pictures = [PILImage.new("RGB", (2, 2), (index, 0, 0)) for index in range(len(keys))]
    journal.append(0, keys, pictures)
    other = Journal(tmp_path, "s", "my.v2")
    assert other.batches() == {} and Journal(tmp_path, "s", "a b").path != Journal(tmp_path, "s", "a_b").path
    assert [PILImage.open(path).getpixel((0, 0))[0] for path in journal.outputs()] == list(range(len(keys)))


def test_a_suite_may_have_any_name(karpathy: Path, model: LocalModel, tmp_path: Path) -> None:
    suite = caption_suite(karpathy)
    card = evaluate_suites([NamedSuite("samples", suite.kind, suite.settings)], model, tmp_path / "out")
    assert card is not None and Scorecard.read(tmp_path / "out").figures() == card.figures()


def test_a_lost_process_is_noticed(
    karpathy: Path, model: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(run_module, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(run_module, "POLL_SECONDS", 0.05)
    with pytest.raises(BadInput, match="1 batches of other processes are missing"):
        evaluate_suites([caption_suite(karpathy)], model, tmp_path / "out")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")  # in a batch script, outside a step
    assert run_module.process_rank() == (0, 1)


def test_a_folder_of_another_evaluation_is_refused(karpathy: Path, model: LocalModel, tmp_path: Path) -> None:
    evaluate_suites([caption_suite(karpathy)], model, tmp_path / "out")
    before = (tmp_path / "out" / "scorecard.json").read_bytes()
    with pytest.raises(BadInput, match=r"another evaluation, whose suites.*max_new_tokens is 6, not 7"):
        evaluate_suites([caption_suite(karpathy, max_new_tokens=7)], model, tmp_path / "out")
    assert (tmp_path / "out" / "scorecard.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    with pytest.raises(BadInput, match="not empty"):
        evaluate_suites([caption_suite(karpathy)], model, tmp_path / "mine")


def test_the_command_evaluates_repeats_and_compares(
    karpathy: Path, bundle_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = karpathy.parent / "coco"
    words = [
        "coco-captions",
        f"annotations={karpathy}",
        f"images={images}",
        "words=python",
        "meteor=no",
        "shots=1",
        "max_new_tokens=6",
    ]
    main(["evaluate", *words, "--model", str(bundle_folder), "--out", str(tmp_path / "a"), "--dtype", "float32"])
    assert "coco-captions / captions / cider_d" in capsys.readouterr().out
    card = Scorecard.read(tmp_path / "a")
    assert card.content["command"].startswith(("chameleon", "pytest", "python", "__main__", "-c"))
    again = ["evaluate", "--again", str(tmp_path / "a" / "scorecard.json"), "--out", str(tmp_path / "again")]
    main(again)
    assert f"all {len(card.figures())} figures are the same" in capsys.readouterr().out
    assert Scorecard.read(tmp_path / "again").content["model"]["dtype"] == "float32"  # as the scorecard says
    with pytest.raises(SystemExit):  # nothing would be repeated there
        main(again)
    assert "holds an evaluation already" in capsys.readouterr().err
    # Other references: the figures differ, and the data are named as the reason.
    content = json.loads(karpathy.read_text())
    outputs = card.content["suites"]["coco-captions"]["parts"]["captions"]["samples"]
    content["images"][0]["sentences"][0]["raw"] = outputs[0]["output"]
    karpathy.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as ended:
        main([*again[:-1], str(tmp_path / "third")])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "figures differ" in printed and "data of coco-captions: annotations" in printed
    main(["compare", str(tmp_path / "a"), str(tmp_path / "third"), "--json"])
    rows = json.loads(capsys.readouterr().out)
    (cider,) = [row for row in rows if row["name"].endswith("cider_d")]
    assert cider["difference"]["count"] == 12 and cider["difference"]["p_value"] > 0.05


def card_with(values: Sequence[float], **model: str) -> Scorecard:
    items = [Item(str(index)) for index in range(len(values))]
    scores = Scores([{"right": value} for value in values], {"right": Metric()})
    part = {
        "method": {},
        "figures": {name: figure.to_json() for name, figure in scores.all_figures(items).items()},
        "metrics": {"right": {"statistic": "mean", "base_rate": None, "higher_is_better": True}},
        "samples": [{"key": item.key, "scores": terms} for item, terms in zip(items, scores.of_items, strict=True)],
    }
    environment = {"versions": {"torch": "1"}, "platform": "x", "processor": "y", "accelerator": None}
    suites = {"s": {"kind": "emoji", "settings": {}, "data": {}, "parts": {"p": part}}}
    return Scorecard({"format": 1, "model": model, "environment": environment, "suites": suites})


def test_comparisons_are_paired() -> None:
    """A small gain on every sample is significant although the samples spread widely."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 50)
    first, second = card_with(list(base + 0.5), dtype="float32"), card_with([*base, 3.0], dtype="bfloat16")
    (row,) = compare(first, second)
    assert row.difference is not None and row.num_unmatched == 1
    assert row.difference.value == pytest.approx(0.5) and row.difference.p_value < 0.001
    assert differing_settings(first, second) == ["model: dtype: float32 → bfloat16"]
    assert len(differing_figures(first, second)) == 1
    other = Scorecard({**second.content, "suites": {}})
    with pytest.raises(BadInput, match="share no figure"):
        compare(first, other)


def test_several_processes_share_the_work(karpathy: Path, bundle_folder: Path, tmp_path: Path) -> None:
    """Two processes, as torchrun starts them, give the figures of one, and one scorecard."""
    words = ["coco-captions", f"annotations={karpathy}", f"images={karpathy.parent / 'coco'}", "words=python", "meteor=no"]
    command = [
        sys.executable,
        "-m",
        "chameleon.cli",
        "evaluate",
        *words,
        "shots=1",
        "max_new_tokens=6",
        "batch_size=3",
        "--dtype",
        "float32",
    ]
    command += ["--model", str(bundle_folder), "--json"]
    alone = subprocess.run([*command, "--out", str(tmp_path / "alone")], capture_output=True, text=True, check=True)
    processes = [
        subprocess.Popen(
            [*command, "--out", str(tmp_path / "shared")],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert json.loads(outputs[0]) == json.loads(alone.stdout) and outputs[1] == ""
    journals = sorted((tmp_path / "shared" / "outputs" / "coco-captions" / "captions").iterdir())
    assert [len(path.read_text().splitlines()) for path in journals] == [2, 2]


def test_suites_of_the_command_line(karpathy: Path, vqa: dict[str, str]) -> None:
    assert {
        "emoji",
        "coco-captions",
        "flickr30k",
        "vqav2",
        "okvqa",
        "vizwiz",
        "text",
        "images",
        "tokenizer",
        "mixed",
    } <= set(shipped_suites())
    (emoji_suite,) = read_suites(["emoji", "drawings=7"])
    assert emoji_suite.settings.drawings == 7  # type: ignore[attr-defined]
    files = [f"coco-captions.annotations={karpathy}", f"coco-captions.images={karpathy.parent}"]
    both = read_suites(["emoji", "coco-captions", *files, "emoji.seed=3"])
    assert both[0].settings.seed == 3 and both[1].settings.shots == 2  # type: ignore[attr-defined]
    for words, message in (
        (["emoji", "drawing=7"], "did you mean drawings"),
        (["emoji", "drawings=many"], "drawings"),
        (["coco-captions"], "annotations is not given; add annotations="),
        (["emoji", "coco-captions", "seed=1"], "seed of which suite"),
        (["emoji", "emoji"], "given twice"),
        (["nothing"], "no such suite; give a YAML file, or coco-captions"),
        (["emoji", "parts=[nothing]"], "use reconstruction"),
        (["emoji", "concepts=1"], "use more"),
        (["emoji", "seed=-1"], "seed is -1; use 0 or more"),
        (["emoji", "drawings=-1"], "drawings is -1"),
        (["images", "real=x", "generated=y", "batch_size=0"], "batch_size is 0; use 1 or more"),
    ):
        with pytest.raises(BadInput, match=message.replace("(", r"\(")):
            [suite.settings.build_parts() for suite in read_suites(words)]


def test_a_suite_in_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("kind: emoji\nsettings: {drawings: 3}\n")
    (suite,) = read_suites([str(path), "seed=2"])
    assert (suite.name, suite.kind) == ("mine", "emoji") and suite.settings.drawings == 3  # type: ignore[attr-defined]
    path.write_text("kind: nothing\n")
    with pytest.raises(BadInput, match="use emoji, captions"):
        read_suites([str(path)])
    path.write_text("kind: emoji\nsetting: {}\n")
    with pytest.raises(BadInput, match="unknown key setting"):
        read_suites([str(path)])
    for text in ("kind: [a]\n", "kind: emoji\nsettings: [a]\n"):
        path.write_text(text)
        with pytest.raises(BadInput):
            read_suites([str(path), "seed=1"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.yaml").write_text("kind: emoji\n")
    with pytest.raises(BadInput, match="two suites have one name"):
        read_suites([str(path), str(tmp_path / "other" / "mine.yaml")])


def test_keys_must_be_unique() -> None:
    with pytest.raises(BadInput, match="two samples have the key 'a'"):
        run_module.check_keys([Item("a"), Item("a")], "suite / part")


def test_fingerprints_see_changes_at_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "large"
    data = bytearray(5 << 20)
    path.write_bytes(data)
    before = fingerprint_of([path])
    assert before == fingerprint_of([path])
    for position in (0, len(data) - 1):
        data[position] ^= 1
        path.write_bytes(data)
        assert fingerprint_of([path]) != before
        data[position] ^= 1


# --- pictures ---


def test_equal_sets_of_images_are_at_no_distance(model: LocalModel, tmp_path: Path) -> None:
    write_pictures(tmp_path / "real", [f"{i}.png" for i in range(24)], 1)
    write_pictures(tmp_path / "far", [f"{i}.png" for i in range(24)], 1)
    for path in (tmp_path / "far").iterdir():
        PILImage.open(path).convert("L").rotate(40, fillcolor=255).convert("RGB").save(path)
    figures = {}
    for name in ("real", "far"):
        settings = {"real": str(tmp_path / "real"), "generated": str(tmp_path / name)}
        suite = make_suite("images", "images", settings, "test")
        card = evaluate_suites([suite], model, tmp_path / f"out-{name}")
        assert card is not None
        figures[name] = {key.rpartition(" / ")[2]: figure for key, figure in card.figures().items()}
    distance = "effnet-lite0_frechet_distance"
    assert figures["real"][distance].value == pytest.approx(0, abs=1e-6)
    assert figures["real"]["precision"].value == figures["real"]["coverage"].value == 1
    assert figures["far"][distance].value > 1e-3
    assert figures["far"]["precision"].value < 1
    assert set(figures["far"]) == {distance, "effnet-lite0_kernel_distance", "precision", "recall", "density", "coverage"}


def test_drawings_of_a_file_of_prompts(model: LocalModel, tmp_path: Path) -> None:
    write_pictures(tmp_path / "real", [f"{i}.png" for i in range(12)])
    (tmp_path / "prompts.txt").write_text("a red circle\n\na cat\n" + '{"prompt": "a dog"}\n')
    settings = {"real": str(tmp_path / "real"), "prompts": str(tmp_path / "prompts.txt"), "per_prompt": 4, "batch_size": 5}
    card = evaluate_suites([make_suite("images", "images", settings, "test")], model, tmp_path / "out")
    assert card is not None
    samples = card.content["suites"]["images"]["parts"]["images"]["samples"]
    assert [sample["prompt"] for sample in samples] == ["a red circle"] * 4 + ["a cat"] * 4 + ["a dog"] * 4
    drawn = [PILImage.open(tmp_path / "out" / sample["output"]["image"]) for sample in samples]
    expected = model.model.draw_batch([sample["prompt"] for sample in samples])
    assert [a.tobytes() for a in drawn] == [b.tobytes() for b in expected]
    for changes, message in (
        ({"prompts": ""}, "give generated=FOLDER or prompts=FILE"),
        ({"extractor": "vgg"}, "use effnet-lite0"),
        ({"extractor": "inception", "weights": "typo.pth"}, "typo.pth: no such file"),
        ({"clip": "nowhere"}, "nowhere: no such folder"),
        ({"per_prompt": 1}, "3 generated images; use 10 or more"),
        ({"prompts": "", "generated": str(tmp_path / "real"), "clip": "x"}, "clip needs prompts"),
    ):  # before anything is drawn
        with pytest.raises(BadInput, match=message):
            make_suite("images", "images", {**settings, **changes}, "test").settings.build_parts()


def test_the_tokenizer_suite_on_a_folder(model: LocalModel, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", [f"{i}.png" for i in range(6)])
    settings = {"images": str(tmp_path / "pictures"), "legibility": False}
    card = evaluate_suites([make_suite("tokenizer", "tokenizer", settings, "test")], model, tmp_path / "out")
    assert card is not None
    figures = {name.rpartition(" / ")[2]: figure for name, figure in card.figures().items()}
    assert {"psnr_db", "ssim", "codebook_used", "codebook_perplexity", "effnet-lite0_frechet_distance"} <= set(figures)
    tokenizer = model.model.tokenizer.image
    paths = sorted((tmp_path / "pictures").iterdir())
    pictures = [PILImage.open(path).convert("RGB") for path in paths]
    used = len(tokenizer.encode(pictures).unique())
    assert figures["codebook_used"].value == pytest.approx(used / 32)


def test_folders_for_other_scorers(model: LocalModel, tmp_path: Path) -> None:
    """The layouts that the scorers of GenEval, DPG-Bench and T2I-CompBench read."""
    metadata = [
        {"tag": "colors", "include": [{"class": "cat", "count": 1}], "prompt": f"a photo of a {c} cat"} for c in "ab"
    ]
    (tmp_path / "geneval.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metadata))
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "COCOval2014000000013580.txt").write_text("A long prompt.\n")
    (tmp_path / "color_val.txt").write_text("a green bench and a blue bowl\na red apple and a green cup.\n")
    for benchmark, prompts, per_prompt in (
        ("geneval", "geneval.jsonl", 3),
        ("dpg-bench", "dpg", 4),
        ("t2i-compbench", "color_val.txt", 2),
    ):
        settings = {"benchmark": benchmark, "prompts": str(tmp_path / prompts), "out": str(tmp_path / "for" / benchmark)}
        suite = make_suite(benchmark, "prompt-folders", {**settings, "per_prompt": per_prompt}, "test")
        assert evaluate_suites([suite], model, tmp_path / f"out-{benchmark}") is not None
    folder = tmp_path / "for" / "geneval"
    assert json.loads((folder / "00001" / "metadata.jsonl").read_text()) == metadata[1]
    assert sorted(path.name for path in (folder / "00001" / "samples").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    (page,) = (tmp_path / "for" / "dpg-bench").iterdir()
    square = PILImage.open(page)
    assert page.name == "COCOval2014000000013580.png" and square.size == (32, 32)
    first = model.model.draw_batch(["A long prompt."] * 4)[3]
    assert square.crop((16, 16, 32, 32)).tobytes() == first.tobytes()
    left_over = tmp_path / "for" / "geneval" / "00001" / "samples" / "00007.png"
    left_over.write_bytes(b"of another model")
    settings = {
        "benchmark": "geneval",
        "prompts": str(tmp_path / "geneval.jsonl"),
        "out": str(tmp_path / "for" / "geneval"),
    }
    with pytest.raises(BadInput, match=r"00007\.png: is no file of this suite"):
        make_suite("geneval", "prompt-folders", settings, "test").settings.build_parts()
    names = sorted(path.name for path in (tmp_path / "for" / "t2i-compbench" / "samples").iterdir())
    assert names == [
        "a green bench and a blue bowl_000000.png",
        "a green bench and a blue bowl_000001.png",
        "a red apple and a green cup_000002.png",
        "a red apple and a green cup_000003.png",
    ]


def test_open_prompts(model: LocalModel, tmp_path: Path) -> None:
    picture = tmp_path / "cat.png"
    PILImage.new("RGB", (16, 16), "red").save(picture)
    document = {"parts": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "what is it?"}]}
    lines = [{"prompt": "draw a cat", "id": "cat", "category": "drawing", "form": "images"}, {"prompt": document}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts = read_open_prompts(str(tmp_path / "prompts.jsonl"))
    assert [prompt.key for prompt in prompts] == ["cat", "2"]
    assert prompts[1].content == Document((Image(picture), Text("what is it?")))
    settings = {"prompts": str(tmp_path / "prompts.jsonl"), "max_new_tokens": 24, "max_images": 1}
    card = evaluate_suites([make_suite("mixed", "mixed", settings, "test")], model, tmp_path / "out")
    assert card is not None
    samples = card.content["suites"]["mixed"]["parts"]["answers"]["samples"]
    assert samples[0]["category"] == "drawing" and "right_form" in samples[0]["scores"]
    assert "right_form" not in samples[1]["scores"]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "form": "song"}\n')
    with pytest.raises(BadInput, match=r"bad\.jsonl, line 1: form is 'song'"):
        read_open_prompts(str(tmp_path / "bad.jsonl"))


# --- the embedded set ---


def test_unseen_parts_of_the_suite(model: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part runs, on few items; figures of shares lie between 0 and 1, and each has its count."""
    monkeypatch.setattr("chameleon.evaluation.emoji.NUM_COLOURED", 4)
    monkeypatch.setattr("chameleon.evaluation.emoji.NUM_UNSEEN_COLOURS", 3)
    monkeypatch.setattr("chameleon.evaluation.emoji.NUM_VARIED", 2)
    monkeypatch.setattr("chameleon.evaluation.emoji.NUM_VARIATIONS", 3)
    monkeypatch.setattr("chameleon.evaluation.emoji.NUM_MIXED_PROMPTS", 8)
    monkeypatch.setattr("chameleon.evaluation.emoji.NUM_EDITS", 8)
    monkeypatch.setattr("chameleon.evaluation.emoji.MAX_NEW_TOKENS", 20)
    monkeypatch.setattr("chameleon.evaluation.emoji.MAX_BYTES", 300)
    monkeypatch.setattr("chameleon.evaluation.emoji.NUMBERS", (1, 2))
    settings = {"parts": ["all"], "concepts": 12, "drawings": 2}
    card = evaluate_suites([make_suite("emoji", "emoji", settings, "test")], model, tmp_path / "out")
    assert card is not None
    figures = card.figures()
    parts = {name.split(" / ")[1] for name in figures}
    assert parts == {
        *("reconstruction", "captions", "questions", "drawings", "likelihood", "recognition", "languages", "unseen"),
        *("colours", "counts", "variety", "mixed", "edits"),
    }
    for name, figure in figures.items():
        assert figure.count > 0, name
        if "right" in name or "exact" in name:
            assert 0 <= figure.value <= 1, name
    assert figures["emoji / drawings / right_among_10"].count == 2
    assert EmojiSuite(drawings=0, parts=["captions", "drawings"], concepts=12).build_parts()[-1].name == "captions"


def test_variety_is_the_share_of_differing_codes() -> None:
    from chameleon.evaluation.drawings import differing_codes

    codes = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    assert differing_codes(codes) == pytest.approx([0.25, 0.5, 0.25])
    assert CaptionSuite("a", "b").seed == 0
