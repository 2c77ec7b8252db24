"""Text ↔ pieces by a `tokenizer.json` of Hugging Face's tokenizers library, as Meta's and Lumina's weights have it.

Token ids of text are exactly those of the library, except for the names of special tokens and image codes (`<s>`,
`IMGIMGAZ`): here they are ordinary text, so no text can spell a special token or an image.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

from chameleon.dialect import Grid, ShapeConfig, SizedDialect
from chameleon.errors import BadInput
from chameleon.tokenizers.text import SPACE, USER_DEFINED_PIECES, SentencePieceTokenizer, TextTokenizer
from chameleon.vocabulary import IMAGE_PIECE, ROW_END_PIECE, SPECIAL_PIECES, Vocabulary, image_piece, size_piece

SPECIAL_NAME = re.compile(r"<[^<>\s]+>")
"""Form of the names of special and reserved tokens."""
BYTE_NAME = re.compile("<0x([0-9A-F]{2})>")
IMAGE_PLACEHOLDER, RESERVED = "<image>", "<reserved08707>"
"""Hugging Face's placeholder for an image in a prompt, and the reserved token that it renames to that."""


def byte_alphabet() -> dict[str, int]:
    """Return character → byte of byte-level BPE: printable bytes are themselves, the others U+0100 and up (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def flatten_component(component: Any) -> list[dict[str, Any]]:
    """Return a normalizer, pre-tokenizer, post-processor or decoder as the flat list of its steps."""
    if not component:
        return []
    for key in ("pretokenizers", "normalizers", "processors", "decoders"):
        if key in component:
            return [step for member in component[key] for step in flatten_component(member)]
    return [component]


def alphabet_of(value: dict[str, Any], where: object) -> dict[str, int]:
    """Return character → byte of a byte-level tokenizer, else an empty dictionary.

    Raises `BadInput` for a tokenizer that has no bytes at all.
    """
    steps = [*flatten_component(value.get("pre_tokenizer")), *flatten_component(value.get("decoder"))]
    if any(step["type"] == "ByteLevel" for step in steps):
        return byte_alphabet()
    if not value["model"].get("byte_fallback"):
        raise BadInput("neither byte-level nor with byte pieces, so it would lose text", where=where)
    return {}


class JsonTextTokenizer(TextTokenizer):
    """A BPE `tokenizer.json`. Its text pieces are numbered from 0 in the order of their token ids."""

    FILE = "tokenizer.json"

    def __init__(self, data: bytes, where: object = FILE) -> None:
        """`data`: the contents of the file. Raises `BadInput` for anything but byte-level BPE or BPE with byte pieces."""
        self.data = data
        self.where = where
        try:
            value = json.loads(data)
            model, added = value["model"], value.get("added_tokens") or []
            if model.get("type", "BPE") != "BPE":
                raise BadInput(f"a {model['type']} tokenizer; only BPE is supported", where=where)
            self.names: dict[str, int] = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
            merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            non_text = self.non_text_names(model, added, ["".join(pair) for pair in merges])
            text_tokens = [token for token in added if token["content"] not in non_text]
            # The library renumbers added tokens unless the model's vocabulary contains them.
            vocab = {**model["vocab"], **{token["content"]: token["id"] for token in text_tokens}}
            text_only = {"added_tokens": text_tokens, "truncation": None, "padding": None}
            self.alphabet = alphabet_of(value, where)
            self.bpe = tokenizers.Tokenizer.from_str(json.dumps({**value, **text_only, "model": {**model, "vocab": vocab}}))
        except BadInput:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise BadInput(f"not a tokenizer ({error or type(error).__name__})", where=where) from None
        literal_names = {token["content"] for token in text_tokens}
        name_of = {token_id: name for name, token_id in self.names.items() if name not in non_text}
        self.text_ids = sorted(name_of)
        """Token id of each piece."""
        self.piece_of = {token_id: piece for piece, token_id in enumerate(self.text_ids)}
        self.bytes_of = [self.piece_bytes(name_of[i], name_of[i] in literal_names) for i in self.text_ids]
        space_bytes = [self.names.get(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self.escaped_space = []
        if not self.alphabet and all(token_id in self.piece_of for token_id in space_bytes):
            self.escaped_space = [self.piece_of[token_id] for token_id in space_bytes if token_id is not None]

    def non_text_names(self, model: dict[str, Any], added: list[dict[str, Any]], merge_texts: list[str]) -> set[str]:
        """Return the names of special tokens, image codes, and reserved tokens, which no merge can produce."""
        names = {name for name in self.names if IMAGE_PIECE.fullmatch(name)} | set(SPECIAL_PIECES.values())
        names |= {token["content"] for token in added if token.get("special")}
        names |= {name for name in (model.get("unk_token"), IMAGE_PLACEHOLDER) if name is not None}
        text_names = set(merge_texts)
        if model.get("byte_fallback"):
            text_names |= {name for name in self.names if BYTE_NAME.fullmatch(name)}
        return names | {name for name in self.names if SPECIAL_NAME.fullmatch(name) and name not in text_names}

    def piece_bytes(self, name: str, is_literal: bool) -> bytes:
        """Return the UTF-8 bytes of the piece of that name."""
        if is_literal:
            return name.encode()
        if self.alphabet:
            is_byte_level = all(character in self.alphabet for character in name)  # the library decodes others literally
            return bytes(map(self.alphabet.__getitem__, name)) if is_byte_level else name.encode()
        match = BYTE_NAME.fullmatch(name)
        return bytes([int(match[1], 16)]) if match else name.replace(SPACE, " ").encode()

    def encode_run(self, run: str) -> list[int]:
        encoding = self.bpe.encode(run, add_special_tokens=False)
        pieces: list[int] = []
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self.piece_of:
                pieces.append(self.piece_of[token_id])
            elif end - start > 1:  # the name of a special token, produced by merges: encode it letter by letter
                pieces += [piece for letter in run[start:end] for piece in self.encode_run(letter)]
            else:
                raise BadInput(f"no piece for {run[start:end]!r}", where=self.where)
        return pieces

    def vocabulary(
        self, image_codes: int, grid: Grid, size: int | None = None, *, shapes: ShapeConfig | None = None
    ) -> Vocabulary:
        return Vocabulary.from_names(self.names, self.text_ids, grid=grid, shapes=shapes, size=size, where=self.where)


# --- conversions between flavours of tokenizer.json ------------------------------------------------------------------


def rename_token(tokenizer: JsonTextTokenizer, old: str, new: str) -> JsonTextTokenizer:
    """Return the tokenizer with one token renamed; unchanged where it has no token `old`, or one named `new`."""
    if old not in tokenizer.names or new in tokenizer.names:
        return tokenizer
    value = json.loads(tokenizer.data)
    vocab = value["model"]["vocab"]
    value["model"]["vocab"] = {new if name == old else name: token_id for name, token_id in vocab.items()}
    for token in value.get("added_tokens") or []:
        if token["content"] == old:
            token["content"] = new
    return JsonTextTokenizer(json.dumps(value, ensure_ascii=False).encode(), tokenizer.where)


def adds_bos(tokenizer: JsonTextTokenizer, bos: int) -> bool:
    """Return whether the library prepends `<s>` to a text."""
    return tokenizers.Tokenizer.from_str(tokenizer.data.decode()).encode("").ids[:1] == [bos]


def bos_template(bos: int) -> dict[str, Any]:
    """Return the post-processor that prepends `<s>` to a text."""
    name = SPECIAL_PIECES["bos"]
    first, second = ({"Sequence": {"id": part, "type_id": index}} for index, part in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}}, first],
        "pair": [{"SpecialToken": {"id": name, "type_id": 0}}, first, second],
        "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}},
    }


def with_bos(tokenizer: JsonTextTokenizer, bos: int) -> JsonTextTokenizer:
    """Return the tokenizer as Hugging Face's users expect it: it prepends `<s>` to a text by itself."""
    if adds_bos(tokenizer, bos):
        return tokenizer
    value = json.loads(tokenizer.data)
    steps, template = flatten_component(value.get("post_processor")), bos_template(bos)
    value["post_processor"] = template if not steps else {"type": "Sequence", "processors": [*steps, template]}
    return JsonTextTokenizer(json.dumps(value, ensure_ascii=False).encode(), tokenizer.where)


def without_bos(tokenizer: JsonTextTokenizer) -> JsonTextTokenizer:
    """Return the tokenizer as Meta's code expects it, which prepends `<s>` to a document itself."""
    value = json.loads(tokenizer.data)
    steps = flatten_component(value.get("post_processor"))
    kept = [step for step in steps if step["type"] != "TemplateProcessing"]
    if len(kept) == len(steps):
        return tokenizer
    value["post_processor"] = {"type": "Sequence", "processors": kept} if kept else None
    return JsonTextTokenizer(json.dumps(value, ensure_ascii=False).encode(), tokenizer.where)


def added_token(name: str, token_id: int, *, special: bool) -> dict[str, Any]:
    """Return an entry of `added_tokens`."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": name, **flags, "special": special}


def to_json_text(text: TextTokenizer, vocabulary: Vocabulary) -> JsonTextTokenizer:
    """Return a text tokenizer of any kind as a `tokenizer.json` with the same token ids."""
    if isinstance(text, JsonTextTokenizer):
        return text
    assert isinstance(text, SentencePieceTokenizer)
    return from_sentencepiece(text, vocabulary)


def from_sentencepiece(text: SentencePieceTokenizer, vocabulary: Vocabulary) -> JsonTextTokenizer:
    """Convert a sentencepiece tokenizer and its vocabulary: the token ids stay, specials and image codes get Meta's names.

    The unused piece 0 becomes the reserved token that Hugging Face's format uses as the placeholder of an image. Token ids
    of a text are the same, except for the character `▁`, which the library cannot tell from a space.
    """
    processor = text.processor
    text_ids = vocabulary.text_ids.order
    names = [processor.IdToPiece(piece) for piece in range(len(text))]
    vocab = {name: getattr(vocabulary, field) for field, name in SPECIAL_PIECES.items()}
    vocab |= {image_piece(code): token_id for code, token_id in enumerate(vocabulary.image_ids.order)}
    if isinstance(vocabulary.dialect, SizedDialect):
        vocab[ROW_END_PIECE] = vocabulary.dialect.row_end
        vocab |= {size_piece(units): token_id for token_id, units in vocabulary.dialect.sizes.items()}
    vocab[RESERVED] = text_ids[0]
    specials = list(vocab)
    for piece, name in list(enumerate(names))[1:]:
        if name in vocab:
            raise BadInput(f"the piece {name!r} has the name of a special token", where=text.FILE)
        vocab[name] = text_ids[piece]
    # The rank of a merge is the score of its result; every split of a piece into two others is a merge.
    ranked = sorted(range(1, len(names)), key=lambda piece: -processor.GetScore(piece))
    results = [names[p] for p in ranked if not processor.IsByte(p) and names[p] not in USER_DEFINED_PIECES]
    splits = [(name[:index], name[index:]) for name in results for index in range(1, len(name))]
    merges = [list(pair) for pair in splits if pair[0] in vocab and pair[1] in vocab]
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            *(added_token(name, vocab[name], special=True) for name in specials if not IMAGE_PIECE.fullmatch(name)),
            *(added_token(name, vocab[name], special=False) for name in USER_DEFINED_PIECES),
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    return JsonTextTokenizer(json.dumps(value, ensure_ascii=False).encode())
