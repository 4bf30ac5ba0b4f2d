"""Two processes on gloo equal one on the joined batch: DistributedDataParallel and FSDP2, `accumulate` included."""

import contextlib
from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from genft_kernels import accumulate, explain
from tests.helpers.adapted_models import adapted, assert_close, generations
from tests.helpers.processes import WORLD, in_two_processes
from tests.helpers.tiny_models import Encoder

MICRO_BATCHES, STEPS = 3, 2
BATCHES = torch.randint(20, (STEPS, MICRO_BATCHES, WORLD, 4, 5), generator=torch.Generator().manual_seed(1))


def make_model():
    torch.manual_seed(0)
    model = adapted(partial(Encoder, layers=3), modules_to_save=["classifier"])
    return model.eval()  # BatchNorm's own statistics would tell the batches apart


def loss_of(model, batch):
    return model(batch).square().mean() / MICRO_BATCHES


def optimizer_of(model):
    return torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)


def fit(model, batches, accumulates, no_sync=contextlib.nullcontext) -> list[dict]:
    """The gradients of each step."""
    optimizer, found = optimizer_of(model), []
    for step in batches:
        with accumulate(model) if accumulates else contextlib.nullcontext():
            for index, batch in enumerate(step):
                with no_sync() if index + 1 < len(step) else contextlib.nullcontext():
                    loss_of(model, batch).backward()
        full = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        full = {n: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for n, g in full.items()}
        found.append({name.removeprefix("module."): grad for name, grad in full.items()})
        optimizer.step()
        optimizer.zero_grad()
    return found


def data_parallel(rank: int, accumulates: bool) -> dict:
    model = make_model()
    wrapped = DistributedDataParallel(model)
    return dict(steps=fit(wrapped, BATCHES[:, :, rank], accumulates, wrapped.no_sync), generations=generations(model))


def fully_sharded(rank: int, units: bool, accumulates: bool) -> dict:
    model = make_model()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.layers if units else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)  # the shared generator is in the root unit
    steps = fit(model, BATCHES[:, :, rank], accumulates)
    evaluate(model)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
    return dict(steps=steps, evaluated=evaluate(model, change=1.5), explained=explain(model))


@torch.no_grad()
def evaluate(model, change: float = 1.0):
    for parameter in model.parameters():
        parameter.mul_(change)
    return model(BATCHES[0, 0, 0])


def assert_steps(result, expected):
    for actual, wanted in zip(result["steps"], expected, strict=True):
        assert_close(actual, wanted)


def test_data_parallel(tmp_path):
    expected = fit(make_model(), BATCHES.flatten(2, 3), accumulates=False)
    jobs = [partial(data_parallel, accumulates=accumulates) for accumulates in (False, True)]
    for results, count in zip(in_two_processes(tmp_path, *jobs), (MICRO_BATCHES, 1), strict=True):
        for result in results:
            assert_steps(result, expected)
            assert result["generations"] == STEPS * count


def refusals(rank: int) -> list[str]:
    found = []
    for option in ("static_graph", "find_unused_parameters"):
        model = make_model()
        wrapped = DistributedDataParallel(model, **{option: True})
        for given in (wrapped, model):
            with pytest.raises(RuntimeError) as raised, accumulate(given):
                wrapped(BATCHES[0, 0, rank])
            found.append(str(raised.value))
        wrapped(BATCHES[0, 0, rank]).square().mean().backward()  # as ever without it
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    return found


def test_data_parallel_that_looks_for_unused_parameters_does_not_accumulate(tmp_path):
    for found in in_two_processes(tmp_path, refusals)[0]:
        static, unused = found[:2], found[2:]
        assert all("DistributedDataParallel(..., static_graph=True)" in told for told in static)
        assert all("DistributedDataParallel(..., find_unused_parameters=True)" in told for told in unused)


@pytest.mark.slow
@pytest.mark.parametrize("units", [True, False], ids=["units", "root-alone"])
def test_fully_sharded(tmp_path, units):
    model = make_model()
    expected = fit(model, BATCHES.flatten(2, 3), accumulates=False)
    evaluated = evaluate(model, change=1.5)
    jobs = [partial(fully_sharded, units=units, accumulates=accumulates) for accumulates in (False, True)]
    for results in in_two_processes(tmp_path, *jobs):
        for result in results:
            assert_steps(result, expected)
            assert torch.allclose(result["evaluated"], evaluated, rtol=1e-10)
            assert "6 layers each in a generation of its own: its parameters are sharded" in result["explained"]
