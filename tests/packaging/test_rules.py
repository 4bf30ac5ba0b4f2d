"""Rules that can be counted: lines of files, parameters of functions, who allocates memory, which way imports go."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "genft_kernels"
LONGEST, WIDEST, MOST_PARAMETERS, MOST_RESULTS = 366, 120, 8, 3000
# What has the schema of an operation, which is as wide as the operation is; its backward, formulas and public form.
SCHEMAS = {"column", "row", "linear", "expert_linear", "factored_linear"}
SOURCES = [
    path
    for folder in ("genft_kernels", "csrc", "benchmarks", "tests", "examples", "docs")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h")
]


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def parameters_of(function: ast.FunctionDef) -> int:
    """Without `self` and its like."""
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    stars = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    return len([name for name in names if name not in ("self", "cls", "ctx")]) + len(stars)


def is_kernel_or_schema(function: ast.FunctionDef) -> bool:
    decorators = [ast.unparse(each) for each in function.decorator_list]
    if any(each.startswith("triton.jit") or each.endswith(".register_fake") for each in decorators):
        return True
    return function.name.strip("_").removesuffix("_backward") in SCHEMAS


def too_wide(source: str) -> list[str]:
    """Functions with more parameters than are allowed."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if parameters_of(f) > MOST_PARAMETERS and not is_kernel_or_schema(f)]


def test_files_are_short():
    assert len(SOURCES) > 300
    assert {str(path.relative_to(ROOT)): n for path in SOURCES if (n := lines_of(path)) > LONGEST} == {}


def test_lines_are_short():
    wide = {
        f"{path.relative_to(ROOT)}:{number}": len(line)
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > WIDEST
    }
    assert wide == {}


def test_functions_have_few_parameters():
    folders = "genft_kernels", "benchmarks"
    paths = [path for path in SOURCES if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders]
    assert {str(path.relative_to(ROOT)): wide for path in paths if (wide := too_wide(path.read_text()))} == {}


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernel_files_allocate_nothing(backend):
    paths = sorted((PACKAGE / "backends" / backend).glob("*.py"))
    allocation = re.compile(r"\b(empty|zeros|ones|full)(_like)?\(|\.new_\w+\(")
    in_torch = {path.name for path in paths if re.search(r"torch\." + allocation.pattern, path.read_text())}
    assert len(paths) > 5 and in_torch == set()
    assert allocation.search((PACKAGE / "backends" / "plan.py").read_text())  # it does


def layers() -> dict[str, int]:
    """The modules and folders of the package that docs/architecture.md draws one above the other, by their line."""
    lines = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("```")[2].partition("```")[0]
    found = {}
    for number, line in enumerate(lines.splitlines()):
        found |= dict.fromkeys(re.findall(r"(?:^ |  )([a-z_]+)(?:/|:|  )", line), number)
    return {name: n for name, n in found.items() if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}


def imported(path: Path) -> set[str]:
    """The modules and folders of the package that a module of it imports, wherever it does, but for types."""
    tree, names = ast.parse(path.read_text(encoding="utf-8")), set()
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node)]
    left_out = {id(inner) for node in for_types for inner in ast.walk(node)}
    folder = path.parent.relative_to(PACKAGE).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in left_out:
            base = folder[: len(folder) + 1 - node.level]
            for alias in node.names:
                names.add((*base, *(node.module or alias.name).split("."))[0])
    return names


def test_imports_go_one_way():
    levels = layers()
    assert {"integrations", "targets", "modules", "units", "generator", "sharing", "ops", "backends"} <= set(levels)
    upward = []
    for name, level in levels.items():
        paths = (PACKAGE / name).rglob("*.py") if (PACKAGE / name).is_dir() else [PACKAGE / f"{name}.py"]
        for path in paths:
            above = {each for each in imported(path) if levels.get(each, level) < level}
            upward += [f"{path.relative_to(PACKAGE)} imports {each}" for each in sorted(above)]
    assert upward == []


def test_results_in_git_are_few():
    listed = subprocess.run(["git", "ls-files", "benchmarks"], cwd=ROOT, capture_output=True, text=True)
    tracked = [ROOT / name for name in listed.stdout.split() if name.endswith(".jsonl") or "/results/" in name]
    assert sum(map(lines_of, tracked)) <= MOST_RESULTS


def test_a_wide_function_is_found():
    wide = "({})".format(", ".join("abcdefghi"))
    assert too_wide(f"def f{wide}: pass") == ["f"]
    assert too_wide(f"def linear_backward{wide}: pass\n@triton.jit\ndef kernel{wide}: pass\ndef g(*, a): pass") == []
