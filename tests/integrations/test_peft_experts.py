"""The PEFT tuner's `target_parameters`: stacked experts answer, learn and are saved as by `apply_genft`, exactly."""

import pytest
import torch

from genft_kernels import GenFTConfig, apply_genft, explain, load_adapter, save_adapter, trainable_summary

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from accelerate import cpu_offload  # noqa: E402  # PEFT needs it
from transformers.integrations import peft as of_transformers  # noqa: E402

from genft_kernels.integrations.peft import PeftGenFTConfig, swap_adapter  # noqa: E402
from genft_kernels.integrations.peft.experts import AdapterExperts  # noqa: E402
from tests.helpers.expert_models import MODELS, TARGETS, answer, experts_of, mixtral, tokens  # noqa: E402
from tests.helpers.peft_models import own_names, randomised  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")

# (model, settings)
CASES = {
    "mixtral": ("mixtral", {}),
    "mixtral-tiled": ("mixtral", dict(outer_activation="silu", scaling=0.5)),
    "mixtral-layers-units": ("mixtral", dict(expert_specific="layer", target_modules=["q_proj", "o_proj"])),
    "qwen3_moe": ("qwen3_moe", dict(transform="column")),
    "gpt_oss": ("gpt_oss", dict(bias=True, target_parameters=["experts.down_proj"])),
}


def settings_of(changes) -> dict:
    chosen = dict(shared_dim=3, specific_dim=2, inner_activation="tanh", zero_delta=False, target_parameters=TARGETS)
    return chosen | changes


def peft_config(**changes) -> PeftGenFTConfig:
    settings = settings_of(changes)
    settings["generator_bias"] = settings.pop("bias", None)
    return PeftGenFTConfig(**{**settings, "target_parameters": list(settings["target_parameters"])})


def peft_model(kind="mixtral", **changes):
    return randomised(peft.get_peft_model(MODELS[kind](), peft_config(**changes))).eval()


def own_model(model, kind="mixtral", **changes):
    """The same by `apply_genft`."""
    own = apply_genft(MODELS[kind](), GenFTConfig(**settings_of(changes))).eval()
    values = own_names(dict(model.named_parameters()))
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[name])
    return own


def logits(model):
    return answer(model, tokens())


@pytest.mark.parametrize("kind, changes", CASES.values(), ids=CASES)
def test_tuner_adapts_experts_as_apply_genft_does(kind, changes):
    model = peft_model(kind, **changes)
    own = own_model(model, kind, **changes)
    answers = [logits(each) for each in (model, own)]
    assert torch.equal(*answers) and not torch.allclose(answers[0], logits(MODELS[kind]()))
    for each in answers:
        each.square().sum().backward()
    gradients = own_names({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected = {name: p.grad for name, p in own.named_parameters() if p.requires_grad}
    assert set(gradients) == set(expected)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("kind, changes", CASES.values(), ids=CASES)
def test_files_of_experts_are_those_of_save_adapter(kind, changes, tmp_path):
    model = peft_model(kind, **changes)
    expected = logits(model)
    model.save_pretrained(tmp_path / "peft")
    assert torch.equal(logits(load_adapter(MODELS[kind](), tmp_path / "peft").eval()), expected)
    save_adapter(own_model(model, kind, **changes), tmp_path / "own")
    for folder, lazily in (("peft", True), ("own", False)):
        loaded = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path / folder, low_cpu_mem_usage=lazily)
        assert torch.equal(logits(loaded.eval()), expected)


@pytest.mark.parametrize("changes", [{}, dict(outer_activation="silu")], ids=["factored", "tiled"])
def test_experts_merge_unload_and_rest_exactly(changes):
    model = peft_model(**changes)
    expected, frozen, weight = logits(model), logits(mixtral()), experts_of(model.base_model.model).down_proj
    model.merge_adapter()
    assert torch.allclose(logits(model), expected, rtol=1e-10, atol=1e-12)
    with model.disable_adapter():
        assert torch.equal(logits(model), frozen)
    model.unmerge_adapter()
    assert experts_of(model.base_model.model).down_proj is weight and torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), frozen)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(experts_of(merged)) is type(experts_of(mixtral()))
    assert list(merged.state_dict()) == list(mixtral().state_dict())
    assert torch.allclose(logits(merged), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(logits(peft_model(**changes).unload()), frozen)


def test_adapters_of_experts_switch_add_up_and_are_deleted():
    model = peft_model()
    first, names = logits(model), list(model.state_dict())
    model.add_adapter("other", peft_config(scaling=0.5, target_parameters=["experts.down_proj"]))
    with torch.no_grad():
        torch.manual_seed(11)
        for name, parameter in model.named_parameters():
            if ".other" in name:
                parameter.normal_(std=0.3)
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains and all(".other" in name for name in trains)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert min((a - b).abs().max() for a, b in ((first, second), (both, first), (both, second))) > 1e-3
    model.merge_adapter(["default", "other"])
    assert torch.allclose(logits(model), both, rtol=1e-10, atol=1e-12)
    model.unmerge_adapter()
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model), first) and list(model.state_dict()) == names


@pytest.mark.parametrize("active", [["default"], ["default", "other"]])
def test_offloaded_experts_come_back_for_a_forward(active):
    model = peft_model()
    model.add_adapter("other", peft_config())
    model.base_model.set_adapter(active)
    expected = logits(randomised(model))
    cpu_offload(model, execution_device="cpu")
    for _ in range(2):
        assert torch.allclose(logits(model), expected, rtol=1e-10)
        held = [*experts_of(model.get_base_model()).parameters(), *model.genft_shared.parameters()]
        assert all(tensor.is_meta for tensor in held)


def test_experts_are_known_to_explain_summary_and_swap(tmp_path):
    model, other = peft_model(), peft_model()
    own = own_model(model)
    assert explain(model).splitlines()[-1] == explain(own).splitlines()[-1]
    assert trainable_summary(model)["trainable"] == trainable_summary(own)["trainable"]
    randomised(other, seed=5).save_pretrained(tmp_path)
    swap_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(other))


# --- refusals -------------------------------------------------------------------------------------------------------


def test_mixed_batches_conversion_and_tiled_ones_together_are_refused():
    model = peft_model()
    with pytest.raises(ValueError, match="adapter_names.*with adapted experts"):
        model(input_ids=tokens(), adapter_names=["default", "__base__"])
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(model, rank=8)
    model.add_adapter("tiled", peft_config(outer_activation="silu"))
    model.base_model.set_adapter(["default", "tiled"])
    with pytest.raises(ValueError, match="gate_up_proj: several adapters of stacked experts act together in the fact"):
        logits(model)


def test_experts_of_another_base_are_refused(tmp_path):
    peft_model().save_pretrained(tmp_path)
    other = mixtral()
    with torch.no_grad():
        experts_of(other).down_proj[1, 2].add_(1)
    for load in (peft.PeftModel.from_pretrained, load_adapter):
        with pytest.raises(ValueError, match="another base model: the weight of 'model.layers.1.mlp.experts.down_proj"):
            load(other, tmp_path)


WRONG = {
    "nothing": (
        dict(target_parameters=["experts.up"]),
        "target_parameters matched nothing: experts.up.*experts.gate_up_proj",
    ),
    "router": (dict(target_parameters=["gate.weight"]), "is a router"),
    "second": (
        dict(target_parameters=[*TARGETS, "self_attn.q_proj.weight"]),
        "no experts class of transformers' interface",
    ),
    "after the experts": (dict(fused_blocks={"qkv": (3, (0,))}), r"fused_blocks\['qkv'\] names no target"),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_is_as_it_was_after_parameters_that_cannot_be_adapted(adapted, changes, message):
    model = peft_model() if adapted else mixtral()
    expected, names = logits(model), list(model.state_dict())
    with pytest.raises((TypeError, ValueError), match=message):
        if adapted:
            model.add_adapter("other", peft_config(**changes))
        else:
            peft.get_peft_model(model, peft_config(**changes))
    assert list(model.state_dict()) == names and torch.equal(logits(model), expected)
    assert any(isinstance(module, AdapterExperts) for module in model.modules()) == adapted


# --- transformers' own functions --------------------------------------------------------------------------------------


def test_models_of_transformers_add_save_and_load_experts(tmp_path, monkeypatch):
    monkeypatch.setattr(of_transformers, "MIN_PEFT_VERSION", "0.21.0")  # 5.24 asks for one that is not there yet
    model = mixtral()
    model.add_adapter(peft_config())
    randomised(model).save_pretrained(tmp_path)
    loaded = mixtral()
    loaded.load_adapter(tmp_path)
    assert torch.equal(logits(loaded), logits(model)) and not torch.allclose(logits(model), logits(mixtral()))
    assert torch.equal(logits(load_adapter(mixtral(), tmp_path).eval()), logits(model))
