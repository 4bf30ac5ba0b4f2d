"""Run in an empty environment: the installed package trains a layer, and brings its C++ sources and type marker."""

import importlib.resources
import sys

import torch

from genft_kernels import GenFTConfig, GenFTLinear

layer = GenFTLinear(48, 32, config=GenFTConfig(shared_dim=6, specific_dim=2, outer_activation="gelu", dropout=0.1))
x = torch.randn(2, 5, 48, requires_grad=True)
layer(x).square().sum().backward()
assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
assert all(parameter.grad is not None for parameter in layer.parameters() if parameter.requires_grad)

files = importlib.resources.files("genft_kernels")
assert (files / "py.typed").is_file()
assert (files / "csrc" / "philox.h").is_file(), "csrc/ is missing from the wheel"
assert "site-packages" in str(files), f"not the installed package: {files}"
assert "transformers" not in sys.modules and "triton" not in sys.modules, "importing the package is not light"
print("installed wheel: forward and backward ran")
