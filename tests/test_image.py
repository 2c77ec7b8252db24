"""Pictures ↔ codes, and every kind of picture that a stranger may bring."""

from __future__ import annotations

import base64
import io
import math
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from chameleon.errors import BadInput
from chameleon.tokenizers import image as image_module
from chameleon.tokenizers.image import (
    CodeCache,
    ImageTokenizer,
    affine_augment,
    fit_square,
    load_picture,
    to_pictures,
    to_tensor,
)


def gradient(size: tuple[int, int] = (40, 24)) -> PILImage.Image:
    width, height = size
    values = np.zeros((height, width, 3), dtype=np.uint8)
    values[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    values[..., 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    return PILImage.fromarray(values)


def test_missing_empty_truncated_and_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.png: no such image"):
        load_picture(tmp_path / "none.png")
    with pytest.raises(BadInput, match="is a folder"):
        load_picture(tmp_path)
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(BadInput, match=r"empty\.png: empty image"):
        load_picture(empty)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(BadInput, match="not a readable image"):
        load_picture(text)
    buffer = io.BytesIO()
    gradient((200, 200)).save(buffer, "PNG")
    cut = tmp_path / "cut.png"
    cut.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(BadInput, match=r"cut\.png: damaged image"):
        load_picture(cut)


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    PILImage.new("1", (20_000, 20_000)).save(path)
    with pytest.raises(BadInput, match="more than 64 million pixels"):
        load_picture(path)
    monkeypatch.setattr(image_module, "MAX_PIXELS", 100)
    with pytest.raises(BadInput, match="million pixels; scale it down"):
        load_picture(gradient())


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [PILImage.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert load_picture(path).getpixel((3, 3)) == (255, 0, 0)


def test_sixteen_bits_are_scaled_down(tmp_path: Path) -> None:
    values = np.full((8, 8), 0x8000, dtype=np.uint16)
    values[0, 0] = 0xFFFF
    path = tmp_path / "deep.png"
    PILImage.fromarray(values).save(path)
    picture = load_picture(path)
    assert picture.getpixel((4, 4)) == (127, 127, 127)
    assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_and_grey_and_palette_become_rgb(tmp_path: Path) -> None:
    path = tmp_path / "press.jpg"
    PILImage.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path)
    red, green, blue = load_picture(path).getpixel((4, 4))
    assert red > 200 and green < 60 and blue < 60
    assert load_picture(PILImage.new("L", (4, 4), 90)).getpixel((1, 1)) == (90, 90, 90)
    assert load_picture(PILImage.new("P", (4, 4))).mode == "RGB"


def test_transparency_is_blended_over_white() -> None:
    half = PILImage.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert all(abs(value - 127) <= 1 for value in load_picture(half).getpixel((1, 1)))
    assert load_picture(PILImage.new("RGBA", (4, 4), (9, 9, 9, 0))).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 5)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_any_shape_becomes_a_square(size: tuple[int, int], fit: str) -> None:
    assert fit_square(PILImage.new("RGB", size, "red"), 16, fit).size == (16, 16)  # type: ignore[arg-type]


def test_the_middle_of_a_long_strip(tmp_path: Path) -> None:
    PILImage.new("RGB", (1, 60000), "red").save(tmp_path / "strip.png")
    square = fit_square(load_picture(tmp_path / "strip.png"), 512)
    assert square.size == (512, 512) and square.getpixel((5, 5)) == (255, 0, 0)
    values = np.arange(60000).astype(np.uint8)  # 0 … 255 again and again: the middle must be the middle
    strip = PILImage.fromarray(np.stack([values] * 3, axis=1)[:, None])
    assert fit_square(strip, 512).getpixel((0, 256)) == strip.getpixel((0, 30000))


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in KiB there")
def test_a_long_strip_takes_little_memory() -> None:
    """Scaled as a whole before it is cropped it would take 60 GiB."""
    code = (
        "import resource; from PIL import Image; from chameleon.tokenizers.fitting import fit_square\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "fit_square(Image.new('RGB', (1, 60)), 512); before = peak()\n"
        "fit_square(Image.new('RGB', (1, 60000)), 512); print((peak() - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64  # MiB


def test_formats_that_run_programs_are_not_opened(tmp_path: Path) -> None:
    PILImage.new("RGB", (8, 8), "red").save(tmp_path / "p.eps")
    (tmp_path / "p.png").write_bytes((tmp_path / "p.eps").read_bytes())
    for name in ("p.eps", "p.png"):
        with pytest.raises(BadInput, match="not a readable image"):
            load_picture(tmp_path / name)


def test_a_full_disk_leaves_the_tokenizer_that_was_there(
    image_tokenizer: ImageTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_tokenizer.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(place: Path, *args: object, **kwargs: object) -> None:
        (place / "image_tokenizer.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_module, "write_safetensors", full)
    with pytest.raises(BadInput, match="No space left"):
        image_tokenizer.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_crop_keeps_the_middle_and_pad_keeps_all() -> None:
    picture = PILImage.new("RGB", (30, 10), "white")
    picture.paste((255, 0, 0), (0, 0, 10, 10))
    picture.paste((0, 0, 255), (10, 0, 20, 10))
    cropped = np.asarray(fit_square(picture, 10, "crop"))
    assert (cropped == (0, 0, 255)).all(axis=2).mean() > 0.9
    padded = np.asarray(fit_square(picture, 30, "pad"))
    assert (padded[:10] == 255).all() and (padded[20:] == 255).all()
    assert tuple(padded[15, 5]) == (255, 0, 0) and tuple(padded[15, 15]) == (0, 0, 255)


def test_data_urls() -> None:
    buffer = io.BytesIO()
    gradient().save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    assert np.array_equal(np.asarray(load_picture(url)), np.asarray(gradient()))
    with pytest.raises(BadInput, match="not base64"):
        load_picture("data:image/png;base64,!!!")


def test_tensor_round_trip_is_exact() -> None:
    pictures = [gradient((16, 16)), PILImage.new("RGB", (16, 16), "black"), PILImage.new("RGB", (16, 16), "white")]
    values = to_tensor(pictures)
    assert values.min() == -1 and values.max() == 1
    for before, after in zip(pictures, to_pictures(values), strict=True):
        assert np.array_equal(np.asarray(before), np.asarray(after))


def test_encode_is_the_same_alone_in_a_batch_and_again(image_tokenizer: ImageTokenizer) -> None:
    pictures = [gradient((16, 16)), gradient((40, 24)), PILImage.new("RGB", (5, 9), "green")]
    together = image_tokenizer.encode(pictures)
    assert together.shape == (3, 4, 4) and together.dtype == torch.int64
    fresh = ImageTokenizer(image_tokenizer.network)
    alone = torch.cat([fresh.encode([picture]) for picture in pictures])
    assert torch.equal(together, alone)
    assert torch.equal(image_tokenizer.encode(pictures), together)
    assert image_tokenizer.encode([]).shape == (0, 4, 4)


def test_codes_of_old_pictures_make_room_and_stay_right(image_tokenizer: ImageTokenizer) -> None:
    """A cache of four, in batches that mix cached and new images."""
    pictures = [PILImage.new("RGB", (16, 16), (20 * n, 255 - 20 * n, 40)) for n in range(12)]
    expected = torch.cat([ImageTokenizer(image_tokenizer.network).encode([picture]) for picture in pictures])
    assert len(expected.flatten(1).unique(dim=0)) > 6
    small = ImageTokenizer(image_tokenizer.network)
    small.cache = CodeCache(4 * math.prod(image_tokenizer.config.grid))
    for order in ([0, 1, 2], [2, 3, 4, 0], [0, 5, 6, 7, 8, 9, 1], list(range(12)), [11, 11, 3]):
        assert torch.equal(small.encode([pictures[n] for n in order]), expected[order])
        assert len(small.cache.entries) <= 4
        assert len(set(small.cache.entries.values())) == len(small.cache.entries)


def test_threads_that_share_a_tokenizer_get_the_codes_of_their_own_pictures(image_tokenizer: ImageTokenizer) -> None:
    """Which of two adds a picture, and what is forgotten meanwhile, changes nothing."""
    pictures = [PILImage.new("RGB", (16, 16), (20 * n, 255 - 20 * n, 40)) for n in range(12)]
    expected = torch.cat([ImageTokenizer(image_tokenizer.network).encode([picture]) for picture in pictures])
    shared = ImageTokenizer(image_tokenizer.network)
    shared.cache = CodeCache(5 * math.prod(image_tokenizer.config.grid))

    def encode(thread: int) -> bool:
        orders = [random.Random(f"{thread} {turn}").sample(range(12), 3) for turn in range(40)]
        return all(torch.equal(shared.encode([pictures[n] for n in order]), expected[order]) for order in orders)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(encode, range(4)))
    cache = CodeCache(4)
    for key, codes in ((b"a", [[1, 2]]), (b"b", [[3, 4]]), (b"a", [[5, 6]]), (b"c", [[7, 8]])):
        cache.add(key, torch.tensor(codes))
    assert b"a" not in cache and cache[b"b"].tolist() == [[3, 4]] and cache[b"c"].tolist() == [[7, 8]]


def test_moved_pictures_by_hand() -> None:
    """Twice the zoom shows the middle half; a shift of a quarter to the left moves columns by a quarter."""
    picture = gradient((32, 32))
    assert np.array_equal(np.asarray(affine_augment(picture, 1.0, (0.0, 0.0))), np.asarray(picture))
    mirrored = np.asarray(affine_augment(picture, 1.0, (0.0, 0.0), mirror=True))
    assert np.array_equal(mirrored, np.asarray(picture)[:, ::-1])
    shifted = np.asarray(affine_augment(picture, 1.0, (0.25, 0.0)))
    assert np.array_equal(shifted[:, :24], np.asarray(picture)[:, 8:])
    assert (shifted[:, 24:] == 255).all()
    zoomed = np.asarray(affine_augment(picture, 2.0, (0.0, 0.0)))[..., 0].astype(int)
    assert abs(zoomed[16, 0] - np.asarray(picture)[16, 8, 0]) < 8
    assert abs(zoomed[16, 31] - np.asarray(picture)[16, 23, 0]) < 8


def test_decode_refuses_codes_outside_the_codebook(image_tokenizer: ImageTokenizer) -> None:
    assert image_tokenizer.decode(torch.zeros(2, 4, 4, dtype=torch.int64))[0].size == (16, 16)
    with pytest.raises(BadInput, match="codes outside 0…31"):
        image_tokenizer.decode(torch.full((1, 4, 4), 32))


def test_save_and_load(image_tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    image_tokenizer.save(tmp_path)
    again = ImageTokenizer.load(tmp_path)
    picture = gradient()
    assert torch.equal(again.encode([picture]), image_tokenizer.encode([picture]))
    (tmp_path / "image_tokenizer.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(BadInput, match=r"image_tokenizer\.safetensors: damaged"):
        ImageTokenizer.load(tmp_path)
    (tmp_path / "image_tokenizer.json").unlink()
    with pytest.raises(BadInput, match="file is missing"):
        ImageTokenizer.load(tmp_path)
