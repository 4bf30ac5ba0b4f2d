"""Two processes on gloo that adapt experts equal one on the joined batch: DistributedDataParallel and FSDP2."""

import contextlib
from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from genft_kernels import accumulate, apply_genft
from tests.helpers.expert_models import VOCABULARY, mixtral, settings
from tests.helpers.processes import WORLD, in_two_processes

pytestmark = pytest.mark.slow

BATCHES = torch.randint(3, VOCABULARY, (WORLD, 2, 6), generator=torch.Generator().manual_seed(1))


def make_model():
    torch.manual_seed(0)
    return apply_genft(mixtral(), settings())


def gradients(model, batch, accumulates=False) -> dict:
    with accumulate(model) if accumulates else contextlib.nullcontext():
        model(input_ids=batch, use_cache=False).logits.square().mean().backward()
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}


def data_parallel(rank: int, accumulates: bool) -> dict:
    return gradients(DistributedDataParallel(make_model()), BATCHES[rank], accumulates)


def fully_sharded(rank: int, units: str) -> dict:
    model = make_model()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer.mlp.experts if units == "experts" else layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return gradients(model, BATCHES[rank])


JOBS = {
    "ddp": partial(data_parallel, accumulates=False),
    "ddp-accumulate": partial(data_parallel, accumulates=True),
    "fsdp-layers": partial(fully_sharded, units="layers"),
    "fsdp-experts": partial(fully_sharded, units="experts"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    found = in_two_processes(tmp_path_factory.mktemp("distributed"), *JOBS.values())
    return {name: of_rank[0] for name, of_rank in zip(JOBS, found, strict=True)}


@pytest.mark.parametrize("name", JOBS)
def test_gradients_are_those_of_one_process_on_the_joined_batch(results, name):
    wanted = gradients(make_model(), BATCHES.flatten(0, 1))
    assert results[name].keys() == wanted.keys()
    for parameter, grad in wanted.items():
        assert (results[name][parameter] - grad).norm() <= 1e-5 * grad.norm(), parameter
