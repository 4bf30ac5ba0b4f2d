"""The PEFT tuner: what this package's own layers answer, for any number of adapters, and clear errors for the rest."""

import copy
import cProfile
import pstats

import pytest
import torch

from genft_kernels import accumulate, explain, set_backend, trainable_summary
from tests.helpers.tiny_models import Encoder, FusedEncoder, GroupedQueryBlock, tokens

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from accelerate import cpu_offload  # noqa: E402  # PEFT needs it

from tests.helpers.peft_models import (  # noqa: E402
    TransposedEncoder,
    base,
    group_of,
    layers_of,
    own_model,
    own_names,
    peft_config,
    peft_model,
    with_second_adapter,
)

MODELS = {
    "square": (Encoder, {}),
    "tiled": (Encoder, dict(outer_activation="silu", scaling=0.5)),
    "biases-out_in": (Encoder, dict(bias=True, delta_layout="out_in", weight_ratio="rms")),
    "several-shapes": (GroupedQueryBlock, dict(target_modules=r".*_proj", exclude_modules=["k_proj"])),
    "fused": (FusedEncoder, dict(target_modules=["qkv", "proj"], fused_blocks={"qkv": (3, (0, 2))})),
    "conv1d": (TransposedEncoder, dict(target_modules=["c_attn", "c_proj"], transform="column")),
    "shared-only": (Encoder, dict(specific_dim=0)),
    "modules_to_save": (Encoder, dict(modules_to_save=["classifier"])),
}


@pytest.mark.parametrize("make, settings", MODELS.values(), ids=MODELS)
def test_tuner_answers_and_learns_as_apply_genft(make, settings):
    model = peft_model(make, **settings)
    own = own_model(model, make, **settings)
    answers = [each(tokens()) for each in (model, own)]
    assert torch.allclose(*answers, rtol=1e-12, atol=1e-12)
    for answer in answers:
        answer.square().sum().backward()
    gradients = own_names({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected = {name: p.grad for name, p in own.named_parameters() if p.requires_grad}
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("make, settings", MODELS.values(), ids=MODELS)
def test_reference_gives_second_derivatives_as_those_of_apply_genft(make, settings):
    model = peft_model(make, **settings)
    own = own_model(model, make, **settings)
    answer, penalties = model(tokens()), []
    for each in (model, own):
        assert torch.allclose(set_backend(each, "reference")(tokens()), answer, rtol=1e-12, atol=1e-12)
        trained = [parameter for parameter in each.parameters() if parameter.requires_grad]
        first = torch.autograd.grad(each(tokens()).square().sum(), trained, create_graph=True)
        penalties.append(sum(gradient.square().sum() for gradient in first))
        penalties[-1].backward()
    assert torch.allclose(*penalties, rtol=1e-10)
    gradients = own_names({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, parameter in own.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-8, atol=1e-10), name


def test_layers_of_a_shape_are_generated_together_once_a_step():
    model = peft_model().train()
    group = group_of(model)
    for step in range(3):
        model(tokens()).sum().backward()
        assert group.generations == step + 1 and len(group.layers) == 4
    with accumulate(model):
        for _ in range(3):
            model(tokens()).sum().backward()
    assert group.generations == 4


def kept_bytes(model) -> int:
    """The bytes that a forward keeps for the backward, each memory once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens()).sum()
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("settings", [{}, dict(outer_activation="silu")], ids=["factored", "tiled"])
def test_tuner_keeps_no_more_for_the_backward_than_apply_genft(settings):
    model = peft_model(**settings)
    assert kept_bytes(model) <= 1.03 * kept_bytes(own_model(model, **settings))


def test_tuner_takes_little_more_of_python_than_apply_genft():
    """The cost of a forward beside the operations, counted: calls of a layer's forward, in training."""

    def calls(layer, model):
        layer(x)
        profile = cProfile.Profile()
        model.zero_grad()
        profile.enable()
        layer(x)
        profile.disable()
        return pstats.Stats(profile).total_calls

    x = torch.randn(4, 8, dtype=torch.float64)
    model = peft_model().train()
    own = own_model(model).train()
    tuners = calls(model.base_model.model.layers[0].attention.query, model)
    assert tuners <= 1.1 * calls(own.layers[0].attention.query, own)


def test_accumulate_gives_the_gradients_of_the_same_passes():
    model = peft_model()
    for _ in range(2):
        model(tokens()).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with accumulate(model):
        for _ in range(2):
            model(tokens()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in expected)
        assert parameter.grad is None or torch.allclose(parameter.grad, expected[name], rtol=1e-9, atol=1e-12), name


def test_accumulate_leaves_layers_that_are_offloaded_alone():
    """Their weights come for a forward and go again."""
    model = peft_model()
    model(tokens()).square().sum().backward()
    expected = {name: 2 * p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for layer in layers_of(model)[:2]:
        cpu_offload(layer.base_layer, execution_device="cpu")
    with accumulate(model):
        for _ in range(2):
            model(tokens()).square().sum().backward()
    assert layers_of(model)[0].base_layer.weight.is_meta
    for name, gradient in expected.items():
        assert torch.allclose(model.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-12), name


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradients", [True, False])
def test_a_traced_model_answers_alike(gradients):
    model = peft_model()
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, (tokens(),))
        assert torch.allclose(traced(tokens(7)), model(tokens(7)), rtol=1e-12)


def test_explain_and_summary_know_the_adapters_of_a_peft_model():
    model = peft_model(modules_to_save=["classifier"])
    assert "8x8: 4 layers on cpu in one generation" in explain(model)
    summary, own = trainable_summary(model), trainable_summary(own_model(model, modules_to_save=["classifier"]))
    assert (summary["generators"], summary["specific"]) == (own["generators"], own["specific"])
    assert summary["trainable"] == own["trainable"] and summary["other"] == own["modules_to_save"]
    with pytest.raises(RuntimeError, match="no GenFT adapter"):
        explain(base())


def test_a_new_adapter_changes_nothing_but_without_init_weights():
    expected = base()(tokens())
    assert torch.equal(peft.get_peft_model(base(), peft_config()).eval()(tokens()), expected)
    assert not torch.equal(peft.get_peft_model(base(), peft_config(init_weights=False)).eval()(tokens()), expected)


# --- hooks, copies ---------------------------------------------------------------------------------------------------


def test_hooks_of_the_base_layer_see_each_answer_once():
    frozen, seen = base(), []
    frozen.layers[0].attention.query.register_forward_hook(lambda module, args, output: seen.append(output))
    model = with_second_adapter(peft.get_peft_model(frozen, peft_config(init_weights=False)).eval())
    layer = model.base_model.model.layers[0].attention.query
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    answers = [layer(x)]
    model.merge_adapter()
    answers.append(layer(x))
    model.unmerge_adapter()
    with model.disable_adapter():
        answers.append(layer(x))
    model.unload()(tokens())
    assert len(seen) == 4 and all(a is b for a, b in zip(answers, seen, strict=False))


def test_a_copy_is_independent():
    model = peft_model()
    twin = copy.deepcopy(model)
    answer = twin(tokens())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert torch.equal(twin(tokens()), answer)
    assert group_of(twin) is not group_of(model) and set(group_of(twin).layers).isdisjoint(group_of(model).layers)


@pytest.mark.parametrize("second", [{}, dict(outer_activation="silu")], ids=["factored", "tiled"])
def test_compiled_graphs_answer_alike(second):
    model = with_second_adapter(peft_model(), **second)
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.layers[0].attention.query
    x = torch.randn(4, 8, dtype=torch.float64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), layer(x), rtol=1e-10, atol=1e-12)


def test_a_new_layer_is_in_the_mode_of_the_one_it_replaces():
    model = peft.get_peft_model(base().eval(), peft_config(dropout=0.5, init_weights=False))
    assert not any(module.training for layer in layers_of(model) for module in layer.modules())
    assert torch.equal(model(tokens()), model(tokens()))


class Unseen(torch.optim.Optimizer):
    """Its kernels write where no version tells."""

    def step(self):
        pass


def test_versions_tell_of_steps_on_shared_units_alone():
    model = peft_model(specific_dim=0)
    model(tokens()).sum().backward()
    shared = [parameter for parameter in model.parameters() if parameter.grad is not None]
    before = [parameter._version for parameter in shared]
    Unseen(shared, {}).step()
    assert len(shared) == 4 and all(p._version > version for p, version in zip(shared, before, strict=True))
