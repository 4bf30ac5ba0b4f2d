"""One file format: what `save_adapter` writes PEFT opens, and the other way round; older files still load."""

import copy
import hashlib
import json
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn

from genft_kernels import __main__, load_adapter, save_adapter
from genft_kernels.files import names
from genft_kernels.files.format import CONFIG_FILE, TENSORS_FILE
from tests.helpers.tiny_models import Encoder, FusedEncoder, GroupedQueryBlock, TiedModel, tokens

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from genft_kernels import GenFTConfig, apply_genft  # noqa: E402
from genft_kernels.integrations.peft import PeftGenFTConfig  # noqa: E402
from tests.helpers.official_writers import peft_checkpoint, write_peft  # noqa: E402
from tests.helpers.peft_models import (  # noqa: E402
    SMALL,
    TransposedEncoder,
    base,
    own_model,
    peft_config,
    peft_model,
    randomised,
    with_second_adapter,
)


def in_sequence():
    return nn.Sequential(FusedEncoder())


LONGEST_LAST = {"qkv": (3, (0, 2)), "0.qkv": (3, (0,))}
LONGEST_FIRST = dict(reversed(LONGEST_LAST.items()))
MODELS = {
    "square": (Encoder, {}),
    "modules_to_save": (Encoder, dict(modules_to_save=["classifier"], bias=True)),
    "several-shapes": (GroupedQueryBlock, dict(target_modules=r".*_proj", exclude_modules=["k_proj"])),
    "fused": (FusedEncoder, dict(target_modules=["qkv", "proj"], fused_blocks={"qkv": (3, (0, 2))})),
    "fused-longest-last": (in_sequence, dict(target_modules=["qkv", "proj"], fused_blocks=LONGEST_LAST)),
    "fused-longest-first": (in_sequence, dict(target_modules=["qkv", "proj"], fused_blocks=LONGEST_FIRST)),
    "conv1d": (TransposedEncoder, dict(target_modules=["c_attn", "c_proj"], transform="row", bias=True)),
    "shared-only-tiled": (Encoder, dict(specific_dim=0, outer_activation="gelu", weight_ratio="rms")),
}


def from_pretrained(model, folder, **options):
    """PEFT must find nothing to say about the files."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(model, folder, **options).eval()


@pytest.mark.parametrize("make, settings", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_files_of_save_adapter_open_in_peft(make, settings, low_cpu_mem_usage, tmp_path):
    model = own_model(peft_model(make, **settings), make, **settings)
    save_adapter(model, tmp_path)
    loaded = from_pretrained(base(make), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.allclose(loaded(tokens()), model(tokens()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make, settings", MODELS.values(), ids=MODELS)
def test_files_of_peft_open_with_load_adapter(make, settings, tmp_path):
    model = peft_model(make, **settings)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(base(make), tmp_path).eval()
    assert torch.allclose(loaded(tokens()), model(tokens()), rtol=1e-12, atol=1e-12)
    save_adapter(loaded, tmp_path)  # in the place of PEFT's
    assert torch.equal(from_pretrained(base(make), tmp_path)(tokens()), model(tokens()))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("autocast", [True, False])
def test_loading_over_16_bits_rounds_only_where_it_is_asked_to(low_cpu_mem_usage, autocast, tmp_path):
    model = peft_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    options = dict(low_cpu_mem_usage=low_cpu_mem_usage, autocast_adapter_dtype=autocast)
    loaded = dict(from_pretrained(base(dtype=torch.bfloat16), tmp_path, **options).named_parameters())
    for name, parameter in model.named_parameters():
        if "genft_" in name:
            expected = parameter if autocast else parameter.bfloat16()
            assert parameter.dtype == torch.float32 and torch.equal(loaded[name], expected), name


def test_an_adapter_by_any_name_is_saved_alike(tmp_path):
    model = with_second_adapter(peft_model(), target_modules=["dense"])
    model.save_pretrained(tmp_path)
    loaded = load_adapter(base(), tmp_path / "other").eval()
    model.set_adapter("other")
    assert torch.allclose(loaded(tokens()), model(tokens()), rtol=1e-12, atol=1e-12)


def test_layers_that_peft_chose_by_number_are_those_of_the_tensors(tmp_path):
    model = peft_model(lambda: nn.Sequential(Encoder()), layers_to_transform=[1])
    model.save_pretrained(tmp_path)
    loaded = load_adapter(base(lambda: nn.Sequential(Encoder())), tmp_path).eval()
    assert torch.allclose(loaded(tokens()), model(tokens()), rtol=1e-12, atol=1e-12)


def classifier():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, max_position_embeddings=16))


def test_heads_that_peft_adds_by_all_their_names_are_found(tmp_path):
    config = PeftGenFTConfig(**SMALL, task_type="SEQ_CLS")
    model = randomised(peft.get_peft_model(classifier(), config)).eval()
    model.save_pretrained(tmp_path)
    loaded = load_adapter(classifier(), tmp_path).eval()
    assert torch.allclose(loaded(tokens()).logits, model(input_ids=tokens()).logits, atol=1e-6)


def test_an_adapter_is_no_larger_than_its_parameters(tmp_path):
    model = peft_model(lambda: Encoder(2, 256), torch.float32)
    model.save_pretrained(tmp_path)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert (tmp_path / TENSORS_FILE).stat().st_size <= 1.1 * parameters


class Wrapped(nn.Module):
    """A model with names as in PEFT's files."""

    def __init__(self):
        super().__init__()
        self.base_model = nn.ModuleDict({"model": Encoder()})

    def forward(self, tokens):
        return self.base_model["model"](tokens)


@pytest.mark.parametrize("make", [Encoder, Wrapped])
def test_files_of_the_first_format_still_load(make, tmp_path):
    model = randomised(apply_genft(base(make), GenFTConfig(**SMALL, modules_to_save=["classifier"]))).eval()
    save_adapter(model, tmp_path)
    tensors = names.all_in_model(safetensors.torch.load_file(tmp_path / TENSORS_FILE))
    assert "genft_generators.8x8.row_up" in tensors
    payload = safetensors.torch.save(tensors)
    (tmp_path / TENSORS_FILE).write_bytes(payload)
    description = json.loads((tmp_path / CONFIG_FILE).read_text())
    del description["peft_type"]
    description.update(format_version=1, tensors_sha256=hashlib.sha256(payload).hexdigest())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(description))
    assert torch.equal(load_adapter(base(make), tmp_path).eval()(tokens()), model(tokens()))


def test_a_model_and_its_adapter_load_at_once(tmp_path):
    classifier().save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    model = randomised(apply_genft(model, GenFTConfig(**SMALL, modules_to_save="head"))).eval()
    save_adapter(model, tmp_path / "adapter")
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert torch.allclose(loaded(input_ids=tokens()).logits, model(tokens()).logits, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the head 'classifier'")
def test_a_base_without_a_name_is_null_as_in_files_of_peft(tmp_path):
    model = randomised(apply_genft(classifier(), GenFTConfig(**SMALL))).eval()
    save_adapter(model, tmp_path / "ours")
    peft.get_peft_model(classifier(), peft_config()).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "ours" / CONFIG_FILE
    ours, theirs = (json.loads((tmp_path / name / CONFIG_FILE).read_text()) for name in ("ours", "theirs"))
    assert ours["base_model_name_or_path"] is theirs["base_model_name_or_path"] is None
    for name in ("ours", "theirs"):  # transformers looks for the base, and says that it is not there
        with pytest.raises(OSError):
            transformers.BertForSequenceClassification.from_pretrained(tmp_path / name, local_files_only=True)
    del ours["base_model_name_or_path"]  # as earlier files
    for written in (path.read_text(), json.dumps(ours)):
        path.write_text(written)
        for loaded in (
            load_adapter(classifier(), path.parent),
            peft.PeftModel.from_pretrained(classifier(), path.parent),
        ):
            assert torch.allclose(loaded.eval()(input_ids=tokens()).logits, model(tokens()).logits, atol=1e-6)


def test_files_of_peft_are_exported_as_lora_from_a_shell(tmp_path, monkeypatch):
    classifier().save_pretrained(tmp_path / "base")
    frozen = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    model = randomised(peft.get_peft_model(frozen, peft_config())).eval()
    model.save_pretrained(tmp_path / "adapter")
    places = [str(tmp_path / name) for name in ("adapter", "base", "lora")]
    monkeypatch.setattr(
        "sys.argv", ["genft_kernels", "export-lora", places[0], "--base", places[1], "--out", places[2]]
    )
    __main__.main()
    fresh = transformers.BertForSequenceClassification.from_pretrained(places[1])
    lora = peft.PeftModel.from_pretrained(fresh, places[2]).eval()
    assert torch.allclose(lora(input_ids=tokens()).logits, model(input_ids=tokens()).logits, atol=1e-5)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_by", ["peft", "save_adapter"])
def test_peft_refuses_an_adapter_of_another_base(saved_by, tmp_path):
    model = peft_model()
    if saved_by == "peft":
        model.save_pretrained(tmp_path)
    else:
        save_adapter(own_model(model), tmp_path)
    other = base()
    with torch.no_grad():
        other.layers[1].attention.value.weight.mul_(1.1)
    with pytest.raises(ValueError, match="another base model: the weight of 'layers.1.attention.value': its norm"):
        peft.PeftModel.from_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match="another base model: there is no module 'layers.0.attention.query'"):
        peft.PeftModel.from_pretrained(nn.Sequential(base()), tmp_path)


def test_a_configuration_may_be_used_again_on_another_model(tmp_path):
    config = peft_config()
    peft.get_peft_model(base(), config).save_pretrained(tmp_path)
    peft.get_peft_model(Encoder().double(), config)
    peft.get_peft_model(nn.Sequential(Encoder()), config)
    with pytest.raises(ValueError, match="another base model"):
        peft.get_peft_model(Encoder().double(), PeftGenFTConfig.from_pretrained(tmp_path))


def test_load_adapter_refuses_an_adapter_of_another_base_that_peft_saved(tmp_path):
    peft_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(Encoder().double(), tmp_path)


def edited(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


DAMAGES = {
    "bias": (dict(bias="all"), "bias='all': biases of the model itself were trained"),
    "setting": (dict(dropout=2), "dropout must be"),
    "fingerprints": (dict(fingerprints=[]), "'fingerprints' is not an object"),
    "fingerprint": (dict(fingerprints={"a": {}}), "the fingerprint of 'a'"),
    "target": (dict(target_modules=["dense"], specific_dim=2), "has shape|unexpected|missing"),
}


@pytest.mark.parametrize("changes, message", DAMAGES.values(), ids=DAMAGES)
def test_load_adapter_says_what_is_wrong_with_a_file_of_peft(changes, message, tmp_path):
    peft_model().save_pretrained(tmp_path)
    model = base()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_adapter(model, edited(tmp_path, **changes))
    assert list(model.state_dict()) == list(before)


def test_peft_refuses_a_newer_format(tmp_path):
    save_adapter(own_model(peft_model()), tmp_path)
    with pytest.raises(ValueError, match="format_version=3: a newer genft_kernels"):
        peft.PeftModel.from_pretrained(base(), edited(tmp_path, format_version=3))


def test_an_official_adapter_opens_in_peft_by_way_of_ours(tmp_path):
    targets = tuple(f"layers.{n}.attention.{name}" for n in (0, 1) for name in ("query", "value"))
    tensors, settings = peft_checkpoint(targets, 8, 2, 1)
    write_peft(tmp_path / "official", tensors, settings)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="an adapter of the official GenFT code"):
        warnings.simplefilter("ignore")  # PEFT, of fields that it takes for those of a newer version
        peft.PeftModel.from_pretrained(base(), tmp_path / "official")
    model = load_adapter(base(), tmp_path / "official").eval()
    save_adapter(model, tmp_path / "ours")
    loaded = from_pretrained(base(), tmp_path / "ours")
    assert torch.allclose(loaded(tokens()), model(tokens()), rtol=1e-12, atol=1e-12)


def test_peft_refuses_a_module_that_is_held_twice(tmp_path):
    model = apply_genft(base(TiedModel), GenFTConfig(**SMALL, target_modules=["first", "second", "head"]))
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="'first' and 'second' are one module"):
        peft.PeftModel.from_pretrained(base(TiedModel), tmp_path)


def test_an_adapter_does_not_spoil_the_folder_of_a_model(tmp_path):
    """transformers would look for the adapter's class in PEFT, and PEFT for one that works without a wrapper."""
    model = classifier()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a saved model, which transformers loads no longer"):
        save_adapter(apply_genft(model, GenFTConfig(**SMALL, modules_to_save="head")), tmp_path)
    assert transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path) is not None


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "own, in_file",
    [
        ("genft_generators.8x8.row_up_bias", "base_model.model.genft_shared.8x8_row_up_bias"),
        ("layers.0.query.row_specific_up", "base_model.model.layers.0.query.genft_own.row_specific_up"),
        ("modules_to_save.head.0.weight", "base_model.model.head.0.weight"),
    ],
)
def test_names_are_translated_there_and_back(own, in_file):
    assert names.in_file(own) == in_file and names.in_model(in_file) == own


def test_names_that_meet_are_refused():
    twice = {"base_model.model.x.genft_own.specific_up": 1, "x.specific_up": 2}
    with pytest.raises(ValueError, match="'x.specific_up' twice"):
        names.all_in_model(twice)
