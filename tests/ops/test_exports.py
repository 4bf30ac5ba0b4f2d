"""Models with an adapter as graphs of other kinds: traced, exported, and for ONNX."""

import io

import pytest
import torch
from torch import nn

from genft_kernels import GenFTConfig, GenFTLinear, apply_genft, merge
from tests.helpers.adapted_models import adapted
from tests.helpers.tiny_models import randomise, tokens

SETTINGS = {
    "": {},
    "tiled": dict(outer_activation="gelu", bias=True),
    "rms": dict(transform="column", weight_ratio="rms"),
}
every_form = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradients", [True, False])
@every_form
def test_traced_model_generates_from_what_its_parameters_are_then(settings, gradients):
    model = adapted(settings=settings).eval()
    with torch.set_grad_enabled(gradients):
        model(tokens())  # its updates are at hand
        traced = torch.jit.trace(model, (tokens(),))
        for scale in (0.3, 0.5):
            randomise(model.layers, scale)
            randomise(model.genft_generators, scale)
            assert torch.allclose(traced(tokens()), model(tokens()), rtol=1e-12)
        assert torch.allclose(traced(tokens(7)), model(tokens(7)), rtol=1e-12)  # another batch


class AdaptedAreLeaves(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, GenFTLinear) or super().is_leaf_module(module, name)


def test_symbolic_tracing_wants_a_merged_model_or_leaves():
    config = GenFTConfig(shared_dim=2, target_modules="all-linear")
    model = apply_genft(nn.Sequential(nn.Linear(8, 8)), config).eval()
    x = torch.randn(3, 8)
    expected = model(x)
    assert torch.equal(torch.fx.GraphModule(model, AdaptedAreLeaves().trace(model))(x), expected)
    assert torch.allclose(torch.fx.symbolic_trace(merge(model))(x), expected, atol=1e-5)


def test_dropout_is_not_traced_in_training():
    with pytest.raises(RuntimeError, match=r"dropout's masks anew: call model.eval\(\) before torch.jit.trace"):
        torch.jit.trace(adapted(settings=dict(dropout=0.1)).train(), (tokens(),))


@every_form
def test_exported_program_survives_a_file(settings):
    model = adapted(settings=settings).eval()
    program, file = torch.export.export(model, (tokens(),)), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert torch.allclose(loaded(tokens()), model(tokens()), rtol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "program"])
def test_onnx_wants_the_update_merged(dynamo):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    config = GenFTConfig(shared_dim=2, specific_dim=1, target_modules=["0", "2"])
    model = randomise(apply_genft(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), config)).eval()
    x = torch.randn(3, 8)
    with pytest.raises(Exception, match=r"call merge\(model\) before torch.onnx.export"):
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=dynamo)
    torch.onnx.export(merge(model), (x,), file := io.BytesIO(), dynamo=dynamo)
    assert len(file.getvalue()) > 500
