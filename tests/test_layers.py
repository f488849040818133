"""An import goes down: a package imports what stands below it in `LAYERS`, and nothing beside it in its own row.

``python tests/test_layers.py`` prints the imports between the layers, and the floor of each folder.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {"fusion_pass": (), "lowering": ("lowering",), "kernels": ("kernels",)}  # folder -> its package in fusedhead
LAYERS = (  # from the top; those in one row do not import one another
    ("__main__",),
    ("__init__",),  # the public names
    ("run", "tune", "integrations"),
    ("estimate",),
    ("explain", "fake_modules", "live_bytes"),
    ("eager",),
    ("backend", "functional"),
    ("inductor", "deferred"),
    ("pipeline",),
    ("report",),
    ("canonicalize", "rewrite", "legality"),
    ("analysis",),
    ("rules",),
    ("ir",),
    ("graph",),
    ("compat", "options", "version"),
    ("lowering",),
    ("kernels",),
)
LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row}


def imports(file: Path) -> Iterator[str]:
    """The layers that a file imports from, each as often as it does."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fusedhead":
            below = (node.module or "").split(".")[1:2]
            yield from below or (alias.name if alias.name in LEVEL else "__init__" for alias in node.names)
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            yield from (name[1] if len(name) > 1 else "__init__" for name in names if name[0] == "fusedhead")


def arrows() -> Iterator[tuple[Path, str, str]]:
    """(file, its layer, a layer that it imports from) for every import of the package."""
    for folder, package in SOURCES.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            layer = (*package, *file.relative_to(ROOT / folder).with_suffix("").parts)[0]
            assert layer in LEVEL, f"{file} has no place in LAYERS"
            layer = "__main__" if file.name == "__main__.py" else layer  # a command stands above all
            yield from ((file, layer, target) for target in imports(file))


def test_every_import_goes_down() -> None:
    wrong = {
        f"{file.relative_to(ROOT)} imports {target}"
        for file, layer, target in arrows()
        if layer != target and LEVEL[layer] >= LEVEL[target]
    }
    assert not wrong


def test_the_internals_list_the_layers_as_they_are() -> None:
    page = (ROOT / "docs" / "internals" / "index.md").read_text(encoding="utf-8")
    listed = page.partition("```text\n")[2].partition("```")[0].splitlines()
    names = {name for row in LAYERS for name in row}
    rows = [{word for word in line.partition("   ")[0].split() if word in names} for line in listed]
    assert rows == [set(row) for row in LAYERS[2:-2]]  # below: lowering and kernels, whose order the sentence says


MOST_FLOORS = 11


def floors() -> dict[str, int]:
    """The floor of each folder: one above the highest of the folders that it needs, its own files not counted.

    The files beside the folders (`backend.py`, `pipeline.py`) lead from one folder to another and are no floors.
    """
    below: dict[str, set[str]] = {name: set() for name in LEVEL}
    for file, layer, target in arrows():
        if file.name != "__main__.py" and target != layer and target != "__init__":
            below[layer].add(target)
    folders = {folder for top in SOURCES for folder in (top, *(d.name for d in (ROOT / top).iterdir() if d.is_dir()))}
    highest: dict[str, int] = {}
    for name in sorted(LEVEL, key=LEVEL.__getitem__, reverse=True):
        highest[name] = max((highest[each] for each in below[name]), default=0) + (name in folders)
    return {name: floor for name, floor in highest.items() if name in folders}


def test_folders_stand_on_at_most_eleven_floors() -> None:
    assert max(floors().values()) <= MOST_FLOORS


def files_below() -> dict[Path, set[Path]]:
    """The files that each file imports, in its functions too."""
    files = {}
    for folder, package in SOURCES.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join(("fusedhead", *package, *parts)).removesuffix(".__init__")] = file
    below: dict[Path, set[Path]] = {file: set() for file in files.values()}
    for file in below:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fusedhead."):
                names = [
                    files.get(f"{node.module}.{alias.name}") or files.get(node.module or "") for alias in node.names
                ]
                below[file] |= {each for each in names if each is not None} - {file}
    return below


def test_no_files_import_one_another_in_a_circle() -> None:
    below = files_below()
    while free := [file for file, others in below.items() if not others & below.keys()]:
        for file in free:
            del below[file]
    assert not below, f"a circle among {sorted(str(file.relative_to(ROOT)) for file in below)}"


if __name__ == "__main__":
    for floor in range(max(floors().values()), 0, -1):
        print(floor, *(name for name, height in floors().items() if height == floor))
    for row in LAYERS:
        for name in row:
            targets = sorted({target for _, layer, target in arrows() if layer == name} - {name}, key=LEVEL.__getitem__)
            print(f"{name:14}{' '.join(targets)}")
