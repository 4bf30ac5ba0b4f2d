"""The clock that tune measures by."""

import contextlib
import time
import types

import torch

from genft_kernels import GenFTConfig, GenFTLinear, backends, tune, tuning


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


def test_tune_begins_its_time_when_gates_and_compilers_are_done(monkeypatch, tmp_path):
    now, done = [0.0], set()

    def takes_long_at_first(function, what):
        def call(*args):
            now[0] += 0.0 if what in done else 100.0
            done.add(what)
            return function(*args)

        return call

    clock = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(tuning, "time", clock)
    monkeypatch.setattr(tuning, "SECONDS_A_SHAPE", 0.0)
    monkeypatch.setattr(backends, "may_choose", takes_long_at_first(backends.may_choose, "gate"))
    monkeypatch.setattr(tuning, "updated_linear", takes_long_at_first(tuning.updated_linear, "compiler"))
    monkeypatch.setenv("GENFT_CACHE_DIR", str(tmp_path))
    layer = GenFTLinear(12, 20, config=GenFTConfig(shared_dim=3))
    assert len(tune(layer, 8, seconds=60)) == len(tune(layer, 8)) > 2
    assert done == {"gate", "compiler"}
