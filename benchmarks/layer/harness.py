"""Runs providers on cases: the gate first, then the clocks, then memory and launches. Yields rows as they are done."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from benchmarks.layer.cases import DIRECTIONS, Case
from benchmarks.layer.problem import Problem
from benchmarks.layer.providers import BASELINE, FLOORS, Provider
from benchmarks.measure import memory, timing
from benchmarks.measure.environment import environment
from benchmarks.measure.gate import Expected, WrongResult, refusal
from benchmarks.measure.rows import ResultStore, Row
from benchmarks.measure.workload import Workload

# What a row of the suite "layer" is told apart by.
KEY = ("layer", "in", "out", "tokens", "dtype", "k", "form", "provider")
# ||dW|| / ||W|| where delta gain is measured (docs/method.md#precision).
SMALL_RATIO = 1e-3
OURS = ("genft-", "fused-lora-")  # the beginnings of our providers' names
# (p20, p50, p80) by direction.
Times = dict[str, tuple[float, float, float]]


@dataclasses.dataclass
class _Passed:
    """A workload that passed its gate, and what the gate measured."""

    provider: Provider
    workload: Workload
    gain: tuple[float, float] | None  # of y and dx
    kept_bytes: int


def run(
    providers: Sequence[Provider], cases: Sequence[Case], device: torch.device, seconds: float = 12.0
) -> Iterator[Row]:
    """Measure every provider on every case, a CPU's clocks for about `seconds` a case: rows keyed by `KEY`.

    Their `status` is "measured"; or, with a `reason`, "unavailable" (it cannot run here), "wrong" (the gate is red: it
    is not timed) or "failed" (it raised).
    """
    fields = environment(device)
    for case in cases:
        for row in _run_case(providers, case, device, seconds):
            yield row | fields


def is_done(store: ResultStore, providers: Sequence[Provider], case: Case, sources: str) -> bool:
    """Whether a store has every provider's row of a case, of these sources: what a resumed run leaves out."""
    rows = [store.get(case.key | {"provider": provider.name}) for provider in providers]
    return all(row is not None and row.get("sources") == sources for row in rows)


def gated_workload(provider: Provider, case: Case, device: torch.device) -> Workload:
    """A workload that passed its gate, for other clocks than this module's; WrongResult where it did not."""
    return _gated(provider, Problem(case, device), {}).workload


def unavailable(providers: Sequence[Provider], cases: Sequence[Case], device: torch.device) -> dict[str, str]:
    """By name, the providers that can run none of the cases here, with the reason of the first."""
    found = {provider.name: [provider.obstacle(case, device) for case in cases] for provider in providers}
    return {name: reasons[0] for name, reasons in found.items() if reasons and all(reasons)}


def _run_case(providers: Sequence[Provider], case: Case, device: torch.device, seconds: float) -> Iterator[Row]:
    torch.compiler.reset()  # what was compiled for other cases would only be searched through
    problem = Problem(case, device)
    expected: dict[tuple, Expected] = {}
    passed: dict[str, _Passed] = {}
    for provider in providers:
        reason = provider.obstacle(case, device)
        if reason is not None:
            yield _start(case, provider) | {"status": "unavailable", "reason": reason}
            continue
        try:
            passed[provider.name] = _gated(provider, problem, expected)
        except Exception as error:
            yield _start(case, provider) | refusal(error)
    samples = None
    if device.type == "cpu" and passed:
        samples = timing.take_turns({name: timing.cpu_clock(each.workload) for name, each in passed.items()}, seconds)
    medians: dict[str, float] = {}
    bases = (BASELINE, *FLOORS)
    for name in sorted(passed, key=lambda name: name not in bases):  # those first that the others' ratios need
        try:
            if samples is not None:
                times, relative = _of_samples(samples, name)
            else:
                times, relative = _of_gpu(passed[name].workload, case, medians, name)
            yield _start(case, passed[name].provider) | _measured(passed[name], case, device, times, relative)
        except Exception as error:
            yield _start(case, passed[name].provider) | refusal(error)


def _gated(provider: Provider, problem: Problem, expected: dict[tuple, Expected]) -> _Passed:
    """Build, check and look into a provider. `expected` holds what the last formula gave, for those that share it."""
    workload = provider.build(problem)
    if workload.same_as not in expected:
        expected.clear()
        expected[workload.same_as] = Expected.of(workload, problem.case.dtype)
    truth = expected[workload.same_as]
    truth.check(workload, problem.case.dtype)
    small = problem.with_ratio(SMALL_RATIO)
    gain = _delta_gain(provider.build(small), truth, problem, small) if provider.updates else None
    if gain is not None and provider.name.startswith(OURS):
        _check_gain(gain, problem)
    return _Passed(provider, workload, gain, memory.workload_kept_bytes(workload))


def _check_gain(gain: tuple[float, float], problem: Problem) -> None:
    """WrongResult where a part of a small update is lost: no error shows that. A LoRA as it is written loses half."""
    noise = torch.finfo(problem.case.dtype).eps / 4 / SMALL_RATIO / problem.dy.numel() ** 0.5  # of one gain
    if any(not abs(each - 1) <= 0.05 + 4 * noise for each in gain):
        raise WrongResult(f"of a small update {gain[0]:.2f} is left in y and {gain[1]:.2f} in dx, where all should be")


def _delta_gain(workload: Workload, expected: Expected, problem: Problem, small: Problem) -> tuple[float, float]:
    """Of y and dx: <y - y0, d> / <d, d>, d the update's exact contribution, y0 the exact output without it.

    `workload` is built on `small`, `expected` on `problem`; they differ in sigma alone, and d is linear in sigma.
    """
    results = workload.results()
    x, weight = problem.x.detach().double(), problem.weight.double()
    if "y" not in results:  # several projections of one x: their dx is a sum
        weight = weight * len([name for name in results if name.startswith("y")])
    without = {"y": x @ problem.weight.double().T, "dx": problem.dy.double() @ weight}
    first = "y" if "y" in results else "y0"
    gains = []
    for key, name in (("y", first), ("dx", "dx")):
        update = (expected.exact[name] - without[key]) * small.ratio / problem.ratio
        gains.append((((results[name].double() - without[key]) * update).sum() / update.square().sum()).item())
    return tuple(gains)


def _of_samples(samples: dict[str, list[timing.Sample]], name: str) -> tuple[Times, Times]:
    """Times by direction, and forward and backward relative to each provider, turn by turn."""
    mine = samples[name]
    times = {direction: timing.quantiles([sample[direction] for sample in mine]) for direction in DIRECTIONS}
    return times, {base: timing.quantiles(timing.ratios(mine, other, "both")) for base, other in samples.items()}


def _of_gpu(workload: Workload, case: Case, medians: dict[str, float], name: str) -> tuple[Times, Times]:
    """The same by a GPU's clock, relative to the `medians` of those before, to which this one's is added."""
    replay = case.tokens <= timing.REPLAYED_TOKENS
    times = {direction: timing.gpu_quantiles(workload, direction, replay) for direction in DIRECTIONS}
    medians[name] = times["both"][1]
    return times, {base: tuple(time / median for time in times["both"]) for base, median in medians.items()}


def _measured(passed: _Passed, case: Case, device: torch.device, times: Times, relative: Times) -> Row:
    workload, floor = passed.workload, relative.get(passed.provider.floor(case))
    launches = memory.launches(workload.call("both"), device)
    return {
        "status": "measured",
        "time_ms": {direction: [round(1e3 * time, 5) for time in each] for direction, each in times.items()},
        "ratios": {base: [round(each, 4) for each in relative[base]] for base in (BASELINE,) if base in relative},
        "floor_fraction": floor and round(1 / floor[1], 4),
        "kept_bytes": passed.kept_bytes,
        "peak_bytes": memory.peak_bytes(workload.call("both"), device) // workload.projections,
        "launches": launches and round(launches / workload.projections, 1),
        "gain": passed.gain and [round(each, 4) for each in passed.gain],
    }


def _start(case: Case, provider: Provider) -> Row:
    rank = provider.rank(case) if provider.rank else None
    return case.key | {"provider": provider.name, "part": provider.part, "rank": rank}
