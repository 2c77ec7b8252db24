"""The documentation is true: its commands run, its Python runs, its figures are those of the shipped bundle.

Blocks marked `bash` and `python` are run; `text` and `py` ones show what cannot run here.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image as PILImage
from ship import figure_rows
from test_convert import meta_folder, small

from chameleon.bundle import SHIPPED
from chameleon.cli import main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GUIDES = ("data", "training", "evaluation", "tokenizers", "scaling", "generation", "shapes", "conversion")
TINY_MODEL = ["size=tiny", "model={layers: 1, width: 32, heads: 2, kv_heads: 2, ffn_width: 32}"]
TINY_RUN = ["run.max_steps=3", "global_batch_size=4", "run.progress=false"]
SMALLER = {
    "fit-text": ["--num-pieces", "340"],
    "fit-image": ["run.max_steps=3", "model.codebook_size=64", "model.channels=8", "global_batch_size=8"],
    "pretrain": [*TINY_RUN, *TINY_MODEL],
    "finetune": TINY_RUN,
}
"""Options that make a documented command small."""


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the guides read: text, code, shards of captioned images, conversations, a released checkpoint."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("src/package", "shards"):
        (folder / name).mkdir(parents=True)
    for number in range(8):
        (folder / "src" / "package" / f"m{number}.py").write_text("def add(a, b):\n    return a + b\n" * 50)
    captions = ["a red house", "a blue boat", "two green trees", "one yellow sun"]
    (folder / "captions.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in captions * 50))
    for shard in range(2):
        with tarfile.open(folder / "shards" / f"{shard}.tar", "w") as tar:
            for number in range(16):
                buffer = io.BytesIO()
                PILImage.new("RGB", (80, 64), (number * 16, shard * 200, 255 - number * 16)).save(buffer, "PNG")
                for extension, data in ((".png", buffer.getvalue()), (".txt", captions[number % 4].encode())):
                    entry = tarfile.TarInfo(f"{number:03}{extension}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    mask = PILImage.new("L", (64, 64))
    mask.paste(255, (0, 32, 64, 64))
    mask.save(folder / "mask.png")
    for name in ("cat", "picture"):
        PILImage.new("RGB", (70, 70), "grey").save(folder / f"{name}.png")
    (conversation,) = [block for block in blocks(DOCS / "data.md", "json") if "messages" in block]
    (folder / "conversations.jsonl").write_text((json.dumps(json.loads(conversation)) + "\n") * 20)
    (document,) = blocks(DOCS / "generation.md", "json")
    (folder / "document.json").write_text(document)
    (options,) = [block for block in blocks(DOCS / "data.md", "yaml") if "filters" in block]
    (folder / "options.yaml").write_text(options)
    meta_folder(folder / "released", small(width=32, heads=8))
    return folder


@pytest.mark.parametrize("guide", GUIDES)
def test_the_guides_commands_run(guide: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, each line as it stands but for sizes."""
    monkeypatch.chdir(folder)
    lines = [line for block in blocks(DOCS / f"{guide}.md", "bash") for line in block.strip().splitlines()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "chameleon", line
        arguments += SMALLER.get(arguments[0], [])
        if any(argument.startswith("run.devices=2") for argument in arguments):  # starts this program again
            subprocess.run([sys.executable, "-m", "chameleon.cli", *arguments], check=True, timeout=300)
        else:
            main(arguments)


def test_what_the_guides_commands_wrote(folder: Path) -> None:
    assert PILImage.open(folder / "house.png").size == (64, 64)
    assert (folder / "answer" / "document.html").is_file()
    assert PILImage.open(folder / "wide.png").size == (96, 64)
    assert "<img" in (folder / "page.html").read_text()
    assert (folder / "my" / "hf" / "config.json").is_file() and (folder / "my" / "meta").is_dir()


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/generation.md"])
def test_the_documented_python_runs(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for block in blocks(ROOT / page, "python"):
        exec(compile(block, page, "exec"), {})


def test_the_readmes_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        main(shlex.split(line)[1:])


def test_the_readmes_figures_are_those_of_the_shipped_bundle() -> None:
    rows = figure_rows(json.loads((SHIPPED / "provenance.json").read_text())["evaluation"])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("<!-- figures")[2].partition("<!-- end of figures -->")[0]
    assert [line for line in table.splitlines()[3:] if line] == rows
    assert all(row in (SHIPPED / "README.md").read_text(encoding="utf-8") for row in rows)
    assert len(readme.splitlines()) <= 130


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *DOCS.glob("*.md")]
    assert len(pages) > 10
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_named_modules_and_files_exist() -> None:
    """What the architecture page and CONTRIBUTING.md name in backticks."""
    for page in (DOCS / "architecture.md", ROOT / "CONTRIBUTING.md"):
        for name in re.findall(r"`([\w/.]+\.py)`", page.read_text(encoding="utf-8")):
            places = [ROOT / name, ROOT / "chameleon" / name, *(ROOT / "chameleon" / "generation").glob(name)]
            assert any(place.exists() for place in places), f"{page.name}: {name}"
