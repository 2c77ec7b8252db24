"""Text ↔ pieces by a `tokenizer.json` of Hugging Face's library: what the originals' weights come with.

Ids of text are exactly those the library gives. What it would make of the names of structure (`<s>`, `IMGIMGAZ`) is
another matter: here such names in a text are text like any other, so no text can spell structure.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

from chameleon.errors import BadInput
from chameleon.tokenizers.text import CUT_OUT, SPACE, SentencePieceTokenizer, TextTokenizer
from chameleon.vocabulary import IMAGE_NAME, NAMES, Vocabulary, image_name

STRUCTURE = re.compile(r"<[^<>\s]+>")
"""Form of the names of special and reserved pieces."""
BYTE_NAME = re.compile("<0x([0-9A-F]{2})>")
PLACEHOLDER, RESERVED = "<image>", "<reserved08707>"
"""Hugging Face's name for the place of a picture, and the reserved piece it takes for it."""


def byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE: printable bytes stand for themselves, the others for U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def steps_of(component: Any) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer, post-processor or decoder as the flat list of its members."""
    if not component:
        return []
    for key in ("pretokenizers", "normalizers", "processors", "decoders"):
        if key in component:
            return [step for member in component[key] for step in steps_of(member)]
    return [component]


def alphabet_of(value: dict[str, Any], where: object) -> dict[str, int]:
    """Character → byte where a tokenizer is byte-level; else empty. Raises `BadInput` where it has no bytes at all."""
    steps = [*steps_of(value.get("pre_tokenizer")), *steps_of(value.get("decoder"))]
    if any(step["type"] == "ByteLevel" for step in steps):
        return byte_alphabet()
    if not value["model"].get("byte_fallback"):
        raise BadInput("neither byte-level nor with byte pieces", where=where, remedy="such text would be lost")
    return {}


class JsonTextTokenizer(TextTokenizer):
    """A BPE `tokenizer.json`. Its text pieces are numbered from 0 in the order of their ids."""

    FILE = "tokenizer.json"

    def __init__(self, data: bytes, where: object = FILE) -> None:
        """`data`: the file. Raises `BadInput` for anything but byte-level BPE or BPE with byte pieces."""
        self.data = data
        self.where = where
        try:
            value = json.loads(data)
            model, added = value["model"], value.get("added_tokens") or []
            if model.get("type", "BPE") != "BPE":
                raise BadInput(f"a {model['type']} tokenizer, only BPE is known", where=where)
            self.names: dict[str, int] = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
            merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            structure = self.structure(model, added, ["".join(pair) for pair in merges])
            kept = [token for token in added if token["content"] not in structure]
            # The library numbers added tokens anew unless the model's own vocabulary has them.
            vocab = {**model["vocab"], **{token["content"]: token["id"] for token in kept}}
            plain = {"added_tokens": kept, "truncation": None, "padding": None, "model": {**model, "vocab": vocab}}
            self.alphabet = alphabet_of(value, where)
            self.bpe = tokenizers.Tokenizer.from_str(json.dumps({**value, **plain}))
        except BadInput:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise BadInput(f"no tokenizer ({error or type(error).__name__})", where=where) from None
        literal = {token["content"] for token in kept}
        names = {number: name for name, number in self.names.items() if name not in structure}
        self.ids = sorted(names)
        self.piece_of = {number: piece for piece, number in enumerate(self.ids)}
        self.bytes_of = [self.piece_bytes(names[number], names[number] in literal) for number in self.ids]
        escaped = [self.names.get(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self.escaped_space = []
        if not self.alphabet and all(number in self.piece_of for number in escaped):
            self.escaped_space = [self.piece_of[number] for number in escaped if number is not None]

    def structure(self, model: dict[str, Any], added: list[dict[str, Any]], merged: list[str]) -> set[str]:
        """Names that are no text: specials, image codes, and what looks like one and no merge can make."""
        found = {name for name in self.names if IMAGE_NAME.fullmatch(name)} | set(NAMES.values())
        found |= {token["content"] for token in added if token.get("special")}
        found |= {name for name in (model.get("unk_token"), PLACEHOLDER) if name is not None}
        made = set(merged)
        if model.get("byte_fallback"):
            made |= {name for name in self.names if BYTE_NAME.fullmatch(name)}
        return found | {name for name in self.names if STRUCTURE.fullmatch(name) and name not in made}

    def piece_bytes(self, name: str, literal: bool) -> bytes:
        if literal:
            return name.encode()
        if self.alphabet:
            known = all(character in self.alphabet for character in name)  # of others the library gives the name itself
            return bytes(map(self.alphabet.__getitem__, name)) if known else name.encode()
        match = BYTE_NAME.fullmatch(name)
        return bytes([int(match[1], 16)]) if match else name.replace(SPACE, " ").encode()

    def encode_run(self, run: str) -> list[int]:
        found = self.bpe.encode(run, add_special_tokens=False)
        pieces: list[int] = []
        for number, (start, end) in zip(found.ids, found.offsets, strict=True):
            if number in self.piece_of:
                pieces.append(self.piece_of[number])
            elif end - start > 1:  # a name of structure, made by merges: spelled letter by letter
                pieces += [piece for letter in run[start:end] for piece in self.encode_run(letter)]
            else:
                raise BadInput(f"no piece for {run[start:end]!r}", where=self.where)
        return pieces

    def vocabulary(self, image_codes: int, grid: tuple[int, int], size: int | None = None) -> Vocabulary:
        return Vocabulary.of_names(self.names, self.ids, grid=grid, size=size, where=self.where)


def renamed(tokenizer: JsonTextTokenizer, old: str, new: str) -> JsonTextTokenizer:
    """The same tokenizer with one piece under another name; itself, where it has no piece `old`, or one named `new`."""
    if old not in tokenizer.names or new in tokenizer.names:
        return tokenizer
    value = json.loads(tokenizer.data)
    vocab = value["model"]["vocab"]
    value["model"]["vocab"] = {new if name == old else name: number for name, number in vocab.items()}
    for token in value.get("added_tokens") or []:
        if token["content"] == old:
            token["content"] = new
    return JsonTextTokenizer(json.dumps(value, ensure_ascii=False).encode(), tokenizer.where)


def adds_bos(tokenizer: JsonTextTokenizer, bos: int) -> bool:
    """Whether the library puts `<s>` before a text."""
    return tokenizers.Tokenizer.from_str(tokenizer.data.decode()).encode("").ids[:1] == [bos]


def template(bos: int) -> dict[str, Any]:
    """The post-processor that puts `<s>` before a text."""
    name = NAMES["bos"]
    first, second = ({"Sequence": {"id": part, "type_id": number}} for number, part in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}}, first],
        "pair": [{"SpecialToken": {"id": name, "type_id": 0}}, first, second],
        "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}},
    }


def with_bos(tokenizer: JsonTextTokenizer, bos: int) -> JsonTextTokenizer:
    """The same tokenizer as Hugging Face's users expect it: `<s>` comes before a text by itself."""
    if adds_bos(tokenizer, bos):
        return tokenizer
    value = json.loads(tokenizer.data)
    steps = steps_of(value.get("post_processor"))
    value["post_processor"] = template(bos) if not steps else {"type": "Sequence", "processors": [*steps, template(bos)]}
    return JsonTextTokenizer(json.dumps(value, ensure_ascii=False).encode(), tokenizer.where)


def without_bos(tokenizer: JsonTextTokenizer) -> JsonTextTokenizer:
    """The same tokenizer as Meta's code expects it, which puts `<s>` at the start of a document itself."""
    value = json.loads(tokenizer.data)
    steps = steps_of(value.get("post_processor"))
    kept = [step for step in steps if step["type"] != "TemplateProcessing"]
    if len(kept) == len(steps):
        return tokenizer
    value["post_processor"] = {"type": "Sequence", "processors": kept} if kept else None
    return JsonTextTokenizer(json.dumps(value, ensure_ascii=False).encode(), tokenizer.where)


def added_token(name: str, number: int, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": name, **flags, "special": special}


def to_json_text(text: TextTokenizer, vocabulary: Vocabulary) -> JsonTextTokenizer:
    """A text tokenizer as a `tokenizer.json`, whichever kind it is, with the same ids."""
    if isinstance(text, JsonTextTokenizer):
        return text
    assert isinstance(text, SentencePieceTokenizer)
    return from_sentencepiece(text, vocabulary)


def from_sentencepiece(text: SentencePieceTokenizer, vocabulary: Vocabulary) -> JsonTextTokenizer:
    """Our own tokenizer and layout in the originals' form: ids as they are, specials and image codes by their names.

    The unused piece 0 becomes the reserved piece that Hugging Face's format takes for the place of a picture. Ids of a
    text are the same, but for the character `▁`, for which the library has no way around the space.
    """
    processor = text.processor
    ids = vocabulary.text_ids.order
    pieces = [processor.IdToPiece(number) for number in range(len(text))]
    vocab = {name: getattr(vocabulary, field) for field, name in NAMES.items()}
    vocab |= {image_name(code): number for code, number in enumerate(vocabulary.image_ids.order)}
    vocab[RESERVED] = ids[0]
    specials = list(vocab)
    for number, piece in list(enumerate(pieces))[1:]:
        if piece in vocab:
            raise BadInput(f"the piece {piece!r} has the name of a special", where=text.FILE)
        vocab[piece] = ids[number]
    # A merge's rank is the score of what it makes, in all the ways to make it.
    ranked = sorted(range(1, len(pieces)), key=lambda number: -processor.GetScore(number))
    made = [pieces[number] for number in ranked if not processor.IsByte(number) and pieces[number] not in CUT_OUT]
    cuts = [(piece[:cut], piece[cut:]) for piece in made for cut in range(1, len(piece))]
    merges = [list(pair) for pair in cuts if pair[0] in vocab and pair[1] in vocab]
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            *(added_token(name, vocab[name], special=True) for name in specials if not IMAGE_NAME.fullmatch(name)),
            *(added_token(piece, vocab[piece], special=False) for piece in CUT_OUT),
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
