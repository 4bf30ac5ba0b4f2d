"""Every test runs with NaN in uninitialised memory, a fixed seed, and a report of GPU tests that did not run."""

import os

import pytest
import torch

from genft_kernels import scratch
from tests import cuda_host

# Beside other workers of pytest-xdist: torch.compile in this process alone, and no more threads than cores.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

# Deterministic algorithms, which the fixture below turns on, want this of cuBLAS before it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

cuda_host.install()

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.helpers import triton_interpreter

    triton_interpreter.install()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """`torch.empty` and its kin return NaN (and all-ones integers), so nothing that was not written can pass.

    Not with GENFT_POISON=0, for tools that tell by themselves what was not written.
    """
    torch.manual_seed(0)
    monkeypatch.setattr(scratch, "_slots", scratch._Slots())
    fill, deterministic = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = os.environ.get("GENFT_POISON") != "0"
    torch.use_deterministic_algorithms(True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)  # the most telling first
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))
