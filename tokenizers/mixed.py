"""Documents and conversations ↔ ids of the one vocabulary.

A document is `bos parts… eos`; a picture is `boi`, its codes, `eoi`. A conversation is `bos prompt sep answer eos`, and
each further turn `prompt sep answer eos`: where the loss lies follows from the ids alone (`answer_mask`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chameleon.document import Conversation, Document, Image, Part, Text
from chameleon.errors import BadInput
from chameleon.tokenizers.image import Fit, ImageTokenizer
from chameleon.tokenizers.text import TextTokenizer
from chameleon.vocabulary import Vocabulary

Content = Document | Conversation


def answer_mask(ids: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Which ids of one sequence [T] belong to answers: from behind `sep` up to and with `eos`. A bool tensor [T]."""
    after_sep = (ids == vocabulary.sep).long().cumsum(0)
    ended = (ids == vocabulary.eos).long().cumsum(0) - (ids == vocabulary.eos).long()  # eos itself is still answer
    return (after_sep > ended) & (ids != vocabulary.sep)


@dataclass
class Turn:
    """What stands before and, in a conversation, after `sep`. A document has no answer."""

    prompt: list[Part]
    answer: list[Part] | None


def turns_of(content: Content) -> list[Turn]:
    """A document as one turn without an answer; a conversation as its pairs of prompt and answer.

    Raises `BadInput` for a conversation that does not end with an answer.
    """
    if isinstance(content, Document):
        return [Turn(list(content.parts), None)]
    turns: list[Turn] = []
    prompt: list[Part] = []
    for message in content.messages:
        if message.role == "assistant":
            turns.append(Turn(prompt, list(message.content.parts)))
            prompt = []
        else:
            prompt += message.content.parts
    if not turns or prompt:
        raise BadInput("the last message is no assistant's, so there is nothing to learn from it", where="conversation")
    return turns


def merged(parts: Sequence[Part]) -> Iterator[Part]:
    """The parts with neighbouring texts joined, so that cutting a text in two does not change its ids."""
    text = ""
    for part in parts:
        if isinstance(part, Text):
            text += part.text
            continue
        if text:
            yield Text(text)
            text = ""
        yield part
    if text:
        yield Text(text)


class MixedTokenizer:
    """Both tokenizers behind one vocabulary."""

    def __init__(self, text: TextTokenizer, image: ImageTokenizer, vocabulary: Vocabulary | None = None) -> None:
        self.text, self.image = text, image
        self.vocabulary = vocabulary or Vocabulary.own(
            image_codes=image.config.codebook_size, text_pieces=len(text), grid=image.config.grid
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the vocabulary and both tokenizers: shards made with others do not fit."""
        digest = hashlib.sha256(repr(sorted(self.vocabulary.to_json().items())).encode())
        digest.update(self.text.fingerprint.encode())
        digest.update(repr(sorted(self.image.config.to_json().items())).encode())
        # bfloat16 is how weights are shipped: the fingerprint must not change by saving and loading.
        for name, value in sorted(self.image.network.released_state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().bfloat16().view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

    # --- encoding ---

    def encode(self, content: Content) -> Tensor:
        """Ids int64 [T] of a document or conversation."""
        return self.encode_batch([content])[0]

    def encode_batch(self, contents: Sequence[Content]) -> list[Tensor]:
        """Ids of each; the pictures of all go through the image tokenizer together.

        Pictures in prompts of conversations are bordered so that nothing is lost, all others cropped (RECIPE 3).
        """
        plans = [turns_of(content) for content in contents]
        wanted: list[tuple[Fit, Image]] = []
        for content, turns in zip(contents, plans, strict=True):
            prompt_fit: Fit = "pad" if isinstance(content, Conversation) else "crop"
            for turn in turns:
                wanted += [(prompt_fit, part) for part in turn.prompt if isinstance(part, Image)]
                wanted += [("crop", part) for part in turn.answer or () if isinstance(part, Image)]
        blocks = self.image_blocks(wanted)
        v = self.vocabulary
        result = []
        for turns in plans:
            ids = [v.bos]
            for turn in turns:
                ids += self.part_ids(turn.prompt, blocks)
                if turn.answer is not None:
                    ids += [v.sep, *self.part_ids(turn.answer, blocks)]
                ids.append(v.eos)
            result.append(torch.tensor(ids, dtype=torch.int64))
        return result

    def image_blocks(self, wanted: Sequence[tuple[Fit, Image]]) -> Iterator[list[int]]:
        """For each picture `boi codes eoi`, in order."""
        blocks: dict[int, list[int]] = {}
        for fit in ("crop", "pad"):
            places = [number for number, (how, _) in enumerate(wanted) if how == fit]
            codes = self.image.encode([wanted[number][1].image for number in places], fit)
            for number, ids in zip(places, self.vocabulary.codes_to_ids(codes).flatten(1).tolist(), strict=True):
                blocks[number] = [self.vocabulary.boi, *ids, self.vocabulary.eoi]
        return (blocks[number] for number in range(len(wanted)))

    def part_ids(self, parts: Sequence[Part], blocks: Iterator[list[int]]) -> list[int]:
        ids: list[int] = []
        for part in merged(parts):
            if isinstance(part, Text):
                ids += [piece + self.vocabulary.text_start for piece in self.text.encode(part.text)]
            else:
                ids += next(blocks)
        return ids

    def encode_prompt(self, document: Document, *, conversation: bool) -> Tensor:
        """Ids [T] of a prompt to be continued: `bos parts`, and `sep` where the answer of a conversation is to come."""
        fit: Fit = "pad" if conversation else "crop"
        blocks = self.image_blocks([(fit, part) for part in document.parts if isinstance(part, Image)])
        ids = [self.vocabulary.bos, *self.part_ids(document.parts, blocks)]
        return torch.tensor(ids + [self.vocabulary.sep] * conversation, dtype=torch.int64)

    # --- decoding ---

    def decode(self, ids: Tensor | Sequence[int]) -> Document:
        """The document that ids [T] spell, whatever they are.

        A picture with too few or too many codes becomes a marker in the text and `complete` is False; stray structure
        is passed over.
        """
        values = torch.as_tensor(ids, dtype=torch.int64).tolist()
        v = self.vocabulary
        parts: list[Part] = []
        complete = True
        position = 0
        while position < len(values):
            start = position
            if values[position] == v.boi or self.in_slice(values[position], v.image_slice):
                opened = values[position] == v.boi
                position += opened
                first = position
                while position < len(values) and self.in_slice(values[position], v.image_slice):
                    position += 1
                codes = values[first:position]
                closed = position < len(values) and values[position] == v.eoi
                position += closed
                if len(codes) == v.image_length and opened:
                    grid = v.ids_to_codes(torch.tensor(codes)).view(1, *v.grid)
                    parts.append(Image(self.image.decode(grid)[0]))
                else:
                    parts.append(Text(f"[picture cut short: {len(codes)} of {v.image_length} codes]"))
                    complete = False
            elif self.in_slice(values[position], v.text_slice):
                while position < len(values) and self.in_slice(values[position], v.text_slice):
                    position += 1
                parts.append(Text(self.text.decode(value - v.text_start for value in values[start:position])))
            else:
                position += 1
        return Document(tuple(merged(parts)), complete=complete)

    @staticmethod
    def in_slice(value: int, ids: slice) -> bool:
        return bool(ids.start <= value < ids.stop)
