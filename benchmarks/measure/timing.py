"""Clocks. On a CPU providers take turns, and ratios are taken within a turn; on a GPU each is timed with a cold L2.

Every time is in seconds.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.measure.workload import Workload

# Directions (or whatever a clock tells apart) to seconds, from one turn.
Sample = dict[str, float]
# A call shorter than this is repeated until it takes as long: a clock read and a context switch must not matter.
SHORTEST_SAMPLE = 5e-3
# Calls in a turn, of which the fastest counts: what another process took in between is not the provider's time.
TRIES = 2
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
# Tokens up to which a GPU is timed by replay of a CUDA graph: below, a launch costs the host more than the card.
REPLAYED_TOKENS = 1024


def take_turns(clocks: Mapping[str, Callable[[], Sample]], seconds: float, least: int = 7) -> dict[str, list[Sample]]:
    """Samples of every clock, in turns A B C, B C A, C A B, ..., so that a slow spell of the machine hits all.

    As many turns as fit in about `seconds`, at least `least`; the i-th samples of all clocks are of one turn.
    """
    keep_freed_memory()
    names = list(clocks)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    start, turn = time.perf_counter(), 0
    gc.collect()
    gc.disable()
    try:
        while turn < least or time.perf_counter() - start < seconds:
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(clocks[name]())
            turn += 1
    finally:
        gc.enable()
    return samples


def cpu_clock(workload: Workload) -> Callable[[], Sample]:
    """Times forward, backward and both in one go, repeated where a call is short; of `TRIES` the fastest."""

    def once(repeats: int) -> Sample:
        forward = backward = 0.0
        for _ in range(repeats):
            start = time.perf_counter()
            outputs = workload.forward()
            middle = time.perf_counter()
            grads = workload.backward(outputs)
            end = time.perf_counter()
            forward, backward = forward + middle - start, backward + end - middle
            del outputs, grads
        per_layer = repeats * workload.projections
        return {
            "forward": forward / per_layer, "backward": backward / per_layer, "both": (forward + backward) / per_layer,
        }  # fmt: skip

    once(1)  # warm
    duration = once(1)["both"] * workload.projections
    repeats = max(1, round(SHORTEST_SAMPLE / duration))

    def fastest() -> Sample:
        tries = [once(repeats) for _ in range(TRIES)]
        return {direction: min(each[direction] for each in tries) for direction in tries[0]}

    return fastest


def waiting_for(device: torch.device) -> Callable[[], object]:
    """A call that ends when all that was asked of the device is done."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """(p20, p50, p80)."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def ratios(samples: list[Sample], base: list[Sample], direction: str) -> list[float]:
    """Turn by turn, how many times as long as `base`."""
    return [mine[direction] / other[direction] for mine, other in zip(samples, base, strict=True)]


def gpu_quantiles(workload: Workload, direction: str, replay: bool) -> tuple[float, float, float]:
    """(p20, p50, p80) of one direction, for one of the workload's layers; see `gpu_times`."""
    return tuple(each / workload.projections for each in gpu_times(lambda: workload.call(direction), replay))


def gpu_times(prepare: Callable[[], Callable[[], object]], replay: bool) -> tuple[float, float, float]:
    """(p20, p50, p80) of the call that `prepare` makes, by CUDA events, L2 flushed before each (`do_bench`).

    With `replay` the call is captured in a CUDA graph first, and its replay is timed.
    """
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a graph's backward runs where its forward did, so both on the captured stream
        call = prepare()
        for _ in range(3):  # compiles, tunes, fills the allocator: none of it may happen in a capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    timed = call
    if replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        timed = graph.replay  # beside `call`, which keeps alive what the graph reads: of a backward, what was saved
    with torch.cuda.stream(torch.cuda.current_stream() if replay else stream):
        low, middle, high = do_bench(timed, quantiles=[0.2, 0.5, 0.8])
    return tuple(1e-3 * each for each in (low, middle, high))


def keep_freed_memory() -> None:
    """Have the C library keep large freed blocks, as any allocator for training does.

    By default it gives some back to the system, depending on what lies where, and page faults then make the same call
    some 10 % slower in one process than in the next.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
