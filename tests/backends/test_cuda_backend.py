"""The CUDA backend as a whole: under torch.compile and opcheck, and its errors.

The kernels are in test_cuda_kernels.py, the operations against the reference in test_backends.py.
"""

import subprocess
import sys

import pytest
import torch

from genft_kernels import philox
from genft_kernels.backends.cuda.launch import launch
from genft_kernels.backends.cuda.operations import kernels as cuda_kernels
from genft_kernels.backends.launchers import Update
from genft_kernels.functional import genft_linear
from tests import cuda_host
from tests.helpers.cases import case_of, check_every_op, make_data, relative_error, run

on_the_cpu = pytest.mark.skipif(cuda_host.unavailable_reason() is not None, reason=str(cuda_host.unavailable_reason()))


@on_the_cpu
@pytest.mark.parametrize("name", ["factored-square", "dropout-tiled-bias-out_in", "tiled-many-tokens"])
def test_ops_pass_opcheck(name):
    check_every_op(case_of(name), "cuda")


@on_the_cpu
@pytest.mark.parametrize("name", ["factored-square", "dropout-tiled-bias-out_in"])
def test_compile_has_no_graph_break(name):
    case = case_of(name)
    data, options = make_data(case, torch.float32), dict(training=True, seed=torch.tensor([3]), backend="cuda")
    expected = run(genft_linear, data, case.config, **options)
    compiled = run(torch.compile(genft_linear, fullgraph=True, backend="aot_eager"), data, case.config, **options)
    assert all(relative_error(compiled[key], expected[key]) <= 1e-6 for key in expected)


def test_wrong_dtypes_are_named():
    weight, h, b = (torch.ones(shape, dtype=torch.float64) for shape in ((5, 6), (6, 2), (5, 2)))
    update = Update(b, h, "gelu", 0.0, None, philox.ROW_STREAM)
    with pytest.raises(TypeError, match="compute in torch.bfloat16 and torch.float16 and torch.float32, not in .*64"):
        cuda_kernels.fold(weight, update, 1.0)
    with pytest.raises(TypeError, match="of one dtype, not of torch.bfloat16 and torch.float32"):
        cuda_kernels.fold(weight, update._replace(left=b.bfloat16(), right=h.float()), 1.0)


def test_wrong_shape_is_named_before_anything_runs():
    ones = torch.ones
    weight, h, b = (ones(shape) for shape in ((5, 6), (6, 2), (5, 2)))
    seed = torch.tensor([1])
    update = Update(b, h, "gelu", 0.5, seed, philox.ROW_STREAM)
    with pytest.raises(ValueError, match=r"b must be \[5, 2\], got \[6, 2\]"):
        cuda_kernels.fold(weight, update._replace(left=h), 1.0)
    with pytest.raises(ValueError, match="seed must be int64 with 1 elements, got torch.int32 with 1"):
        cuda_kernels.fold(weight, update._replace(seed=seed.int()), 1.0)
    with pytest.raises(ValueError, match=r"x must be \[3, 6\], got \[4, 6\]"):
        cuda_kernels.contract(ones(3, 5), ones(4, 6), update, 1.0, [True, True])
    with pytest.raises(ValueError, match=r"matrix 1 must be \[5, 6\], got \[6, 5\]"):
        cuda_kernels.thin_product([weight, weight.t()], ones(2, 3, 6), None, "identity")
    with pytest.raises(ValueError, match=r"dz must be \[1, 5, 3\], got \[2, 5, 3\]"):
        cuda_kernels.thin_transposed(ones(2, 5, 3), [weight])
    with pytest.raises(ValueError, match="seed must be int64 with 2 elements, got torch.int64 with 1"):
        y = Update(ones(2, 5, 3), ones(2, 6, 3), "tanh", 0.5, seed, philox.COLUMN_STREAM)
        cuda_kernels.row_forward(y, ones(2, 4, 5), None, "tanh")


def test_tensors_of_two_devices_are_named():
    weight, h, b = (torch.ones(shape) for shape in ((5, 6), (6, 2), (5, 2)))
    with pytest.raises(RuntimeError, match="on one device, not on cpu and meta"):
        cuda_kernels.fold(weight, Update(b, h.to("meta"), "gelu", 0.0, None, philox.ROW_STREAM), 1.0)


def test_features_beyond_cudas_grids_are_refused():
    many, one = torch.ones(1, 1).expand(5_000_000, 1), torch.ones(1, 1)
    with pytest.raises(ValueError, match="at most 4194240 features, got 5000000"):
        cuda_kernels.fold(many, Update(many, one, "gelu", 0.0, None, philox.ROW_STREAM), 1.0)


@on_the_cpu
def test_failed_launch_names_the_kernel():
    matrix = torch.ones(4, 4)
    unknown_dtype = 7
    with pytest.raises(RuntimeError, match="CUDA kernel 'thin_transposed' failed to launch: invalid argument .error 1"):
        launch("thin_transposed", matrix, ([matrix], 4, False, 1, 4, 4), 4, matrix, None, 64, unknown_dtype)


@pytest.mark.parametrize(
    "dtype, reason", [("float32", "it needs a CUDA device, not cpu"), ("float64", "it does not compute in torch.float")]
)
def test_backend_without_a_gpu_says_so(dtype, reason):
    """In a process without tests/cuda_host."""
    program = f"""
import torch
from genft_kernels.backends import checked_request, default_for
print(default_for(torch.device("cpu"), torch.{dtype}, True))
checked_request("cuda", torch.device("cpu"), torch.{dtype})
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "eager\n"
    assert f"RuntimeError: backend 'cuda' cannot run on cpu: {reason}" in result.stderr
