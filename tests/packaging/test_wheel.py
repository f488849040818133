"""What is installed: all of the package and nothing else, found by name, in nobody's way."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"fusion_pass": "fusedhead", "lowering": "fusedhead/lowering", "kernels": "fusedhead/kernels"}


BUILD = "import sys, setuptools.build_meta as backend; getattr(backend, sys.argv[1])(sys.argv[2])"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist, from a copy: a build leaves files beside the sources that the next would pack."""
    source, out = tmp_path_factory.mktemp("source") / "fusedhead", tmp_path_factory.mktemp("built")
    unwanted = shutil.ignore_patterns("__pycache__", ".*", "build", "*.egg-info", "*.so", "results")
    shutil.copytree(ROOT, source, ignore=unwanted)
    for kind in ("build_sdist", "build_wheel"):
        subprocess.run([sys.executable, "-c", BUILD, kind, str(out)], cwd=source, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_an_index_takes_the_wheel_and_the_sdist(built: Path) -> None:
    files = [str(path) for path in built.iterdir()]
    assert len(files) == 2
    check = [sys.executable, "-m", "twine", "check", "--strict"]
    checked = subprocess.run([*check, *files], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_sdist_holds_tests_examples_and_documentation(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    wanted = {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "requirements.txt", "examples/train_gpt.py"}
    wanted |= {"mkdocs.yml", "docs/guide/faq.md", "docs/hooks.py", "docs/images/vocab.svg", "examples/tour.ipynb"}
    assert wanted | {"tests/conftest.py", "benchmarks/head.py", "fusion_pass/backend.py"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(".venv")]


def test_the_version_is_one(wheel: zipfile.ZipFile) -> None:
    import fusedhead

    headers = Parser().parsestr(metadata(wheel, "METADATA"))
    assert headers["Version"] == fusedhead.__version__
    assert headers["License-Expression"] == "BSD-3-Clause"


def test_what_an_index_shows_has_no_relative_links(wheel: zipfile.ZipFile) -> None:
    """It shows the README alone: setup.py takes out links that would lead nowhere."""
    shown = metadata(wheel, "METADATA")
    assert "Description-Content-Type: text/markdown" in shown
    assert "# fusedhead" in shown
    assert not re.findall(r"\]\((?!https://|#)", re.sub(r"```.*?```|`[^`\n]*`", "", shown, flags=re.DOTALL))


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (entry,) = [member for member in wheel.namelist() if member.endswith(f".dist-info/{name}")]
    return wheel.read(entry).decode()


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    wanted = {"fusedhead/py.typed"}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".jinja", ".css"):
                wanted.add(f"{package}/{path.relative_to(ROOT / folder).as_posix()}")
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == wanted


def test_torch_is_the_only_dependency(wheel: zipfile.ZipFile) -> None:
    required = Parser().parsestr(metadata(wheel, "METADATA")).get_all("Requires-Dist") or []
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.11"]


def test_the_wheel_registers_the_backend(wheel: zipfile.ZipFile) -> None:
    assert "[torch_dynamo_backends]\nfusedhead = fusedhead.backend:" in metadata(wheel, "entry_points.txt")


def test_torch_finds_the_backend_without_an_import() -> None:
    assert "fusedhead" in entry_points(group="torch_dynamo_backends").names
    code = "import torch._dynamo, sys; print(torch._dynamo.list_backends(), 'fusedhead' in sys.modules)"
    listed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "'fusedhead'" in listed
    assert listed.rstrip().endswith("False")


def test_another_package_named_kernels_is_not_hidden_at_the_root(tmp_path: Path) -> None:
    """transformers imports Hugging Face's `kernels`; a real package wins over a folder without __init__."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'another'")
    process = subprocess.run(
        [sys.executable, "-c", "import kernels; print(kernels.whose)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert process.stdout.strip() == "another"
