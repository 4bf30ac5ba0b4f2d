"""Adapted experts compute what materialised updates compute, in every model and whatever implementation it has."""

import pytest
import torch

from genft_kernels import apply_genft, remove_genft
from genft_kernels.experts.update import ExpertUpdate
from genft_kernels.files.lora_experts import exact_stack
from tests.helpers.expert_models import (
    EXPERTS,
    MODELS,
    TARGETS,
    answer,
    expected,
    experts_of,
    largest_difference,
    materialised,
    mixtral,
    results,
    routed,
    settings,
    tokens,
    trained,
)

FORMS = {
    "both": {},
    "layer": dict(expert_specific="layer"),
    "column": dict(transform="column"),
    "column-rms-all": dict(transform="column", weight_ratio="rms", ratio_scope="all"),
    "row": dict(transform="row", bias=True),
    "sum": dict(transform="sum", bias=True),
    "both-bias-rms": dict(bias=True, weight_ratio="rms", scaling=0.5),
    "tiled": dict(outer_activation="leaky_relu"),
    "tiled-row": dict(outer_activation="silu", transform="row", bias=True),
    "shared alone": dict(specific_dim=0),
    "own alone": dict(shared_dim=0),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_experts_are_those_with_materialised_updates(make, form):
    model = apply_genft(make(), settings(**form))
    found = results(experts_of(model), routed(), trained(model))
    assert largest_difference(found, expected(model, routed())) < 1e-12
    assert "d x" in found and len(found) > 5


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_whole_model_is_that_with_materialised_updates_whatever_implementation_it_has(make, implementation):
    plain, model = make(), make()
    model.set_experts_implementation(implementation)
    plain.set_experts_implementation("eager")
    apply_genft(model, settings())
    own = trained(model)
    y, wanted = answer(model, tokens()), answer(plain, tokens(), materialised(model))
    # Norms of these models compute in float32.
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(logits.square().sum(), list(own.values())) for logits in (y, wanted)]
    for name, found, other in zip(own, *grads, strict=True):
        assert (found - other).norm() <= 1e-5 * other.norm(), name
    # The update is no trifle.
    assert (y - answer(plain, tokens())).norm() > 0.01 * y.norm()


def of_an_older_transformers(*missing):
    """Mixtral, whose experts lack flags that came later."""
    model = mixtral()
    for module in model.modules():
        for flag in missing:
            vars(module).pop(flag, None)
    return model


def test_flags_of_later_versions_are_not_missed():
    model = apply_genft(of_an_older_transformers("has_post_expert_norm", "has_gate"), settings())
    found = results(experts_of(model), routed(), trained(model))
    assert largest_difference(found, expected(model, routed())) < 1e-12


def test_version_that_does_not_tell_how_gate_and_up_lie_is_refused():
    with pytest.raises(TypeError, match="gate_up_proj.*does not tell how its gate and up lie: install 5.7"):
        apply_genft(of_an_older_transformers("is_concatenated"), settings())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("make", [MODELS["mixtral"], MODELS["gpt_oss"]], ids=["mixtral", "gpt_oss"])
def test_one_projection_alone(make, target):
    model = apply_genft(make(), settings(target_parameters=[target]))
    assert list(experts_of(model).updates) == [target.partition(".")[2]]
    found = results(experts_of(model), routed(), trained(model))
    assert largest_difference(found, expected(model, routed())) < 1e-12


@pytest.mark.parametrize("targets", [None, ["o_proj"]])
def test_exclusion_that_matches_nothing_is_told_once(targets):
    model = mixtral()  # libraries that this imports warn, too
    with pytest.warns(
        UserWarning, match=r"exclude_modules: 'experts' \(.*write \['experts'\]\) matches no module"
    ) as told:
        apply_genft(model, settings(target_modules=targets, exclude_modules="experts"))
    assert len(told) == 1


def test_reference_is_the_specification():
    model = apply_genft(mixtral(), settings(), backend="reference")
    found = results(experts_of(model), routed(), trained(model))
    assert largest_difference(found, expected(model, routed())) < 1e-12


def test_linear_layers_and_experts_of_one_model():
    model = apply_genft(mixtral(), settings(target_modules=["q_proj"]))
    assert set(model.genft_generators) == {"16x16", "16x24", "24x16"}
    q_proj = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(q_proj)
    replaced = materialised(model) | {f"{q_proj}.weight": layer.weight + layer.delta_weight()}
    second = model.get_submodule(q_proj.replace("0", "1"))
    replaced[f"{q_proj.replace('0', '1')}.weight"] = second.weight + second.delta_weight()
    torch.testing.assert_close(answer(model, tokens()), answer(mixtral(), tokens(), replaced), rtol=1e-5, atol=1e-6)


def test_linear_layer_of_the_experts_shape_shares_their_generator():
    """One group of matrices and of stacks."""
    config = settings(target_modules=["o_proj"], target_parameters=["experts.down_proj"])
    model = mixtral()
    model.model.layers[0].self_attn.o_proj = torch.nn.Linear(24, 16, bias=False).double()
    apply_genft(model, config)
    assert set(model.genft_generators) == {"24x16", "16x16"}
    layer = model.model.layers[0].self_attn.o_proj
    x = torch.randn(3, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ (layer.weight + layer.delta_weight()).T)
    found = results(experts_of(model), routed(), trained(model))
    assert largest_difference(found, expected(model, routed())) < 1e-12
    assert model.genft_generators["24x16"].group.generations <= 2


def test_one_generation_serves_all_experts_of_all_layers():
    model = apply_genft(mixtral(), settings())
    answer(model, tokens()).sum().backward()
    assert [generator.group.generations for generator in model.genft_generators.values()] == [1, 1]


def test_experts_that_generate_alone_or_are_exported_call_their_generator_once(monkeypatch):
    monkeypatch.setattr(ExpertUpdate, "generates_alone", lambda self: True)
    update = experts_of(apply_genft(mixtral(), settings())).updates["down_proj"]
    calls = []
    update.generator.register_forward_hook(lambda *_: calls.append("generator"))
    update.whole_factors(torch.randn(3, update.layout.in_features, dtype=update.weight.dtype))
    assert len(calls) == 1
    exact_stack("down_proj", update, None, None)
    assert len(calls) == 2


@pytest.mark.parametrize("form", [{}, dict(expert_specific="layer"), dict(specific_dim=0)])
def test_units_are_each_experts_or_the_layers(form):
    update = experts_of(apply_genft(mixtral(), settings(**form))).updates["down_proj"]
    sizes = {name: tuple(units.shape) for name, units in update.specific_parameters().items()}
    if form == dict(specific_dim=0):
        assert sizes == {}
    else:
        leading = (EXPERTS,) if form == {} else ()
        assert sizes["column_specific_down"] == (*leading, 2, 24)


def test_zero_delta_starts_at_the_frozen_model():
    plain, model = mixtral(), mixtral()
    for zero in (
        dict(zero_delta=True),
        dict(zero_delta="down", transform="column"),
        dict(zero_delta=True, transform="sum"),
    ):
        apply_genft(model, settings(**zero))
        torch.testing.assert_close(answer(model, tokens()), answer(plain, tokens()))
        remove_genft(model)


def test_units_are_drawn_as_a_layer_of_its_own_draws_them():
    """Kaiming's bound is of one expert's matrix, not of the stack."""
    update = experts_of(apply_genft(mixtral(), settings())).updates["down_proj"]
    bound = 24**-0.5
    largest = update.column_specific_down.abs().max().item()
    assert 0.8 * bound < largest <= bound


def test_experts_elsewhere_give_nothing():
    """As expert parallelism marks what another device has."""
    model = apply_genft(mixtral(), settings())
    x, chosen, weights = routed()
    kept = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    elsewhere = torch.where(kept, chosen, EXPERTS)
    experts = experts_of(model)
    found = results(experts, (x, elsewhere, weights * kept), trained(model))
    wanted = results(experts, (x, chosen, weights * kept), trained(model))
    del found["d weights"], wanted["d weights"]
    assert largest_difference(found, wanted) < 1e-12


def test_no_tokens_at_all():
    experts = experts_of(apply_genft(mixtral(), settings()))
    x, chosen, weights = (part[:0] for part in routed())
    assert experts(x, chosen, weights).shape == (0, 16)


def test_autocast_is_a_cast_by_hand():
    model = apply_genft(mixtral().float(), settings())
    x, chosen, weights = routed()
    with torch.autocast("cpu", torch.bfloat16):
        y = experts_of(model)(x.float(), chosen, weights.float())
    exact = experts_of(model.double())(x, chosen, weights)
    assert (y - exact).norm() < 0.02 * exact.norm()
    assert y.dtype == torch.float32
