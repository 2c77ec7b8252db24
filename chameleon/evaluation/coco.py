"""Annotation files as they are published: COCO captions, Karpathy's split, Flickr30k, VQAv2, OK-VQA, VizWiz.

| file | keys |
| --- | --- |
| COCO captions (`captions_val2014.json`) | `images`: `id`, `file_name`; `annotations`: `image_id`, `caption` |
| Karpathy's split (`dataset_coco.json`) | `images`: `filename`, `filepath`, `split`, `sentences`: `raw` |
| VQAv2, OK-VQA, questions | `questions`: `question_id`, `image_id`, `question` |
| VQAv2, OK-VQA, annotations | `annotations`: `question_id`, `answers`: `answer`; `question_type`, `answer_type` |
| VizWiz (`val.json`) | a list of `image`, `question`, `answers` |
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chameleon.errors import BadInput

EXTENSIONS = (".jpg", ".png", ".jpeg", ".webp")


@dataclass(frozen=True)
class CaptionedImage:
    """An image and its captions."""

    key: str
    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class AskedImage:
    """A question about an image and the answers of people; none for a test set."""

    key: str
    path: Path
    question: str
    answers: tuple[str, ...]
    answer_type: str = ""


def load_annotations(path: str | Path) -> Any:
    """Return the content of a JSON file. Raise `BadInput` where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput("no such file", where=path, remedy="give the annotation file as it is published") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"not JSON in UTF-8 ({error})", where=path) from None


@contextmanager
def reading(path: str | Path, form: str) -> Iterator[None]:
    """Report what is missing in the block as `BadInput` about the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadInput(f"not {form} ({error!r} is missing or of another form)", where=path) from None


def image_path(folder: Path, name: str, *subfolders: str) -> Path:
    """Return the path of an image in a folder, or in a subfolder that its annotations name. Raise `BadInput` if none is."""
    for subfolder in ("", *subfolders):
        if (folder / subfolder / name).is_file():
            return folder / subfolder / name
    raise BadInput("no such image", where=folder / name, remedy="give the folder with the images of these annotations")


class ImagesById:
    """Images of a folder by the number that ends their names; the folder is listed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: dict[int, Path] = {}
        for path in sorted(folder.iterdir()):
            number = path.stem.rpartition("_")[2]
            if path.suffix.lower() in EXTENSIONS and number.isdigit():
                self.paths.setdefault(int(number), path)

    def __getitem__(self, image_id: int) -> Path:
        """Return the path. Raise `BadInput` where there is no such image."""
        path = self.paths.get(int(image_id))
        if path is None:
            raise BadInput(
                f"no image with the number {image_id}",
                where=self.folder,
                remedy="give the folder of the annotations' images",
            )
        return path


# --- captions ---


def read_captions(annotations: str, images: str, split: str | None = None) -> list[CaptionedImage]:
    """Return the images of an annotation file with their captions, in its order.

    split: of Karpathy's files: train, restval, val or test; None takes all. COCO's own files have none.
    """
    content = load_annotations(annotations)
    folder = Path(images)
    if isinstance(content, Mapping) and content.get("images") and "sentences" in content["images"][0]:
        with reading(annotations, "Karpathy's split"):
            return [karpathy_image(entry, folder) for entry in content["images"] if not split or entry["split"] == split]
    if split:
        raise BadInput(
            f"split {split} of a file without splits", where=annotations, remedy="write split= (nothing after it)"
        )
    with reading(annotations, "captions in COCO's form"):
        captions: dict[Any, list[str]] = {}
        for entry in content["annotations"]:
            captions.setdefault(entry["image_id"], []).append(entry["caption"])
        return [
            CaptionedImage(str(entry["id"]), image_path(folder, entry["file_name"]), tuple(captions[entry["id"]]))
            for entry in content["images"]
            if entry["id"] in captions
        ]


def has_splits(annotations: str) -> bool:
    """Return whether an annotation file is one of Karpathy's, whose images are of splits."""
    images = load_annotations(annotations).get("images") or [{}]
    return "split" in images[0]


def karpathy_image(entry: Mapping[str, Any], folder: Path) -> CaptionedImage:
    path = image_path(folder, entry["filename"], entry.get("filepath", ""))
    captions = tuple(sentence["raw"] for sentence in entry["sentences"])
    return CaptionedImage(str(entry.get("cocoid", entry.get("imgid", entry["filename"]))), path, captions)


# --- questions ---


def read_questions(questions: str, annotations: str, images: str) -> list[AskedImage]:
    """Return the questions of VQAv2's or OK-VQA's pair of files, or of VizWiz's one file (annotations empty)."""
    content = load_annotations(questions)
    folder = Path(images)
    if isinstance(content, list):
        with reading(questions, "questions in VizWiz's form"):
            return [
                AskedImage(
                    entry["image"],
                    image_path(folder, entry["image"]),
                    entry["question"],
                    tuple(answer["answer"] for answer in entry.get("answers", ())),
                    answer_type=entry.get("answer_type", ""),
                )
                for entry in content
            ]
    answers: dict[Any, Mapping[str, Any]] = {}
    if annotations:
        with reading(annotations, "annotations in VQA's form"):
            answers = {entry["question_id"]: entry for entry in load_annotations(annotations)["annotations"]}
    by_id = ImagesById(folder)
    result = []
    with reading(questions, "questions in VQA's form"):
        for entry in content["questions"]:
            known = answers.get(entry["question_id"], {})
            if annotations and not known:
                raise BadInput(f"no answers to question {entry['question_id']}", where=annotations)
            result.append(
                AskedImage(
                    str(entry["question_id"]),
                    by_id[entry["image_id"]],
                    entry["question"],
                    tuple(answer["answer"] for answer in known.get("answers", ())),
                    str(known.get("answer_type", "")),
                )
            )
    return result


def commonest_answer(answers: Sequence[str]) -> str:
    """Return the answer that most people gave; of equally common ones the first."""
    return max(dict.fromkeys(answers), key=list(answers).count)
