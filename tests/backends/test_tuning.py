"""The clock that tune measures by."""

import contextlib

import torch

from genft_kernels import tuning


def test_tune_times_the_card_that_runs(monkeypatch):
    current, recorded = [0], []

    class Event:
        """Recorded as one of CUDA is: on the current card's stream."""

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            recorded.append(current[-1])

        def synchronize(self):
            assert recorded == [1, "run on 1", 1]

        def elapsed_time(self, end):
            return 2.5

    @contextlib.contextmanager
    def on(device):
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(tuning, "_run", lambda name, calls: recorded.append(f"run on {current[-1]}"))
    assert tuning._milliseconds(torch.device("cuda", 1), "eager", []) == 2.5
