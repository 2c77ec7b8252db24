"""`Chameleon`: a loaded bundle that captions, answers, draws and writes documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image as PILImage
from torch import Tensor

from chameleon.bundle import Bundle
from chameleon.document import Conversation, Document, Image, Part, Text
from chameleon.errors import BadInput
from chameleon.generation.engine import IMAGE_SAMPLING, TEXT_SAMPLING, Engine, Request
from chameleon.generation.guidance import two_way
from chameleon.generation.modality import Rules
from chameleon.generation.sampling import GREEDY, Sampling
from chameleon.plan import fast_bfloat16
from chameleon.tensor_files import check_device
from chameleon.tokenizers.image import Picture

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16, "float64": torch.float64}
GUIDANCE = 1.5


class Chameleon:
    """A model with its tokenizers, ready to use."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.model, self.tokenizer, self.vocabulary = bundle.model, bundle.tokenizer, bundle.vocabulary
        self.engine = Engine(bundle.model, bundle.vocabulary)

    @classmethod
    def load(cls, path: str | Path | None = None, *, device: str = "cpu", dtype: str = "auto") -> Chameleon:
        """Loads a bundle (None: the shipped one), in `dtype`; auto is bfloat16 where that is fast, else float32.

        Raises `BadInput` for files that are missing, altered or unfitting.
        """
        if dtype not in ("auto", *DTYPES):
            raise BadInput(f"{dtype!r} is none of auto, {', '.join(DTYPES)}", where="dtype")
        check_device(device)
        if dtype == "auto":
            dtype = "bfloat16" if fast_bfloat16(device) else "float32"
        return cls(Bundle.load(path, device=device, dtype=DTYPES[dtype]))

    @property
    def converses(self) -> bool:
        """Whether the model was tuned on conversations, so that prompts end with `sep`."""
        return self.bundle.prompting == "conversation"

    # --- ids and logits ---

    def encode(self, content: Document | Conversation) -> Tensor:
        """Ids int64 [T] of a whole document or conversation."""
        return self.tokenizer.encode(content)

    def decode(self, ids: Tensor | Sequence[int]) -> Document:
        """The document that ids [T] spell; never raises for malformed ones."""
        return self.tokenizer.decode(ids)

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits float32 [B, T, vocab_size] of ids int64 [B, T]."""
        return self.model.logits(self.model(ids.to(self.engine.device))).float()

    def prompt(self, content: Document | Conversation) -> tuple[int, ...]:
        """Ids of a prompt to be continued. A conversation's last message is the user's."""
        if isinstance(content, Document):
            return tuple(self.tokenizer.encode_prompt(content, conversation=self.converses).tolist())
        if content.messages[-1].role == "assistant":
            raise BadInput("the last message is the assistant's: nothing is asked", where="conversation")
        answered = last_answer(content) + 1
        pending = [part for message in content.messages[answered:] for part in message.content.parts]
        tail = self.tokenizer.encode_prompt(Document(pending), conversation=self.converses).tolist()
        if not answered:
            return tuple(tail)
        past = self.tokenizer.encode(Conversation(content.messages[:answered])).tolist()
        return (*past, *tail[1:])

    # --- what it does ---

    def caption(self, picture: Picture, *, max_new: int = 30, sampling: Sampling = GREEDY, seed: int = 0) -> str:
        """A caption of the picture."""
        return self.caption_batch([picture], max_new=max_new, sampling=sampling, seed=seed)[0]

    def caption_batch(
        self, pictures: Sequence[Picture], *, max_new: int = 30, sampling: Sampling = GREEDY, seed: int = 0
    ) -> list[str]:
        """Captions of several pictures, side by side in one batch."""
        return self.texts([Document((Image(picture),)) for picture in pictures], max_new, sampling, seed)

    def answer(
        self, picture: Picture, question: str, *, max_new: int = 30, sampling: Sampling = GREEDY, seed: int = 0
    ) -> str:
        """The answer to a question about the picture."""
        return self.answer_batch([(picture, question)], max_new=max_new, sampling=sampling, seed=seed)[0]

    def answer_batch(
        self,
        questions: Sequence[tuple[Picture, str]],
        *,
        max_new: int = 30,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> list[str]:
        """Answers to several (picture, question) pairs, side by side in one batch."""
        documents = [Document((Image(picture), Text(question))) for picture, question in questions]
        return self.texts(documents, max_new, sampling, seed)

    def texts(self, documents: Sequence[Document], max_new: int, sampling: Sampling, seed: int) -> list[str]:
        """What the model says to each document, in text alone."""
        requests = [Request(self.prompt(document), Rules(max_new), sampling, seed=seed) for document in documents]
        return [self.decode(ids).text.strip() for ids in self.engine.generate(requests)]

    def draw(
        self, prompt: str, *, seed: int = 0, guidance: float = GUIDANCE, sampling: Sampling = IMAGE_SAMPLING
    ) -> PILImage.Image:
        """A picture of what the prompt says. `guidance` 1 switches guidance off."""
        return self.draw_batch([prompt], seeds=[seed], guidance=guidance, sampling=sampling)[0]

    def draw_batch(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        guidance: float = GUIDANCE,
        sampling: Sampling = IMAGE_SAMPLING,
    ) -> list[PILImage.Image]:
        """A picture for each prompt, in one batch; seeds are 0, 1, 2 … unless given."""
        self.tokenizer.image.network.check_decoder()
        seeds = range(len(prompts)) if seeds is None else seeds
        nothing = two_way(self.prompt(Document()), guidance) if guidance != 1 else None
        rules = Rules(self.vocabulary.block_length, format=("image",))
        requests = [
            Request(self.prompt(Document((Text(prompt),))), rules, image=sampling, guidance=nothing, seed=seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        pictures = []
        for ids in self.engine.generate(requests):
            images = self.decode(ids).images
            if not images:
                raise BadInput("the prompt leaves no room for a picture", where="draw", remedy="shorten it")
            pictures.append(images[0])
        return pictures  # type: ignore[return-value]

    def generate(self, content: Document | Conversation, **options: object) -> Document:
        """What follows the document or answers the conversation: text and pictures. Options as `generate_batch`."""
        return self.generate_batch([content], **options)[0]  # type: ignore[arg-type]

    def generate_batch(
        self,
        contents: Sequence[Document | Conversation],
        *,
        max_new: int = 256,
        max_images: int | None = None,
        text: Sampling = TEXT_SAMPLING,
        image: Sampling = IMAGE_SAMPLING,
        seeds: Sequence[int] | None = None,
    ) -> list[Document]:
        """What follows each; rows may be in different modalities at each step. Seeds are 0 for all unless given.

        `max_images`: left out, 1, or 0 where the bundle cannot draw.
        """
        requests = self.requests(contents, max_new, max_images, text, image, seeds)
        return [self.decode(ids) for ids in self.engine.generate(requests)]

    def requests(
        self,
        contents: Sequence[Document | Conversation],
        max_new: int,
        max_images: int | None,
        text: Sampling,
        image: Sampling,
        seeds: Sequence[int] | None,
    ) -> list[Request]:
        chosen = seeds if seeds is not None else [0] * len(contents)
        if max_images is None:
            max_images = int(self.tokenizer.image.config.decoder)
        if max_images:
            self.tokenizer.image.network.check_decoder()
        rules = Rules(max_new, max_images)
        return [
            Request(self.prompt(content), rules, text, image, seed=seed)
            for content, seed in zip(contents, chosen, strict=True)
        ]

    def stream(
        self,
        content: Document | Conversation,
        *,
        max_new: int = 256,
        max_images: int | None = None,
        text: Sampling = TEXT_SAMPLING,
        image: Sampling = IMAGE_SAMPLING,
        seed: int = 0,
    ) -> Iterator[Part]:
        """The same as `generate`, piece by piece: whole characters of text, and each picture when it is whole."""
        request = self.requests([content], max_new, max_images, text, image, [seed])[0]
        v = self.vocabulary
        waiting = b""
        block: list[int] = []
        for _, token in self.engine.stream([request]):
            if block or token == v.boi:
                block.append(token)
                if token == v.eoi:
                    yield from self.decode(block).parts
                    block = []
                continue
            waiting += self.tokenizer.text_bytes([token])
            whole = whole_characters(waiting)
            if whole:
                yield Text(waiting[:whole].decode("utf-8", errors="replace"))
                waiting = waiting[whole:]
        if waiting:
            yield Text(waiting.decode("utf-8", errors="replace"))
        if block:
            yield from self.decode(block).parts


def last_answer(conversation: Conversation) -> int:
    """Number of the last message that is the assistant's, or -1."""
    return max((n for n, message in enumerate(conversation.messages) if message.role == "assistant"), default=-1)


def whole_characters(data: bytes) -> int:
    """How many leading bytes make whole UTF-8 characters, or can never become any."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if 0xC0 <= byte <= 0xF4:  # a leading byte: how many should follow it
            wanted = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if back < wanted else len(data)
        if not 0x80 <= byte < 0xC0:
            break
    return len(data)
