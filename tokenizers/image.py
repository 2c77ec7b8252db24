"""Pictures ↔ codes: opening any picture safely, the released preprocessing, and a VQGAN with its files.

Preprocessing as released: transparency blended over white, the shorter side scaled to the resolution by Lanczos, centre
crop, values in [-1, 1]. `fit="pad"` is the variant the paper uses for prompts (RECIPE 3): the longer side is scaled and
the rest is white border, so that nothing is lost.
"""

from __future__ import annotations

import base64
import hashlib
import io
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageSequence, UnidentifiedImageError
from torch import Tensor

from chameleon.errors import BadInput, reading
from chameleon.files import read_json, write_json, written_into
from chameleon.tensor_files import Progress, SafetensorsFiles, nothing, write_safetensors
from chameleon.tokenizers.vqgan import VQGAN, VQGANConfig

Fit = Literal["crop", "pad"]
Picture = PILImage.Image | str | Path
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # others may run programs (EPS) or are rare
MAX_PIXELS = 64_000_000  # a picture with more is refused before it is decoded
TOO_LARGE = f"more than {MAX_PIXELS // 1_000_000} million pixels; scale it down"
BATCH = 64  # pictures that go through the network together
KNOWN_PICTURES = 50_000  # codes kept of pictures already encoded
STEM = "image_tokenizer"
CONFIG_FILE, WEIGHTS_FILE = f"{STEM}.json", f"{STEM}.safetensors"


def load_picture(source: Picture | bytes, where: object = None) -> PILImage.Image:
    """Any picture as 8-bit RGB: a PIL image, a path, a `data:` URL or the bytes of a file.

    Of an animation the first frame; 16-bit values scaled down; CMYK converted; transparency over white; turned as its
    EXIF says. Raises `BadInput` for what is missing, empty, truncated, no picture, or over 64 million pixels.
    """
    name = where if where is not None else describe(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)  # MAX_PIXELS is the limit here
            picture = source if isinstance(source, PILImage.Image) else open_picture(open_bytes(source, name))
        if picture.width * picture.height > MAX_PIXELS:
            raise BadInput(TOO_LARGE, where=name)
        if getattr(picture, "is_animated", False):
            picture = next(iter(ImageSequence.Iterator(picture))).copy()
        return to_rgb(picture)
    except PILImage.DecompressionBombError:  # far more than MAX_PIXELS
        raise BadInput(TOO_LARGE, where=name) from None
    except UnidentifiedImageError as error:
        raise BadInput(f"no picture that can be read ({type(error).__name__})", where=name) from None
    except BadInput:
        raise
    except Exception as error:  # decoders raise all sorts of things on damaged files
        raise BadInput(f"damaged picture ({error or type(error).__name__})", where=name) from None


def open_picture(data: io.BytesIO) -> PILImage.Image:
    PILImage.init()  # fills OPEN
    return PILImage.open(data, formats=[name for name in FORMATS if name in PILImage.OPEN])


def describe(source: object) -> str:
    if isinstance(source, str) and source.startswith("data:"):
        return f"{source[:24]}…"
    return str(source) if isinstance(source, (str, Path)) else "picture"


def picture_bytes(source: Picture) -> PILImage.Image | bytes:
    """The bytes of a picture's file; a picture in memory as it is. Raises `BadInput` where the file cannot be read."""
    return source if isinstance(source, PILImage.Image) else open_bytes(source, describe(source)).getvalue()


def picture_hash(data: PILImage.Image | bytes) -> bytes:
    """16 bytes that tell a picture from every other: of its file, or of its pixels where it is in memory."""
    if isinstance(data, PILImage.Image):
        data = repr((data.mode, data.size)).encode() + data.tobytes()
    return hashlib.blake2b(data, digest_size=16).digest()


def picture_size(data: PILImage.Image | bytes, where: object = "picture") -> tuple[int, int]:
    """Width and height in pixels; of a file only its head is read. Raises `BadInput` for what is no picture."""
    if isinstance(data, PILImage.Image):
        return data.size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)
            return open_picture(io.BytesIO(data)).size
    except PILImage.DecompressionBombError:
        raise BadInput(TOO_LARGE, where=where) from None
    except Exception as error:  # decoders raise all sorts of things on damaged files
        raise BadInput(f"no picture that can be read ({type(error).__name__})", where=where) from None


def open_bytes(source: str | Path | bytes, name: object) -> io.BytesIO:
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, str) and source.startswith("data:"):
        head, _, body = source.partition(",")
        try:
            data = base64.b64decode(body, validate=True) if head.endswith(";base64") else b""
        except ValueError as error:  # binascii's own among them
            raise BadInput(f"data URL is not base64 ({error})", where=name) from None
    else:
        try:
            data = Path(source).read_bytes()
        except FileNotFoundError:
            raise BadInput("no such picture", where=name) from None
        except IsADirectoryError:
            raise BadInput("is a folder, not a picture", where=name) from None
        except OSError as error:
            raise BadInput(f"picture could not be read ({error.strerror})", where=name) from None
        except ValueError as error:
            raise BadInput(f"not a path ({error})", where=name) from None
    if not data:
        raise BadInput("empty picture", where=name)
    return io.BytesIO(data)


def to_rgb(picture: PILImage.Image) -> PILImage.Image:
    """8-bit RGB, transparency blended over white, EXIF orientation applied."""
    from PIL import ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        # 16-bit files come as I;16 or I with values up to 65535; what fits in 8 bits is taken as it is.
        scale = 257.0 if picture.mode.startswith("I;16") or values.max(initial=0) > 255 else 1.0
        picture = PILImage.fromarray((values / scale).clip(0, 255).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        picture = PILImage.alpha_composite(PILImage.new("RGBA", rgba.size, "white"), rgba)
    return picture.convert("RGB")


def fit_square(picture: PILImage.Image, side: int, fit: Fit = "crop") -> PILImage.Image:
    """The RGB picture as a square of `side` pixels: centre-cropped, or bordered in white."""
    width, height = picture.size
    if (width, height) == (side, side):
        return picture
    scale = side / (min if fit == "crop" else max)(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    if fit == "crop" and size[0] * size[1] > MAX_PIXELS:  # a long strip: only what the square shows is scaled
        across, down = width / size[0], height / size[1]
        box = (-left * across, -top * down, (side - left) * across, (side - top) * down)
        return picture.resize((side, side), PILImage.Resampling.LANCZOS, box=box)
    picture = picture.resize(size, PILImage.Resampling.LANCZOS)
    if fit == "crop":
        return picture.crop((-left, -top, side - left, side - top))
    square = PILImage.new("RGB", (side, side), "white")
    square.paste(picture, (left, top))
    return square


def moved(picture: PILImage.Image, zoom: float, shift: tuple[float, float], mirror: bool = False) -> PILImage.Image:
    """The picture zoomed about its centre and its content shifted left and up, in shares of its sides; white outside."""
    if mirror:
        picture = picture.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
    scale = 1 / zoom
    left, top = (side * (0.5 - scale / 2 + share) for side, share in zip(picture.size, shift, strict=True))
    matrix = (scale, 0, left, 0, scale, top)
    return picture.transform(
        picture.size, PILImage.Transform.AFFINE, matrix, PILImage.Resampling.BICUBIC, fillcolor="white"
    )


def to_tensor(pictures: Iterable[PILImage.Image | np.ndarray]) -> Tensor:
    """Square RGB pictures of one size (uint8 [R, R, 3] where they are arrays) to float32 [B, 3, R, R] in [-1, 1]."""
    values = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return values.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(values: Tensor) -> list[PILImage.Image]:
    """float [B, 3, R, R] in [-1, 1] to RGB pictures."""
    pixels = ((values.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [PILImage.fromarray(entry) for entry in pixels]


def read_config(folder: Path) -> VQGANConfig:
    """Reads `image_tokenizer.json`. Raises `BadInput` naming it where it does not fit."""
    with reading("an image tokenizer's configuration", folder / CONFIG_FILE):
        config = VQGANConfig(**read_json(folder / CONFIG_FILE))
    return config


def write_files(place: Path, config: VQGANConfig, weights: Mapping[str, Tensor], progress: Progress = nothing) -> None:
    """Writes `image_tokenizer.json` and `image_tokenizer.safetensors` into a folder, weights as they are."""
    write_json(place / CONFIG_FILE, config.to_json())
    tensors = ((name, weights[name]) for name in weights)
    write_safetensors(place, tensors, weights, stem=STEM, progress=progress)


class KnownCodes:
    """Codes of pictures met before, by the hash of their pixels: data sets repeat pictures. The oldest make room.

    All lie in one table, which takes memory as it fills: small tensors kept between the network's large temporary ones
    would hold those pages too, a quarter of a megabyte a picture.
    """

    def __init__(self, grid: tuple[int, int], size: int = KNOWN_PICTURES) -> None:
        self.table = torch.empty(size, *grid, dtype=torch.int32)
        self.slots: OrderedDict[bytes, int] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self.slots

    def __getitem__(self, key: bytes) -> Tensor:
        """Codes int64 [h, w]."""
        return self.table[self.slots[key]].long()

    def add(self, keys: Iterable[bytes], codes: Tensor) -> None:
        """Keeps codes [n, h, w] of n new keys."""
        for key, entry in zip(keys, codes, strict=True):
            slot = len(self.slots) if len(self.slots) < len(self.table) else self.slots.popitem(last=False)[1]
            self.slots[key] = slot
            self.table[slot] = entry


class ImageTokenizer:
    """Pictures ↔ grids of codes."""

    def __init__(self, network: VQGAN) -> None:
        self.network = network.eval().requires_grad_(False)
        self.known = KnownCodes(self.config.grid)

    @property
    def config(self) -> VQGANConfig:
        return self.network.config

    @property
    def device(self) -> torch.device:
        return self.network.quant_conv.weight.device

    def preprocess(self, pictures: Iterable[Picture], fit: Fit = "crop") -> Tensor:
        """float32 [B, 3, R, R] in [-1, 1]. Raises `BadInput` for a picture that cannot be used."""
        return to_tensor(fit_square(load_picture(entry), self.config.resolution, fit) for entry in pictures)

    def encode(self, pictures: Sequence[Picture], fit: Fit = "crop", batch: int = BATCH) -> Tensor:
        """Codes [B, h, w] int64 on the CPU. Raises `BadInput` for a picture that cannot be used."""
        made = [torch.empty(0, *self.config.grid, dtype=torch.int64)]
        for start in range(0, len(pictures), batch):
            part = pictures[start : start + batch]
            made.append(self.encode_squares([self.square(picture, fit) for picture in part], batch))
        return torch.cat(made)

    def square(self, picture: Picture, fit: Fit) -> np.ndarray:
        """A picture as uint8 [R, R, 3]."""
        return np.asarray(fit_square(load_picture(picture), self.config.resolution, fit))

    def encode_squares(self, squares: Sequence[np.ndarray], batch: int = BATCH) -> Tensor:
        """Codes [B, h, w] int64 of pictures uint8 [R, R, 3], `batch` at a time; those met before are not encoded again."""
        result = torch.empty(len(squares), *self.config.grid, dtype=torch.int64)
        for start in range(0, len(squares), batch):
            part = squares[start : start + batch]
            keys = [hashlib.blake2b(square.tobytes(), digest_size=16).digest() for square in part]
            new = {key: square for key, square in zip(keys, part, strict=True) if key not in self.known}
            codes = {key: self.known[key] for key in keys if key not in new}
            if new:
                values = to_tensor(new.values()).to(self.device, self.network.quant_conv.weight.dtype)
                made = self.network.encode(values).cpu()
                codes.update(zip(new, made, strict=True))
                self.known.add(new, made)
            for number, key in enumerate(keys, start):
                result[number] = codes[key]
        return result

    def forget(self) -> None:
        """Forgets the pictures met, so that what is encoded next does not depend on what came before."""
        self.known = KnownCodes(self.config.grid)

    def decode(self, codes: Tensor, batch: int = 64) -> list[PILImage.Image]:
        """Codes [B, h, w] to RGB pictures. Raises `BadInput` for codes outside the codebook."""
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.config.codebook_size):
            raise BadInput(f"codes outside 0…{self.config.codebook_size - 1}", where="image tokenizer")
        result: list[PILImage.Image] = []
        for part in codes.to(self.device).split(batch) if len(codes) else ():
            result += to_pictures(self.network.decode(part))
        return result

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes `image_tokenizer.json` and `image_tokenizer.safetensors`, names and shapes as released.

        Raises `BadInput` where that fails, and changes nothing then.
        """
        state = {name: value.to("cpu", dtype) for name, value in self.network.released_state_dict().items()}
        with written_into(folder) as place:
            write_files(place, self.config, state)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> ImageTokenizer:
        """Reads what `save` wrote, in float32. Raises `BadInput` naming a file that is missing or does not fit."""
        config = read_config(folder)
        state = SafetensorsFiles.of_folder(folder, STEM)
        network = VQGAN(config)
        try:
            network.load_state_dict({name: value.float() for name, value in state.items()})
        except RuntimeError as error:
            raise BadInput(f"tensors do not fit {CONFIG_FILE} ({error})", where=folder / WEIGHTS_FILE) from None
        return cls(network.to(device))
