"""GenFT and its floors as workloads: this package's layer and its two halves, the official way, and bare products."""

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks.layer.problem import Problem
from benchmarks.measure.workload import Workload
from genft_kernels import GeneratorParameters, GenFTConfig, reference
from genft_kernels.activations import activate
from genft_kernels.functional import factored_linear, genft_linear
from genft_kernels.parameters import as_group
from genft_kernels.philox import COLUMN_STREAM, ROW_STREAM, keep_mask
from genft_kernels.update import generate_factors


def frozen(problem: Problem) -> Workload:
    """`nn.Linear` without an update."""
    weight = problem.weight

    def formula(leaves: dict[str, Tensor]) -> tuple[Tensor]:
        return (F.linear(leaves["x"], weight.to(leaves["x"].dtype)),)

    function = functools.partial(F.linear, problem.x, weight)
    return Workload(function, {"x": problem.x}, (problem.dy,), formula, ("frozen",), (weight,))


def floor(problem: Problem, products: int) -> Workload:
    """The big products that a form needs (docs/method.md#what-it-costs) and nothing else, without autograd.

    Two: x W^T forward and dy W backward. Three: backward also dy^T x, as the tiled form has it.
    """
    x, dy, weight = problem.x.detach(), problem.dy, problem.weight
    y, dx, leaves = torch.empty_like(dy), torch.empty_like(x), {"x": problem.x}
    if products == 3:
        dw = torch.empty_like(weight)
        leaves["weight"] = weight

    def forward() -> tuple[Tensor]:
        return (torch.mm(x, weight.t(), out=y),)

    def backward() -> tuple[Tensor, ...]:
        torch.mm(dy, weight, out=dx)
        return (dx, torch.mm(dy.t(), x, out=dw)) if products == 3 else (dx,)

    def formula(leaves: dict[str, Tensor]) -> tuple[Tensor]:
        return (F.linear(leaves["x"], leaves.get("weight", weight).to(leaves["x"].dtype)),)

    same_as = "floor", products
    return Workload(forward, leaves, (dy,), formula, same_as, (weight,), own_backward=backward)


def layer(problem: Problem, backend: str) -> Workload:
    """The whole layer: W and the generator's parameters to H, and with it x to y."""
    settings = {"training": True, "seed": problem.seed, "backend": backend}
    arguments = problem.x, problem.weight, None, problem.params, problem.config
    return _generated(problem, lambda: genft_linear(*arguments, **settings))


def generation(problem: Problem, backend: str) -> Workload:
    """The half that does not see x: W and parameters to the thin factors h [in, k] and b [out, k]."""
    config, params = problem.config, as_group(problem.params)
    settings = {"dtype": problem.x.dtype, "dropout": config.dropout, "seed": problem.seed, "backend": backend}

    def generate() -> tuple[Tensor, Tensor]:
        h, b, _ = generate_factors([problem.weight], params, config, **settings)
        return h[0], b[0]

    def applied() -> Tensor:
        # The specification's token side makes what the factors stand for comparable.
        return reference.factored_linear(
            problem.x, problem.weight, None, *generate(), scale=config.scaling, activation=config.outer_activation,
            dropout=config.dropout, training=True, seed=problem.seed,
        )  # fmt: skip

    checked = _generated(problem, applied)
    leaves = {name: leaf for name, leaf in checked.leaves.items() if name != "x"}
    with torch.no_grad():
        grads = tuple(torch.randn_like(factor) for factor in generate())
    return dataclasses.replace(checked, function=generate, leaves=leaves, grads=grads, checked=checked)


def token_side(problem: Problem, backend: str) -> Workload:
    """The half that sees x: thin factors to y, as once they are generated."""
    case, config = problem.case, problem.config
    h, b = problem.factors(case.k)
    settings = {"activation": config.outer_activation, "dropout": config.dropout}
    settings |= {"scale": problem.scale(case.k, **settings), "training": True, "seed": problem.seed}

    def formula(leaves: dict[str, Tensor]) -> tuple[Tensor]:
        x = leaves["x"]
        return (reference.factored_linear(x, problem.weight.to(x.dtype), None, leaves["h"], leaves["b"], **settings),)

    return Workload(
        lambda: factored_linear(problem.x, problem.weight, None, h, b, **settings, backend=backend),
        {"x": problem.x, "h": h, "b": b}, (problem.dy,), formula, ("token side",), (problem.weight,),
    )  # fmt: skip


def official(problem: Problem, compiled: bool) -> Workload:
    """The official way: the update is materialised, every step of it kept for backward, and two outputs are added.

    Its parameters are in W's dtype. In the timed one dropout is PyTorch's; the gate looks at the same function with
    the masks of the specification in its place.
    """
    if compiled and problem.device.type == "cuda":
        functorch_config.donated_buffer = False  # a GPU's backward is timed by asking for it again and again
    forward = torch.compile(official_linear, fullgraph=True, dynamic=False) if compiled else official_linear
    config = problem.config
    params = GeneratorParameters(
        *(t if t is None else t.detach().to(problem.x.dtype).requires_grad_() for t in problem.params)
    )
    arguments = problem.x, problem.weight, params, config
    workload = _generated(problem, lambda: forward(*arguments, None), params)
    if config.dropout == 0:
        return workload
    sizes = problem.weight.shape[1], problem.weight.shape[0], config.dropout
    masks = [
        keep_mask(problem.seed, stream, *sizes).to(problem.x.dtype) / (1 - config.dropout)
        for stream in (COLUMN_STREAM, ROW_STREAM)
    ]  # [out, in]
    checked = _generated(problem, lambda: forward(*arguments, masks), params)
    return dataclasses.replace(workload, checked=checked)


def official_linear(
    x: Tensor, weight: Tensor, params: GeneratorParameters, config: GenFTConfig, masks: list[Tensor] | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + bias + x (sigma D), x [..., in]; of a configuration without generator biases, in training.

    Args:
        masks: of the column and the row stage, [out, in], in the place of dropout's own.
        bias: of the layer, [out].
    """

    def dropped(update: Tensor, mask: Tensor | None) -> Tensor:
        return F.dropout(update, config.dropout) if mask is None else update * mask

    column_mask, row_mask = masks or (None, None)
    phi, psi, rho = config.inner_activation, config.outer_activation, config.weight_ratio
    if config.ratio_scope == "all":
        params = GeneratorParameters(*(None if matrix is None else matrix * rho for matrix in params))
    scaled = weight if config.ratio_scope == "all" else weight * rho
    z1 = F.linear(scaled, params.column_down)  # [out, k]
    y1 = dropped(activate(psi, F.linear(activate(phi, z1), params.column_up)), column_mask)  # [out, in]
    z2 = F.linear(y1.T, params.row_down)  # [in, k]
    d = dropped(activate(psi, F.linear(activate(phi, z2), params.row_up)), None if masks is None else row_mask.T)
    return F.linear(x, weight, bias) + x @ (config.scaling * d)  # d [in, out]


def _generated(problem: Problem, function, params: GeneratorParameters | None = None) -> Workload:
    """A workload over x and the generator's parameters, held to the specification."""
    present = {f"params.{name}": t for name, t in (params or problem.params)._asdict().items() if t is not None}

    def formula(leaves: dict[str, Tensor]) -> tuple[Tensor]:
        x = leaves["x"]
        named = GeneratorParameters(**{name: leaves.get(f"params.{name}") for name in GeneratorParameters._fields})
        settings = {"training": True, "seed": problem.seed}
        return (reference.genft_linear(x, problem.weight.to(x.dtype), None, named, problem.config, **settings),)

    return Workload(function, {"x": problem.x, **present}, (problem.dy,), formula, ("genft",), (problem.weight,))
