"""Bad input at every public entry: an error that names the argument, none silent, none a crash, nothing changed."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from genft_kernels import (
    GeneratorParameters,
    GenFTConfig,
    GenFTGenerator,
    GenFTLinear,
    accumulate,
    apply_genft,
    backends,
    disabled,
    explain,
    export_lora,
    fidelity_report,
    load_adapter,
    merge,
    reference,
    refresh,
    remove_genft,
    save_adapter,
    trainable_summary,
    unmerge,
)
from genft_kernels.functional import factored_linear, genft_linear
from tests.helpers.tiny_models import Encoder, snapshot


class Anything:
    """An object of no use anywhere."""


# By kind: what stands where a tensor, a module, a number, ... is wanted.
KINDS = {
    "None": None,
    "string": "text",
    "bytes": b"text",
    "integer": 3,
    "float": 2.5,
    "bool": True,
    "list": [1, 2],
    "dict": {"a": 1},
    "array": np.ones((2, 3), dtype=np.float32),
    "module": nn.ReLU(),
    "class": nn.Linear,
    "object": Anything(),
    "function": len,
    "tensor": torch.ones(2, 2, 2),
}


def kinds(*without: str) -> dict[str, object]:
    """All but those that are right, or of another kind of wrong."""
    return {kind: value for kind, value in KINDS.items() if kind not in without}


# Each entry with arguments that are right, but for those that are given.


def call_genft_linear(**changed):
    return genft_linear(**{**TENSORS, "params": PARAMS, "config": CONFIG, **changed})


def call_reference(**changed):
    return reference.genft_linear(**{**TENSORS, "params": PARAMS, "config": CONFIG, **changed})


def call_delta_weight(**changed):
    return reference.delta_weight(**{"weight": TENSORS["weight"], "params": PARAMS, "config": CONFIG, **changed})


def call_factored_linear(**changed):
    return factored_linear(**{**TENSORS, **FACTORS, **changed})


def call_factored_reference(**changed):
    return reference.factored_linear(**{**TENSORS, **FACTORS, **changed})


def make_generator(**changed):
    return GenFTGenerator(**{"in_features": 6, "out_features": 6, "config": CONFIG, **changed})


def make_layer(**changed):
    return GenFTLinear(**{"in_features": 6, "out_features": 6, "config": CONFIG, **changed})


def call_layer(x):
    return make_layer()(x)


def from_linear(**changed):
    return GenFTLinear.from_linear(**{"linear": nn.Linear(6, 6), "generator": make_generator(), **changed})


def from_linear_with(bias):
    linear = nn.Linear(6, 6)
    linear.bias = nn.Parameter(bias, requires_grad=False)
    return from_linear(linear=linear)


def apply(**changed):
    return apply_genft(**{"model": Encoder(), "config": CONFIG, **changed})


def remove(**changed):
    return remove_genft(**{"model": apply(), **changed})


def enter_disabled(model):
    with disabled(model):
        pass


def enter_accumulate(model):
    with accumulate(model):
        pass


def save(**changed):
    return save_adapter(**{"model": apply(), "directory": "nowhere", **changed})


def load(**changed):
    return load_adapter(**{"model": apply(), "directory": "nowhere", **changed})


def export(**changed):
    return export_lora(**{"model": apply(), "directory": "nowhere", **changed})


def report(**changed):
    return fidelity_report(**{"model": apply(), "inputs": None, **changed})


TENSORS = dict(x=torch.randn(4, 6), weight=torch.randn(5, 6), bias=torch.randn(5))
FACTORS = dict(h=torch.randn(6, 3), b=torch.randn(5, 3))
PARAMS = GeneratorParameters(torch.randn(3, 6), torch.randn(6, 3), torch.randn(3, 5), torch.randn(5, 3))
CONFIG = GenFTConfig(shared_dim=2, specific_dim=1)
HUGE = {"huge": 10**400, "nan": float("nan"), "infinite": float("inf")}

OF_TENSORS = {
    "wrong-shape": torch.randn(7, 7),
    "no-dimension": torch.tensor(1.0),
    "integers": torch.ones(5, 6).long(),
    "meta": torch.randn(5, 6, device="meta"),
    "sparse": torch.randn(5, 6).to_sparse(),
    "complex": torch.randn(5, 6).cfloat(),
}
OF_BIASES = {
    "wrong-shape": torch.ones(4),
    "one": torch.ones(1),
    "integers": torch.ones(5).int(),
    "matrix": torch.ones(5, 5),
}
OF_SEEDS = kinds("None", "integer", "tensor") | {
    "negative": -1,
    "wide": 2**64,
    "huge": 10**400,
    "floats": torch.ones(1),
}
OF_BACKENDS = kinds() | {"unknown": "cublas"}
OF_DEVICES = kinds("None", "integer", "bool") | {"unknown": "nowhere"}
OF_DTYPES = kinds("None") | {"int": torch.int64, "float8": torch.float8_e4m3fn, "complex": torch.complex64}
OF_SIZES = kinds("integer") | {"zero": 0, "negative": -3, "half": 2.5}
OF_FLAGS = kinds("bool") | {"number": 1, "word": "yes"}
OF_FACTORS = kinds("integer", "float") | HUGE
OF_DROPOUT = kinds() | HUGE | {"one": 1.0, "negative": -0.1}
OF_ACTIVATIONS = kinds() | {"unknown": "elu"}
OF_NAMES = kinds("None", "string", "list") | {"empty": [], "empty-string": "", "numbers": [1], "mixed": {1, "a"}}
OF_BLOCKS = {
    "past-the-end": (2, (5,)),
    "negative": (2, (-1,)),
    "twice": (2, (0, 0)),
    "empty": (2, ()),
    "of-no-pair": (-1,),
    "zeros": (0, 0),
    "nothing": (),
    "count-zero": (0, (0,)),
    "count-float": (2.0, (0,)),
    "not-an-index": (2, ("0",)),
    "no-list": (2, 0),
    "bools": (2, (True,)),
}
OF_FUSED = {name: {"qkv": blocks} for name, blocks in OF_BLOCKS.items()}

# What is called, the argument that is wrong, and the values for it.
ENTRIES = [
    *[(call, name, kinds() | OF_TENSORS) for call in (call_genft_linear, call_reference) for name in ("x", "weight")],
    *[(call, "bias", kinds("None") | OF_BIASES) for call in (call_genft_linear, call_factored_linear, call_reference)],
    *[(call, name, kinds()) for call in (call_genft_linear, call_delta_weight) for name in ("params", "config")],
    *[(call, "training", OF_FLAGS) for call in (call_genft_linear, call_reference, call_delta_weight)],
    *[(call, "training", OF_FLAGS) for call in (call_factored_linear, call_factored_reference)],
    *[(call, "backend", OF_BACKENDS) for call in (call_genft_linear, call_factored_linear, make_layer, apply)],
    *[
        (call, name, values)
        for call in (call_factored_linear, call_factored_reference)
        for name, values in {
            "h": kinds() | OF_TENSORS,
            "b": kinds() | OF_TENSORS,
            "scale": OF_FACTORS,
            "activation": OF_ACTIVATIONS,
            "dropout": OF_DROPOUT,
        }.items()
    ],
    *[(make, name, OF_SIZES) for make in (make_generator, make_layer) for name in ("in_features", "out_features")],
    *[(make, "device", OF_DEVICES) for make in (make_generator, make_layer, backends.explain)],
    *[(make, "dtype", OF_DTYPES) for make in (make_generator, make_layer)],
    (make_generator, "config", kinds()),
    (make_layer, "config", kinds("None")),
    (make_layer, "generator", kinds("None")),
    (make_layer, "bias", OF_FLAGS),
    (call_layer, "x", kinds() | OF_TENSORS),
    (from_linear, "linear", kinds("module")),
    (from_linear, "generator", kinds()),
    (from_linear, "register_generator", OF_FLAGS),
    (from_linear, "blocks", kinds("None") | OF_BLOCKS | {"uneven": (4, (0,))}),
    (from_linear_with, "bias", OF_BIASES | {"complex": torch.ones(6).cfloat()}),
    (GenFTConfig.from_dict, "values", kinds("dict")),
    (apply, "model", kinds("module")),
    (apply, "config", kinds()),
    *[(call, "model", kinds("module")) for call in (remove, merge, unmerge, trainable_summary, explain, save, load)],
    *[(call, "model", kinds("module")) for call in (enter_disabled, enter_accumulate)],
    (remove, "keep_update", OF_FLAGS),
    *[(call, "model", kinds("module")) for call in (refresh, export, report)],
    *[(call, "directory", kinds("string")) for call in (save, load, export)],
    (export, "rank", kinds("None", "integer") | {"zero": 0, "negative": -1}),
    (export, "energy", kinds("None") | HUGE | {"zero": 0.0}),
    *[(GenFTConfig, name, kinds("integer") | HUGE | {"negative": -1}) for name in ("shared_dim", "specific_dim")],
    *[(GenFTConfig, f"{name}_activation", OF_ACTIVATIONS) for name in ("inner", "outer")],
    *[(GenFTConfig, name, kinds()) for name in ("ratio_scope", "transform", "delta_layout", "init_shared")],
    *[(GenFTConfig, f"init_specific_{name}", kinds()) for name in ("down", "up")],
    *[(GenFTConfig, name, OF_FLAGS) for name in ("bias", "tie_specific")],
    (GenFTConfig, "zero_delta", OF_FLAGS),
    *[(GenFTConfig, name, OF_FACTORS) for name in ("weight_ratio", "scaling")],
    (GenFTConfig, "dropout", OF_DROPOUT),
    (
        GenFTConfig,
        "target_modules",
        OF_NAMES | {"pattern": "(", "repeated": "a{99999999999999999999}", "deep": "(" * 9999},
    ),
    (GenFTConfig, "exclude_modules", OF_NAMES | {"pattern": "*"}),
    (GenFTConfig, "modules_to_save", OF_NAMES | {"string": "classifier"}),
    (GenFTConfig, "fused_blocks", kinds("None") | OF_FUSED | {"empty": {}, "number": {1: (2, (0,))}}),
]
# What the message names where it is not the argument itself.
NAMED = {"x": "(x|weight)", "weight": "(x|weight)", "blocks": "(blocks|out_features)"}
# By what is wrong: what is called, with which arguments for each kind of wrong, and what the message names.
CASES = {
    f"{call.__qualname__}-{name}": (
        call, {kind: {name: value} for kind, value in values.items()}, NAMED.get(name, name)
    )
    for call, name, values in ENTRIES
}  # fmt: skip
WITH_DROPOUT = {"training": True, "config": GenFTConfig(shared_dim=2, specific_dim=1, dropout=0.5)}
CASES |= {
    f"seed-{call.__name__}": (call, {kind: {"seed": seed} | WITH_DROPOUT for kind, seed in OF_SEEDS.items()}, "seed")
    for call in (call_genft_linear, call_delta_weight)
}
for field in GeneratorParameters._fields:
    wrong = kinds(*(["None"] if field.endswith("bias") else []))
    changed = {kind: {"params": PARAMS._replace(**{field: value})} for kind, value in wrong.items()}
    CASES[f"params.{field}"] = call_genft_linear, changed, rf"params\.{field}"
CASES |= {
    f"{call.__name__}-a-module-without-an-adapter": (call, {"relu": {"model": nn.ReLU()}}, message)
    for call, message in {
        apply: "target_modules matched nothing",
        enter_accumulate: "accumulate.model. needs a model",
        **dict.fromkeys((remove, merge, unmerge, trainable_summary, explain, enter_disabled, save), "no GenFT adapter"),
    }.items()
}
CONVOLUTION = nn.ModuleDict({"query": nn.Conv1d(2, 2, 1)})
CASES |= {
    "from_linear-relu": (from_linear, {"relu": {"linear": nn.ReLU()}}, "ReLU cannot be adapted"),
    "from_dict-unknown": (GenFTConfig.from_dict, {"name": {"values": {"a": 1}}}, "unknown configuration fields: a"),
    "from_dict-number": (GenFTConfig.from_dict, {"number": {"values": {1: 1}}}, "unknown configuration fields: 1"),
    "preset": (GenFTConfig.preset, {"unknown": {"name": "cola"}, "number": {"name": 3}}, "preset"),
    "load": (load, {"from-nowhere": {"directory": "nowhere/at/all"}}, "no adapter in nowhere/at/all"),
    "layer-by-name": (apply, {"conv": {"model": CONVOLUTION}}, "target module 'query': Conv1d cannot be adapted"),
}


@pytest.mark.parametrize("call, wrong, culprit", CASES.values(), ids=CASES)
def test_bad_input_is_refused_by_name(call, wrong, culprit):
    expected = (TypeError, ValueError, RuntimeError, FileNotFoundError)
    for kind, arguments in wrong.items():
        with pytest.raises(expected) as caught:
            call(**arguments)
            pytest.fail(f"{kind} is taken")
        # Raised by this package, not by what it calls; and short, whatever the value.
        assert re.search(rf"\b{culprit}\b", str(caught.value)), (kind, caught.value)
        assert re.search(r"[\\/]genft_kernels[\\/]", str(caught.traceback[-1].path)), (kind, caught.traceback[-1])
        assert len(str(caught.value)) < 700, kind


def test_cases_are_many():
    assert sum(len(wrong) for _, wrong, _ in CASES.values()) >= 1500


def test_a_model_is_as_it_was_after_bad_input():
    model = Encoder()
    before = snapshot(model)
    for bad in (dict(config=None), dict(config=CONFIG, backend=3), dict(config=GenFTConfig(target_modules=["no"]))):
        with pytest.raises((TypeError, ValueError)):
            apply_genft(model, **bad)
    assert snapshot(model) == before


def test_a_warning_names_the_layer_and_points_at_the_users_line():
    wide = GenFTConfig(shared_dim=9, specific_dim=9)
    misspelt = GenFTConfig(shared_dim=2, target_modules=["query", "no"])
    calls = {
        "target module 'layers.0.attention.query': k = ": lambda: apply_genft(Encoder(), wide),
        "k = ": lambda: GenFTLinear(6, 6, config=wide),
        "the specific units can never train": lambda: GenFTConfig.preset("vtab"),
        "target_modules: 'no' matches": lambda: apply_genft(Encoder(), misspelt),
    }
    for message, call in calls.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        (warning,) = [each for each in caught if str(each.message).startswith(message)]
        assert warning.filename == __file__
