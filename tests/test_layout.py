"""The house: floors, links, names that must stay free, and what a wheel holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "chameleon.errors": 0,
    "chameleon.files": 0,
    "chameleon.vocabulary": 0,
    "chameleon.document": 0,
    "chameleon.tensor_files": 1,
    "chameleon.model": 2,
    "chameleon.tokenizers": 2,
    "chameleon.data": 3,
    "chameleon.plan": 3,
    "chameleon.bundle": 4,
    "chameleon.generation": 5,
    "chameleon.convert": 5,
    "chameleon.evaluation": 6,
    "chameleon.train": 7,
    "chameleon.serve": 7,
    "chameleon.gallery": 7,
    "chameleon.document_view": 8,
    "chameleon.demo": 8,
    "chameleon.shard_view": 8,
    "chameleon.run_view": 8,
    "chameleon.cli": 9,
    "chameleon": 10,
}
# Rooms on one floor that may see each other: errors.py is seen by all.
FOUNDATION = "chameleon.errors"


def room(module: str) -> str:
    """The folder or lone file that a module lies in."""
    return max((name for name in FLOORS if module == name or module.startswith(name + ".")), key=len)


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder, package in (
        (ROOT / "chameleon", "chameleon"),
        (ROOT / "tokenizers", "chameleon.tokenizers"),
        (ROOT / "train", "chameleon.train"),
    ):
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(folder)
            if relative.parts[0] in ("tokenizers", "train"):
                continue  # the links: read in their real folders
            name = ".".join([package, *relative.with_suffix("").parts]).removesuffix(".__init__")
            found.append((name, path))
    return found


def imports(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_every_module_has_a_floor_and_imports_only_from_below() -> None:
    listed = modules()
    assert len(listed) > 30
    for name, path in listed:
        assert room(name) != "chameleon" or name == "chameleon", f"{name} has no floor"
        for imported in imports(path):
            assert imported.split(".")[0] not in ("train",), f"{name} imports the top folder train"
            if not imported.startswith("chameleon"):
                continue
            here, there = room(name), room(imported)
            assert here == there or there == FOUNDATION or FLOORS[there] < FLOORS[here], f"{name} imports {imported}"


def test_no_circles_inside_a_folder() -> None:
    listed = modules()
    names = {name for name, _ in listed}
    needs = {
        name: {
            other
            for imported in imports(path)
            for other in (imported, imported.rpartition(".")[0])
            if other in names and other != name and room(other) == room(name)
        }
        for name, path in listed
    }
    while free := [name for name, wanted in needs.items() if not wanted & needs.keys()]:
        for name in free:
            del needs[name]
    assert not needs, f"these import each other: {sorted(needs)}"


def test_lightning_appears_only_in_train() -> None:
    for name, path in modules():
        if any(imported.split(".")[0] == "lightning" for imported in imports(path)):
            assert name.startswith("chameleon.train"), name


def test_links_and_free_names() -> None:
    for name in ("tokenizers", "train"):
        link = ROOT / "chameleon" / name
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{name}"
        assert not (ROOT / name / "__init__.py").exists()


def test_hugging_face_tokenizers_is_importable_from_the_root() -> None:
    code = "import tokenizers; tokenizers.Tokenizer; import chameleon.tokenizers.text as t; print(t.SentencePieceTokenizer)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_lazy_and_all_there() -> None:
    code = (
        "import sys, chameleon\n"
        "assert 'torch' not in sys.modules\n"
        "for name in chameleon.__all__: getattr(chameleon, name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_code_data_recipes_and_bundle(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for wanted in (
        "chameleon/tokenizers/vqgan.py",
        "chameleon/train/language.py",
        "chameleon/train/recipes/demo.yaml",
        "chameleon/data/embedded/emoji-000.tar.gz",
        "chameleon/data/embedded/ATTRIBUTIONS.md",
        "chameleon/bundles/emoji/model.safetensors",
        "chameleon/bundles/emoji/provenance.json",
    ):
        assert wanted in names, wanted
    assert all(name.startswith(("chameleon/", "open_chameleon-")) for name in names)


def test_wheel_installs_and_imports_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    code = "import chameleon, chameleon.errors, chameleon.document; print(chameleon.__file__)"
    done = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


def test_embedded_set_and_bundle_stay_small() -> None:
    def megabytes(folder: Path) -> float:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20

    assert megabytes(ROOT / "chameleon" / "data" / "embedded") <= 16
    assert megabytes(ROOT / "chameleon" / "bundles" / "emoji") <= 32
