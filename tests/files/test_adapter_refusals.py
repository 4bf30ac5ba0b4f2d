"""Adapter files that are damaged or do not fit are refused by name, and the model is untouched."""

import copy
import hashlib
import warnings

import pytest
import torch
from torch import nn

from genft_kernels import GenFTConfig, apply_genft, disabled, load_adapter, merge, remove_genft, save_adapter, unmerge
from genft_kernels.files.format import CONFIG_FILE, TENSORS_FILE
from tests.helpers.adapter_files import QUERY, SAVED, adapted, base, config, contents, edit_config, edit_tensors
from tests.helpers.tiny_models import FusedEncoder, GroupedQueryBlock, randomise, snapshot, tokens


@pytest.fixture
def folder(tmp_path):
    """An adapter, modules to save included, on disk."""
    save_adapter(adapted(**SAVED), tmp_path)
    return tmp_path


# --- files that are not in order ------------------------------------------------------------------------------------


def truncate(name: str, size: int):
    def change(directory):
        (directory / name).write_bytes((directory / name).read_bytes()[:size])

    return change


def put_bytes(directory):
    """Have the tensors' file hold bytes that are none, with the digest that the description says."""
    (directory / TENSORS_FILE).write_bytes(b"x" * 99)
    edit_config(directory, lambda config: config.update(tensors_sha256=hashlib.sha256(b"x" * 99).hexdigest()))


def rename_tensor(tensors):
    tensors["layers.5.attention.query.specific_up"] = tensors.pop(f"{QUERY}.specific_up")


def on_config(change):
    return lambda directory: edit_config(directory, change)


def on_tensors(change):
    return lambda directory: edit_tensors(directory, change)


DAMAGES = {
    "truncated-tensors": (truncate(TENSORS_FILE, 300), f"{TENSORS_FILE} is truncated"),
    "empty-tensors": (truncate(TENSORS_FILE, 0), f"{TENSORS_FILE} is truncated"),
    "truncated-json": (truncate(CONFIG_FILE, 200), f"{CONFIG_FILE} is not valid JSON"),
    "binary-json": (lambda d: (d / CONFIG_FILE).write_bytes(b"\xff\xfe{"), f"{CONFIG_FILE} is not valid JSON"),
    "json-list": (lambda d: (d / CONFIG_FILE).write_text("[]"), f"{CONFIG_FILE} does not hold a JSON object"),
    "newer-format": (on_config(lambda d: d.update(format_version=3)), "format_version=3; this package reads 1 and 2"),
    "no-config": (on_config(lambda d: d.pop("config")), f"{CONFIG_FILE} is damaged: 'config' is not an object"),
    "unknown-field": (on_config(lambda d: d["config"].update(rank=3)), f"{CONFIG_FILE} is damaged.*rank"),
    "bad-field": (on_config(lambda d: d["config"].update(dropout=2)), f"{CONFIG_FILE} is damaged.*dropout"),
    "bad-fingerprint": (on_config(lambda d: d["fingerprints"].update(x=1)), f"{CONFIG_FILE} is damaged"),
    "not-safetensors": (put_bytes, f"{TENSORS_FILE} is damaged or truncated"),
    "missing-tensor": (
        on_tensors(lambda t: t.pop("genft_generators.8x8.row_up")),
        r"missing genft_generators.8x8.row_up \(1 missing, 0 unexpected\)",
    ),
    "extra-tensor": (on_tensors(lambda t: t.update(more=torch.ones(1))), r"unexpected more \(0 missing, 1 unexpected"),
    "renamed-tensor": (on_tensors(rename_tensor), f"missing {QUERY}.specific_up; unexpected layers.5.attention"),
    "mis-shaped-tensor": (
        on_tensors(lambda t: t.update({f"{QUERY}.specific_up": torch.ones(8, 2)})),
        rf"'{QUERY}.specific_up' has shape \[8, 2\], the model wants \[8, 1\]",
    ),
    "integer-tensor": (
        on_tensors(lambda t: t.update({f"{QUERY}.specific_up": torch.ones(8, 1, dtype=torch.int32)})),
        f"'{QUERY}.specific_up' has dtype torch.int32",
    ),
    "mis-shaped-head": (
        on_tensors(lambda t: t.update({"modules_to_save.classifier.1.weight": torch.ones(5, 8)})),
        r"'modules_to_save.classifier.1.weight' has shape \[5, 8\]",
    ),
}


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "adapted"])
@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_adapter_is_refused_and_the_model_untouched(damage, message, fresh, folder):
    model = base() if fresh else adapted(**SAVED)
    before = snapshot(model)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert snapshot(model) == before


@pytest.mark.parametrize("missing", [TENSORS_FILE, CONFIG_FILE, None])
def test_a_missing_file_is_named(missing, folder, tmp_path):
    model = base()
    before = snapshot(model)
    if missing:
        (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing or "nowhere"):
        load_adapter(model, folder if missing else tmp_path / "nowhere")
    assert snapshot(model) == before


def test_an_adapted_model_of_another_configuration_is_refused(folder):
    model = adapted(scaling=2.0, **SAVED)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"another configuration \(scaling: 2.0 in the model, 1.0 in the file\)"):
        load_adapter(model, folder)
    assert snapshot(model) == before


@pytest.mark.parametrize("names", [["value", "query"], r".*\.(query|value)"], ids=str)
def test_layers_may_be_named_in_another_way(names, folder):
    """They are compared themselves, by what the file says of their weights."""
    model = adapted(target_modules=names, **SAVED)
    load_adapter(model, folder)
    assert torch.equal(model(tokens()), load_adapter(base(), folder)(tokens()))
    with pytest.raises(ValueError, match="another base model: its layers differ"):
        load_adapter(adapted(target_modules=["query"], **SAVED), folder)


NAMED = {
    "by its path": {"0.qkv": (3, (0, 2))},
    "by its rows": {"qkv": ((8, 8, 8), (2, 0))},
    "by other rows of what is not adapted": {"qkv": ((8, 4, 4, 8), (0, 3))},
}
OTHER = {
    "another block": ({"qkv": (3, (0, 1))}, r"'0.qkv' \[0, 1\] of 3 in the model, \[0, 2\] of 3 in the file"),
    "none": (None, r"'0.qkv' \[0\] of 1 in the model, \[0, 2\] of 3 in the file"),
}


def fused(blocks):
    model = nn.Sequential(base(FusedEncoder))
    return randomise(apply_genft(model, config(target_modules=["qkv"], fused_blocks=blocks)))


@pytest.mark.parametrize("blocks", NAMED.values(), ids=NAMED)
def test_blocks_may_be_named_and_cut_in_another_way(blocks, tmp_path):
    save_adapter(fused({"qkv": (3, (0, 2))}), tmp_path)
    expected = load_adapter(nn.Sequential(base(FusedEncoder)), tmp_path)(tokens())
    assert torch.equal(load_adapter(fused(blocks), tmp_path)(tokens()), expected)


@pytest.mark.parametrize("blocks, message", OTHER.values(), ids=OTHER)
def test_other_blocks_are_refused(blocks, message, tmp_path):
    save_adapter(fused({"qkv": (3, (0, 2))}), tmp_path)
    model = fused(blocks)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"another configuration \(fused_blocks: of {message}\)"):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before


def test_units_of_experts_count_for_nothing_where_there_are_none(folder):
    load_adapter(adapted(expert_specific="layer", **SAVED), folder)


def test_a_merged_model_is_refused(folder):
    model = merge(adapted(**SAVED))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="'layers.0.attention.query' is merged: call unmerge"):
        load_adapter(model, folder)
    assert snapshot(model) == before
    load_adapter(unmerge(model), folder)


def test_an_adapter_for_layers_that_the_model_lacks(folder):
    model = base(GroupedQueryBlock)
    before = snapshot(model)
    with pytest.raises(ValueError, match="modules_to_save|matched nothing|layers differ"):
        load_adapter(model, folder)
    assert snapshot(model) == before


def test_a_disabled_model_is_neither_saved_nor_loaded_nor_undone(folder):
    model, files = adapted(**SAVED), contents(folder)
    before = snapshot(model)
    for function in (remove_genft, lambda m: save_adapter(m, folder), lambda m: load_adapter(m, folder)):
        with disabled(model), pytest.raises(RuntimeError, match="the adapter is disabled"):
            function(model)
    assert snapshot(model) == before and contents(folder) == files


def test_a_model_without_an_adapter_cannot_be_saved(tmp_path):
    with pytest.raises(RuntimeError, match="no GenFT adapter"):
        save_adapter(base(), tmp_path / "new")
    with pytest.raises(RuntimeError, match="no GenFT adapter"), disabled(nn.Linear(2, 2)):
        pass
    assert not (tmp_path / "new").exists()


# --- a save that fails ----------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        save_adapter(adapted(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_adapter_of_the_vtab_preset_warns_as_its_configuration_does(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the specific units can never train")
        settings = GenFTConfig.preset("vtab", shared_dim=2, specific_dim=1)
    save_adapter(randomise(apply_genft(base(), settings)), tmp_path)
    with pytest.warns(UserWarning, match="can never train"):
        load_adapter(base(), tmp_path)


def test_layer_whose_generator_is_not_the_models_is_neither_saved_nor_loaded(folder, tmp_path):
    model = adapted(**SAVED)
    model.layers.append(copy.deepcopy(model.layers[0]))
    told = r"'layers\.\d+\.attention\.query' has a generator that is none of model.genft_generators"
    with pytest.raises(RuntimeError, match=told):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=told):
        load_adapter(model, folder)
    assert snapshot(model) == before
    remove_genft(model)
    save_adapter(apply_genft(model, config(**SAVED)), tmp_path / "new")  # as the message says
