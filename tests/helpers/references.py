"""Citations in comments, docstrings and documents of a source tree, and which of them lead nowhere."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("genft_kernels", "benchmarks", "tests", "csrc", "examples", "docs", ".ci", ".github")
# Files of these kinds are also cited by their bare names.
_SOURCE = "py|md|cu|cuh|cpp"
_PATH = re.compile(
    rf"(?<![\w./:<>-])((?:\.\./|\./)*(?:[\w.*-]+/)+[\w.*-]+\.(?:{_SOURCE}|h|json|jsonl|png|svg|txt|toml|yml))"
    r"(?![\w/(])(#[\w-]+)?"
)
_BARE = re.compile(rf"(?<![\w./:<>*-])(\w[\w-]*\.(?:{_SOURCE}))(?![\w/(.])(#[\w-]+)?")
_FOLDER = re.compile(rf"(?<![\w./:<>-])((?:{'|'.join(map(re.escape, FOLDERS))})/(?:[\w.-]+/)*)(?![\w*])")
_MODULE = re.compile(r"python -m ((?:genft_kernels|benchmarks|tests)(?:\.\w+)*)")
_TARGET = re.compile(r"(?:`|^)make ([a-z][a-z-]*)", re.MULTILINE)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_URL = re.compile(r"\w+://[^\s)>\"']+")
# Documents outside the tree, which no one who reads it has.
_OUTSIDE = re.compile(r"design section \d|\(design\b|(?:\.\./)?shared/[\w-]+\.md")


def wrong_references(root: Path) -> list[str]:
    """ "file:line: reference" for each that leads nowhere.

    Looked at are paths with a known ending, folders, `#anchor`s of Markdown files, links in Markdown, modules that
    `python -m` runs, and targets of the Makefile.
    """
    wrong = []
    for path in _files(root):
        for line, text in _prose(path):
            text = _URL.sub("", text)
            wrong += [f"{path.relative_to(root)}:{line}: {cited}" for cited in _wrong_in(text, path, root)]
    return wrong


def anchors_of(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a Markdown file."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def _files(root: Path) -> Iterator[Path]:
    yield from (
        path for path in sorted(root.glob("*")) if path.suffix == ".md" or path.name in ("Makefile", "setup.py")
    )
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def _prose(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of what a file says in words."""
    if path.suffix == ".md":
        yield from enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    elif path.suffix == ".py":
        source = path.read_text(encoding="utf-8")
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                docstring = ast.get_docstring(node, clean=False)
                if docstring is not None:
                    yield from enumerate(docstring.splitlines(), node.body[0].lineno)
    elif path.suffix in (".cu", ".cuh", ".cpp", ".h"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            _, comment, text = line.partition("//")
            if comment and not line.startswith("#include"):
                yield number, text
    elif path.name in ("Makefile", "run") or path.suffix == ".yml":
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.lstrip().startswith("#"):
                yield number, line


def _wrong_in(text: str, path: Path, root: Path) -> Iterator[str]:
    yield from _OUTSIDE.findall(text)
    if path.suffix == ".md":
        for link in _LINK.findall(text):
            target, _, anchor = link.partition("#")
            found = path.parent / target if target else path
            if not found.exists() or (anchor and anchor not in anchors_of(found)):
                yield link
        text = _LINK.sub("]", text)
    for cited, anchor in (*_PATH.findall(text), *_BARE.findall(text)):
        found = _resolve(cited, path, root)
        if found is None or (anchor and anchor[1:] not in anchors_of(found)):
            yield cited + anchor
    for folder in _FOLDER.findall(text):
        if not (root / folder).is_dir():
            yield folder
    for module in _MODULE.findall(text):
        place = root.joinpath(*module.split("."))
        if not (place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()):
            yield f"python -m {module}"
    for target in _TARGET.findall(text):
        if not re.search(rf"^{target}:", (root / "Makefile").read_text(), re.MULTILINE):
            yield f"make {target}"


def _resolve(cited: str, path: Path, root: Path) -> Path | None:
    """The cited file, by its path from the root or from where it is cited, a bare name wherever it is in the tree."""
    for start in (root, path.parent, root / "genft_kernels"):
        found = next(iter(start.glob(cited)), None) if "*" in cited else start / cited
        if found is not None and found.is_file():
            return found
    if "/" not in cited:
        return next((found for folder in FOLDERS for found in (root / folder).rglob(cited)), None)
    return None
