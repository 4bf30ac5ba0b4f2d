"""The PEFT tuner over bases quantised by bitsandbytes, torchao and HQQ (`make test-quantised`)."""

import warnings

import pytest
import torch

from genft_kernels import set_backend
from genft_kernels.frozen_weight import FrozenWeight
from tests.helpers.quantised_layers import share_units
from tests.helpers.quantised_models import (
    FORMS,
    IDS,
    KINDS,
    TARGETS,
    assert_same,
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


def peft_config(**settings):
    from genft_kernels.integrations.peft import PeftGenFTConfig

    return PeftGenFTConfig(preset="fast-both", shared_dim=4, specific_dim=2, target_modules=list(TARGETS), **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_peft_tuner_is_the_one_over_the_dequantised_weight(kind, form):
    from peft import get_peft_model

    model, twin = KINDS[kind](torch.float32), with_dense_targets(KINDS[kind](torch.float32), torch.float32)
    model, twin = (get_peft_model(each, peft_config(**FORMS[form])) for each in (model, twin))
    share_units(model, twin)
    assert_same(model, twin)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_tuner_has_the_reference_over_a_quantised_weight(kind):
    from peft import get_peft_model

    model = get_peft_model(KINDS[kind](torch.float32), peft_config()).eval()
    share_units(model, model)
    answer = model(IDS).logits
    torch.testing.assert_close(set_backend(model, "reference")(IDS).logits, answer, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_peft_merges_as_lora_does(kind):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(KINDS[kind](torch.float32), peft_config()).eval()
    lora = get_peft_model(KINDS[kind](torch.float32), LoraConfig(target_modules=list(TARGETS)))
    share_units(model, model)
    before = model(IDS).logits
    if "torchao" in kind:  # neither knows how the model was quantised
        if "nf4" not in kind:
            with pytest.raises(ValueError, match="get_apply_tensor_subclass"):
                lora.merge_adapter()
        with pytest.raises(ValueError, match="TorchAoConfig"):
            model.merge_adapter()
        assert torch.equal(model(IDS).logits, before)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora.merge_adapter()
        model.merge_adapter()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    theirs = lora.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer.base_layer) is type(theirs.base_layer)
    merged = FrozenWeight.of(layer.base_layer).dense()
    frozen, delta = layer.frozen_weight.dense(), layer.get_delta_weight("default")
    assert (merged - frozen - delta).norm() < 0.2 * (frozen + delta).norm()
    assert (merged - frozen).norm() > 0
    assert not torch.equal(model(IDS).logits, before)
    model.unmerge_adapter()
    assert torch.allclose(model(IDS).logits, before, atol=1e-6)


def test_peft_merges_torchao_where_transformers_knows_how():
    from peft import get_peft_model
    from torchao.quantization import Int8WeightOnlyConfig

    class Quantizer:
        class quantization_config:
            get_apply_tensor_subclass = staticmethod(lambda: Int8WeightOnlyConfig())

    base = KINDS["torchao-int8"](torch.float32)
    base.hf_quantizer = Quantizer
    model = get_peft_model(base, peft_config()).eval()
    share_units(model, model)
    before = model(IDS).logits
    model.merge_adapter()
    assert not torch.equal(model(IDS).logits, before)
    assert torch.allclose(model(IDS).logits, before, atol=0.2)
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("kind", ["bitsandbytes-4bit", "torchao-int8", "hqq"])
@torch.no_grad()
def test_peft_adapter_goes_through_files(kind, tmp_path):
    from peft import PeftModel, get_peft_model

    model = get_peft_model(KINDS[kind](torch.float32), peft_config())
    share_units(model, model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(KINDS[kind](torch.float32), tmp_path)
    assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)
    other = KINDS[kind](torch.float32)
    codes = FrozenWeight.of(other.model.layers[1].self_attn.v_proj).codes
    with torch.no_grad():
        codes.view(torch.uint8).reshape(-1)[7] ^= 4
    with pytest.raises(ValueError, match="its quantised bytes differ"):
        PeftModel.from_pretrained(other, tmp_path)


def test_peft_refuses_dynamic_activations():
    from peft import get_peft_model

    with pytest.raises(TypeError, match=r"q_proj' is not supported. Linear of .*dynamic activations"):
        get_peft_model(torchao(torch.float32, "Int8DynamicActivationInt8WeightConfig"), peft_config())


def test_peft_base_that_is_quantised_afterwards_is_refused():
    from peft import get_peft_model
    from torchao import quantization

    model = get_peft_model(tiny_llama(), peft_config())
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(TypeError, match="was quantised after its adapter"):
        model(IDS)
