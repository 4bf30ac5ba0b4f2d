"""Each kernel alone beside its floor: the calls run, bytes and products are counted by hand, what fails is told."""

import itertools

import pytest
import torch

from benchmarks.kernel import __main__ as kernels
from benchmarks.kernel import calls as kernel_calls
from benchmarks.kernel.__main__ import KEY, Rates, measure
from genft_kernels import backends
from genft_kernels.backends.plan import Kernels
from tests import cuda_host
from tests.helpers.small_benchmarks import CPU, SMALL

NAME = "cuda"  # whose kernels the CPU can run
on_the_cpu = pytest.mark.skipif(cuda_host.unavailable_reason() is not None, reason=str(cuda_host.unavailable_reason()))
K, TOKENS = 8, 33
N_IN, N_OUT, LAYERS = 96, 64, 4  # of SMALL


def clock(call):
    call()
    return 1e-6, 2e-6, 4e-6


def rows(name):
    sizes = kernels.Sizes([name], [SMALL], [TOKENS, 1], [K])
    return list(measure(sizes, torch.float32, CPU, Rates(1e9, 1e12), clock))


@on_the_cpu
def test_every_kernel_of_a_backend_is_measured():
    found = rows(NAME)
    assert {row["status"] for row in found} == {"measured"}
    methods = {name for name, each in vars(Kernels).items() if callable(each) and not name.startswith("_")}
    assert {row["kernel"] for row in found} == {*methods, "product"}
    assert len({tuple(row[field] for field in KEY) for row in found}) == len(found)
    for row in found:
        assert row["time_us"] == [1, 2, 4] and row["times_floor"] == pytest.approx(
            2 / row["floor_us"], rel=0.01, abs=0.01
        )
        assert row["device"] and row["sources"] and row["copy_terabytes"] == 0.001 and row["product_teraflops"] == 2


@on_the_cpu
def test_floors_are_counted_from_the_shapes():
    ours = backends.load(NAME).kernels
    size = dict(k=K, dtype=torch.float32, device=CPU)
    sides = kernel_calls.weight_side(ours, SMALL, **size), kernel_calls.token_side(ours, SMALL, TOKENS, **size)
    _, product = next(kernel_calls.vendor(SMALL, TOKENS, [], torch.float32, CPU))
    calls = {(call.kernel, call.tokens, call.form): call for call in (product, *itertools.chain(*sides))}
    w, thin_in, thin_out, x, y = N_IN * N_OUT, N_IN * K, N_OUT * K, TOKENS * N_IN, TOKENS * N_OUT
    assert calls["product", TOKENS, None].moved_bytes() == 4 * (x + w + y)
    assert calls["product", TOKENS, None].multiplications == TOKENS * w
    assert calls["fold", None, "dropout"].moved_bytes() == 4 * (2 * w + thin_in + thin_out)
    assert calls["fold", None, "dropout"].multiplications == w * K
    # W and A of every layer in, h and what its activation was applied to out.
    assert calls["thin_product", None, None].moved_bytes() == 4 * LAYERS * (w + thin_in + 2 * thin_out)
    assert calls["thin_product", None, None].multiplications == LAYERS * w * K
    thin = {call.kernel: call for k, call in kernel_calls.vendor(SMALL, TOKENS, [K], torch.float32, CPU) if k == K}
    for call in (calls["thin_product", TOKENS, None], thin["thin_product"]):
        assert call.moved_bytes() == 4 * (x + thin_in + TOKENS * K) and call.multiplications == TOKENS * thin_in
    assert thin["thin_transposed"].moved_bytes() == 4 * (x + thin_in + TOKENS * K)
    assert calls["contract", TOKENS, "tiled"].moved_bytes() == 4 * (x + y + 2 * (thin_in + thin_out))
    assert calls["contract", TOKENS, "tiled"].multiplications == (TOKENS + 3 * K) * w
    assert Rates(1e9, 1e12).floor(5_000, 7) == 5e-6 and Rates(1e12, 1e3).floor(5_000, 7) == 7e-3


@on_the_cpu
def test_a_kernel_that_fails_is_named_and_the_others_go_on(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(backends.load(NAME).kernels, "contract", broken)
    found = rows(NAME)
    assert {row["kernel"] for row in found if row["status"] != "measured"} == {"contract"}
    (row, *_) = [row for row in found if row["kernel"] == "contract"]
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: no such luck")
    assert kernels.line(row).startswith("contract ")


def test_only_a_lost_device_ends_the_run(monkeypatch):
    """A capture that failed, which harms nothing after it, raises the same class of error."""

    def fail():
        raise torch.AcceleratorError("this failed")

    broken = kernel_calls.Call("broken", fail, (), 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert kernels._timed(broken, Rates(1, 1), clock)["reason"] == "AcceleratorError: this failed"
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(torch.AcceleratorError):
        kernels._timed(broken, Rates(1, 1), clock)


def test_rates_come_from_the_clock():
    seconds = iter([(0, 2.0, 0), (0, 5.0, 0)])

    def given(call):
        call()
        return next(seconds)

    rates = Rates.measured(CPU, torch.float32, given, size=16)
    assert rates == Rates(2 * 2 * 16 * 16 * 4 / 2.0, 16**3 / 5.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is at hand")
def test_command_says_so_without_a_gpu(tmp_path, capsys):
    assert kernels.main(["--output", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())
