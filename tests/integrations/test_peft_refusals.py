"""Settings of the PEFT tuner, and its refusals: clear errors, and a model that is as it was."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

from genft_kernels import (
    GenFTConfig,
    accumulate,
    apply_genft,
    disabled,
    explain,
    export_lora,
    fidelity_report,
    load_adapter,
    merge,
    parameter_groups,
    refresh,
    remove_genft,
    save_adapter,
    set_backend,
    trainable_summary,
    tune,
    unmerge,
)
from tests.helpers.tiny_models import Encoder, FusedEncoder, TiedModel, snapshot, tokens

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from genft_kernels.integrations.peft import PeftGenFTConfig  # noqa: E402
from tests.helpers.peft_models import (  # noqa: E402
    SMALL,
    base,
    own_model,
    peft_config,
    peft_model,
    updates,
    with_second_adapter,
)


def test_a_model_on_the_meta_device_is_named(tmp_path):
    model = peft_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'layers.0.attention.query' is on the meta device"):
        peft.PeftModel.from_pretrained(base().to("meta"), tmp_path)
    with pytest.raises(ValueError, match="weight is on the meta device"):
        model.to("meta")(tokens().to("meta"))


@pytest.mark.parametrize("config", [PeftGenFTConfig(preset="fast"), peft.LoraConfig()], ids=["genft", "lora"])
def test_configurations_of_peft_are_sent_there(config):
    with pytest.raises(TypeError, match=f"got {type(config).__name__}, which is for PEFT: peft.get_peft_model"):
        apply_genft(base(), config)


def test_a_configuration_of_apply_genft_is_told_from_one_of_peft():
    config = GenFTConfig(**SMALL, target_modules=["query"])
    with pytest.raises(AttributeError, match="for apply_genft: get_peft_model takes .*PeftGenFTConfig"):
        peft.get_peft_model(base(), config)
    with pytest.raises(AttributeError, match="'GenFTConfig' object has no attribute 'rank'"):
        config.rank  # noqa: B018
    assert not hasattr(config, "base_model_name_or_path")
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == dataclasses.replace(config) == config


OWN = {
    "apply_genft": lambda model, folder: apply_genft(model, GenFTConfig(**SMALL, target_modules=["dense"])),
    "remove_genft": lambda model, folder: remove_genft(model),
    "merge": lambda model, folder: merge(model),
    "unmerge": lambda model, folder: unmerge(model),
    "disabled": lambda model, folder: disabled(model).__enter__(),
    "save_adapter": save_adapter,
    "load_adapter": load_adapter,
    "export_lora": export_lora,
    "fidelity_report": lambda model, folder: fidelity_report(model, tokens()),
}


@pytest.mark.parametrize("function", OWN.values(), ids=OWN)
def test_functions_for_models_of_apply_genft_name_those_of_peft(function, tmp_path):
    model = peft_model()
    model.save_pretrained(tmp_path)
    before = snapshot(model)
    with pytest.raises(
        RuntimeError, match="one of PEFT's.*save_pretrained, merge_adapter.*load_adapter.base, directory"
    ):
        function(model, tmp_path)
    assert snapshot(model) == before


def test_the_other_functions_take_both_kinds():
    trained = []
    for model in (peft_model(), own_model(peft_model())):
        assert refresh(set_backend(model, "auto")) is model and tune(model, seconds=0) == []
        with accumulate(model):
            model(tokens()).sum().backward()
        groups = parameter_groups(model, 1e-3)
        assert all(parameter.grad is not None for group in groups for parameter in group["params"])
        shapes = {group["name"]: sorted(parameter.shape for parameter in group["params"]) for group in groups}
        trained.append((shapes, trainable_summary(model), explain(model)))
    assert trained[0] == trained[1]


def test_a_model_that_compile_has_wrapped_is_refused():
    with pytest.raises(TypeError, match="adapt the model first and compile it then"):
        peft.get_peft_model(torch.compile(base()), peft_config())


def test_layers_of_another_adapter_are_named():
    model = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["query"])).base_model.model
    with pytest.raises(TypeError, match=r"peft\.tuners\.lora\.layer\.Linear cannot be adapted.*merge and unload"):
        apply_genft(model, GenFTConfig(target_modules=["query"]))


# --- configuration --------------------------------------------------------------------------------------------------


def test_every_setting_has_its_field():
    here = {field.name for field in dataclasses.fields(PeftGenFTConfig)}
    assert {field.name for field in dataclasses.fields(GenFTConfig)} <= here
    assert peft_config(bias=True).native().bias and PeftGenFTConfig().native() == GenFTConfig()


def test_settings_of_other_methods_are_told_what_they_are_called_here():
    with pytest.raises(TypeError, match="PeftGenFTConfig got an unexpected keyword argument 'r': the rank is"):
        PeftGenFTConfig(r=8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'shared_dims': did you mean shared_dim?"):
        PeftGenFTConfig(shared_dims=8)
    with pytest.raises(ValueError, match="modules_to_save must be a list of names, got 'head'"):
        PeftGenFTConfig(modules_to_save="head")


def test_preset_gives_what_is_not_given():
    config = PeftGenFTConfig(preset="glue", specific_dim=3)
    assert config.native() == dataclasses.replace(GenFTConfig.preset("glue"), specific_dim=3)
    config = PeftGenFTConfig(preset="fast", shared_dim=1, target_modules=["query", "value"])
    assert config.native() == GenFTConfig.preset("fast", shared_dim=1)
    assert torch.equal(peft.get_peft_model(base(), config).eval()(tokens()), base()(tokens()))


def test_warning_of_the_settings_is_given_once():
    with pytest.warns(UserWarning, match="specific units can never train") as caught:
        peft.get_peft_model(base(), peft_config(preset="vtab"))
    assert len(caught) == 1


BAD = {
    "preset": (dict(preset="best"), "preset must be one of"),
    "setting": (dict(dropout=1.5), "dropout must be"),
    "bias": (dict(bias="lora_only"), "bias must be one of none, all, genft_only"),
    "expert_specific": (dict(expert_specific="all"), "expert_specific must be"),
    "pattern": (dict(layers_pattern="layers"), "only with layers_to_transform"),
}


@pytest.mark.parametrize("given, message", BAD.values(), ids=BAD)
def test_bad_configurations_name_the_field(given, message):
    with pytest.raises(ValueError, match=message):
        PeftGenFTConfig(**given)


def test_layers_to_transform_chooseslayers_of():
    model = peft_model(lambda: nn.Sequential(Encoder()), layers_to_transform=[1])
    assert sorted(updates(model)) == [f"base_model.model.0.layers.1.attention.{name}" for name in ("query", "value")]


# --- refusals -------------------------------------------------------------------------------------------------------


class Uncalled(nn.Module):
    """As transformers' of this name, which reads the weight of its dense layer without calling it."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)


Uncalled.__name__ = "MobileBertLMPredictionHead"


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


UNSUPPORTED = {
    "one-module-twice": (lambda: TiedModel(), "first", ValueError, "'first' and 'second' are one module"),
    "weight-read": (lambda: nn.Sequential(Uncalled()), "dense", TypeError, "reads its weight without calling it"),
    "own-forward": (lambda: nn.Sequential(Own(8, 8)), "0", TypeError, "'0' is not supported. .*Own cannot be adapted"),
    "embedding": (Encoder, "embedding", TypeError, "'embedding' is not supported. .*Embedding cannot"),
}


@pytest.mark.parametrize("make, target, kind, message", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_modules_are_named(make, target, kind, message):
    with pytest.raises(kind, match=message):
        peft.get_peft_model(make(), peft_config(target_modules=[target]))


def test_fused_blocks_that_name_no_target_are_refused():
    frozen = base(FusedEncoder)
    with pytest.raises(ValueError, match=r"fused_blocks\['qkv'\] names no target module"):
        peft.get_peft_model(frozen, peft_config(target_modules=["proj"], fused_blocks={"qkv": (3, (0, 2))}))
    assert type(frozen.proj) is nn.Linear


def test_updates_of_different_blocks_do_not_act_together():
    model = peft_model(FusedEncoder, target_modules=["qkv"], fused_blocks={"qkv": (3, (0, 2))})
    model.add_adapter("other", peft_config(target_modules=["qkv"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"different blocks.*\[0, 2\] of 3.*\[0\] of 1"):
        model(tokens())


def test_a_failed_adapter_leaves_nothing_behind():
    model = peft_model()
    answer, names = model(tokens()), list(model.state_dict())
    with pytest.raises(ValueError, match="not found in the base model"):
        model.add_adapter("other", peft_config(target_modules=["nowhere"]))
    assert list(model.state_dict()) == names and "other" not in model.base_model._generators
    assert torch.equal(model(tokens()), answer)


def test_a_model_is_as_it_was_after_a_layer_that_cannot_be_adapted():
    frozen = base()
    expected, before = frozen(tokens()), {name: id(module) for name, module in frozen.named_modules()}
    trains = {name: parameter.requires_grad for name, parameter in frozen.named_parameters()}
    for options in (dict(target_modules=["query", "embedding"]), dict(fused_blocks={"value": (3, (0,))})):
        with pytest.raises((TypeError, ValueError), match="Embedding cannot be adapted|cannot be cut into 3"):
            peft.get_peft_model(frozen, peft_config(**{"target_modules": ["query", "dense", "value"], **options}))
        assert {name: id(module) for name, module in frozen.named_modules()} == before
        assert {name: parameter.requires_grad for name, parameter in frozen.named_parameters()} == trains
    assert torch.equal(frozen(tokens()), expected)
    model = peft_model()
    answer, names = model(tokens()), list(model.state_dict())
    with pytest.raises(TypeError, match="Embedding cannot be adapted"):
        model.add_adapter("other", peft_config(target_modules=["query", "dense", "embedding"]))
    assert list(model.state_dict()) == names and torch.equal(model(tokens()), answer)


def test_weighted_sums_of_adapters_are_refused():
    model = with_second_adapter(peft_model())
    with pytest.raises(NotImplementedError, match="no weighted sums of GenFT adapters"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")


def test_small_settings_are_those_of_the_helpers():
    assert peft_config().native() == GenFTConfig(**SMALL)
