"""The plan of the kernel backends: how long sums are cut, and what it launches, counted."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genft_kernels import GenFTConfig, apply_genft, backends, philox
from genft_kernels.backends import plan
from genft_kernels.backends.cuda import launch
from genft_kernels.backends.eager import factored as eager_factored
from genft_kernels.backends.eager import operations as eager

H100, A100 = 132, 108  # multiprocessors


@pytest.mark.parametrize(
    "length, programs, at_once, shortest, most, parts",
    [
        (8192, 72, H100, 512, 4, 3),  # contract at 768 x 768, tiles of 128 x 64: two rounds of a third each
        (8192, 36, H100, 512, 4, 3),  # and of 128 x 128: one round
        (8192, 72, A100, 512, 4, 3),
        (8192, 1024, H100, 512, 4, 1),  # 4096 x 4096
        (1023, 72, H100, 512, 4, 1),  # too few tokens
        (4096, 64, 2 * H100, 256, 16, 4),  # a thin product at 4096 x 4096
        (768, 12, 2 * H100, 256, 16, 3),  # and at 768 x 768, of one layer
        (768, 288, 2 * H100, 256, 16, 1),  # and of 24
        (0, 1, H100, 512, 4, 1),
    ],
)
def test_a_sum_is_cut_where_multiprocessors_would_idle(length, programs, at_once, shortest, most, parts):
    each, found = plan._split(length, programs, at_once, shortest, most)
    assert found == parts and each % 64 == 0 and (parts - 1) * each < max(1, length) <= parts * each


class AtenCalls(TorchDispatchMode):
    """The names of PyTorch's operations that start a kernel on a GPU."""

    _FREE = ("empty", "view", "alias", "detach", "slice", "transpose", "aten.t.", "expand", "select")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if not any(free in name for free in self._FREE):
            self.names.append(name.split(".")[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing")
@pytest.mark.parametrize("features, layers", [(768, 1), (4096, 1), (64, 300)], ids=["small", "large", "many"])
def test_launches_are_as_few_as_they_can_be(features, layers):
    """No copy, cast or sum of PyTorch's stands beside a kernel."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from genft_kernels.backends.triton import operations as triton
    from tests.helpers.fake_triton_driver import launches

    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16)

    weights, k = [empty(features, features)] * layers, 32
    thin, down, seeds = empty(layers, features, k), empty(layers, k, features), torch.zeros(layers, dtype=torch.int64)
    x, h = empty(2048, features), empty(features, k)
    update = seeds[:1], 1.0, "leaky_relu", 0.1, philox.ROW_STREAM
    row, one = (thin, thin, down, None, seeds, "leaky_relu", 0.1, "identity"), [True, False]
    sums = ["sum_parts"] if layers == 1 else []
    with launches() as names, AtenCalls() as calls:
        for expected, call in (
            (["thin_product", *sums], lambda: triton.column(weights, down, empty(k), "tanh")),
            (["thin_transposed", *sums], lambda: triton.column_backward(thin, weights, None, "identity", one)),
            (["row_forward"], lambda: triton.row(*row)),
            (["row_backward_out", "row_backward_in"],
             lambda: triton.row_backward(thin, *row[:3], None, *row[4:], [True, True, True, False])),
            (["contract", "sum_parts"],
             lambda: triton.linear_backward(x, x, weights[0], h, h, None, *update, [False, False, True, True])),
        ):  # fmt: skip
            call()  # makes the table of the layers' places
            names.clear()
            calls.names.clear()
            call()
            assert (names, calls.names) == (expected, [])


@pytest.mark.parametrize(
    "on_gpu, forward, backward",
    [
        (True, ["addmm", "cat", "cat", "addmm"], ["addmm", "mm", "mm", "cat", "cat", "mm"]),
        (False, ["addmm", "mm", "addmm_", "add_"], ["addmm", "mm", "mm", "mm", "addmm_"]),
    ],
    ids=["gpu", "cpu"],
)
def test_launches_of_the_factored_form_are_as_few_as_they_can_be(on_gpu, forward, backward, monkeypatch):
    """In 16 bits, on every backend: products are a vendor's. dh and db come in their own dtype from one each."""
    monkeypatch.setattr(eager_factored, "_extends", lambda tensor: on_gpu)
    x, weight, bias, h, b = (
        torch.zeros(shape, dtype=torch.bfloat16) for shape in ((9, 6), (8, 6), (8,), (6, 4), (8, 4))
    )
    update = None, 0.5, "identity", 0.0, philox.ROW_STREAM
    for operations in (eager, plan.KernelOperations(plan.Kernels(SimpleNamespace()))):
        with AtenCalls() as calls:
            y, xh = operations.linear(x, weight, bias, h, b, *update)
            assert calls.names == forward
            calls.names.clear()
            operations.linear_backward(y, x, weight, h, b, xh, *update, [True, False, True, True])
        assert calls.names == backward


FORMS = {"factored": {}, "tiled": {"outer_activation": "leaky_relu"}, "dropout": {"dropout": 0.1}}


@pytest.mark.parametrize("phi, bias", [("identity", False), ("tanh", False), ("tanh", True), ("identity", True)])
@pytest.mark.parametrize("transform", ["both", "column", "row", "sum"])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_a_group_makes_its_thin_matrices_as_kernels_take_them(form, transform, phi, bias, monkeypatch):
    """But for one: the gradient of a one, or of units, beside a stage's own is in one piece with theirs."""
    monkeypatch.setattr(backends, "_device_reason", lambda name, device: None)
    monkeypatch.setattr(launch, "start", lambda device, kernel, arguments: started.append(kernel))
    started, copied = [], []

    def contiguous(tensor, *args):
        if sys._getframe(1).f_globals["__name__"] == plan.__name__ and not tensor.is_contiguous():
            copied.append(tensor.shape)
        return plain(tensor, *args)

    plain = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    config = dict(transform=transform, inner_activation=phi, bias=bias, zero_delta=False, **FORMS[form])
    # Wide enough that the tokens' gradients lie on a CPU as on a GPU.
    model = torch.nn.Sequential(*(torch.nn.Linear(24, 24, dtype=torch.bfloat16) for _ in range(3)))
    targets = GenFTConfig(shared_dim=3, specific_dim=2, target_modules=["0", "1", "2"], **config)
    apply_genft(model, targets, backend="cuda").train()
    for _ in range(2):
        model(torch.randn(2, 7, 24, dtype=torch.bfloat16)).square().mean().backward()
    # Kernels' row stage is the tiled form's; the last stage's units stand beside no other product.
    two = transform == "sum" or (transform == "both" and form != "factored")
    beside = bias or transform == "sum"
    stages = (2 if two else 1) if beside and phi == "identity" else 0
    assert started and len(copied) == 2 * stages
