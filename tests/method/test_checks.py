"""Bad input: the error names the culprit, in the functional interface and in the specification alike."""

import subprocess
import sys

import pytest
import torch

from genft_kernels import GeneratorParameters, GenFTConfig, __version__, reference
from genft_kernels.functional import factored_linear, genft_linear

CONFIG = GenFTConfig(shared_dim=2, specific_dim=1)
JAGGED = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)], layout=torch.jagged)


def arguments(**changed):
    values = dict(
        x=torch.randn(4, 6),
        weight=torch.randn(5, 6),
        bias=torch.randn(5),
        params=GeneratorParameters(torch.randn(3, 6), torch.randn(6, 3), torch.randn(3, 5), torch.randn(5, 3)),
        config=CONFIG,
    )
    return {**values, **changed}


def params_with(**changed):
    return arguments()["params"]._replace(**changed)


BAD = {
    "x-width": (dict(x=torch.randn(4, 7)), ValueError, r"x must be \[..., in\] with in = 6"),
    "x-scalar": (dict(x=torch.tensor(1.0)), ValueError, "x must be"),
    "x-dtype": (
        dict(x=torch.randn(4, 6).double()),
        TypeError,
        "x has dtype torch.float64 but weight has torch.float32",
    ),
    "x-nested": (dict(x=JAGGED), TypeError, "x is a nested tensor"),
    "x-integer": (dict(x=torch.ones(4, 6).long()), TypeError, "x has dtype torch.int64"),
    "x-device": (dict(x=torch.randn(4, 6, device="meta")), ValueError, "x is on meta but weight is on cpu"),
    "weight-vector": (dict(weight=torch.randn(6)), ValueError, "weight must be a matrix"),
    "weight-trains": (dict(weight=torch.randn(5, 6, requires_grad=True)), ValueError, "weight requires grad"),
    "weight-computed": (
        dict(weight=2 * torch.randn(5, 6, requires_grad=True)),
        ValueError,
        "computed from something that trains: freeze that, as weight_norm's",
    ),
    "weight-quantised": (
        dict(weight=torch.ones(5, 6).to(torch.int8)),
        TypeError,
        "weight has dtype torch.int8: quantised",
    ),
    "weight-meta": (dict(weight=torch.randn(5, 6, device="meta")), ValueError, "weight is on the meta device"),
    "weight-sparse": (dict(weight=torch.randn(5, 6).to_sparse()), TypeError, "weight has layout torch.sparse_coo"),
    "bias-shape": (dict(bias=torch.randn(6)), ValueError, r"bias must be \[out\] = \[5\]"),
    "bias-dtype": (dict(bias=torch.randn(5).half()), TypeError, "bias has torch.float16"),
    "weight-empty": (dict(weight=torch.randn(5, 0)), ValueError, "weight must be a matrix"),
    "config-dict": (dict(config={"shared_dim": 2}), TypeError, "config must be a GenFTConfig, got dict"),
    "params-meta": (
        dict(params=params_with(row_up=torch.randn(5, 3, device="meta"))),
        ValueError,
        "params.row_up is on the meta device",
    ),
    "params-missing": (dict(params=params_with(row_up=None)), ValueError, r"params.row_up is missing.*\[5, 3\]"),
    "params-extra": (
        dict(params=params_with(row_up_bias=torch.randn(5))),
        ValueError,
        "params.row_up_bias must be None",
    ),
    "params-shape": (
        dict(params=params_with(column_up=torch.randn(6, 4))),
        ValueError,
        r"params.column_up must have shape \[6, 3\]",
    ),
    "params-dtype": (
        dict(params=params_with(row_down=torch.ones(3, 5).int())),
        TypeError,
        "params.row_down has dtype torch.int32",
    ),
    "out_in-rectangular": (
        dict(config=GenFTConfig(shared_dim=2, specific_dim=1, delta_layout="out_in")),
        ValueError,
        "delta_layout='out_in' needs a square weight",
    ),
}


@pytest.mark.parametrize("function", [genft_linear, reference.genft_linear], ids=["functional", "reference"])
@pytest.mark.parametrize("changed, error, message", BAD.values(), ids=BAD)
def test_culprit_is_named(changed, error, message, function):
    with pytest.raises(error, match=message):
        function(**arguments(**changed))


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(h=torch.randn(5, 3)), r"h must be \[in, k\] with in = 6"),
        (dict(b=torch.randn(6, 3)), r"b must be \[out, k\] with out = 5"),
        (dict(b=torch.randn(5, 4)), "h and b must share k"),
        (dict(h=torch.randn(6, 0), b=torch.randn(5, 0)), "k of at least 1"),
        (dict(activation="elu"), "activation must be one of"),
        (dict(dropout=1.0), "dropout must be a number in"),
        (dict(dropout="0.1"), "dropout must be a number in"),
        (dict(scale=torch.tensor(2.0, requires_grad=True)), "scale must be a finite number"),
        (dict(scale=float("nan")), "scale must be a finite number"),
        (dict(backend="cublas"), "backend must be one of"),
    ],
)
def test_factored_linear_names_the_culprit(changed, message):
    values = dict(
        x=torch.randn(4, 6), weight=torch.randn(5, 6), bias=None, h=torch.randn(6, 3), b=torch.randn(5, 3), **{}
    )
    with pytest.raises(ValueError, match=message):
        factored_linear(**{**values, **changed})


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, torch.tensor([1.0]), torch.tensor([1, 2])])
def test_seed_is_64_bits(seed):
    with pytest.raises(ValueError, match="seed must be"):
        genft_linear(**arguments(), training=True, seed=seed)
    config = GenFTConfig(shared_dim=2, specific_dim=1, dropout=0.5)
    genft_linear(**arguments(config=config), training=True, seed=2**64 - 1)


def test_seed_may_be_numpys():
    import numpy as np

    config = GenFTConfig(shared_dim=2, specific_dim=1, dropout=0.5)
    options = dict(arguments(config=config), training=True)
    assert torch.equal(genft_linear(**options, seed=np.uint64(2**64 - 1)), genft_linear(**options, seed=2**64 - 1))


def test_dtypes_may_mix_under_autocast_only():
    with torch.autocast("cpu", torch.bfloat16):
        y = genft_linear(**arguments(x=torch.randn(4, 6).bfloat16()))
    assert y.dtype == torch.bfloat16


def run_python(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout


def test_import_is_light():
    loaded = run_python("-c", "import sys, genft_kernels; print(*sys.modules)").split()
    assert not {"triton", "transformers", "peft", "rich", "matplotlib", "yaml"} & set(loaded)


def test_report_names_version_environment_and_backends():
    report = run_python("-m", "genft_kernels")
    assert report.startswith(f"genft_kernels {__version__}\n")
    assert f"torch {torch.__version__}" in report and "eager: available" in report and "nvcc:" in report
