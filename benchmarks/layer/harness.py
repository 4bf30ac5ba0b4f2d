"""Runs providers on cases: the gate first, then the clocks, then memory and launches. Yields rows as they are done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.layer.cases import DIRECTIONS, Case
from benchmarks.layer.problem import Problem
from benchmarks.layer.providers import BASELINES, Provider
from benchmarks.measure import memory, timing
from benchmarks.measure.environment import environment
from benchmarks.measure.gate import SMALL_RATIO, Expected, WrongResult, delta_gain
from benchmarks.measure.rows import ResultStore, Row
from benchmarks.measure.workload import Workload

# What a row of the suite "layer" is told apart by.
KEY = ("layer", "in", "out", "tokens", "dtype", "k", "form", "provider", "direction")


@dataclasses.dataclass
class _Passed:
    """A workload that passed its gate, and what the gate measured."""

    provider: Provider
    workload: Workload
    gain: tuple[float, float] | None  # of y and dx
    kept_bytes: int


def run(
    providers: Sequence[Provider],
    cases: Sequence[Case],
    device: torch.device,
    *,
    directions: Sequence[str] = DIRECTIONS,
    seconds: float = 12.0,
) -> Iterator[Row]:
    """Measure every provider on every case.

    Args:
        seconds: about how long the clocks of a case run on a CPU; a GPU's repetitions are `do_bench`'s.

    Yields:
        Rows keyed by `KEY`, with a `status`: "measured", one for each case, provider and direction; or, one for all
        directions (`direction` is None) and with a `reason`, "unavailable" (it cannot run here), "wrong" (the gate is
        red: it is not timed) or "failed" (it raised).
    """
    fields = environment(device)
    for case in cases:
        for row in _run_case(providers, case, device, directions, seconds):
            yield row | fields


def record(store: ResultStore, row: Row) -> None:
    """Put a row of `run` into a store; what the same provider had there and no longer holds goes."""
    outdated = DIRECTIONS if row["direction"] is None else (None,)
    store.discard(row | {"direction": direction} for direction in outdated)
    store.upsert([row])


def is_done(store: ResultStore, providers: Sequence[Provider], case: Case, sources: str) -> bool:
    """Whether a store has every provider's rows of a case, of these sources: what a resumed run leaves out."""

    def up_to_date(provider: Provider, direction: str | None) -> bool:
        row = store.get(case.key | {"provider": provider.name, "direction": direction})
        return row is not None and row.get("sources") == sources

    return all(
        up_to_date(provider, None) or all(up_to_date(provider, direction) for direction in DIRECTIONS)
        for provider in providers
    )


def gated_workload(provider: Provider, case: Case, device: torch.device) -> Workload:
    """A workload that passed its gate, for other clocks than this module's; WrongResult where it did not."""
    return _gated(provider, Problem(case, device), {}).workload


def unavailable(providers: Sequence[Provider], cases: Sequence[Case], device: torch.device) -> dict[str, str]:
    """By name, the providers that can run none of the cases here, with the reason of the first."""
    found = {}
    for provider in providers:
        reasons = [provider.obstacle(case, device) for case in cases]
        if reasons and all(reasons):
            found[provider.name] = reasons[0]
    return found


def _run_case(
    providers: Sequence[Provider], case: Case, device: torch.device, directions: Sequence[str], seconds: float
) -> Iterator[Row]:
    torch.compiler.reset()  # what was compiled for other cases would only be searched through
    problem = Problem(case, device)
    expected: dict[tuple, Expected] = {}
    passed: dict[str, _Passed] = {}
    for provider in providers:
        reason = provider.obstacle(case, device)
        if reason is not None:
            yield _refusal(case, provider, "unavailable", reason)
            continue
        try:
            passed[provider.name] = _gated(provider, problem, expected)
        except WrongResult as error:
            yield _refusal(case, provider, "wrong", str(error))
        except Exception as error:
            yield _failure(case, provider, error)
    samples = None
    if device.type == "cpu" and passed:
        clocks = {name: timing.cpu_clock(each.workload) for name, each in passed.items()}
        samples = timing.take_turns(clocks, seconds)
    medians: dict[tuple[str, str], float] = {}
    for name in sorted(passed, key=lambda name: name not in BASELINES):  # baselines first: ratios need them
        try:
            for direction in directions:
                yield _measured(case, passed[name], direction, device, samples, medians)
        except Exception as error:
            yield _failure(case, passed[name].provider, error)


def _gated(provider: Provider, problem: Problem, expected: dict[tuple, Expected]) -> _Passed:
    """Build, check and look into a provider. `expected` holds what the last formula gave, for those that share it."""
    workload = provider.build(problem)
    if workload.same_as not in expected:
        expected.clear()
        expected[workload.same_as] = Expected.of(workload, problem.case.dtype)
    truth = expected[workload.same_as]
    truth.check(workload, problem.case.dtype)
    small = problem.with_ratio(SMALL_RATIO)
    gain = delta_gain(provider.build(small), truth, problem, small) if provider.updates else None
    return _Passed(provider, workload, gain, memory.workload_kept_bytes(workload))


def _measured(
    case: Case, passed: _Passed, direction: str, device: torch.device,
    samples: dict[str, list[timing.Sample]] | None, medians: dict[tuple[str, str], float],
) -> Row:  # fmt: skip
    """One row. `medians` collects a GPU's times by provider and direction, for the ratios of those after it."""
    provider, workload = passed.provider, passed.workload
    if device.type == "cpu":
        mine = samples[provider.name]
        times = timing.quantiles([sample[direction] for sample in mine])
        bases = {base: timing.ratios(mine, samples[base], direction) for base in BASELINES if base in samples}
        ratios = {base: timing.quantiles(each) for base, each in bases.items()}
    else:
        times = timing.gpu_quantiles(workload, direction, replay=case.tokens <= timing.REPLAYED_TOKENS)
        medians[provider.name, direction] = times[1]
        bases = {base: medians[base, direction] for base in BASELINES if (base, direction) in medians}
        ratios = {base: tuple(time / median for time in times) for base, median in bases.items()}
    floor, launches = ratios.get(provider.floor(case)), memory.launches(work(workload, direction), device)
    peak = memory.peak_bytes(work(workload, direction), device)
    return case.key | {
        "provider": provider.name, "direction": direction, "status": "measured", "part": provider.part,
        "rank": provider.rank(case) if provider.rank else None, "config": case.config,
        "projections": workload.projections, "samples": samples and len(samples[provider.name]),
        "time_ms": [round(1e3 * time, 5) for time in times],
        "ratios": {base: [round(each, 4) for each in three] for base, three in ratios.items()},
        "floor_fraction": floor and round(1 / floor[1], 4),
        "kept_bytes": passed.kept_bytes, "peak_bytes": peak // workload.projections,
        "launches": launches and round(launches / workload.projections, 1),
        "gain_y": passed.gain and round(passed.gain[0], 4), "gain_dx": passed.gain and round(passed.gain[1], 4),
    }  # fmt: skip


def work(workload: Workload, direction: str) -> Callable[[], object]:
    """One call of one direction; for the backward alone its forward has run already."""
    if direction == "forward":
        return workload.forward
    if direction == "both":
        return lambda: workload.backward(workload.forward())
    outputs = workload.forward()
    return lambda: workload.backward(outputs)


def _failure(case: Case, provider: Provider, error: Exception) -> Row:
    """The row of a provider that raised: that must not end the others' run, unless the device itself is lost."""
    if isinstance(error, torch.AcceleratorError):
        torch.cuda.synchronize()  # raises again where the device is lost; a capture that failed has not harmed it
    return _refusal(case, provider, "failed", f"{type(error).__name__}: {error}"[:300])


def _refusal(case: Case, provider: Provider, status: str, reason: str) -> Row:
    return case.key | {
        "provider": provider.name, "direction": None, "status": status, "part": provider.part,
        "rank": provider.rank(case) if provider.rank else None, "reason": reason,
    }  # fmt: skip
