"""`Chameleon`: a loaded bundle that captions, answers, draws and writes documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image as PILImage
from torch import Tensor

from chameleon.bundle import Bundle
from chameleon.document import Conversation, Document, Image, Message, Part, Text
from chameleon.errors import BadInput
from chameleon.generation.engine import IMAGE_SAMPLING, ROWS, TEXT_SAMPLING, Engine, Request
from chameleon.generation.guidance import Guidance, three_way, two_way
from chameleon.generation.modality import PartKind, Rules
from chameleon.generation.sampling import GREEDY, Sampling
from chameleon.generation.streaming import Assembler, Forming
from chameleon.model.running import WeightForm, prepare
from chameleon.plan import fast_bfloat16
from chameleon.tensor_files import check_device
from chameleon.tokenizers.image import Picture

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16, "float64": torch.float64}
GUIDANCE = 1.5
Scales = float | tuple[float, float]
"""Scale of two-way guidance, or those of pictures and of the full prompt of three-way guidance; 1 is none."""
Content = Document | Conversation


class Chameleon:
    """A model with its tokenizers, ready to use."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        rows: int = ROWS,
        window: int = 1,
        weights: WeightForm = "plain",
        compiled: bool = False,
    ) -> None:
        """rows, window, compiled: of the `Engine`. weights: the form that the bundle's matrices have."""
        self.bundle = bundle
        self.model, self.tokenizer, self.vocabulary = bundle.model, bundle.tokenizer, bundle.vocabulary
        self.engine = Engine(bundle.model, bundle.vocabulary, rows=rows, window=window, form=weights, compiled=compiled)

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        weights: WeightForm | Literal["auto"] = "auto",
        rows: int = ROWS,
        window: int = 1,
        compiled: bool = False,
    ) -> Chameleon:
        """Loads a bundle (None: the shipped one).

        dtype: auto is bfloat16 where that is fast, else float32. weights: plain, packed, int8 or int4 (`model.running`);
        auto is packed for bfloat16 on CPUs, else plain. rows: sequences that run at a time. window: codes of a picture
        decoded at once. compiled: compile the pass of the engine. Raises `BadInput` for files that are missing, altered or
        unfitting, and for forms that do not fit dtype or device.
        """
        if dtype not in ("auto", *DTYPES):
            raise BadInput(f"{dtype!r} is none of auto, {', '.join(DTYPES)}", where="dtype")
        check_device(device)
        if dtype == "auto":
            dtype = "bfloat16" if fast_bfloat16(device) or weights in ("int8", "int4") else "float32"
        if weights == "auto":
            packs = dtype == "bfloat16" and device == "cpu" and not compiled and fast_bfloat16(device)
            weights = "packed" if packs else "plain"
        bundle = Bundle.load(path, device=device, dtype=DTYPES[dtype])
        prepare(bundle.model, weights)
        return cls(bundle, rows=rows, window=window, weights=weights, compiled=compiled)

    @property
    def converses(self) -> bool:
        """Whether the model was tuned on conversations, so that prompts end with `sep`."""
        return self.bundle.prompting == "conversation"

    # --- ids and logits ---

    def encode(self, content: Content) -> Tensor:
        """Ids int64 [T] of a whole document or conversation."""
        return self.tokenizer.encode(content)

    def decode(self, ids: Tensor | Sequence[int]) -> Document:
        """The document that ids [T] spell; never raises for malformed ones."""
        return self.tokenizer.decode(ids)

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits float32 [B, T, vocab_size] of ids int64 [B, T]."""
        return self.model.logits(self.model(ids.to(self.engine.device))).float()

    def prompt(self, content: Content) -> tuple[int, ...]:
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

    def guidance(self, content: Content, scales: Scales | None) -> Guidance | None:
        """Guidance of what is drawn from the content; its branches are the pictures alone, and the empty prompt.

        Tuning leaves one prompt in ten empty, so the model knows what to draw without one.
        """
        if scales is None or scales == 1:
            return None
        nothing = self.prompt(Document())
        if not isinstance(scales, tuple):
            return two_way(nothing, scales)
        parts = content.parts if isinstance(content, Document) else [p for m in content.messages for p in m.content.parts]
        pictures = Document([part for part in parts if isinstance(part, Image)])
        return three_way(self.prompt(pictures), nothing, *scales)

    # --- what it does: text ---

    def caption(
        self,
        picture: Picture,
        *,
        examples: Sequence[tuple[Picture, str]] = (),
        max_new: int = 30,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> str:
        """A caption of the picture, in the manner of the examples, (picture, caption) pairs, if there are any."""
        return self.caption_batch([picture], examples=examples, max_new=max_new, sampling=sampling, seed=seed)[0]

    def caption_batch(
        self,
        pictures: Sequence[Picture],
        *,
        examples: Sequence[tuple[Picture, str]] = (),
        max_new: int = 30,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> list[str]:
        """Captions of several pictures, side by side in one batch; the examples are read once."""
        shots = [(Document((Image(picture),)), text) for picture, text in examples]
        return self.texts(shots, [Document((Image(picture),)) for picture in pictures], max_new, sampling, seed)

    def answer(
        self,
        picture: Picture,
        question: str,
        *,
        examples: Sequence[tuple[Picture, str, str]] = (),
        max_new: int = 30,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> str:
        """The answer to a question about the picture, after examples (picture, question, answer) if there are any."""
        asked = [(picture, question)]
        return self.answer_batch(asked, examples=examples, max_new=max_new, sampling=sampling, seed=seed)[0]

    def answer_batch(
        self,
        questions: Sequence[tuple[Picture, str]],
        *,
        examples: Sequence[tuple[Picture, str, str]] = (),
        max_new: int = 30,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> list[str]:
        """Answers to several (picture, question) pairs, side by side in one batch; the examples are read once."""
        shots = [(Document((Image(picture), Text(question))), text) for picture, question, text in examples]
        documents = [Document((Image(picture), Text(question))) for picture, question in questions]
        return self.texts(shots, documents, max_new, sampling, seed)

    def texts(
        self,
        shots: Sequence[tuple[Document, str]],
        documents: Sequence[Document],
        max_new: int,
        sampling: Sampling,
        seed: int,
    ) -> list[str]:
        """What the model says to each document, in text alone."""
        requests = [
            Request(self.prompt(self.after(shots, document)), Rules(max_new), sampling, seed=seed) for document in documents
        ]
        texts = [self.decode(ids).text for ids in self.engine.generate(requests)]
        if shots and not self.converses:  # where nothing else parts them, the next example begins on a new line
            texts = [text.strip().partition("\n")[0] for text in texts]
        return [text.strip() for text in texts]

    def after(self, shots: Sequence[tuple[Document, str]], document: Document) -> Content:
        """The document behind examples of (document, what is said to it): turns of a conversation, or lines."""
        if not shots:
            return document
        if self.converses:
            turns = [(Message("user", shot), Message("assistant", Document((Text(text),)))) for shot, text in shots]
            return Conversation([*(message for turn in turns for message in turn), Message("user", document)])
        return Document([*(part for shot, text in shots for part in (*shot.parts, Text(f" {text}\n"))), *document.parts])

    # --- what it does: pictures ---

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
        seeds = range(len(prompts)) if seeds is None else seeds
        return self.draw_all(prompts, seeds, guidance, sampling, ((),) * len(prompts))

    def samples(
        self,
        prompt: str,
        count: int,
        *,
        seed: int = 0,
        guidance: float = GUIDANCE,
        sampling: Sampling = IMAGE_SAMPLING,
        ranked: bool = False,
    ) -> list[PILImage.Image]:
        """Pictures of one prompt, with seeds `seed`, `seed` + 1 …; ranked: those first that `rank` finds to fit best."""
        seeds = range(seed, seed + count)
        pictures = self.draw_batch([prompt] * count, seeds=seeds, guidance=guidance, sampling=sampling)
        return [pictures[place] for place in self.rank(pictures, prompt)] if ranked else pictures

    def rank(self, pictures: Sequence[Picture], caption: str) -> list[int]:
        """Numbers of the pictures, the one first after which the model finds the caption likeliest."""
        scores = self.likelihoods(pictures, caption)
        return sorted(range(len(scores)), key=lambda place: -scores[place])

    @torch.inference_mode()
    def likelihoods(self, pictures: Sequence[Picture], caption: str) -> list[float]:
        """Mean log-probability (natural) that the model gives the ids of the caption, and its end, after each picture."""
        v = self.vocabulary
        answer = [*self.tokenizer.text_to_ids(caption), v.eos]
        if not pictures:
            return []
        prompts = [self.prompt(Document((Image(picture),))) for picture in pictures]
        ids = torch.tensor([[*prompt, *answer] for prompt in prompts], device=self.engine.device)
        scores: list[float] = []
        for part in ids.split(ROWS):
            start = ids.shape[1] - len(answer)
            logits = self.model.logits(self.model(part[:, :-1])[:, start - 1 :]).float().log_softmax(-1)
            scores += logits.gather(2, part[:, start:, None]).mean(dim=(1, 2)).tolist()
        return scores

    def complete(
        self,
        picture: Picture,
        *,
        upper: float = 0.5,
        prompt: str = "",
        count: int = 1,
        seed: int = 0,
        guidance: float = 1.0,
        sampling: Sampling = IMAGE_SAMPLING,
    ) -> list[PILImage.Image]:
        """The picture's upper share, in whole rows of codes, with lower parts that the model draws, `count` of them."""
        if not 0 < upper < 1:
            raise BadInput(f"{upper} does not lie between 0 and 1", where="upper")
        height, width = self.vocabulary.grid
        kept = self.codes(picture)[: max(1, min(height - 1, round(upper * height))) * width]
        return self.draw_all([prompt] * count, range(seed, seed + count), guidance, sampling, [kept] * count)

    def variations(
        self,
        picture: Picture,
        count: int,
        *,
        likeness: float = 0.3,
        prompt: str | None = None,
        seed: int = 0,
        guidance: float = GUIDANCE,
        sampling: Sampling = IMAGE_SAMPLING,
    ) -> list[PILImage.Image]:
        """The picture drawn anew with a share of its codes, `likeness`, left as they are, other ones in each.

        prompt: what it shows; left out, the model's own caption.
        """
        if not 0 <= likeness <= 1:
            raise BadInput(f"{likeness} does not lie between 0 and 1", where="likeness")
        codes = torch.tensor(self.codes(picture))
        given = []
        for number in range(seed, seed + count):
            kept = torch.rand(len(codes), generator=torch.Generator().manual_seed(number)) < likeness
            given.append(tuple(torch.where(kept, codes, -1).tolist()))
        said = self.caption(picture) if prompt is None else prompt
        return self.draw_all([said] * count, range(seed, seed + count), guidance, sampling, given)

    def codes(self, picture: Picture) -> tuple[int, ...]:
        """Ids of a picture's codes, row by row."""
        boi = self.vocabulary.boi
        ids = self.prompt(Document((Image(picture),)))
        return ids[ids.index(boi) + 1 : ids.index(boi) + 1 + self.vocabulary.image_length]

    def draw_all(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        guidance: float,
        sampling: Sampling,
        given: Sequence[tuple[int, ...]],
    ) -> list[PILImage.Image]:
        """A picture for each prompt, seed and row of given codes (−1: free); leading ones are read, not drawn."""
        self.tokenizer.image.network.check_decoder()
        v = self.vocabulary
        requests: list[Request] = []
        for prompt, seed, codes in zip(prompts, seeds, given, strict=True):
            document = Document((Text(prompt),) if prompt else ())
            ids, branches = self.prompt(document), self.guidance(document, guidance)
            begun = codes[: codes.index(-1)] if -1 in codes else codes
            if begun:
                begun = (v.boi, *begun)
                ids = (*ids, *begun)
                if branches is not None:
                    branches = Guidance(tuple((*branch, *begun) for branch in branches.branches), branches.weights)
            rules = Rules(v.block_length, format=() if begun else ("image",))
            requests.append(Request(ids, rules, image=sampling, guidance=branches, seed=seed, given=codes))
        if not requests:
            return []
        made = self.engine.generate(requests)
        blocks = [[*request.prompt, *ids] for request, ids in zip(requests, made, strict=True)]
        grids = torch.tensor([block[-1 - v.image_length : -1] for block in blocks])
        return self.tokenizer.image.decode(v.ids_to_codes(grids).unflatten(1, v.grid))

    # --- what it does: documents ---

    def generate(self, content: Content, **options: object) -> Document:
        """What follows the document or answers the conversation: text and pictures. Options as `generate_batch`."""
        seed = options.pop("seed", 0)
        return self.generate_batch([content], seeds=[seed], **options)[0]  # type: ignore[arg-type, list-item]

    def generate_batch(
        self,
        contents: Sequence[Content],
        *,
        max_new: int = 256,
        max_images: int | None = None,
        max_text: int | None = None,
        format: Sequence[PartKind] | None = None,
        guidance: Scales | None = None,
        text: Sampling = TEXT_SAMPLING,
        image: Sampling = IMAGE_SAMPLING,
        seeds: Sequence[int] | None = None,
    ) -> list[Document]:
        """What follows each; rows may be in different modalities at each step. Seeds are 0 for all unless given.

        max_new: ids at most, those of pictures included. max_images: left out, 1, or 0 where the bundle cannot draw.
        max_text: ids of one run of text at most. format: the parts to make, as ("text", "image", "text"); left out, the
        model chooses. guidance: of pictures, two-way, or (pictures, full prompt) for three-way.
        """
        chosen = seeds if seeds is not None else [0] * len(contents)
        rules = self.rules(max_new, max_images, max_text, format)
        requests = [
            Request(self.prompt(content), rules, text, image, self.guidance(content, guidance), seed)
            for content, seed in zip(contents, chosen, strict=True)
        ]
        return [self.decode(ids) for ids in self.engine.generate(requests)]

    def rules(self, max_new: int, max_images: int | None, max_text: int | None, format: Sequence[PartKind] | None) -> Rules:
        if max_images is None:
            max_images = int(self.tokenizer.image.config.decoder)
        rules = Rules(max_new, max_images, max_text, None if format is None else tuple(format))
        if rules.wants_images:
            self.tokenizer.image.network.check_decoder()
        return rules

    def stream(
        self,
        content: Content,
        *,
        max_new: int = 256,
        max_images: int | None = None,
        max_text: int | None = None,
        format: Sequence[PartKind] | None = None,
        guidance: Scales | None = None,
        text: Sampling = TEXT_SAMPLING,
        image: Sampling = IMAGE_SAMPLING,
        seed: int = 0,
        previews: int = 0,
    ) -> Iterator[Part | Forming]:
        """The same as `generate`, piece by piece: whole characters of text, and each picture when it is whole.

        previews: show a picture as `Forming` after each so many rows of its codes. Closing the iterator ends the work.
        """
        rules = self.rules(max_new, max_images, max_text, format)
        request = Request(self.prompt(content), rules, text, image, self.guidance(content, guidance), seed)
        assembler = Assembler(self.tokenizer, previews)
        for _, token in self.engine.stream([request], horizon=self.vocabulary.grid[1]):
            yield from assembler.push(token)
        yield from assembler.end()


def last_answer(conversation: Conversation) -> int:
    """Number of the last message that is the assistant's, or -1."""
    return max((n for n, message in enumerate(conversation.messages) if message.role == "assistant"), default=-1)
