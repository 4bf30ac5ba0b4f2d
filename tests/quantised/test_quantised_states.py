"""Adapters over quantised layers: changed, disabled, removed, merged, copied and in files."""

import copy
import io

import pytest
import torch
from torch import nn

from genft_kernels import (
    apply_genft,
    disabled,
    export_lora,
    fidelity_report,
    load_adapter,
    merge,
    refresh,
    remove_genft,
    save_adapter,
    set_backend,
)
from tests.helpers.quantised_layers import (
    TOKENS,
    Int8Linear,
    assert_same,
    config,
    dense_twin,
    pair,
    quantised,
    step,
)
from tests.helpers.tiny_models import Encoder


def test_factors_follow_a_change_of_the_codes():
    model, _ = pair(config())
    model.eval()
    with torch.no_grad():
        model(TOKENS)
        model.layers[0].attention.query.base_layer.codes.neg_()
        changed = model(TOKENS)
        refresh(model)
        assert torch.equal(model(TOKENS), changed)


def test_rms_follows_a_change_of_the_codes():
    model, _ = pair(config(weight_ratio="rms"))
    model.eval()
    with torch.no_grad():
        model(TOKENS)
        for layer in model.layers:
            layer.attention.value.base_layer.codes.div_(3, rounding_mode="trunc")
        twin = dense_twin(remove_genft(copy.deepcopy(model)))
        apply_genft(twin, config(weight_ratio="rms"))
        twin.load_state_dict({k: v for k, v in model.state_dict().items() if k in twin.state_dict()}, strict=False)
        assert torch.equal(twin.eval()(TOKENS), model(TOKENS))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_offloaded_codes_come_back_for_a_forward(backend):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, _ = pair(config())
    set_backend(model.eval(), backend)
    expected = model(TOKENS)
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    for _ in range(2):
        assert torch.allclose(model(TOKENS), expected)
        assert model.layers[0].attention.query.base_layer.codes.is_meta


def test_disabled_is_the_quantised_model():
    torch.manual_seed(0)
    model = quantised(Encoder()).eval()
    expected = model(TOKENS)
    apply_genft(model, config())
    assert not torch.allclose(model(TOKENS), expected)
    with disabled(model):
        assert torch.equal(model(TOKENS), expected)


def test_removing_brings_the_quantised_layers_back():
    torch.manual_seed(0)
    model = quantised(Encoder()).eval()
    query, names, expected = model.layers[0].attention.query, list(model.state_dict()), model(TOKENS)
    apply_genft(model, config())
    remove_genft(model)
    assert model.layers[0].attention.query is query
    assert list(model.state_dict()) == names
    assert torch.equal(model(TOKENS), expected)


def test_merging_names_the_layer_and_the_way_out():
    model, _ = pair(config())
    for act in (merge, lambda m: remove_genft(m, keep_update=True)):
        with pytest.raises(
            RuntimeError, match=r"'layers.0.attention.query' is quantised \(Int8Linear.*dequantize=True"
        ):
            act(model)
    with pytest.raises(RuntimeError, match="dequantize=True"):
        model.layers[0].attention.query.merge()
    with pytest.raises(ValueError, match="needs keep_update=True"):
        remove_genft(model, dequantize=True)
    step(model)  # it is as it was


def test_removing_with_dequantize_leaves_dense_layers():
    model, twin = pair(config())
    model.eval(), twin.eval()
    expected = model(TOKENS)
    remove_genft(model, keep_update=True, dequantize=True)
    remove_genft(twin, keep_update=True)
    query = model.layers[0].attention.query
    assert type(query) is nn.Linear and query.weight.dtype == torch.float32
    assert isinstance(model.layers[0].attention.key, Int8Linear)
    assert torch.allclose(model(TOKENS), expected, atol=1e-5)
    assert torch.equal(query.weight, twin.layers[0].attention.query.weight)


def test_dense_layers_are_in_the_models_dtype():
    model, _ = pair(config(), torch.bfloat16)
    remove_genft(model, keep_update=True, dequantize=True)
    query = model.layers[0].attention.query
    assert query.weight.dtype == query.bias.dtype == torch.bfloat16
    model.eval()(TOKENS)


def test_a_copied_model_has_handles_of_its_own():
    model, _ = pair(config())
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.layers[0].attention.query.base_layer.codes.zero_()
    expected = pair(config())[0].eval()(TOKENS)
    assert torch.equal(other.eval()(TOKENS), expected)


def test_adapter_over_a_quantised_base_goes_through_files(tmp_path):
    model, _ = pair(config())
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    fresh = quantised(Encoder())
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.eval()(TOKENS), model.eval()(TOKENS))


def test_fingerprints_cover_the_stored_bytes(tmp_path):
    model, _ = pair(config())
    save_adapter(model, tmp_path)
    for change in ("codes", "scale"):
        torch.manual_seed(0)
        fresh = quantised(Encoder())
        tensor = getattr(fresh.layers[1].attention.value, change)
        with torch.no_grad():
            tensor.view(torch.uint8)[3, 0] ^= 1
        with pytest.raises(ValueError, match=r"weight of 'layers.1.attention.value': its quantised bytes differ"):
            load_adapter(fresh, tmp_path)
        assert isinstance(fresh.layers[1].attention.value, Int8Linear)


def test_adapter_of_a_quantised_base_is_refused_on_the_one_before(tmp_path):
    model, _ = pair(config())
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="belongs to another base model"):
        load_adapter(Encoder(), tmp_path)


def test_export_over_a_quantised_base_is_that_over_the_dense_one(tmp_path):
    from safetensors.torch import load_file

    for name, model in zip(("mine", "dense"), pair(config()), strict=True):
        export_lora(model, tmp_path / name)
    mine, dense = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("mine", "dense"))
    assert set(mine) == set(dense)
    assert all(torch.allclose(mine[key], dense[key], rtol=1e-5, atol=1e-6) for key in mine)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_of_an_adapted_model_answers_and_trains_as_it_does(copied):
    """The norm of W is known of the module that it was found for alone."""
    model, _ = pair(config(weight_ratio="rms"))
    assert_same(copied(model), model)


def test_fidelity_over_a_quantised_base_is_refused():
    model, _ = pair(config())
    with pytest.raises(ValueError, match="'layers.0.attention.query' is over a quantised weight.*dequantise a copy"):
        fidelity_report(model, TOKENS)


def test_blocks_of_several_sizes_are_generated_from_the_dense_weight():
    """As of a fused q, k and v whose heads are grouped; not from the codes, which may have the same shape."""
    torch.manual_seed(0)
    model = quantised(nn.Sequential(nn.Linear(6, 18), nn.Linear(18, 6)), names=("0",))
    twin, x, blocks = dense_twin(model), torch.randn(3, 6), {"0": ((8, 4, 6), (0, 1, 2))}
    for each in (model, twin):
        torch.manual_seed(3)
        apply_genft(each, config(shared_dim=2, specific_dim=1, target_modules=["0"], fused_blocks=blocks))
    assert torch.equal(model(x), twin(x))
    assert torch.equal(model[0].delta_weight(), twin[0].delta_weight())
