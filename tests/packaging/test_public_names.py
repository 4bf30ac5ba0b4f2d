"""Public names, signatures and file formats are those of public_names.json, so that none changes unnoticed."""

import json

from tests.helpers.public_names import RENEW, SNAPSHOT, differences, snapshot


def test_public_names_and_file_formats_are_as_they_were():
    found = differences(json.loads(SNAPSHOT.read_text()), json.loads(json.dumps(snapshot())))
    assert not found, "\n".join([*found, f"if that is meant: {RENEW}, and a line in CHANGELOG.md"])


def test_differences_name_the_place():
    was = {"a": {"f": "(x)", "g": "(x)"}, "b": ["x: int", "y"]}
    now = {"a": {"f": "(x, y)", "h": "(x)"}, "b": ["x: str", "y"]}
    found = differences(was, now)
    assert found[:3] == ["/a/g is gone", "/a/h is new", "/a/f: '(x)' has become '(x, y)'"]
    assert found[3:] == ["/b/x: int is gone", "/b/x: str is new"]
    assert differences(["x", "y"], ["y", "x"], "/c") == ["/c: the order has changed"]
    assert differences(was, was) == []
