"""GenFT adapters by transformers' own `add_adapter`, `load_adapter` and `from_pretrained`."""

import pytest
import safetensors.torch
import torch

from genft_kernels import accumulate, load_adapter, save_adapter
from tests.helpers.tiny_models import tokens

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.integrations import peft as of_transformers  # noqa: E402

from genft_kernels.integrations.peft.config import BESIDE_A_MODEL  # noqa: E402
from genft_kernels.integrations.peft.layer import GenFTLayer  # noqa: E402
from tests.helpers.peft_models import own_model, peft_config, randomised  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]


@pytest.fixture(autouse=True)
def of_any_version(monkeypatch):
    """transformers 5.24 asks for a PEFT that is newer than any there is."""
    monkeypatch.setattr(of_transformers, "MIN_PEFT_VERSION", "0.21.0")


@pytest.fixture
def folder(tmp_path):
    """Of a saved base model."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    config = transformers.BertConfig(**sizes, max_position_embeddings=16, initializer_range=0.3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    return tmp_path


def fresh(folder):
    return transformers.BertForSequenceClassification.from_pretrained(folder / "base").eval()


def with_adapters(folder, **settings):
    """A model with two random adapters, "one" and "two", the second active."""
    model = fresh(folder)
    for name, options in {"one": settings, "two": {"target_modules": ["query"]}}.items():
        model.add_adapter(peft_config(**options), name)
        randomised(model)  # the active one
    return model


def answer(model):
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def adapter_parameters(model, name):
    return {key: parameter for key, parameter in model.named_parameters() if f".{name}." in key}


def test_adapters_switch_add_and_rest(folder):
    model = with_adapters(folder)
    answers = {}
    for active in ("one", "two", ["one", "two"]):
        model.set_adapter(active)
        answers[str(active)] = answer(model)
        wanted = [active] if isinstance(active, str) else active
        for name in ("one", "two"):
            parameters = adapter_parameters(model, name)
            assert any("genft_shared" in key for key in parameters) and any("genft_own" in key for key in parameters)
            assert {parameter.requires_grad for parameter in parameters.values()} == {name in wanted}
    model.disable_adapters()
    frozen = answer(model)
    assert torch.equal(frozen, answer(fresh(folder)))
    model.enable_adapters()
    assert torch.equal(answer(model), answers["['one', 'two']"])
    found = [*answers.values(), frozen]
    assert all((a - b).abs().max() > 1e-4 for index, a in enumerate(found) for b in found[:index])
    model.delete_adapter("two")
    assert not adapter_parameters(model, "two")
    model.set_adapter("one")
    assert torch.equal(answer(model), answers["one"])


def test_an_adapter_trains_in_one_generation_a_step(folder):
    model = with_adapters(folder)
    model.set_adapter("one")
    model.train()
    (group,) = {layer.genft_own["one"].generator.group for layer in model.modules() if isinstance(layer, GenFTLayer)}
    with accumulate(model):
        for _ in range(2):
            model(input_ids=tokens(), labels=torch.zeros(len(tokens()), dtype=torch.long)).loss.backward()
    assert group.generations == 1
    graded = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert graded == set(adapter_parameters(model, "one"))


WAYS = {
    "load_adapter": lambda folder: loaded(fresh(folder), folder / "one"),
    "from_pretrained": lambda folder: transformers.AutoModelForSequenceClassification.from_pretrained(folder / "one"),
    "peft": lambda folder: peft.PeftModel.from_pretrained(fresh(folder), folder / "one"),
    "ours": lambda folder: load_adapter(fresh(folder), folder / "one"),
}


def loaded(model, folder):
    model.load_adapter(folder)
    return model


@pytest.mark.parametrize("load", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("settings", [{}, dict(outer_activation="silu", bias=True)], ids=["factored", "tiled"])
def test_files_of_transformers_open_everywhere(settings, load, folder):
    model = with_adapters(folder, **settings)
    model.set_adapter("one")
    model.save_pretrained(folder / "one")
    assert torch.equal(answer(load(folder).eval()), answer(model))


@pytest.mark.filterwarnings("ignore:the head")
@pytest.mark.parametrize("saved_by", ["peft", "ours"])
def test_files_of_others_open_in_transformers(saved_by, folder):
    model = randomised(peft.get_peft_model(fresh(folder), peft_config())).eval()
    if saved_by == "peft":
        model.save_pretrained(folder / "one")
    else:
        own = own_model(model, lambda: fresh(folder), torch.float32)
        save_adapter(own, folder / "one")
    assert torch.equal(answer(WAYS["load_adapter"](folder).eval()), answer(model))


def test_another_base_is_refused_and_the_model_is_as_it_was(folder):
    model = with_adapters(folder)
    model.set_adapter("one")
    model.save_pretrained(folder / "one")
    other = fresh(folder)
    with torch.no_grad():
        other.bert.encoder.layer[1].attention.self.value.weight.mul_(1.1)
    before = list(other.state_dict())
    with pytest.raises(ValueError, match="another base model: the weight of 'bert.encoder.layer.1.attention.self.val"):
        other.load_adapter(folder / "one")
    assert list(other.state_dict()) == before


# --- a model and an adapter in one folder -----------------------------------------------------------------------------


def in_one_folder(folder):
    """A model whose adapter PEFT has saved into the folder of its base."""
    model = randomised(peft.get_peft_model(fresh(folder), peft_config())).eval()
    model.save_pretrained(folder / "base")
    return model


def test_a_model_and_an_adapter_in_one_folder_load_at_once(folder):
    model = in_one_folder(folder)
    both = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base").eval()
    assert torch.equal(answer(both), answer(model))
    assert torch.equal(answer(load_adapter(fresh_without_adapter(folder), folder / "base").eval()), answer(model))


def fresh_without_adapter(folder):
    """The base model, beside which an adapter lies."""
    config = transformers.AutoConfig.from_pretrained(folder / "base")
    model = transformers.BertForSequenceClassification(config)
    model.load_state_dict(safetensors.torch.load_file(folder / "base" / "model.safetensors"))
    return model.eval()


def test_a_folder_of_both_says_what_to_import(folder, monkeypatch):
    in_one_folder(folder)
    monkeypatch.delitem(peft.PEFT_TYPE_TO_CONFIG_MAPPING, BESIDE_A_MODEL)  # as it is before the import
    with pytest.raises(KeyError, match="GENFT: import genft_kernels.integrations.peft first"):
        transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base")


def test_an_adapter_in_a_subfolder_leaves_the_models_folder_alone(folder):
    model = randomised(peft.get_peft_model(fresh(folder), peft_config())).eval()
    model.save_pretrained(folder / "base" / "adapter")
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    with model.disable_adapter():
        assert torch.equal(answer(load(folder / "base").eval()), answer(model))
    both = load(folder / "base", adapter_kwargs={"subfolder": "adapter"}).eval()
    assert torch.equal(answer(both), answer(model))
