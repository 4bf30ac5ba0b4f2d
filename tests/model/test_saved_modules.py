"""Modules that are trained in full: what they are tied to, and what others do to them afterwards."""

import copy

import pytest
import torch
from torch import nn

from genft_kernels import (
    GenFTConfig,
    apply_genft,
    disabled,
    load_adapter,
    merge,
    remove_genft,
    save_adapter,
    trainable_summary,
)
from tests.helpers.tiny_models import Encoder, TiedModel, randomise, snapshot, tokens

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
TIED = "ignore:modules_to_save.*is tied to"


def llama(tied=True):
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=tied)).eval()


def config(**settings):
    return GenFTConfig(**{"shared_dim": 2, "specific_dim": 1, "target_modules": ["q_proj"], **settings})


def adapted(**settings):
    return apply_genft(llama(), config(modules_to_save=["lm_head"], **settings))


def ids(vocabulary=64):
    return torch.arange(10).view(2, 5) % vocabulary


def test_the_end_of_a_tie_is_told():
    with pytest.warns(UserWarning, match="'lm_head.weight' is tied to 'model.embed_tokens.weight'"):
        adapted()


def ways_to_tie(model):
    return model.tie_weights, lambda: model.tie_weights(recompute_mapping=False), model.model.tie_weights


@pytest.mark.filterwarnings(TIED)
def test_tying_again_leaves_the_trained_head_alone():
    model = adapted()
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    randomise(model)
    expected = model(ids()).logits
    for again in ways_to_tie(model):
        again()
        assert model.lm_head.weight is head and model.model.embed_tokens.weight is embedding
        assert head.requires_grad and torch.equal(model(ids()).logits, expected)


@pytest.mark.filterwarnings(TIED, "ignore:input and output embeddings are no longer tied")
def test_a_larger_vocabulary_keeps_the_trained_head():
    model = randomise(adapted())
    expected = model(ids()).logits
    model.resize_token_embeddings(72, mean_resizing=False)
    assert model.lm_head.weight.shape == (72, 32) and model.lm_head.weight.requires_grad
    assert torch.allclose(model(ids()).logits[..., :64], expected, atol=1e-6)
    assert trainable_summary(model)["modules_to_save"] == 72 * 32
    remove_genft(model, keep_update=True)
    assert torch.allclose(model(ids()).logits[..., :64], expected, atol=1e-5)


@pytest.mark.filterwarnings(TIED)
def test_a_larger_vocabulary_can_be_undone_where_the_original_grew_with_it():
    model = randomise(adapted())
    model.resize_token_embeddings(72, mean_resizing=False)
    with disabled(model):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    remove_genft(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.shape == (72, 32)


def test_an_original_that_fits_no_more_cannot_return():
    model = llama(tied=False)
    apply_genft(model, config(modules_to_save=["lm_head"]))
    model.resize_token_embeddings(72, mean_resizing=False)
    before = snapshot(model)
    for function in (remove_genft, lambda m: disabled(m).__enter__()):
        with pytest.raises(RuntimeError, match=r"'lm_head.weight' was \[64, 32\] and is \[72, 32\] now"):
            function(model)
    assert snapshot(model) == before
    remove_genft(model, keep_update=True)
    assert model(ids(72)).logits.shape[-1] == 72


@pytest.mark.filterwarnings(TIED)
@pytest.mark.parametrize("copied", [False, True])
def test_after_removal_weights_are_tied_as_ever(copied):
    plain = llama()
    before = snapshot(plain)
    apply_genft(plain, config(modules_to_save=["lm_head"]))
    model = copy.deepcopy(plain) if copied else plain
    if copied:
        model.tie_weights()
        assert model.lm_head.weight.requires_grad and model.lm_head.weight is not plain.lm_head.weight
    remove_genft(model)
    assert "tie_weights" not in vars(model) and model.lm_head.weight is model.model.embed_tokens.weight
    model.lm_head.weight = nn.Parameter(torch.zeros(64, 32))
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if not copied:
        assert snapshot(model) == before


@pytest.mark.filterwarnings("ignore:modules_to_save. 'model.embed_tokens.weight' is tied")
def test_tying_again_leaves_a_frozen_head_alone():
    model = llama()
    with torch.no_grad():
        frozen = model(ids()).logits
    apply_genft(model, config(modules_to_save=["model.embed_tokens"]))
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    randomise(model)
    expected = model(ids()).logits
    for again in ways_to_tie(model):
        again()
        assert model.lm_head.weight is head and model.model.embed_tokens.weight is embedding
        assert not head.requires_grad and torch.equal(model(ids()).logits, expected)
    with disabled(model):
        assert torch.equal(model(ids()).logits, frozen)
    model.resize_token_embeddings(72, mean_resizing=False)
    assert model.lm_head.weight.shape == (72, 32) and not model.lm_head.weight.requires_grad
    assert torch.allclose(model(ids()).logits[..., :64], expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:modules_to_save. 'embedding.weight' is tied")
def test_a_trained_module_that_is_tied_by_hand_is_told(tmp_path):
    model = apply_genft(TiedModel(), config(target_modules=["first"], modules_to_save=["embedding"]))
    model.head.weight = model.embedding.weight
    message = "'embedding.weight' is tied to 'head.weight' again, so 'head.weight' trains, too"
    with pytest.warns(UserWarning, match=message):
        trainable_summary(model)
    with pytest.raises(RuntimeError, match=message):
        save_adapter(model, tmp_path / "new")


@pytest.mark.filterwarnings(TIED)
def test_a_tie_by_hand_is_told(tmp_path):
    settings = config(target_modules=["first"], modules_to_save=["head"])
    model = apply_genft(TiedModel(), settings)
    model.head.weight = model.embedding.weight
    message = "'head.weight' is tied to 'embedding.weight' again"
    with pytest.warns(UserWarning, match=message):
        trainable_summary(model)
    with pytest.raises(RuntimeError, match=message):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.warns(UserWarning, match=message):
        model(tokens())
    other = apply_genft(TiedModel(), settings)
    other.head.weight.requires_grad_(False)  # on purpose
    trainable_summary(other)
    save_adapter(other, tmp_path)


@pytest.mark.filterwarnings(TIED)
def test_the_cure_of_a_tie_by_hand_lets_it_be_saved(tmp_path):
    base = TiedModel()
    model = apply_genft(copy.deepcopy(base), config(target_modules=["first"], modules_to_save=["head"]))
    randomise(model).embedding.weight = model.head.weight
    with pytest.raises(RuntimeError, match="make 'head.weight' a parameter of its own.*, and tie both anew after"):
        save_adapter(model, tmp_path)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    save_adapter(model, tmp_path)
    again = load_adapter(base, tmp_path)
    again.embedding.weight = again.head.weight
    with pytest.warns(UserWarning, match="again"):
        assert torch.equal(again(tokens()), model(tokens()))


@pytest.mark.parametrize("part", ["classifier", "classifier.1"])
def test_a_trained_module_that_is_held_twice_is_no_tie(part, tmp_path):
    """As wrappers for a task hold the head of a model under a name of their own."""
    base = Encoder().eval()
    model = apply_genft(copy.deepcopy(base), config(target_modules=["query"], modules_to_save=["classifier"]))
    randomise(model).scorer = model.get_submodule(part)
    trainable_summary(model)
    expected = model(tokens())
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(base, tmp_path)(tokens()), expected)


@pytest.mark.filterwarnings("ignore:adapted, but not called")
@pytest.mark.parametrize("how", ["resized", "replaced"])
def test_an_adapted_layer_that_was_replaced_is_told(how, tmp_path):
    model = apply_genft(llama(), config(target_modules=["q_proj", "lm_head"]))
    if how == "resized":
        model.resize_token_embeddings(72, mean_resizing=False)
    else:
        model.lm_head = nn.Linear(32, 72)
    for function in (trainable_summary, merge, lambda m: save_adapter(m, tmp_path / "new")):
        with pytest.raises(RuntimeError, match="the adapted layer 'lm_head' has been replaced or resized"):
            function(model)
    assert not (tmp_path / "new").exists()
    remove_genft(model)
    assert model(ids()).logits.shape[-1] == 72


def test_a_parameter_that_cannot_train_is_named():
    model = nn.ModuleDict({"query": nn.Linear(8, 8), "head": nn.Linear(8, 3)})
    model["head"].weight = nn.Parameter(torch.zeros(3, 8, dtype=torch.int8), requires_grad=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match="modules_to_save: 'head.weight' has dtype torch.int8 and cannot train"):
        apply_genft(model, config(target_modules=["query"], modules_to_save=["head"]))
    assert snapshot(model) == before
