"""`swap_adapter`: another adapter takes one's place in a model that goes on, or is refused before anything changes."""

import copy

import pytest
import torch

from genft_kernels import save_adapter
from tests.helpers.tiny_models import Encoder, tokens

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from peft.utils.hotswap import hotswap_adapter  # noqa: E402

from genft_kernels.integrations.peft import swap_adapter  # noqa: E402
from tests.helpers.peft_models import (  # noqa: E402
    base,
    own_model,
    peft_config,
    peft_model,
    randomised,
    with_second_adapter,
)

SETTINGS = {
    "factored": {},
    "tiled": dict(outer_activation="silu"),
    "heads": dict(modules_to_save=["classifier"]),
    "shared-only": dict(specific_dim=0),
}


def another(**settings):
    """A model with another adapter of the settings."""
    return randomised(peft.get_peft_model(base(), peft_config(**settings)), seed=5).eval()


@pytest.mark.parametrize("saved_by", ["peft", "save_adapter"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_swap_gives_the_answers_of_the_other_adapter(settings, saved_by, tmp_path):
    served, other = peft_model(**settings), another(**settings)
    if saved_by == "peft":
        other.save_pretrained(tmp_path)
    else:
        save_adapter(own_model(other, **settings), tmp_path)
    before = {name: id(parameter) for name, parameter in served.named_parameters()}
    served(tokens())  # its factors are held
    swap_adapter(served, tmp_path)
    assert torch.equal(served(tokens()), other(tokens()))
    assert {name: id(parameter) for name, parameter in served.named_parameters()} == before


def test_swap_leaves_other_adapters_alone(tmp_path):
    served, other = with_second_adapter(peft_model()), another()
    other.save_pretrained(tmp_path)
    first = served(tokens())
    swap_adapter(served, tmp_path, "other")
    assert torch.equal(served(tokens()), first)
    served.set_adapter("other")
    assert torch.equal(served(tokens()), other(tokens()))


def test_swap_under_a_compiled_model_compiles_nothing_anew(tmp_path):
    settings = {"target_modules": ["query"], "transform": "column"}
    served, other = peft_model(**settings), another(**settings)
    other.save_pretrained(tmp_path)
    graphs, layer = [], served.base_model.model.layers[0].attention.query
    x = torch.randn(5, 8, dtype=torch.float64)

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    with torch.no_grad():
        first = compiled(x)
        swap_adapter(torch.compile(served), tmp_path)  # which compiles nothing yet
        second = compiled(x)
    assert len(graphs) == 1 and not torch.allclose(first, second)
    assert torch.allclose(second, other.base_model.model.layers[0].attention.query(x), rtol=1e-10, atol=1e-12)


def test_swap_serves_models_of_transformers(tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    frozen = transformers.BertModel(transformers.BertConfig(**sizes, max_position_embeddings=16)).double().eval()
    other = randomised(peft.get_peft_model(copy.deepcopy(frozen), peft_config()), seed=5).eval()
    other.save_pretrained(tmp_path)
    served = peft.inject_adapter_in_model(peft_config(), frozen)
    swap_adapter(served, tmp_path)
    answers = [each(tokens()).last_hidden_state for each in (served, other)]
    assert torch.equal(*answers)


def other_base(folder):
    changed = base()
    with torch.no_grad():
        changed.layers[1].attention.value.weight.mul_(1.1)
    peft.get_peft_model(changed, peft_config()).save_pretrained(folder)


def lora(folder):
    peft.get_peft_model(base(), peft.LoraConfig(target_modules=["query"])).save_pretrained(folder)


WRONG = {
    "setting": (lambda folder: another(outer_activation="silu").save_pretrained(folder), {}, "outer_activation: 'iden"),
    "base": (other_base, {}, "belongs to another base model: the weight of 'layers.1.attention.value'"),
    "layers": (lambda folder: another(target_modules=["query"]).save_pretrained(folder), {}, "other layers or shapes"),
    "layers-shared-only": (
        lambda folder: another(target_modules=["query"], specific_dim=0).save_pretrained(folder),
        dict(specific_dim=0),
        "other layers or shapes, first at 'layers.0.attention.value'",
    ),
    "kind": (lora, {}, "an adapter of another kind"),
}


@pytest.mark.parametrize("write, settings, message", WRONG.values(), ids=WRONG)
def test_swap_refuses_a_wrong_adapter_before_anything_changes(write, settings, message, tmp_path):
    write(tmp_path)
    served = peft_model(**settings)
    before = copy.deepcopy(served.state_dict())
    with pytest.raises(ValueError, match=message):
        swap_adapter(served, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in served.state_dict().items())


def test_swap_refuses_a_merged_adapter_and_one_that_is_not_there(tmp_path):
    served = peft_model()
    served.save_pretrained(tmp_path)
    for model, name in ((served, "other"), (base(), "default")):
        with pytest.raises(ValueError, match=f"no GenFT adapter '{name}'"):
            swap_adapter(model, tmp_path, name)
    served.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged"):
        swap_adapter(served, tmp_path)


def test_hotswap_of_pefts_is_refused_before_anything_changes(tmp_path):
    """It writes LoRA's scales as it goes."""
    peft_model().save_pretrained(tmp_path)
    served = peft.PeftModel.from_pretrained(base(Encoder), tmp_path)
    before = copy.deepcopy(served.state_dict())
    with pytest.raises(ValueError, match="Hotswapping only supports .* GENFT was passed"):
        hotswap_adapter(served, tmp_path, adapter_name="default", torch_device="cpu")
    assert all(torch.equal(tensor, before[name]) for name, tensor in served.state_dict().items())
