"""One adapted layer on the CPU, beside a frozen layer, PEFT LoRA and the materialised form: `make bench-layer`.

Two providers at a time are timed in turn (A B A B ...), and the ratio is the median over the pairs, so that a slow
spell of the machine hits both. Nothing is timed before its outputs and gradients agree with float64.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import genft_kernels
from genft_kernels import GenFTConfig, GenFTLinear, reference

RESULTS = Path(__file__).parent / "results" / "layer_cpu.json"
FEATURES, TOKENS, SPECIFIC_DIM = 768, 4096, 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What is compared with what, and the ratio that must not be exceeded (None: for information).
PAIRS = [
    ("factored", "lora", {"float32": 1.0, "bfloat16": 1.1}),
    ("tiled", "frozen", {"float32": 1.6, "bfloat16": 1.9}),
    ("factored", "materialised", {"float32": 1 / 1.5, "bfloat16": 1 / 1.5}),
    ("tiled", "materialised-tiled", {"float32": 1 / 1.5, "bfloat16": 1 / 1.5}),
    ("factored", "frozen", {}),
    ("lora", "frozen", {}),
    ("dropout", "frozen", {}),
    ("dropout", "materialised-dropout", {}),
]
FORMS = {"": {}, "tiled": dict(outer_activation="leaky_relu"), "dropout": dict(dropout=0.1)}


class Materialised(nn.Module):
    """The official way: dW is formed, every step of it kept for backward, and two outputs are added."""

    def __init__(self, layer: GenFTLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer, weight = self.layer, self.layer.frozen_weight
        delta = reference.delta_weight(weight, layer.parameters_of_generator(), layer.config, training=self.training)
        return F.linear(x, weight, layer.bias) + F.linear(x, delta)


def make_provider(name: str, k: int, dtype: torch.dtype) -> nn.Module:
    """A module from x [tokens, features] to y of that shape, in training mode; the same weights for each name."""
    torch.manual_seed(0)
    linear = nn.Linear(FEATURES, FEATURES, dtype=dtype).requires_grad_(False)
    if name == "frozen":
        return linear
    if name == "lora":
        return _peft_lora(linear, k, dtype)
    form = name.removeprefix("materialised").removeprefix("-").removeprefix("factored")
    config = GenFTConfig(
        shared_dim=k - SPECIFIC_DIM, specific_dim=SPECIFIC_DIM, inner_activation="tanh", weight_ratio=16.0,
        scaling=0.05, zero_delta=False, **FORMS[form],
    )  # fmt: skip
    layer = GenFTLinear.from_linear(linear, genft_kernels.GenFTGenerator(FEATURES, FEATURES, config))
    return Materialised(layer) if name.startswith("materialised") else layer


def _peft_lora(linear: nn.Linear, k: int, dtype: torch.dtype) -> nn.Module:
    """PEFT's LoRA of rank k with adapters in x's dtype, as fast as it gets; both matrices random."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=k, lora_alpha=k, target_modules=["0"], init_lora_weights=False)
    return inject_adapter_in_model(config, nn.Sequential(linear), "default").to(dtype).train()


def gate(name: str, k: int, dtype: torch.dtype) -> None:
    """Raise AssertionError unless y and dx agree with float64, within what that dtype may lose."""
    torch.manual_seed(1)
    x, dy = torch.randn(64, FEATURES, dtype=dtype), torch.randn(64, FEATURES, dtype=dtype)
    module = make_provider(name, k, dtype)
    exact = make_provider(name, k, dtype).double()
    results = []
    for each, precision in ((module, dtype), (exact, torch.float64)):
        torch.manual_seed(2)  # equal dropout masks
        leaf = x.detach().to(precision).clone().requires_grad_()
        y = each(leaf)
        y.backward(dy.to(precision))
        results.append((y.detach().double(), leaf.grad.double()))
    for what, actual, truth in zip(("y", "dx"), *results, strict=True):
        error = ((actual - truth).norm() / truth.norm()).item()
        assert error < 4 * torch.finfo(dtype).eps, f"{name}: {what} is off by {error:.2g}"


def seconds(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> tuple[float, float]:
    """(forward, backward) of one call, with gradients for x and for all that trains."""
    x.grad = None
    module.zero_grad(set_to_none=True)
    start = time.perf_counter()
    y = module(x)
    middle = time.perf_counter()
    y.backward(dy)
    return middle - start, time.perf_counter() - middle


def compare(name: str, base: str, k: int, dtype_name: str, pairs: int) -> dict:
    """Time two providers in turn; a row of medians and of the ratios pair by pair."""
    dtype = DTYPES[dtype_name]
    modules = [make_provider(each, k, dtype) for each in (name, base)]
    torch.manual_seed(1)
    x = torch.randn(TOKENS, FEATURES, dtype=dtype, requires_grad=True)
    dy = torch.randn(TOKENS, FEATURES, dtype=dtype)
    times = [[seconds(module, x, dy) for module in modules] for _ in range(pairs + 3)][3:]
    ratios = [sum(mine) / sum(other) for mine, other in times]
    low, middle, high = (
        statistics.quantiles(ratios, n=5)[0],
        statistics.median(ratios),
        statistics.quantiles(ratios, n=5)[3],
    )

    def milliseconds(which: int, part: slice) -> float:
        return round(1e3 * statistics.median(sum(pair[which][part]) for pair in times), 3)

    return {
        "provider": name, "base": base, "k": k, "dtype": dtype_name, "features": FEATURES, "tokens": TOKENS,
        "ratio": round(middle, 3), "ratio_p20": round(low, 3), "ratio_p80": round(high, 3),
        "forward_ms": milliseconds(0, slice(0, 1)), "backward_ms": milliseconds(0, slice(1, 2)),
        "base_forward_ms": milliseconds(1, slice(0, 1)), "base_backward_ms": milliseconds(1, slice(1, 2)),
        "pairs": pairs,
    }  # fmt: skip


def _line(row: dict) -> str:
    target = "" if row["target"] is None else f" (target {row['target']})"
    return (
        f"{row['dtype']:9} k={row['k']:<3} {row['provider']:>9} / {row['base']:20} {row['ratio']:.2f} "
        f"[{row['ratio_p20']:.2f}, {row['ratio_p80']:.2f}]{target}; ms forward {row['forward_ms']:.2f} / "
        f"{row['base_forward_ms']:.2f}, backward {row['backward_ms']:.2f} / {row['base_backward_ms']:.2f}"
    )


def main() -> None:
    """Print a line for each comparison and write the rows to a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__)
    parser.add_argument("--pairs", type=int, default=24, help="timed pairs for each comparison (default 24)")
    parser.add_argument("--k", type=int, nargs="+", default=[26, 37], help="hidden units, or LoRA rank (default 26 37)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"default {RESULTS.name} beside the other results")
    options = parser.parse_args()
    if options.pairs < 2 or min(options.k) <= SPECIFIC_DIM:
        parser.error(f"--pairs must be at least 2 and every k above {SPECIFIC_DIM}")
    rows = []
    for dtype_name in options.dtype:
        for k in options.k:
            for name in {name for pair in PAIRS for name in pair[:2]}:
                gate(name, k, DTYPES[dtype_name])
            for name, base, targets in PAIRS:
                row = compare(name, base, k, dtype_name, options.pairs)
                row["target"] = targets.get(dtype_name) and round(targets[dtype_name], 3)
                rows.append(row)
                print(_line(row), flush=True)
    environment = {
        "torch": torch.__version__, "genft_kernels": genft_kernels.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn_bf16_amx": torch.cpu._is_amx_tile_supported(),
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
