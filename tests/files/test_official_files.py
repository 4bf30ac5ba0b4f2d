"""Official checkpoints: read, loaded, and answering as the official code would; and what is refused, by name."""

from __future__ import annotations

import copy

import pytest
import torch

from genft_kernels import load_adapter, save_adapter
from genft_kernels.files.official import read_official
from tests.helpers.official_checks import agree, double, head_of
from tests.helpers.official_faults import GENERATOR, TARGETS
from tests.helpers.official_writers import (
    BASE,
    D,
    Encoder,
    R,
    S,
    ViT,
    peft_checkpoint,
    peft_forward,
    vit_checkpoint,
    vit_forward,
    write_peft,
    write_vit,
)

# A warning about how training would start from initial values; the files here hold other ones.
pytestmark = pytest.mark.filterwarnings("ignore:.*can never train.*")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- equal to the official forward ---------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [0, R])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("gelu", "gelu"),
        ("LeakyReLU", "None"),
        ("None", "leakyrelu"),
        (None, "None"),
        ("ReLU", "tanh"),
        ("silu", "GELU"),
    ],
)
def test_peft_variant_answers_as_the_official_code(tmp_path, inner, outer, bias, r):
    base, x = double(Encoder(D)), torch.randn(5, 7, D).double()
    checkpoint = peft_checkpoint(
        TARGETS, D, S, r, bias=bias, head=head_of(base), inner_activation=inner, outer_activation=outer, scaling=0.3
    )
    frozen = base(x)
    model = load_adapter(copy.deepcopy(base), write_peft(tmp_path, *checkpoint))
    agree(model.eval()(x), peft_forward(base, x, *checkpoint, TARGETS), frozen)


@pytest.mark.parametrize(("s", "r"), [(S, R), (0, R), (S, 0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("epoch_key", "outer"), [("epoch", "leakyrelu"), ("ep", "None"), ("ep", "gelu")])
def test_vit_variant_answers_as_the_official_code(tmp_path, epoch_key, outer, bias, s, r):
    base, x = double(ViT(D)), torch.randn(5, 7, D).double()
    checkpoint = vit_checkpoint(3, D, s, r, bias=bias, outer_activation=outer, inner_activation="Tanh", scaling=0.3)
    frozen = base(x)
    model = load_adapter(copy.deepcopy(base), write_vit(tmp_path, *checkpoint, epoch_key=epoch_key))
    agree(model.eval()(x), vit_forward(base, x, *checkpoint), frozen)


def test_vit_variant_leaves_k_untouched(tmp_path):
    base, x = double(ViT(D)), torch.randn(5, D).double()
    model = load_adapter(copy.deepcopy(base), write_vit(tmp_path, *vit_checkpoint(3, D, S, R)))
    for adapted, frozen in zip(model.blocks, base.blocks, strict=True):
        (q, k, v), (q0, k0, v0) = adapted.attn.qkv(x).chunk(3, -1), frozen.attn.qkv(x).chunk(3, -1)
        torch.testing.assert_close(k, k0, rtol=1e-14, atol=1e-14)
        assert not torch.allclose(q, q0) and not torch.allclose(v, v0)


@pytest.mark.parametrize("variant", ["peft", "vit"])
def test_float32_and_the_package_s_own_files_agree(tmp_path, variant):
    if variant == "peft":
        base = Encoder(D).eval()
        checkpoint = peft_checkpoint(TARGETS, D, S, R, head=head_of(base), inner_activation="gelu")
        folder, official = write_peft(tmp_path / "official", *checkpoint), (peft_forward, (TARGETS,))
    else:
        base = ViT(D).eval()
        checkpoint = vit_checkpoint(3, D, S, R, bias=True)
        folder, official = write_vit(tmp_path / "official", *checkpoint), (vit_forward, ())
    x = torch.randn(5, 7, D)
    model = load_adapter(copy.deepcopy(base), folder).eval()
    save_adapter(model, tmp_path / "ours")
    again = load_adapter(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.equal(again(x), model(x))
    forward, more = official
    expected = forward(double(base), x.double(), *checkpoint, *more)
    torch.testing.assert_close(model(x).double(), expected, rtol=2e-5, atol=2e-5)


# --- what the files are taken to mean ------------------------------------------------------------------------------


def test_peft_configuration(tmp_path):
    tensors, settings = peft_checkpoint(TARGETS, D, S, R, head=head_of(Encoder(D)), individual_init_b="zero", drop=0.25)
    config, ours, fingerprints = read_official(write_peft(tmp_path, tensors, settings))
    assert fingerprints is None
    expected = dict(
        shared_dim=S, specific_dim=R, inner_activation="identity", outer_activation="identity", dropout=0.25, bias=True,
        weight_ratio=0.5, ratio_scope="weight", scaling=0.05, transform="both", tie_specific=True,
        delta_layout="out_in", init_specific_down="kaiming_uniform", init_specific_up="zeros", zero_delta=False,
        target_modules=sorted(TARGETS), modules_to_save=["classifier"], fused_blocks=None, init_shared="linear",
    )  # fmt: skip
    assert {name: config.to_dict()[name] for name in expected} == expected
    assert torch.equal(ours[f"{TARGETS[0]}.specific_up"], tensors[f"{BASE}{TARGETS[0]}.genft_individual_weight_b"])
    assert torch.equal(ours[f"genft_generators.{D}x{D}.column_down_bias"], tensors[f"{GENERATOR}.bias"])
    assert torch.equal(ours["modules_to_save.classifier.out_proj.weight"], tensors[f"{BASE}classifier.out_proj.weight"])


def test_vit_configuration(tmp_path):
    config = read_official(write_vit(tmp_path, *vit_checkpoint(3, D, S, R, dpr=0.2))).config
    expected = dict(
        shared_dim=S, specific_dim=R, inner_activation="identity", outer_activation="leaky_relu", dropout=0.2,
        bias=False, weight_ratio=1.4, ratio_scope="all", scaling=1.0, transform="both", tie_specific=True,
        delta_layout="in_out", init_specific_down="zeros", init_specific_up="kaiming_uniform", zero_delta=False,
        modules_to_save=["head"], fused_blocks={"qkv": [3, [0, 2]]}, init_shared="trunc_normal",
    )  # fmt: skip
    assert {name: config.to_dict()[name] for name in expected} == expected


def test_ratio_is_ignored_without_individual_features_in_the_peft_variant_only(tmp_path):
    peft = read_official(write_peft(tmp_path / "peft", *peft_checkpoint(TARGETS, D, S, 0, ratio_W0=3.0))).config
    vit = read_official(write_vit(tmp_path / "vit", *vit_checkpoint(3, D, S, 0, ratio_W0=3.0))).config
    assert (peft.weight_ratio, vit.weight_ratio) == (1.0, 3.0)


@pytest.mark.parametrize("bias", [False, True])
def test_bias_is_decided_by_the_tensors(tmp_path, bias):
    peft = peft_checkpoint(TARGETS, D, S, R, bias=bias)
    peft[1]["bias"] = "none" if bias else "all"
    vit = vit_checkpoint(3, D, S, R, bias=bias)
    vit[1]["bias"] = not bias
    assert read_official(write_peft(tmp_path / "peft", *peft)).config.bias is bias
    assert read_official(write_vit(tmp_path / "vit", *vit)).config.bias is bias


def test_order_and_other_settings_do_not_matter(tmp_path):
    tensors, settings = peft_checkpoint(TARGETS, D, S, R)
    shuffled = dict(reversed(tensors.items()))
    other = settings | {"target_modules": r".*\.(query|value)", "layers_to_transform": [1, 0], "task_type": None}
    first = read_official(write_peft(tmp_path / "a", tensors, settings))
    second = read_official(write_peft(tmp_path / "b", shuffled, other))
    assert first.config == second.config
    assert first.tensors.keys() == second.tensors.keys()


@pytest.mark.parametrize(
    ("listed", "keys", "modules"),
    [
        (["classifier"], ["classifier.dense.weight", "classifier.out.bias"], ("classifier",)),
        (["classifier"], ["pre_classifier.weight", "classifier.weight"], ("classifier", "pre_classifier")),
        (["head"], ["bert.head.norm.weight", "bert.head.scale"], ("bert.head",)),
        (None, ["classifier.dense.weight", "classifier.out.bias"], ("classifier.dense", "classifier.out")),
        (None, ["a.scale", "a.b.weight"], ("a",)),
    ],
)
def test_modules_to_save(tmp_path, listed, keys, modules):
    head = {key: torch.randn(3) for key in keys}
    file = read_official(write_peft(tmp_path, *peft_checkpoint(TARGETS, D, S, R, head=head, modules_to_save=listed)))
    assert file.config.modules_to_save == modules
    assert {key for key in file.tensors if key.startswith("modules_to_save.")} == {f"modules_to_save.{k}" for k in keys}


def test_numbers_of_parameters_are_the_published_ones(tmp_path):
    layers = tuple(f"roberta.encoder.layer.{n}.attention.self.{name}" for n in range(12) for name in ("query", "value"))
    peft = read_official(write_peft(tmp_path / "peft", *peft_checkpoint(layers, 768, 24, 2))).tensors
    vit = read_official(write_vit(tmp_path / "vit", *vit_checkpoint(12, 768, 32, 5))).tensors
    count = [sum(t.numel() for key, t in tensors.items() if "modules_to_save" not in key) for tensors in (peft, vit)]
    assert count == [149_044, 190_464]


def test_nan_is_kept(tmp_path):
    tensors, settings = peft_checkpoint(TARGETS, D, S, R)
    for key in tensors:
        if key.endswith("genft_share_2_b.linear.bias"):
            tensors[key][1] = float("nan")
    ours = read_official(write_peft(tmp_path, tensors, settings)).tensors
    assert ours[f"genft_generators.{D}x{D}.row_up_bias"].isnan().nonzero().tolist() == [[1]]


def test_adapter_of_another_name_is_pointed_at(tmp_path):
    write_peft(tmp_path / "second", *peft_checkpoint(TARGETS, D, S, R))
    with pytest.raises(FileNotFoundError, match="subfolders second"):
        load_adapter(Encoder(D), tmp_path)
    load_adapter(Encoder(D), tmp_path / "second")
