"""`Chameleon`, the public API: a loaded bundle that captions, answers, draws and generates documents."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image as PILImage
from torch import Tensor

from chameleon.bundle import Bundle
from chameleon.device import check_device
from chameleon.dialect import CODE, Grid
from chameleon.document import Document, Image, Part
from chameleon.errors import BadInput, as_bad_input
from chameleon.generation.constraints import OutputConstraints, PartKind
from chameleon.generation.engine import MAX_BATCH_SIZE, Engine
from chameleon.generation.guidance import mean_with
from chameleon.generation.image_requests import (
    Drawing,
    document_image_request,
    generated_image_codes,
    randomly_kept_codes,
    unpainted_codes,
    upper_codes,
)
from chameleon.generation.painting import Painter, Painting
from chameleon.generation.prompting import Example, GuidanceScale, PromptBuilder
from chameleon.generation.request import Request
from chameleon.generation.sampling import GREEDY, IMAGE_SAMPLING, TEXT_SAMPLING, Sampling
from chameleon.generation.streaming import PartialImage, StreamDecoder
from chameleon.generation.views import check_views, views_of_document
from chameleon.model.fastest_format import choose_weight_form
from chameleon.model.quantization import WeightFormat, convert_weights, fits_float16, make_exact
from chameleon.threads import THREADS, ThreadPolicy
from chameleon.tokenizers.fitting import Size
from chameleon.tokenizers.image import Picture, load_picture
from chameleon.tokenizers.mixed import Content
from chameleon.vocabulary import ImageBlock

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16, "float64": torch.float64}
GUIDANCE_SCALE = 1.25
SCORED_TOKENS, SCORED_LOGITS = 8192, 1 << 24
"""Tokens of a pass that scores captions, and logits that exist at one time."""
logger = logging.getLogger(__name__)


class Chameleon:
    """A model with its tokenizers, ready for generation. Its methods may be called from several threads."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        max_batch_size: int = MAX_BATCH_SIZE,
        draft_length: int = 1,
        weight_format: WeightFormat = "plain",
        compile: bool = False,
        exact: bool = False,
    ) -> None:
        """weight_format: the one that the bundle's matrices have; the other options are those of the `Engine`."""
        self.bundle = bundle
        self.model, self.tokenizer, self.vocabulary = bundle.model, bundle.tokenizer, bundle.vocabulary
        self.prompts = PromptBuilder(bundle.tokenizer, bundle.prompting, bundle.generation)
        generation = bundle.generation
        self.guidance_scale = GUIDANCE_SCALE if generation.guidance_scale is None else generation.guidance_scale
        """That of drawings, where no other is asked for; so are the three ways of sampling."""
        self.image_sampling = sampling_of(generation.image_sampling, IMAGE_SAMPLING)
        self.text_sampling = sampling_of(generation.text_sampling, TEXT_SAMPLING)
        self.edit_sampling = sampling_of(generation.edit_sampling, self.image_sampling)
        edit_scale = generation.edit_guidance_scale
        self.edit_guidance_scale = self.guidance_scale if edit_scale is None else edit_scale
        self.engine = Engine(
            bundle.model,
            bundle.vocabulary,
            max_batch_size=max_batch_size,
            draft_length=draft_length,
            weight_format=weight_format,
            compile=compile,
            exact=exact,
        )
        if exact:
            self.tokenizer.image.batch_size = 1

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        weight_format: WeightFormat | Literal["auto"] = "auto",
        max_batch_size: int = MAX_BATCH_SIZE,
        draft_length: int = 1,
        compile: bool = False,
        exact: bool = False,
    ) -> Chameleon:
        """Load a bundle (None: the shipped one).

        dtype: bfloat16, float32, float16 or float64. weight_format: plain, packed, float16, int8 or int4
        (`chameleon.model.quantization`). Where both are auto, a CPU uses the fastest form that changes likelihoods by less
        than 0.1% (`chameleon.model.fastest_format`), a GPU bfloat16. For a dtype that is given, auto is the fastest
        lossless format; for a format, its fastest dtype.
        max_batch_size: sequences that run at a time. draft_length: image codes verified in one forward pass (speculative
        decoding). compile: compile the decode step. exact: a seed alone determines a request's output, to the bit, in any
        batch and with any draft length; on CPUs alone, where it uses one thread and takes 1 to 1.5 times as long for one
        request and 2 to 3 times for many (the shipped model).

        Raises `BadInput` for files that are missing, altered or incompatible, and for weight formats that do not go with
        the dtype or device.
        """
        if dtype not in ("auto", *DTYPES):
            raise BadInput(f"{dtype!r} is none of auto, {', '.join(DTYPES)}", where="dtype")
        check_device(device)
        form = choose_weight_form(dtype, weight_format, device)
        bundle = Bundle.load(path, device=device, dtype=DTYPES[form.dtype])
        if weight_format == "auto" and form.weight_format == "float16" and not fits_float16(bundle.model):
            form = form._replace(weight_format="packed")
        convert_weights(bundle.model, form.weight_format)
        bundle.tokenizer.image.threads = ThreadPolicy(threads=1) if exact else THREADS
        if exact:
            make_exact(bundle.model)
        logger.info("%s", form)
        return cls(
            bundle,
            max_batch_size=max_batch_size,
            draft_length=draft_length,
            weight_format=form.weight_format,
            compile=compile,
            exact=exact,
        )

    # --- token ids and logits ---

    def encode(self, content: Content) -> Tensor:
        """Return the token ids int64 [T] of a complete document or conversation."""
        return self.tokenizer.encode(content)

    def decode(self, token_ids: Tensor | Sequence[int]) -> Document:
        """Return the document that token ids [T] stand for; never raises for malformed ones."""
        return self.tokenizer.decode(token_ids)

    @torch.inference_mode()
    def logits(self, token_ids: Tensor) -> Tensor:
        """Return the logits float32 [B, T, vocab_size] of token ids int64 [B, T]."""
        return self.model.logits(self.model(token_ids.to(self.engine.device))).float()

    # --- captions and answers ---

    def caption(
        self,
        picture: Picture,
        *,
        examples: Sequence[tuple[Picture, str]] = (),
        max_new_tokens: int | None = None,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        views: int = 1,
    ) -> str:
        """Caption a picture.

        examples: few-shot (picture, caption) pairs. max_new_tokens: by default the model's own. views: read the picture so
        many times, each time a little shifted and scaled, and go by the mean of the logits (test-time augmentation). That
        takes as many times as long, and helps models that have seen few changed pictures.
        """
        return self.caption_batch(
            [picture], examples=examples, max_new_tokens=max_new_tokens, sampling=sampling, seeds=[seed], views=views
        )[0]

    def caption_batch(
        self,
        pictures: Sequence[Picture],
        *,
        examples: Sequence[tuple[Picture, str]] = (),
        max_new_tokens: int | None = None,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        views: int = 1,
    ) -> list[str]:
        """Caption several pictures in one batch; the examples are prefilled once. Default seeds: 0, 1, 2 …"""
        shots = [(self.prompts.caption_document(picture), text) for picture, text in examples]
        prompts = [self.prompts.caption_document(picture) for picture in pictures]
        return self.generate_texts(prompts, shots, max_new_tokens, sampling, seeds, views)

    def answer(
        self,
        picture: Picture,
        question: str,
        *,
        examples: Sequence[tuple[Picture, str, str]] = (),
        max_new_tokens: int | None = None,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        views: int = 1,
    ) -> str:
        """Answer a question about a picture.

        examples: few-shot (picture, question, answer) triples. views: as of `caption`.
        """
        pairs, seeds = [(picture, question)], [seed]
        return self.answer_batch(
            pairs, examples=examples, max_new_tokens=max_new_tokens, sampling=sampling, seeds=seeds, views=views
        )[0]

    def answer_batch(
        self,
        questions: Sequence[tuple[Picture, str]],
        *,
        examples: Sequence[tuple[Picture, str, str]] = (),
        max_new_tokens: int | None = None,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        views: int = 1,
    ) -> list[str]:
        """Answer several (picture, question) pairs in one batch; the examples are prefilled once.

        Default seeds: 0, 1, 2 …
        """
        shots = [(self.prompts.answer_document(picture, question), text) for picture, question, text in examples]
        prompts = [self.prompts.answer_document(picture, question) for picture, question in questions]
        return self.generate_texts(prompts, shots, max_new_tokens, sampling, seeds, views)

    def generate_texts(
        self,
        prompts: Sequence[Document],
        examples: Sequence[Example],
        max_new_tokens: int | None,
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
        views: int = 1,
    ) -> list[str]:
        """Generate text alone after each prompt, preceded by few-shot examples. views: of each prompt, see `caption`."""
        check_views(views, self.engine.scheduler.max_sequences)
        default = self.bundle.generation.max_new_tokens
        constraints = OutputConstraints(default if max_new_tokens is None else max_new_tokens)
        requests = []
        for prompt, seed in zip(prompts, seeds_of(prompts, seeds), strict=True):
            shown = [self.prompts.with_examples(examples, view) for view in views_of_document(prompt, views)]
            first, *others = self.prompts.encode_all([self.prompts.prepare(content) for content in shown])
            guidance = mean_with(others) if others else None
            requests.append(Request(first, constraints, sampling, guidance=guidance, seed=seed))
        texts = [self.decode(token_ids).text.strip() for token_ids in self.engine.generate(requests)]
        if examples and not self.prompts.is_conversational:  # in a document the next example starts on a new line
            texts = [text.partition("\n")[0].strip() for text in texts]
        return texts

    # --- images ---

    def draw(
        self,
        prompt: str,
        *,
        seed: int = 0,
        size: Size | None = None,
        guidance_scale: float | None = None,
        sampling: Sampling | None = None,
    ) -> PILImage.Image:
        """Draw an image of what the prompt says.

        size: (width, height) in pixels, where the model draws several; by default it chooses, or draws its usual one.
        guidance_scale, sampling: by default the model's own; a scale of 1 switches guidance off.
        """
        return self.draw_batch([prompt], seeds=[seed], size=size, guidance_scale=guidance_scale, sampling=sampling)[0]

    def draw_batch(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        size: Size | None = None,
        guidance_scale: float | None = None,
        sampling: Sampling | None = None,
    ) -> list[PILImage.Image]:
        """Draw an image for each prompt, in one batch. Default seeds: 0, 1, 2 …"""
        drawings = [Drawing(self.grid_of(size)) for _ in prompts]
        return self.generate_images(prompts, seeds_of(prompts, seeds), guidance_scale, sampling, drawings)

    def draw_samples(
        self,
        prompt: str,
        num_images: int,
        *,
        seed: int = 0,
        size: Size | None = None,
        guidance_scale: float | None = None,
        sampling: Sampling | None = None,
        ranked: bool = False,
    ) -> list[PILImage.Image]:
        """Draw several images of one prompt, with seeds `seed`, `seed` + 1 …; ranked: best ones first, by `rank`."""
        seeds = range(seed, seed + num_images)
        images = self.draw_batch(
            [prompt] * num_images, seeds=seeds, size=size, guidance_scale=guidance_scale, sampling=sampling
        )
        return [images[index] for index in self.rank(images, prompt)] if ranked else images

    def edit(
        self,
        picture: Picture,
        instruction: str,
        num_images: int = 1,
        *,
        size: Size | None = None,
        seed: int = 0,
        guidance_scale: float | None = None,
        sampling: Sampling | None = None,
    ) -> list[PILImage.Image]:
        """Draw a picture as an instruction changes it, `num_images` times, with seeds `seed`, `seed` + 1 …

        The picture and the instruction are a prompt that the model answers with an image. size: by default the picture's.
        """
        own_grid = self.tokenizer.fitter.grid_for(load_picture(picture).size)
        drawing = Drawing(own_grid if size is None else self.grid_of(size))
        documents = [self.prompts.edit_document(picture, instruction)] * num_images
        scale = self.edit_guidance_scale if guidance_scale is None else guidance_scale
        seeds = range(seed, seed + num_images)
        return self.images_after(documents, seeds, scale, sampling or self.edit_sampling, [drawing] * num_images)

    def rank(self, pictures: Sequence[Picture], caption: str) -> list[int]:
        """Return the indices of the pictures, the one first for which the caption has the highest likelihood."""
        scores = self.caption_log_likelihoods(pictures, caption)
        return sorted(range(len(scores)), key=lambda index: -scores[index])

    @torch.inference_mode()
    def caption_log_likelihoods(self, pictures: Sequence[Picture], caption: str) -> list[float]:
        """Return for each picture the mean log-likelihood (natural logarithm) of the caption's tokens and eos after it."""
        if not pictures:
            return []
        caption_ids = [*self.tokenizer.text_to_ids(caption), self.vocabulary.answer_end]
        prompts = [self.prompts.token_ids(self.prompts.caption_document(picture)) for picture in pictures]
        scores: dict[int, float] = {}
        for length in sorted(set(map(len, prompts))):  # pictures of other shapes have prompts of other lengths
            indices = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
            num_together = max(1, SCORED_TOKENS // (length + len(caption_ids)))
            positions = max(1, SCORED_LOGITS // (num_together * self.vocabulary.size))
            for first in range(0, len(indices), num_together):
                in_batch = indices[first : first + num_together]
                batch = torch.tensor([[*prompts[index], *caption_ids] for index in in_batch], device=self.engine.device)
                hidden = self.model(batch[:, :-1])[:, length - 1 :]
                sums = torch.zeros(len(in_batch), device=batch.device)
                expected = batch[:, length:].split(positions, dim=1)
                for states, targets in zip(hidden.split(positions, dim=1), expected, strict=True):
                    log_probs = self.model.logits(states).float().log_softmax(-1)
                    sums += log_probs.gather(2, targets.unsqueeze(2)).sum(dim=(1, 2))
                scores.update(zip(in_batch, (sums / len(caption_ids)).tolist(), strict=True))
        return [scores[index] for index in range(len(prompts))]

    def complete(
        self,
        picture: Picture,
        *,
        keep: float = 0.5,
        prompt: str = "",
        num_images: int = 1,
        seed: int = 0,
        guidance_scale: float | None = 1.0,
        sampling: Sampling | None = None,
    ) -> list[PILImage.Image]:
        """Keep the upper part of a picture, in whole rows of codes, and draw the rest, `num_images` times."""
        block = self.encode_picture(picture)
        drawing = Drawing(block.grid, upper_codes(block.code_ids, block.grid, keep))
        seeds = range(seed, seed + num_images)
        return self.generate_images([prompt] * num_images, seeds, guidance_scale, sampling, [drawing] * num_images)

    def variations(
        self,
        picture: Picture,
        num_images: int,
        *,
        keep: float = 0.3,
        prompt: str | None = None,
        seed: int = 0,
        guidance_scale: float | None = None,
        sampling: Sampling | None = None,
    ) -> list[PILImage.Image]:
        """Draw variations of a picture that keep a random share `keep` of its codes, other codes in each.

        prompt: what the picture shows; by default the model's own caption.
        """
        seeds = range(seed, seed + num_images)
        block = self.encode_picture(picture)
        drawings = [Drawing(block.grid, randomly_kept_codes(block.code_ids, keep, image_seed)) for image_seed in seeds]
        prompts = [self.caption(picture) if prompt is None else prompt] * num_images
        return self.generate_images(prompts, seeds, guidance_scale, sampling, drawings)

    def paint(
        self,
        picture: Picture,
        mask: PILImage.Image,
        prompt: str = "",
        num_images: int = 1,
        *,
        candidates: int = 1,
        rounds: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        sampling: Sampling | None = None,
    ) -> list[PILImage.Image]:
        """Draw a part of a picture anew; all other pixels stay.

        mask: as large as the picture; the part is where it is not black. Codes of cells with a marked pixel are generated,
        each after the prompt and all codes before it, of which the others are those of the picture.

        A code is thus drawn without a look at what follows it. candidates: of so many continuations the one is kept after
        which the codes that follow are likeliest. rounds: in further rounds the marked codes of each row are drawn anew, as
        many times, between what then stands before and after them, and kept where that makes what follows likelier.
        """
        if candidates < 1 or rounds < 1 or (rounds > 1 and candidates < 2):
            raise BadInput(f"candidates {candidates}, rounds {rounds}", where="paint", remedy="use 2 candidates or more")
        self.tokenizer.image.network.check_decoder()
        task = self.painting(picture, mask)
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        sampling = sampling or self.image_sampling
        codes = self.painter(task, prompt, guidance_scale, sampling).run(num_images, candidates, rounds, seed)
        return [task.merge(image) for image in self.tokenizer.image.decode_all(codes)]

    def painter(self, task: Painting, prompt: str, guidance_scale: float, sampling: Sampling) -> Painter:
        """Return what draws the part of a picture that is to be drawn anew."""
        scores = self.code_log_likelihoods
        return Painter(self.prompts, self.generate_codes, scores, task, prompt, guidance_scale, sampling)

    def painting(self, picture: Picture, mask: PILImage.Image) -> Painting:
        """Return what is needed to draw a part of a picture anew, see `paint`."""
        image, fitter = load_picture(picture), self.tokenizer.fitter
        if mask.size != image.size:
            raise BadInput(f"{mask.size} pixels, but the picture has {image.size}", where="mask")
        fitted = fitter.fit(image)
        painted = fitter.fit_mask(mask)
        (codes,) = self.tokenizer.image.encode_arrays([fitted])
        grid = (codes.shape[0], codes.shape[1])
        code_ids = self.vocabulary.codes_to_ids(codes).flatten().tolist()
        drawing = Drawing(grid, unpainted_codes(code_ids, painted, grid))
        return Painting(PILImage.fromarray(fitted), painted, drawing)

    def encode_picture(self, picture: Picture) -> ImageBlock:
        """Return the grid of a picture, fitted as in a prompt, and the token ids of its codes."""
        token_ids = self.prompts.token_ids(Document((Image(picture),)))
        block = self.vocabulary.read_image(token_ids, token_ids.index(self.vocabulary.boi))
        assert block is not None
        return block

    def grid_of(self, size: Size | None) -> Grid | None:
        """Return the grid of a drawing of (width, height) pixels.

        Without a size it is the usual one where prompts name it or there is no other; else None, the model chooses. Raises
        `BadInput` for a size that the model cannot draw.
        """
        if size is not None:
            return self.tokenizer.fitter.grid_of_size(size)
        has_choice = len(self.vocabulary.dialect.grids) > 1 and not self.prompts.prompt_names_size
        return None if has_choice else self.vocabulary.grid

    def generate_images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        guidance_scale: float | None,
        sampling: Sampling | None,
        drawings: Sequence[Drawing],
    ) -> list[PILImage.Image]:
        """Generate an image for each prompt, seed and drawing."""
        documents = [self.prompts.draw_document(p, drawing.grid) for p, drawing in zip(prompts, drawings, strict=True)]
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return self.images_after(documents, seeds, guidance_scale, sampling or self.image_sampling, drawings)

    def draw_after(self, documents: Sequence[Document]) -> list[PILImage.Image]:
        """Draw an image after each document as it stands, without the words that prompts for drawings have."""
        drawings = [Drawing(self.grid_of(None))] * len(documents)
        return self.images_after(documents, range(len(documents)), self.guidance_scale, self.image_sampling, drawings)

    def images_after(
        self,
        documents: Sequence[Document],
        seeds: Sequence[int],
        guidance_scale: float,
        sampling: Sampling,
        drawings: Sequence[Drawing],
    ) -> list[PILImage.Image]:
        """Generate an image after each document."""
        self.tokenizer.image.network.check_decoder()
        if not documents:
            return []
        requests = [
            document_image_request(
                self.prompts, document, drawing, seed=seed, guidance_scale=guidance_scale, sampling=sampling
            )
            for document, seed, drawing in zip(documents, seeds, drawings, strict=True)
        ]
        codes = self.generate_codes(requests)
        return self.tokenizer.image.decode_all(codes)

    def generate_codes(self, requests: Sequence[Request]) -> list[Tensor]:
        """Return the codes int64 [h, w] of the image that each request asks for."""
        generated = self.engine.generate(requests)
        return [
            generated_image_codes(request, token_ids, self.vocabulary)
            for request, token_ids in zip(requests, generated, strict=True)
        ]

    @torch.inference_mode()
    def code_log_likelihoods(self, prompt: Sequence[int], codes: Sequence[Tensor]) -> Tensor:
        """Return the natural logarithm of the probability of each code of images after a prompt: float32 [n, h · w].

        codes: int64 [h, w] each, of one shape. Each probability is that among all codes, after the prompt's token ids and
        the codes before it, without guidance or temperature.
        """
        v, head = self.vocabulary, self.engine.decoder.heads.codes
        grid = (codes[0].shape[0], codes[0].shape[1])
        block = torch.tensor(v.image_block(grid)[:-1])
        code_positions = (block == CODE).nonzero().flatten()
        before = len(prompt) + code_positions.to(self.engine.device) - 1
        columns = torch.full((v.size,), -1).scatter(0, head.token_ids.cpu(), torch.arange(len(head.token_ids)))
        is_code = v.is_image(head.token_ids)
        scores = []
        for image_codes in codes:  # one at a time: the logits of a large image take much memory
            code_ids = v.codes_to_ids(image_codes.flatten())
            token_ids = torch.cat((torch.tensor(prompt), block.index_put((code_positions,), code_ids)))
            hidden = self.model(token_ids[None, :-1].to(self.engine.device))[0, before]
            log_probs = head.logits(hidden).float().masked_fill(~is_code, -torch.inf).log_softmax(-1)
            scores.append(log_probs.gather(1, columns[code_ids].to(log_probs.device)[:, None])[:, 0].cpu())
        return torch.stack(scores)

    # --- documents ---

    def generate(
        self,
        content: Content,
        *,
        max_new_tokens: int = 256,
        max_images: int | None = None,
        max_text_tokens: int | None = None,
        format: Sequence[PartKind] | None = None,
        guidance_scale: GuidanceScale | None = None,
        text_sampling: Sampling | None = None,
        image_sampling: Sampling | None = None,
        seed: int = 0,
    ) -> Document:
        """Continue a document or answer a conversation with text and images. Options as in `generate_batch`."""
        return self.generate_batch(
            [content],
            max_new_tokens=max_new_tokens,
            max_images=max_images,
            max_text_tokens=max_text_tokens,
            format=format,
            guidance_scale=guidance_scale,
            text_sampling=text_sampling,
            image_sampling=image_sampling,
            seeds=[seed],
        )[0]

    def generate_batch(
        self,
        contents: Sequence[Content],
        *,
        max_new_tokens: int = 256,
        max_images: int | None = None,
        max_text_tokens: int | None = None,
        format: Sequence[PartKind] | None = None,
        guidance_scale: GuidanceScale | None = None,
        text_sampling: Sampling | None = None,
        image_sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Document]:
        """Continue each document or conversation; at each step some may be generating text and others images.

        max_new_tokens: those of images included. max_images: by default 1, or 0 where the bundle has no image decoder.
        max_text_tokens: of each run of text. format: the parts to generate, as ("text", "image", "text"); by default the
        model chooses. guidance_scale: of images, two-way, or (image scale, full scale) for three-way guidance. seeds: by
        default 0, 1, 2 …
        """
        constraints = self.constraints(max_new_tokens, max_images, max_text_tokens, format)
        requests = [
            self.document_request(content, constraints, guidance_scale, text_sampling, image_sampling, seed)
            for content, seed in zip(contents, seeds_of(contents, seeds), strict=True)
        ]
        return [self.decode(token_ids) for token_ids in self.engine.generate(requests)]

    def stream(
        self,
        content: Content,
        *,
        max_new_tokens: int = 256,
        max_images: int | None = None,
        max_text_tokens: int | None = None,
        format: Sequence[PartKind] | None = None,
        guidance_scale: GuidanceScale | None = None,
        text_sampling: Sampling | None = None,
        image_sampling: Sampling | None = None,
        seed: int = 0,
        preview_every_n_rows: int = 0,
    ) -> Iterator[Part | PartialImage]:
        """Like `generate`, but yield text as complete characters arrive, and each image when it is complete.

        preview_every_n_rows: also yield a `PartialImage` after each so many rows of codes. Closing the iterator cancels the
        request.
        """
        constraints = self.constraints(max_new_tokens, max_images, max_text_tokens, format)
        request = self.document_request(content, constraints, guidance_scale, text_sampling, image_sampling, seed)
        decoder = StreamDecoder(self.tokenizer, preview_every_n_rows)
        for _, token_id in self.engine.stream([request], max_buffered_codes=max(self.vocabulary.grid)):
            yield from decoder.push(token_id)
        yield from decoder.finish()

    def constraints(
        self,
        max_new_tokens: int,
        max_images: int | None,
        max_text_tokens: int | None,
        format: Sequence[PartKind] | None,
    ) -> OutputConstraints:
        """Return the constraints of these options. Raise `BadInput` for images where the bundle has no image decoder."""
        if max_images is None:
            max_images = int(self.tokenizer.image.config.decoder)
        constraints = OutputConstraints(
            max_new_tokens, max_images, max_text_tokens, None if format is None else tuple(format)
        )
        if constraints.image_limit:
            self.tokenizer.image.network.check_decoder()
        return constraints

    def document_request(
        self,
        content: Content,
        constraints: OutputConstraints,
        guidance_scale: GuidanceScale | None,
        text_sampling: Sampling | None,
        image_sampling: Sampling | None,
        seed: int,
    ) -> Request:
        guidance = self.prompts.guidance(content, guidance_scale)
        text, image = text_sampling or self.text_sampling, image_sampling or self.image_sampling
        return Request(self.prompts.token_ids(content), constraints, text, image, guidance, seed)


def sampling_of(given: dict[str, float] | None, default: Sampling) -> Sampling:
    """Return the sampling with these fields, by default another one. Raise `BadInput` for unknown or invalid fields."""
    with as_bad_input("sampling", "the bundle's configuration"):
        sampling = default if given is None else Sampling(**given)  # type: ignore[arg-type]
    return sampling


def seeds_of(batch: Sequence[object], seeds: Sequence[int] | None) -> Sequence[int]:
    """Return the seeds of a batch: those given, or 0, 1, 2 …"""
    return range(len(batch)) if seeds is None else seeds
