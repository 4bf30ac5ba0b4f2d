"""Layers whose weight a model reads past the layer: the first forward tells them, and only the first."""

import copy
import gc
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genft_kernels import (
    GenFTConfig,
    apply_genft,
    disabled,
    load_adapter,
    remove_genft,
    save_adapter,
    trainable_summary,
)
from tests.helpers.tiny_models import TiedModel, snapshot, tokens

DIM = 8


class Reads(nn.Module):
    """Calls q and reads v's weight in one of several ways."""

    def __init__(self, read):
        super().__init__()
        self.q, self.v, self.read = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), read
        self.alias = self.v.weight if read == "alias" else None

    def forward(self, x):
        x = self.q(x)
        weight = {
            "attribute": lambda: self.v.weight,
            "dictionary": lambda: self.v._parameters["weight"],
            "names": lambda: dict(self.named_parameters())["v.weight"],
            "concatenated": lambda: torch.cat([self.v.weight, self.v.weight])[:DIM],
            "alias": lambda: self.alias,
            "not at all": lambda: torch.eye(DIM),
        }[self.read]()
        return F.linear(x, weight)


def settings(**more):
    return GenFTConfig(**{"shared_dim": 2, "specific_dim": 1, "target_modules": ["q", "v"], **more})


@pytest.mark.parametrize("read", ["attribute", "dictionary", "names", "concatenated", "alias", "not at all"])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_layer_that_is_not_called_is_named_once(read, gradients):
    model = apply_genft(Reads(read), settings())
    with torch.set_grad_enabled(gradients):
        with pytest.warns(UserWarning, match=r"not called in the model's first forward: 'v'\..*update is ignored"):
            model(torch.zeros(2, DIM))
        model(torch.zeros(2, DIM))  # warnings are errors here


def test_a_loaded_adapter_is_watched_too(tmp_path):
    save_adapter(apply_genft(Reads("attribute"), settings()), tmp_path)
    torch.manual_seed(0)
    model = Reads("attribute")
    save_adapter(apply_genft(copy.deepcopy(model), settings()), tmp_path)
    load_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="not called.*'v'"):
        model(torch.zeros(2, DIM))


def test_a_model_of_transformers_that_reads_a_weight():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    class Head(transformers.models.mobilebert.modeling_mobilebert.MobileBertLMPredictionHead):
        """Not known by its name."""

    config = transformers.MobileBertConfig(hidden_size=16, embedding_size=8, vocab_size=20)
    head = Head(config)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, x):
            return self.head(x)

    model = apply_genft(Model(), GenFTConfig(shared_dim=2, specific_dim=1, target_modules=["dense"]))
    with pytest.warns(UserWarning, match="not called.*'head.transform.dense'|not called.*'head.dense'"):
        model(torch.randn(2, 3, 16))


def test_many_layers_are_counted():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(9))

        def forward(self, x):
            return x

    model = apply_genft(Idle(), GenFTConfig(shared_dim=2, specific_dim=1, target_modules="all-linear"))
    with pytest.warns(UserWarning, match="'layers.0', 'layers.1', 'layers.2' and 6 more. If"):
        model(torch.zeros(2, DIM))


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_forward_within_disabled_is_not_the_first():
    """As of DPO's reference: the layers run, and what is tied is the original."""
    base = TiedModel()
    with pytest.warns(UserWarning, match="'head.weight' is tied to 'embedding.weight', and its trained copy is not"):
        model = apply_genft(base, settings(modules_to_save=["head"], target_modules=["first"]))
    with disabled(model):
        model(tokens())
        trainable_summary(model)
    assert hooks(model) == 1
    model(tokens())
    assert hooks(model) == 0


def test_nothing_is_left_of_it():
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, DIM))
    before = snapshot(model)
    chosen = GenFTConfig(shared_dim=2, specific_dim=1, target_modules=["0", "1"])
    apply_genft(model, chosen)
    assert hooks(model) > 0
    model(torch.zeros(2, DIM))
    assert hooks(model) == 0
    remove_genft(model)
    apply_genft(model, chosen)
    remove_genft(model)  # without a forward in between
    assert hooks(model) == 0 and snapshot(model) == before


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_is_watched_for_itself(copied):
    model = apply_genft(Reads("attribute"), settings())
    twin = copied(model)
    with pytest.warns(UserWarning, match="not called.*'v'"):
        twin(torch.zeros(2, DIM))
    assert hooks(twin) == 0 and hooks(model) > 0
    with pytest.warns(UserWarning, match="not called.*'v'"):
        model(torch.zeros(2, DIM))


def two_parts():
    model = nn.Sequential(*(nn.Sequential(*(nn.Linear(DIM, DIM) for _ in range(3))) for _ in range(2)))
    return apply_genft(model, settings(target_modules="all-linear"))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_layers_that_are_gone_are_neither_copied_nor_missed(copied):
    model = two_parts()
    del model[0][1]  # the third has its name now
    model[1][2] = nn.Linear(DIM, DIM)
    gc.collect()
    for each in (copied(model), model):
        each(torch.zeros(2, DIM))  # warnings are errors here
        assert hooks(each) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_part_of_a_model_that_is_gone_can_be_copied(copied):
    part = two_parts()[0]
    gc.collect()
    copied(copied(part))(torch.zeros(2, DIM))


def test_a_forward_that_fails_shows_nothing():
    model = apply_genft(Reads("attribute"), settings())
    with pytest.raises(ValueError, match="x must be"):
        model(torch.zeros(2, DIM + 1))
    with pytest.warns(UserWarning, match="not called.*'v'"):
        model(torch.zeros(2, DIM))


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_parts_are_not_accused(whole):
    model = apply_genft(nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)), GenFTConfig(
        shared_dim=2, specific_dim=1, target_modules=["0", "1"]))  # fmt: skip
    (model if whole else model[0]).compile(backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(torch.zeros(2, DIM))
        model(torch.zeros(2, DIM))


def test_threads_may_run_the_first_forward_together():
    model = apply_genft(nn.Sequential(*(nn.Linear(DIM, DIM) for _ in range(50))), GenFTConfig(
        shared_dim=2, specific_dim=1, target_modules="all-linear")).eval()  # fmt: skip
    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        for result in [pool.submit(model, torch.zeros(2, DIM)) for _ in range(8)]:
            result.result()
    assert hooks(model) == 0


def test_a_layer_may_be_called_by_two_replicas_at_once():
    model = apply_genft(nn.Sequential(nn.Linear(DIM, DIM)), GenFTConfig(
        shared_dim=2, specific_dim=1, target_modules=["0"]))  # fmt: skip
    (hook,) = model[0]._forward_pre_hooks.values()
    for _ in range(2):
        hook(model[0], ())
    model(torch.zeros(2, DIM))
