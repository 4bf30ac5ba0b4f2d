"""`pytest benchmarks --benchmark-only`: the registry under pytest-benchmark, to compare with a run saved before.

pytest benchmarks --benchmark-only --benchmark-save=before
pytest benchmarks --benchmark-only --benchmark-compare
"""

import pytest
import torch

from benchmarks.layer import harness
from benchmarks.layer.cases import DIRECTIONS, suite_cases
from benchmarks.layer.providers import PROVIDERS
from benchmarks.measure.gate import WrongResult
from benchmarks.measure.timing import waiting_for

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def workloads():
    """Gated workloads of the case asked for last, or the error in their place."""
    kept = {}

    def get(provider, case):
        if (provider.name, case) not in kept:
            kept.clear()
            torch.compiler.reset()
            try:
                kept[provider.name, case] = harness.gated_workload(provider, case, DEVICE)
            except WrongResult as error:
                kept[provider.name, case] = error
        return kept[provider.name, case]

    return get


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=PROVIDERS)
@pytest.mark.parametrize("case", suite_cases(), ids=str)
def test_layer(benchmark, workloads, case, provider, direction):
    reason = provider.obstacle(case, DEVICE)
    if reason is not None:
        pytest.skip(f"unavailable: {reason}")
    workload = workloads(provider, case)
    if isinstance(workload, WrongResult):
        pytest.fail(f"not timed, because wrong: {workload}")
    benchmark.extra_info.update(case.key, projections=workload.projections)
    benchmark.group = f"{case} {direction}"

    # A backward alone has its forward run in the setup, outside the clock.
    setup = lambda: ((workload.call(direction),), {})  # noqa: E731
    benchmark.pedantic(_until_done, setup=setup, rounds=10, warmup_rounds=1)


def _until_done(work):
    results = work()
    waiting_for(DEVICE)()
    return results
