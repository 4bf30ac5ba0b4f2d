"""Nothing is answered with factors of what was: changes that no version tells of, other processes, swapped tensors."""

import copy
import os
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from genft_kernels import GenFTConfig, GenFTLinear, accumulate, apply_genft, refresh
from genft_kernels.sharing import share, snapshot
from tests.helpers.adapted_models import adapted, generations, groups, loss_of
from tests.helpers.tiny_models import Encoder, tokens


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def weights(model):
    return [m.weight for m in model.modules() if isinstance(m, GenFTLinear)]


def fused_adam(parameter, new):
    """An optimizer's kernel called directly: its step size depends on the sign of the gradient alone."""
    zeros, ones = torch.zeros_like(parameter), torch.ones_like(parameter)
    torch._fused_adam_(
        [parameter], [ones], [zeros], [zeros.clone()], [], [torch.tensor(1.0)],
        lr=0.1, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip


CHANGES = {
    "data": lambda p, new: p.data.copy_(new),
    "data-replaced": lambda p, new: setattr(p, "data", new),
    "momentum": lambda p, new: p.data.mul_(0.9).add_(new, alpha=0.1),
    "vector": lambda p, new: nn.utils.vector_to_parameters(new.flatten(), [p]),
    "numpy": lambda p, new: p.detach().numpy().__setitem__(..., new.numpy()),
    "storage": lambda p, new: p.untyped_storage().copy_(new.untyped_storage()),
    "fused-adam": fused_adam,
}
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
PARTS = {
    "generator": lambda model: list(model.genft_generators.parameters()),
    "one-tensor": lambda model: [model.genft_generators["8x8"].row_up],
    "own": lambda model: [model.layers[1].attention.value.specific_up],
    "weight": lambda model: weights(model)[2:3],
}
every_part = pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)


def changed(model, change, part):
    with torch.no_grad():
        for parameter in part(model):
            before = parameter.clone()
            change(parameter, torch.randn_like(parameter) * 0.5)
            assert not torch.equal(parameter, before)


@every_part
@every_change
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
def test_evaluation_sees_a_change_that_no_version_tells_of(change, part, gradients):
    model = adapted().eval()
    with torch.set_grad_enabled(gradients):
        first = model(tokens())
        assert torch.equal(model(tokens()), first) and generations(model) == 1
        changed(model, change, part)
        second = model(tokens())
        assert torch.equal(second, copy.deepcopy(model)(tokens())) and not torch.allclose(second, first, rtol=1e-6)


def test_evaluation_sees_a_change_of_a_single_element(monkeypatch):
    monkeypatch.setattr(snapshot, "_FIRST_BYTES", 16)
    model = adapted().eval()
    with torch.no_grad():
        model(tokens())
        model.genft_generators["8x8"].column_down.data[1, 5] += 1
        assert torch.equal(model(tokens()), copy.deepcopy(model)(tokens())) and generations(model) == 2


@every_change
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
def test_training_mode_reuses_nothing_across_two_forwards(change, gradients):
    model = adapted().train()
    model.classifier[0].eval()
    with torch.set_grad_enabled(gradients):
        for count in (1, 2):
            model(tokens())
            assert generations(model) == count
        changed(model, change, PARTS["generator"])
        assert torch.equal(model(tokens()), copy.deepcopy(model)(tokens()))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("at_once", [True, False], ids=["cpu", "device"])
def test_evaluation_takes_nothing_that_training_made(layers, at_once, monkeypatch):
    """In training less is looked at; a reentrant region's first run leaves factors that a `no_grad` evaluation fits."""
    for module in (share, snapshot):
        monkeypatch.setattr(module, "compares_at_once", lambda device: at_once)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    names = list(map(str, range(layers)))
    apply_genft(model, GenFTConfig(shared_dim=2, specific_dim=1, zero_delta=False, target_modules=names))
    x = torch.randn(4, 8, requires_grad=True)
    for _ in range(3):
        checkpoint(model.train(), x, use_reentrant=True).square().sum().backward()
        changed(model, CHANGES["fused-adam"], lambda model: [model[0].specific_up])
        with torch.no_grad():
            fresh = copy.deepcopy(model).eval()(x)
            assert all(torch.equal(model.eval()(x), fresh) for _ in range(3))


def test_evaluation_takes_nothing_that_training_made_for_others():
    """A layer that evaluated, and sat out a forward of training in which others generated for it."""
    model = adapted()
    first, second = model.layers
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        model.eval()(tokens())
        model.train()
        first(x)
        assert generations(model) == 2
        second.eval()(x)
    assert generations(model) == 3


@every_change
@pytest.mark.parametrize("layers", [1, 2])
def test_training_in_another_thread_sees_a_change_that_no_version_tells_of(layers, change):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    names = list(map(str, range(layers)))
    apply_genft(model, GenFTConfig(shared_dim=2, specific_dim=1, zero_delta=False, target_modules=names))
    x = torch.randn(4, 8)
    found = []

    def work():
        with torch.no_grad():
            found.append(model(x))

    work()  # its result is dropped, so no backward consumes the factors
    changed(model, change, trained)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(found[1], copy.deepcopy(model)(x)) and not torch.allclose(found[1], found[0], rtol=1e-3)


def test_layers_that_an_earlier_forward_left_out_are_not_stale_either():
    model = adapted().train()
    first, second = model.layers
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        first(x)  # generates for the second, too
        changed(model, CHANGES["data"], PARTS["generator"])
        assert torch.equal(second(x), copy.deepcopy(second)(x))


def test_zeroth_order_steps_move_the_output():
    model = adapted().train()
    model.classifier[0].eval()
    with torch.no_grad():
        losses = []
        for sign in (1, -2, 1):  # as MeZO perturbs and restores
            torch.manual_seed(1)
            for parameter in trained(model):
                parameter.data.add_(torch.randn_like(parameter), alpha=0.05 * sign)
            losses.append(loss_of(model))
    assert losses[0] != losses[1] != losses[2]


def test_a_teacher_that_follows_through_data_moves():
    student = adapted()
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    with torch.no_grad():
        first = teacher(tokens())
        for parameter in trained(student):
            parameter.add_(0.5)
        for _ in range(3):
            for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                ours.data.mul_(0.5).add_(theirs.data, alpha=0.5)
            moved = teacher(tokens())
            assert torch.equal(moved, copy.deepcopy(teacher)(tokens()))
    assert not torch.allclose(moved, first, rtol=1e-3)


def _double(model):
    with torch.no_grad():
        for parameter in trained(model):
            parameter.mul_(2)


def test_evaluation_sees_what_another_process_writes():
    model = adapted().eval().share_memory()
    with torch.no_grad():
        model(tokens())
        writer = torch.multiprocessing.get_context("fork").Process(target=_double, args=(model,))
        writer.start()
        writer.join()
        assert writer.exitcode == 0
        assert torch.equal(model(tokens()), copy.deepcopy(model)(tokens())) and generations(model) == 2


def test_accumulate_refuses_a_change_that_no_version_tells_of():
    for change in (CHANGES["data"], fused_adam):
        model = adapted().train()
        with pytest.raises(RuntimeError, match="a parameter changed within accumulate"), accumulate(model):
            loss_of(model).backward()
            changed(model, change, PARTS["generator"])


def test_parts_of_a_model_that_run_apart_see_a_change_of_what_they_share(monkeypatch):
    monkeypatch.setattr(snapshot, "_FIRST_BYTES", 16)
    model = adapted().eval()
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2):  # an encoder once, a decoder many times, in turn
            for part, count in ((model.layers[0], 1), (model.layers[1], 3)):
                model.genft_generators["8x8"].column_down.data[1, 5] += 1  # not among the first values
                for _ in range(count):
                    assert torch.equal(part(x), copy.deepcopy(part)(x))


def test_refresh_is_for_changes_of_a_weight_beside_its_diagonal():
    model = adapted().eval()
    with torch.no_grad():
        first = model(tokens())
        weights(model)[0].data[1, 0] += 1
        assert generations(model) == 1 and not torch.equal(model(tokens()), first)  # x W itself
        assert generations(model) == 1
        assert refresh(model) is model
        assert torch.equal(model(tokens()), copy.deepcopy(model)(tokens())) and generations(model) == 2


# --- on a device, where an answer would have to be waited for -------------------------------------------------------


@pytest.fixture
def device_model(monkeypatch):
    """A model whose values are compared as on a device."""
    for module in (share, snapshot):
        monkeypatch.setattr(module, "compares_at_once", lambda device: False)
    with torch.no_grad():
        model = adapted(partial(Encoder, layers=3)).eval()
        yield model


def test_device_raises_one_forward_after_a_stale_one(device_model):
    model = device_model
    first = model(tokens())
    for _ in range(3):
        assert torch.equal(model(tokens()), first)
    changed(model, CHANGES["data"], PARTS["own"])
    model(tokens())
    with pytest.raises(RuntimeError, match="updates that were out of date.*refresh"):
        model(tokens())
    assert torch.equal(model(tokens()), copy.deepcopy(model)(tokens()))


@every_part
def test_device_looks_at_every_part(device_model, part):
    model = device_model
    model(tokens())
    changed(model, CHANGES["data"], part)
    model(tokens())
    with pytest.raises(RuntimeError, match="updates that were out of date"):
        model(tokens())


def test_device_tells_of_a_stale_forward_when_a_change_with_a_version_has_followed(device_model):
    model = device_model
    model(tokens())
    changed(model, CHANGES["data"], PARTS["own"])
    model(tokens())
    changed(model, lambda parameter, new: parameter.copy_(new), PARTS["generator"])
    with pytest.raises(RuntimeError, match="updates that were out of date"):
        model(tokens())
    assert torch.equal(model(tokens()), copy.deepcopy(model)(tokens()))


def test_device_is_told_by_refresh_and_by_versions(device_model):
    model = device_model
    model(tokens())
    changed(model, CHANGES["data"], PARTS["own"])
    assert torch.equal(refresh(model)(tokens()), copy.deepcopy(model)(tokens()))
    changed(model, lambda parameter, new: parameter.copy_(new), PARTS["generator"])
    for _ in range(3):
        assert torch.equal(model(tokens()), copy.deepcopy(model)(tokens()))


def test_device_compares_once_for_each_forward_of_any_part(device_model, monkeypatch):
    model = device_model
    model(tokens())
    looks = []
    look = snapshot.Watch.look
    monkeypatch.setattr(snapshot.Watch, "look", lambda watch, parts: looks.append(1) or look(watch, parts))
    for count in range(1, 4):
        model(tokens())
        assert len(looks) == count
    model.layers[0](model.embedding(tokens()))
    model.layers[0](model.embedding(tokens()))
    assert len(looks) == 5


def test_device_goes_on_when_a_layer_is_gone(device_model):
    model = device_model
    model(tokens())
    del model.layers[2]
    for _ in range(3):
        assert torch.equal(model(tokens()), copy.deepcopy(model)(tokens()))


# --- swapped tensors, forks, leftovers ------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_loading_a_state_dict_by_swapping_tensors(assign):
    model, other = adapted().eval(), adapted().eval()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.no_grad():
            expected = other(tokens())
            model(tokens())
            model.load_state_dict(other.state_dict(), assign=assign)
            assert torch.equal(model(tokens()), expected)
            assert torch.allclose(model.float()(tokens()).double(), expected, rtol=1e-3, atol=1e-3)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_fork_while_another_thread_generates_does_not_hang():
    model = adapted().eval()
    (group,) = groups(model)
    generating, done = threading.Event(), threading.Event()

    def hold():
        with group.lock:
            generating.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    generating.wait()

    def forward():
        torch.set_num_threads(1)
        with torch.no_grad():
            model(tokens())

    child = torch.multiprocessing.get_context("fork").Process(target=forward)
    child.start()
    child.join(30)
    done.set()
    thread.join()
    hung = child.is_alive()
    child.kill()
    assert not hung and child.exitcode == 0
