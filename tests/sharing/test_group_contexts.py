"""Grouped generation under checkpointing, in copies, threads and compiled graphs, and its fallbacks."""

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from functools import partial

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from genft_kernels import (
    GenFTConfig,
    GenFTLinear,
    accumulate,
    apply_genft,
    backends,
    explain,
    remove_genft,
    save_adapter,
)
from tests.helpers.adapted_models import (
    DROPOUT,
    Checkpointed,
    adapted,
    assert_close,
    generations,
    gradients,
    groups,
    loss_of,
    one_by_one,
    train,
)
from tests.helpers.tiny_models import Encoder, tokens


def four_layers(**settings):
    return adapted(partial(Encoder, layers=4), settings).train()


def train_checkpointed(model, reentrant, seed=5) -> dict:
    torch.manual_seed(seed)
    loss_of(Checkpointed(model, reentrant)).backward()
    return gradients(model)


KINDS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
SETTINGS = {
    "": {},
    "tiled": dict(outer_activation="gelu"),
    "dropout": DROPOUT,
    "tiled-dropout": dict(outer_activation="tanh", bias=True, **DROPOUT),
    "column-dropout": dict(transform="column", **DROPOUT),
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@KINDS
@every_setting
def test_recomputed_regions_give_the_specifications_gradients(reentrant, settings):
    model = four_layers(**settings)
    specification = copy.deepcopy(model)
    for layer in specification.modules():
        if isinstance(layer, GenFTLinear):
            layer.backend = "reference"
    # The specification draws the seeds in the order of its forward, which is that of the first run.
    assert_close(train_checkpointed(model, reentrant), train(specification), tolerance=1e-10)


@KINDS
def test_what_is_generated_under_checkpointing(reentrant, monkeypatch):
    def sizes(**settings):
        model, found = four_layers(**settings), []
        (group,) = groups(model)
        generate = group.generate
        monkeypatch.setattr(
            group,
            "generate",
            lambda layers, *rest, **more: found.append(len(layers)) or generate(layers, *rest, **more),
        )
        train_checkpointed(model, reentrant)
        return found

    # Without dropout the first run is one generation; the repetitions find it at hand, or are connected one by one.
    assert sizes() == ([8] + [1] * 8 if reentrant else [8])
    assert sizes(**DROPOUT) == [1] * 16


def test_a_region_saves_as_much_as_its_repetition_whatever_is_at_hand():
    model = four_layers()
    region = Checkpointed(model, reentrant=False)
    losses = [loss_of(region) for _ in range(2)]
    losses[0].backward()  # consumes what the second forward was given
    losses[1].backward()
    assert_close(gradients(model), {name: 2 * grad for name, grad in train(model).items()})


def test_saved_tensors_on_another_device_or_packed():
    model = four_layers(outer_activation="gelu")
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        loss = loss_of(model)
    loss.backward()
    assert packed and generations(model) == 1
    assert_close(gradients(model), train(model))


# --- copies ---------------------------------------------------------------------------------------------------------


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("gradients_recorded", [False, True], ids=["no_grad", "grad"])
def test_a_copy_has_a_group_of_its_own_and_no_factors(copied, gradients_recorded):
    model = adapted()
    with torch.set_grad_enabled(gradients_recorded):
        expected = model(tokens())
    twin = copied(model)
    (group,), (copied_group,) = groups(model), groups(twin)
    assert copied_group is not group and copied_group.generations == 0
    assert not any(copied_group._shares.values())
    assert {id(layer) for layer in copied_group.layers} == {id(m) for m in twin.modules() if isinstance(m, GenFTLinear)}
    assert torch.equal(twin(tokens()), expected) and copied_group.generations == 1
    assert_close(train(twin), train(model))
    layer = copy.deepcopy(model.layers[0].attention.query)
    assert layer.generator.group.layers == [layer]


def test_a_model_without_its_adapter_has_no_group():
    model = adapted()
    (group,) = groups(model)
    remove_genft(model)
    assert group.layers == []


# --- threads and replicas -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, dict(outer_activation="gelu")], ids=["factored", "tiled"])
def test_threads_that_share_a_model(settings):
    model = four_layers(**settings)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.classifier[0].eval()
    expected = torch.autograd.grad(loss_of(model), trained.values())
    failures = []

    def work():
        try:
            for _ in range(10):
                found = torch.autograd.grad(loss_of(model), trained.values())
                for ours, theirs in zip(found, expected, strict=True):
                    assert torch.allclose(ours, theirs, rtol=1e-10)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_data_parallel_replica_generates_alone():
    model = adapted()
    layer, x = model.layers[0].attention.query, torch.randn(3, 8, dtype=torch.float64)
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(replica, name, parameter * 1)  # a copy on another device, differentiable
    expected = layer(x)
    assert torch.allclose(replica(x), expected, rtol=1e-12) and len(groups(model)[0].layers) == 4
    replica(x).sum().backward()
    assert layer.specific_up.grad.any()


# --- compiled graphs ------------------------------------------------------------------------------------------------


def test_a_compiled_model_has_no_graph_break_and_generates_within():
    model = adapted().eval()
    eager = train(copy.deepcopy(model))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss_of(compiled).backward()
    assert generations(model) == 0
    assert_close(gradients(model), eager, tolerance=1e-10)


# --- where layers are generated alone -------------------------------------------------------------------------------


def test_a_layer_that_is_not_resident_is_left_out():
    model = four_layers()
    layer = model.layers[3].attention.value
    expected = model.layers[0](model.embedding(tokens()))
    layer.to("meta")
    with torch.no_grad():
        assert torch.allclose(model.layers[0](model.embedding(tokens())), expected)
    assert generations(model) == 2
    text = explain(model)
    assert "8x8: 7 layers on cpu in one generation" in text
    assert "8x8: 1 layer each in a generation of its own: its parameters are on the meta device" in text
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded), pytest.raises(ValueError, match="meta device"):
            layer(torch.randn(3, 8, dtype=torch.float64, device="meta"))


@pytest.mark.parametrize("gradients_recorded", [False, True], ids=["no_grad", "grad"])
def test_offloaded_layers_and_their_generator_come_back_when_they_are_called(gradients_recorded, tmp_path):
    model = four_layers().eval()
    expected = model(tokens())
    offloaded = cpu_offload(copy.deepcopy(model), torch.device("cpu"))  # hooks bring back what is called
    with torch.set_grad_enabled(gradients_recorded):
        assert torch.allclose(offloaded(tokens()), expected)
    with pytest.raises(RuntimeError, match="genft_generators.8x8.column_down' is on the meta device"):
        save_adapter(offloaded, tmp_path)
    model.layers = cpu_offload(model.layers, torch.device("cpu"))
    with torch.no_grad():
        assert torch.allclose(model(tokens()), expected)
    with pytest.raises(RuntimeError, match="specific_down' is on the meta device"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_weight_whose_storage_is_away_is_left_out():
    model = four_layers()
    layer = model.layers[3].attention.value
    layer.weight.data = torch.empty(0, dtype=torch.float64)  # as DeepSpeed and FSDP leave it between forwards
    model.layers[0](model.embedding(tokens())).sum().backward()
    assert "its weight is not resident" in explain(model)


class Quantised(torch.Tensor):
    """A tensor class of its own."""


def test_a_tensor_class_of_its_own_is_left_out():
    model = four_layers()
    layer = model.layers[3].attention.value
    expected = model(tokens())
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Quantised), requires_grad=False)
    assert torch.allclose(model(tokens()), expected, rtol=1e-12)
    assert "sharded, quantised or of another tensor class" in explain(model)


def test_explain_says_what_is_generated_together():
    model = adapted()
    text = explain(model)
    assert text.startswith(backends.explain("cpu", torch.float64)) and "8x8: 4 layers on cpu in one generation" in text
    with pytest.raises(RuntimeError, match="no GenFT adapter"):
        explain(one_by_one(model).layers)


@pytest.mark.parametrize("to_none", [True, False, None], ids=["cleared", "zeroed", "kept"])
def test_zeros_that_another_part_of_the_loss_adds_are_no_zero_grad(to_none):
    """As of a penalty on units that are still zero; a `zero_grad` between two micro-batches drops what came before."""
    model = adapted(Encoder, {}).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "specific" in name:
                parameter.zero_()
    found = []
    for context in (contextlib.nullcontext(), accumulate(model)):
        with context:
            for number in range(4):
                penalty = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
                (loss_of(model) + 0.1 * penalty).backward()
                if number == 1 and to_none is not None:
                    model.zero_grad(set_to_none=to_none)
        found.append(gradients(model))
    assert_close(*found[::-1])


def test_forward_mode_raises_before_a_generation():
    model = adapted()
    layer, x = model.layers[0].attention.query, torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(layer, (x,), (x,))
    assert generations(model) == 0


@pytest.mark.parametrize("gradients_recorded", [False, True], ids=["no_grad", "grad"])
def test_a_forward_that_stops_midway_keeps_nothing_alive(gradients_recorded):
    model = four_layers()

    def stop(*_):
        raise InterruptedError

    model.layers[1].attention.value.register_forward_pre_hook(stop)
    with torch.set_grad_enabled(gradients_recorded), contextlib.suppress(InterruptedError):
        model(tokens())
    parameters = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert not any(parameter() is not None for parameter in parameters)


def test_a_float16_adapter_generates_under_a_cpus_autocast_to_bfloat16():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    apply_genft(model, GenFTConfig(shared_dim=2, specific_dim=1, zero_delta=False, target_modules=["0", "1"]))
    model.to(torch.float16)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)
