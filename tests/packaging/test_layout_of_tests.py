"""The layout of the tests: what several share is in tests/helpers, so that each test module stands alone."""

import ast
import pathlib
import re

TESTS = pathlib.Path(__file__).parents[1]


def test_modules_import_no_other_test_module():
    imported = []
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported += [(path.name, f"{node.module}.{alias.name}") for alias in node.names]
            elif isinstance(node, ast.Import):
                imported += [(path.name, alias.name) for alias in node.names]
    assert imported and not [each for each in imported if re.search(r"(^|\.)test_", each[1])]
