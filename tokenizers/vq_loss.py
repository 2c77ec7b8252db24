"""The losses of a VQGAN: pixel distances, a perceptual distance, and a patch discriminator.

Sources: Esser et al. (arXiv 2012.09841) for the adaptive adversarial weight and the start step; Isola et al.
(arXiv 1611.07004) for the patch discriminator; ST-LPIPS (Ghildyal & Liu, arXiv 2207.13686) for the perceptual distance,
whose weights the package `stlpips-pytorch` carries. Networks and losses only: optimisers are in `train/`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chameleon.errors import BadInput
from chameleon.tokenizers.quantizer import all_reduce_mean


@dataclass
class VQLossConfig:
    """Weights of the loss terms, each on images in [-1, 1]."""

    l1: float = 0.2
    l2: float = 1.0
    perceptual: float = 0.0
    """Weight of ST-LPIPS (AlexNet), which needs the extra `eval`; 0 switches it off."""
    codebook: float = 1.0
    commitment: float = 0.25
    adversarial: float = 0.0
    """Weight of the adversarial term before it is balanced; 0 trains no discriminator."""
    adversarial_start: int = 0
    """Step at which the adversarial term and the discriminator's training start."""
    adaptive: bool = True
    """Scale the adversarial gradient to that of the reconstruction loss, at the decoder's last layer."""
    discriminator_channels: int = 64
    discriminator_layers: int = 3


class PatchDiscriminator(nn.Module):
    """Images [B, 3, H, W] → logits [B, 1, h, w], one for each patch."""

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for number in range(1, layers + 1):
            outputs = channels * min(2**number, 8)
            stride = 2 if number < layers else 1
            blocks += [
                nn.Conv2d(width, outputs, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(32, outputs), outputs),  # batch statistics would leak between real and generated images
                nn.LeakyReLU(0.2),
            ]
            width = outputs
        blocks.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*blocks)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures)


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the hinge loss of the discriminator's logits on real and reconstructed images: a scalar."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Return |∇ reconstruction| / |∇ adversarial| at `last_layer`, clamped to [0, 1e4] (arXiv 2012.09841, eq. 7): a scalar.

    The gradients are those of the global batch.
    """
    grads = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (reconstruction, adversarial)]
    reconstruction_norm, adversarial_norm = (all_reduce_mean(grad).norm() for grad in grads)
    return (reconstruction_norm / (adversarial_norm + 1e-4)).clamp(0, 1e4).detach()


class BlurPool(nn.Module):
    """Depthwise binomial 3×3 blur with stride 2 after reflection padding by 2."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("filt", (line.outer(line) / 16).expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


class ShiftTolerantLPIPS(nn.Module):
    """ST-LPIPS with AlexNet: a perceptual distance between images of at least 32×32 pixels.

    This is not the published LPIPS; metrics computed with it are named ST-LPIPS.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Names and numbers are those of the checkpoint.
        layers: dict[str, list[tuple[int, nn.Module]]] = {
            "slice1": [(0, nn.Conv2d(3, 64, 11, padding=2)), (1, BlurPool(64)), (2, nn.ReLU())],
            "slice2": [(3, nn.MaxPool2d(3, 1)), (4, BlurPool(64)), (5, nn.Conv2d(64, 192, 5, padding=2)), (6, nn.ReLU())],
            "slice3": [
                (7, nn.MaxPool2d(3, 1)),
                (8, BlurPool(192)),
                (9, nn.Conv2d(192, 384, 3, padding=1)),
                (10, nn.ReLU()),
            ],
            "slice4": [(11, nn.Conv2d(384, 256, 3, padding=1)), (12, nn.ReLU())],
            "slice5": [(13, nn.Conv2d(256, 256, 3, padding=1)), (14, nn.ReLU())],
        }
        self.net = nn.ModuleDict()
        for name, members in layers.items():
            block = nn.Sequential()
            for number, layer in members:
                block.add_module(str(number), layer)
            self.net[name] = block
        self.lins = nn.ParameterList(nn.Parameter(torch.ones(1, width, 1, 1)) for width in (64, 192, 384, 256, 256))
        self.register_buffer("shift", torch.zeros(1, 3, 1, 1))
        self.register_buffer("scale", torch.ones(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    @classmethod
    def pretrained(cls) -> ShiftTolerantLPIPS:
        """Load the weights that the package `stlpips-pytorch` contains. Raise `BadInput` where it is not installed."""
        spec = importlib.util.find_spec("stlpips_pytorch")
        if spec is None or not spec.submodule_search_locations:
            raise BadInput(
                "the perceptual loss needs the package stlpips-pytorch",
                where="loss.perceptual",
                remedy="pip install 'open-chameleon[eval]' or set loss.perceptual=0",
            )
        path = Path(next(iter(spec.submodule_search_locations))) / "weights" / "vST0.0" / "alex_shift_tolerant.pth"
        state = torch.load(path, map_location="cpu", weights_only=True)
        renamed = {name.removeprefix("scaling_layer."): value for name, value in state.items()}
        for number in range(5):
            renamed[f"lins.{number}"] = renamed.pop(f"lin{number}.model.1.weight")
        network = cls()
        network.load_state_dict(renamed)
        return network

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return distances [B] of images [B, 3, H, W] in [-1, 1]."""
        a, b = (first - self.shift) / self.scale, (second - self.shift) / self.scale
        total = torch.zeros(len(first), device=first.device)
        for block, weight in zip(self.net.values(), self.lins, strict=True):
            a, b = block(a), block(b)
            difference = (F.normalize(a.float(), dim=1, eps=1e-10) - F.normalize(b.float(), dim=1, eps=1e-10)).square()
            total = total + (difference * weight).sum(1).mean((1, 2))
        return total

    def train(self, mode: bool = True) -> ShiftTolerantLPIPS:
        return super().train(False)  # it is never trained
