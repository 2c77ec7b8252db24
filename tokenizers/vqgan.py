"""The VQGAN: encoder → quant_conv → quantizer → post_quant_conv → decoder.

The network of Esser et al. (arXiv 2012.09841) in the sizes of Make-A-Scene (arXiv 2203.13131), as Chameleon uses it.
Parameter names are those of the released checkpoints. Design choices: GroupNorm and swish, attention in the middle block
and at configured resolutions, asymmetric padding before each stride-2 convolution, nearest-neighbour upsampling.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from chameleon.errors import BadInput, check_fields
from chameleon.tokenizers.quantizer import Quantized, Quantizer, fixed_quantizer


@dataclass(frozen=True)
class VQGANConfig:
    """The configuration of a VQGAN. The defaults are those of Meta's released 512-pixel tokenizer."""

    resolution: int = 512
    """Side of the square images, in pixels."""
    channels: int = 128
    """Channels at full resolution."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels at each level as multiples of `channels`; each level after the first halves the resolution."""
    res_blocks: int = 2
    """Residual blocks of each level of the encoder; the decoder has one more."""
    attention_resolutions: tuple[int, ...] = ()
    """Resolutions at which each residual block is followed by attention."""
    latent_channels: int = 256
    """Output channels of the encoder and input channels of the decoder."""
    codebook_size: int = 8192
    codebook_width: int = 256
    """Dimension of a code."""
    levels: tuple[int, ...] = ()
    """Levels of each dimension of a code, where the codebook is all their combinations (`LevelQuantizer`); their product is
    `codebook_size`. Empty: the codebook is a matrix."""
    norm_groups: int = 32
    """Groups of every GroupNorm."""
    dropout: float = 0.0
    decoder: bool = True
    """Whether there is a decoder; Hugging Face's format has none."""

    def __post_init__(self) -> None:
        for name in ("multipliers", "attention_resolutions", "levels"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_fields(self, "image tokenizer")
        if self.dropout >= 1:
            raise BadInput("dropout must be below 1", where="image tokenizer")
        if self.resolution % self.reduction:
            raise BadInput(
                f"resolution {self.resolution} is not a multiple of {self.reduction}, the reduction of "
                f"{len(self.multipliers)} levels",
                where="image tokenizer",
            )
        if self.levels and (min(self.levels) < 2 or math.prod(self.levels) != self.codebook_size):
            raise BadInput(
                f"levels {list(self.levels)} do not make {self.codebook_size} codes",
                where="image tokenizer",
                remedy=f"set codebook_size to {math.prod(self.levels)}",
            )
        if self.levels and len(self.levels) != self.codebook_width:
            raise BadInput(
                f"{len(self.levels)} levels for codes of {self.codebook_width} dimensions",
                where="image tokenizer",
                remedy=f"set codebook_width to {len(self.levels)}",
            )
        for multiplier in self.multipliers:
            if self.channels * multiplier % self.norm_groups:
                raise BadInput(
                    f"{self.channels * multiplier} channels are not divisible by {self.norm_groups} norm groups",
                    where="image tokenizer",
                )

    @property
    def reduction(self) -> int:
        """Side in pixels of the square that one code stands for."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) in codes."""
        side = self.resolution // self.reduction
        return side, side

    @property
    def codebook_shape(self) -> tuple[int, int, tuple[int, ...]]:
        """(size, dimension of a code, levels), as quantizers are built from."""
        return self.codebook_size, self.codebook_width, self.levels

    def to_json(self) -> dict[str, Any]:
        """Return the fields; `levels` only where there are some, as files of earlier versions have none."""
        return {name: value for name, value in asdict(self).items() if name != "levels" or value}


def normalize(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """norm → swish → conv, twice, with a residual connection."""

    def __init__(self, inputs: int, outputs: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm1 = normalize(inputs, config.norm_groups)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = normalize(outputs, config.norm_groups)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """One head over all positions of the feature map."""

    def __init__(self, channels: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm = normalize(channels, config.norm_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halves the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, config: VQGANConfig) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, config)
        self.attn_1 = Attention(channels, config)
        self.block_2 = ResidualBlock(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where the config says so."""

    downsample: Downsample
    upsample: Upsample

    def __init__(self, inputs: int, outputs: int, blocks: int, resolution: int, config: VQGANConfig) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(inputs if n == 0 else outputs, outputs, config) for n in range(blocks))
        attends = resolution in config.attention_resolutions
        self.attn = nn.ModuleList(Attention(outputs, config) for _ in range(blocks if attends else 0))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        return x


class Encoder(nn.Module):
    """Images [B, 3, R, R] in [-1, 1] → latents [B, latent_channels, R/reduction, R/reduction]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        width, resolution = config.channels, config.resolution
        for number, multiplier in enumerate(config.multipliers):
            outputs = config.channels * multiplier
            level = Level(width, outputs, config.res_blocks, resolution, config)
            if number < len(config.multipliers) - 1:
                level.downsample = Downsample(outputs)
                resolution //= 2
            self.down.append(level)
            width = outputs
        self.mid = Middle(width, config)
        self.norm_out = normalize(width, config.norm_groups)
        self.conv_out = nn.Conv2d(width, config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)  # type: ignore[operator]
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents [B, latent_channels, h, w] → images [B, 3, h·reduction, w·reduction], approximately in [-1, 1]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        width = config.channels * config.multipliers[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid = Middle(width, config)
        levels: list[Level] = []
        resolution = config.grid[0]
        for number, multiplier in reversed(list(enumerate(config.multipliers))):
            outputs = config.channels * multiplier
            level = Level(width, outputs, config.res_blocks + 1, resolution, config)
            if number > 0:
                level.upsample = Upsample(outputs)
                resolution *= 2
            levels.insert(0, level)  # checkpoints number the levels from full resolution down
            width = outputs
        self.up = nn.ModuleList(levels)
        self.norm_out = normalize(width, config.norm_groups)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)  # type: ignore[operator]
        return self.conv_out(F.silu(self.norm_out(h)))

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adversarial gradient is balanced (arXiv 2012.09841, eq. 7)."""
        return self.conv_out.weight


class VQGAN(nn.Module):
    """Images in [-1, 1] ↔ codes. `quantize`: a trainable codebook, by default a fixed one."""

    def __init__(self, config: VQGANConfig, quantize: Quantizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_width, 1)
        self.quantize = quantize or fixed_quantizer(*config.codebook_shape)
        self.post_quant_conv = nn.Conv2d(config.codebook_width, config.latent_channels, 1)
        self.decoder = Decoder(config) if config.decoder else None

    def latent(self, pictures: Tensor) -> Tensor:
        """Encode images [B, 3, R, R] to latents before quantisation [B, codebook_width, h, w]."""
        return self.quant_conv(self.encoder(pictures))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Quantized]:
        """Reconstruct images [B, 3, R, R]; returns the reconstruction and the result of quantisation."""
        quantized = self.quantize(self.latent(pictures))
        return self.decode_latent(quantized.latent), quantized

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Decode quantised latents to images. Raise `BadInput` where there is no decoder."""
        self.check_decoder()
        pictures: Tensor = self.decoder(self.post_quant_conv(latent))  # type: ignore[misc]
        return pictures

    def check_decoder(self) -> None:
        """Raise `BadInput` where there is no decoder."""
        if self.decoder is None:
            raise BadInput(
                "the image tokenizer has no decoder, so it encodes images but cannot draw any",
                where="bundle",
                remedy="chameleon convert adds one: --tokenizer, the folder with Meta's vqgan.ckpt",
            )

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Encode images [B, 3, R, R] in [-1, 1] to codes [B, h, w] int64."""
        return self.quantize(self.latent(pictures)).codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes [B, h, w] to images [B, 3, R, R] float32 in [-1, 1]."""
        latent = self.quantize.lookup(codes).to(self.post_quant_conv.weight.dtype)
        return self.decode_latent(latent).float().clamp(-1, 1)

    def released_state_dict(self) -> dict[str, Tensor]:
        """Return the weights in Meta's released format, however the codebook was trained."""
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("quantize.")}
        return state | {f"quantize.{name}": value for name, value in self.quantize.saved_state().items()}
