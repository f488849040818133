"""An import goes down: a package imports what stands below it in `LAYERS`, and nothing beside it in its own row.

``python tests/test_layers.py`` prints the imports between the layers.
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


if __name__ == "__main__":
    for row in LAYERS:
        for name in row:
            targets = sorted({target for _, layer, target in arrows() if layer == name} - {name}, key=LEVEL.__getitem__)
            print(f"{name:14}{' '.join(targets)}")
