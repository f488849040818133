"""What the documentation takes out of the repository when it is built, so that nothing is committed twice.

* The home page is README.md.
* A link out of docs/ to a Markdown file of the repository becomes a page ``repository/...``; a link to any other file
  becomes its name. So links work in a clone and on the pages alike; one that leads nowhere fails the build.
* ``<!-- modules: FOLDER -->`` becomes a table of a folder's files and the first sentences of their docstrings.
* ``<!-- docstring: FILE -->`` becomes that file's docstring, ``<!-- passes -->`` the list of passes.
* The package, whose folders have other names than its modules, is laid out for mkdocstrings.

It imports nothing of the package: no torch is needed.
"""

from __future__ import annotations

import ast
import posixpath
import re
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority, get_plugin_logger
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[1]
DOCS, APART = "docs", "repository"
PACKAGE = {"": "fusion_pass", "lowering": "lowering", "kernels": "kernels"}
# fenced blocks and code spans first, so that what looks like a link in them is left alone
LINK = re.compile(r"^```.*?^```|`[^`\n]*`|(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", re.MULTILINE | re.DOTALL)
DIRECTIVE = re.compile(r"<!-- (modules|docstring): (\S+) -->")

log = get_plugin_logger("fusedhead")
laid_out = tempfile.TemporaryDirectory(prefix="fusedhead-docs-")


def source_of(page: str) -> str:
    """The file of the repository that a page is made of."""
    if page == "index.md":
        return "README.md"
    return page.removeprefix(f"{APART}/") if page.startswith(f"{APART}/") else f"{DOCS}/{page}"


def page_of(source: str) -> str | None:
    """The page that a file of the repository becomes, if any."""
    if source == "README.md":
        return "index.md"
    if source.startswith(f"{DOCS}/"):
        return source.removeprefix(f"{DOCS}/")
    return f"{APART}/{source}" if source.endswith(".md") else None


def targets(source: str, text: str) -> set[str]:
    """The files of the repository that a Markdown file links to."""
    found = (match[3] for match in LINK.finditer(text) if match[3])
    return {resolved(source, link) for link in found if local(link)}


def local(link: str) -> bool:
    return not link.startswith(("#", "http://", "https://", "mailto:"))


def resolved(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link.partition("#")[0]))


def linked(markdown: str, page: str) -> str:
    """The text of a page with its links as they are between pages."""
    source = source_of(page)

    def link(match: re.Match[str]) -> str:
        mark, text, target = match[1], match[2], match[3]
        if target is None or not local(target):
            return match[0]
        file, (_, hash_, anchor) = resolved(source, target), target.partition("#")
        if not (ROOT / file).exists():
            log.warning("%s links to %s, which does not exist", source, target)
        led = page_of(file)
        if led is None:
            return text
        return f"{mark}[{text}]({posixpath.relpath(led, posixpath.dirname(page) or '.')}{hash_}{anchor})"

    return LINK.sub(link, markdown)


def docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def filled(match: re.Match[str]) -> str:
    """What stands in the place of a directive."""
    what, where = match[1], ROOT / match[2]
    if what == "docstring":
        return f"```text\n{docstring(where)}\n```"
    rows = []
    for file in sorted(where.glob("*.py")):
        paragraph = " ".join(docstring(file).partition("\n\n")[0].split())
        first = re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0].rstrip(":").replace("|", "\\|")
        if file.name != "__init__.py" or first:
            rows.append(f"| `{file.name}` | {re.sub(r'``', '`', first)} |")
    return "\n".join(["| file | what it is |", "|---|---|", *rows])


@event_priority(100)  # before mkdocstrings reads its own
def on_config(config: Any) -> Any:
    """Give mkdocstrings the package under its own name."""
    package = Path(laid_out.name) / "fusedhead"
    if not package.exists():
        for name, folder in PACKAGE.items():
            (package / name).mkdir()
            for entry in (ROOT / folder).iterdir():
                (package / name / entry.name).symlink_to(entry)
            (package / name / "__init__.py").touch()  # which two of the folders lack, and griffe asks for
    handlers = config.plugins["mkdocstrings"].config.handlers
    handlers.setdefault("python", {})["paths"] = [laid_out.name]
    config.watch.extend(str(ROOT / name) for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made of files outside of docs/: those of the navigation, and what is linked to."""
    waiting = {"README.md", *re.findall(rf"{APART}/(\S+\.md)", str(config.nav))}
    for file in files.documentation_pages():
        waiting |= targets(source_of(file.src_uri), file.content_string)
    done: set[str] = set()
    while waiting:
        source = waiting.pop()
        done.add(source)
        page = page_of(source)
        if page is None or source.startswith(f"{DOCS}/") or not (ROOT / source).is_file():
            continue
        text = (ROOT / source).read_text(encoding="utf-8")
        in_nav = page == "index.md" or page in str(config.nav)
        level = InclusionLevel.INCLUDED if in_nav else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, page, content=text, inclusion=level))
        waiting |= targets(source, text) - done
    return files


def passes() -> str:
    """The lists of passes, out of the pipeline's source."""
    source = (ROOT / "fusion_pass" / "pipeline.py").read_text(encoding="utf-8")
    rows = []
    for name, why, body in re.findall(r"^([A-Z_]+) = \((?:  # ([^\n]*))?\n(.*?)^\)", source, re.MULTILINE | re.DOTALL):
        named = ", ".join(f"`{each}`" for each in re.findall(r'Pass\("([^"]+)"', body))
        rows.append(f"| `{name}` | {why} | {named} |")
    return "\n".join(["| list | | passes |", "|---|---|---|", *rows])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    filled_in = DIRECTIVE.sub(filled, linked(markdown, page.file.src_uri))
    return filled_in.replace("<!-- passes -->", passes())
