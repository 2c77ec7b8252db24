"""The layout: which module may import which, links, names that must stay free, and what a wheel contains."""

from __future__ import annotations

import ast
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
LAYERS = {  # a module imports from lower layers only, or from its own package
    "chameleon.errors": 0,
    "chameleon.device": 1,
    "chameleon.threads": 1,
    "chameleon.progress": 0,
    "chameleon.allocator": 0,
    "chameleon.files": 1,
    "chameleon.config_reader": 1,
    "chameleon.dialect": 1,
    "chameleon.vocabulary": 2,
    "chameleon.document": 1,
    "chameleon.html_page": 1,
    "chameleon.tensor_files": 2,
    "chameleon.compiled_code": 2,
    "chameleon.model": 3,
    "chameleon.tokenizers": 3,
    "chameleon.data": 4,
    "chameleon.plan": 4,
    "chameleon.bundle": 5,
    "chameleon.generation": 6,
    "chameleon.average": 6,
    "chameleon.convert": 6,
    "chameleon.evaluation": 7,
    "chameleon.train": 8,
    "chameleon.gallery": 9,
    "chameleon.document_view": 10,
    "chameleon.demo": 10,
    "chameleon.shard_view": 10,
    "chameleon.run_view": 8,
    "chameleon.serve": 10,
    "chameleon.cli": 11,
    "chameleon": 12,
}


def package_of(module: str) -> str:
    """Return the entry of `LAYERS` that a module belongs to."""
    return max((name for name in LAYERS if module == name or module.startswith(name + ".")), key=len)


def modules() -> list[tuple[str, Path]]:
    actual = []
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
            actual.append((name, path))
    return actual


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


def test_modules_import_from_lower_layers_only() -> None:
    listed = modules()
    assert len(listed) > 30
    for name, path in listed:
        assert package_of(name) != "chameleon" or name == "chameleon", f"{name} is not listed in LAYERS"
        for imported in imports(path):
            assert imported.split(".")[0] not in ("train",), f"{name} imports the top folder train"
            if not imported.startswith("chameleon"):
                continue
            here, there = package_of(name), package_of(imported)
            assert here == there or LAYERS[there] < LAYERS[here], f"{name} imports {imported}"


def test_no_import_cycles_inside_a_package() -> None:
    listed = modules()
    names = {name for name, _ in listed}
    needs = {
        name: {
            other
            for imported in imports(path)
            for other in (imported, imported.rpartition(".")[0])
            if other in names and other != name and package_of(other) == package_of(name) and other != "chameleon.cli"
        }
        for name, path in listed
    }
    while free := [name for name, expected in needs.items() if not expected & needs.keys()]:
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


def test_captions_and_drawings_load_no_compiler(bundle_folder: Path, tmp_path: Path) -> None:
    """PyTorch's compiler takes a second and more to import; it is only for those who ask for it."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "p.png")
    code = (
        "import sys\n"
        "from chameleon.cli import main\n"
        f"main(['caption', {str(tmp_path / 'p.png')!r}, '--model', {str(bundle_folder)!r}])\n"
        f"main(['draw', 'heart', '--out', {str(tmp_path / 'd.png')!r}, '--model', {str(bundle_folder)!r}])\n"
        "assert 'torch' in sys.modules\n"
        "slow = {'torch._dynamo', 'torch._inductor', 'lightning', 'transformers', 'matplotlib', 'torchvision'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_lazy_and_exist() -> None:
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
    for expected in (
        "chameleon/tokenizers/vqgan.py",
        "chameleon/train/language_module.py",
        "chameleon/train/recipes/demo.yaml",
        "chameleon/data/embedded/emoji-000.tar.gz",
        "chameleon/data/embedded/ATTRIBUTIONS.md",
        "chameleon/bundles/emoji/model.safetensors",
        "chameleon/bundles/emoji/provenance.json",
    ):
        assert expected in names, expected
    assert all(name.startswith(("chameleon/", "open_chameleon-")) for name in names)
    assert wheel.stat().st_size <= 60e6


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
    assert megabytes(ROOT / "chameleon" / "bundles" / "emoji") <= 52
