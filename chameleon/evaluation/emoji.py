"""The suite on the embedded set: reconstruction, captions, questions, drawings, mixed documents, likelihood."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image as PILImage

from chameleon.data import emoji, labelled, mixed_tasks
from chameleon.data.labelled import LabelledPicture
from chameleon.data.picture_tasks import thing_of
from chameleon.data.questions import NAME_QUESTIONS, Question, questions_about, without_colour
from chameleon.document import Document, Image, Text
from chameleon.errors import BadInput, check_seed
from chameleon.evaluation.caption_metrics import CiderD, simple_words
from chameleon.evaluation.counting import COUNTED_THINGS, NUMBERS, count_objects, several, side_by_side
from chameleon.evaluation.drawings import (
    DrawingJudge,
    Hit,
    coloured_prompts,
    differing_codes,
    unseen_colours,
)
from chameleon.evaluation.likelihood import document_bits
from chameleon.evaluation.mixed import MAX_IMAGES, MAX_NEW_TOKENS, Truth, has_right_form, held_out_prompts
from chameleon.evaluation.part import EvaluatedModel, Item, LocalModel, Output, Part, Scores, draw_items, image_tokenizer
from chameleon.evaluation.pictures import score_reconstructions
from chameleon.evaluation.statistics import Figure, Metric, Term
from chameleon.evaluation.suite import fingerprint_of
from chameleon.generation.chameleon import GUIDANCE_SCALE, Chameleon
from chameleon.generation.engine import MAX_BATCH_SIZE
from chameleon.generation.sampling import GREEDY, IMAGE_SAMPLING, Sampling
from chameleon.generation.views import check_views
from chameleon.tokenizers.image import load_picture

NAMED_LANGUAGES = ("de", "es", "fr", "ja", "zh")
"""Languages in which names are asked for."""
QUICK_PARTS = ("reconstruction", "captions", "questions", "drawings", "likelihood")
"""Parts that take minutes on a CPU."""
MAX_ANSWER_TOKENS = 30
NUM_COLOURED, NUM_UNSEEN_COLOURS = 200, 100
NUM_VARIED, NUM_VARIATIONS = 100, 9
NUM_MIXED_PROMPTS = 200
NUM_EDITS = 200
MAX_BYTES = 200_000
"""Of text whose likelihood is measured, of each kind."""
Progress = Callable[[str, int, int], None]
"""Called as (part, number of items done, total)."""


def no_progress(part: str, num_done: int, total: int) -> None:
    """Report nothing."""


@dataclass
class EmojiSuite:
    """Settings of the suite on the embedded set."""

    parts: list[str] = field(default_factory=lambda: list(QUICK_PARTS))
    """Of `PARTS`; or all."""
    concepts: int | None = None
    """A subset of this many concepts."""
    drawings: int = 200
    """Number of names that are drawn."""
    seed: int = 0
    guidance_scale: float = GUIDANCE_SCALE
    temperature: float = IMAGE_SAMPLING.temperature
    top_p: float = IMAGE_SAMPLING.top_p
    views: int = 1
    """Of each picture that is read (test-time augmentation)."""

    def build_parts(self) -> list[Part]:
        """Return the parts. Raise `BadInput` for unknown ones, and where no style is held out."""
        check_seed(self.seed)
        check_views(self.views, MAX_BATCH_SIZE)
        names = list(PARTS) if self.parts == ["all"] else self.parts
        for name in names:
            if name not in PARTS:
                raise BadInput(f"no part {name!r}", where="emoji.parts", remedy=f"use {', '.join(PARTS)} or all")
        pictures = EmojiPictures(self)
        return [PARTS[name](pictures) for name in names if name != "drawings" or self.drawings]

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of the embedded set."""
        return {"emoji": fingerprint_of(sorted(labelled.EMBEDDED.glob("emoji*")))}


class EmojiPictures:
    """The pictures that the parts share, and the judge of drawings."""

    def __init__(self, suite: EmojiSuite) -> None:
        self.suite = suite
        self.training_set, self.held_out = (emoji.subset(split, suite.concepts) for split in ("train", "validation"))
        if not self.held_out:
            raise BadInput(f"no style is held out of {suite.concepts} concepts", where="emoji.concepts", remedy="use more")
        self.shown = labelled.representatives(self.held_out, suite.seed)
        self.sampling = Sampling(suite.temperature, suite.top_p)

    @cached_property
    def judge(self) -> DrawingJudge:
        return DrawingJudge(self.training_set, self.held_out, "cuda" if torch.cuda.is_available() else "cpu")


class EmojiPart:
    """A part of the suite; subclasses say what is asked and how answers are scored."""

    name: str
    batch_size = 64

    def __init__(self, pictures: EmojiPictures) -> None:
        self.pictures, self.suite = pictures, pictures.suite
        self.method: dict[str, Any] = {}


def is_same(answer: str, expected: str) -> float:
    """Return 1 if two texts have the same words."""
    return float(simple_words(answer) == simple_words(expected))


def share_of_commonest(answers: Sequence[str]) -> float:
    """Return how often one is right who always gives the commonest answer."""
    return Counter(answers).most_common(1)[0][1] / len(answers)


def reconstructions(model: EvaluatedModel, pictures: Sequence[PILImage.Image]) -> list[PILImage.Image]:
    """Return pictures after encoding and decoding."""
    return image_tokenizer(model).decode(image_tokenizer(model).encode(pictures))


def shares_of(hits: Sequence[Hit]) -> dict[str, Figure]:
    """Return the shares of what is right about reconstructions, which bound what drawings can reach."""
    return {
        f"{name}_of_reconstructions": Figure(sum(hit[name] for hit in hits) / len(hits), count=len(hits))
        for name in hits[0]
    }


def load_all(outputs: Sequence[Output]) -> list[PILImage.Image]:
    return [load_picture(output) for output in outputs]


# --- the image tokenizer ---


class Reconstruction(EmojiPart):
    """PSNR and ST-LPIPS of held-out pictures, and how much of the codebook they use."""

    name = "reconstruction"

    def items(self) -> list[Item]:
        return [Item(entry.key, entry.picture, group=entry.concept) for entry in self.pictures.held_out]

    def run(self, model: EvaluatedModel, items: Sequence[Item], first: int) -> list[Output]:
        return reconstructions(model, [item.prompt for item in items])

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        return score_reconstructions(image_tokenizer(model), [item.prompt for item in items], outputs)


class Recognition(EmojiPart):
    """How often a reconstruction is recognised, which bounds what a drawing can reach; also by kind of thing."""

    name = "recognition"

    def items(self) -> list[Item]:
        return [Item(entry.key, entry.picture, entry.caption, data=entry) for entry in self.pictures.shown]

    def run(self, model: EvaluatedModel, items: Sequence[Item], first: int) -> list[Output]:
        return reconstructions(model, [item.prompt for item in items])

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        hits = self.pictures.judge.hits(load_all(outputs), [item.expected for item in items])
        return recognised(self.pictures.judge, hits, [item.data.group for item in items])


def recognised(judge: DrawingJudge, hits: Sequence[Hit], kinds: Sequence[str]) -> Scores:
    """Return the shares of drawings that show the right emoji, in all and by kind of thing."""
    rows: list[dict[str, Term]] = []
    for hit, kind in zip(hits, kinds, strict=True):
        rows.append({**hit, f"right_among_10, {kind}": hit["right_among_10"]})
    among_10, nearest = (Metric(base_rate=count / judge.num_names) for count in (10, 1))
    by_kind = {f"right_among_10, {kind}": among_10 for kind in sorted(set(kinds))}
    return Scores(rows, {"right_among_10": among_10, "right_nearest": nearest, **by_kind})


# --- reading pictures ---


class Captions(EmojiPart):
    """Greedy captions of one held-out picture of each concept, against its name; CIDEr-D against name and keywords."""

    name = "captions"

    def items(self) -> list[Item]:
        return [
            Item(entry.key, entry.picture, entry.caption, data=[entry.caption, " ".join(entry.tags)])
            for entry in self.pictures.shown
        ]

    def run(self, model: EvaluatedModel, items: Sequence[Item], first: int) -> list[Output]:
        prompts = [Document((Image(item.prompt),)) for item in items]
        return model.generate_texts(prompts, (), MAX_ANSWER_TOKENS, GREEDY, views=self.suite.views)

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        cider = CiderD([[simple_words(text) for text in item.data] for item in items])
        rows: list[dict[str, Term]] = [
            {"exact_name": is_same(output, item.expected), "cider_d": cider.score(simple_words(output), index)}
            for index, (item, output) in enumerate(zip(items, outputs, strict=True))
        ]
        base_rate = share_of_commonest([item.expected for item in items])
        return Scores(rows, {"exact_name": Metric(base_rate=base_rate), "cider_d": Metric(is_share=False)})


class Asked(EmojiPart):
    """Questions with one right answer; the family of each names its metric."""

    def asked(self) -> list[tuple[LabelledPicture, Question]]:
        raise NotImplementedError

    def items(self) -> list[Item]:
        return [
            Item(
                f"{entry.key} {question.question}",
                Document((Image(entry.picture), Text(question.question))),
                question.answer,
                group=entry.concept,
                data=question.family,
            )
            for entry, question in self.asked()
        ]

    def run(self, model: EvaluatedModel, items: Sequence[Item], first: int) -> list[Output]:
        prompts = [item.prompt for item in items]
        return model.generate_texts(prompts, (), MAX_ANSWER_TOKENS, GREEDY, views=self.suite.views)

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        rows: list[dict[str, Term]] = [
            {item.data: is_same(output, item.expected)} for item, output in zip(items, outputs, strict=True)
        ]
        of_family: dict[str, list[str]] = {}
        for item in items:
            of_family.setdefault(item.data, []).append(item.expected)
        base_rates = {family: share_of_commonest(answers) for family, answers in of_family.items()}
        return Scores(rows, {family: Metric(base_rate=rate) for family, rate in base_rates.items()})


class Questions(Asked):
    """Name, kind, style, skin tone, colour, and yes-no questions with as many of either answer."""

    name = "questions"

    def asked(self) -> list[tuple[LabelledPicture, Question]]:
        return suite_questions(self.pictures.held_out, self.suite.seed)


class Languages(Asked):
    """Names, asked for in other languages."""

    name = "languages"

    def asked(self) -> list[tuple[LabelledPicture, Question]]:
        names = emoji.names_in_languages()
        return [
            (entry, Question(language, NAME_QUESTIONS[language], names[entry.base][language]))
            for language in NAMED_LANGUAGES
            for entry in self.pictures.shown
            if language in names.get(entry.base, {})
        ]


def suite_questions(held_out: Sequence[LabelledPicture], seed: int) -> list[tuple[LabelledPicture, Question]]:
    """Return the questions of the suite: about one picture of each concept; about skin tone, one of each tone.

    Of yes-no questions as many are asked whose answer is yes as whose answer is no.
    """
    pairs: list[tuple[LabelledPicture, Question]] = []
    yes_no: dict[str, dict[str, list[tuple[LabelledPicture, Question]]]] = {}
    for entry in labelled.representatives(held_out, seed):
        for question in questions_about(entry):
            if question.family.endswith("yes-no"):
                yes_no.setdefault(question.family, {}).setdefault(question.answer, []).append((entry, question))
            elif question.family != "skin tone":
                pairs.append((entry, question))
    for family, by_answer in yes_no.items():
        size = min(len(by_answer.get(answer, [])) for answer in ("yes", "no"))
        for answer in ("yes", "no"):
            pairs += random.Random(f"{seed} {family} {answer}").sample(by_answer.get(answer, []), size)
    for concept, members in labelled.by_concept(held_out).items():
        tones: dict[str, list[tuple[LabelledPicture, Question]]] = {}
        for entry in members:
            for question in questions_about(entry):
                if question.family == "skin tone":
                    tones.setdefault(question.answer, []).append((entry, question))
        pairs += [random.Random(f"{seed} {concept} {tone}").choice(tones[tone]) for tone in sorted(tones)]
    return pairs


# --- drawing ---


class DrawingPart(EmojiPart):
    """Drawings of prompts."""

    def run(self, model: EvaluatedModel, items: Sequence[Item], first: int) -> list[Output]:
        return draw_items(model, items, first, self.suite)


class Drawings(DrawingPart):
    """Names of training concepts, in all and by kind of thing."""

    name = "drawings"

    def items(self) -> list[Item]:
        names = self.pictures.judge.choose_names(self.suite.drawings, self.suite.seed)
        kinds = {entry.caption: entry.group for entry in self.pictures.judge.drawable}
        return [Item(name, name, data=kinds[name]) for name in names]

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        hits = self.pictures.judge.hits(load_all(outputs), [item.key for item in items])
        return recognised(self.pictures.judge, hits, [item.data for item in items])


class Unseen(DrawingPart):
    """Held-out pairs of concept and style, "hamster, twemoji style"."""

    name = "unseen"

    def items(self) -> list[Item]:
        wanted = labelled.representatives(self.pictures.judge.held_out)
        return [Item(entry.key, f"{entry.caption}, {entry.style} style", data=entry) for entry in wanted]

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        judge, wanted = self.pictures.judge, [item.data for item in items]
        rows = judge.unseen_hits(load_all(outputs), wanted)
        metrics = {
            "right_among_10": Metric(base_rate=10 / judge.num_names),
            "right_nearest": Metric(base_rate=1 / judge.num_names),
            "right_style": Metric(base_rate=share_of_commonest([entry.style for entry in wanted])),
        }
        bounds = {"right_style_of_real_pictures": Figure(judge.real_style_accuracy(), count=len(judge.held_out))}
        if model.is_here:
            bounds |= shares_of(judge.unseen_hits(reconstructions(model, [entry.picture for entry in wanted]), wanted))
        return Scores([dict(row) for row in rows], metrics, bounds)


class Colours(DrawingPart):
    """ "COLOUR THING": pairs that may occur in training, and pairs that do not."""

    name = "colours"

    def items(self) -> list[Item]:
        seed = self.suite.seed
        pairs = {"seen": coloured_prompts(NUM_COLOURED, seed), "unseen": unseen_colours(NUM_UNSEEN_COLOURS, seed)}
        return [
            Item(f"{kind}: {colour} {thing}", f"{colour} {thing}", data=(kind, colour, thing))
            for kind, of_kind in pairs.items()
            for colour, thing in of_kind
        ]

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        hits = self.pictures.judge.coloured_hits(load_all(outputs), [item.data[1:] for item in items])
        rows: list[dict[str, Term]] = [
            {f"{item.data[0]}_{name}": value for name, value in hit.items()} for item, hit in zip(items, hits, strict=True)
        ]
        bounds = self.bounds(model) if model.is_here else {}
        return Scores(rows, {name: Metric() for row in (rows[0], rows[-1]) for name in row}, bounds)

    def bounds(self, model: EvaluatedModel) -> dict[str, Figure]:
        """Return how often colour and thing are told right in reconstructions of real pictures that have one."""
        named = [(entry, thing_of(entry)) for entry in self.pictures.judge.drawable if not entry.is_variant]
        known = [(entry, (entry.colour, thing)) for entry, thing in named if entry.colour and thing]
        chosen = random.Random(self.suite.seed).sample(known, min(NUM_COLOURED, len(known)))
        pictures = reconstructions(model, [entry.picture for entry, _ in chosen])
        return shares_of(self.pictures.judge.coloured_hits(pictures, [pair for _, pair in chosen]))


class Counts(DrawingPart):
    """ "three hearts": whether so many separate things are drawn, with the bound that reconstructions set."""

    name = "counts"

    def items(self) -> list[Item]:
        return [
            Item(f"{number} {thing}", several(number, thing), data=(number, thing))
            for thing in COUNTED_THINGS
            for number in NUMBERS
        ]

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        rows: list[dict[str, Term]] = [
            {"right_number": float(count_objects(picture) == item.data[0])}
            for item, picture in zip(items, load_all(outputs), strict=True)
        ]
        bound = self.bound(model) if model.is_here else {}
        return Scores(rows, {"right_number": Metric(base_rate=1 / len(NUMBERS))}, bound)

    def bound(self, model: EvaluatedModel) -> dict[str, Figure]:
        """Return how often the number is told right in reconstructions of real pictures, put side by side."""
        things = {entry.name: entry.picture for entry in self.pictures.training_set if not entry.is_variant}
        wanted = [(number, thing) for thing in COUNTED_THINGS for number in NUMBERS if thing in things]
        if not wanted:
            return {}
        pages = [side_by_side(things[thing], number) for number, thing in wanted]
        drawn = reconstructions(model, pages)
        right = [count_objects(picture) == number for picture, (number, _) in zip(drawn, wanted, strict=True)]
        return {"right_number_of_reconstructions": Figure(sum(right) / len(right), count=len(right))}


class Variety(DrawingPart):
    """By how many of their codes drawings of one prompt differ."""

    name = "variety"
    batch_size = 72

    def items(self) -> list[Item]:
        names = self.pictures.judge.choose_names(NUM_VARIED, self.suite.seed)
        return [Item(f"{name} {index}", name, group=name) for name in names for index in range(NUM_VARIATIONS)]

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        codes = image_tokenizer(model).encode(load_all(outputs))
        rows: list[dict[str, Term]] = []
        for start in range(0, len(codes), NUM_VARIATIONS):
            rows += [{"differing_codes": share} for share in differing_codes(codes[start : start + NUM_VARIATIONS])]
        return Scores(rows, {"differing_codes": Metric()})


# --- documents and texts ---


class Mixed(EmojiPart):
    """Prompts for documents of texts and pictures that are kept out of training: form, true texts, true pictures."""

    name = "mixed"
    batch_size = 32

    def items(self) -> list[Item]:
        per_task = -(-NUM_MIXED_PROMPTS // len(mixed_tasks.DOCUMENT_MAKERS))
        prompts = held_out_prompts(emoji.load("train"), per_task, self.suite.seed)
        result = []
        for index, (task, conversation) in enumerate(prompts):
            prompt, answer = (message.content for message in conversation.messages)
            result.append(Item(f"{task} {index}", prompt, answer, category=task, data=task))
        return result

    def run(self, model: EvaluatedModel, items: Sequence[Item], first: int) -> list[Output]:
        start = self.suite.seed + first
        return model.generate_batch(
            [item.prompt for item in items],
            max_new_tokens=MAX_NEW_TOKENS,
            max_images=MAX_IMAGES,
            guidance_scale=self.suite.guidance_scale,
            text_sampling=GREEDY,
            image_sampling=self.pictures.sampling,
            seeds=range(start, start + len(items)),
        )

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        truth = Truth(self.pictures.judge)
        rows: list[dict[str, Term]] = []
        for item, answer in zip(items, outputs, strict=True):
            terms: dict[str, Term] = {"right_form": float(has_right_form(item.data, answer, item.expected))}
            for kind, values in (
                ("right_texts", truth.texts(item.data, item.prompt, answer, item.expected)),
                ("right_pictures", truth.pictures(item.data, answer, item.expected)),
            ):
                if values:
                    terms[kind] = (float(sum(values)), float(len(values)))
            rows.append(terms | {f"{name}, {item.data}": value for name, value in terms.items()})
        names = dict.fromkeys(name for row in rows for name in row)
        return Scores(rows, {name: Metric() for name in sorted(names, key=lambda name: ("," in name, name))})


class Edits(EmojiPart):
    """Held-out pictures that are changed as an instruction says, by kind of edit.

    A colour is right if it is the main one and the thing is recognised in grey; a tone if of the same emoji in all tones
    that one is the nearest; a style if the classifier tells it and the emoji is among the 10 nearest; two pictures side by
    side if both are, each in its half.
    """

    name = "edits"
    batch_size = 32

    def items(self) -> list[Item]:
        held_out = emoji.load("validation")
        edits = mixed_tasks.edits(emoji.load(), NUM_EDITS, self.suite.seed, labelled.plain_view, shown=held_out)
        return [
            Item(
                f"{edit.kind} {index}",
                Document((*map(Image, edit.pictures), Text(edit.instruction))),
                Document((Image(edit.result),)),
                category=edit.kind,
                data=edit,
            )
            for index, edit in enumerate(edits)
        ]

    def run(self, model: EvaluatedModel, items: Sequence[Item], first: int) -> list[Output]:
        start = self.suite.seed + first
        return model.generate_batch(
            [item.prompt for item in items],
            max_new_tokens=MAX_NEW_TOKENS,
            max_images=1,
            format=("image",),
            guidance_scale=self.suite.guidance_scale,
            text_sampling=GREEDY,
            image_sampling=self.pictures.sampling,
            seeds=range(start, start + len(items)),
        )

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        judge = EditJudge(self.pictures.judge)
        edits = [item.data for item in items]
        pictures = [load_picture(output.images[0]) for output in outputs]
        rows: list[dict[str, Term]] = [
            {"right": right, f"right_{edit.kind}": right} for right, edit in zip(judge(edits, pictures), edits, strict=True)
        ]
        metrics = {name: Metric() for name in ("right", *(f"right_{kind}" for kind in mixed_tasks.EDIT_WORDINGS))}
        bounds = {}
        unchanged, expected = [edit.pictures[0] for edit in edits], [edit.result for edit in edits]
        for name, shown in (("unchanged", unchanged), ("expected", expected)):
            values = judge(edits, shown)
            bounds[f"right_of_{name}_pictures"] = Figure(sum(values) / len(values), count=len(values))
        return Scores(rows, metrics, bounds)


class EditJudge:
    """Decides whether a picture is what an edit asks for."""

    def __init__(self, judge: DrawingJudge) -> None:
        self.judge = judge
        self.tones: dict[tuple[str, ...], list[labelled.LabelledPicture]] = {}
        for entry in emoji.load():
            if entry.has_skin_tones:
                self.tones.setdefault((entry.name,), []).append(entry)

    def __call__(self, edits: Sequence[mixed_tasks.Edit], pictures: Sequence[PILImage.Image]) -> list[float]:
        """Return 1 or 0 for each edit and the picture that was made."""
        return [float(self.is_right(edit, picture)) for edit, picture in zip(edits, pictures, strict=True)]

    def is_right(self, edit: mixed_tasks.Edit, picture: PILImage.Image) -> bool:
        judge = self.judge
        if edit.kind == "colour":
            return bool(judge.coloured_hits([picture], [(edit.attribute, without_colour(edit.names[0]))])[0]["right_both"])
        if edit.kind == "together":
            side = picture.width // 2
            top = max(0, (picture.height - side) // 2)
            halves = [picture.crop((left, top, left + side, min(picture.height, top + side))) for left in (0, side)]
            near = judge.nearest([half.resize((2 * side, 2 * side), PILImage.Resampling.BICUBIC) for half in halves])
            return all(name in names for name, names in zip(edit.names, near, strict=True))
        if edit.kind == "tone":
            shown = self.tones[edit.names]
            similarity = judge.features([picture]) @ judge.features([entry.picture for entry in shown]).t()
            return shown[int(similarity.argmax())].skin_tone == edit.attribute
        style = next(entry for entry in judge.gallery if entry.style == edit.attribute)
        return edit.names[0] in judge.nearest([picture])[0] and judge.style_classifier.are_right([picture], [style])[0]


class Likelihood(EmojiPart):
    """Bits per byte of held-out words and code, the end of each document included."""

    name = "likelihood"
    batch_size = 16

    def items(self) -> list[Item]:
        result = []
        for kind, documents in (("text", emoji.words("validation")), ("code", emoji.code("validation"))):
            size = 0
            for index, document in enumerate(documents):
                if size >= MAX_BYTES:
                    break
                size += len(document.text.encode())
                result.append(Item(f"{kind} {index}", document.text[:200], data=(kind, document)))
        return result

    def run(self, model: EvaluatedModel, items: Sequence[Item], first: int) -> list[Output]:
        return document_bits(model.local("likelihood"), [item.data[1] for item in items])

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        rows: list[dict[str, Term]] = [
            {f"{kind}_bits_per_byte": (bits, len(document.text.encode()))}
            for bits, (kind, document) in ((output, item.data) for item, output in zip(items, outputs, strict=True))
        ]
        metric = Metric(higher_is_better=False, is_share=False)
        return Scores(rows, {"text_bits_per_byte": metric, "code_bits_per_byte": metric})


PARTS: dict[str, Callable[[EmojiPictures], Part]] = {
    part.name: part
    for part in (
        *(Reconstruction, Captions, Questions, Drawings, Likelihood),
        *(Recognition, Languages, Unseen, Colours, Counts, Variety, Mixed, Edits),
    )
}


def evaluate(
    model: Chameleon,
    *,
    concepts: int | None = None,
    drawings: int = 200,
    seed: int = 0,
    parts: Sequence[str] = QUICK_PARTS,
    progress: Progress = no_progress,
) -> dict[str, dict[str, Any]]:
    """Return all figures of the suite without a folder: "part / metric" → a `Figure` as JSON.

    concepts: evaluate on a subset of so many concepts. drawings: number of drawings. parts: of `PARTS`.
    """
    suite = EmojiSuite(list(parts), concepts, drawings, seed)
    result: dict[str, dict[str, Any]] = {}
    local = LocalModel(model)
    for part in suite.build_parts():
        items, outputs = list(part.items()), []
        for start in range(0, len(items), part.batch_size):
            outputs += part.run(local, items[start : start + part.batch_size], start)
            progress(part.name, len(outputs), len(items))
        figures = part.score(local, items, outputs).all_figures(items)
        result |= {f"{part.name} / {name}": figure.to_json() for name, figure in figures.items()}
    return result
