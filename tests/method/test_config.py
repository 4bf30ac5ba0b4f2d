import dataclasses
import json
import warnings

import pytest
import torch

from genft_kernels import GenFTConfig, GenFTLinear


@pytest.mark.parametrize(
    "field, value",
    [
        ("shared_dim", -1),
        ("shared_dim", 2.5),
        ("specific_dim", True),
        ("inner_activation", "elu"),
        ("outer_activation", None),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", float("nan")),
        ("bias", "true"),
        ("weight_ratio", "mean"),
        ("weight_ratio", float("inf")),
        ("ratio_scope", "some"),
        ("scaling", "1"),
        ("scaling", float("nan")),
        ("transform", "none"),
        ("tie_specific", 1),
        ("delta_layout", "out"),
        ("init_shared", "zeros"),
        ("init_specific_down", "zero"),
        ("init_specific_up", "ones"),
        ("zero_delta", 0),
        ("zero_delta", "downs"),
        ("zero_delta", None),
        ("target_modules", []),
        ("target_modules", [1]),
        ("exclude_modules", ""),
        ("modules_to_save", "classifier"),
        ("fused_blocks", {}),
        ("fused_blocks", {"qkv": 3}),
        ("fused_blocks", {"qkv": (3, (0, 3))}),
        ("fused_blocks", {"qkv": (3, (0, 0))}),
        ("fused_blocks", {"qkv": (3, ())}),
    ],
)
def test_bad_value_raises_and_names_its_field(field, value):
    with pytest.raises(ValueError, match=field):
        GenFTConfig(**{field: value})


def test_config_must_have_something_to_train():
    with pytest.raises(ValueError, match="shared_dim . specific_dim"):
        GenFTConfig(shared_dim=0, specific_dim=0)


def test_relu_outside_with_zero_delta_would_never_train():
    with pytest.raises(ValueError, match="zero_delta.*relu"):
        GenFTConfig(outer_activation="relu")
    with pytest.raises(ValueError, match="zero_delta='down' with inner_activation='relu'"):
        GenFTConfig(inner_activation="relu", transform="row", zero_delta="down")
    GenFTConfig(outer_activation="relu", zero_delta=False)
    GenFTConfig(inner_activation="relu", transform="row")


def test_zero_delta_by_its_names():
    up, down = (GenFTConfig(transform="column", zero_delta=value) for value in ("up", "down"))
    assert up == GenFTConfig(transform="column") and up.to_dict()["zero_delta"] is True
    assert down.to_dict()["zero_delta"] == "down" != up
    assert GenFTConfig.from_dict(json.loads(json.dumps(down.to_dict()))) == down
    with pytest.raises(
        ValueError, match="zero_delta='down' needs transform='column', 'row' or 'sum', got transform='both'"
    ):
        GenFTConfig(zero_delta="down")


def test_out_in_needs_both_stages():
    with pytest.raises(ValueError, match="delta_layout.*transform"):
        GenFTConfig(delta_layout="out_in", transform="column")


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_string_must_be_a_regular_expression(field):
    with pytest.raises(ValueError, match=rf"{field}='.*\(q' is not a regular expression: missing \)"):
        GenFTConfig(**{field: ".*(q"})


def test_specific_units_that_cannot_train_warn():
    with pytest.warns(UserWarning, match="specific units can never train"):
        GenFTConfig.preset("vtab")
    with pytest.warns(UserWarning, match="never train"):
        GenFTConfig(init_specific_down="zeros")  # tied: zero_delta zeroes the up matrix of both stages
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GenFTConfig(init_specific_down="zeros", tie_specific=False)
        GenFTConfig(init_specific_down="zeros", init_specific_up="zeros", transform="column", zero_delta="down")


def test_warning_points_at_the_line_that_set_it():
    with pytest.warns(UserWarning, match="scaling=0") as caught:
        dataclasses.replace(GenFTConfig(), scaling=0)
    assert [each.filename for each in caught] == [__file__]


@pytest.mark.parametrize("zero", ["scaling", "weight_ratio"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transform", ["both", "column", "row", "sum"])
def test_what_can_never_train_warns(transform, bias, zero):
    """And nothing else: biases train without W."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = GenFTConfig(
            shared_dim=2, specific_dim=1, bias=bias, transform=transform, zero_delta=False, **{zero: 0}
        )
    told = [str(each.message) for each in caught]
    layer = GenFTLinear(6, 6, config=config)
    layer(torch.randn(3, 6)).square().sum().backward()
    still = not any(p.grad.any() for p in layer.parameters() if p.requires_grad)
    assert still == bool(told) == (zero == "scaling" or not bias)
    assert all(each.startswith(f"{zero}=0") and "no unit can ever train" in each for each in told)


def test_config_is_immutable_and_survives_json():
    config = GenFTConfig.preset("llama", target_modules=["q_proj"], modules_to_save={"b", "a"},
                                fused_blocks={"qkv": [3, [2, 0]]}, weight_ratio="rms")  # fmt: skip
    assert config.modules_to_save == ("a", "b") and config.fused_blocks == {"qkv": (3, (0, 2))}
    assert GenFTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(AttributeError):
        config.shared_dim = 3
    with pytest.raises(ValueError, match="unknown configuration fields: rank"):
        GenFTConfig.from_dict({"rank": 3})


def test_numpy_numbers_are_taken():
    import numpy as np

    config = GenFTConfig(shared_dim=np.int64(3), scaling=np.float32(0.5), weight_ratio=np.float64(2))
    assert GenFTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_presets_are_those_of_the_table():
    glue, llama = (GenFTConfig.preset(name) for name in ("glue", "llama"))
    with pytest.warns(UserWarning):
        vtab = GenFTConfig.preset("vtab")
    table = {
        "glue": (24, 2, 0.5, "weight", "identity", "identity", 0.1, 0.05, True, "out_in", "kaiming_uniform", "linear"),
        "vtab": (32, 5, 1.4, "all", "identity", "leaky_relu", 0.1, 1.0, False, "in_out", "zeros", "trunc_normal"),
        "llama": (4, 4, 1.0, "weight", "gelu", "gelu", 0.0, 1.0, True, "out_in", "kaiming_uniform", "linear"),
    }
    for name, c in (("glue", glue), ("vtab", vtab), ("llama", llama)):
        assert table[name] == (
            c.shared_dim, c.specific_dim, c.weight_ratio, c.ratio_scope, c.inner_activation, c.outer_activation,
            c.dropout, c.scaling, c.bias, c.delta_layout, c.init_specific_down, c.init_shared,
        )  # fmt: skip
        assert c.init_specific_up == c.init_specific_down and not c.zero_delta
    assert GenFTConfig.preset("fast") == GenFTConfig(
        shared_dim=12, specific_dim=7, transform="column", weight_ratio="rms", scaling=0.1, zero_delta="down"
    )
    assert GenFTConfig.preset("fast-sum") == GenFTConfig(
        shared_dim=12, specific_dim=3, transform="sum", weight_ratio="rms", scaling=0.1, zero_delta="down"
    )
    assert GenFTConfig.preset("fast-both") == GenFTConfig(
        shared_dim=24, specific_dim=4, weight_ratio=16, inner_activation="tanh"
    )
    assert GenFTConfig.preset("wegeft") == GenFTConfig(
        shared_dim=8, specific_dim=0, transform="column", zero_delta="down"
    )
    assert GenFTConfig.preset("glue", dropout=0.0).dropout == 0
    with pytest.raises(
        ValueError, match="preset must be one of glue, vtab, llama, fast, fast-sum, fast-both, wegeft; got"
    ):
        GenFTConfig.preset("cola")
