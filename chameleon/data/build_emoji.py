"""Builds the embedded emoji set from four unpacked npm packages, the same bytes every time.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 \\
             @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    for f in *.tgz; do mkdir "${f%.tgz}"; tar xzf "$f" -C "${f%.tgz}"; done
    python -m chameleon.data.build_emoji --packages . --out chameleon/data/embedded

A shard is a gzip-compressed tar in WebDataset form: `STYLE-HEXCODE.webp` beside `STYLE-HEXCODE.json`. The
sidecar holds everything that is said of a picture, so that the shards can be used without this package.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from chameleon.data.colours import dominant_colour
from chameleon.errors import BadInput

SIZE = 64  # pixels a side
WEBP_QUALITY = 80
SHARDS = 8
HELD_OUT_SHARE = 0.15
TONES = {"1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark"}
LANGUAGES = ("en", "de", "es", "fr", "it", "ja", "ko", "pl", "pt", "sv", "uk", "zh")
PICTURES = {
    "noto": ("emoji-datasource-google-16.0.0", "package/img/google/64/{}.png"),
    "twemoji": ("emoji-datasource-twitter-16.0.0", "package/img/twitter/64/{}.png"),
    "fluent": ("lobehub-fluent-emoji-3d-1.1.0", "package/assets/{}.webp"),
}
WORDS = ("emojibase-data-17.0.0", "package/{}/data.json")

ATTRIBUTIONS = """# Where the embedded emoji come from
| what | source | licence |
| --- | --- | --- |
| pictures named `noto-…` | Noto Emoji by Google, from npm `emoji-datasource-google` 16.0.0 | Apache-2.0 |
| pictures named `twemoji-…` | Twemoji by Twitter and contributors, from npm `emoji-datasource-twitter` 16.0.0 | CC-BY-4.0 |
| pictures named `fluent-…` | Fluent Emoji by Microsoft, from npm `@lobehub/fluent-emoji-3d` 1.1.0 | MIT |
| names, tags, groups, languages | `emojibase-data` 17.0.0 by Miles Johnson | MIT |
| pictures named `clipart-…` | Open Clip Art Library, from Debian's `openclipart-svg` 0.18, authors beside | public domain |

Changes: blended over white, Fluent reduced to 64×64 by Lanczos, all stored as WebP. The dominant colour was
measured from the pixels. Clip art: rendered at 64×64 on white; most names were written anew.
"""


def plain(hexcode: str) -> str:
    """The hexcode in lower case without variation selectors: the key on which the packages are joined."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def concept(hexcode: str) -> str:
    """The emoji without skin tone and gender: what all variants of one emoji share."""
    people = {"1f468": "1f9d1", "1f469": "1f9d1"}
    parts = [people.get(part, part) for part in plain(hexcode).split("-") if part not in TONES]
    text = "-".join(parts)
    for sign in ("-200d-2640", "-200d-2642"):
        text = text.removesuffix(sign)
    return text


def held_out_style(concept_code: str, styles: list[str]) -> str | None:
    """The style of this concept that only validation sees, or None. A pure function of the concept's code."""
    digest = hashlib.sha256(f"open-chameleon split {concept_code}".encode()).digest()
    if len(styles) < 2 or int.from_bytes(digest[:4], "big") / 2**32 >= HELD_OUT_SHARE:
        return None
    return sorted(styles)[digest[4] % len(styles)]


def flatten(path: Path) -> Image.Image:
    """The picture at `path` as 64×64 RGBA."""
    with Image.open(path) as picture:
        rgba = picture.convert("RGBA")
    if rgba.size != (SIZE, SIZE):
        rgba = rgba.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return rgba


def entries(packages: Path) -> Iterator[dict[str, Any]]:
    """Every emoji and skin variant of emojibase in its own order, as flat dictionaries."""
    root = packages / WORDS[0] / "package"
    names = json.loads((root / "meta" / "groups.json").read_text(encoding="utf-8"))
    for emoji in json.loads((root / "en" / "data.json").read_text(encoding="utf-8")):
        if "group" not in emoji or names["groups"][str(emoji["group"])] == "component":
            continue
        for variant in (emoji, *emoji.get("skins", ())):
            tones = [TONES[part] for part in plain(variant["hexcode"]).split("-") if part in TONES]
            yield {
                "hexcode": plain(variant["hexcode"]),
                "base": plain(emoji["hexcode"]),
                "concept": concept(emoji["hexcode"]),
                "emoji": variant["emoji"],
                "name": emoji["label"],
                "tags": emoji.get("tags", []),
                "group": names["groups"][str(emoji["group"])],
                "subgroup": names["subgroups"][str(emoji["subgroup"])],
                "skin_tone": tones[0] if len(set(tones)) == 1 else ("mixed" if tones else None),
                "has_skin_tones": bool(emoji.get("skins")),
            }


def samples(packages: Path) -> list[tuple[str, bytes, dict[str, Any]]]:
    """(key, WebP bytes, sidecar) of every picture that a style has, sorted by key."""
    pictures_of_concept: dict[str, list[tuple[str, Path, dict[str, Any]]]] = {}
    for entry in entries(packages):
        for style, (package, pattern) in PICTURES.items():
            for concept_code in dict.fromkeys((entry["hexcode"], *with_selectors(entry["hexcode"], entry["emoji"]))):
                path = packages / package / pattern.format(concept_code)
                if path.exists():
                    pictures_of_concept.setdefault(entry["concept"], []).append((style, path, entry))
                    break
    result = []
    for concept_code, pictures in pictures_of_concept.items():
        held_out = held_out_style(concept_code, sorted({style for style, _, _ in pictures}))
        for style, path, entry in pictures:
            rgba = flatten(path)
            white = Image.new("RGBA", rgba.size, "white")
            buffer = io.BytesIO()
            Image.alpha_composite(white, rgba).convert("RGB").save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
            sidecar = {**entry, "style": style, "colour": dominant_colour(rgba)}
            sidecar["split"] = "validation" if style == held_out else "train"
            result.append((f"{style}-{entry['hexcode']}", buffer.getvalue(), sidecar))
    return sorted(result)


def with_selectors(hexcode: str, emoji: str) -> Iterator[str]:
    """Other spellings of the same emoji: with the variation selectors of its own string, and after the first sign."""
    yield "-".join(f"{ord(character):04x}" for character in emoji)
    first, *rest = hexcode.split("-")
    yield "-".join((first, "fe0f", *rest))
    yield hexcode + "-fe0f"


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))  # TarInfo's own defaults: time 0, no owner


def dump(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def write_gzip(path: Path, data: bytes) -> None:
    with open(path, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(data)


def write_shards(samples: Sequence[tuple[str, bytes, dict[str, Any]]], out: Path, name: str, num_shards: int) -> None:
    """Writes samples (key, WebP bytes, sidecar) to shards, round robin, so that each holds all styles."""
    for shard in range(num_shards):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, webp, sidecar in samples[shard::num_shards]:
                add(tar, f"{key}.webp", webp)
                add(tar, f"{key}.json", dump(sidecar))
        write_gzip(out / f"{name}-{shard:03d}.tar.gz", buffer.getvalue())


def words(packages: Path) -> bytes:
    """Lines of JSON: for each emoji its label and tags in every language of `LANGUAGES`."""
    all_words: dict[str, dict[str, Any]] = {}
    for language in LANGUAGES:
        path = packages / WORDS[0] / WORDS[1].format(language)
        for emoji in json.loads(path.read_text(encoding="utf-8")):
            if "group" in emoji and emoji.get("label"):
                words_of = all_words.setdefault(plain(emoji["hexcode"]), {})
                words_of[language] = [emoji["label"], *emoji.get("tags", [])]
    lines = [dump({"hexcode": code, "words": words_of}) for code, words_of in sorted(all_words.items())]
    return b"\n".join(lines) + b"\n"


def build(packages: Path, out: Path) -> dict[str, int]:
    """Writes shards, words and attributions to `out`; returns how many pictures each style has."""
    for package, _ in (*PICTURES.values(), WORDS):
        if not (packages / package / "package").is_dir():
            raise BadInput("package not found", where=packages / package, remedy="see the module's docstring")
    out.mkdir(parents=True, exist_ok=True)
    all_samples = samples(packages)
    write_shards(all_samples, out, "emoji", SHARDS)
    write_gzip(out / "words.jsonl.gz", words(packages))
    (out / "ATTRIBUTIONS.md").write_text(ATTRIBUTIONS, encoding="utf-8")
    counts: dict[str, int] = {}
    for _, _, sidecar in all_samples:
        counts[sidecar["style"]] = counts.get(sidecar["style"], 0) + 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the unpacked npm packages")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the shards")
    arguments = parser.parse_args()
    print(json.dumps(build(arguments.packages, arguments.out)))


if __name__ == "__main__":
    main()
