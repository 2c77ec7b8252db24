"""Prompts: token ids of documents and conversations to be continued, few-shot examples, and prompts for guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chameleon.bundle import Prompting
from chameleon.document import Conversation, Document, Image, Message, Text
from chameleon.errors import BadInput
from chameleon.generation.guidance import Guidance, three_way, two_way
from chameleon.tokenizers.mixed import Content, MixedTokenizer, PreparedDocument

GuidanceScale = float | tuple[float, float]
"""The scale of two-way guidance, or (image scale, full scale) of three-way guidance; 1 is no guidance."""
Example = tuple[Document, str]
"""A prompt and the text that answers it."""


@dataclass(frozen=True)
class PromptBuilder:
    """Builds the prompts of a model."""

    tokenizer: MixedTokenizer
    prompting: Prompting

    @property
    def is_conversational(self) -> bool:
        """Whether the model was fine-tuned on conversations, so that prompts end with `sep`."""
        return self.prompting == "conversation"

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
        if guidance_scale is None or guidance_scale == 1:
            return None
        unconditional = self.token_ids(Document())
        if not isinstance(guidance_scale, tuple):
            return two_way(unconditional, guidance_scale)
        documents = [content] if isinstance(content, Document) else [message.content for message in content.messages]
        images = [part for document in documents for part in document.parts if isinstance(part, Image)]
        return three_way(self.token_ids(Document(images)), unconditional, *guidance_scale)


def index_of_last_answer(conversation: Conversation) -> int:
    """Return the index of the assistant's last message, or -1."""
    answers = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    return max(answers, default=-1)
