"""Dialects of pictures, against what Lumina-mGPT's released code does (facts in prose, read anew) and by properties."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from chameleon.bundle import Bundle, GenerationConfig, read_header
from chameleon.data.index import RowIndex
from chameleon.data.token_shards import open_shards, write_shard
from chameleon.data.tokenize import TokenizeOptions, tokenize
from chameleon.dialect import Grid, ImageCursor, ShapeConfig, SizedDialect
from chameleon.document import Conversation, Document, Image, Message, Text
from chameleon.errors import BadInput
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.constraints import OutputConstraints, OutputState
from chameleon.generation.engine import Engine
from chameleon.generation.guidance import image_only
from chameleon.generation.request import Request
from chameleon.generation.sampling import GREEDY, Sampling
from chameleon.generation.streaming import CodeBlock, PartialImage, StreamDecoder
from chameleon.tokenizers.fitting import PictureFitter, fit_cover, nearest_shape
from chameleon.tokenizers.mixed import MixedTokenizer, answer_mask, write_shapes
from chameleon.train.recipe import FinetuneRecipe, read_recipe
from chameleon.vocabulary import Vocabulary

LUMINA = {  # target side in pixels: candidates, the widest and the tallest (w, h), ids of a picture: least, most, square
    512: (49, (1024, 256), (256, 1024), 916, 1092, 1060),
    768: (73, (1536, 384), (384, 1536), 2140, 2404, 2356),
    1024: (97, (2048, 512), (512, 2048), 3846, 4228, 4164),
}


def lumina(target_side: int) -> SizedDialect:
    """The dialect of the released models: cells of 32 pixels, 2 × 2 codes each, ids as in Meta's text_tokenizer.json."""
    return SizedDialect(row_end=8803, size_ids=((8805, 64),), unit=2, target=target_side // 32)


def small(target: int = 4, unit: int = 1) -> Vocabulary:
    return Vocabulary.build(image_codes=5, text_pieces=6, grid=(4, 4), shapes=ShapeConfig(target, unit))


# --- grids ---


@pytest.mark.parametrize("target_side", LUMINA)
def test_candidate_sizes_are_those_of_the_released_models(target_side: int) -> None:
    count, widest, tallest, least, most, square = LUMINA[target_side]
    dialect = lumina(target_side)
    sizes = [(width * 16, height * 16) for height, width in dialect.grids]
    assert len(sizes) == len(set(sizes)) == count
    assert (sizes[0], sizes[-1]) == (widest, tallest)
    assert (dialect.min_length, dialect.max_length, dialect.length(dialect.grid)) == (least, most, square)
    for width, height in sizes:
        assert max(width, height) <= 4 * min(width, height) and width * height <= target_side**2


def test_a_picture_of_the_released_models_id_for_id() -> None:
    """1920 × 1080 at target 512 is 672 × 384: 12 and 21 cells, 24 rows of 42 codes and a row end each, 1036 ids."""
    dialect = lumina(512)
    fitter = PictureFitter(dialect, reduction=16)
    grid = fitter.grid_for((1920, 1080))
    assert fitter.size_of(grid) == (672, 384)
    block = [8197, *dialect.body(grid), 8196]
    assert block[:3] == [8197, 8816, 8825]
    assert block[3:] == [*([-1] * 42 + [8803]) * 24, 8196]
    assert len(block) == dialect.length(grid) == 1036
    assert dialect.header((32, 32)) == (8820, 8820)
    assert lumina(1024).header((128, 128)) == (8868, 8868)


@pytest.mark.parametrize(("target_side", "ratios"), [(512, ((672, 384), (576, 448), (608, 416)))])
def test_usual_ratios_get_the_shapes_of_the_released_models(target_side: int, ratios: tuple[tuple[int, int], ...]) -> None:
    fitter = PictureFitter(lumina(target_side), reduction=16)
    found = [fitter.size_of(fitter.grid_for(size)) for size in ((1600, 900), (1600, 1200), (1500, 1000))]
    assert found == list(ratios)


@settings(max_examples=200)
@given(width=st.integers(260, 4000), height=st.integers(260, 4000))
def test_the_nearest_shape_keeps_the_most_of_a_picture(width: int, height: int) -> None:
    """By the share of the picture's area that a crop shows, in exact arithmetic."""
    sizes = [(w * 16, h * 16) for h, w in lumina(512).grids]

    def shown(size: tuple[int, int]) -> tuple[int, int]:
        w, h = size  # scaled to cover, it shows min(w·H, h·W) / max(w·H, h·W) of the picture
        return min(w * height, h * width), max(w * height, h * width)

    part, whole = shown(nearest_shape((width, height), sizes))
    assert all(part * other_whole >= other_part * whole for other_part, other_whole in map(shown, sizes))


def test_fitting_by_hand() -> None:
    """Halved while twice as large, then scaled to cover by a bicubic filter, then cropped, step by step."""
    rng = np.random.default_rng(0)
    picture = PILImage.fromarray(rng.integers(0, 256, (131, 300, 3), dtype=np.uint8))
    halved = picture.resize((150, 65), PILImage.Resampling.BOX).resize((75, 32), PILImage.Resampling.BOX)
    scaled = halved.resize((75, 32), PILImage.Resampling.BICUBIC)
    assert fit_cover(picture, (48, 32)).tobytes() == scaled.crop((13, 0, 61, 32)).tobytes()
    assert fit_cover(picture, (48, 32), (0.0, 0.0)).tobytes() == scaled.crop((0, 0, 48, 32)).tobytes()
    assert fit_cover(picture, (48, 32), (1.0, 1.0)).tobytes() == scaled.crop((27, 0, 75, 32)).tobytes()
    enlarged = picture.resize((366, 160), PILImage.Resampling.BICUBIC)
    assert fit_cover(picture, (160, 160)).tobytes() == enlarged.crop((103, 0, 263, 160)).tobytes()
    same = picture.crop((0, 0, 48, 32))
    assert fit_cover(same, (48, 32)) is same


def test_orientation_and_transparency_come_before_the_shape(sized_tokenizer: MixedTokenizer, tmp_path: Path) -> None:
    """A picture that its EXIF data turns is as tall as it is seen; what is transparent is white."""
    wide = PILImage.new("RGBA", (60, 20), (0, 0, 0, 0))
    exif = PILImage.Exif()
    exif[0x0112] = 6  # turned by a quarter
    wide.save(tmp_path / "turned.png", exif=exif)
    prepared = sized_tokenizer.preparer.prepare(Document((Image(tmp_path / "turned.png"),)))
    (pixels,) = prepared.pictures
    assert pixels.shape[0] > 2 * pixels.shape[1]
    assert (pixels == 255).all()


def test_other_shapes_and_sizes(sized_tokenizer: MixedTokenizer, tokenizer: MixedTokenizer) -> None:
    fitter = sized_tokenizer.fitter
    assert fitter.grid_of_size((20, 12)) == (3, 5)
    for size in ((21, 12), (20, 400), (0, 4)):
        with pytest.raises(BadInput, match="multiples of 4 up to 32 pixels"):
            fitter.grid_of_size(size)
    with pytest.raises(BadInput, match="this model draws 16x16"):
        tokenizer.fitter.grid_of_size((20, 12))
    wide = fitter.with_shapes(24, 1.5)
    assert wide.grid_for((100, 100)) == (6, 6) and wide.grid_for((900, 100)) != fitter.grid_for((900, 100))
    with pytest.raises(BadInput, match="squares of one size"):
        tokenizer.fitter.with_shapes(24, None)
    with pytest.raises(BadInput, match="sides are multiples of 4 up to 32 pixels"):
        fitter.with_shapes(2, None)


# --- pictures in sequences ---


@pytest.mark.parametrize("target_side", LUMINA)
def test_every_shape_of_the_released_models_round_trips(target_side: int) -> None:
    """Through the ids of a vocabulary, the cursor that generation follows, and the lengths that packing reads."""
    dialect = lumina(target_side)
    base = Vocabulary(1, 0, 2, 8197, 8196, 8710, ((4, 8192),), ((16_384, 100),), 65_536, dialect, 8710)
    vocabulary = Vocabulary.from_json(base.to_json())
    assert vocabulary == base
    rng = random.Random(0)
    for grid in dialect.grids:
        codes = [rng.randrange(4, 8196) for _ in range(math.prod(grid))]
        block = [*vocabulary.started_image(codes, grid), 8803, 8196]
        image = vocabulary.read_image([0, *block, 9], 1)
        assert image is not None and (image.grid, image.length, image.code_ids) == (grid, len(block), codes)
        assert vocabulary.read_image(block[:-1]) is None
        cursor = ImageCursor(dialect)
        for token_id in block[1:-1]:
            assert cursor.is_row_end() == (token_id == 8803)
            cursor.push(token_id)
        assert cursor.is_valid and cursor.grid == grid and (cursor.codes_left, cursor.tokens_left) == (0, 1)
        assert dialect.lengths_of_headers(np.array([block[1:3], [8803, 8803]])).tolist() == [len(block), 0]


def test_documents_with_every_shape_round_trip(sized_tokenizer: MixedTokenizer) -> None:
    v = sized_tokenizer.vocabulary
    grids = {sized_tokenizer.fitter.size_of(grid): grid for grid in v.dialect.grids}
    rng = np.random.default_rng(0)
    pictures = [PILImage.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in grids]
    document = Document([part for picture in pictures for part in (Text("shape "), Image(picture))])
    token_ids = sized_tokenizer.encode(document)
    decoded = sized_tokenizer.decode(token_ids)
    assert decoded.complete
    assert [part.text for part in decoded.parts if isinstance(part, Text)] == ["shape "] * len(grids)
    assert [image.size for image in decoded.images] == list(grids)  # type: ignore[union-attr]
    # The codes are those of the picture alone.
    blocks = [v.read_image(token_ids.tolist(), place) for place in (token_ids == v.boi).nonzero().flatten().tolist()]
    for picture, block in zip(pictures, blocks, strict=True):
        assert block is not None
        (codes,) = sized_tokenizer.image.encode_arrays([np.asarray(picture)])
        assert torch.equal(v.image_codes(block), codes)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 10**6), max_size=60))
def test_malformed_sequences_decode_to_something(sized_tokenizer: MixedTokenizer, choices: list[int]) -> None:
    """Tokens of images in any order: most often the start of an image, its sizes, codes and row ends."""
    v = sized_tokenizer.vocabulary
    kinds = [[v.boi], [v.eoi], list(v.dialect.specials.values()), v.image_ids.order, v.text_ids.order[200:], [v.eos, v.sep]]
    token_ids = [kinds[choice % 6][choice // 6 % len(kinds[choice % 6])] for choice in choices]
    document = sized_tokenizer.decode(token_ids)
    assert isinstance(document.text, str)
    decoder = StreamDecoder(sized_tokenizer, preview_every_n_rows=1)
    streamed = [part for token_id in token_ids for part in decoder.push(token_id)] + list(decoder.finish())
    whole = [part.image.size for part in streamed if isinstance(part, Image)]  # type: ignore[union-attr]
    assert len(whole) <= token_ids.count(v.boi)


def test_an_image_with_another_token_for_a_code_has_no_previews(sized_tokenizer: MixedTokenizer) -> None:
    """And one that starts anew inside another shows its own rows alone."""
    v = sized_tokenizer.vocabulary
    grid = (2, 3)
    codes = [v.image_start + index for index in range(6)]
    block = list(v.started_image(codes, grid))
    first_row = codes[:3]

    def previews(token_ids: list[int]) -> list[list[int]]:
        decoder = StreamDecoder(sized_tokenizer, preview_every_n_rows=1)
        items = [item for token_id in token_ids for item in decoder.push_undecoded(token_id)]
        return [v.codes_to_ids(item.codes[0]).tolist() for item in items if isinstance(item, CodeBlock)]

    assert previews(block) == [first_row]
    broken = block.copy()
    broken[block.index(codes[1])] = block[1]  # a size token
    assert previews(broken) == []
    assert previews([*block[: block.index(codes[1])], *block]) == [first_row]
    assert previews([*broken, *block]) == [first_row]


@settings(max_examples=100)
@given(grid_index=st.integers(0, 10**6), cut=st.integers(0, 10**6), change=st.integers(0, 10**6))
def test_an_image_with_one_wrong_token_is_not_whole(
    sized_tokenizer: MixedTokenizer, grid_index: int, cut: int, change: int
) -> None:
    v = sized_tokenizer.vocabulary
    grid = v.dialect.grids[grid_index % len(v.dialect.grids)]
    assert v.dialect.row_end is not None
    block = [*v.started_image([v.image_start] * math.prod(grid), grid), v.dialect.row_end, v.eoi]
    assert sized_tokenizer.decode(block).complete
    place, wrong = 1 + cut % (len(block) - 3), change % v.size  # without the last two an image is shown all the same
    is_same_kind = block[place] == wrong or (block[place] in v.image_ids and wrong in v.image_ids)
    block[place] = wrong
    assert sized_tokenizer.decode(block).complete == is_same_kind


# --- what may be generated ---


def whole_images(token_ids: list[int], v: Vocabulary) -> list[Grid] | None:
    """The grids of the images in a sequence, by a plain reading; None where one is not whole."""
    grids, rest = [], list(token_ids)
    while rest:
        if rest[0] != v.boi:
            if rest.pop(0) not in v.text_ids:
                return None
            continue
        sizes = v.dialect.specials
        height, width = (next(n for n in range(1, 99) if sizes.get(f"size_{n}") == token_id) for token_id in rest[1:3])
        rows, rest = rest[3 : 3 + height * (width + 1)], rest[3 + height * (width + 1) :]
        for row in range(height):
            codes = rows[row * (width + 1) :][: width + 1]
            if codes[-1] != sizes["row_end"] or not all(code in v.image_ids for code in codes[:-1]):
                return None
        if not rest or rest.pop(0) != v.eoi:
            return None
        grids.append((height, width))
    return grids


@settings(max_examples=200)
@given(
    max_new_tokens=st.integers(1, 90),
    max_images=st.integers(0, 3),
    ends_with_image=st.booleans(),
    choices=st.lists(st.integers(0, 10**6), min_size=100, max_size=100),
)
def test_any_choice_of_allowed_tokens_gives_whole_images(
    max_new_tokens: int, max_images: int, ends_with_image: bool, choices: list[int]
) -> None:
    v = small()
    constraints = OutputConstraints(max_new_tokens, max_images)
    if ends_with_image:
        room = max(max_new_tokens, 2 * v.dialect.min_length + 1)
        constraints = OutputConstraints(room, format=("image", "text", "image"))
    state, output = OutputState(constraints, v, [v.bos]), list[int]()
    for choice in choices:
        if state.is_exhausted:
            break
        token_id = state.forced_token()
        if token_id is None:
            options = v.text_ids.order + ([v.boi] if state.allowed_next() & 2 else [])
            options += [v.eos] if state.allowed_next() & 4 else []
            if state.image is not None:
                options = state.image.next_sizes() if state.image.in_header else v.image_ids.order
            token_id = options[choice % len(options)]
        if token_id == v.eos:
            break
        output.append(token_id)
        state.append(token_id)
    grids = whole_images(output, v)
    assert grids is not None and len(output) <= constraints.max_new_tokens
    assert set(grids) <= set(v.dialect.grids) and len(grids) <= max(2, max_images)
    assert not ends_with_image or len(grids) == 2


def plain_loop(model: Chameleon, prompt: list[int], scale: float, cell: int = 1) -> list[int]:
    """Draw one image greedily in the manner of Lumina-mGPT's released loop, which counts the ids since the last boi.

    n ids after the two sizes, W codes a row, H rows: n mod (W + 1) = W is a row end, n = H · (W + 1) the end, else a code.
    The unconditional context is the image alone: boi, sizes and codes so far, its own positions from 0. cell: codes of a
    cell's side, which sizes count.
    """
    v, ids = model.vocabulary, list(prompt)
    units = {token_id: cell * int(name[5:]) for name, token_id in v.dialect.specials.items() if name.startswith("size_")}
    start = ids.index(v.boi)
    width, height = units[ids[start + 2]], units[ids[start + 1]]
    row_end = v.dialect.specials["row_end"]
    while ids[-1] != v.eoi:
        count = len(ids) - start - 3
        if count == height * (width + 1):
            ids.append(v.eoi)
        elif count % (width + 1) == width:
            ids.append(row_end)
        else:
            full, alone = (model.logits(torch.tensor([context]))[0, -1] for context in (ids, ids[start:]))
            logits = alone + scale * (full - alone)
            mask = torch.full_like(logits, -torch.inf)
            mask[v.image_start : v.image_start + v.num_image_codes] = 0
            ids.append(int((logits + mask).argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def model(sized_tokenizer: MixedTokenizer) -> Chameleon:
    """Which stops at `sep`, as Lumina's models do."""
    v = replace(sized_tokenizer.vocabulary, answer_end=sized_tokenizer.vocabulary.sep)
    tokenizer = MixedTokenizer(sized_tokenizer.text, sized_tokenizer.image, v)
    return Chameleon(Bundle(random_model(v.size, context_length=160).double(), tokenizer, "conversation"))


@pytest.mark.parametrize("draft_length", [1, 5])
def test_a_drawn_picture_is_that_of_a_plain_loop(model: Chameleon, draft_length: int) -> None:
    v = model.vocabulary
    engine = Engine(model.model, v, draft_length=draft_length)
    requests, expected = [], []
    for number, grid in enumerate(v.dialect.grids):
        prompt = [v.bos, v.text_start + number, v.sep]
        constraints = OutputConstraints(v.dialect.length(grid), format=("image",), grid=grid)
        requests.append(Request(tuple(prompt), constraints, GREEDY, GREEDY, image_only(v.boi, 3.0)))
        started = [v.boi, *v.dialect.header(grid)]
        expected.append([*started, *plain_loop(model, [*prompt, *started], 3.0)])
    assert engine.generate(requests) == expected
    assert len({tuple(ids) for ids in expected}) == len(expected)
    for request, ids in zip(requests, expected, strict=True):
        assert engine.generate([request]) == [ids]


@pytest.mark.parametrize("guided", [False, True])
def test_row_ends_take_no_pass_and_no_look(model: Chameleon, guided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass for the prompt and one for each code but the last; the host looks once."""
    v, engine, looks = model.vocabulary, Engine(model.model, model.vocabulary), list[int]()
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (looks.append(self.numel()), tolist(self))[1])
    for grid in ((4, 4), (2, 8), (8, 2)):
        looks.clear()
        engine.decoder.num_forward_passes = 0
        constraints = OutputConstraints(v.dialect.length(grid), format=("image",), grid=grid)
        guidance = image_only(v.boi, 3.0) if guided else None
        (output,) = engine.generate([Request((v.bos, v.text_start, v.sep), constraints, guidance=guidance)])
        assert len(output) == v.dialect.length(grid)
        assert engine.decoder.num_forward_passes == 16 and looks == [16]


def test_answers_end_with_sep(model: Chameleon) -> None:
    """Generation stops there; in training it belongs to the answer, and the next question follows it at once."""
    v = model.vocabulary
    request = Request((v.bos, v.text_start, v.sep), OutputConstraints(20), GREEDY)
    (before,) = model.engine.generate([request])
    model.model.head.weight[v.sep] = 3 * model.model.head.weight[before[3]]
    (after,) = model.engine.generate([request])
    assert len(before) == 20 and after == before[:3]
    turns = [("user", "red"), ("assistant", "blue"), ("user", "or"), ("assistant", "green")]
    messages = [Message(role, Document((Text(text),))) for role, text in turns]  # type: ignore[arg-type]
    token_ids = model.encode(Conversation(messages)).numpy()
    question, answer, second, last = (model.tokenizer.text_to_ids(text) for _, text in turns)
    assert token_ids.tolist() == [v.bos, *question, v.sep, *answer, v.sep, *second, v.sep, *last, v.sep]
    expected = [0] * (2 + len(question)) + [1] * (1 + len(answer)) + [0] * (1 + len(second)) + [1] * (1 + len(last))
    assert answer_mask(token_ids, v).tolist() == [bool(value) for value in expected]


# --- painting, streaming ---


def test_pictures_of_any_shape_are_completed_varied_and_painted(model: Chameleon) -> None:
    picture = PILImage.radial_gradient("L").convert("RGB").resize((100, 60))
    size = model.tokenizer.fitter.size_of(model.tokenizer.fitter.grid_for(picture.size))
    assert size == (20, 12)
    for scale in (1.0, 2.0):
        assert [image.size for image in model.complete(picture, num_images=2, guidance_scale=scale)] == [size] * 2
        assert model.variations(picture, 1, prompt="red", guidance_scale=scale)[0].size == size
    mask = PILImage.new("L", picture.size)
    mask.paste(255, (50, 30, 100, 60))
    (painted,) = model.paint(picture, mask, "red")
    kept = np.asarray(model.painting(picture, mask).picture)
    assert painted.size == size
    assert (np.asarray(painted)[:5, :9] == kept[:5, :9]).all() and (np.asarray(painted) != kept).any()
    assert model.draw("red", size=(32, 8)).size == (32, 8)
    with pytest.raises(BadInput, match="size: 30x8"):
        model.draw("red", size=(30, 8))


def test_streams_show_rows_of_any_shape(model: Chameleon) -> None:
    parts = list(model.stream(Document((Text("red"),)), format=("image", "text"), preview_every_n_rows=1))
    partial = [part for part in parts if isinstance(part, PartialImage)]
    (whole,) = (part.image for part in parts if isinstance(part, Image))
    assert isinstance(whole, PILImage.Image)
    rows = whole.height // 4
    assert [part.rows for part in partial] == list(range(1, rows))
    assert [part.image.size for part in partial] == [(whole.width, 4 * part.rows) for part in partial]


# --- shards ---


def test_packing_never_parts_a_picture_of_any_shape(tmp_path: Path) -> None:
    v, rng = small(), random.Random(1)
    assert v.dialect.row_end is not None
    with write_shard(tmp_path / "s", "print", v) as writer:
        for _ in range(200):
            token_ids = [v.bos]
            for _ in range(rng.randint(1, 6)):
                grid = rng.choice(v.dialect.grids)
                token_ids += [*v.started_image([v.image_start] * math.prod(grid), grid), v.dialect.row_end, v.eoi]
                token_ids += [v.text_start] * rng.randint(0, 20)
            writer.add(torch.tensor([*token_ids, v.eos]))
    (shard,) = open_shards(tmp_path)
    lengths = shard.image_lengths(v)
    assert set(lengths.tolist()) == {v.dialect.length(grid) for grid in v.dialect.grids}
    index = RowIndex([shard], 48, v)
    assert index.fill > 0.8
    for row in range(len(index)):
        for document, start, size in index[row]:
            read = shard.read(document, start + 1, start + size + 1).tolist()
            assert read.count(v.boi) == read.count(v.eoi)


def test_tokenizing_to_other_shapes(sized_tokenizer: MixedTokenizer, tokenizer: MixedTokenizer, tmp_path: Path) -> None:
    """By `target_side` and `max_ratio`; views show other parts of a picture in the same shape."""
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(((90, 30), (40, 40), (20, 100))):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        PILImage.fromarray(pixels).save(tmp_path / f"{number}.png")
    lines = "\n".join(json.dumps({"image": f"{number}.png", "caption": "x"}) for number in range(3))
    (tmp_path / "a.jsonl").write_text(lines)

    def grids(**options: Any) -> list[Grid]:
        made = TokenizeOptions(**options)
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        tokenize([str(tmp_path / "a.jsonl")], sized_tokenizer, out, options=made)
        (shard,) = open_shards(out, sized_tokenizer.fingerprint)
        found = []
        for index in range(len(shard)):
            views = [shard.read(index, variant=variant).tolist() for variant in range(made.variants)]
            blocks = [sized_tokenizer.vocabulary.read_image(view, 1) for view in views]
            assert len({block.grid for block in blocks if block is not None}) == 1
            assert made.variants == 1 or len({tuple(block.code_ids) for block in blocks if block is not None}) > 1
            assert blocks[0] is not None
            found.append(blocks[0].grid)
        return found

    wide, square, tall = grids()
    assert square == (4, 4) and wide[1] >= 2.5 * wide[0] and tall[0] >= 3 * tall[1]
    assert grids(variants=3) == [wide, square, tall]
    assert grids(target_side=24)[1] == (6, 6)
    assert all(max(grid) <= 1.5 * min(grid) for grid in grids(max_ratio=1.5))
    with pytest.raises(BadInput, match="squares of one size"):
        tokenize([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "no", options=TokenizeOptions(target_side=24))
    assert not (tmp_path / "no").exists()
    # What has no such option keeps the identity of its shards.
    assert (
        "target_side" not in TokenizeOptions().to_json() and TokenizeOptions(target_side=24).to_json()["target_side"] == 24
    )


def test_a_folder_of_tokenizers_tells_the_shapes(sized_tokenizer: MixedTokenizer, tmp_path: Path) -> None:
    sized_tokenizer.text.save(tmp_path)
    sized_tokenizer.image.save(tmp_path)
    assert MixedTokenizer.load(tmp_path).vocabulary.dialect.grids == ((4, 4),)
    write_shapes(tmp_path, ShapeConfig(target=4))
    loaded = MixedTokenizer.load(tmp_path)
    assert loaded.vocabulary == sized_tokenizer.vocabulary and loaded.fingerprint == sized_tokenizer.fingerprint
    write_shapes(tmp_path, None)
    assert MixedTokenizer.load(tmp_path).vocabulary.dialect.grids == ((4, 4),)
    (tmp_path / "shapes.json").write_text('{"target": 0}')
    with pytest.raises(BadInput, match="target 0"):
        MixedTokenizer.load(tmp_path)


def test_bundles_keep_the_dialect_and_how_the_model_is_asked(model: Chameleon, tmp_path: Path) -> None:
    asked = GenerationConfig(sized_draw_prompt="{prompt}, {width}x{height}", guidance_scale=2.0, unconditional="image_only")
    replace(model.bundle, generation=asked).save(tmp_path / "b")
    loaded = Chameleon.load(tmp_path / "b")
    assert loaded.vocabulary == model.vocabulary and loaded.bundle.generation == asked
    assert loaded.guidance_scale == 2.0 and loaded.prompts.guidance(Document(), 2.0) == image_only(
        loaded.vocabulary.boi, 2.0
    )
    assert loaded.prompts.draw_document("{width}", (3, 5)).text == "{width}, 20x12"
    assert loaded.prompts.draw_document("red", None).text == "red"
    sizes = {loaded.draw("red", seed=seed, sampling=Sampling(3.0, 1.0)).size for seed in range(6)}
    assert sizes <= {loaded.tokenizer.fitter.size_of(grid) for grid in loaded.vocabulary.dialect.grids} and len(sizes) > 1
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    for key, value, message in (
        ("generation", {"draw": "x"}, "how the model is asked"),
        ("vocabulary", {**config["vocabulary"], "answer_end": 3}, "neither eos nor sep"),
        ("vocabulary", {**config["vocabulary"], "grid": [4, 4]}, "either grid or dialect"),
    ):
        path = tmp_path / "c" / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**config, key: value}))
        (path.parent / "provenance.json").write_text("{}")
        with pytest.raises(BadInput, match=message):
            read_header(path.parent, verify=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draw_prompt": "{question}"}, r"generation\.draw_prompt: \{question\} is none of prompt, width, height"),
        ({"caption_prompt": "{prompt}"}, r"generation\.caption_prompt"),
        ({"unconditional": "nothing"}, "neither empty_prompt nor image_only"),
        ({"image_sampling": {"topk": 3}}, r"generation\.image_sampling: topk is none of temperature"),
        ({"max_new_tokens": 0}, "expected 1 or more"),
    ],
)
def test_how_a_model_is_asked_is_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        GenerationConfig(**fields)


def test_a_recipe_says_how_the_model_is_asked() -> None:
    recipe = read_recipe(FinetuneRecipe, "shapes-finetune", ["generation.image_sampling={temperature: 1, top_k: 200}"])
    assert recipe.generation is not None
    assert recipe.generation.sized_draw_prompt == "{prompt}, {width}x{height}"
    assert Sampling(**recipe.generation.image_sampling or {}) == Sampling(1.0, 0.9, 200)
    assert type((recipe.generation.image_sampling or {})["top_k"]) is int


@pytest.mark.parametrize("missing", [1, 2])
def test_an_image_with_all_its_codes_is_shown_though_its_end_is_missing(
    sized_tokenizer: MixedTokenizer, tokenizer: MixedTokenizer, missing: int
) -> None:
    for of in (sized_tokenizer, tokenizer):
        v = of.vocabulary
        block = [*v.started_image([v.image_start] * 16, (4, 4)), *v.dialect.body((4, 4))[-1:], v.eoi]
        tail = [token_id for token_id in block[-2:] if token_id not in v.image_ids and token_id >= 0]
        document = of.decode(block[: len(block) - min(missing, len(tail))])
        assert document.complete and len(document.images) == 1


def test_prompts_that_end_in_an_image(model: Chameleon) -> None:
    """Tokens that no image has there, sizes that nothing has, and no room are told apart."""
    v = model.vocabulary
    height = v.dialect.header((4, 4))[0]
    for tokens, room, message in (
        ((v.text_start,), 60, "its tokens are not those of one"),
        ((height, v.image_start), 60, "its tokens are not those of one"),
        ((*v.dialect.header((4, 4)), v.text_start), 60, "its tokens are not those of one"),
        ((height,), 5, "for which there is no room"),
    ):
        with pytest.raises(BadInput, match=message):
            model.engine.generate([Request((v.bos, v.boi, *tokens), OutputConstraints(room))])
    short = OutputConstraints(20, format=(), grid=(8, 2))
    with pytest.raises(BadInput, match="the rest of an image take at least 27 tokens"):
        model.engine.generate([Request((v.bos, v.boi), short)])
    with pytest.raises(BadInput, match="max_units 5"):
        ShapeConfig(10, max_units=5)


def test_so_many_previews_as_are_asked_for(model: Chameleon) -> None:
    v = model.vocabulary
    for grid in ((8, 2), (4, 4), (2, 8)):
        image = [*v.started_image([v.image_start] * 16, grid), v.dialect.row_end, v.eoi]
        for count in (1, 2, 3):
            decoder = StreamDecoder(model.tokenizer, num_previews=count)
            shown = [part for token_id in image for part in decoder.push(int(token_id or 0))]
            rows = [part.rows for part in shown if isinstance(part, PartialImage)]
            assert len(rows) <= count and rows == sorted(set(rows)) and max(rows) < grid[0]
            assert len(rows) == min(count, grid[0] - 1)
