"""Adapter files: what is saved comes back bit for bit, and another base model is refused with the model untouched."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from genft_kernels import GenFTConfig, apply_genft, load_adapter, merge, remove_genft, save_adapter
from genft_kernels.files import names
from genft_kernels.files.fingerprint import Fingerprint
from genft_kernels.files.format import CONFIG_FILE, TENSORS_FILE
from tests.helpers.adapter_files import QUERY, SAVED, adapted, base, config, contents
from tests.helpers.tiny_models import (
    Encoder,
    FusedEncoder,
    FusedGroupedQueryBlock,
    GroupedQueryBlock,
    TiedModel,
    randomise,
    snapshot,
    tokens,
)


@pytest.fixture
def folder(tmp_path):
    """An adapter, modules to save included, on disk."""
    save_adapter(adapted(**SAVED), tmp_path)
    return tmp_path


# --- the round trip -------------------------------------------------------------------------------------------------

MODELS = {
    "encoder": (Encoder, {}),
    "modules_to_save": (Encoder, dict(modules_to_save=["classifier", "norm"])),
    "fused": (FusedEncoder, dict(fused_blocks={"qkv": (3, (0, 2))}, delta_layout="out_in", bias=True)),
    "fused-unequal": (FusedGroupedQueryBlock, dict(fused_blocks={"qkv_proj": ((8, 4, 4), (0, 2))}, bias=True)),
    "rectangular": (GroupedQueryBlock, dict(target_modules=r".*_proj", exclude_modules=["k_proj"])),
    "tied-and-shared": (TiedModel, dict(target_modules=["first", "second", "head"], transform="column")),
    "shared-only-tiled": (Encoder, dict(specific_dim=0, outer_activation="gelu", weight_ratio="rms", dropout=0.1)),
}


@pytest.mark.parametrize("make, settings", MODELS.values(), ids=MODELS)
def test_a_fresh_base_with_a_loaded_adapter_answers_alike(make, settings, tmp_path):
    model = adapted(make, **settings)
    save_adapter(model, tmp_path / "not" / "there yet")
    loaded = base(make)
    assert not torch.equal(loaded(tokens()), model(tokens()))
    assert load_adapter(loaded, tmp_path / "not" / "there yet") is loaded
    assert torch.equal(loaded(tokens()), model(tokens()))
    assert snapshot(loaded)["bits"] == snapshot(model)["bits"]
    assert snapshot(loaded)["requires_grad"] == snapshot(model)["requires_grad"]
    load_adapter(loaded, str(tmp_path / "not" / "there yet"))  # into the adapted model now
    assert torch.equal(loaded(tokens()), model(tokens()))


def test_loading_into_an_adapted_model_replaces_its_adapter(folder):
    model, expected = adapted(**SAVED), adapted(**SAVED)
    load_adapter(expected, folder)
    randomise(model, 1.0)
    identities = snapshot(model)["identities"]
    load_adapter(model, folder)
    assert torch.equal(model(tokens()), expected(tokens())) and snapshot(model)["identities"] == identities


def test_the_files_hold_the_adapter_and_nothing_else(tmp_path):
    model = adapted(**SAVED)
    save_adapter(model, tmp_path)
    assert sorted(contents(tmp_path)) == [CONFIG_FILE, TENSORS_FILE]
    tensors = names.all_in_model(safetensors.torch.load_file(tmp_path / TENSORS_FILE))
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]
    saved = [f"modules_to_save.classifier.{name}" for name in model.classifier.state_dict()]
    assert sorted(tensors) == sorted(trained + saved)
    assert "genft_generators.8x8.row_up" in trained and f"{QUERY}.specific_down" in trained
    description = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert description["format_version"] == 2 and GenFTConfig.from_dict(description["config"]) == config(**SAVED)
    fingerprint = description["fingerprints"][QUERY]
    weight = dict(model.named_parameters())[f"{QUERY}.weight"]
    assert fingerprint["shape"] == [8, 8] and fingerprint["samples"] == weight.double().flatten().tolist()
    assert fingerprint["norm"] == pytest.approx(weight.norm().item())


def test_no_pickle_is_written_or_read(folder, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("pickle")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    save_adapter(load_adapter(base(), folder), folder)


def test_buffers_of_saved_modules_travel(tmp_path):
    model = adapted(**SAVED).train()
    for _ in range(3):
        model(tokens())
    assert model.classifier[0].num_batches_tracked == 3
    save_adapter(model, tmp_path)
    loaded = load_adapter(base(), tmp_path)
    assert loaded.classifier[0].num_batches_tracked == 3
    assert torch.equal(loaded.classifier[0].running_mean, model.classifier[0].running_mean)
    remove_genft(loaded)
    assert loaded.classifier[0].num_batches_tracked == 0


def test_a_merged_model_saves_what_it_was_trained_to_be(folder):
    model = adapted(**SAVED)
    before = contents(folder)
    merge(load_adapter(model, folder))
    save_adapter(model, folder)
    assert contents(folder) == before


@pytest.mark.parametrize("trained, used", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float64")])
def test_parameters_keep_their_own_dtype(trained, used, tmp_path):
    model = randomise(apply_genft(base().to(getattr(torch, trained)), config()))
    save_adapter(model, tmp_path)
    loaded = load_adapter(base().to(getattr(torch, trained)).to(getattr(torch, used)), tmp_path)
    expected = torch.float64 if used == "float64" else torch.float32
    for name, p in loaded.named_parameters():
        if p.requires_grad:
            assert p.dtype == expected and torch.equal(p, dict(model.named_parameters())[name].to(expected))


def test_tensors_of_any_strides_are_saved_and_loaded(tmp_path):
    def make():
        torch.manual_seed(3)
        model = nn.ModuleDict({"query": nn.Linear(8, 8), "conv": nn.Conv2d(2, 2, 3), "head": nn.Linear(4, 6)})
        model["head"].weight.data = model["head"].weight.data.t().contiguous().t()
        return model.to(memory_format=torch.channels_last)

    settings = config(modules_to_save=["conv", "head"])
    model = randomise(apply_genft(make(), settings))
    assert not model["conv"].weight.is_contiguous() and not model["head"].weight.is_contiguous()
    save_adapter(model, tmp_path)
    loaded = load_adapter(make(), tmp_path)
    assert snapshot(loaded)["bits"] == snapshot(model)["bits"]
    assert loaded["conv"].weight.stride() == model["conv"].weight.stride()


class WithExtraState(nn.Linear):
    """Keeps something beside its parameters, which may not be a tensor."""

    def __init__(self, extra=None):
        super().__init__(8, 3)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        if isinstance(state, torch.Tensor) and state.numel() == 0:
            raise RuntimeError("no such state")
        self.extra = state


def with_extra_state(extra):
    torch.manual_seed(7)
    return nn.ModuleDict({"query": nn.Linear(8, 8), "head": nn.ModuleDict({"last": WithExtraState(extra)})})


HEAD = dict(modules_to_save=["head"])


@pytest.mark.parametrize("loaded", [torch.zeros(2), torch.zeros(5)], ids=["same shape", "another shape"])
def test_an_extra_state_that_is_a_tensor_travels(loaded, tmp_path):
    extra = torch.arange(5.0)
    save_adapter(apply_genft(with_extra_state(extra), config(**HEAD)), tmp_path)
    model = load_adapter(with_extra_state(loaded), tmp_path)
    assert torch.equal(model["head"]["last"].extra, extra)


def test_no_extra_state_is_none(tmp_path):
    save_adapter(apply_genft(with_extra_state(None), config(**HEAD)), tmp_path)
    assert load_adapter(with_extra_state(None), tmp_path)["head"]["last"].extra is None


@pytest.mark.parametrize("extra", [{"scale": 2.0}, 3, "text"], ids=str)
def test_an_extra_state_that_cannot_be_saved_is_told_before_training(extra, tmp_path):
    with pytest.warns(UserWarning, match="head.last._extra_state is of type .*only tensors can be saved"):
        model = apply_genft(with_extra_state(extra), config(**HEAD))
    with pytest.raises(TypeError, match="modules_to_save: head.last._extra_state is of type"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_module_that_refuses_its_state_leaves_all_unchanged(tmp_path):
    model = randomise(apply_genft(with_extra_state(torch.zeros(0)), config(**HEAD)))
    save_adapter(model, tmp_path)
    for fresh in (True, False):
        other = with_extra_state(torch.ones(2))
        if not fresh:
            randomise(apply_genft(other, config(**HEAD)), 1.0)
        before = snapshot(other)
        with pytest.raises(RuntimeError, match="no such state"):
            load_adapter(other, tmp_path)
        assert snapshot(other) == before and torch.equal(other["head"]["last"].extra, torch.ones(2))


def test_a_used_model_takes_in_all_tensors_or_none(folder):
    model = adapted(**SAVED)
    with torch.inference_mode():  # which can't be written to outside of it; it comes last
        model.layers[1].attention.value.specific_up = nn.Parameter(torch.zeros(8, 1))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="[Ii]nference"):
        load_adapter(model, folder)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "name, number", [("query", float("nan")), ("query", float("inf")), ("classifier", float("nan"))]
)
def test_nan_is_saved_with_a_warning(name, number, tmp_path):
    model = adapted(**SAVED)
    parameter = model.layers[0].attention.query.specific_up if name == "query" else model.classifier[1].weight
    with torch.no_grad():
        parameter[0, 0] = number
    with pytest.warns(UserWarning, match=f"{name}.*holds NaN.*load_adapter will refuse it"):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=f"{name}.*holds NaN"):
        load_adapter(base(), tmp_path)


def test_buffers_may_hold_infinities(tmp_path):
    model = adapted(**SAVED)
    model.classifier[0].running_mean[0] = float("-inf")  # as masks do
    save_adapter(model, tmp_path)
    assert load_adapter(base(), tmp_path).classifier[0].running_mean[0] == float("-inf")


def test_an_adapter_of_a_broken_base_model_is_not_saved(tmp_path):
    model = adapted()
    with torch.no_grad():
        model.layers[1].attention.query.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"frozen weight of '{QUERY}' holds NaN"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- the fingerprint ------------------------------------------------------------------------------------------------


def test_another_base_model_is_told_and_the_layer_named(folder):
    other = base()
    with torch.no_grad():
        other.layers[1].attention.query.weight.mul_(1.001)
    before = snapshot(other)
    with pytest.raises(ValueError, match=f"another base model: the weight of '{QUERY}': its norm is"):
        load_adapter(other, folder)
    assert snapshot(other) == before
    with torch.no_grad():
        weight = other.layers[1].attention.query.weight.mul_(1 / 1.001)
        weight.copy_(weight.flip(0))  # the same norm
    with pytest.raises(ValueError, match=f"'{QUERY}': its values differ"):
        load_adapter(other, folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_model_with_nan_or_infinity_is_another_one(folder, value):
    broken = base()
    with torch.no_grad():
        broken.layers[1].attention.query.weight[3, 3] = value
    with pytest.raises(ValueError, match=f"another base model.*'{QUERY}'"):
        load_adapter(broken, folder)


def test_layers_that_are_not_adapted_may_differ(folder):
    other = base()
    with torch.no_grad():
        other.layers[1].dense.weight.add_(1.0)
    load_adapter(other, folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_base_in_another_dtype_is_accepted(folder, dtype, tmp_path):
    load_adapter(base().to(dtype), folder)
    save_adapter(apply_genft(base().to(dtype), config()), tmp_path / "cast")
    load_adapter(base(), tmp_path / "cast")
    other = Encoder().to(dtype)
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(other, folder)


def test_a_large_weight_is_told_by_64_samples_and_its_norm():
    weight = torch.randn(300, 200)
    fingerprint = Fingerprint.of(weight)
    assert len(fingerprint.samples) == 64 and fingerprint.samples[-1] == weight[-1, -1].item()
    assert fingerprint.difference(Fingerprint.of(weight.t().contiguous().t())) is None
    assert "shape is [200, 300], not [300, 200]" in fingerprint.difference(Fingerprint.of(weight.t()))
    assert fingerprint.difference(Fingerprint.of(weight.bfloat16())) is None
    assert "norm is" in fingerprint.difference(Fingerprint.of(weight.bfloat16().float()))
    assert "values differ" in fingerprint.difference(Fingerprint.of(weight.flip(0)))
    for value in (float("nan"), float("inf")):  # where no sample lies
        weight[7, 8] = value
        assert f"norm is {value}" in fingerprint.difference(Fingerprint.of(weight))


def test_a_deeper_base_model_is_another_one(folder):
    with pytest.raises(ValueError, match="another base model: its layers differ, first at 'layers.2.attention.query'"):
        load_adapter(base(lambda: Encoder(layers=3)), folder)
