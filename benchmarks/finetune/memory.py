"""Peak memory of a piece of work, counted by the allocator: exact, and the same in every run."""

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_tensor_bytes(work: Callable[[], object]) -> int:
    """The most bytes of CPU tensors alive at once during ``work``, beyond what was alive before it."""
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
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


@contextmanager
def _quiet_stderr():
    """The profiler's C++ side announces its start and stop on stderr, in the middle of the progress bars."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
