"""The export as LoRA: PEFT answers as the model did, bit for rounding; what LoRA cannot say is refused or measured."""

import copy
import json
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from genft_kernels import GenFTConfig, apply_genft, disabled, export_lora, merge, remove_genft, save_adapter
from genft_kernels.files import folder, lora_check
from tests.helpers.tiny_models import (
    Encoder,
    FusedEncoder,
    FusedGroupedQueryBlock,
    GroupedQueryBlock,
    TiedModel,
    randomise,
    tokens,
)

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from tests.helpers.peft_models import TransposedEncoder  # noqa: E402


def config(**settings) -> GenFTConfig:
    return GenFTConfig(**{"shared_dim": 2, "specific_dim": 1, "inner_activation": "tanh", **settings})


def adapted(make=Encoder, dtype=torch.float32, **settings):
    torch.manual_seed(3)
    return randomise(apply_genft(make().to(dtype).eval(), config(**settings)))


def as_peft(model, folder):
    """A PeftModel on a base of its own, with the exported adapter; PEFT must find nothing to say about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(remove_genft(copy.deepcopy(model)), folder).eval()


def tensors_in(folder):
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


# (model, settings, rank)
EXACT = {
    "square": (Encoder, {}, 3),
    "biases-out_in": (Encoder, dict(bias=True, delta_layout="out_in", scaling=0.05), 4),
    "dropout-in-training-only": (Encoder, dict(dropout=0.1), 3),
    "rms-all": (Encoder, dict(weight_ratio="rms", ratio_scope="all"), 3),
    "column": (Encoder, dict(transform="column", bias=True), 4),
    "row": (Encoder, dict(transform="row", bias=True), 4),
    "sum": (Encoder, dict(transform="sum", bias=True), 8),
    "several-shapes": (GroupedQueryBlock, dict(target_modules="all-linear", bias=True), 4),
    "fused": (FusedEncoder, dict(fused_blocks={"qkv": (3, (0, 2))}, delta_layout="out_in", bias=True), 8),
    "fused-unequal": (
        FusedGroupedQueryBlock,
        dict(fused_blocks={"qkv_proj": ((8, 4, 4), (0, 1, 2))}, bias=True),
        12,
    ),
    "fused-beside-whole": (FusedEncoder, dict(fused_blocks={"qkv": (3, (0, 2))}, target_modules=["qkv", "proj"]), 6),
    "conv1d": (TransposedEncoder, dict(target_modules=["c_attn", "c_proj"], bias=True), 4),
    "conv1d-fused": (TransposedEncoder, dict(fused_blocks={"c_attn": (3, (1, 2))}), 6),
    "modules_to_save": (Encoder, dict(modules_to_save=["classifier", "norm"]), 3),
}


@pytest.mark.parametrize("make, settings, rank", EXACT.values(), ids=EXACT)
def test_export_is_exact(make, settings, rank, tmp_path):
    model = adapted(make, torch.float64, **settings)
    export = export_lora(model, tmp_path / "lora", inputs=(tokens(),))
    assert export.rank == rank and set(export.energy.values()) == {1.0}
    assert export.drift < 1e-12
    expected, frozen = model(tokens()), remove_genft(copy.deepcopy(model))(tokens())
    answer = as_peft(model, export.directory)(tokens())
    assert (answer - expected).abs().max() < 1e-12 < 1e-4 < (expected - frozen).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rms", [False, True])
def test_export_agrees_to_rounding(dtype, rms, tmp_path):
    model = adapted(dtype=dtype, bias=True, weight_ratio="rms" if rms else 4.0)
    export = export_lora(model, tmp_path, inputs=tokens())
    assert export.drift < 8 * torch.finfo(dtype).eps
    assert {tensor.dtype for tensor in tensors_in(tmp_path).values()} == {torch.float32}  # W's dtype would lose


def test_a_file_says_what_servers_read(tmp_path):
    model = adapted(GroupedQueryBlock, target_modules=["q_proj", "v_proj"], modules_to_save=["down_proj"])
    export = export_lora(model, tmp_path, rank=np.int64(5))
    assert (export.rank, export.server_rank, export.drift) == (5, 8, None)
    description = json.loads((tmp_path / "adapter_config.json").read_text())
    assert description["r"] == description["lora_alpha"] == 5
    assert description["rank_pattern"] == description["alpha_pattern"] == {}
    assert description["target_modules"] == ["q_proj", "v_proj"]
    assert description["modules_to_save"] == ["down_proj"]
    shapes = {name: list(tensor.shape) for name, tensor in tensors_in(tmp_path).items()}
    assert shapes == {
        "base_model.model.q_proj.lora_A.weight": [5, 8],
        "base_model.model.q_proj.lora_B.weight": [8, 5],
        "base_model.model.v_proj.lora_A.weight": [5, 8],
        "base_model.model.v_proj.lora_B.weight": [4, 5],
        "base_model.model.down_proj.weight": [8, 24],
        "base_model.model.down_proj.bias": [8],
    }


def test_paths_are_written_where_last_names_mean_other_layers_too(tmp_path):
    model = adapted(target_modules=["layers.0.attention.query", "layers.1.attention.key"])
    export_lora(model, tmp_path, inputs=tokens())
    description = json.loads((tmp_path / "adapter_config.json").read_text())
    assert description["target_modules"] == ["layers.0.attention.query", "layers.1.attention.key"]


def test_unadapted_rows_of_a_fused_weight_are_zero(tmp_path):
    export_lora(adapted(FusedEncoder, fused_blocks={"qkv": (3, (0, 2))}), tmp_path)
    up = tensors_in(tmp_path)["base_model.model.qkv.lora_B.weight"]
    assert up[8:16].eq(0).all() and up[:8].ne(0).any() and up[16:].ne(0).any()


# --- truncation -----------------------------------------------------------------------------------------------------


def test_a_tiled_update_is_refused_with_the_ways_out(tmp_path):
    with pytest.raises(ValueError, match=r"'layers.0.attention.query'.*keep_update=True.*rank= or energy="):
        export_lora(adapted(outer_activation="gelu"), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("settings", [dict(outer_activation="gelu"), {}], ids=["tiled", "factored"])
def test_a_truncated_update_keeps_the_energy_it_reports(settings, tmp_path):
    model = adapted(dtype=torch.float64, **settings)
    export = export_lora(model, tmp_path, rank=2, inputs=tokens())
    loaded = as_peft(model, tmp_path).base_model.model
    for path, energy in export.energy.items():
        delta = model.get_submodule(path).delta_weight()
        rest = delta - loaded.get_submodule(path).get_delta_weight("default")
        values = torch.linalg.svdvals(delta).square()
        assert energy == pytest.approx((values[:2].sum() / values.sum()).item(), rel=1e-9)
        assert rest.square().sum().item() == pytest.approx(values[2:].sum().item(), rel=1e-9)
        assert 0.5 < energy < 1
        assert f"{energy:.4f} {path}" in str(export)


def test_energy_takes_the_least_rank_that_keeps_it(tmp_path):
    model = adapted(dtype=torch.float64, outer_activation="gelu")
    export = export_lora(model, tmp_path, energy=0.99, inputs=tokens())
    assert min(export.energy.values()) >= 0.99 and export.drift < 0.2
    assert min(export_lora(model, tmp_path, rank=export.rank - 1).energy.values()) < 0.99


@pytest.mark.parametrize("settings", [dict(outer_activation="gelu"), {}], ids=["tiled", "factored"])
def test_an_update_of_zeros_is_kept_whole(settings, tmp_path):
    model = apply_genft(Encoder().eval(), config(**settings))
    export = export_lora(model, tmp_path, energy=0.9, inputs=tokens())
    assert set(export.energy.values()) == {1.0} and export.rank == 1


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(rank=2, energy=0.5), "not both"),
        (dict(rank=0), "rank must be"),
        (dict(rank=True), "rank must be"),
        (dict(energy=0.0), "energy must be"),
        (dict(energy=float("nan")), "energy must be"),
    ],
    ids=str,
)
def test_bad_sizes_are_refused(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_lora(adapted(), tmp_path / "lora", **given)
    assert not (tmp_path / "lora").exists()


def test_models_that_cannot_be_exported_are_refused(tmp_path):
    model = adapted()
    with pytest.raises(RuntimeError, match="no GenFT adapter"):
        export_lora(Encoder(), tmp_path)
    with disabled(model), pytest.raises(RuntimeError, match="disabled"):
        export_lora(model, tmp_path)
    with pytest.raises(RuntimeError, match="'layers.0.attention.query' is merged"):
        export_lora(merge(copy.deepcopy(model)), tmp_path)
    with pytest.raises(RuntimeError, match="'layers.0.attention.query' is on the meta device"):
        export_lora(copy.deepcopy(model).to("meta"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_sharded_model_is_refused(tmp_path):
    class Sharded(nn.Parameter):
        """Stands for FSDP's DTensor: a parameter of a class of its own."""

    model = adapted()
    query = model.layers[1].attention.query
    query._parameters["specific_down"] = query.specific_down.detach().as_subclass(Sharded)
    with pytest.raises(RuntimeError, match="'layers.1.attention.query' is sharded"):
        export_lora(model, tmp_path)


def test_names_that_peft_cannot_tell_apart_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'second' is the same module as 'first'"):
        export_lora(adapted(TiedModel, target_modules=["first", "second"]), tmp_path)
    model = Encoder()
    model.old_classifier = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="'old_classifier' as well"):
        export_lora(adapted(lambda: model, modules_to_save=["classifier"]), tmp_path)


@pytest.mark.filterwarnings("ignore:modules_to_save")
def test_values_that_are_not_finite_or_no_tensors_are_refused(tmp_path):
    model = adapted(bias=True)
    model.genft_generators["8x8"].row_up_bias.data[3] = torch.nan
    with pytest.raises(ValueError, match="'layers.0.attention.query': .* hold NaN"):
        export_lora(model, tmp_path / "lora")

    class Counted(nn.BatchNorm1d):
        def get_extra_state(self):
            return "a string"

        def set_extra_state(self, state):
            pass

    model = Encoder()
    model.classifier[0] = Counted(8)
    with pytest.raises(ValueError, match="'classifier' has a state that is no tensor"):
        export_lora(adapted(lambda: model, modules_to_save=["classifier"]), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_folder_is_never_left_with_the_description_of_other_tensors(tmp_path, monkeypatch):
    model = adapted()
    export_lora(model, tmp_path)

    def interrupted(staged, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_lora(model, tmp_path, rank=5)
    assert not (tmp_path / "adapter_config.json").exists() and len(tensors_in(tmp_path)) == 8
    monkeypatch.undo()
    export_lora(model, tmp_path, rank=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_adapter_of_this_package_is_not_overwritten(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="holds an adapter of this package"):
        export_lora(model, tmp_path)


def test_an_export_that_peft_understands_otherwise_is_an_error(tmp_path, monkeypatch):
    model, load = adapted(), lora_check.load_into_peft

    def load_wrongly(*args):
        loaded = load(*args)
        loaded.base_model.model.layers[1].attention.value.scaling["default"] = 0.5
        return loaded

    monkeypatch.setattr(lora_check, "load_into_peft", load_wrongly)
    with pytest.raises(RuntimeError, match="'layers.1.attention.value': PEFT's update differs"):
        export_lora(model, tmp_path, inputs=tokens())
    assert not list(tmp_path.iterdir())


def test_logits_that_rounding_does_not_explain_are_an_error(tmp_path, monkeypatch):
    model, load = adapted(), lora_check.load_into_peft

    def load_wrongly(*args):
        loaded = load(*args)
        loaded.base_model.model.classifier[1].bias = nn.Parameter(model.classifier[1].bias + 0.01)
        return loaded

    monkeypatch.setattr(lora_check, "load_into_peft", load_wrongly)
    with pytest.raises(RuntimeError, match="more than rounding"):
        export_lora(model, tmp_path, inputs=tokens())


# --- what it leaves alone -------------------------------------------------------------------------------------------


def test_the_model_is_as_it_was(tmp_path):
    model = adapted(modules_to_save=["classifier"]).train()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    export_lora(model, tmp_path, inputs=dict(tokens=tokens()))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert grads == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert isinstance(model.layers[0].attention.query, type(adapted().layers[0].attention.query))


def test_the_frozen_weights_are_not_copied_for_the_check():
    model = adapted()
    twin = lora_check.frozen_copy(model)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr() and mine is not theirs


def test_the_smallest_rank_of_a_server_is_named(tmp_path):
    model = adapted()
    assert "--max-lora-rank 8 " in str(export_lora(model, tmp_path))
    assert "--max-lora-rank 320 " in str(export_lora(model, tmp_path, rank=257))
    assert "up to 512 only" in str(export_lora(model, tmp_path, rank=513))
