from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chameleon.errors import BadInput
from chameleon.tokenizers.text import SentencePieceTokenizer, reservoir_sample

# Runs of white space and signs that sentencepiece itself uses are likelier than chance would have them.
texts = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from([" ", "  ", "\t", "\n", "\r\n", "\u2581", "\u2585", "⁇", "<unk>", "<0x41>", "\x00"]),
    )
).map("".join)


@settings(max_examples=400)
@given(texts)
@example(" lead and trail ")
@example("\u2581\u2581 \u2581")
@example("def f():\n\treturn  1\n\n\n")
@example("🧑🏽‍🚀 é é ﬁ Ⅷ")
def test_every_string_comes_back(text_tokenizer: SentencePieceTokenizer, text: str) -> None:
    pieces = text_tokenizer.encode(text)
    assert text_tokenizer.decode(pieces) == text
    assert all(0 <= piece < len(text_tokenizer) for piece in pieces)


@given(texts)
def test_decoding_is_the_join_of_pieces(text_tokenizer: SentencePieceTokenizer, text: str) -> None:
    pieces = text_tokenizer.encode(text)
    assert b"".join(text_tokenizer.decode_bytes([piece]) for piece in pieces) == text.encode()


def test_piece_zero_is_never_emitted(text_tokenizer: SentencePieceTokenizer) -> None:
    for text in ("<unk>", "<s>", "</s>", "<pad>", "\U0010fffd", "IMGIMGABZ"):
        assert 0 not in text_tokenizer.encode(text)


def test_lone_surrogates_are_named(text_tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(BadInput, match="surrogate at character 2"):
        text_tokenizer.encode("ab\ud800")


def test_save_and_load(text_tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    text_tokenizer.save(tmp_path)
    again = SentencePieceTokenizer.load(tmp_path)
    assert again.fingerprint == text_tokenizer.fingerprint
    assert again.encode("orange heart") == text_tokenizer.encode("orange heart")


def test_bad_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="missing"):
        SentencePieceTokenizer.load(tmp_path)
    (tmp_path / "text_tokenizer.model").write_bytes(b"no model")
    with pytest.raises(BadInput, match="not a sentencepiece model"):
        SentencePieceTokenizer.load(tmp_path)


def test_fit_gives_the_requested_count_or_explains_why_not() -> None:
    text = ["the cat sat on the mat, the dog sat on the log. " * 5, "quick brown foxes jump over lazy hounds " * 3]
    assert len(SentencePieceTokenizer.fit(text, 290)) == 290
    with pytest.raises(BadInput, match="ask for fewer"):
        SentencePieceTokenizer.fit(text, 50_000)
    with pytest.raises(BadInput, match="no text"):
        SentencePieceTokenizer.fit(["", " \n"], 300)
    with pytest.raises(BadInput, match="no room"):
        SentencePieceTokenizer.fit(text, 100)


def test_fit_is_deterministic() -> None:
    text = [f"sentence number {number} of many" for number in range(500)]
    first, second = (SentencePieceTokenizer.fit(iter(text), 300, sample_bytes=40_960, seed=3) for _ in range(2))
    assert first.fingerprint == second.fingerprint


def test_reservoir_is_bounded_and_uniform() -> None:
    hits = [0] * 40
    for seed in range(600):
        sample = reservoir_sample((str(number) for number in range(40)), 8, seed)
        assert len(sample) == 8
        for item in sample:
            hits[int(item)] += 1
    expected = 600 * 8 / 40
    chi_square = sum((count - expected) ** 2 / expected for count in hits)
    assert chi_square < 80  # 39 degrees of freedom, p ≈ 1e-4
