"""Names of modules and what they are named by: one regular expression for whole paths, or a list of dotted ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator

from torch import nn

from .arguments import shown

# The longest that a regular expression out of a file may take over a model's names; some never end.
REGULAR_EXPRESSION_SECONDS = 10.0

_CHILD = (
    "import json, re, sys; pattern, names = json.load(sys.stdin); pattern = re.compile(pattern); "
    "json.dump([name for name in names if pattern.fullmatch(name)], sys.stdout)"
)

FullMatch = Callable[[str, Collection[str]], set[str]]


def full_matches(pattern: str, names: Collection[str]) -> set[str]:
    """The names that the regular expression matches as a whole."""
    compiled = re.compile(pattern)
    return {name for name in names if compiled.fullmatch(name)}


def full_matches_in_time(pattern: str, names: Collection[str]) -> set[str]:
    """The same for a pattern that nobody vouches for: in a process of its own, which can be stopped.

    Raises:
        ValueError: it takes longer than `REGULAR_EXPRESSION_SECONDS`.
    """
    if not sys.executable:
        raise ValueError(f"the regular expression {shown(pattern)} cannot be tried safely in an embedded Python")
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([pattern, list(names)]),
            capture_output=True,
            text=True,
            timeout=REGULAR_EXPRESSION_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"the regular expression {shown(pattern)} takes longer than {REGULAR_EXPRESSION_SECONDS:g} s"
        ) from None
    except subprocess.CalledProcessError as error:
        why = error.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"the regular expression {shown(pattern)} is none: {why[:200]}") from None
    return set(json.loads(child.stdout))


class Names:
    """The paths of a model's modules, found by their dotted ends without going through all of them."""

    def __init__(self, names: Iterable[str], full_matches: FullMatch = full_matches) -> None:
        self._names = list(names)
        self._full_matches = full_matches
        self._by_end: dict[str, list[str]] = {}
        for name in self._names:
            for end in ends(name):
                self._by_end.setdefault(end, []).append(name)

    def matching(self, wanted: str | Iterable[str] | None) -> set[str]:
        """The names that a regular expression matches as a whole, or that end in one of a list's entries, at a dot."""
        if wanted is None:
            return set()
        if isinstance(wanted, str):
            return self._full_matches(wanted, self._names)
        return {name for entry in wanted for name in self.ending_in(entry)}

    def ending_in(self, entry: str) -> list[str]:
        """The names whose dotted end is `entry`, in the model's order."""
        return self._by_end.get(entry, [])

    def unmatched(self, wanted: str | Iterable[str] | None) -> list[str]:
        """The entries of a list that name nothing, or the regular expression that matches nothing."""
        if isinstance(wanted, str):
            return [] if self.matching(wanted) else [wanted]
        return [entry for entry in wanted or () if not self.ending_in(entry)]

    def hint(self, wanted: str | Iterable[str] | None) -> str:
        """A remark on a string that matches nothing, and would as a name in a list; empty for all else."""
        named = self.ending_in(wanted) if isinstance(wanted, str) else []
        if named and wanted not in named:
            return f" (a string is a regular expression for whole paths: for a name write [{wanted!r}])"
        return ""


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Have `model` hold a module at a path; not by setattr, so that the name keeps its place among its siblings."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def held_at(modules: Iterable[tuple[str, nn.Module]]) -> dict[nn.Module, list[str]]:
    """All paths of each of some modules."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in modules:
        paths.setdefault(module, []).append(path)
    return paths


def ends(path: str) -> Iterator[str]:
    """A path, and what is left of it without its first name, its first two, and so on."""
    while path:
        yield path
        path = path.partition(".")[2]


def upwards(path: str) -> Iterator[str]:
    """A path, and those of the modules that it is in."""
    while path:
        yield path
        path = path.rpartition(".")[0]
