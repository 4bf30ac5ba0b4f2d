"""The layout of the tests: what several share is in tests/helpers, so that each test module stands alone."""

import ast
import pathlib

import pytest

TESTS = pathlib.Path(__file__).parents[1]
MODULES = sorted(TESTS.rglob("test_*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_module_imports_no_other_test_module(path):
    imported = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
    assert not [name for name in imported if any(part.startswith("test_") for part in name.split("."))]
