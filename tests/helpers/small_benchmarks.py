"""Parts that the tests of the benchmarks share: a small layer, a run without waiting, and a provider that is wrong."""

import dataclasses

import torch
import torch.nn.functional as F

from benchmarks.layer import genft as genft_providers
from benchmarks.layer import harness
from benchmarks.layer.cases import Case, Layer
from benchmarks.layer.providers import PROVIDERS, Provider

CPU = torch.device("cpu")
SMALL = Layer("small", 96, 64, 4)


def case(form="factored", dtype="float32", tokens=33, k=8, layer=SMALL):
    return Case(layer, tokens, dtype, k, form)


def select(names):
    return [PROVIDERS[name] for name in names]


def measure(providers, *cases):
    return list(harness.run(providers, cases or [case()], CPU, seconds=0.01))


def of(rows, name, field="provider"):
    """The one row of a provider, or method."""
    (row,) = [row for row in rows if row[field] == name]
    return row


def wrong(what):
    """The frozen layer, with one thing wrong."""

    def build(problem):
        workload = genft_providers.frozen(problem)
        weight = problem.weight

        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return F.linear(x, weight) * (1.01 if what == "y" else 1)

            @staticmethod
            def backward(ctx, dy):
                dx = dy @ weight
                if what == "nan":
                    dx[0, 0] = float("nan")
                return dx * (1.01 if what == "dx" else 1)

        return dataclasses.replace(workload, function=lambda: Wrong.apply(problem.x))

    return Provider("wrong", f"wrong {what}", build)
