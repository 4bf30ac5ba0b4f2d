"""The CPU host notices what a GPU would not tell: tests/cuda_host/faulty.cu has one fault of each kind."""

import ctypes

import pytest
import torch

from tests import cuda_host

pytestmark = pytest.mark.skipif(cuda_host.unavailable_reason() is not None, reason=str(cuda_host.unavailable_reason()))

# In the order of the enumeration in faulty.cu.
FAULTS = {
    "none": None,
    "read outside": "read outside all buffers",
    "write outside": "write outside all buffers",
    "copy outside": "copy outside all buffers",
    "copy unaligned": "copy not aligned",
    "copy not waited for": "a copy was never waited for",
    "read before the wait": "NaN",
    "read before the barrier": "NaN",
    "uneven barrier": "deadlock: not all threads come to a barrier or a collective",
    "uneven collective": "deadlock: not all threads come to a barrier or a collective",
    "other collective": "threads of a warp at load_matrices and at load_matrices, transposed",
    "outside shared memory": "written outside shared memory",
}


@pytest.fixture(scope="module")
def library():
    library = ctypes.CDLL(str(cuda_host.build(cuda_host.HERE / "faulty.cu")))
    library.reason.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("number, name", enumerate(FAULTS), ids=list(FAULTS))
def test_host_notices_each_fault(number, name, library):
    memory = torch.empty(2, 72)  # two buffers and room around them
    given, out = memory[0, :64].copy_(torch.arange(64)), memory[1, :64].fill_(-1)
    library.cuda_host_forget_buffers()
    for buffer in (given, out):
        library.cuda_host_register_buffer(ctypes.c_void_p(buffer.data_ptr()), ctypes.c_size_t(64 * 4))
    code = library.run_with_fault(number, ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    reason = library.reason(code).decode()
    match FAULTS[name]:
        case None:
            assert code == 0 and torch.equal(out, given)
        case "NaN":
            assert code == 0 and out.isnan().any()
        case expected:
            assert code != 0 and expected in reason
            assert "outside shared" in reason or "deadlock" in reason or "(thread " in reason
