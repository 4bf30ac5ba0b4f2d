"""`python -m genft_kernels`: export-lora from files alone, and info."""

import json

import pytest

from genft_kernels import GenFTConfig, __main__, apply_genft, save_adapter
from tests.helpers.tiny_models import randomise

pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def config(**settings) -> GenFTConfig:
    return GenFTConfig(**{"shared_dim": 2, "specific_dim": 1, "inner_activation": "tanh", **settings})


def saved_bert(folder, **settings):
    """(a tiny encoder's folder, an adapter's): with a mask filler's head, as encoders come."""
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, max_position_embeddings=16)).eval()
    model.save_pretrained(folder / "base")
    save_adapter(randomise(apply_genft(model, config(**settings))), folder / "adapter")
    return str(folder / "base"), str(folder / "adapter")


def saved_vit(folder):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    configuration = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    model = transformers.ViTForImageClassification(configuration).eval()
    model.save_pretrained(folder / "base")
    save_adapter(randomise(apply_genft(model, config(modules_to_save=["classifier"]))), folder / "adapter")
    return str(folder / "base"), str(folder / "adapter")


def saved_llama(folder):
    """A classifier without a token that fills rows up."""
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes)).eval()
    model.save_pretrained(folder / "base")
    save_adapter(randomise(apply_genft(model, config(modules_to_save=["score"]))), folder / "adapter")
    return str(folder / "base"), str(folder / "adapter")


def saved_clip(folder):
    """A model that wants text and pixels."""
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    text, vision = {**sizes, "vocab_size": 20}, {**sizes, "image_size": 8, "patch_size": 4}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(folder / "base")
    save_adapter(randomise(apply_genft(model, config())), folder / "adapter")
    return str(folder / "base"), str(folder / "adapter")


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["genft_kernels", *arguments])
    __main__.main()


@pytest.mark.parametrize("saved", [saved_bert, saved_vit, saved_llama])
def test_command_exports_checks_and_names_the_servers_rank(saved, tmp_path, monkeypatch, capsys):
    base, adapter = saved(tmp_path)
    run(monkeypatch, "export-lora", adapter, "--base", base, "--out", str(tmp_path / "lora"), "--rank", "9")
    printed = capsys.readouterr().out
    assert "LoRA of rank 9 for 2 layers" in printed and "--max-lora-rank 16" in printed and "drift of the" in printed
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()


def test_command_says_that_it_has_no_inputs_for_a_model_to_be_checked_with(tmp_path, monkeypatch, capsys):
    base, adapter = saved_clip(tmp_path)
    run(monkeypatch, "export-lora", adapter, "--base", base, "--out", str(tmp_path / "lora"))
    assert "logits not checked: no inputs" in capsys.readouterr().out
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()


def test_command_looks_at_what_is_small_before_it_loads_the_base(tmp_path, monkeypatch):
    _, adapter = saved_vit(tmp_path)
    rest = "--base", str(tmp_path / "nowhere"), "--out", str(tmp_path / "lora")
    for wrong, message in (
        ([str(tmp_path / "nothing")], "error: no adapter in "),
        ([str(tmp_path / "base")], "holds a whole model and no adapter"),
        ([adapter, "--rank", "0"], "error: rank must be"),
        ([adapter, "--energy", "nan"], "error: energy must be"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, "export-lora", *wrong, *rest)


def test_command_that_does_not_exist_is_told_which_do(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "inof")
    assert "argument COMMAND: invalid choice: 'inof'" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:modules_to_save")
def test_command_says_in_a_sentence_what_does_not_fit(tmp_path, monkeypatch):
    base, adapter = saved_bert(tmp_path, outer_activation="gelu", modules_to_save=["predictions"])
    with pytest.raises(SystemExit, match="error: .*rank= or energy="):
        run(monkeypatch, "export-lora", adapter, "--base", base, "--out", str(tmp_path / "lora"))
    description = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**description, "architectures": ["BertModel"]}))
    with pytest.raises(SystemExit, match="'predictions' matches no module.*loaded as BertModel"):
        run(monkeypatch, "export-lora", adapter, "--base", base, "--out", str(tmp_path / "lora"))
    (tmp_path / "base" / "config.json").write_text(json.dumps({**description, "architectures": ["OwnModel"]}))
    with pytest.raises(SystemExit, match="is a OwnModel, which transformers does not have: .*export_lora"):
        run(monkeypatch, "export-lora", adapter, "--base", base, "--out", str(tmp_path / "lora"))


@pytest.mark.parametrize("arguments", [(), ("info",)], ids=["default", "named"])
def test_command_info_is_the_default(arguments, monkeypatch, capsys):
    run(monkeypatch, *arguments)
    assert capsys.readouterr().out.startswith("genft_kernels ")
