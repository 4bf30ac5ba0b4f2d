"""Official checkpoints that are damaged or do not fit are refused by name, and the model is as it was."""

from __future__ import annotations

import builtins
import copy
import json
import pickle
import warnings

import pytest
import torch

from genft_kernels import load_adapter
from genft_kernels.files.official import read_official
from tests.helpers.official_checks import assert_untouched, head_of, snapshot
from tests.helpers.official_faults import GENERATOR, PEFT_FAULTS, TARGETS, VIT_FAULTS
from tests.helpers.official_writers import (
    BASE,
    D,
    Encoder,
    R,
    S,
    ViT,
    peft_checkpoint,
    vit_checkpoint,
    write_peft,
    write_vit,
)

# A warning about how training would start from initial values; the files here hold other ones.
pytestmark = pytest.mark.filterwarnings("ignore:.*can never train.*")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_the_odd_tensor_out_is_the_one_named(tmp_path):
    tensors, settings = peft_checkpoint(TARGETS, D, S, R)
    tensors[f"{GENERATOR}.weight"] = torch.zeros(S, 2 * D)
    with pytest.raises(ValueError) as caught:
        read_official(write_peft(tmp_path, tensors, settings))
    assert [key for key in tensors if key in str(caught.value)] == [f"{GENERATOR}.weight"]


def test_a_generator_without_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="adapter_model.safetensors names no adapted layer"):
        read_official(write_peft(tmp_path, *peft_checkpoint((), D, S, R)))


def test_an_unknown_tensor_of_the_method_is_no_head(tmp_path):
    checkpoint = peft_checkpoint(TARGETS, D, S, R, head={"encoder.genft_extra": torch.zeros(2)}, modules_to_save=None)
    with pytest.raises(ValueError, match=f"unexpected {BASE}encoder.genft_extra"):
        read_official(write_peft(tmp_path, *checkpoint))


@pytest.mark.parametrize(
    ("variant", "fault"), [("peft", fault) for fault in PEFT_FAULTS] + [("vit", f) for f in VIT_FAULTS]
)
def test_faults_are_named_and_leave_the_model_as_it_was(tmp_path, variant, fault):
    if variant == "peft":
        model, write, (change, words) = Encoder(D), write_peft, PEFT_FAULTS[fault]
        model.encoder.layer[1].attention["key"].weight.requires_grad_(False)
        checkpoint = peft_checkpoint(TARGETS, D, S, R, head=head_of(model))
    else:
        model, write, (change, words) = ViT(D), write_vit, VIT_FAULTS[fault]
        checkpoint = vit_checkpoint(3, D, S, R, bias=True)
    load_adapter(copy.deepcopy(model), write(tmp_path, *checkpoint))  # without the fault it loads
    change(*checkpoint)
    before = snapshot(model)
    with pytest.raises(ValueError) as caught:
        load_adapter(model, write(tmp_path, *checkpoint))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("folder", "model"),
    [
        ("peft", lambda: Encoder(D, classes=4)),
        ("peft", lambda: Encoder(D * 2)),
        ("peft", lambda: ViT(D)),
        ("vit", lambda: ViT(D, classes=4)),
        ("vit", lambda: ViT(D * 2)),
        ("vit", lambda: ViT(D, depth=4)),
        ("vit", lambda: Encoder(D)),
    ],
)
def test_another_base_model_is_refused_and_left_as_it_was(tmp_path, folder, model):
    write_peft(tmp_path / "peft", *peft_checkpoint(TARGETS, D, S, R, head=head_of(Encoder(D))))
    write_vit(tmp_path / "vit", *vit_checkpoint(3, D, S, R))
    model = model()
    before = snapshot(model)
    with pytest.raises(ValueError):
        load_adapter(model, tmp_path / folder)
    assert_untouched(model, before)


def test_damaged_files_are_named(tmp_path):
    peft = write_peft(tmp_path / "peft", *peft_checkpoint(TARGETS, D, S, R))
    vit = write_vit(tmp_path / "vit", *vit_checkpoint(3, D, S, R))
    for path in (peft / "adapter_model.safetensors", vit / "best_model.pt"):
        whole = path.read_bytes()
        for size in (0, 5, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=path.name):
                read_official(path.parent)
        path.write_bytes(whole)
        read_official(path.parent)
    (vit / "args.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="args.yaml is not valid YAML"):
        read_official(vit)
    (vit / "args.yaml").write_text("- a")
    with pytest.raises(ValueError, match="args.yaml does not hold a mapping"):
        read_official(vit)
    (peft / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json is not valid JSON"):
        load_adapter(Encoder(D), peft)


class _Marker:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    tensors, settings = vit_checkpoint(3, D, S, R)
    folder = write_vit(tmp_path, tensors | {"code": _Marker(str(tmp_path / "ran"))}, settings)
    with pytest.raises(ValueError, match="best_model.pt.*more than plain tensors"):
        read_official(folder)
    (folder / "best_model.pt").write_bytes(pickle.dumps(_Marker(str(tmp_path / "ran"))))
    with pytest.raises(ValueError, match="best_model.pt"):
        read_official(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("checkpoint", [[1], {"epoch": 1}, {"model": [1]}])
def test_checkpoint_without_a_model(tmp_path, checkpoint):
    folder = write_vit(tmp_path, *vit_checkpoint(3, D, S, R))
    torch.save(checkpoint, folder / "best_model.pt")
    with pytest.raises(ValueError, match="best_model.pt.*'model'"):
        read_official(folder)


def test_vit_variant_without_its_settings_asks_for_them(tmp_path):
    folder = write_vit(tmp_path, *vit_checkpoint(3, D, S, R))
    (folder / "args.yaml").unlink()
    with pytest.raises(ValueError, match="args.yaml.*unknown.*ratio_W0.*inner_activation.*outer_activation.*scaling"):
        load_adapter(ViT(D), folder)


def test_vit_variant_without_pyyaml_says_what_to_install(tmp_path, monkeypatch):
    folder, real = write_vit(tmp_path, *vit_checkpoint(3, D, S, R)), builtins.__import__

    def no_yaml(name, *args, **kwargs):
        if name == "yaml":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_yaml)
    with pytest.raises(ImportError, match="pip install pyyaml"):
        read_official(folder)


@pytest.mark.parametrize("present", [None, "adapter_config.json", "adapter_model.safetensors", "args.yaml"])
def test_nothing_to_read_lists_what_was_looked_for(tmp_path, present):
    if present:
        (tmp_path / present).write_text(json.dumps({"peft_type": "GENFT"}))
    with pytest.raises(FileNotFoundError) as caught:
        load_adapter(Encoder(D), tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors", "best_model.pt", "args.yaml"):
        assert name in str(caught.value)


def test_a_frozen_start_is_warned_of(tmp_path):
    checkpoint = vit_checkpoint(3, D, S, R, individual_init_b="zero")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_official(write_vit(tmp_path, *checkpoint))
    assert any("can never train" in str(warning.message) for warning in caught)
