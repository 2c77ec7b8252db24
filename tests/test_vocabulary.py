from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chameleon.errors import BadInput
from chameleon.vocabulary import SPECIALS, Modality, Vocabulary

layouts = st.builds(
    Vocabulary.build,
    image_codes=st.integers(1, 50),
    text_pieces=st.integers(1, 50),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)


@given(layouts)
def test_every_id_has_exactly_one_modality(vocabulary: Vocabulary) -> None:
    ids = torch.arange(vocabulary.size)
    kinds = vocabulary.modality(ids)
    counts = [int((kinds == kind).sum()) for kind in (Modality.TEXT, Modality.IMAGE, Modality.STRUCTURE)]
    assert counts == [vocabulary.num_text_pieces, vocabulary.num_image_codes, len(SPECIALS)]
    assert torch.equal(kinds == Modality.IMAGE, vocabulary.mask(image=True))
    assert torch.equal(kinds == Modality.TEXT, vocabulary.mask(text=True))
    assert torch.equal(kinds == Modality.STRUCTURE, vocabulary.mask(specials=SPECIALS))


@given(layouts)
def test_codes_and_ids_round_trip(vocabulary: Vocabulary) -> None:
    codes = torch.arange(vocabulary.num_image_codes)
    ids = vocabulary.codes_to_ids(codes)
    assert vocabulary.is_image(ids).all()
    assert torch.equal(vocabulary.ids_to_codes(ids), codes)
    assert torch.equal(torch.arange(vocabulary.size)[vocabulary.image_slice], ids)


@given(layouts)
def test_json_round_trip(vocabulary: Vocabulary) -> None:
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary


def test_ids_that_are_no_codes_are_refused() -> None:
    vocabulary = Vocabulary.build(image_codes=4, text_pieces=4, grid=(2, 2))
    with pytest.raises(BadInput, match="not an image code"):
        vocabulary.ids_to_codes(torch.tensor([vocabulary.text_start]))


def test_overlapping_layouts_are_refused() -> None:
    value = Vocabulary.build(image_codes=4, text_pieces=4, grid=(2, 2)).to_json()
    with pytest.raises(BadInput, match="overlap"):
        Vocabulary.from_json({**value, "sep": value["eos"]})
    with pytest.raises(BadInput, match="wrong keys"):
        Vocabulary.from_json({**value, "unknown": 1})


def test_constructor_refuses_empty_layouts() -> None:
    with pytest.raises(BadInput, match="positive"):
        Vocabulary.build(image_codes=0, text_pieces=4, grid=(2, 2))
