"""What is installed: all of the package and nothing else, found by name, in nobody's way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"fusion_pass": "fusedhead", "lowering": "fusedhead/lowering", "kernels": "fusedhead/kernels"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy: a build leaves files beside the sources that the next build would pack."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(out), str(source)], check=True)
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (found,) = [member for member in wheel.namelist() if member.endswith(f".dist-info/{name}")]
    return wheel.read(found).decode()


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    wanted = {"fusedhead/py.typed"}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
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
    found = subprocess.run(
        [sys.executable, "-c", "import kernels; print(kernels.whose)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == "another"
