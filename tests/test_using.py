"""Using a model: examples, formats, streams, pictures that are ranked, completed and varied, pages."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model
from PIL import Image as PILImage
from rich.console import Console
from rich.text import Text as RichText

from chameleon.bundle import Bundle
from chameleon.cli import main
from chameleon.document import Conversation, Document, Image, Message, Text
from chameleon.document_view import TerminalView, as_html, as_markdown, image_grid
from chameleon.errors import BadInput
from chameleon.generation import chameleon as chameleon_module
from chameleon.generation.chameleon import SCORED_LOGITS, SCORED_TOKENS, Chameleon
from chameleon.generation.request import Request
from chameleon.generation.sampling import Sampling
from chameleon.generation.streaming import PartialImage, StreamDecoder
from chameleon.tokenizers.mixed import MixedTokenizer

DRAWN = Sampling(1.0, 1.0)
SAMPLINGS = {"text_sampling": DRAWN, "image_sampling": DRAWN}


def picture(colour: str) -> PILImage.Image:
    shown = PILImage.new("RGB", (16, 16), colour)
    shown.paste("white", (4, 4, 9, 12))
    return shown


@pytest.fixture
def model(bundle: Bundle) -> Chameleon:
    bundle.model.double()
    return Chameleon(bundle)


def with_prompting(model: Chameleon, prompting: Any) -> Chameleon:
    return Chameleon(Bundle(model.model, model.tokenizer, prompting))


def asked_of(model: Chameleon, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that the model's engine gets from here on."""
    actual: list[Request] = []
    submit = model.engine.submit_all
    monkeypatch.setattr(
        model.engine, "submit_all", lambda requests, *more: (actual.extend(requests), submit(requests, *more))[1]
    )
    return actual


def decoded_by(model: Chameleon, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The codes [B, h, w] that the model's image tokenizer decodes from here on."""
    codes: list[torch.Tensor] = []
    decode = model.tokenizer.image.decode
    monkeypatch.setattr(model.tokenizer.image, "decode", lambda grid, *_: (codes.append(grid), decode(grid))[1])
    return codes


# --- text ---


def test_examples_are_turns_of_a_conversation(tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Chameleon(Bundle(random_model(tokenizer.vocabulary.size, context_length=400), tokenizer, "conversation"))
    actual = asked_of(model, monkeypatch)
    examples = [(picture("red"), "what is it?", "heart"), (picture("blue"), "which style?", "noto")]
    model.answer(picture("green"), "what is it?", examples=examples, max_new_tokens=3)
    turns = []
    for shown, question, answer in examples:
        turns.append(Message("user", Document((Image(shown), Text(question)))))
        turns.append(Message("assistant", Document((Text(answer),))))
    past = model.encode(Conversation(turns)).tolist()
    queries = model.prompts.token_ids(Document((Image(picture("green")), Text("what is it?"))))
    assert actual[0].prompt == (*past, *queries[1:])


def test_examples_are_lines_of_a_document(model: Chameleon, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_prompting(model, "document")
    actual = asked_of(model, monkeypatch)
    caption = model.caption(picture("green"), examples=[(picture("red"), "heart")], max_new_tokens=3)
    expected = Document((Image(picture("red")), Text(" heart\n"), Image(picture("green"))))
    assert actual[0].prompt == tuple(model.encode(expected).tolist()[:-1])
    assert "\n" not in caption


# --- documents ---


def kinds(document: Document) -> str:
    return "".join("t" if isinstance(part, Text) else "i" for part in document.parts)


def test_formats(model: Chameleon) -> None:
    document = Document((Text("orange"),))
    for parts in (("text",), ("image",), ("text", "image", "text"), ("image", "image")):
        options: dict[str, Any] = {"format": parts, "max_new_tokens": 60, "max_text_tokens": 4, **SAMPLINGS}
        output = model.generate(document, **options)
        assert kinds(output) == "".join(part[0] for part in parts), parts
        assert output.complete
    assert "i" not in kinds(model.generate(document, max_images=0, text_sampling=DRAWN, seed=5))
    with pytest.raises(BadInput, match="neither text nor image"):
        model.generate(document, format=("text", "picture"))
    with pytest.raises(BadInput, match="image and image and image take at least 54 tokens, but there is room for 50"):
        model.generate(document, format=("image",) * 3, max_new_tokens=50)


def test_guidance_of_documents_has_the_branches_of_its_form(model: Chameleon) -> None:
    document = Document((Text("a"), Image(picture("red")), Text("b")))
    two, three = model.prompts.guidance(document, 3.0), model.prompts.guidance(document, (1.2, 3.0))
    assert two is not None and two.branches == (model.prompts.token_ids(Document()),)
    assert three is not None
    assert three.branches == (
        model.prompts.token_ids(Document((Image(picture("red")),))),
        model.prompts.token_ids(Document()),
    )
    assert model.prompts.guidance(document, 1) is None
    output = model.generate_batch([document] * 2, format=("image",), guidance_scale=3.0, seeds=[1, 2], image_sampling=DRAWN)
    alone = model.generate(document, format=("image",), guidance_scale=3.0, seed=2, image_sampling=DRAWN)
    assert output[1].images[0].tobytes() == alone.images[0].tobytes()  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_is_what_is_generated(model: Chameleon, seed: int) -> None:
    document = Document((Text("orange"),))
    options: dict[str, Any] = {"max_new_tokens": 60, "max_images": 2, **SAMPLINGS, "seed": seed}
    output = model.generate(document, **options)
    pieces = list(model.stream(document, preview_every_n_rows=1, **options))
    whole = [piece for piece in pieces if not isinstance(piece, PartialImage)]
    assert "".join(part.text for part in whole if isinstance(part, Text)) == output.text
    pictures = [part.image.tobytes() for part in whole if isinstance(part, Image)]  # type: ignore[union-attr]
    assert pictures == [image.tobytes() for image in output.images]  # type: ignore[union-attr]
    forming = [piece for piece in pieces if isinstance(piece, PartialImage)]
    assert [piece.rows for piece in forming] == [1, 2, 3] * len(pictures)
    assert all(piece.image.size == (16, 4 * piece.rows) for piece in forming)


def test_text_streams_in_complete_characters_and_is_not_lost_before_an_image(tokenizer: MixedTokenizer) -> None:
    v = tokenizer.vocabulary
    ids = tokenizer.text_to_ids("aé漢🧑‍🚀")
    assert len(ids) > 8  # bytes of their own
    decoder = StreamDecoder(tokenizer)
    pieces = [list(decoder.push(token)) for token in ids]
    texts = [part.text for part in itertools.chain(*pieces) if isinstance(part, Text)]
    assert "".join(texts) == "aé漢🧑‍🚀" and not any("\ufffd" in text for text in texts)
    assert list(decoder.finish()) == []
    cut = tokenizer.text_to_ids("漢")[:-1]  # a character that ends too early, then a picture
    block = [v.boi, *[v.image_start] * math.prod(v.grid), v.eoi]
    output = [part for token in [*cut, *block] for part in decoder.push(token)]
    assert [type(part) for part in output] == [Text, Image]
    output = [part for token in block[:5] for part in decoder.push(token)]
    assert output == []
    assert "truncated image" in next(decoder.finish()).text  # type: ignore[union-attr]


# --- pictures ---


@pytest.mark.parametrize("limits", [(SCORED_TOKENS, SCORED_LOGITS), (1, 1), (500, 15_000)])
def test_ranking_is_by_the_likelihood_of_the_caption(
    model: Chameleon, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many pictures and logits are held at a time."""
    for name, value in zip(("SCORED_TOKENS", "SCORED_LOGITS"), limits, strict=True):
        monkeypatch.setattr(chameleon_module, name, value)
    shown = [picture(colour) for colour in ("red", "green", "blue", "black")]
    actual = model.caption_log_likelihoods(shown, "orange heart")
    for one, score in zip(shown, actual, strict=True):
        whole = Conversation(
            [Message("user", Document((Image(one),))), Message("assistant", Document((Text("orange heart"),)))]
        )
        ids = model.encode(whole).tolist()
        start = ids.index(model.vocabulary.sep) + 1
        logits = model.model.logits(model.model(torch.tensor([ids])))[0].log_softmax(-1)
        expected = sum(float(logits[place - 1, ids[place]]) for place in range(start, len(ids))) / (len(ids) - start)
        assert math.isclose(score, expected, rel_tol=1e-5)
    order = model.rank(shown, "orange heart")
    assert [actual[place] for place in order] == sorted(actual, reverse=True)
    drawn = model.draw_samples("heart", 4, sampling=DRAWN)
    ranked = model.draw_samples("heart", 4, sampling=DRAWN, ranked=True)
    assert [one.tobytes() for one in ranked] == [drawn[place].tobytes() for place in model.rank(drawn, "heart")]
    assert drawn[2].tobytes() == model.draw("heart", seed=2, sampling=DRAWN).tobytes()


def test_completing_keeps_the_upper_part(model: Chameleon, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = decoded_by(model, monkeypatch)
    shown = picture("red")
    whole = model.vocabulary.ids_to_codes(torch.tensor(model.encode_picture(shown).code_ids)).view(4, 4)
    for guidance in (1.0, 2.0):
        output = model.complete(shown, keep=0.6, prompt="heart", num_images=3, sampling=DRAWN, guidance_scale=guidance)
        assert len(output) == 3
        grids = codes.pop()
        assert all(torch.equal(grid[:2], whole[:2]) for grid in grids)
        assert len({tuple(grid[2:].flatten().tolist()) for grid in grids}) == 3
    with pytest.raises(BadInput, match="between 0 and 1"):
        model.complete(shown, keep=1.0)


def test_variations_keep_a_share_of_the_codes(model: Chameleon, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = decoded_by(model, monkeypatch)
    shown = picture("red")
    whole = model.vocabulary.ids_to_codes(torch.tensor(model.encode_picture(shown).code_ids)).view(4, 4)
    model.variations(shown, 20, keep=0.5, prompt="heart", sampling=DRAWN)
    same = (codes.pop() == whole).double()
    assert 0.35 < float(same.mean()) < 0.75
    model.variations(shown, 2, keep=1.0, sampling=DRAWN)
    assert torch.equal(codes.pop(), whole.expand(2, -1, -1))
    model.variations(shown, 2, keep=0.0, prompt="heart", sampling=DRAWN, guidance_scale=1.0)
    drawn = codes.pop()
    model.draw_batch(["heart"] * 2, sampling=DRAWN, guidance_scale=1.0)
    assert torch.equal(drawn, codes.pop())


def test_grids() -> None:
    one = [PILImage.new("RGB", (8, 8), (n, 0, 0)) for n in range(5)]
    assert image_grid(one[:1]) is one[0]
    grid = image_grid(one)
    assert grid.size == (3 * 10 + 2, 2 * 10 + 2)
    assert [grid.getpixel((2 + 10 * (n % 3), 2 + 10 * (n // 3))) for n in range(5)] == [(n, 0, 0) for n in range(5)]


# --- for people ---


def test_a_terminal_shows_text_and_pictures_as_they_form() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    view = TerminalView(console, lambda image: RichText(f"<{image.height} high>"))
    for part in (
        Text("a [b] "),
        PartialImage(picture("red").crop((0, 0, 16, 4)), 1, (16, 16)),
        Image(picture("red")),
        Text("after"),
    ):
        view.show(part)
    view.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "a [b] " in shown and "<4 high>" in shown and "<16 high>" in shown and shown.rstrip().endswith("after")
    out = io.StringIO()
    view = TerminalView(Console(file=out))  # no terminal
    for part in (Text("a\tb"), PartialImage(picture("red"), 1, (16, 16)), Image(picture("red")), Image(Path("p.png"))):
        view.show(part)
    assert out.getvalue() == "a\tb[image][image p.png]"


def test_pages() -> None:
    parts = (Text("a <b>"), Image(picture("red")), Text("c"))
    assert as_markdown(parts, ["p.png"]) == "a <b>\n\n![image](p.png)\n\nc\n"
    page = as_html(parts, ["p.png"])
    assert "a &lt;b&gt;" in page and '<img src="p.png"' in page


def test_commands_of_documents_and_pictures(
    bundle_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture("red").save("p.png")
    Path("d.json").write_text('{"parts": [{"type": "text", "text": "orange"}]}')
    model = ["--model", str(bundle_folder), "--dtype", "float32"]
    output = ["--format", "text,image", "--max-new-tokens", "40", *model]
    main(["generate", "d.json", "--out", "page", "--page", "html", *output])
    shown = capsys.readouterr()
    assert "[image]" in shown.out and "page/document.html" in shown.err
    assert PILImage.open("page/image-0.png").size == (16, 16)
    assert 'src="image-0.png"' in Path("page/document.html").read_text()
    main(["generate", "d.json", "--out", "page", "--guidance-scale", "2", "--draft-length", "3", "--json", *output])
    text, image = json.loads(capsys.readouterr().out)["parts"]
    assert (text["type"], image) == ("text", {"type": "image", "image": "page/image-0.png"})
    assert "![image](image-0.png)" in Path("page/document.md").read_text()
    main(["draw", "heart", "--out", "n.png", "--num-images", "5", "--best", "4", "--json", *model])
    assert len(set(json.loads(capsys.readouterr().out)["seeds"])) == 4
    assert PILImage.open("n.png").size == (2 * 18 + 2, 2 * 18 + 2)
    main(["draw", "--vary", "p.png", "--out", "l.png", *model])
    main(["draw", "--complete", "p.png", "--keep", "0.25", "--out", "c.png", *model])
    assert PILImage.open("c.png").size == (16, 16)
    main(["caption", "p.png", "--example", "p.png", "heart", "--max-new-tokens", "2", *model])
    main(["answer", "p.png", "what?", "--example", "p.png", "what?", "heart", "--max-new-tokens", "2", *model])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["draw", "--out", "o.png"], "nothing to draw; give a prompt"),
        (["draw", "a", "--out", "o.png", "--num-images", "0"], "expected 1 or more"),
        (["draw", "a", "--out", "o.png", "--best", "2"], "expected 1 to 1"),
        (["generate", "d.json", "--out", "p.png"], "p.png"),
        (["draw", "--vary", "p.png", "--complete", "p.png", "--out", "o.png"], "not both"),
        (["draw", "--vary", "none.png", "--out", "o.png"], "no such image"),
        (["draw", "--complete", "p.png", "--keep", "2", "--out", "o.png"], "between 0 and 1"),
        (["draw", "a", "--out", "o.png", "--seed", "-1"], "seed: -1 is out of range"),
        (["draw", "a", "--out", "o.png", "--temperature", "-1"], "temperature: -1.0 must be 0"),
        (["draw", "a", "--out", "o.png", "--weight-format", "int3"], "no weight format 'int3'"),
        (["draw", "a", "--out", "o.png", "--draft-length", "0"], "use 1 or more"),
        (["generate", "d.json", "--page", "pdf"], "use markdown or html"),
        (["generate", "d.json", "--format", "text,video"], "neither text nor image"),
        (["generate", "d.json", "--guidance-scale", "1", "2", "3"], "--guidance-scale: expected one scale"),
        (["generate", "d.json", "--max-images", "0", "--guidance-scale", "2"], "none is to be generated"),
        (["generate", "d.json", "--max-new-tokens", "0"], "max_new_tokens 0"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    bundle_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    picture("red").save("p.png")
    Path("d.json").write_text('{"parts": [{"type": "text", "text": "orange"}]}')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--model", str(bundle_folder), "--dtype", "float32"])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and message in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert sorted(tmp_path.iterdir()) == before


def test_empty_batches(model: Chameleon) -> None:
    assert model.draw_batch([]) == model.draw_samples("a", 0) == model.rank([], "a") == model.caption_batch([]) == []


def test_changed_weights_are_noticed(model: Chameleon) -> None:
    document = Document((Text("orange"),))
    before = model.generate(document, max_images=0)
    with torch.no_grad():
        for block in model.model.blocks:
            block.attention.qkv.weight.mul_(-1)  # type: ignore[union-attr]
    after = model.generate(document, max_images=0)
    assert after != before
    flipped = model.model.head.weight.flip(0)
    with torch.no_grad():
        model.model.head.weight.copy_(flipped)
    after = model.generate(document, max_images=0)
    assert Chameleon(model.bundle).generate(document, max_images=0) == after
