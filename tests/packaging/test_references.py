"""Citations in comments, docstrings and documents lead to something in the tree."""

import re
from pathlib import Path

import pytest

from tests.helpers.references import anchors_of, wrong_references

ROOT = Path(__file__).parents[2]

GOOD = {
    "Makefile": "# docs/method.md#the-method\ntest: env\n",
    "README.md": "[method](docs/method.md#two-products-and-more), `make test`, [web](https://x.org/b.py), csrc/a.cu\n",
    "docs/method.md": "# The method\n\n## Two products, and `more`\n\n[there](#the-method) [back](../README.md)\n",
    "csrc/a.cu": "// docs/method.md#the-method, csrc/*.cu\n#include <no/such.h>\n",
    "genft_kernels/a.py": '"""`python -m genft_kernels.a`, tests/helpers/, a.cu"""\nx = "no/such.py"  # csrc/a.cu\n',
    "tests/helpers/b.py": '"""genft_kernels/a.py"""\n',
}


def tree(root: Path, **changed: str) -> Path:
    for name, content in {**GOOD, **changed}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_references_of_this_tree_all_lead_somewhere():
    wrong = wrong_references(ROOT)
    assert not wrong, "\n".join(wrong)


def test_architecture_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    paths = [path for path in (ROOT / "genft_kernels").iterdir() if re.fullmatch(r"_?[a-z]\w*(\.py)?", path.name)]
    names = {path.name if path.is_file() else f"{path.name}/" for path in paths} - {"_version.py", "prebuilt/"}
    missing = sorted(name for name in names if f"`{name}`" not in text)
    assert len(names) > 10 and not missing, f"docs/architecture.md#layers needs a word on {', '.join(missing)}"


def test_environment_variables_are_all_in_the_table():
    sources = [*(ROOT / "genft_kernels").rglob("*.py"), ROOT / "setup.py"]
    read = {name for path in sources for name in re.findall(r"\bGENFT_[A-Z_]+\b", path.read_text(encoding="utf-8"))}
    table = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    assert "GENFT_CACHE_DIR" in read and not [name for name in read if f"| `{name}` |" not in table]


def test_references_that_lead_somewhere_and_words_that_only_look_so_are_left_alone(tmp_path):
    assert wrong_references(tree(tmp_path)) == []


@pytest.mark.parametrize(
    "name, content, found",
    [
        ("genft_kernels/a.py", '"""docs/methods.md"""', "genft_kernels/a.py:1: docs/methods.md"),
        ("genft_kernels/a.py", "x = 1\n# docs/method.md#precision", "genft_kernels/a.py:2: docs/method.md#precision"),
        ("genft_kernels/a.py", "def f():\n    '''See\n\n    b.cu\n    '''", "genft_kernels/a.py:4: b.cu"),
        ("genft_kernels/a.py", "# docs/old/", "genft_kernels/a.py:1: docs/old/"),
        ("genft_kernels/a.py", "# design section 5", "genft_kernels/a.py:1: design section 5"),
        ("csrc/a.cu", "// (design: random numbers)", "csrc/a.cu:1: (design"),
        ("genft_kernels/a.py", "# python -m tests.c", "genft_kernels/a.py:1: python -m tests.c"),
        ("csrc/a.cu", "int x;  // docs/method.md#no-such", "csrc/a.cu:1: docs/method.md#no-such"),
        ("README.md", "\n[method](docs/method.md#method)", "README.md:2: docs/method.md#method"),
        ("README.md", "![plot](docs/plot.png)", "README.md:1: docs/plot.png"),
        ("README.md", "`make tests`", "README.md:1: make tests"),
        ("docs/method.md", "# The method\n## Two products and more\n[it](#it)", "docs/method.md:3: #it"),
    ],
)
def test_references_that_lead_nowhere_are_named(name, content, found, tmp_path):
    assert found in wrong_references(tree(tmp_path, **{name: content}))


def test_anchors_are_those_of_headings_outside_code(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("# One, two\n```\n# no heading\n```\n### `three_four`-5\n")
    assert anchors_of(path) == {"one-two", "three_four-5"}
