"""Prompts: token ids of documents and conversations to be continued, few-shot examples, and prompts for guidance."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from chameleon.bundle import GenerationConfig, Prompting
from chameleon.dialect import Grid
from chameleon.document import Conversation, Document, Image, Message, Part, Text
from chameleon.errors import BadInput
from chameleon.generation.guidance import Guidance, image_only, three_way, two_way
from chameleon.tokenizers.image import Picture
from chameleon.tokenizers.mixed import Content, MixedTokenizer, PreparedDocument, merge_texts

GuidanceScale = float | tuple[float, float]
"""The scale of two-way guidance, or (image scale, full scale) of three-way guidance; 1 is no guidance."""
Example = tuple[Document, str]
"""A prompt and the text that answers it."""


@dataclass(frozen=True)
class PromptBuilder:
    """Builds the prompts of a model."""

    tokenizer: MixedTokenizer
    prompting: Prompting
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    @property
    def is_conversational(self) -> bool:
        """Whether the model was fine-tuned on conversations, so that prompts end with `sep`."""
        return self.prompting == "conversation"

    # --- prompts for what a model does ---

    def caption_document(self, picture: Picture) -> Document:
        """Return the prompt for a caption of a picture."""
        return fill(self.generation.caption_prompt, picture)

    def answer_document(self, picture: Picture, question: str) -> Document:
        """Return the prompt for the answer to a question about a picture."""
        return fill(self.generation.answer_prompt, picture, question=question)

    def edit_document(self, picture: Picture, instruction: str) -> Document:
        """Return the prompt for a picture that is changed as the instruction says."""
        return fill(self.generation.edit_prompt, picture, instruction=instruction)

    def draw_document(self, prompt: str, grid: Grid | None) -> Document:
        """Return the prompt for a drawing, of a size if its grid is given; an empty one for an empty prompt."""
        if not prompt:
            return Document()
        if grid is None:
            return fill(self.generation.draw_prompt, None, prompt=prompt)
        width, height = self.tokenizer.fitter.size_of(grid)
        return fill(self.generation.sized_draw_prompt, None, prompt=prompt, width=str(width), height=str(height))

    @property
    def prompt_names_size(self) -> bool:
        """Whether prompts for drawings name the size, which then is the drawing's."""
        return "{width}" in self.generation.draw_prompt

    # --- token ids ---

    def token_ids(self, content: Content) -> tuple[int, ...]:
        """Return the token ids of a prompt. The last message of a conversation must not be the assistant's."""
        return self.encode_all([self.prepare(content)])[0]

    def prepare(self, content: Content) -> list[PreparedDocument]:
        """Read a prompt's pictures and encode its texts: all that does without the image tokenizer's network."""
        preparer, is_conversational = self.tokenizer.preparer, self.is_conversational
        if isinstance(content, Document):
            return [preparer.prepare_prompt(content, conversation=is_conversational)]
        if content.messages[-1].role == "assistant":
            raise BadInput("the last message is the assistant's, so there is nothing to answer", where="conversation")
        num_answered = index_of_last_answer(content) + 1
        unanswered = [part for message in content.messages[num_answered:] for part in message.content.parts]
        history = [preparer.prepare(Conversation(content.messages[:num_answered]))] if num_answered else []
        return [*history, preparer.prepare_prompt(Document(unanswered), conversation=is_conversational)]

    def encode_all(self, prompts: Sequence[Sequence[PreparedDocument]]) -> list[tuple[int, ...]]:
        """Return the token ids of several prompts that `prepare` returned; their pictures are encoded together."""
        parts = iter(self.tokenizer.insert_image_codes([document for prompt in prompts for document in prompt]))
        result = []
        for prompt in prompts:
            first, *rest = (next(parts)[0].tolist() for _ in prompt)
            result.append((*first, *(token_id for part in rest for token_id in part[1:])))  # bos at the beginning only
        return result

    def with_examples(self, examples: Sequence[Example], prompt: Document) -> Content:
        """Return a few-shot prompt: the examples as earlier turns of a conversation, or as lines of a document."""
        if not examples:
            return prompt
        if self.is_conversational:
            messages = []
            for question, answer in examples:
                messages += [Message("user", question), Message("assistant", Document((Text(answer),)))]
            return Conversation([*messages, Message("user", prompt)])
        lines = [part for question, answer in examples for part in (*question.parts, Text(f" {answer}\n"))]
        return Document([*lines, *prompt.parts])

    def guidance(self, content: Content, guidance_scale: GuidanceScale | None) -> Guidance | None:
        """Return the guidance of images generated after the content; None for a scale of None or 1.

        The unconditional prompt is the empty one, which fine-tuning uses for one prompt in ten; the prompt of the image
        scale has the images of the content without its text.
        """
        scales = guidance_scale if isinstance(guidance_scale, tuple) else (guidance_scale,)
        if not all(scale is None or math.isfinite(scale) for scale in scales):
            raise BadInput(f"{guidance_scale} is not finite", where="guidance_scale")
        if guidance_scale is None or guidance_scale == 1:
            return None
        if self.generation.unconditional == "image_only":
            if isinstance(guidance_scale, tuple):
                raise BadInput("this model knows guidance by one scale", where="guidance_scale")
            return image_only(self.tokenizer.vocabulary.boi, guidance_scale)
        unconditional = self.token_ids(Document())
        if not isinstance(guidance_scale, tuple):
            return two_way(unconditional, guidance_scale)
        documents = [content] if isinstance(content, Document) else [message.content for message in content.messages]
        images = [part for document in documents for part in document.parts if isinstance(part, Image)]
        return three_way(self.token_ids(Document(images)), unconditional, *guidance_scale)


PLACEHOLDER = re.compile(r"\{(image|prompt|question|instruction|width|height)\}")


def fill(template: str, picture: Picture | None, **texts: str) -> Document:
    """Return a prompt of `GenerationConfig` with what is given in the places of its names."""
    parts: list[Part] = []
    for index, piece in enumerate(PLACEHOLDER.split(template)):
        if index % 2 and piece == "image":
            assert picture is not None
            parts.append(Image(picture))
        elif text := texts[piece] if index % 2 else piece:
            parts.append(Text(text))
    return Document(tuple(merge_texts(parts)))


def index_of_last_answer(conversation: Conversation) -> int:
    """Return the index of the assistant's last message, or -1."""
    answers = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    return max(answers, default=-1)
