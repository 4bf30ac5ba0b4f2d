"""Settings left to the model: targets by its type, its head; and settings that other methods have."""

import copy
import warnings

import pytest
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from genft_kernels import GenFTConfig, apply_genft, load_adapter, save_adapter
from genft_kernels.adapted_model import adapted_layers, adapter_state
from genft_kernels.config import QUERY_AND_VALUE_NAMES
from genft_kernels.defaults import BY_MODEL_TYPE
from genft_kernels.foreign_settings import HINTS
from genft_kernels.heads import heads, is_fresh
from genft_kernels.matching import full_matches
from genft_kernels.targets import find_targets
from tests.helpers.tiny_models import Encoder, FusedEncoder, randomise

WIDTH, HEADS = 16, 4
NAMES = dict(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=16, vocab_size=20)
GPT2 = dict(n_embd=WIDTH, n_layer=1, n_head=HEADS, n_positions=16, vocab_size=20)
T5 = dict(d_model=WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=HEADS, vocab_size=20)
SWIN = dict(embed_dim=8, depths=[1], num_heads=[2], image_size=16, window_size=2)
FALCON = dict(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, vocab_size=20, bias=True)
PHI3 = NAMES | dict(num_key_value_heads=2, pad_token_id=0)


def made(kind: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    name, task, head = kind.partition("For")
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}{task or 'Model'}{head}")(config)


WHOLE = (1, (0,))
# (model, the last names of its targets, their blocks)
MODELS = {
    "gpt2": ("GPT2", GPT2, {"c_attn"}, (3, (0, 2))),
    "gpt_bigcode": ("GPTBigCode", GPT2, {"c_attn"}, ((16, 4, 4), (0, 2))),
    "gpt_bigcode-heads": ("GPTBigCode", GPT2 | dict(multi_query=False), {"c_attn"}, WHOLE),
    "falcon": ("Falcon", FALCON, {"query_key_value"}, ((16, 4, 4), (0, 2))),
    "falcon-heads": ("Falcon", FALCON | dict(multi_query=False), {"query_key_value"}, WHOLE),
    "falcon-groups": ("Falcon", FALCON | dict(new_decoder_architecture=True), {"query_key_value"}, WHOLE),
    "t5": ("T5", T5, {"q", "v"}, WHOLE),
    "phi3": ("Phi3", PHI3, {"qkv_proj"}, ((16, 8, 8), (0, 2))),
    "gpt_neox": ("GPTNeoX", NAMES, {"query_key_value"}, WHOLE),
    "bloom": ("Bloom", dict(hidden_size=WIDTH, n_layer=1, n_head=HEADS, vocab_size=20), {"query_key_value"}, WHOLE),
    "mpt": ("Mpt", dict(d_model=WIDTH, n_heads=HEADS, n_layers=1, vocab_size=20), {"Wqkv"}, (3, (0, 2))),
    "codegen": ("CodeGen", GPT2 | dict(rotary_dim=4), {"qkv_proj"}, WHOLE),
    "deberta": ("Deberta", NAMES, {"in_proj"}, WHOLE),
    "deberta-v2": ("DebertaV2", NAMES, {"query_proj", "value_proj"}, WHOLE),
    "modernbert": ("ModernBert", NAMES | dict(pad_token_id=0, cls_token_id=1, sep_token_id=2), {"Wqkv"}, (3, (0, 2))),
    "swin": ("Swin", SWIN, {"q_proj", "v_proj"}, WHOLE),
    "vit": ("ViT", NAMES | dict(image_size=32), {"q_proj", "v_proj"}, WHOLE),
    "llama": ("Llama", NAMES, {"q_proj", "v_proj"}, WHOLE),
}  # fmt: skip


@pytest.mark.parametrize("kind, settings, names, blocks", MODELS.values(), ids=MODELS)
def test_query_and_value_are_found_by_the_models_type(kind, settings, names, blocks):
    model = made(kind, **settings)
    apply_genft(model, GenFTConfig(shared_dim=2, specific_dim=1, transform="column"))
    layers = adapted_layers(model)
    assert {path.rpartition(".")[2] for path in layers} == names
    for layer in layers.values():
        adapted = [index for update in layer.updates.values() for index in update.blocks.adapted]
        assert (layer.blocks.cut, tuple(adapted)) == blocks


def test_every_type_of_pefts_table_is_covered():
    for kind, theirs in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items():
        usual = any(name in theirs for name in (*QUERY_AND_VALUE_NAMES, "key"))  # a string is an expression of names
        assert usual or kind in BY_MODEL_TYPE, kind


VALUES_LAST = {
    "gpt2": ("h.0.attn.c_attn", "h.0.attn.c_proj"),
    "gpt_bigcode": ("h.0.attn.c_attn", "h.0.attn.c_proj"),
    "falcon": ("h.0.self_attention.query_key_value", "h.0.self_attention.dense"),
    "phi3": ("layers.0.self_attn.qkv_proj", "layers.0.self_attn.o_proj"),
    "mpt": ("blocks.0.attn.Wqkv", "blocks.0.attn.out_proj"),
    "modernbert": ("layers.0.attn.Wqkv", "layers.0.attn.Wo"),
}


@pytest.mark.parametrize("name", VALUES_LAST)
def test_the_last_block_of_a_fused_weight_is_the_values(name):
    kind, settings, _, (cut, _) = MODELS[name]
    model, (fused, after) = made(kind, **settings).eval(), VALUES_LAST[name]
    width = 3 * WIDTH if cut == 3 else sum(cut)
    first, values = (WIDTH if cut == 3 else cut[0]), (WIDTH if cut == 3 else cut[-1])
    shift, seen = torch.zeros(width), []

    model.get_submodule(fused).register_forward_hook(lambda module, args, y: y + shift)
    model.get_submodule(after).register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    def attention() -> torch.Tensor:
        seen.clear()
        model(torch.arange(6)[None])
        return seen[0]

    with torch.no_grad():
        before = attention()
        shift[-values:] = 1.0  # attention weights sum to one, so values that are all higher by one are so on average
        assert torch.allclose(attention() - before, torch.ones_like(before), atol=1e-5)
        shift.zero_()
        shift[:first] = 1.0
        change = attention() - before
        assert change.abs().max() > 1e-6 and not torch.allclose(change, torch.ones_like(before), atol=1e-2)


def test_models_of_timm_have_one_fused_weight():
    model = FusedEncoder()
    apply_genft(model, GenFTConfig(shared_dim=2, specific_dim=1))
    assert model.qkv.blocks == (3, (0, 2))


def test_unknown_models_say_what_could_be_named():
    with pytest.raises(ValueError, match=r"matched nothing.*linear layers are: 0 \(1\)"):
        apply_genft(nn.Sequential(nn.Linear(8, 8)), GenFTConfig(shared_dim=2))


def test_settings_that_a_model_settled_are_in_the_file(tmp_path):
    model = randomise(apply_genft(made("Phi3", **PHI3), GenFTConfig(shared_dim=2, specific_dim=1)))
    kept = adapter_state(model).config
    assert kept.target_modules == ("qkv_proj",) and kept.fused_blocks == {"qkv_proj": ((16, 8, 8), (0, 2))}
    save_adapter(model, tmp_path)
    tokens = torch.arange(6)[None]
    expected = model(tokens).last_hidden_state
    assert torch.equal(load_adapter(made("Phi3", **PHI3), tmp_path)(tokens).last_hidden_state, expected)
    load_adapter(apply_genft(made("Phi3", **PHI3), GenFTConfig(shared_dim=2, specific_dim=1)), tmp_path)


CLASSIFIERS = {
    "BertForSequenceClassification": (NAMES, ["classifier"]),
    "RobertaForSequenceClassification": (NAMES, ["classifier"]),
    "DistilBertForSequenceClassification": (
        dict(dim=WIDTH, n_layers=1, n_heads=HEADS, hidden_dim=16, vocab_size=20),
        ["pre_classifier", "classifier"],
    ),
    "LlamaForSequenceClassification": (NAMES, ["score"]),
    "GPT2ForSequenceClassification": (GPT2, ["score"]),
    "BertForQuestionAnswering": (NAMES, ["qa_outputs"]),
    "ViTForImageClassification": (NAMES | dict(image_size=32), ["classifier"]),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_head_is_found_trained_on_request_and_left_out_of_all_linear(kind):
    settings, expected = CLASSIFIERS[kind]
    model = made(kind, **settings)
    assert list(heads(model)) == expected
    everywhere = find_targets(model, GenFTConfig(target_modules="all-linear"), full_matches)
    assert everywhere and not [target.name for target in everywhere if target.name.partition(".")[0] in expected]
    with pytest.warns(UserWarning, match=f"the head {expected[0]!r}.*stays frozen: modules_to_save='head' trains it"):
        apply_genft(copy.deepcopy(model), GenFTConfig(shared_dim=2))
    apply_genft(model, GenFTConfig(shared_dim=2, modules_to_save="head"))
    assert adapter_state(model).config.modules_to_save == tuple(expected)
    assert all(p.requires_grad for name in expected for p in model.get_submodule(name).parameters())


def test_settling_a_configuration_does_not_warn_of_it_again():
    with pytest.warns(UserWarning, match="scaling=0"):
        config = GenFTConfig(shared_dim=2, scaling=0, modules_to_save="head")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_genft(made("BertForSequenceClassification", **NAMES), config)


def test_head_of_timm_is_what_it_says_it_is():
    model = FusedEncoder()
    model.get_classifier = lambda: model.proj
    apply_genft(model, GenFTConfig(shared_dim=2, target_modules=["qkv"], modules_to_save="head"))
    assert model.proj.weight.requires_grad


def test_head_that_has_been_trained_is_not_warned_of():
    model = made("BertForSequenceClassification", **NAMES)
    randomise(model.classifier.requires_grad_(True), 1.0)
    apply_genft(model, GenFTConfig(shared_dim=2))


def test_model_without_a_known_head_is_refused_one():
    for model in (made("Llama", **NAMES), Encoder()):
        with pytest.raises(ValueError, match="modules_to_save='head': (Llama|Encoder).* has no head"):
            apply_genft(model, GenFTConfig(shared_dim=2, modules_to_save="head"))
    with pytest.raises(ValueError, match="must be a list of names or 'head', got the string 'classifier'"):
        GenFTConfig(modules_to_save="classifier")


def test_fresh_layers_are_told_by_their_values():
    torch.manual_seed(0)
    linear, bare = nn.Linear(64, 3), nn.Linear(64, 3, bias=False)
    assert is_fresh(linear) and is_fresh(bare)
    nn.init.normal_(bare.weight, std=0.02)
    assert is_fresh(bare, 0.02) and not is_fresh(bare) and not is_fresh(bare, 0.05)
    nn.init.normal_(linear.weight, std=0.5)
    assert not is_fresh(linear)
    nn.init.zeros_(linear.bias)
    assert is_fresh(linear)


@pytest.mark.parametrize("name", HINTS)
def test_settings_of_other_methods_are_told_ours(name):
    with pytest.raises(TypeError, match=f"^GenFTConfig got an unexpected keyword argument '{name}': ") as error:
        GenFTConfig(**{name: 8})
    assert HINTS[name] in str(error.value)
    with pytest.raises(TypeError, match=f"argument '{name}'"):
        GenFTConfig.preset("fast", **{name: 8})


def test_misspelt_settings_are_told_the_nearest():
    with pytest.raises(TypeError, match=r"argument 'share_dim': did you mean shared_dim\?"):
        GenFTConfig(share_dim=3)
    with pytest.raises(TypeError, match="argument 'zzz': it has shared_dim, specific_dim"):
        GenFTConfig(zzz=3)
