"""Painting and editing: what is kept, what is chosen and why, against likelihoods computed from whole sequences."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model
from PIL import Image as PILImage

from chameleon.bundle import Bundle
from chameleon.cli import main
from chameleon.data import emoji
from chameleon.data.colours import main_colour
from chameleon.data.labelled import near_view, plain_view
from chameleon.data.mixed_tasks import Edit, conversations, edits
from chameleon.document import Document, Image, Text
from chameleon.errors import BadInput
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.sampling import GREEDY, Sampling
from chameleon.tokenizers.mixed import MixedTokenizer

DRAWN = Sampling(1.0, 1.0)


@pytest.fixture(params=["tokenizer", "sized_tokenizer"])
def model(request: pytest.FixtureRequest) -> Chameleon:
    tokenizer: MixedTokenizer = request.getfixturevalue(request.param)
    network = random_model(tokenizer.vocabulary.size, context_length=128).double()
    return Chameleon(Bundle(network, tokenizer, "conversation"))


def picture(size: tuple[int, int] = (16, 16)) -> PILImage.Image:
    return PILImage.radial_gradient("L").convert("RGB").resize(size)


def mask_of(box: tuple[int, int, int, int], size: tuple[int, int] = (16, 16)) -> PILImage.Image:
    mask = PILImage.new("L", size)
    mask.paste(255, box)
    return mask


def suffix_score(model: Chameleon, prompt: str, codes: torch.Tensor, block: torch.Tensor) -> float:
    """Sum of the log-probabilities, among codes, of what follows the start of a block and is not in it."""
    v = model.vocabulary
    grid = (codes.shape[0], codes.shape[1])
    token_ids = list(model.prompts.token_ids(model.prompts.draw_document(prompt, grid)))
    image = list(v.started_image(v.codes_to_ids(codes.flatten()).tolist(), grid))
    logits = model.logits(torch.tensor([[*token_ids, *image]]))[0].double()
    total, number, has_begun = 0.0, 0, False
    for place, token_id in enumerate(image):
        if token_id not in v.image_ids:
            continue
        row = logits[len(token_ids) + place - 1][v.image_ids.ids]
        is_in_block = bool(block.flatten()[number])
        has_begun |= is_in_block
        if has_begun and not is_in_block:
            total += float(row.log_softmax(-1)[v.image_ids.index_of[token_id]])
        number += 1
    return total


def test_the_continuation_is_kept_after_which_the_rest_is_likeliest(model: Chameleon) -> None:
    mask = mask_of((4, 4, 12, 8))
    task = model.painting(picture(), mask)
    painter = model.painter(task, "red", 1.0, DRAWN)
    drawn = []
    draw = painter.draw
    painter.draw = lambda drawings: drawn.append(draw(drawings)) or drawn[-1]  # type: ignore[method-assign]
    (kept,) = painter.run(1, 6, 1, seed=3)
    scores = [suffix_score(model, "red", codes, painter.is_painted) for codes in drawn[0]]
    assert len({tuple(codes.flatten().tolist()) for codes in drawn[0]}) > 3
    assert torch.equal(kept, drawn[0][int(np.argmax(scores))])
    fixed = torch.tensor(task.drawing.fixed_codes).view(kept.shape)
    assert torch.equal(model.vocabulary.codes_to_ids(kept)[fixed >= 0], fixed[fixed >= 0])
    assert int((fixed < 0).sum()) == 2
    (image,) = model.paint(picture(), mask, "red", candidates=6, seed=3, guidance_scale=1.0, sampling=DRAWN)
    assert image.tobytes() == task.merge(model.tokenizer.image.decode(kept[None])[0]).tobytes()


def test_further_rounds_never_make_what_follows_less_likely(model: Chameleon) -> None:
    mask = mask_of((4, 0, 16, 12))
    painter = model.painter(model.painting(picture(), mask), "red", 1.0, DRAWN)
    rows = painter.is_painted.any(dim=1).nonzero().flatten().tolist()
    assert rows == [0, 1, 2]
    images = painter.run(2, 3, 1, seed=0)
    for row in rows:
        block = torch.zeros_like(painter.is_painted)
        block[row] = painter.is_painted[row]
        redrawn = painter.redraw_row(images, row, 4)
        for before, after in zip(images, redrawn, strict=True):
            assert torch.equal(before[~block], after[~block])
            assert suffix_score(model, "red", after, block) >= suffix_score(model, "red", before, block)
        images = redrawn
    twice = model.paint(picture(), mask, "red", 2, candidates=3, rounds=2, sampling=DRAWN)
    assert len(twice) == 2 and twice[0].tobytes() != twice[1].tobytes()


def test_plain_painting_is_one_candidate(model: Chameleon) -> None:
    mask = mask_of((0, 8, 16, 16))
    one = model.paint(picture(), mask, "red", 3, seed=5, sampling=DRAWN)
    assert [image.tobytes() for image in one] == [
        model.paint(picture(), mask, "red", seed=seed, sampling=DRAWN)[0].tobytes() for seed in (5, 6, 7)
    ]
    for image in one:
        assert (np.asarray(image)[:8] == np.asarray(model.painting(picture(), mask).picture)[:8]).all()
    for values in ({"candidates": 0}, {"rounds": 2}):
        with pytest.raises(BadInput, match="use 2 candidates or more"):
            model.paint(picture(), mask, **values)
    with pytest.raises(BadInput, match="nothing is painted"):
        model.paint(picture(), mask_of((0, 0, 0, 0)))


def test_an_edit_is_the_answer_to_a_picture_and_an_instruction(model: Chameleon) -> None:
    content = Document((Image(picture((24, 16))), Text("make it blue")))
    for image in model.edit(picture((24, 16)), "make it blue", 2, guidance_scale=1.0, sampling=GREEDY):
        assert image.size == model.tokenizer.fitter.size_of(model.tokenizer.fitter.grid_for((24, 16)))
    if len(model.vocabulary.dialect.grids) == 1:
        document = model.generate(content, format=("image",), image_sampling=GREEDY, max_new_tokens=30)
        assert document.images[0].tobytes() == image.tobytes()  # type: ignore[union-attr]


# --- the verb ---


def test_painting_and_editing_by_command(bundle_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture().save(tmp_path / "p.png")
    mask_of((0, 8, 16, 16)).save(tmp_path / "m.png")
    out, model = str(tmp_path / "o.png"), ["--model", str(bundle_folder), "--dtype", "float32"]
    main(["draw", "red", "--paint", str(tmp_path / "m.png"), "--picture", str(tmp_path / "p.png"), "--out", out, *model])
    (expected,) = Chameleon.load(bundle_folder, dtype="float32").paint(picture(), mask_of((0, 8, 16, 16)), "red")
    assert (np.asarray(PILImage.open(out)) == np.asarray(expected)).all()
    holes = picture().convert("RGBA")
    holes.putalpha(PILImage.fromarray(255 - np.asarray(mask_of((0, 8, 16, 16)))))
    holes.save(tmp_path / "holes.png")
    holed = ["draw", "red", "--paint", str(tmp_path / "holes.png"), "--candidates", "2", "--out", out, *model]
    main([*holed, "--rounds", "2"])
    assert PILImage.open(out).size == (16, 16)
    capsys.readouterr()
    main([*holed, "--num-images", "2", "--seed", "5", "--json"])
    seeds = json.loads(capsys.readouterr().out)["seeds"]
    both = np.asarray(PILImage.open(out))
    main([*holed, "--seed", str(seeds[1])])
    assert (np.asarray(PILImage.open(out)) == both[2:18, 20:36]).all()  # beside the first, each in a frame
    main(["draw", "make it blue", "--edit", str(tmp_path / "p.png"), "--out", out, *model])
    capsys.readouterr()
    for arguments, message in (
        (["red", "--paint", str(tmp_path / "m.png")], "nothing is transparent; give the picture with --picture"),
        (["--edit", str(tmp_path / "p.png")], "give an instruction"),
        (["red", "--candidates", "2"], "--candidates: goes with --paint"),
        (["red", "--vary", "a.png", "--paint", "b.png"], "give --vary or --paint, not both"),
        (["red", "--size", "20"], "'20' is not WIDTHxHEIGHT in pixels"),
        (["red", "--size", "20x20"], "this model draws 16x16"),
        (["red", "--size", "20x20", "--complete", "a.png"], "--complete draws in the picture's own shape"),
    ):
        with pytest.raises(SystemExit) as error:
            main(["draw", *arguments, "--out", out, *model])
        assert error.value.code == 2 and message in capsys.readouterr().err, arguments


# --- the task ---


@pytest.fixture(scope="module")
def made() -> list[Edit]:
    return list(edits(emoji.subset("train", 160), 120, 0, plain_view, "train"))


def test_edits_change_what_they_say_and_nothing_else(made: list[Edit]) -> None:
    pictures: dict[bytes, list[str]] = {}
    for entry in emoji.load("train"):
        pictures.setdefault(entry.picture.tobytes(), []).append(f"{entry.name}, {entry.style}, {entry.skin_tone}")
    kinds = {edit.kind for edit in made}
    assert kinds == {"colour", "tone", "style", "together"}
    for edit in made:
        if edit.kind == "colour":
            assert main_colour(edit.result) == edit.attribute and edit.attribute in edit.instruction
        elif edit.kind == "together":
            left, right = edit.result.crop((0, 16, 32, 48)), edit.result.crop((32, 16, 64, 48))
            for half, whole in zip((left, right), edit.pictures, strict=True):
                small = np.asarray(whole.resize((32, 32), PILImage.Resampling.LANCZOS))
                assert (np.asarray(half) == small).all()
        else:
            assert edit.attribute in edit.instruction
            assert any(edit.attribute in known for known in pictures[edit.result.tobytes()])


def test_combinations_for_evaluation_are_not_in_training(made: list[Edit]) -> None:
    held_out = list(edits(emoji.subset("train", 160), 60, 0, near_view, "validation"))
    trained = {(edit.names, edit.attribute) for edit in made}
    assert held_out and not trained & {(edit.names, edit.attribute) for edit in held_out}
    (example, *_) = conversations("editing", emoji.subset("train", 160), 3, 0)
    question, answer = (message.content for message in example.messages)
    assert question.images and question.text and len(answer.images) == 1 and not answer.text
