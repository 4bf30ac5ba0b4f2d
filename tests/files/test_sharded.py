"""Adapters of models that FSDP2 has sharded over two processes: saved, loaded, and as distributed checkpoints."""

from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from genft_kernels import GenFTConfig, apply_genft, load_adapter, parameter_groups, save_adapter
from tests.helpers.adapted_models import adapted, gradients, loss_of
from tests.helpers.processes import in_two_processes
from tests.helpers.tiny_models import Encoder, randomise, tokens

pytestmark = pytest.mark.slow  # each starts two processes
SETTINGS = dict(modules_to_save=["classifier"], bias=True)


def make(scale: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    return randomise(adapted(Encoder, SETTINGS), scale).eval()


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.clone() for name, p in found.items()}


def save_and_load(rank: int, folder) -> dict:
    model = sharded(make())
    save_adapter(model, folder)
    other = sharded(randomise(make(), 1.0))
    assert all(isinstance(p, DTensor) for p in other.parameters())
    load_adapter(other, folder)
    assert all(isinstance(p, DTensor) for p in other.parameters())
    return dict(tensors=trained_tensors(other), answer=other(tokens()).detach())


def test_adapter_of_a_sharded_model_is_gathered_and_scattered(tmp_path):
    expected = make()
    for result in in_two_processes(tmp_path, partial(save_and_load, folder=tmp_path / "sharded"))[0]:
        for name, tensor in trained_tensors(expected).items():
            assert torch.equal(result["tensors"][name], tensor), name
        assert torch.allclose(result["answer"], expected(tokens()), rtol=1e-12)
    save_adapter(expected, tmp_path / "plain")
    written = [(tmp_path / kind / "adapter_model.safetensors").read_bytes() for kind in ("sharded", "plain")]
    assert written[0] == written[1]
    torch.manual_seed(0)
    fresh = load_adapter(Encoder().double(), tmp_path / "sharded").eval()  # as one process has it
    assert torch.equal(fresh(tokens()), expected(tokens()))


def failures(rank: int, folder) -> list[str]:
    model, found = sharded(make()), []
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").touch()
    before = trained_tensors(model)
    other = sharded(adapted(Encoder, SETTINGS | dict(shared_dim=3)))
    save_adapter(other, folder / "other")
    for action in (
        lambda: save_adapter(model, folder / "model"),
        lambda: load_adapter(model, folder / "nothing"),
        lambda: load_adapter(model, folder / "other"),
        lambda: apply_genft(sharded(Encoder()), GenFTConfig(shared_dim=2)),
    ):
        try:
            action()
        except (ValueError, TypeError, FileNotFoundError) as error:
            found.append(str(error))
    assert all(torch.equal(before[name], tensor) for name, tensor in trained_tensors(model).items())
    return found


def test_all_processes_are_told_of_a_failure(tmp_path):
    for found in in_two_processes(tmp_path, partial(failures, folder=tmp_path))[0]:
        model, nothing, other, late = found
        assert "holds a saved model" in model and "no adapter in" in nothing
        assert "another configuration" in other and "apply_genft or load_adapter before fully_shard" in late


OPTIONS = StateDictOptions(ignore_frozen_params=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def checkpointed(rank: int, folder) -> dict:
    models, optimizers = [sharded(make()), sharded(randomise(make(), 1.0))], []
    for model in models:
        optimizers.append(torch.optim.AdamW(parameter_groups(model, 1e-2)))
    step(models[0], optimizers[0])
    state = dict(zip(("model", "optimizer"), get_state_dict(models[0], optimizers[0], options=OPTIONS), strict=True))
    names = sorted(state["model"])
    dcp.save(state, checkpoint_id=folder)
    step(models[1], optimizers[1])
    state = dict(zip(("model", "optimizer"), get_state_dict(models[1], optimizers[1], options=OPTIONS), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        models[1],
        optimizers[1],
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer)
    return dict(names=names, tensors=[trained_tensors(model) for model in models])


def test_adapter_and_optimizer_go_through_a_distributed_checkpoint(tmp_path):
    results = in_two_processes(tmp_path, partial(checkpointed, folder=str(tmp_path / "dcp")))[0]
    trained = trained_tensors(make())
    for result in results:
        assert set(trained) <= set(result["names"])  # and the buffers of the classifier
        assert not any(name.endswith("query.weight") for name in result["names"])
        first, second = result["tensors"]
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name
            assert not torch.equal(tensor, trained[name]), name


def fsdp1(rank: int) -> list[str]:
    found = []
    for original in (True, False):
        model = make().train()
        before = list(model.parameters())
        try:
            loss_of(FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu")))
        except ValueError as error:
            found.append(str(error))
            # Wrapped with the default it is as it was.
            assert original or all(p is q for p, q in zip(before, model.parameters(), strict=True))
    return found


def test_fsdp1_is_refused_in_a_sentence(tmp_path):
    for found in in_two_processes(tmp_path, fsdp1)[0]:
        assert len(found) == 2
        assert all("FSDP1" in text and "use fully_shard (FSDP2" in text for text in found)


def generators_by_themselves(rank: int) -> dict[str, list]:
    mesh, refused, answers = init_device_mesh("cpu", (2,)), [], []
    for reshard in ("each", "all", False):
        model = make()
        generators = [model.genft_generators] if reshard == "all" else model.genft_generators.values()
        for each in generators:
            fully_shard(each, mesh=mesh, reshard_after_forward=bool(reshard))
        fully_shard(model, mesh=mesh)
        if reshard:
            with pytest.raises(RuntimeError) as raised:
                model(tokens())
            refused.append(str(raised.value))
        else:
            answers.append(model(tokens()).detach())  # they stay
    return dict(refused=refused, answers=answers)


def test_generator_that_is_a_unit_of_its_own_is_refused_where_it_is_away(tmp_path):
    for found in in_two_processes(tmp_path, generators_by_themselves)[0]:
        assert all("leave generators to the root's fully_shard(model)" in told for told in found["refused"])
        assert torch.allclose(*found["answers"], make()(tokens()), rtol=1e-12)


def make_small(settings: dict) -> nn.Module:
    """Two layers, the first of which is adapted."""
    config = GenFTConfig(**dict(shared_dim=2, specific_dim=1, transform="column", target_modules=["0"]) | settings)
    return apply_genft(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config)


def tensor_parallel(rank: int) -> list[str]:
    mesh, found = init_device_mesh("cpu", (2,)), []
    for settings in (dict(outer_activation="gelu"), dict(outer_activation="identity"), dict(shared_dim=0)):
        model = make_small(settings)
        parallelize_module(model, mesh, {"0": ColwiseParallel()})
        with pytest.raises(TypeError) as raised:
            model(torch.ones(3, 8))
        found.append(str(raised.value))
    plain = parallelize_module(nn.Sequential(nn.Linear(8, 8)), mesh, {"0": ColwiseParallel()})
    with pytest.raises(TypeError) as raised:
        apply_genft(plain, GenFTConfig(target_modules=["0"]))
    found.append(str(raised.value))
    return found


def test_tensor_parallelism_of_an_adapted_layer_is_refused_in_a_sentence(tmp_path):
    for *forwards, late in in_two_processes(tmp_path, tensor_parallel)[0]:
        assert all("weight is a DTensor: there is no tensor parallelism" in told for told in forwards)
        assert "under tensor parallelism (parallelize_module) cannot be adapted" in late


class Reentrant(nn.Module):
    """An encoder whose layers are recomputed by the older kind of checkpointing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens):
        x = self.model.embedding(tokens).requires_grad_()
        for layer in self.model.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return self.model.classifier(x.mean(1))


def reentrant(rank: int, static: bool) -> tuple[dict, str]:
    model = make().train()
    wrapped = DistributedDataParallel(Reentrant(model), static_graph=static)
    try:
        for _ in range(2):
            model.zero_grad()
            loss_of(wrapped).backward()
    except RuntimeError as error:
        return {}, str(error)
    return gradients(model), ""


def test_reentrant_checkpointing_trains_under_data_parallel_with_a_static_graph(tmp_path):
    model = make().train()
    for _ in range(2):
        model.zero_grad()
        loss_of(Reentrant(model)).backward()
    expected = gradients(model)
    with_static, without = in_two_processes(tmp_path, *(partial(reentrant, static=s) for s in (True, False)))
    for (found, trouble), (_, told) in zip(with_static, without, strict=True):
        assert not trouble
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-12), name
        assert "_set_static_graph" in told  # DistributedDataParallel's own words
