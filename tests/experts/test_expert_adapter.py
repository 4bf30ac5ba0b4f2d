"""Stacked experts are as adapted layers are: undone exactly, merged, disabled, saved, accumulated, ..."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from torch import nn

from genft_kernels import (
    GenFTConfig,
    accumulate,
    apply_genft,
    disabled,
    explain,
    load_adapter,
    merge,
    parameter_groups,
    remove_genft,
    save_adapter,
    set_backend,
    trainable_summary,
    unmerge,
)
from tests.helpers.expert_models import (
    EXPERTS,
    MODELS,
    TARGETS,
    answer,
    experts_of,
    gpt_oss,
    materialised,
    mixtral,
    qwen3_moe,
    routed,
    settings,
    tokens,
    trained,
)
from tests.helpers.tiny_models import snapshot


def gradients(model):
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_same(found, wanted, tolerance=1e-12):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_remove_undoes_exactly(make):
    model = make()
    before = snapshot(model)
    y = answer(model, tokens())
    apply_genft(model, settings(target_modules=["o_proj"]))
    names = [name for name in before["keys"] if "experts" in name]
    assert [name for name in model.state_dict() if name in names] == names
    assert not torch.equal(answer(model, tokens()), y)
    merge(model)
    remove_genft(model)
    assert snapshot(model) == before
    assert torch.equal(answer(model, tokens()), y)


def test_only_the_adapter_trains_and_the_router_stays_frozen():
    model = apply_genft(mixtral(), settings())
    names = set(trained(model))
    assert all("_update." in name or name.startswith("genft_generators.") for name in names)
    assert len([name for name in names if "_update." in name]) == 2 * 2 * 4


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (["gate.weight"], TypeError, r"mlp\.gate\.weight.*MixtralTopKRouter is a router, which stays frozen"),
        (["q_proj.weight"], TypeError, r"Linear is no experts class of transformers' interface"),
        (["experts.gate_proj"], ValueError, r"matched nothing: experts\.gate_proj\. .*experts\.down_proj"),
        (["experts.down_proj", "nothing"], ValueError, "matched nothing: nothing"),
        ("experts.down_proj", ValueError, r"matched nothing: experts.down_proj \(.*write \['experts.down_proj'\]\)"),
    ],
)
def test_parameters_that_are_no_stack_are_refused_by_name(targets, error, message):
    model = mixtral()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        apply_genft(model, settings(target_parameters=targets))
    assert snapshot(model) == before


def test_biases_of_experts_stay_frozen():
    with pytest.raises(TypeError, match="gate_up_proj_bias.*GptOssExperts has experts' weights in gate_up_proj, down"):
        apply_genft(gpt_oss(), settings(target_parameters=["experts.gate_up_proj_bias"]))


class OwnExperts(nn.Module):
    """Looks like those of transformers, and computes something else."""

    has_gate, is_transposed, is_concatenated = True, False, True

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(EXPERTS, 48, 16))

    def forward(self, x):
        return x


def test_unknown_class_of_experts_is_refused_by_name():
    model = nn.ModuleDict({"experts": OwnExperts()})
    with pytest.raises(TypeError, match="target parameter 'experts.gate_up_proj': OwnExperts is no experts class"):
        apply_genft(model, settings(target_parameters=["experts.gate_up_proj"]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p: p.to("meta"), ValueError, "meta device"),
        (lambda p: p.detach().to(torch.int8), TypeError, "quantised experts are not supported"),
        (lambda p: p.detach()[0], ValueError, r"must be \[experts, out, in\]"),
    ],
)
def test_stack_that_cannot_be_adapted_is_refused_by_name(change, error, message):
    model = mixtral()
    experts = experts_of(model)
    experts._parameters["down_proj"] = nn.Parameter(change(experts.down_proj), requires_grad=False)
    with pytest.raises(error, match=f"model.layers.1.mlp.experts.down_proj.*{message}"):
        apply_genft(model, settings())


def test_a_layer_is_left_out_by_exclude_modules():
    model = apply_genft(mixtral(), settings(exclude_modules=["layers.0.mlp.experts"]))
    assert [name for name, _ in model.named_modules() if name.endswith("_update")] == [
        f"model.layers.1.mlp.experts.{name}_update" for name in ("gate_up_proj", "down_proj")
    ]


def test_regular_expression_of_whole_names():
    model = apply_genft(mixtral(), settings(target_parameters=r".*\.1\.mlp\.experts\.down_proj"))
    assert list(experts_of(model).updates) == ["down_proj"]
    assert not hasattr(model.model.layers[0].mlp.experts, "updates")


def test_config_survives_json_and_names_bad_values():
    config = settings(expert_specific="layer")
    assert GenFTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="expert_specific must be one of expert, layer"):
        settings(expert_specific="all")
    with pytest.raises(ValueError, match="target_parameters must be"):
        settings(target_parameters=[])


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_merged_model_answers_the_same_and_unmerging_gives_the_very_weights_back(make):
    model = apply_genft(make(), settings())
    experts = experts_of(model)
    weights = {name: getattr(experts, name) for name in experts.updates}
    bits = {name: weight.clone() for name, weight in weights.items()}
    wanted, updated = answer(model, tokens()), materialised(model)
    merge(model)
    for name, weight in updated.items():
        torch.testing.assert_close(model.get_parameter(name), weight.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(answer(model, tokens()), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="merged"):
        merge(model)
    with pytest.raises(RuntimeError, match="merged experts do not train"):
        answer(model.train(), tokens())
    model.eval()
    unmerge(model)
    for name, weight in weights.items():
        assert getattr(experts, name) is weight
        assert torch.equal(weight, bits[name])
    assert torch.equal(answer(model, tokens()), wanted)


def test_merged_weights_have_the_models_dtype_and_its_frozen_ones_move_with_it():
    model = merge(apply_genft(mixtral(), settings())).to(torch.bfloat16)
    assert experts_of(model).updates["down_proj"].stored_weight.dtype == torch.bfloat16
    assert unmerge(model) is model
    assert experts_of(model).down_proj.dtype == torch.bfloat16


def test_state_of_a_merged_model_is_refused():
    model = merge(apply_genft(mixtral(), settings()))
    other = apply_genft(mixtral(), settings())
    before = other.model.layers[1].mlp.experts.down_proj.clone()
    with pytest.raises(RuntimeError, match=r"holds 'model.layers.1.mlp.experts' merged"):
        other.load_state_dict(model.state_dict())
    assert torch.equal(other.model.layers[1].mlp.experts.down_proj, before)


def test_disabled_is_the_frozen_model_bit_by_bit():
    plain, model = mixtral(), apply_genft(mixtral(), settings())
    with disabled(model):
        assert torch.equal(answer(model, tokens()), answer(plain, tokens()))
    assert not torch.equal(answer(model, tokens()), answer(plain, tokens()))


@pytest.mark.parametrize("target", [TARGETS, TARGETS[:1]])
def test_disabled_is_the_frozen_model_while_it_is_merged(target):
    plain, model = mixtral(), merge(apply_genft(mixtral(), settings(target_parameters=target)))
    experts = experts_of(model)
    with disabled(model):
        assert torch.equal(answer(model, tokens()), answer(plain, tokens()))
    experts.updates["gate_up_proj"].enabled = False
    if len(target) == 2:  # one projection computes with an update, the other without
        experts.updates["down_proj"].unmerge()
        found = experts(*routed())
        experts.updates["gate_up_proj"].unmerge()
        torch.testing.assert_close(found, experts(*routed()))


def test_hooks_of_the_original_run_once():
    model, calls = mixtral(), []
    experts_of(model).register_forward_hook(lambda module, args, output: calls.append(module))
    apply_genft(model, settings())
    answer(model, tokens())
    with disabled(model):
        answer(model, tokens())
    assert calls == [experts_of(model)] * 2


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, gpt_oss])
def test_keep_update_leaves_a_plain_model(make):
    model, names = make(), list(make().state_dict())
    kind = type(experts_of(model))
    apply_genft(model, settings())
    wanted = answer(model, tokens())
    remove_genft(model, keep_update=True)
    assert list(model.state_dict()) == names
    assert type(experts_of(model)) is kind
    torch.testing.assert_close(answer(model, tokens()), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("expert_specific", ["expert", "layer"])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_saved_adapter_is_loaded(adapted, expert_specific, tmp_path):
    config = settings(expert_specific=expert_specific, target_modules=["q_proj"])
    model = apply_genft(gpt_oss(), config)
    save_adapter(model, tmp_path)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    name = "model.layers.1.mlp.experts.down_proj_update"
    assert described["fingerprints"][name]["shape"] == [EXPERTS * 24, 16]
    fresh = gpt_oss()
    if adapted:
        torch.manual_seed(8)
        apply_genft(fresh, config)
    load_adapter(fresh, tmp_path)
    for (name, mine), theirs in zip(trained(model).items(), trained(fresh).values(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    torch.testing.assert_close(answer(fresh, tokens()), answer(model, tokens()))


def test_adapter_of_another_base_is_refused(tmp_path):
    save_adapter(apply_genft(mixtral(), settings()), tmp_path)
    other = mixtral()
    with torch.no_grad():
        experts_of(other).down_proj[3] *= 1.5
    before = snapshot(other)
    with pytest.raises(ValueError, match="another base model: the weight of 'model.layers.1.mlp.experts.down_proj_up"):
        load_adapter(other, tmp_path)
    assert snapshot(other) == before


def test_accumulated_gradients_are_those_of_the_passes_alone():
    model = apply_genft(mixtral(), settings())
    batches = [tokens(), tokens(1, 5)]
    for batch in batches:
        answer(model, batch).square().sum().backward()
    wanted = gradients(model)
    generators = list(model.genft_generators.values())
    before = [generator.group.generations for generator in generators]
    with accumulate(model):
        for batch in batches:
            answer(model, batch).square().sum().backward()
    assert_same(gradients(model), wanted, 1e-10)
    assert [g.group.generations - n for g, n in zip(generators, before, strict=True)] == [1, 1]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_gradients_are_the_same(reentrant, dropout):
    model = apply_genft(mixtral(), settings(dropout=dropout)).train()
    model.enable_input_require_grads()
    torch.manual_seed(4)
    answer(model, tokens()).square().sum().backward()
    wanted = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(4)
    answer(model, tokens()).square().sum().backward()
    found = gradients(model)
    if dropout == 0:
        assert_same(found, wanted, 1e-10)
    else:  # each region draws its own masks for the column stage, and its repetition the same
        assert found.keys() == wanted.keys()
        torch.manual_seed(4)
        answer(model, tokens()).square().sum().backward()
        assert_same(gradients(model), found, 1e-12)


@pytest.mark.parametrize("form", [{}, dict(outer_activation="gelu"), dict(expert_specific="layer")], ids=str)
def test_compiled_experts_are_the_same(form):
    model = apply_genft(mixtral().float(), settings(**form))
    experts, (x, chosen, weights) = experts_of(model), routed()
    own, x, weights = trained(experts), x.float(), weights.float()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    outputs = [module(x, chosen, weights) for module in (experts, compiled)]
    torch.testing.assert_close(*outputs)
    grads = [torch.autograd.grad(y.square().sum(), list(own.values())) for y in outputs]
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_copies_are_models_of_their_own():
    model = apply_genft(mixtral(), settings())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(answer(copied, tokens()), answer(model, tokens()))
        experts = experts_of(copied)
        assert experts.original is not experts_of(model).original
        assert experts.original.down_proj is experts.down_proj
        assert experts.updates["down_proj"].experts is experts
        assert copied.genft_generators["24x16"].group.layers[0] in copied.modules()
        merge(copied)
        torch.testing.assert_close(answer(copied, tokens()), answer(model, tokens()), rtol=1e-5, atol=1e-6)


def test_functions_for_all_layers_know_experts():
    model = apply_genft(mixtral(), settings(), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer(model, tokens())  # every adapted layer is called
    assert "4 layers on cpu" in explain(model) or "2 layers on cpu" in explain(model)
    set_backend(model, "reference")
    assert experts_of(model).updates["down_proj"].backend == "reference"
    groups = {group["name"]: group["lr"] for group in parameter_groups(model, 1.0)}
    assert groups["shared 24x16"] == pytest.approx((2 * EXPERTS) ** -0.5)
    assert groups["shared 16x24"] == pytest.approx((2 * EXPERTS * 2) ** -0.5)
    assert trainable_summary(model)


def test_budget_counts_the_units_of_experts():
    with pytest.raises(ValueError, match="the smallest adapter of these 4 layers has 80"):
        GenFTConfig.for_budget(mixtral(), 10, target_parameters=TARGETS)
    config = GenFTConfig.for_budget(mixtral(), 3_500, target_parameters=TARGETS)
    model = apply_genft(mixtral(), config)
    assert 2_500 < sum(p.numel() for p in trained(model).values()) <= 3_500


def test_training_lowers_a_loss():
    model = apply_genft(mixtral().float(), settings(zero_delta=True)).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2))
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
