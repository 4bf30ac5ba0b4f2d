"""Experts' updates exported in PEFT's LoRA form for `target_parameters`, and what PEFT makes of it."""

import json

import pytest
import torch

from genft_kernels import apply_genft, export_lora, fidelity_report, merge
from tests.helpers.expert_models import EXPERTS, MODELS, answer, gpt_oss, mixtral, settings, tokens

peft = pytest.importorskip("peft")


FORMS = [{}, dict(transform="column", expert_specific="layer"), dict(bias=True, scaling=0.5)]


def exported(make, directory, **changes):
    model = apply_genft(make(), settings(**changes))
    return model, export_lora(model, directory, inputs={"input_ids": tokens(), "use_cache": False})


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_peft_answers_as_the_model_does(make, form, tmp_path):
    model, export = exported(make, tmp_path, **form)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(answer(loaded, tokens()), answer(model, tokens()), rtol=1e-4, atol=1e-5)
    assert export.drift < 1e-5
    assert set(export.energy.values()) == {1.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_export_in_16_bits_is_checked(dtype, tmp_path):
    """PEFT rounds the update of stacked experts to their dtype before it gives it."""
    _, export = exported(lambda: mixtral().to(dtype), tmp_path)
    assert export.drift < 8 * torch.finfo(dtype).eps


def test_file_is_that_of_target_parameters(tmp_path):
    _, export = exported(mixtral, tmp_path, target_modules=["q_proj"])
    description = json.loads((tmp_path / "adapter_config.json").read_text())
    assert description["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert description["target_modules"] == ["q_proj"]
    # gate and up have units of their own
    assert export.rank == description["r"] == 2 * 5
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    experts = "base_model.model.model.layers.1.mlp.experts"
    assert tensors[f"{experts}.base_layer.lora_A.weight"].shape == (EXPERTS * 10, 16)
    assert tensors[f"{experts}.lora_B.weight"].shape == (16, 10 * EXPERTS)


@pytest.mark.parametrize("target", ["experts.gate_up_proj", "experts.down_proj"])
def test_one_projection_alone(target, tmp_path):
    model, _ = exported(gpt_oss, tmp_path, target_parameters=[target])
    loaded = peft.PeftModel.from_pretrained(gpt_oss(), tmp_path).eval()
    torch.testing.assert_close(answer(loaded, tokens()), answer(model, tokens()), rtol=1e-4, atol=1e-5)


def test_some_layers_alone_are_named_in_full(tmp_path):
    exported(mixtral, tmp_path, exclude_modules=["layers.0.mlp.experts"])
    description = json.loads((tmp_path / "adapter_config.json").read_text())
    names = [f"model.layers.1.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj")]
    assert description["target_parameters"] == names


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (dict(outer_activation="gelu"), {}, "down_proj_update.*|gate_up_proj_update.*no LoRA"),
        (dict(outer_activation="gelu"), dict(rank=4), "no LoRA: write merged weights"),
        ({}, dict(rank=3), "written as they are, of rank 10"),
        ({}, dict(energy=0.9), "written as they are, of rank 10"),
    ],
)
def test_exports_that_cannot_be_written_are_refused(changes, options, message, tmp_path):
    model = apply_genft(mixtral(), settings(**changes))
    with pytest.raises(ValueError, match=message):
        export_lora(model, tmp_path / "lora", **options)
    assert not (tmp_path / "lora").exists()


def test_merged_experts_are_not_exported(tmp_path):
    with pytest.raises(RuntimeError, match="gate_up_proj_update' is merged"):
        export_lora(merge(apply_genft(mixtral(), settings())), tmp_path)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])  # the latter has no float64
def test_fidelity_is_reported(implementation):
    model = apply_genft(mixtral(), settings()).float()
    model.set_experts_implementation(implementation)
    report = fidelity_report(model, {"input_ids": tokens()})
    assert report.not_exported is None and model.config._experts_implementation == implementation
    gains = {row.way: row.gain for row in report.rows if row.dtype == torch.float32}
    assert gains["exported"] == pytest.approx(1, abs=1e-3)
