"""Adapting whole models: applying, training, counting, and undoing it all exactly."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from genft_kernels import (
    GenFTConfig,
    GenFTLinear,
    apply_genft,
    disabled,
    load_adapter,
    merge,
    remove_genft,
    save_adapter,
    trainable_summary,
    unmerge,
)
from genft_kernels.units import GenFTUpdate
from tests.helpers.model_cases import FUSED, RECTANGULAR, SAVED, SHARED, adapted, config, every_model
from tests.helpers.tiny_models import (
    Encoder,
    FusedEncoder,
    GroupedQueryBlock,
    TiedModel,
    Wrapper,
    randomise,
    snapshot,
    tokens,
    train_steps,
)

# --- applying and removing ------------------------------------------------------------------------------------------


@every_model
def test_adapter_alone_trains_and_the_base_keeps_its_bits(make, settings):
    model = make()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = model.eval()(tokens())
    assert apply_genft(model, config(**settings)) is model
    assert torch.allclose(model(tokens()), expected, atol=1e-6)  # zero_delta
    saved = ("classifier", "layers.0.norm", "layers.1.norm") if "modules_to_save" in settings else ()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in base if not name.startswith(saved)} if saved else frozen == set(base)
    losses = train_steps(model.train(), 10)
    assert losses[-1] < losses[0]
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], base[name]) == (name in frozen) for name in base)
    assert all(parameters[name].grad is None for name in frozen)
    assert all(p.grad.any() for p in parameters.values() if p.requires_grad)


@every_model
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
def test_remove_genft_is_an_exact_undo(make, settings, merged):
    model = make().train()
    next(model.children()).eval()  # flags that are not all alike
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    apply_genft(model, config(**settings))
    assert snapshot(model) != before
    randomise(model)
    if merged:
        merge(model)
    assert remove_genft(model) is model
    assert snapshot(model) == before
    with pytest.raises(RuntimeError, match="no GenFT adapter"):
        remove_genft(model)
    apply_genft(model, config(**settings))  # and again


def test_modes_and_casts_of_an_adapted_model_survive_removal():
    model = adapted(settings=SAVED).double().train()
    model.classifier[0].eval()
    remove_genft(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.classifier.training and not model.classifier[0].training and model.layers[0].attention.query.training
    assert model(tokens()).dtype == torch.float64


def test_generators_are_registered_once_on_the_root():
    model = adapted(GroupedQueryBlock, RECTANGULAR)
    assert list(model.genft_generators) == ["8x8", "8x4", "8x24", "24x8"]
    keys = list(model.state_dict())
    assert [key for key in keys if "generator" in key][0] == "genft_generators.8x8.column_down"
    assert not any("generator." in key or "_original" in key for key in keys)
    assert model.q_proj.generator is model.genft_generators["8x8"]
    assert model.v_proj.generator is model.genft_generators["8x4"]
    assert "q_proj.specific_down" in keys and "v_proj.column_specific_down" in keys
    assert list(adapted(FusedEncoder, FUSED).genft_generators) == ["8x8"]


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@every_model
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copied_model_still_shares_its_generators(make, settings, copied):
    model = adapted(make, settings)
    twin = copied(model)
    assert torch.equal(twin(tokens()), model(tokens()))
    layers = [m for m in twin.modules() if isinstance(m, GenFTUpdate)]
    assert layers and {id(m.generator) for m in layers} == {id(g) for g in twin.genft_generators.values()}
    expected = model(tokens())
    randomise(twin.genft_generators, 1.0)
    assert not torch.equal(twin(tokens()), expected) and torch.equal(model(tokens()), expected)
    remove_genft(twin)
    assert list(twin.state_dict()) == list(make().state_dict())


@every_model
def test_state_dict_round_trip(make, settings):
    model, other = adapted(make, settings), adapted(make, settings)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state)
    assert torch.equal(other(tokens()), model(tokens()))
    other = adapted(make, settings)
    other.load_state_dict(state, assign=True)
    if "modules_to_save" not in settings:
        expected = remove_genft(model)(tokens())
        assert torch.equal(remove_genft(other)(tokens()), expected)


def test_apply_genft_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model, settings = Encoder(), config(**SAVED)
    before, build, calls = snapshot(model), GenFTLinear.from_linear, []

    def fails_at_the_third(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("simulated")
        return build(*args, **options)

    monkeypatch.setattr(GenFTLinear, "from_linear", fails_at_the_third)
    with pytest.raises(MemoryError):
        apply_genft(model, settings)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="backend must be one of"):
        apply_genft(model, settings, backend="cudnn")
    with pytest.raises(ValueError, match="matched nothing"):
        apply_genft(model, config(target_modules=["nothing"]))
    assert snapshot(model) == before
    block = GroupedQueryBlock()
    before = snapshot(block)
    with pytest.raises(ValueError, match="'v_proj': delta_layout='out_in' needs a square weight"):
        apply_genft(block, config(delta_layout="out_in"))
    assert snapshot(block) == before


def test_second_adapter_raises_and_changes_nothing():
    model = adapted()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="GenFT layers already"):
        apply_genft(model, config())
    with pytest.raises(RuntimeError, match="GenFT layers already"):
        apply_genft(nn.Sequential(model), config(target_modules=["classifier.1"]))
    assert snapshot(model) == before


def test_what_compile_returned_is_refused_and_nothing_changes(tmp_path):
    save_adapter(adapted(), tmp_path)
    model = Encoder()
    compiled = torch.compile(model, backend="eager")
    before = snapshot(model)
    message = "adapt the model first and compile it then, or pass model._orig_mod"
    with pytest.raises(TypeError, match=message):
        apply_genft(compiled, config())
    with pytest.raises(TypeError, match=message):
        load_adapter(compiled, tmp_path)
    assert snapshot(model) == before and not hasattr(compiled, "genft_generators")


def test_model_that_is_compiled_in_place_is_adapted():
    model = Encoder().eval()
    model.compile(backend="eager")
    before = model(tokens())
    randomise(apply_genft(model, config()))
    after = model(tokens())
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, merge(model)(tokens()))


def test_adapters_of_a_16_bit_model_are_float32():
    model = apply_genft(Encoder().bfloat16(), config())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    model.eval()(tokens()).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in trained)


# --- gradients ------------------------------------------------------------------------------------------------------


def test_layers_all_send_a_gradient_to_the_shared_generator():
    model = adapted(make=lambda: Encoder(layers=12)).train()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, GenFTLinear)}
    (generator,) = model.genft_generators.values()
    assert len(layers) == 24
    total = torch.autograd.grad(model(tokens()).square().sum(), generator.row_up)[0]
    apart = torch.zeros_like(total)
    stand_ins = {name: copy.deepcopy(layer) for name, layer in layers.items()}  # each with a generator of its own
    for name in layers:
        model.set_submodule(name, stand_ins[name])
    grads = torch.autograd.grad(model(tokens()).square().sum(), [s.generator.row_up for s in stand_ins.values()])
    for name, grad in zip(layers, grads, strict=True):
        assert grad.norm() > 1e-6 * total.norm(), name
        apart += grad
    assert torch.allclose(total, apart, rtol=1e-3, atol=1e-4 * total.abs().max().item())


def test_linear_under_two_names_is_replaced_at_both_and_the_head_stays_tied():
    model = adapted(TiedModel, SHARED)
    assert model.first is model.second and isinstance(model.first, GenFTLinear)
    assert model.head.weight is model.embedding.weight
    assert trainable_summary(model)["specific"] == (8 + 8) + 2 * (8 + 20)


def test_gpt2_conv1d_layers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = dict(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=16)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    before, plain = snapshot(model), model(tokens()).logits
    settings = dict(target_modules=["c_attn", "c_fc"], fused_blocks={"c_attn": (3, (0, 2))})
    randomise(apply_genft(model, config(**settings)))
    assert list(model.genft_generators) == ["8x8", "8x32"]
    layer = model.transformer.h[0].attn.c_attn
    delta, x = layer.delta_weight(), torch.randn(3, 8)
    assert delta.shape == (24, 8) and layer.weight.shape == (8, 24) and not delta[8:16].any()
    assert torch.allclose(layer(x), x @ (layer.weight + delta.t()) + layer.bias, atol=1e-5)
    expected = model(tokens()).logits
    assert not torch.allclose(expected, plain, atol=1e-3)
    merge(model)
    assert torch.allclose(model(tokens()).logits, expected, atol=1e-5) and layer.weight.is_contiguous()
    with disabled(model):
        assert torch.allclose(model(tokens()).logits, plain, atol=1e-6)
    remove_genft(model)
    assert snapshot(model) == before


# --- counting -------------------------------------------------------------------------------------------------------


def test_trainable_summary_counts_and_says_so():
    model = apply_genft(Encoder(), config(modules_to_save=["classifier"], bias=True))
    model.embedding.weight.requires_grad_(True)
    summary = trainable_summary(model)
    classifier, generator, specific = 8 + 8 + 3 * 8 + 3, 4 * 2 * 8 + 2 * (3 + 8), 4 * 2 * 8
    assert summary == {
        "generators": generator,
        "specific": specific,
        "modules_to_save": classifier,
        "other": 160,
        "trainable": generator + specific + classifier + 160,
        "total": generator + specific + sum(p.numel() for p in Encoder().parameters()),
    }
    share = 100 * summary["trainable"] / summary["total"]
    assert str(summary) == (
        f"trainable {summary['trainable']:,} of {summary['total']:,} parameters ({share:.3f} %): "
        f"{generator} generators, {specific} specific, {classifier} modules_to_save, 160 other"
    )
    for function in (trainable_summary, merge, unmerge, remove_genft, lambda m: disabled(m).__enter__()):
        with pytest.raises(RuntimeError, match="no GenFT adapter.*no wrapper"):
            function(Wrapper(model))


def test_layers_without_an_adapter_are_told_apart():
    by_hand = nn.Sequential(GenFTLinear(8, 8, config=GenFTConfig(shared_dim=2)))
    for model, name in ((by_hand, "0"), (adapted().layers, "0.attention.query")):
        for function in (trainable_summary, merge, unmerge, remove_genft, lambda m: save_adapter(m, "nowhere")):
            with pytest.raises(
                RuntimeError, match=f"no GenFT adapter of its own, .*'{name}'.*the whole.*by hand.*merge"
            ):
                function(model)
        with pytest.raises(RuntimeError, match=f"GenFT layers already, such as '{name}', made by hand or"):
            apply_genft(model, config())
    for model in (adapted(), Wrapper(adapted())):
        with pytest.raises(RuntimeError, match=r"GenFT layers already: call remove_genft\(model\) first"):
            apply_genft(model, config())


OFFICIAL = {
    "RoBERTa-base glue": ("glue", 12, 768, ("query", "value"), {}, 149_044),
    "ViT-B/16 vtab": ("vtab", 12, 768, ("qkv",), FUSED, 190_464),
    "LLaMA-7B llama": ("llama", 32, 4096, ("q_proj", "v_proj"), {}, 2_170_896),
}


@pytest.mark.parametrize("preset, layers, dim, names, settings, count", OFFICIAL.values(), ids=OFFICIAL)
def test_official_settings_train_the_official_number_of_parameters(preset, layers, dim, names, settings, count):
    model = nn.ModuleList()
    for _ in range(layers):
        block = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in names})
        for linear in block.values():  # of full shape, but one number in memory
            linear.weight = nn.Parameter(torch.zeros(1, 1).expand(3 * dim if "qkv" in names else dim, dim))
        model.append(block)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the specific units can never train")
        apply_genft(model, GenFTConfig.preset(preset, **settings))
    assert trainable_summary(model)["trainable"] == count
