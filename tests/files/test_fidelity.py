"""The report on what arrives of an adapter: its gain tells a lost update from a kept one."""

import collections
import copy
import math
import warnings

import pytest
import torch
from torch import nn

from genft_kernels import GenFTConfig, apply_genft, fidelity_report
from tests.helpers.tiny_models import Encoder, randomise, tokens

pytest.importorskip("peft", reason="PEFT is not installed")


def adapted(**settings):
    torch.manual_seed(3)
    given = {"shared_dim": 2, "specific_dim": 1, "inner_activation": "tanh", "weight_ratio": 8.0, **settings}
    return randomise(apply_genft(Encoder(layers=2, dim=32).eval(), GenFTConfig(**given)))


def rows_of(model):
    return {(row.way, row.dtype): row for row in fidelity_report(model, tokens()).rows}


def test_report_has_each_way_in_each_dtype():
    rows = rows_of(adapted())
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    assert list(rows) == [(way, dtype) for way in ("frozen", "unmerged", "merged", "exported") for dtype in dtypes]
    for (way, dtype), row in rows.items():
        if way == "frozen":
            assert abs(row.gain) < 0.02 and row.drift > 0.05
        else:
            assert row.drift < 4 * torch.finfo(dtype).eps
            assert abs(row.gain - 1) < 0.1 * (torch.finfo(dtype).eps / torch.finfo(torch.bfloat16).eps) ** 0.5


def test_merging_into_16_bits_loses_a_small_update():
    rows = rows_of(adapted(scaling=1e-4).to(torch.bfloat16))
    merged, unmerged = (rows[way, torch.float32].gain for way in ("merged", "unmerged"))
    assert unmerged == pytest.approx(1, abs=1e-2) and abs(merged - 1) > 0.05


def test_report_is_a_table_that_says_what_is_missing():
    report = fidelity_report(adapted(outer_activation="gelu"), tokens())
    text = str(report)
    assert "exported" not in {row.way for row in report.rows} and "not exported: " in text and "rank=" in text
    assert text.splitlines()[0].split() == ["served", "dtype", "logit", "drift", "delta", "gain"]
    assert text.splitlines()[7].startswith("merged      float32")


def test_an_update_without_effect_has_no_gain():
    model = apply_genft(Encoder().eval(), GenFTConfig(shared_dim=2, specific_dim=1))
    assert all(math.isnan(row.gain) for row in fidelity_report(model, tokens()).rows)


def test_floating_point_inputs_are_cast_in_a_mapping_of_any_class():
    config = GenFTConfig(shared_dim=2, specific_dim=1, target_modules=["0"], zero_delta=False)
    model = apply_genft(nn.Sequential(nn.Linear(8, 8)), config)
    inputs = {"input": torch.randn(3, 8)}
    assert fidelity_report(model, collections.UserDict(inputs)).rows == fidelity_report(model, inputs).rows


def test_the_model_is_as_it_was():
    model = adapted(modules_to_save=["classifier"]).train()
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fidelity_report(model, dict(tokens=tokens()))
    after = model.state_dict()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    assert all(module.training for module in model.modules())
