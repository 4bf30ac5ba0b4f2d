"""Models of transformers whose head is tied to the embedding: what was trained on an end of the tie stays."""

import gc
import io
import weakref

import pytest
import torch

from genft_kernels import GenFTConfig, apply_genft, fidelity_report, merge, remove_genft, unmerge
from tests.helpers.tiny_models import randomise, snapshot

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:modules_to_save.*is tied to")
UNTIED = "input and output embeddings are no longer tied"
WAYS = {
    "target": dict(target_modules=["q_proj", "lm_head"]),
    "head-saved": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embedding-saved": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
}
SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)


def llama(tied=True):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()


def adapted(model=None, **settings):
    config = GenFTConfig(shared_dim=2, specific_dim=1, **(settings or WAYS["target"]))
    return randomise(apply_genft(llama() if model is None else model, config))


def ids():
    return torch.arange(10).view(2, 5)


def logits(model, **inputs):
    with torch.no_grad():
        return model(ids(), **inputs).logits[..., :64]


def tie(model):
    model.tie_weights()


def resize(model):
    model.resize_token_embeddings(72, mean_resizing=False)


again = pytest.mark.parametrize("again", [tie, resize])


@again
@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_what_is_kept_is_not_tied_again_nor_by_who_reads_the_files(settings, again, tmp_path):
    model = adapted(**settings)
    expected = logits(model)
    with pytest.warns(UserWarning, match=f"{UNTIED}: tie_word_embeddings of the model's config is False now"):
        remove_genft(model, keep_update=True)
    again(model)
    assert torch.allclose(logits(model), expected, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert not loaded.config.tie_word_embeddings
    again(loaded)
    assert torch.allclose(logits(loaded), expected, atol=1e-6)


@pytest.mark.parametrize("settings", [dict(target_modules=["q_proj"]), *WAYS.values()], ids=["elsewhere", *WAYS])
def test_a_tie_that_lasts_is_said_to_last(settings):
    model = adapted(**settings)
    remove_genft(model, keep_update="modules_to_save" not in settings and "lm_head" not in settings["target_modules"])
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight


def test_the_configuration_of_a_models_text_says_it_too():
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
        tie_word_embeddings=True,
        image_token_index=63,
    )
    model = adapted(transformers.LlavaForConditionalGeneration(config).eval())
    with pytest.warns(UserWarning, match=UNTIED):
        remove_genft(model, keep_update=True)
    assert not model.config.tie_word_embeddings and not model.config.text_config.tie_word_embeddings


def switch():
    sizes = dict(d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=1, num_decoder_layers=1, num_experts=2)
    routed = dict(num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
    config = transformers.SwitchTransformersConfig(vocab_size=64, **sizes, **routed)
    return transformers.SwitchTransformersForConditionalGeneration(config).eval()


def roberta():
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES, tie_word_embeddings=True)).eval()


@pytest.mark.parametrize(
    "make, target, inputs",
    [(switch, "lm_head", dict(decoder_input_ids=ids())), (roberta, "decoder", {})],
    ids=["scales-outputs", "ties-biases"],
)
def test_a_setting_that_says_more_stays_with_a_warning(make, target, inputs, tmp_path):
    model = adapted(make(), target_modules=[target])
    expected = logits(model, **inputs)
    with pytest.warns(UserWarning, match=f"{UNTIED}; tie_word_embeddings of the model's config stays True"):
        remove_genft(model, keep_update=True)
    assert torch.allclose(logits(model, **inputs), expected, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(loaded, **inputs), expected, atol=1e-5)


@again
@pytest.mark.filterwarnings(f"ignore:{UNTIED}")
def test_a_merged_head_is_not_tied_again(again):
    model = merge(adapted())
    expected = logits(model)
    again(model)
    assert torch.allclose(logits(model), expected, atol=1e-6)
    remove_genft(model, keep_update=True)
    assert torch.allclose(logits(model), expected, atol=1e-6)


def test_a_merged_model_that_is_dropped_is_freed_at_once():
    model = merge(adapted())
    dropped = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert dropped() is None
    finally:
        gc.enable()


def test_a_saved_part_of_a_merged_model_is_that_part():
    model = merge(adapted())
    with torch.no_grad():
        expected = model.model(ids()).last_hidden_state
    file = io.BytesIO()
    torch.save(model.model, file)
    assert b"LlamaForCausalLM" not in file.getvalue()
    file.seek(0)
    part = torch.load(file, weights_only=False)
    part.tie_weights()
    with torch.no_grad():
        assert torch.equal(part(ids()).last_hidden_state, expected)


def test_an_unmerged_head_is_tied_as_it_was():
    model = adapted(modules_to_save=["norm"], **WAYS["target"])
    before = snapshot(model)
    unmerge(merge(model))
    model.tie_weights()
    assert snapshot(model) == before and model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["lm_head"]], ids=["", "alone"])
@pytest.mark.filterwarnings(f"ignore:{UNTIED}")
def test_a_head_that_was_resized_while_merged_cannot_be_undone(targets, tied):
    model = merge(adapted(llama(tied), target_modules=targets))
    expected = logits(model)
    resize(model)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="'lm_head' has been replaced or resized while it was merged"):
        remove_genft(model)
    assert snapshot(model) == before
    remove_genft(model, keep_update=True)
    assert torch.allclose(logits(model), expected, atol=1e-6)


@pytest.mark.filterwarnings("error:input and output embeddings", "ignore:Model has .tie_word_embeddings")
def test_a_report_leaves_the_tie_and_says_nothing_of_it():
    model = adapted()
    fidelity_report(model, ids())
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
