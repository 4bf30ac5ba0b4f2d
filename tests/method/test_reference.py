"""The specification against an independent, element-wise statement of docs/method.md#the-method."""

import math

import pytest
import torch

from genft_kernels import GeneratorParameters, GenFTConfig, philox, reference
from tests.helpers.cases import CASES, make_data, run

SCALAR = {
    "identity": lambda z: z,
    "relu": lambda z: max(z, 0.0),
    "leaky_relu": lambda z: z if z > 0 else 0.01 * z,
    "gelu": lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
    "silu": lambda z: z / (1 + math.exp(-z)),
    "tanh": math.tanh,
}
SMALL = [case for case in CASES if case.in_features * case.out_features <= 2500]


def scalar_delta(weight, params, config, seed):
    """dW element by element, in Python floats."""
    out_features, in_features = weight.shape
    w = weight.tolist()
    p = {n: None if t is None else t.tolist() for n, t in params._asdict().items()}
    phi, psi = SCALAR[config.inner_activation], SCALAR[config.outer_activation]
    rho = config.weight_ratio
    if rho == "rms":
        rho = 1 / math.sqrt(sum(v * v for row in w for v in row) / (in_features * out_features))
    w_ratio, m_ratio = (rho, 1.0) if config.ratio_scope == "weight" else (1.0, rho)
    w = [[w_ratio * v for v in row] for row in w]
    keep = [philox.keep_mask(torch.tensor([seed]), s, in_features, out_features, config.dropout).t() for s in (0, 1)]
    drop = [k.double().div(1 - config.dropout).tolist() for k in keep]  # [in][out]

    def stage(rows, down, up, down_bias, up_bias, psi=psi):
        """psi(phi(rows A^T + a) B^T + c), a list of rows."""
        result = []
        for row in rows:
            hidden = []
            for unit, a in enumerate(down):
                z = sum(m_ratio * a_i * r_i for a_i, r_i in zip(a, row, strict=True))
                hidden.append(phi(z + (down_bias[unit] if down_bias else 0.0)))
            values = []
            for index, b in enumerate(up):
                z = sum(m_ratio * b_i * h_i for b_i, h_i in zip(b, hidden, strict=True))
                values.append(psi(z + (up_bias[index] if up_bias else 0.0)))
            result.append(values)
        return result

    transposed = [list(column) for column in zip(*w, strict=True)]
    if config.transform == "sum":
        c, d = (
            stage(rows, *(p[f"{name}_{end}"] for end in ("down", "up", "down_bias", "up_bias")), psi=lambda z: z)
            for name, rows in (("column", w), ("row", transposed))
        )  # [out][in], [in][out]
        each = [[psi(c[j][i] + d[i][j]) * drop[1][i][j] for i in range(in_features)] for j in range(out_features)]
        return torch.tensor(each, dtype=torch.float64) * config.scaling
    if config.transform != "row":
        y1 = stage(w, p["column_down"], p["column_up"], p["column_down_bias"], p["column_up_bias"])  # [out][in]
        y1 = [[y1[j][i] * drop[0][i][j] for i in range(in_features)] for j in range(out_features)]
        if config.transform == "column":
            return torch.tensor(y1, dtype=torch.float64) * config.scaling
        transposed = [list(column) for column in zip(*y1, strict=True)]
    d = stage(transposed, p["row_down"], p["row_up"], p["row_down_bias"], p["row_up_bias"])  # [in][out]
    d = torch.tensor(d, dtype=torch.float64)
    d = d if config.delta_layout == "out_in" else d.T  # [out, in]
    return d * torch.tensor(drop[1], dtype=torch.float64).T * config.scaling


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_update_is_the_method_element_by_element(case):
    data = make_data(case)
    delta = reference.delta_weight(data.weight, data.params, case.config, training=True, seed=case.seed)
    expected = scalar_delta(data.weight, data.params, case.config, case.seed)
    torch.testing.assert_close(delta.detach(), expected, rtol=1e-11, atol=1e-12)
    y = reference.genft_linear(data.x, data.weight, data.bias, data.params, case.config, training=True, seed=case.seed)
    torch.testing.assert_close(y.detach(), data.x.detach() @ (data.weight + expected).T + data.bias)


def test_dropout_is_off_outside_training_and_keeps_the_mean():
    case = next(case for case in CASES if case.name == "dropout-square")
    data = make_data(case)
    evaluated = reference.delta_weight(data.weight, data.params, case.config)
    column = GenFTConfig(shared_dim=5, specific_dim=2, dropout=0.5, transform="column")
    params = GeneratorParameters(*data.params[:2], None, None)
    exact = reference.delta_weight(data.weight, params, column)
    mean = torch.stack(
        [reference.delta_weight(data.weight, params, column, training=True, seed=s) for s in range(300)]
    ).mean(0)
    assert torch.equal(evaluated, reference.delta_weight(data.weight, data.params, case.config, seed=3))
    assert ((mean - exact).norm() / exact.norm()).item() < 0.1  # 1 / sqrt(300) = 0.06


def test_seed_is_drawn_from_torchs_generator_by_default():
    case = next(case for case in CASES if case.name == "dropout-square")
    data = make_data(case)
    torch.manual_seed(4)
    first = run(reference.genft_linear, data, case.config, training=True)["y"]
    second = run(reference.genft_linear, data, case.config, training=True)["y"]
    torch.manual_seed(4)
    assert not torch.equal(first, second)
    assert torch.equal(run(reference.genft_linear, data, case.config, training=True)["y"], first)
