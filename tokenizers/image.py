"""Images ↔ image codes: reading any image file safely, and a VQGAN with its files.

Pictures are read as 8-bit RGB, transparency blended over white as in Meta's released code, EXIF orientation applied, then
fitted to a size (`fitting`), and their values scaled to [-1, 1]. A network takes pictures of any size whose sides are
multiples of its reduction.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor

from chameleon.dialect import Grid
from chameleon.errors import BadInput, as_bad_input
from chameleon.files import atomic_update, read_json, write_json
from chameleon.tensor_files import Progress, SafetensorsFiles, no_progress, write_safetensors
from chameleon.threads import ThreadPolicy
from chameleon.tokenizers.fitting import MAX_PIXELS, Fit, fit_square
from chameleon.tokenizers.vqgan import VQGAN, VQGANConfig

Picture = PILImage.Image | bytes | str | Path
"""A PIL image, the bytes of an image file, a path, or a `data:` URL."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that are read. Others are rare, or may run programs (EPS)."""
TOO_LARGE = f"more than {MAX_PIXELS // 1_000_000} million pixels; scale it down"
BATCH_SIZE = 64
"""Images that go through the network together."""
KERNEL_SIZE = 9
"""Weights of a kernel for each pair of channels."""
CODE_CACHE_SIZE = 50_000
"""Images of the network's own resolution whose codes are kept."""
STEM = "image_tokenizer"
CONFIG_FILE, WEIGHTS_FILE = f"{STEM}.json", f"{STEM}.safetensors"


# --- reading images --------------------------------------------------------------------------------------------------


class ImageFile:
    """An image of any kind, read and opened once: its size, hash and pixels.

    Nothing is read before it is asked for. Each attribute raises `BadInput` where the image cannot be used.
    """

    def __init__(self, source: Picture, where: object = None) -> None:
        """where: how error messages name the image; by default its path."""
        self.source = source
        self.where = where if where is not None else describe_source(source)

    @cached_property
    def data(self) -> bytes | None:
        """The bytes of the file; None for a PIL image."""
        return None if isinstance(self.source, PILImage.Image) else read_bytes(self.source, self.where)

    @cached_property
    def opened(self) -> PILImage.Image:
        """The opened image, of whose file only the header has been decoded."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)  # MAX_PIXELS is the limit here
                image = open_image(self.data) if self.data is not None else self.source
        except BadInput:
            raise
        except PILImage.DecompressionBombError:  # far more than MAX_PIXELS
            raise BadInput(TOO_LARGE, where=self.where) from None
        except UnidentifiedImageError as error:
            raise BadInput(f"not a readable image ({type(error).__name__})", where=self.where) from None
        except Exception as error:  # decoders raise all sorts of exceptions for damaged files
            raise BadInput(f"damaged image ({error or type(error).__name__})", where=self.where) from None
        assert isinstance(image, PILImage.Image)
        if image.width * image.height > MAX_PIXELS:
            raise BadInput(TOO_LARGE, where=self.where)
        return image

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, as stored (EXIF orientation not applied)."""
        return self.opened.size

    @cached_property
    def hash(self) -> bytes:
        """16 bytes that identify the image: a hash of its file, or of its pixels for a PIL image."""
        data = self.data
        if data is None:
            image = self.opened
            data = repr((image.mode, image.size)).encode() + image.tobytes()
        return hashlib.blake2b(data, digest_size=16).digest()

    @cached_property
    def rgb(self) -> PILImage.Image:
        """The image as 8-bit RGB.

        The first frame of an animation; 16-bit values scaled down; CMYK converted; transparency blended over white; EXIF
        orientation applied.
        """
        image = self.opened
        try:
            if getattr(image, "is_animated", False):
                image = next(iter(ImageSequence.Iterator(image))).copy()
            return to_rgb(image)
        except Exception as error:  # decoders raise all sorts of exceptions for damaged files
            raise BadInput(f"damaged image ({error or type(error).__name__})", where=self.where) from None


def load_picture(source: Picture | ImageFile, where: object = None) -> PILImage.Image:
    """Return any image as 8-bit RGB, see `ImageFile`. Raise `BadInput` where it cannot be used."""
    return (source if isinstance(source, ImageFile) else ImageFile(source, where)).rgb


def open_image(data: bytes) -> PILImage.Image:
    PILImage.init()  # fills OPEN
    return PILImage.open(io.BytesIO(data), formats=[name for name in FORMATS if name in PILImage.OPEN])


def describe_source(source: object) -> str:
    """Return a name for an image in messages."""
    if isinstance(source, str) and source.startswith("data:"):
        return f"{source[:24]}…"
    return str(source) if isinstance(source, (str, Path)) else "image"


def read_bytes(source: str | Path | bytes, where: object) -> bytes:
    """Return the bytes of an image file. Raise `BadInput` where it is missing or empty."""
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, str) and source.startswith("data:"):
        head, _, body = source.partition(",")
        try:
            data = base64.b64decode(body, validate=True) if head.endswith(";base64") else b""
        except ValueError as error:  # binascii's own is a subclass
            raise BadInput(f"data URL is not base64 ({error})", where=where) from None
    else:
        try:
            data = Path(source).read_bytes()
        except FileNotFoundError:
            raise BadInput("no such image", where=where) from None
        except IsADirectoryError:
            raise BadInput("is a folder, not an image", where=where) from None
        except OSError as error:
            raise BadInput(f"image could not be read ({error.strerror})", where=where) from None
        except ValueError as error:
            raise BadInput(f"not a path ({error})", where=where) from None
    if not data:
        raise BadInput("empty image", where=where)
    return data


# --- pixels ----------------------------------------------------------------------------------------------------------


def to_rgb(picture: PILImage.Image) -> PILImage.Image:
    """Convert to 8-bit RGB, transparency blended over white, EXIF orientation applied."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        # 16-bit files have mode I;16, or I with values up to 65535; values that fit in 8 bits are not scaled.
        scale = 257.0 if picture.mode.startswith("I;16") or values.max(initial=0) > 255 else 1.0
        picture = PILImage.fromarray((values / scale).clip(0, 255).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        picture = PILImage.alpha_composite(PILImage.new("RGBA", rgba.size, "white"), rgba)
    return picture.convert("RGB")


def affine_augment(
    picture: PILImage.Image,
    zoom: float,
    shift: tuple[float, float],
    mirror: bool = False,
    outside: str | tuple[int, ...] = "white",
) -> PILImage.Image:
    """Zoom a picture about its centre and shift its content left and up by fractions of its sides.

    outside: the colour of what was outside of the picture.
    """
    if mirror:
        picture = picture.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
    scale = 1 / zoom
    left, top = (side * (0.5 - scale / 2 + fraction) for side, fraction in zip(picture.size, shift, strict=True))
    matrix = (scale, 0, left, 0, scale, top)
    return picture.transform(
        picture.size, PILImage.Transform.AFFINE, matrix, PILImage.Resampling.BICUBIC, fillcolor=outside
    )


def to_tensor(pictures: Iterable[PILImage.Image | np.ndarray]) -> Tensor:
    """Convert RGB pictures of one size (arrays: uint8 [H, W, 3]) to float32 [B, 3, H, W] in [-1, 1]."""
    values = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return values.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(values: Tensor) -> list[PILImage.Image]:
    """Convert float [B, 3, H, W] in [-1, 1] to RGB pictures."""
    pixels = ((values.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [PILImage.fromarray(array) for array in pixels]


Keyed = TypeVar("Keyed", bound=tuple[Any, Any])


def by_shape(entries: Iterable[Keyed]) -> Iterator[tuple[tuple[int, ...], list[Keyed]]]:
    """Yield the (key, array or tensor) of each shape, with the shape, in order of first appearance."""
    groups: dict[tuple[int, ...], list[Keyed]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry[1].shape), []).append(entry)
    yield from groups.items()


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> VQGANConfig:
    """Read `image_tokenizer.json`. Raise `BadInput` where it is invalid."""
    with as_bad_input("an image tokenizer's configuration", folder / CONFIG_FILE):
        config = VQGANConfig(**read_json(folder / CONFIG_FILE))
    return config


def write_files(folder: Path, config: VQGANConfig, weights: Mapping[str, Tensor], progress: Progress = no_progress) -> None:
    """Write `image_tokenizer.json` and `image_tokenizer.safetensors` to a folder, weights in their own dtype."""
    write_json(folder / CONFIG_FILE, config.to_json())
    tensors = ((name, weights[name]) for name in weights)
    write_safetensors(folder, tensors, weights, stem=STEM, progress=progress)


CACHE_LOCK = threading.Lock()
"""Held while codes are looked up or added, for threads that share a tokenizer. (A lock of its own would not be copied.)"""


class CodeCache:
    """Codes of images encoded before, by the hash of their pixels, since datasets repeat images. First in, first out.

    All codes are in one table, a ring, whose memory is used as it fills: small tensors allocated between the network's
    large temporary ones would keep those pages from being freed, a quarter of a megabyte for each image.
    """

    def __init__(self, num_codes: int) -> None:
        """num_codes: codes of all images together at most."""
        self.table = torch.empty(num_codes, dtype=torch.int32)
        self.entries: OrderedDict[bytes, tuple[int, Grid]] = OrderedDict()
        """Key of an image → index of its first code in the table, and its grid; oldest first."""
        self.end = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self.entries

    def __getitem__(self, key: bytes) -> Tensor:
        """Return codes int64 [h, w]."""
        start, grid = self.entries[key]
        return self.table[start : start + math.prod(grid)].long().view(grid)

    def add(self, key: bytes, codes: Tensor) -> None:
        """Add the codes [h, w] of a key, unless it is there, as where two threads encoded one picture."""
        count = codes.numel()
        if key in self.entries or count > len(self.table):
            return
        if self.end + count > len(self.table):
            self.forget_from(self.end, len(self.table))
            self.end = 0
        self.forget_from(self.end, self.end + count)
        self.table[self.end : self.end + count] = codes.flatten()
        self.entries[key] = (self.end, (codes.shape[0], codes.shape[1]))
        self.end += count

    def forget_from(self, start: int, end: int) -> None:
        """Forget the oldest images, as long as their codes start in a part of the table."""
        while self.entries and start <= next(iter(self.entries.values()))[0] < end:
            self.entries.popitem(last=False)


class ImageTokenizer:
    """Encodes images to grids of codes, and decodes codes to images."""

    def __init__(self, network: VQGAN) -> None:
        # Channels last is the layout that convolutions compute in on CPUs and GPUs alike.
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.clear_cache()
        self.threads: ThreadPolicy | None = None
        """Chooses the number of threads; None leaves it, so that the same pictures always give the same codes."""
        self.batch_size = BATCH_SIZE
        """Pictures that the network takes at a time; 1 makes codes to the bit independent of the others."""

    @property
    def config(self) -> VQGANConfig:
        return self.network.config

    @property
    def device(self) -> torch.device:
        return self.network.quant_conv.weight.device

    def preprocess(self, pictures: Iterable[Picture], fit: Fit = "crop") -> Tensor:
        """Return float32 [B, 3, R, R] in [-1, 1]. Raise `BadInput` for a picture that cannot be used."""
        return to_tensor(fit_square(load_picture(picture), self.config.resolution, fit) for picture in pictures)

    def encode(self, pictures: Sequence[Picture], fit: Fit = "crop", batch_size: int | None = None) -> Tensor:
        """Return codes int64 [B, h, w] of pictures as squares of the network's resolution, on the CPU.

        Raises `BadInput` for a picture that cannot be used.
        """
        codes, batch_size = [torch.empty(0, *self.config.grid, dtype=torch.int64)], batch_size or self.batch_size
        for start in range(0, len(pictures), batch_size):
            arrays = [self.to_square_array(picture, fit) for picture in pictures[start : start + batch_size]]
            codes.append(torch.stack(self.encode_arrays(arrays, batch_size)))
        return torch.cat(codes)

    def to_square_array(self, picture: Picture, fit: Fit) -> np.ndarray:
        """Return a picture as uint8 [R, R, 3]."""
        return np.asarray(fit_square(load_picture(picture), self.config.resolution, fit))

    def encode_arrays(self, arrays: Sequence[np.ndarray], batch_size: int | None = None) -> list[Tensor]:
        """Return codes int64 [h, w] of each picture, uint8 [H, W, 3]; those in the cache are not encoded again.

        Pictures of one shape are encoded in batches.
        """
        codes: list[Tensor] = []
        batch_size = batch_size or self.batch_size
        for start in range(0, len(arrays), batch_size):
            batch = arrays[start : start + batch_size]
            keys = [
                hashlib.blake2b(array.tobytes() + repr(array.shape).encode(), digest_size=16).digest() for array in batch
            ]
            with CACHE_LOCK:
                known = {key: self.cache[key] for key in keys if key in self.cache}
            new = {key: array for key, array in zip(keys, batch, strict=True) if key not in known}
            for _, members in by_shape(new.items()):
                values = to_tensor(array for _, array in members)
                with self.threads_for(values):
                    encoded = self.network.encode(values.to(self.device, self.network.quant_conv.weight.dtype)).cpu()
                known.update((key, image_codes) for (key, _), image_codes in zip(members, encoded, strict=True))
            with CACHE_LOCK:
                for key in new:
                    self.cache.add(key, known[key])
            codes += [known[key] for key in keys]
        return codes

    def clear_cache(self) -> None:
        """Forget encoded pictures, so that batches, and thus codes to the bit, do not depend on what came before."""
        self.cache = CodeCache(CODE_CACHE_SIZE * math.prod(self.config.grid))

    def decode(self, codes: Tensor, batch_size: int | None = None) -> list[PILImage.Image]:
        """Decode codes [B, h, w] to RGB pictures. Raise `BadInput` for codes outside the codebook."""
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.config.codebook_size):
            raise BadInput(f"codes outside 0…{self.config.codebook_size - 1}", where="image tokenizer")
        pictures: list[PILImage.Image] = []
        for batch in codes.to(self.device).split(batch_size or self.batch_size) if len(codes) else ():
            with self.threads_for(batch, self.config.reduction**2):
                pictures += to_pictures(self.network.decode(batch))
        return pictures

    def decode_all(self, codes: Sequence[Tensor], batch_size: int | None = None) -> list[PILImage.Image]:
        """Decode the codes [h, w] of images of any shapes, those of one shape in batches."""
        pictures: dict[int, PILImage.Image] = {}
        for _, members in by_shape(enumerate(codes)):
            decoded = self.decode(torch.stack([image_codes for _, image_codes in members]), batch_size)
            pictures.update((index, picture) for (index, _), picture in zip(members, decoded, strict=True))
        return [pictures[index] for index in range(len(codes))]

    def threads_for(self, batch: Tensor, pixels_per_value: int = 1) -> AbstractContextManager[Any]:
        """Return a context with as many threads as the convolutions of a batch [B, …, H, W] keep busy."""
        if self.threads is None or self.device.type != "cpu":
            return nullcontext()
        num_pixels = len(batch) * batch.shape[-2] * batch.shape[-1] * pixels_per_value
        return self.threads.apply(num_pixels * KERNEL_SIZE * self.config.channels**2)

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write `image_tokenizer.json` and `image_tokenizer.safetensors`, with names and shapes as in Meta's release.

        Raises `BadInput` where that fails; the folder is then unchanged.
        """
        state = {name: value.to("cpu", dtype) for name, value in self.network.released_state_dict().items()}
        with atomic_update(folder) as partial:
            write_files(partial, self.config, state)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> ImageTokenizer:
        """Read what `save` wrote, in float32. Raise `BadInput` that names a file which is missing or does not fit."""
        config = read_config(folder)
        state = SafetensorsFiles.from_folder(folder, STEM)
        network = VQGAN(config)
        try:
            network.load_state_dict({name: value.float() for name, value in state.items()})
        except RuntimeError as error:
            raise BadInput(f"tensors do not fit {CONFIG_FILE} ({error})", where=folder / WEIGHTS_FILE) from None
        return cls(network.to(device))
