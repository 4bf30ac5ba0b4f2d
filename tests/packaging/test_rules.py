"""Rules that can be counted: lines of files, parameters of functions, who allocates memory, which way imports go."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "genft_kernels"
LONGEST, WIDEST, MOST_PARAMETERS, MOST_RESULTS = 366, 120, 8, 3000
# Imports within functions that would close a cycle as a module loads; docs/architecture.md#layers says why.
LATE = {("config", "budget"), ("modules", "quantised_linear"), ("operation", "flops")}
# Functions of torch that make a tensor of no other; without a device they ask which one is the default.
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones",
    "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
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


def tensors_of_the_default_device(source: str) -> list[int]:
    """The lines of calls that make a tensor without saying where."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    made = [call for call in calls if ast.unparse(call.func) in {f"torch.{name}" for name in FACTORIES}]
    return [call.lineno for call in made if not {"device", "out"} & {keyword.arg for keyword in call.keywords}]


def test_every_tensor_is_made_on_a_device_that_is_named():
    found = {name: tensors_of_the_default_device(path.read_text()) for name, path in MODULES.items()}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert tensors_of_the_default_device("torch.zeros(3)\ntorch.ones(3, device=x.device)\nx.new_empty(3)") == [1]


def module_name(path: Path) -> str:
    """Within the package; of a package of it that of the folder, of the whole package nothing."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(name: str) -> tuple[set[str], set[str]]:
    """The modules of the package that a module of it imports, but for types: (as it loads, within functions)."""
    path = MODULES[name]
    tree, folder = ast.parse(path.read_text(encoding="utf-8")), path.parent.relative_to(PACKAGE).parts
    functions = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node)]
    left_out = {id(inner) for node in for_types for inner in ast.walk(node)}
    at_once, late = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in left_out:
            base = ".".join([*folder[: len(folder) + 1 - node.level], *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{base}.{alias.name}".strip(".")
                (late if id(node) in functions else at_once).add(whole if whole in MODULES else base)
    return at_once - {name}, late - {name}


def reached(start: str, edges: dict[str, set[str]]) -> set[str]:
    """All that is found by going along edges, one at least."""
    found, new = set(), {start}
    while new:
        new = set().union(*(edges[name] for name in new)) - found
        found |= new
    return found


def test_imports_close_no_cycle_and_those_that_would_are_late():
    at_once, late = ({name: imports_of(name)[which] for name in MODULES} for which in (0, 1))
    assert [name for name in MODULES if name in reached(name, at_once)] == []
    wanted = {(name, other) for name in MODULES for other in late[name]}
    assert {(name, other) for name, other in wanted if name in reached(other, at_once)} == LATE


def layers() -> dict[str, int]:
    """The modules and folders of the package that docs/architecture.md draws one above the other, by their line."""
    lines = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("```")[2].partition("```")[0]
    found = {}
    for number, line in enumerate(lines.splitlines()):
        found |= dict.fromkeys(re.findall(r"(?:^ |  )([a-z_]+)(?=/|:|  |$)", line), number)
    return {name: n for name, n in found.items() if name in MODULES}


def test_imports_go_one_way():
    levels = layers()
    assert set(levels) == {name for name in MODULES if "." not in name} - {"", "__main__"}
    upward = []
    for name in MODULES:
        level = levels.get(name.partition(".")[0], -1)
        above = {other for other in set.union(*imports_of(name)) if levels.get(other.partition(".")[0], level) < level}
        upward += [f"{name} imports {other}" for other in sorted(above) if (name, other) not in LATE]
    assert upward == []


def test_results_in_git_are_few():
    listed = subprocess.run(["git", "ls-files", "benchmarks"], cwd=ROOT, capture_output=True, text=True)
    tracked = [ROOT / name for name in listed.stdout.split() if name.endswith(".jsonl") or "/results/" in name]
    assert sum(map(lines_of, tracked)) <= MOST_RESULTS


def test_a_wide_function_is_found():
    wide = "({})".format(", ".join("abcdefghi"))
    assert too_wide(f"def f{wide}: pass") == ["f"]
    assert too_wide(f"def linear_backward{wide}: pass\n@triton.jit\ndef kernel{wide}: pass\ndef g(*, a): pass") == []
