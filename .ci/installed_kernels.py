"""Run in an empty environment: the CUDA kernels of the installed package load, be they compiled now or prebuilt."""

import sys

import torch

from genft_kernels import GenFTConfig, GenFTLinear
from genft_kernels.backends.cuda import extension
from genft_kernels.backends.cuda.launch import raise_for

expected = sys.argv[1]  # "cached" or "prebuilt"
kernels = extension.load()
assert "site-packages" in extension.__file__, f"not the installed package: {extension.__file__}"
assert f"CUDA kernels: {expected} " in extension.state(), extension.state()
if torch.cuda.is_available():
    layer = GenFTLinear(48, 32, config=GenFTConfig(outer_activation="gelu"), backend="cuda").cuda()
    layer(torch.randn(5, 48, device="cuda")).sum().backward()
    print(f"installed kernels: {expected}; forward and backward ran")
else:
    code = kernels.fold((0, 48, False), (0, 0, 0, 1, 48, 48, 8, 0, 1.0, 0, 0), 1.0, 0, 1, 0)
    try:
        raise_for(code, "fold", kernels)
    except RuntimeError as error:
        print(f"installed kernels: {expected}; without a GPU: {error}")
    else:
        raise AssertionError("a launch without a GPU is no error")
