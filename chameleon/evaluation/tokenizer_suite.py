"""What an image tokenizer keeps of pictures: PSNR, SSIM, ST-LPIPS, rFID, use of the codebook, legible words."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image as PILImage

from chameleon.data import emoji, labelled
from chameleon.errors import BadInput
from chameleon.evaluation.captioning import choose
from chameleon.evaluation.distances import frechet_figure
from chameleon.evaluation.extractors import check_extractor, folder_images, make_extractor, weights_fingerprint
from chameleon.evaluation.part import EvaluatedModel, Item, Output, Part, Scores, image_tokenizer
from chameleon.evaluation.pictures import score_reconstructions
from chameleon.evaluation.statistics import Metric
from chameleon.evaluation.suite import fingerprint_of, listing_fingerprint
from chameleon.tokenizers.image import Picture, load_picture

MIN_WORD_LENGTH = 2


@dataclass
class TokenizerSuite:
    """Settings of a set of pictures to be reconstructed."""

    images: str = ""
    """Folder of pictures; by default the embedded set's held-out ones."""
    extractor: str = "effnet-lite0"
    """Of the Fréchet distance between pictures and reconstructions: rFID with `inception`."""
    weights: str = ""
    legibility: bool | None = None
    """How many words that tesseract reads in a picture it reads in the reconstruction; by default where it is installed."""
    limit: int = 0
    seed: int = 0
    batch_size: int = 64

    def build_parts(self) -> list[Part]:
        if self.legibility and shutil.which("tesseract") is None:
            raise BadInput("tesseract is not installed", where="legibility", remedy="apt-get install tesseract-ocr")
        check_extractor(self.extractor, self.weights)
        return [Reconstructions(self)]

    def fingerprints(self) -> dict[str, str]:
        weights = weights_fingerprint({"weights": self.weights})
        if not self.images:
            return weights | {"emoji": fingerprint_of(sorted(labelled.EMBEDDED.glob("emoji*")))}
        return weights | {"images": listing_fingerprint(folder_images(self.images))}


class Reconstructions:
    """Each picture after encoding and decoding, at the tokenizer's resolution."""

    name = "reconstruction"

    def __init__(self, suite: TokenizerSuite) -> None:
        self.suite, self.batch_size = suite, suite.batch_size
        self.method = {"extractor": suite.extractor}

    def items(self) -> list[Item]:
        suite = self.suite
        if suite.images:
            root = Path(suite.images)
            paths = choose(folder_images(suite.images), suite.limit, suite.seed)
            return [Item(str(path.relative_to(root)), path) for path in paths]
        return [Item(entry.key, entry.picture) for entry in choose(emoji.load("validation"), suite.limit, suite.seed)]

    def run(self, model: EvaluatedModel, items: Sequence[Item], first: int) -> list[Output]:
        tokenizer = image_tokenizer(model)
        return tokenizer.decode(tokenizer.encode([item.prompt for item in items]))

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        suite = self.suite
        originals: list[Picture] = [item.prompt for item in items]
        scores = score_reconstructions(image_tokenizer(model), originals, outputs)
        if len(items) > 1:
            extract = make_extractor(suite.extractor, suite.weights, "cuda" if torch.cuda.is_available() else "cpu")
            name = "rfid" if suite.extractor == "inception" else f"{suite.extractor}_frechet_distance"
            before = torch.cat([extract([self.square(model, picture)]) for picture in originals])
            scores.figures[name] = frechet_figure(before, extract(outputs), paired=True)
        if suite.legibility is not False and shutil.which("tesseract") is not None:
            self.add_legibility(scores, model, originals, outputs)
        return scores

    def square(self, model: EvaluatedModel, picture: Picture) -> PILImage.Image:
        """Return a picture as the tokenizer sees it."""
        return as_picture(image_tokenizer(model).preprocess([picture])[0])

    def add_legibility(
        self, scores: Scores, model: EvaluatedModel, originals: Sequence[Picture], drawn: Sequence[Picture]
    ) -> None:
        """Add the share of words read in the original that are also read in the reconstruction."""
        scores.metrics["legible_words"] = Metric()
        for row, original, reconstruction in zip(scores.of_items, originals, drawn, strict=True):
            words = words_in(self.square(model, original))
            if words:
                kept = words_in(load_picture(reconstruction))
                count = sum(min(number, kept.get(word, 0)) for word, number in words.items())
                row["legible_words"] = (float(count), float(sum(words.values())))


def as_picture(values: torch.Tensor) -> PILImage.Image:
    """Return values [3, R, R] in [-1, 1] as a picture."""
    pixels = ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return PILImage.fromarray(pixels)


def words_in(picture: PILImage.Image) -> dict[str, int]:
    """Return the words that tesseract reads in a picture, with their counts. It reads small letters better enlarged."""
    from collections import Counter

    scale = max(1, 1024 // max(picture.size))
    large = picture.resize((picture.width * scale, picture.height * scale), PILImage.Resampling.LANCZOS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        large.save(path)
        command = ["tesseract", str(path), "-", "--psm", "11"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env={"OMP_THREAD_LIMIT": "1"})
    words = re.findall(r"\w+", result.stdout.lower())
    return dict(Counter(word for word in words if len(word) >= MIN_WORD_LENGTH))
