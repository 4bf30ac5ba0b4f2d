"""The memory that a call keeps for its backward, the most it holds at once, and how many kernels it launches."""

import ctypes
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure.workload import Workload
from genft_kernels import scratch
from genft_kernels.sharing import node as generation


def kept_bytes(forward: Callable[[], object], there_anyway: tuple[Tensor, ...] = ()) -> int:
    """Bytes that `forward` saves for its backward, each storage once, without those of `there_anyway`.

    `there_anyway` holds inputs, parameters and frozen weights. Only what autograd saves is seen; also in the graph
    that a generation of whole models keeps to itself.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in there_anyway}
    kept: dict[int, Tensor] = {}  # holding the tensors keeps their addresses from being given out again

    def pack(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # an operation that saves its own output would otherwise keep itself alive
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            kept[address] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, mock.patch.object(generation, "_kept", pack):  # of that graph, where other hooks do not reach
        outputs = forward()
    del outputs
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def workload_kept_bytes(workload: Workload) -> int:
    """`kept_bytes` of one layer's forward, beside x, W and what trains."""
    return kept_bytes(workload.forward, (*workload.leaves.values(), *workload.frozen)) // workload.projections


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors alive at once during `work`, beyond what was alive before it.

    By the allocator's counters on CUDA, by the profiler's memory events on a CPU, where scratch memory that an
    earlier call left behind is given up first, so that it counts.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    scratch._slots.buffers.clear()
    # Accumulating, though there is one cycle only: torch 2.11 warns otherwise.
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with _quiet_stderr():
        profiler.start()
    try:
        work()
    finally:
        with _quiet_stderr():
            profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    alive = peak = 0
    for _, change in sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"):
        alive += change
        peak = max(peak, alive)
    return peak


def process_growth(work: Callable[[], object]) -> int | None:
    """The most resident memory of this process during `work`, beyond what it had before; None where Linux is not.

    What earlier calls left behind is given back to the system first.
    """
    scratch._slots.buffers.clear()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    try:
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _resident("VmRSS")
    except OSError:
        return None
    work()
    return max(_resident("VmHWM") - before, 0)


def most_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The most memory during `work` beyond what was there: of tensors on a GPU, on a CPU of the whole process."""
    return peak_bytes(work, device) if device.type == "cuda" else process_growth(work)


def _resident(field: str) -> int:
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's C++ side announces its start and stop there."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def launches(work: Callable[[], object], device: torch.device) -> int | None:
    """GPU kernels, copies and fills that `work` launches; None on a CPU, which launches nothing."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        work()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())
