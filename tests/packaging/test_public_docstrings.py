"""Docstrings of public names: there is one, it says what is raised, and names every tensor that goes in.

All docstrings begin with the noun or verb of what they are about.
"""

import ast
import inspect
import textwrap
from pathlib import Path

import pytest

import genft_kernels
from genft_kernels import functional, reference
from genft_kernels.integrations import transformers as trainers

ROOT = Path(__file__).parents[2]
SOURCES = [path for name in ("genft_kernels", "benchmarks", "tests") for path in sorted((ROOT / name).rglob("*.py"))]

# Where a docstring leaves it to another one's.
ELSEWHERE = ("errors as there", "raises as there", "errors as the class says", "errors of `")


def is_method(name, value):
    return not name.startswith("_") and inspect.isroutine(getattr(value, "__func__", value))


def public_functions():
    """By name: functions, and classes with their public methods."""
    names = {name: getattr(genft_kernels, name) for name in genft_kernels.__all__}
    names |= {f"functional.{name}": getattr(functional, name) for name in functional.__all__}
    names |= {f"reference.{name}": getattr(reference, name) for name in ("delta_weight", *functional.__all__)}
    names |= {name: getattr(trainers, name) for name in ("AccumulateCallback", "AdapterCheckpoints")}
    found = {}
    for name, value in names.items():
        if inspect.isclass(value):
            found |= {f"{name}.{key}": getattr(value, key) for key, each in vars(value).items() if is_method(key, each)}
        if callable(value):
            found[name] = inspect.unwrap(value)
    del found["GenFTLinear.extra_repr"], found["GenFTGenerator.extra_repr"]
    return found


FUNCTIONS = public_functions()


def lacks(function) -> list[str]:
    """All that the docstring of a function or a class should say and does not."""
    body, text = function, vars(function).get("__doc__") if inspect.isclass(function) else function.__doc__
    if inspect.isclass(function):
        body = next((vars(function)[name] for name in ("__post_init__", "__init__") if name in vars(function)), None)
    if not text:
        return ["a docstring"]
    tree = ast.parse(textwrap.dedent(inspect.getsource(body))) if body is not None else ast.Module()
    calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    raises = any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))
    raises |= any(called.startswith(("check_", "_check_")) for called in calls)
    wrong = [] if not raises or "Raises" in text or any(words in text for words in ELSEWHERE) else ["what it raises"]
    tensors = [name for name, kind in getattr(body, "__annotations__", {}).items() if str(kind).startswith(_TENSOR)]
    return wrong + [name for name in tensors if name != "return" and name not in text]


_TENSOR = ("torch.Tensor", "Tensor", "list[Tensor]")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_is_whole(name):
    assert lacks(FUNCTIONS[name]) == []


def test_gap_in_a_docstring_is_found():
    def silent(x: "torch.Tensor"):  # noqa: F821
        pass

    def raising(x: "torch.Tensor"):  # noqa: F821
        """Raise."""
        raise ValueError

    assert lacks(silent) == ["a docstring"] and lacks(raising) == ["what it raises", "x"]


def vague_docstrings(source: str) -> list[str]:
    """The docstrings of a module that begin with a pronoun."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    texts = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return [text for text in texts if text.startswith(("What ", "Those "))]


def test_docstrings_begin_with_their_subject():
    assert {str(path): vague for path in SOURCES if (vague := vague_docstrings(path.read_text()))} == {}
    source = '"""What it is."""\ndef f():\n    """Those of f."""\n    """What not."""'
    assert vague_docstrings(source) == ["What it is.", "Those of f."]
