"""Bases quantised by bitsandbytes, torchao and HQQ (`make test-quantised`; skipped where a library is not there)."""

import copy
import gc

import pytest
import torch
from torch import nn

from genft_kernels import (
    GenFTConfig,
    GenFTLinear,
    accumulate,
    apply_genft,
    disabled,
    export_lora,
    load_adapter,
    merge,
    remove_genft,
    save_adapter,
)
from genft_kernels.frozen_weight import FrozenWeight
from tests.helpers.quantised_layers import share_units
from tests.helpers.quantised_models import (
    FORMS,
    IDS,
    KINDS,
    TARGETS,
    assert_same,
    step,
    tiny_llama,
    torchao,
    with_dense_targets,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # the libraries' own, of what is not installed
]
for library in ("bitsandbytes", "torchao", "hqq", "peft", "transformers"):
    pytest.importorskip(library, exc_type=ImportError)


def config(**settings):
    settings = {"shared_dim": 4, "specific_dim": 2, "target_modules": list(TARGETS), **settings}
    return GenFTConfig.preset("fast-both", **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
def test_layer_is_the_one_over_the_dequantised_weight(kind, form, dtype):
    model, twin = KINDS[kind](dtype), with_dense_targets(KINDS[kind](dtype), dtype)
    for each in (model, twin):
        apply_genft(each, config(**FORMS[form]))
    share_units(model, twin)
    assert_same(model, twin)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantisations_and_what_is_kept(kind, monkeypatch):
    model = apply_genft(KINDS[kind](torch.float32), config(weight_ratio="rms"))
    layers = sum(isinstance(module, GenFTLinear) for module in model.modules())
    made, make = [], FrozenWeight.dense

    def counted(self):
        import weakref

        weight = make(self)
        made.append(weakref.ref(weight.untyped_storage()))
        return weight

    monkeypatch.setattr(FrozenWeight, "dense", counted)
    step(model)
    assert len(made) <= 4 * layers
    with accumulate(model):
        step(model)
        made.clear()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            output = model(IDS, labels=IDS)
        gc.collect()
        assert not any(reference() is not None for reference in made)
        output.loss.backward()
        assert len(made) <= 2 * layers


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_goes_through_files_and_knows_its_bytes(kind, tmp_path):
    model = apply_genft(KINDS[kind](torch.float32), config())
    share_units(model, model)
    save_adapter(model, tmp_path)
    fresh = load_adapter(KINDS[kind](torch.float32), tmp_path)
    assert torch.equal(fresh.eval()(IDS).logits, model.eval()(IDS).logits)
    other = KINDS[kind](torch.float32)
    codes = FrozenWeight.of(other.model.layers[1].self_attn.v_proj).codes
    with torch.no_grad():
        codes.view(torch.uint8).reshape(-1)[7] ^= 4
    with pytest.raises(ValueError, match=r"'model.layers.1.self_attn.v_proj': its quantised bytes differ"):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_copy_and_export_over_a_quantised_base(kind, tmp_path):
    model = apply_genft(KINDS[kind](torch.float32), config(weight_ratio="rms")).eval()
    share_units(model, model)
    expected = model(IDS).logits
    if kind != "torchao-nf4":  # which cannot copy its tensors
        assert torch.equal(copy.deepcopy(model)(IDS).logits, expected)
    export = export_lora(model, tmp_path, inputs=IDS)
    assert export.drift < (0.05 if "8bit" in kind else 1e-4) and set(export.energy.values()) == {1.0}
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_model_comes_back_or_goes_on_dense(kind):
    # In training mode, because in evaluation bitsandbytes' layers round their scales once and for all (on some CPUs).
    model, dense = (KINDS[kind](torch.float32) for _ in range(2))
    expected = model(IDS).logits
    apply_genft(model, config())
    apply_genft(dense, config())
    share_units(model, dense)
    with disabled(model):
        assert torch.equal(model(IDS).logits, expected)
    tuned = model(IDS).logits
    with pytest.raises(RuntimeError, match="q_proj' is quantised .* dequantize=True"):
        merge(model)
    remove_genft(dense, keep_update=True, dequantize=True)
    assert type(dense.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.allclose(dense(IDS).logits, tuned, atol=0.02 if "8bit" in kind else 1e-4)  # its forward rounds inputs
    assert torch.equal(remove_genft(model)(IDS).logits, expected)


@torch.no_grad()
def test_evaluation_leaves_a_4_bit_weight_as_it_is():
    model = apply_genft(KINDS["bitsandbytes-4bit"](torch.float32), config())
    frozen = model.model.layers[0].self_attn.q_proj.frozen_weight
    before = frozen.dense()
    with disabled(model.eval()):
        model(IDS)
    assert torch.equal(frozen.dense(), before)


@torch.no_grad()
def test_4_bit_weight_that_an_evaluation_has_packed_is_read():
    model = KINDS["bitsandbytes-4bit"](torch.float32)
    layer = model.model.layers[0].self_attn.q_proj
    before = FrozenWeight.of(layer).dense()
    model.eval()(IDS)  # packed where the CPU has instructions for it
    for _ in range(2):
        assert torch.allclose(FrozenWeight.of(layer).dense(), before, atol=0.01)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("bitsandbytes")])
@pytest.mark.parametrize("reentrant", [False, True])
def test_prepare_model_for_kbit_training_may_come_before(kind, reentrant):
    from peft import prepare_model_for_kbit_training

    model = KINDS[kind](torch.bfloat16)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    apply_genft(model, config())
    share_units(model, model)
    _, checkpointed = step(model)
    model.gradient_checkpointing_disable()
    _, plain = step(model)
    assert set(checkpointed) == set(plain) and plain
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in plain.values())
    for name, grad in plain.items():
        assert torch.allclose(checkpointed[name], grad, rtol=0.05, atol=0.05 * grad.abs().max().item())


@pytest.mark.parametrize("kind", ["bitsandbytes-4bit", "torchao-int8", "hqq"])
def test_quantised_layer_compiles_to_one_graph(kind):
    layer = nn.ModuleDict({"q_proj": KINDS[kind](torch.float32).model.layers[0].self_attn.q_proj})
    query = apply_genft(layer, config(target_modules=["q_proj"]))["q_proj"]
    x = torch.randn(3, 128)
    y = query(x)
    assert torch.allclose(torch.compile(query, backend="aot_eager", fullgraph=True)(x), y, atol=1e-6)


# --- what torchao may do ---------------------------------------------------------------------------------------------


def test_dynamic_activations_are_refused_at_apply():
    for name in ("Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"):
        model = torchao(torch.float32, name)
        with pytest.raises(TypeError, match=r"'model.layers.0.self_attn.q_proj': Linear of .*dynamic activations"):
            apply_genft(model, config())


def test_dynamic_activations_above_a_target_are_refused_at_apply():
    from torchao import quantization

    model = tiny_llama()
    quantization.quantize_(
        model,
        quantization.Int8DynamicActivationInt8WeightConfig(),
        filter_fn=lambda module, path: path.endswith("layers.1.mlp.down_proj"),
    )
    with pytest.raises(TypeError, match=r"'model.layers.1.mlp.down_proj' .* comes after the target 'model.layers.0"):
        apply_genft(model, config())
    assert not any(isinstance(module, GenFTLinear) for module in model.modules())


def test_quantising_an_adapted_model_is_refused():
    from torchao import quantization

    model = apply_genft(tiny_llama(), config())
    with pytest.raises(TypeError, match="quantise the model first, then call apply_genft"):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    step(model)


def quantised_afterwards(name: str, part: str, **settings) -> nn.Module:
    """A model of whose adapted layers none is quantised, but another part is, by torchao, after `apply_genft`."""
    from torchao import quantization

    model = apply_genft(tiny_llama(), config(**settings))
    share_units(model, model)
    quantization.quantize_(model, getattr(quantization, name)(), filter_fn=lambda module, path: path.endswith(part))
    return model


@pytest.mark.parametrize("part", ["k_proj", "mlp.down_proj", "lm_head"])
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"])
def test_layers_that_are_not_adapted_may_be_quantised_afterwards(name, part):
    model = quantised_afterwards(name, part)
    twin = apply_genft(tiny_llama(), config())
    share_units(model, twin)
    for path, module in twin.named_modules():
        if path.endswith(part):
            module.weight = nn.Parameter(model.get_submodule(path).weight.dequantize(), requires_grad=False)
    (logits, mine), (expected, theirs) = step(model), step(twin)
    exact = 0 if name != "Int8WeightOnlyConfig" else 1e-6  # torchao's own product of int8 scales what comes out of it
    assert (logits - expected).abs().max() <= exact and set(mine) == set(theirs)
    assert all((mine[key] - gradient).abs().max() <= exact for key, gradient in theirs.items())


@pytest.mark.parametrize("part", ["k_proj", "mlp.down_proj", "lm_head"])
@pytest.mark.parametrize("name", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"])
def test_layers_quantised_afterwards_must_let_gradients_through(name, part):
    model = quantised_afterwards(name, part)
    with torch.no_grad():
        model.eval()(IDS)  # without gradients there is nothing against it
    model = quantised_afterwards(name, part)
    with pytest.raises(TypeError, match=rf"{part}' \(Linear of .* comes after the target .*dynamic activations"):
        step(model)


def test_modules_to_save_are_not_quantised():
    with pytest.raises(TypeError, match=r"modules_to_save: 'lm_head' is quantised .* and cannot train"):
        step(quantised_afterwards("Int8WeightOnlyConfig", "lm_head", modules_to_save=["lm_head"]))
    from torchao import quantization

    model = tiny_llama()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda _, path: path == "lm_head")
    with pytest.raises(TypeError, match=r"modules_to_save: 'lm_head' is quantised .* and cannot train"):
        apply_genft(model, config(modules_to_save=["lm_head"]))
    assert not any(isinstance(module, GenFTLinear) for module in model.modules())


# --- PEFT ------------------------------------------------------------------------------------------------------------
