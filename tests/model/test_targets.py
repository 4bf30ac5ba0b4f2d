"""Which layers a configuration chooses, and what is said about those that cannot be adapted."""

import importlib
import inspect
import time

import pytest
import torch
from torch import nn
from transformers import WavLMConfig, WavLMForSequenceClassification

from genft_kernels import GenFTConfig, apply_genft, remove_genft
from genft_kernels.adapt import find_plan
from genft_kernels.matching import full_matches
from genft_kernels.targets import READ_UNCALLED, find_modules_to_save, find_targets
from tests.helpers.tiny_models import Encoder, FusedEncoder, GroupedQueryBlock, TiedModel, randomise, snapshot

ALL_LINEARS = r"layers\.\d+\.(attention\.\w+|dense)"


def config(**settings) -> GenFTConfig:
    return GenFTConfig(**{"shared_dim": 2, "specific_dim": 1, **settings})


def names(model, **settings) -> list[str]:
    return [target.name for target in find_targets(model, config(**settings), full_matches)]


def test_query_and_value_are_targets_by_default():
    assert names(Encoder(1)) == ["layers.0.attention.query", "layers.0.attention.value"]
    assert names(GroupedQueryBlock()) == ["q_proj", "v_proj"]


def test_list_of_targets_holds_paths_or_their_dotted_ends():
    expected = ["layers.0.attention.key", "layers.1.attention.key", "layers.1.dense"]
    assert names(Encoder(), target_modules=["key", "layers.1.dense"]) == expected
    assert names(Encoder(), target_modules=["attention.key"]) == expected[:2]
    with pytest.raises(ValueError, match="matched nothing"):  # an end, but not at a dot
        names(Encoder(), target_modules=["uery"])
    with pytest.raises(ValueError, match="matched nothing"):  # a regular expression is not for lists
        names(Encoder(), target_modules=[ALL_LINEARS])


def test_string_is_a_regular_expression_for_whole_paths():
    assert len(names(Encoder(), target_modules=ALL_LINEARS)) == 8
    assert names(Encoder(), target_modules=r".*\.dense") == ["layers.0.dense", "layers.1.dense"]
    with pytest.raises(ValueError, match="matched nothing"):
        names(Encoder(), target_modules="dense")


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(target_modules=["query", "valeu"]), "target_modules: 'valeu' matches no module.*key .2., query"),
        (dict(target_modules=["query"], exclude_modules=["layers.7"]), "exclude_modules: 'layers.7' matches no module"),
        (
            dict(target_modules=["query"], exclude_modules="query"),
            r"exclude_modules: 'query' \(.*write \['query'\]\) mat",
        ),
        (
            dict(target_modules=["query"], exclude_modules="all-linear"),
            "exclude_modules: 'all-linear' matches no module",
        ),
    ],
)
def test_name_that_matches_nothing_is_not_passed_over(settings, message):
    with pytest.warns(UserWarning, match=message) as caught:
        found = find_plan(Encoder(), config(**settings)).names
    assert len(caught) == 1
    assert found == ["layers.0.attention.query", "layers.1.attention.query"]


def test_plain_name_that_is_no_list_is_told():
    with pytest.raises(ValueError, match=r"matched nothing: query \(.*for a name write \['query'\]\)"):
        names(Encoder(), target_modules="query")


def test_configuration_must_be_one():
    with pytest.raises(TypeError, match="config must be a GenFTConfig, got dict"):
        apply_genft(Encoder(), {"target_modules": ["query"]})


def test_all_linear_layers_are_adapted_but_for_heads():
    everywhere = [*names(Encoder(), target_modules=ALL_LINEARS), "classifier.1"]
    assert names(Encoder(), target_modules="all-linear") == everywhere
    assert names(Encoder(), target_modules="all-linear", modules_to_save=["classifier"]) == everywhere[:-1]
    assert names(Encoder(1), target_modules="all-linear", exclude_modules=["dense", "key", "query", "1"]) == [
        "layers.0.attention.value"
    ]
    model = TiedModel()
    model.get_output_embeddings = lambda: model.head  # as transformers models have it
    (target,) = find_targets(model, config(target_modules="all-linear"), full_matches)
    assert target.names == ("first", "second")
    with pytest.raises(ValueError, match="matched nothing: 'all-linear'.*linear layers are: none"):
        names(nn.Sequential(nn.ReLU()), target_modules="all-linear")
    with pytest.raises(
        TypeError, match="target module '0': weight has dtype torch.int8.*exclude_modules leaves"
    ):  # not left out in silence
        names(nn.Sequential(int8_linear()), target_modules="all-linear")


@pytest.mark.parametrize("excluded", [["layers.0.attention.query", "value"], r".*0.*query|.*value"], ids=type)
def test_excluded_modules_are_left_out(excluded):
    assert names(Encoder(), exclude_modules=excluded) == ["layers.1.attention.query"]


def test_targets_that_match_nothing_list_what_could_be_matched():
    with pytest.raises(ValueError) as error:
        names(Encoder(), target_modules=["q_proj", "v_proj"])
    assert "q_proj, v_proj" in str(error.value)
    assert "1 (1), dense (2), key (2), query (2), value (2)" in str(error.value)
    with pytest.raises(ValueError, match=r"exclude_modules='\.\*'"):
        names(Encoder(), exclude_modules=".*")
    with pytest.raises(ValueError, match="linear layers are: none"):
        names(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="the model itself"):
        names(nn.Linear(8, 8))


def test_linear_under_two_names_is_one_target():
    (target,) = find_targets(TiedModel(), config(target_modules=["first", "second"]), full_matches)
    assert target.names == ("first", "second")


def test_fused_blocks_are_targets_without_being_named_twice():
    (target,) = find_targets(FusedEncoder(), config(fused_blocks={"qkv": (3, (0, 2))}), full_matches)
    assert (target.name, target.blocks) == ("qkv", (3, (0, 2)))
    with pytest.raises(ValueError, match=r"fused_blocks\['proj'\].*targets are qkv"):
        names(FusedEncoder(), target_modules=["qkv"], fused_blocks={"proj": (2, (0,))})
    with pytest.raises(ValueError, match="'qkv'.*24 rows cannot be cut into 5"):
        apply_genft(FusedEncoder(), config(fused_blocks={"qkv": (5, (0,))}))


@pytest.mark.parametrize("order", [list, reversed])
def test_the_longest_entry_that_names_a_layer_has_its_blocks(order):
    entries = {"qkv": (3, (0, 2)), "1.qkv": (3, (0,))}
    blocks = {entry: entries[entry] for entry in order(entries)}
    model = nn.Sequential(FusedEncoder(), FusedEncoder())
    first, second = find_targets(model, config(fused_blocks=blocks), full_matches)
    assert (first.blocks, second.blocks) == ((3, (0, 2)), (3, (0,)))
    (target,) = find_targets(model, config(fused_blocks=blocks, target_modules=["1.qkv"]), full_matches)
    assert target.blocks == (3, (0,))


def test_modules_to_save_are_found_by_their_ends():
    settings = config(modules_to_save=["classifier", "norm"])
    targets = find_targets(Encoder(), settings, full_matches)
    assert find_modules_to_save(Encoder(), settings, targets) == ["classifier", "layers.0.norm", "layers.1.norm"]


@pytest.mark.parametrize(
    "chosen, message",
    [
        (["head"], "'head' matches no module"),
        (["layers.0"], "'layers.0' contains 'layers.0.attention.query'"),
        (["layers.1.attention.query"], "contains 'layers.1.attention.query'"),
        (["classifier", "classifier.1"], "'classifier' contains 'classifier.1'"),
    ],
)
def test_modules_to_save_must_exist_and_not_overlap(chosen, message):
    with pytest.raises(ValueError, match=f"modules_to_save: .*{message}"):
        apply_genft(Encoder(), config(modules_to_save=chosen))


def test_saved_modules_that_were_one_module_stay_one():
    model = nn.ModuleDict({"query": nn.Linear(8, 8), "head": nn.Linear(8, 3)})
    model["tail"] = model["head"].requires_grad_(False)
    before = snapshot(model)
    apply_genft(model, config(modules_to_save=["head", "tail"]))
    assert model["head"] is model["tail"] and model["head"].weight.requires_grad
    remove_genft(model)
    assert snapshot(model) == before


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def int8_linear():
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    return linear


UNSUPPORTED = {
    "container": (lambda: nn.Sequential(nn.Linear(8, 8)), TypeError, "Sequential cannot be adapted"),
    "convolution": (lambda: nn.Conv1d(8, 8, 1), TypeError, "Conv1d cannot be adapted"),
    "own-forward": (lambda: OwnForward(8, 8), TypeError, "OwnForward cannot be adapted"),
    "int8": (int8_linear, TypeError, "int8: quantised weights are not supported"),
    "meta": (lambda: nn.Linear(8, 8, device="meta"), ValueError, "meta device"),
    "weight-norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), TypeError, "computed"),
    "lazy": (lambda: nn.LazyLinear(8), ValueError, "uninitialized"),
}


@pytest.mark.parametrize("make, error, message", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_module_that_cannot_be_adapted_is_named_and_left_alone(make, error, message):
    model = nn.ModuleDict({"query": nn.Linear(8, 8), "value": make()})
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(error, match=f"target module 'value': .*{message}"):
        apply_genft(model, config())
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert classes == [type(module) for module in model.modules()]


def test_output_projection_of_multihead_attention_cannot_be_adapted():
    # Its weight is read without calling its forward, so an update would be ignored.
    model = nn.TransformerEncoderLayer(8, 2, 16)
    before = snapshot(model)
    with pytest.raises(TypeError, match="'self_attn.out_proj': NonDynamicallyQuantizableLinear"):
        apply_genft(model, config(target_modules=["linear1", "out_proj"]))
    assert snapshot(model) == before
    with pytest.raises(ValueError, match=r"linear layers are: linear1 \(1\), linear2 \(1\)$"):
        apply_genft(model, config())


def test_reader_of_a_weight_that_does_not_call_the_layer_is_refused():
    x, settings = torch.randn(2, 3, 8), config(target_modules=["linear1", "linear2"])
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    with pytest.raises(TypeError, match=r"'layers.0.linear1': TransformerEncoderLayer reads.*set_fastpath_enabled"):
        apply_genft(model, settings)
    before = model(x)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        randomise(apply_genft(model, settings))
        assert not torch.allclose(model(x), before, atol=1e-3)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("kind", READ_UNCALLED)
def test_list_of_readers_is_true_of_transformers(kind):
    modules = dict(WavLM="wavlm", Falcon="falcon_mamba", FalconH1="falcon_h1", Jamba="jamba", Zamba2="zamba2")
    modules |= dict(Mamba="mamba", Mamba2="mamba2", Bamba="bamba", NemotronH="nemotron_h")
    modules |= dict(GraniteMoeHybrid="granitemoehybrid", MobileBert="mobilebert")
    prefix = max((name for name in modules if kind.startswith(name)), key=len)
    module = importlib.import_module(f"transformers.models.{modules[prefix]}.modeling_{modules[prefix]}")
    source = inspect.getsource(getattr(module, kind))
    assert all(f"self.{name}.weight" in source for name in READ_UNCALLED[kind])


def test_transformers_reader_is_refused():
    settings = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    model = WavLMForSequenceClassification(WavLMConfig(conv_dim=(8,), conv_kernel=(3,), conv_stride=(2,), **settings))
    with pytest.raises(TypeError, match="layers.0.attention.v_proj': WavLMAttention reads its weight"):
        apply_genft(model, config())


def test_bare_sequential_goes_on_working():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    x = torch.randn(3, 8)
    expected = model(x)
    apply_genft(model, GenFTConfig(shared_dim=2, specific_dim=1, target_modules=["0", "2"], zero_delta=True))
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert model.genft_generators["8x8"].row_up.grad.abs().sum() > 0


def test_thousands_of_layers_take_seconds():
    model = nn.ModuleList(nn.ModuleDict({"query": nn.Linear(2, 2), "value": nn.Linear(2, 2)}) for _ in range(3000))
    started = time.monotonic()
    found = find_targets(model, config(target_modules="all-linear", modules_to_save=["0.query"]), full_matches)
    assert len(find_modules_to_save(model, config(modules_to_save=["0.query"]), found)) == 1
    assert (
        len(find_targets(model, config(target_modules=[target.name for target in found]), full_matches))
        == len(found)
        == 5999
    )
    assert time.monotonic() - started < 10  # one second; in quadratic time it would be two minutes
